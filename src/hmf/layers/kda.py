# SPDX-License-Identifier: Apache-2.0
"""Kimi Delta Attention (arXiv 2510.26692) with the dimensions of the attention that it replaces."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hmf.ops import kimi_delta_attention

from .base import Start, wide_zeros
from .gdn import GatedDeltaNet


class KimiDeltaAttention(GatedDeltaNet):
    """Gated DeltaNet with a decay for each channel of the keys. Options: `KDAOptions`; states: those of GDN.

    Decay and output gate are projections of rank head_dim. The gate is a sigmoid.
    """

    symbol = "KDA"
    op = staticmethod(kimi_delta_attention)

    def add_decay(self) -> None:
        heads, head_dim = self.options.num_heads, self.options.head_dim
        self.f_a_proj = nn.Linear(self.hidden_size, head_dim, bias=False)
        self.f_b_proj = nn.Linear(head_dim, heads * head_dim, bias=False)
        self.A_log = wide_zeros(heads)
        self.dt_bias = wide_zeros(heads * head_dim)

    def add_gate(self, inner: int) -> None:
        self.g_a_proj = nn.Linear(self.hidden_size, self.options.head_dim, bias=False)
        self.g_b_proj = nn.Linear(self.options.head_dim, inner, bias=False)

    def decay(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Log decay g <= 0, [B, T, H, K] in float32 (float64 for float64 weights)."""
        projected = self.f_b_proj(self.f_a_proj(hidden_states)).to(self.A_log.dtype) + self.dt_bias
        return -self.A_log.exp()[:, None] * F.softplus(projected).unflatten(-1, (-1, self.options.head_dim))

    def gate(self, hidden_states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.g_b_proj(self.g_a_proj(hidden_states)).to(dtype).sigmoid()

    @torch.no_grad()
    def init_from_recurrence(self, recurrence: Any, generator: torch.Generator, std: float) -> Start:
        """As GDN does. Where the decay's rank allows it, every channel starts with the decay of its head."""
        start = super().init_from_recurrence(recurrence, generator, std)
        heads, size = self.options.num_heads, self.options.head_dim
        if heads > size:
            return start
        given = dict(recurrence.named_parameters())
        self.f_a_proj.weight[:heads] = given["gk_proj.weight"]
        self.f_b_proj.weight.zero_()
        self.f_b_proj.weight[:, :heads] = torch.eye(heads).repeat_interleave(size, 0)
        self.dt_bias.copy_(given["dt_bias"].repeat_interleave(size))
        for name, source in {"f_a_proj.weight": "gk_proj.weight", "dt_bias": "dt_bias"}.items():
            start.initialised.remove(name)
            start.derived[name] = (source,)
            del start.unused[source]
        return start

    def init_gate(self, given: dict[str, nn.Parameter], start: Start) -> None:
        """The gate's projections stay random, so all factors of the gate are about one half."""
