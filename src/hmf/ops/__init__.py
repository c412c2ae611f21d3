# SPDX-License-Identifier: Apache-2.0
"""Tensors in, tensors out: the recurrences and the short convolution, each with a sequential float32 definition."""

from . import samples  # noqa: F401  it checks backward kernels for dispatch
from .conv import short_conv
from .gdn import gated_delta_rule
from .gka import gated_kalmanet
from .ssd import linear_attention, state_space_dual
from .window import KeySet, windowed_attention

__all__ = [
    "KeySet",
    "gated_delta_rule",
    "gated_kalmanet",
    "linear_attention",
    "short_conv",
    "state_space_dual",
    "windowed_attention",
]
