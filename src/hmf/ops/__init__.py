# SPDX-License-Identifier: Apache-2.0
"""Tensors in, tensors out: the recurrences and the short convolution, each with a sequential float32 definition."""

from .conv import short_conv
from .gdn import gated_delta_rule

__all__ = ["gated_delta_rule", "short_conv"]
