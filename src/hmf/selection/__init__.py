# SPDX-License-Identifier: Apache-2.0
"""Selection of the layers that keep attention, with one fused model that has attention and a mixer in every layer."""
