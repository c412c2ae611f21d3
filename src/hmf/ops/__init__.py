# SPDX-License-Identifier: Apache-2.0
"""Functions of tensors: the recurrences and the short convolution, each defined by a sequential float32 reference."""

from . import samples  # noqa: F401  registers the gradient check that dispatch calls
from .conv import short_conv
from .gdn import gated_delta_rule
from .gka import gated_kalmanet
from .kda import kimi_delta_attention
from .ssd import linear_attention, state_space_dual
from .window import KeySet, windowed_attention

__all__ = [
    "KeySet",
    "gated_delta_rule",
    "gated_kalmanet",
    "kimi_delta_attention",
    "linear_attention",
    "short_conv",
    "state_space_dual",
    "windowed_attention",
]
