# SPDX-License-Identifier: Apache-2.0
"""What layers take over from the base family's attention: which tensors it has, and rotary positions.

Legend: B batch, T tokens, H heads, K head_dim.
"""

from __future__ import annotations

from typing import Any

import torch


def stock_parameters(config: Any, layer_idx: int) -> frozenset[str]:
    """Names of the parameters of the base family's own attention, as `q_proj.bias` or `q_norm.weight`.

    Asked of the family's class itself, so that no table repeats which family has biases or query and key norms.
    """
    with torch.device("meta"):
        attention = config.family.class_named("Attention")(config, layer_idx)
    return frozenset(name for name, _ in attention.named_parameters())


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864) on x [B, T, H, K], i paired with i + K/2; cos, sin [B or 1, T, K]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[..., None, :] + torch.cat([-second, first], -1) * sin[..., None, :]
