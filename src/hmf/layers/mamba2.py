# SPDX-License-Identifier: Apache-2.0
"""Mamba2 (arXiv 2405.21060) with the dimensions of the attention that it replaces: x, B and C replace v, k and q.

Legend: B batch, T tokens, S sequences, H query heads, Hk key/value heads, K head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hmf.ops import short_conv, state_space_dual

from .attention import norm_offset, rotate, stock_parameters
from .base import HeadRMSNorm, Mixer, Start, States, StateShape, init_decay, split_heads, wide_zeros

CONV_SIZE, QK_NORM_EPS, NORM_EPS = 4, 1e-6, 1e-5  # fixed in the published format


class Mamba2(Mixer):
    """Options: `hmf.config.layers.Mamba2Options`. States: conv [S, (H + 2 Hk) K, W-1], recurrent [S, H, K, K]."""

    symbol = "M2"
    float32_parameters = ("A_log", "dt_bias")

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        o = self.options
        self.heads, self.head_dim = o.ssm_cfg["ngroups"], o.ssm_cfg["d_state"]
        channels = o.d_inner + 2 * o.d_xb  # x, B, C
        self.in_proj = nn.Linear(o.d_model, o.d_inner + channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, CONV_SIZE, groups=channels)
        if o.use_qk_norm and "q_norm.weight" in stock_parameters(config, layer_idx):  # per head, whatever the base's
            self.B_norm = nn.RMSNorm(self.head_dim, eps=QK_NORM_EPS)
            self.C_norm = nn.RMSNorm(self.head_dim, eps=QK_NORM_EPS)
        self.A_log = wide_zeros(self.heads)
        self.dt_bias = wide_zeros(self.heads)
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = HeadRMSNorm(o.d_inner, eps=NORM_EPS)
        self.out_proj = nn.Linear(o.d_inner, o.d_model, bias=False)

    @property
    def output_projection(self) -> nn.Linear:
        return self.out_proj

    @classmethod
    def state_shapes(cls, config: Any, ranks: int = 1) -> dict[str, StateShape]:
        ssm = cls.options_for(config).ssm_cfg
        heads, head_dim = split_heads(ssm["ngroups"], ranks), ssm["d_state"]
        kv_heads = split_heads(config.num_key_value_heads, ranks)
        return {
            "conv": StateShape(((heads + 2 * kv_heads) * head_dim, CONV_SIZE - 1), "conv"),
            "recurrent": StateShape((heads, head_dim, head_dim), "recurrent"),
        }

    @property
    def _widths(self) -> tuple[int, ...]:
        """Widths of z, x, B, C and dt."""
        o = self.options
        return o.d_inner, o.d_xb, o.d_xb, o.d_inner, self.heads

    def sections(self, name: str) -> tuple[int, ...] | None:
        return {"in_proj": self._widths, "conv1d": self._widths[1:4]}.get(name.partition(".")[0])

    def mix(self, hidden_states, states, cu_seqlens, position_embeddings) -> tuple[torch.Tensor, States]:
        z, x, dt = self.project(hidden_states, position_embeddings)
        y, new = self.recur(x, dt, states, cu_seqlens)
        return self.output(y, z), new

    def recur(self, x, dt, states, cu_seqlens) -> tuple[torch.Tensor, States]:
        """Convolution and recurrence: x and dt from `project` -> y [B, T, H, K] for `output`, and the new states."""
        new: States = {}
        before = (None, None) if states is None else (states["conv"], states["recurrent"])
        x, new["conv"] = short_conv(x, *self.filters(x, "conv1d"), before[0], cu_seqlens)
        x, B, C = self.heads_of(x)
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)
        y, new["recurrent"] = state_space_dual(x, B, C, dt, -self.A_log.exp(), self.D, before[1], cu_seqlens)
        return y, new

    def project(self, hidden_states, position_embeddings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden_states [B, T, D] -> z [B, T, H K], the convolution's input [B, T, (H + 2 Hk) K], dt [B, T, H]."""
        o = self.options
        z, x, B, C, dt = self.in_proj(hidden_states).split(self._widths, dim=-1)
        B, C = (y.unflatten(-1, (-1, self.head_dim)) for y in (B, C))
        if hasattr(self, "B_norm"):
            B, C = self.B_norm(B), self.C_norm(C)
        if o.use_pos_emb:
            B, C = rotate(B, *position_embeddings), rotate(C, *position_embeddings)
        return z, torch.cat([x, B.flatten(-2), C.flatten(-2)], dim=-1), dt

    def streams(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The convolution's output [..., (H + 2 Hk) K] -> views x, B [..., Hk, K] and C [..., H, K]."""
        return tuple(y.unflatten(-1, (-1, self.head_dim)) for y in x.split(self._widths[1:4], dim=-1))

    def heads_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The convolution's output [..., (H + 2 Hk) K] -> x, B and C [..., H, K]."""
        x, B, C = self.streams(x)
        x, B = (y.repeat_interleave(self.heads // y.shape[-2], dim=-2) for y in (x, B))
        return x, B, C

    def output(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """y [B, T, H, K] and the gate z [B, T, H K] -> [B, T, D]."""
        dtype, compute = z.dtype, torch.promote_types(y.dtype, torch.float32)
        y = y.to(compute) * F.silu(z.to(compute)).view_as(y)
        return self.out_proj(self.norm(y).to(dtype).flatten(-2))

    def init_recurrence(self, generator: torch.Generator | None = None) -> None:
        init_decay(self.A_log, self.dt_bias, generator)
        nn.init.ones_(self.D)

    @torch.no_grad()
    def init_from_attention(self, attention: nn.Module, generator: torch.Generator, std: float) -> Start:
        """x, B, C are copied from v, k, q; the gate z is (W_o^T + W_v) / 2, with W_v's rows repeated H/Hk times.

        C also takes the base's scale of attention scores where that is not 1 / sqrt(K), and B and C the weights of
        norms over all heads, which become norms per head.
        """
        start = Start()
        parameters = dict(attention.named_parameters())
        v, transposed = parameters["v_proj.weight"], parameters["o_proj.weight"].T
        k, q, norms = self._keys_and_queries(attention, parameters)
        gate = (transposed + v.repeat_interleave(transposed.shape[0] // v.shape[0], 0)) / 2
        steps = torch.randn(self.heads, q.shape[1], generator=generator) * std
        self.in_proj.weight.copy_(torch.cat([gate, v, k, q, steps.to(q)]))
        start.derived["in_proj.weight"] = tuple(f"{name}_proj.weight" for name in "ovkq")
        self.out_proj.weight.copy_(parameters["o_proj.weight"])
        start.copied["out_proj.weight"] = "o_proj.weight"
        for name, (source, weight) in norms.items():
            self.get_parameter(name).copy_(weight)
            if weight is parameters[source]:
                start.copied[name] = source
            else:
                start.derived[name] = (source,)
        self.init_recurrence(generator)
        nn.init.ones_(self.norm.weight)
        weight = self.conv1d.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        nn.init.zeros_(self.conv1d.bias)
        start.initialised = ["A_log", "dt_bias", "D", "norm.weight", "conv1d.weight", "conv1d.bias"]
        start.mark_unused(parameters, ("gate_proj.weight", "gate_proj.bias"), "the layer has a gate of its own")
        for name in parameters.keys() - start.used() - start.unused.keys():
            start.unused[name] = (
                "no q/k norm in this layer" if "norm" in name else "this layer's projections have no bias"
            )
        return start

    def _keys_and_queries(
        self, attention: Any, parameters: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, tuple[str, torch.Tensor]]]:
        """Rows of in_proj for B and C, and for each norm of this layer the attention's norm and the weight.

        The layer multiplies C and B without a factor, as if the base's were 1 / sqrt(K). Another factor goes into C.
        A norm over all heads becomes one per head, and its weight, which differs by head, goes into the rows.
        """
        k, q, scale = parameters["k_proj.weight"], parameters["q_proj.weight"], attention.scaling * self.head_dim**0.5
        is_usual = math.isclose(scale, 1)
        if not hasattr(self, "B_norm"):
            return k, q if is_usual else q * scale, {}
        rows, weights = {"k_norm": k, "q_norm": q}, []
        for name in rows:
            weight, offset = parameters[f"{name}.weight"], norm_offset(getattr(attention, name))
            weight = weight + offset if offset else weight
            if len(weight) != self.head_dim:  # a norm over all heads; that of a single one is per head already
                rows[name] = rows[name] * weight[:, None]
                weight = torch.ones_like(weight[: self.head_dim])
            weights.append(weight)
        (k, q), (b, c) = rows.values(), weights
        c = c if is_usual else c * scale
        return k, q, {"B_norm.weight": ("k_norm.weight", b), "C_norm.weight": ("q_norm.weight", c)}
