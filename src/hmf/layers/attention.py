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


def with_query_scale(
    position_embeddings: tuple[torch.Tensor, torch.Tensor], position_ids: torch.Tensor | None, rope: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """(cos, sin), and for a base whose queries grow with their position the factor [B or 1, T, 1, 1] beside them.

    In Ministral 3 that is the log of how often the position exceeds the pre-training length. rope: `rope_parameters`.
    """
    if (beta := rope.get("llama_4_scaling_beta")) is None:
        return position_embeddings
    if position_ids is None:
        raise ValueError("position_ids: the base scales its queries by position; pass them")
    times = (position_ids // rope["original_max_position_embeddings"]).float()
    factor = (1 + beta * times.log1p())[..., None, None]
    return (*position_embeddings, factor.to(position_embeddings[0]))


def rotate_query(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """`rotate`, and the base's factor of queries if it has one: by what `with_query_scale` gives."""
    return rotate(x, cos, sin) if factor is None else rotate(x, cos, sin) * factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864) on x [B, T, H, K], i paired with i + K/2; cos, sin [B or 1, T, K]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[..., None, :] + torch.cat([-second, first], -1) * sin[..., None, :]
