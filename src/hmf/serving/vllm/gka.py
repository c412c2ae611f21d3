# SPDX-License-Identifier: Apache-2.0
"""Gated KalmaNet inside vLLM: the layer of `hmf.layers`, with one product for all its input projections.

On a GPU the kernels do not repeat shared key and value heads, and they read and write states in the pool.

States of a request: the last conv_size - 1 inputs of the short convolutions of q, k and (with `use_v_conv`) v
[conv_size - 1, channels], the layout of vLLM's kernels; the covariance and the values' state [H, K, K].

A decode step on a GPU runs two kernels: one for the convolutions, and one for the norms, the solve, both states and
the output. They are separate because the heads that share a key also share its convolution state, which is updated in
place.

Legend: N tokens of the batch, S sequences, T tokens per sequence, H heads, K head_dim, D model dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from hmf.config.layers import GKAOptions, layer_options
from hmf.layers.base import StateShape, split_heads
from hmf.layers.gka import EPS, GatedKalmaNet
from hmf.ops import gated_kalmanet, short_conv

from .backends import RecurrentMetadata, RecurrentMetadataBuilder
from .hosted import HostedMixer
from .parts import convolve, joined, rms_norm
from .recurrent import Tensors, started

# In this order; some are optional.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj", "alpha_proj")
BUILDER = RecurrentMetadataBuilder


def states(symbol: str, config: Any, ranks: int) -> dict[str, StateShape]:
    """The states of one request on one of `ranks` ranks, in the order and layout that vLLM's kernels use."""
    options: GKAOptions = layer_options(config, symbol)
    streams = [options.num_q_heads, options.num_k_heads, *([options.num_v_heads] if options.use_v_conv else [])]
    channels = sum(split_heads(heads, ranks) for heads in streams) * options.head_dim
    recurrent = StateShape((split_heads(options.num_heads, ranks), options.head_dim, options.head_dim), "recurrent")
    conv = StateShape((options.conv_size - 1, channels), "conv")
    return {"conv": conv, "covariance": recurrent, "recurrent": recurrent}


def build(symbol: str, config: Any, quant_config: Any, prefix: str, attention: nn.Module) -> nn.Module:
    """The mixer that replaces `attention`."""
    return GKAMixer(symbol, config, prefix)


