# SPDX-License-Identifier: Apache-2.0
"""Shared by GDN, KDA and GKA: projections, short convolutions, head expansion, decay, gated output.

Legend: B batch, T tokens, H expanded heads, Hk key/value heads, K head_dim, D hidden_size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from hmf.ops import short_conv

from .base import HeadRMSNorm, Mixer, Start, States, StateShape, init_decay, split_heads, wide_zeros


class LowRank(nn.Module):
    """linearB(silu(linearA(x))): what `kv_proj_rank` adds to the repeated key or value heads."""

    def __init__(self, inputs: int, rank: int, outputs: int):
        super().__init__()
        self.linearA = nn.Linear(inputs, rank, bias=False)
        self.linearB = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linearB(F.silu(self.linearA(x)))


class LinearMixer(Mixer):
    """Base class of GDN, KDA and GKA. A subclass names its convolutions, its decay projection and its states."""

    float32_parameters = ("A_log", "dt_bias")
    starts_from_recurrence = True
    decay_name: ClassVar[str]
    recurrent_states: ClassVar[tuple[str, ...]]  # names of the [S, H, K, K] states

    def __init__(self, config: Any, layer_idx: int, use_decay: bool = True):
        super().__init__(config, layer_idx)
        o, convs = self.options, self.convs(self.options)
        widths = {"q": o.num_q_heads * o.head_dim, "k": o.num_k_heads * o.head_dim, "v": o.num_v_heads * o.head_dim}
        for name, width in widths.items():
            self.add_module(f"{name}_proj", nn.Linear(o.hidden_size, width, bias=False))
        for name, bias in convs.items():
            conv = nn.Conv1d(widths[name], widths[name], o.conv_size, groups=widths[name], bias=bias)
            self.add_module(f"{name}_conv1d", conv)
        inner = o.num_heads * o.head_dim
        if use_decay:
            self.add_decay()
        if o.use_gate:
            self.add_gate(inner)
        self.o_norm = HeadRMSNorm(o.head_dim, eps=o.norm_eps)
        self.o_proj = nn.Linear(inner, o.hidden_size, bias=False)
        if o.kv_proj_rank:
            self.proj_k = LowRank(widths["k"], o.kv_proj_rank, inner)
            self.proj_v = LowRank(widths["v"], o.kv_proj_rank, inner)
            if o.kv_learnable_residual:
                self.k_rep = nn.Parameter(torch.zeros(o.num_heads, o.num_k_heads))
                self.v_rep = nn.Parameter(torch.zeros(o.num_heads, o.num_v_heads))

    def add_decay(self) -> None:
        """Make the parameters that `decay` reads."""
        heads = self.options.num_heads
        self.add_module(self.decay_name, nn.Linear(self.hidden_size, heads, bias=False))
        self.A_log = wide_zeros(heads)
        self.dt_bias = wide_zeros(heads)

    def add_gate(self, inner: int) -> None:
        """Make the parameters that `gate` reads, for `inner` = H K channels."""
        self.g_proj = nn.Linear(self.hidden_size, inner, bias=False)

    @staticmethod
    def convs(options: Any) -> dict[str, bool]:
        """Which of q, k, v have a short convolution, and whether it has a bias."""
        raise NotImplementedError

    @classmethod
    def state_shapes(cls, config: Any, ranks: int = 1) -> dict[str, StateShape]:
        o = cls.options_for(config)
        heads = {"q": o.num_q_heads, "k": o.num_k_heads, "v": o.num_v_heads}
        convs = {
            f"conv_{name}": StateShape((split_heads(heads[name], ranks) * o.head_dim, o.conv_size - 1), "conv")
            for name in cls.convs(o)
        }
        recurrent = StateShape((split_heads(o.num_heads, ranks), o.head_dim, o.head_dim), "recurrent")
        return convs | dict.fromkeys(cls.recurrent_states, recurrent)

    def project(
        self, hidden_states: torch.Tensor, states: States | None, cu_seqlens: torch.Tensor | None, new: States
    ) -> list[torch.Tensor]:
        """q, k and v [B, T, heads, K], after their convolutions if they have any; conv states are written to `new`.

        One call convolves all of them, because torch.compile divides a layer into parts at each op.
        """
        projected = {name: getattr(self, f"{name}_proj")(hidden_states) for name in "qkv"}
        convs = self.convs(self.options)
        if convs:
            before = None if states is None else torch.cat([states[f"conv_{name}"] for name in convs], 1)
            x = torch.cat([projected[name] for name in convs], -1)
            weight, bias = self.filters(x, *(f"{name}_conv1d" for name in convs))
            x, after = short_conv(x, weight, bias, before, cu_seqlens)
            widths = [projected[name].shape[-1] for name in convs]
            projected |= zip(convs, x.split(widths, -1), strict=True)
            if after is not None:  # sequence parallelism computes no final states
                new.update(zip((f"conv_{name}" for name in convs), after.split(widths, 1), strict=True))
        for name in projected.keys() - convs.keys():
            if self.activates(name):
                projected[name] = F.silu(projected[name])
        return [x.unflatten(-1, (-1, self.options.head_dim)) for x in projected.values()]

    def activates(self, name: str) -> bool:
        """Whether projection `name` is followed by SiLU when it has no convolution."""
        return True

    def expand(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Key or value heads [B, T, Hk, K] -> [B, T, H, K]: repeated or mixed, plus the low-rank term."""
        heads, kv_heads = self.options.num_heads, x.shape[-2]
        if heads == kv_heads:
            return x
        mix = getattr(self, f"{name}_rep", None)
        if mix is None:
            repeated = x.repeat_interleave(heads // kv_heads, dim=-2)
        else:
            repeated = torch.einsum("hg,btgk->bthk", mix, x)
        low_rank = getattr(self, f"proj_{name}", None)
        return repeated if low_rank is None else repeated + low_rank(x.flatten(-2)).view_as(repeated)

    def decay(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Log decay g <= 0, [B, T, H] in float32 (float64 for float64 weights)."""
        return self.decay_of(getattr(self, self.decay_name)(hidden_states))

    def decay_of(self, projected: torch.Tensor) -> torch.Tensor:
        return -self.A_log.exp() * F.softplus(projected.to(self.A_log.dtype) + self.dt_bias)

    def output(self, o: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """RMSNorm per head, then the gate, then the output projection: o [B, T, H, K] -> [B, T, D]."""
        y = self.o_norm(o)
        if self.options.use_gate:
            y = y * self.gate(hidden_states, y.dtype).view_as(y)
        return self.o_proj(y.to(hidden_states.dtype).flatten(-2))

    def gate(self, hidden_states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Factors of the normed output [B, T, H K] in `dtype`."""
        return F.silu(self.g_proj(hidden_states).to(dtype))

    def init_recurrence(self, generator: torch.Generator | None = None) -> None:
        if hasattr(self, "A_log"):
            init_decay(self.A_log, self.dt_bias, generator)
        if hasattr(self, "k_rep"):
            for name in ("k", "v"):  # initially the same as repeating the heads
                weight = getattr(self, f"{name}_rep")
                with torch.no_grad():
                    weight.copy_(torch.eye(weight.shape[1]).repeat_interleave(weight.shape[0] // weight.shape[1], 0))

    @torch.no_grad()
    def init_from_attention(self, attention: nn.Module, generator: torch.Generator, std: float) -> Start:
        """Projections are copied from attention. `init_gate` sets the gate; other new matrices are random.

        With `own_shape`, values are copied for all query heads. A key head gets those rows of queries and keys that
        belong to the first of the channels of values that it serves.
        """
        start = Start()
        parameters = dict(attention.named_parameters())
        for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"):
            rows = parameters[name]
            if self.options.own_shape and name != "o_proj.weight":
                rows = self.rows_in_own_shape(rows, attention.head_dim, keep_all=name == "v_proj.weight")
                start.derived[name] = (name,)
            else:
                start.copied[name] = name
            self.get_parameter(name).copy_(rows)
        if self.options.use_gate:
            self.init_gate(parameters, start)
        self.o_norm.weight.fill_(1.0)
        self.init_recurrence(generator)
        self.init_rest(start, generator, std)
        start.mark_unused(parameters, ("q_norm.weight", "k_norm.weight"), "the layer normalises q and k itself")
        start.mark_unused(parameters, [f"{name}_proj.bias" for name in "qkvo"], "the layer's projections have no bias")
        start.mark_unused(parameters, ("gate_proj.weight", "gate_proj.bias"), "the layer has a gate of its own")
        return start

    def rows_in_own_shape(self, rows: torch.Tensor, head_dim: int, keep_all: bool) -> torch.Tensor:
        """Rows [Hk head_dim, D] of attention for its query heads; of these all, or those of this layer's key heads."""
        o, heads = self.options, rows.unflatten(0, (-1, head_dim))
        channels = o.num_v_heads * o.head_dim
        rows = heads.repeat_interleave(channels // len(rows), 0).flatten(0, 1)
        return rows if keep_all else rows.unflatten(0, (o.num_k_heads, -1))[:, : o.head_dim].flatten(0, 1)

    @torch.no_grad()
    def init_from_recurrence(self, recurrence: Any, generator: torch.Generator, std: float) -> Start:
        """Every tensor of the same name and shape is copied. The others start as they do from attention."""
        start, parameters = Start(), dict(recurrence.named_parameters())
        self.init_recurrence(generator)
        for name, parameter in self.named_parameters():
            source = "gk_proj.weight" if name == f"{self.decay_name}.weight" else name
            if (given := parameters.get(source)) is not None and given.shape == parameter.shape:
                parameter.copy_(given)
                start.copied[name] = source
        self.init_rest(start, generator, std)
        start.mark_unused(parameters, parameters, "the layer has no such tensor, or one of another shape")
        return start

    def init_rest(self, start: Start, generator: torch.Generator, std: float) -> None:
        """Record the tensors that `start` does not have as initialised. Matrices are random, biases zero."""
        for name, parameter in self.named_parameters():
            if name in start.copied or name in start.derived:
                continue
            start.initialised.append(name)
            if parameter.dim() > 1 and not name.endswith("_rep"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            elif name.endswith(".bias"):
                parameter.zero_()

    def init_gate(self, given: dict[str, nn.Parameter], start: Start) -> None:
        """The gate is (W_o^T + W_v) / 2, with W_v's rows repeated H/Hk times."""
        transposed, values = given["o_proj.weight"].T, given["v_proj.weight"]
        self.g_proj.weight.copy_((transposed + values.repeat_interleave(transposed.shape[0] // values.shape[0], 0)) / 2)
        start.derived["g_proj.weight"] = ("o_proj.weight", "v_proj.weight")
