# SPDX-License-Identifier: Apache-2.0
"""One sequence on several processes: what tokens of one part need of the parts before it, for every layer type."""
