# SPDX-License-Identifier: Apache-2.0
"""Mamba2 inside vLLM: the layer of `hmf.layers`, with kernels on a GPU.

The projections are compiled with the model. Between them, vLLM's kernels run the convolutions and the prefill, and a
kernel of `hmf.ops` runs a decode step. The kernels' states have the layout [H, V, K]. vLLM's kernels require as many
heads for B as for C. Here B has the key heads and C has the query heads, so B and x are repeated for prefill.

Legend: N tokens of the batch, S sequences, D model dim, H query heads, K/V head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from hmf.layers.mamba2 import Mamba2

from .backends import HAS_KERNELS, SSD_CHUNK, SSDMetadata, SSDMetadataBuilder
from .hosted import HostedMixer, states  # noqa: F401 (part of this module's interface, like `build`)
from .parts import convolve
from .recurrent import Tensors, started

BUILDER = SSDMetadataBuilder


def build(symbol: str, config: Any, quant_config: Any, prefix: str, attention: nn.Module) -> nn.Module:
    """The mixer that replaces `attention`."""
    return Mamba2Mixer(symbol, config, prefix)


class Mamba2Mixer(HostedMixer):
    mixer: Mamba2

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.mixer.heads, self.mixer.head_dim)

    def project(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        x, rotary = hidden_states[None], None
        if self.mixer.options.use_pos_emb:
            rotary = self.tables(x, positions[None])
        z, x, dt = (y[0] for y in self.mixer.project(x, rotary))
        return (x, dt), z

    def recur(self, inputs: Tensors, before: Tensors, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, Tensors]:
        x, dt = inputs
        y, after = self.mixer.recur(x, dt, dict(zip(self.states, before, strict=True)), cu_seqlens)
        return y, tuple(after[name] for name in self.states)

    def finish(self, mixed: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        return self.mixer.output(mixed, rest)

    def prefill(self, inputs: Tensors, pools: Tensors, metadata: SSDMetadata) -> torch.Tensor:
        if not _has_kernels(inputs):
            return super().prefill(inputs, pools, metadata)
        from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

        mixer, slots = self.mixer, metadata.state_indices_tensor_p.long()
        x, dt = inputs
        x = convolve(x, mixer.conv1d.weight, mixer.conv1d.bias, pools[0], metadata)
        x, B, C = mixer.heads_of(x)
        y = torch.empty_like(x)
        after = mamba_chunk_scan_combined_varlen(
            x,
            dt,
            -mixer.A_log.exp(),
            B,
            C,
            SSD_CHUNK,
            metadata.query_start_loc_p,
            metadata.cu_chunk_seqlen_p,
            metadata.last_chunk_indices_p,
            metadata.seq_idx_p,
            y,
            D=mixer.D,
            dt_bias=mixer.dt_bias,
            dt_softplus=True,
            initial_states=started(pools[1][slots], metadata.has_initial_states_p),
            state_dtype=pools[1].dtype,
        )
        pools[1][slots] = after
        return y

    def decode(self, inputs: Tensors, slots: torch.Tensor) -> torch.Tensor:
        if not _has_kernels(inputs):
            return super().decode(inputs, slots)
        from hmf.ops.ssd_decode import decode

        mixer, (x, dt) = self.mixer, inputs
        x = causal_conv1d_update(
            x,
            self.kv_cache[0],
            mixer.conv1d.weight.squeeze(1),
            mixer.conv1d.bias,
            "silu",
            conv_state_indices=slots,
            null_block_id=NULL_BLOCK_ID,
            out=x.new_empty(x.shape),
        )
        x, B, C = mixer.streams(x)
        return decode(x, B, C, dt, mixer.A_log, mixer.dt_bias, mixer.D, self.kv_cache[1], slots, NULL_BLOCK_ID)


def _has_kernels(inputs: Tensors) -> bool:
    """Whether to use vLLM's kernels, which need CUDA. In float32 they round products to TF32, unlike `hmf.ops`."""
    return HAS_KERNELS and inputs[0].dtype != torch.float32
