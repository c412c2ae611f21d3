# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet (arXiv 2412.06464) with the dimensions of the attention that it replaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hmf.ops import gated_delta_rule

from .base import States
from .linear import LinearMixer


class GatedDeltaNet(LinearMixer):
    """States: conv_q, conv_k, conv_v [S, channels, conv_size - 1] and recurrent [S, H, K, K]. Options: `GDNOptions`."""

    symbol = "GDN"
    decay_name = "gk_proj"
    recurrent_states = ("recurrent",)
    op = staticmethod(gated_delta_rule)

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.b_proj = nn.Linear(self.options.hidden_size, self.options.num_heads, bias=False)

    @staticmethod
    def convs(options: Any) -> dict[str, bool]:
        return dict.fromkeys("qkv", options.conv_bias) if options.use_short_conv else {}

    def mix(self, hidden_states, states, cu_seqlens, position_embeddings) -> tuple[torch.Tensor, States]:
        new: States = {}
        q, k, v = self.project(hidden_states, states, cu_seqlens, new)
        heads = self.options.num_heads
        q = q.repeat_interleave(heads // q.shape[-2], dim=-2)
        k, v = self.expand("k", k), self.expand("v", v)
        beta = self.b_proj(hidden_states).to(self.A_log.dtype).sigmoid()
        if self.options.allow_neg_eigval:
            beta = 2 * beta
        before = None if states is None else states["recurrent"]
        o, new["recurrent"] = self.op(
            l2_normalise(q), l2_normalise(k), v, self.decay(hidden_states), beta, before, cu_seqlens
        )
        return self.output(o, hidden_states), new


def l2_normalise(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension, summed in float32, returned in x.dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
