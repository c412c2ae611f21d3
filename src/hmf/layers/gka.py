# SPDX-License-Identifier: Apache-2.0
"""Gated KalmaNet (arXiv 2511.21016) with the dimensions of the attention that it replaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hmf.ops import gated_kalmanet

from .base import States
from .linear import LinearMixer

EPS = 1e-6  # added to the norms of q and k, and to beta


class GatedKalmaNet(LinearMixer):
    """Options: `hmf.config.layers.GKAOptions`.

    States: conv_q, conv_k and, with `use_v_conv`, conv_v [S, channels, W-1]; covariance and recurrent [S, H, K, K].
    """

    symbol = "GKA"
    decay_name = "a_proj"
    recurrent_states = ("covariance", "recurrent")

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        options = self.options
        if options.use_beta_gate:
            self.b_proj = nn.Linear(options.hidden_size, options.num_heads)
        if options.use_alpha_connection:
            self.alpha_proj = nn.Linear(options.hidden_size, options.num_heads)

    @staticmethod
    def convs(options: Any) -> dict[str, bool]:
        return dict.fromkeys("qkv" if options.use_v_conv else "qk", False)

    def activates(self, name: str) -> bool:
        return False  # as published: v without convolution has no activation

    def mix(self, hidden_states, states, cu_seqlens, position_embeddings) -> tuple[torch.Tensor, States]:
        new: States = {}
        inputs = self.inputs(hidden_states, states, cu_seqlens, new)
        before = None if states is None else (states["covariance"], states["recurrent"])
        o, (new["covariance"], new["recurrent"]) = gated_kalmanet(
            *inputs, before, cu_seqlens, bp_lambda=self.options.bp_lambda, **self.solver
        )
        return self.output(o, hidden_states), new

    @property
    def solver(self) -> dict[str, Any]:
        """The options that the op and its step share."""
        o = self.options
        return {"num_iter": o.num_iter, "ridge_strength": o.ridge_strength, "rescale": o.gla_rescale}

    def inputs(
        self, hidden_states: torch.Tensor, states: States | None, cu_seqlens: torch.Tensor | None, new: States
    ) -> tuple[torch.Tensor | None, ...]:
        """The op's q, k, v [B, T, H, K], g, gk and alpha (or None) [B, T, H]; conv states are written to `new`."""
        options = self.options
        q, k, v = self.project(hidden_states, states, cu_seqlens, new)
        beta = self.b_proj(hidden_states) if options.use_beta_gate else None
        alpha = self.alpha_proj(hidden_states) if options.use_alpha_connection else None
        g, gk, beta, alpha = self.gates(self.a_proj(hidden_states), beta, alpha)
        return *self.heads(q, k, v, beta), g, gk, alpha

    def gates(
        self, decay: torch.Tensor, beta: torch.Tensor | None, alpha: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """g, gk, beta and alpha [..., H] from their projections; beta and alpha may be None."""
        options, dtype = self.options, self.A_log.dtype
        none = torch.zeros_like(decay, dtype=dtype)
        g = self.decay_of(decay) if options.use_forgetting_gate else none
        beta = None if beta is None else beta.to(dtype).sigmoid() + EPS
        alpha = None if alpha is None else alpha.to(dtype).sigmoid()
        return g, g if options.use_forgetting_gate_kk else none, beta, alpha

    def heads(self, q, k, v, beta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The op's q, k, v [B, T, H, K]: heads expanded, q and k normalised, k and v multiplied by beta."""
        q = q.repeat_interleave(self.options.num_heads // q.shape[-2], dim=-2)
        q, k, v = normalise(q), normalise(self.expand("k", k)), self.expand("v", v)
        if beta is not None:
            k, v = (beta[..., None] * k).to(k.dtype), (beta[..., None] * v).to(v.dtype)
        return q, k, v


def normalise(x: torch.Tensor) -> torch.Tensor:
    """x / (||x|| + 1e-6) over the last dimension, in float32 or wider, returned in x.dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + EPS)).to(x.dtype)
