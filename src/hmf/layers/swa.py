# SPDX-License-Identifier: Apache-2.0
"""Sliding-window attention: the base's attention, limited to the last `window_size` positions.

Legend: B batch, T tokens, S sequences (rows or documents), P kept positions, H query heads, Hk key/value heads,
K head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hmf.config.layers import base_head_dim
from hmf.ops import KeySet, windowed_attention
from hmf.ops.window import latest

from .attention import (
    attention_scale,
    has_positions,
    norm_like,
    normalised,
    query_growth,
    rotate,
    rotate_query,
    stock_attention,
    stock_parameters,
    with_query_scale,
    without_positions,
)
from .base import Mixer, Start, States, StateShape, split_heads


class WindowMixer(Mixer):
    """A mixer with attention over windows, whose queries and keys have the base's positions.

    A subclass sets `has_positions`, and `growth` to the result of `query_growth` or None.
    """

    has_positions: bool
    growth: Callable[[torch.Tensor], torch.Tensor] | None

    def positioned(self, position_embeddings, position_ids) -> tuple[torch.Tensor, ...]:
        if not self.has_positions:
            position_embeddings = without_positions(position_embeddings)
        return with_query_scale(position_embeddings, position_ids, self.growth)


class SlidingWindowAttention(WindowMixer):
    """Options: `hmf.config.layers.SWAOptions`. States: k, v [S, P, Hk, K] with P < window_size; seen [S] tokens."""

    symbol = "SWA"

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.head_dim = base_head_dim(config)
        self.growth, self.has_positions = query_growth(config), has_positions(config, layer_idx)
        self.scale, self.dropout = attention_scale(config, layer_idx), config.attention_dropout or 0.0
        stock = stock_parameters(config, layer_idx)
        inner, kv = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias="q_proj.bias" in stock)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias="k_proj.bias" in stock)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias="v_proj.bias" in stock)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias="o_proj.bias" in stock)
        if "gate_proj.weight" in stock:
            self.gate_proj = nn.Linear(config.hidden_size, inner, bias="gate_proj.bias" in stock)
        if "q_norm.weight" in stock:
            attention = stock_attention(config, layer_idx)
            self.q_norm = norm_like(attention.q_norm, config.rms_norm_eps)
            self.k_norm = norm_like(attention.k_norm, config.rms_norm_eps)

    @classmethod
    def state_shapes(cls, config: Any, ranks: int = 1) -> dict[str, StateShape]:
        reach, kv_heads = cls.options_for(config).window_size - 1, split_heads(config.num_key_value_heads, ranks)
        window = StateShape((reach, kv_heads, base_head_dim(config)), "window")
        return {"k": window, "v": window, "seen": StateShape((), "count")}

    def mix(self, hidden_states, states, cu_seqlens, position_embeddings) -> tuple[torch.Tensor, States]:
        q, k, v = (
            normalised(getattr(self, f"{name}_norm", None), getattr(self, f"{name}_proj")(hidden_states), self.head_dim)
            for name in "qkv"
        )
        q, k = rotate_query(q, *position_embeddings), rotate(k, *position_embeddings[:2])
        reach = self.options.window_size - 1
        before, new = states or {}, {"seen": count_tokens(hidden_states, states, cu_seqlens)}
        keys = KeySet(k, v, 0, reach, before.get("k"), before.get("v"))
        dropout = self.dropout if self.training else 0.0
        o = windowed_attention(q, [keys], self.scale, before.get("seen"), cu_seqlens, dropout)
        for name, x in (("k", k), ("v", v)):
            new[name] = latest(x, reach, before.get(name), cu_seqlens)
        o = o.flatten(-2)
        if hasattr(self, "gate_proj"):
            o = o * self.gate_proj(hidden_states).sigmoid()
        return self.o_proj(o), new

    @torch.no_grad()
    def init_from_attention(self, attention: nn.Module, generator: torch.Generator, std: float) -> Start:
        """Every tensor is copied from the attention."""
        start = Start()
        for name, source in attention.named_parameters():
            self.get_parameter(name).copy_(source)
            start.copied[name] = name
        return start


def count_tokens(hidden_states: torch.Tensor, states: States | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """The number of tokens of each sequence so far, this call included: [S] int."""
    if cu_seqlens is None:
        lengths = torch.full(hidden_states.shape[:1], hidden_states.shape[1], device=hidden_states.device)
    else:
        lengths = cu_seqlens.diff().long()
    return lengths if states is None else states["seen"] + lengths
