# SPDX-License-Identifier: Apache-2.0
"""Properties of the base family's attention that layers reuse: its parameters, rotary positions and query scaling.

Legend: B batch, T tokens, H heads, K head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def stock_parameters(config: Any, layer_idx: int) -> frozenset[str]:
    """Names of the parameters of the base family's own attention, such as `q_proj.bias` or `q_norm.weight`.

    They are read from the family's class, so that no table lists which family has biases or query and key norms.
    """
    with torch.device("meta"):
        attention = config.family.class_named("Attention")(config, layer_idx)
    return frozenset(name for name, _ in attention.named_parameters())


def query_growth(config: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The position-dependent factor of the base's queries: position_ids [B or 1, T] -> [B or 1, 1, T, 1], or None.

    Only Ministral 3 has one. There it grows with the logarithm of the position divided by the pre-training length.
    """
    if (grow := config.family.query_growth()) is None:
        return None
    rope = config.rope_parameters
    original = rope["original_max_position_embeddings"]
    return functools.partial(grow, beta=rope["llama_4_scaling_beta"], max_position_embeddings=original)


def with_query_scale(
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    position_ids: torch.Tensor | None,
    growth: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, ...]:
    """(cos, sin), or (cos, sin, factor) where `query_growth` gives a factor [B or 1, T, 1, 1]."""
    if growth is None:
        return position_embeddings
    if position_ids is None:
        raise ValueError("position_ids: the base scales its queries by position; pass position_ids")
    return (*position_embeddings, growth(position_ids).transpose(1, 2).to(position_embeddings[0]))


def rotate_query(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """`rotate`, multiplied by the base's query factor if there is one; arguments as `with_query_scale` returns them."""
    return rotate(x, cos, sin) if factor is None else rotate(x, cos, sin) * factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864) on x [B, T, H, K], i paired with i + K/2; cos, sin [B or 1, T, K]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[..., None, :] + torch.cat([-second, first], -1) * sin[..., None, :]
