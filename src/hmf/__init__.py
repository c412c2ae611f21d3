# SPDX-License-Identifier: Apache-2.0
"""Turn a pre-trained Transformer into a Hybrid of attention and state-space layers."""

__version__ = "0.1.0"
