# SPDX-License-Identifier: Apache-2.0
"""Which layers keep attention: one fused model in which every layer has attention and mixer, and ways to choose."""