class GKAMixer(HostedMixer):
    mixer: GatedKalmaNet
    weight: torch.Tensor
    conv_weight: torch.Tensor
    states_of = staticmethod(states)

    def __init__(self, symbol: str, config: Any, prefix: str):
        super().__init__(symbol, config, prefix)
        self.projections = [name for name in PROJECTIONS if hasattr(self.mixer, name)]
        convs = [getattr(self.mixer, f"{name}_conv1d") for name in self.mixer.convs(self.mixer.options)]
        self.widths = [getattr(self.mixer, name).out_features for name in self.projections]
        self.register_buffer("weight", joined([getattr(self.mixer, name).weight for name in self.projections]), False)
        self.register_buffer("conv_weight", joined([conv.weight for conv in convs]), False)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.mixer.options.num_heads, self.mixer.options.head_dim)

    def project(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[Tensors, torch.Tensor | None]:
        projected = F.linear(hidden_states, self.weight)
        of = dict(zip(self.projections, projected.split(self.widths, dim=-1), strict=True))
        for name in ("b_proj", "alpha_proj"):
            if name in of:
                of[name] = of[name] + getattr(self.mixer, name).bias
        gates = self.mixer.gates(of["a_proj"], of.get("b_proj"), of.get("alpha_proj"))
        qkv = projected[:, : sum(self.widths[:3])]  # a view: the kernels accept rows with a stride
        return (qkv, *(gate for gate in gates if gate is not None)), of.get("g_proj")

    def recur(self, inputs: Tensors, states: Tensors, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, Tensors]:
        channels = len(self.conv_weight)
        x, rest = inputs[0].tensor_split([channels], dim=-1)
        x, window = short_conv(x, self.conv_weight, None, states[0].transpose(1, 2), cu_seqlens)
        g, gk, beta, alpha = self._gates(inputs)
        q, k, v = self._streams(torch.cat([x, rest], dim=-1))
        q, k, v = self.mixer.heads(q, k, v, beta)
        o, after = gated_kalmanet(q, k, v, g, gk, alpha, states[1:], cu_seqlens, **self.mixer.solver)
        return o, (window.transpose(1, 2), *after)

    def prefill(self, inputs: Tensors, pools: Tensors, metadata: RecurrentMetadata) -> torch.Tensor:
        qkv, options = inputs[0], self.mixer.options
        if not qkv.is_cuda:
            return super().prefill(inputs, pools, metadata)
        from hmf.ops import gka_chunk_triton

        if gka_chunk_triton.unsupported(*self._streams(qkv)):
            return super().prefill(inputs, pools, metadata)
        x, rest = qkv.tensor_split([len(self.conv_weight)], dim=-1)
        x = convolve(x, self.conv_weight, None, pools[0].transpose(1, 2), metadata)
        q, k, v = self._expanded(x, rest)
        g, gk, beta, alpha = self._gates(inputs)
        slots = metadata.state_indices_tensor_p.long()
        before = tuple(started(pool[slots], metadata.has_initial_states_p) for pool in pools[1:])
        o, after = gka_chunk_triton.chunked(
            q, k, v, g, gk, alpha, before, metadata.query_start_loc_p, **self.mixer.solver, beta=beta, eps=EPS
        )
        for pool, state in zip(pools[1:], after, strict=True):
            pool[slots] = state.to(pool.dtype)
        return o.view(-1, options.num_heads, options.head_dim)

    def decode(self, inputs: Tensors, slots: torch.Tensor) -> torch.Tensor:
        qkv = inputs[0]
        if not qkv.is_cuda:
            return super().decode(inputs, slots)
        from hmf.ops import gka_decode, gka_triton

        if gka_triton.unsupported(*self._streams(qkv)[:2]):
            return super().decode(inputs, slots)
        x, rest = qkv.tensor_split([len(self.conv_weight)], dim=-1)
        x = causal_conv1d_update(
            x,
            self.kv_cache[0].transpose(1, 2),
            self.conv_weight.squeeze(1),
            None,
            "silu",
            conv_state_indices=slots,
            null_block_id=NULL_BLOCK_ID,
            out=x.new_empty(x.shape),
        )
        q, k, v = self._expanded(x, rest)
        g, gk, beta, alpha = self._gates(inputs)
        o, _ = gka_decode.step(
            q,
            k,
            v,
            g,
            gk,
            alpha,
            self.kv_cache[1:],
            **self.mixer.solver,
            beta=beta,
            eps=EPS,
            slots=slots,
            null_slot=NULL_BLOCK_ID,
        )
        return o

    def finish(self, mixed: torch.Tensor, rest: torch.Tensor | None) -> torch.Tensor:
        out = rms_norm(mixed, self.mixer.o_norm.weight, self.mixer.o_norm.eps)
        if rest is not None:
            out = out * F.silu(rest.float()).view_as(out)
        return self.mixer.o_proj(out.flatten(1).to(mixed.dtype))

    def _gates(self, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """g, gk, beta, alpha: the inputs after q, k and v; None for gates that the options turn off."""
        gates, options = list(inputs[1:]), self.mixer.options
        g, gk = gates.pop(0), gates.pop(0)
        return g, gk, gates.pop(0) if options.use_beta_gate else None, gates.pop() if gates else None

    def _streams(self, qkv: torch.Tensor) -> list[torch.Tensor]:
        """[..., channels] -> q, k, v split into heads, as views."""
        return [x.unflatten(-1, (-1, self.mixer.options.head_dim)) for x in qkv.split(self.widths[:3], dim=-1)]

    def _expanded(self, x: torch.Tensor, rest: torch.Tensor) -> list[torch.Tensor]:
        """q, k, v from convolved channels x and the rest; heads are expanded only for low-rank terms."""
        q, k, v = self._streams(torch.cat([x, rest], dim=-1) if rest.shape[-1] else x)
        if self.mixer.options.kv_proj_rank:
            k, v = (self.mixer.expand(name, y[None])[0].contiguous() for name, y in (("k", k), ("v", v)))
        return [q, k, v]
