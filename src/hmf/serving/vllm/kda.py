# SPDX-License-Identifier: Apache-2.0
"""Kimi Delta Attention inside vLLM (arXiv 2510.26692; equations in `hmf.ops.kda`): GDN's mixer with decays of channels.

States and decode steps are GDN's. Prefill in bfloat16 or float16 on a GPU is by vLLM's kernels.

Legend: N tokens of the batch, H heads (of this rank), K head_dim, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear

from hmf.ops import kimi_delta_attention

from .backends import HAS_KERNELS
from .gdn import BUILDER, GatedDeltaNet, states

__all__ = ["BUILDER", "build", "states"]


def build(symbol: str, config: Any, quant_config: Any, prefix: str, attention: nn.Module) -> nn.Module:
    """The mixer that replaces `attention`."""
    return KimiDeltaAttention(symbol, config, quant_config, prefix)


class KimiDeltaAttention(GatedDeltaNet):
    op = staticmethod(kimi_delta_attention)
    activation = staticmethod(torch.sigmoid)

    def _init_gates(self, column: Callable[..., ColumnParallelLinear]) -> int:
        self._init_low_rank("f")
        if self.options.use_gate:
            self._init_low_rank("g")
        return self.heads * self.options.head_dim

    def _init_low_rank(self, name: str) -> None:
        """`<name>_a_proj`, the same on all ranks, and `<name>_b_proj`, whose outputs are split over them."""
        hidden_size, rank = self.options.hidden_size, self.options.head_dim
        outputs = self.options.num_heads * self.options.head_dim
        first = ReplicatedLinear(hidden_size, rank, bias=False, prefix=f"{self.prefix}.{name}_a_proj")
        second = ColumnParallelLinear(rank, outputs, bias=False, prefix=f"{self.prefix}.{name}_b_proj")
        self.add_module(f"{name}_a_proj", first)
        self.add_module(f"{name}_b_proj", second)

    def decay(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Log decays [N, H, K] in float32."""
        projected = self.f_b_proj(self.f_a_proj(hidden_states)[0])[0].float() + self.dt_bias
        return -self.A_log.exp()[:, None] * F.softplus(projected).unflatten(-1, (-1, self.options.head_dim))

    def gate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.g_b_proj(self.g_a_proj(hidden_states)[0])[0]

    def _init_kernels(self) -> None:
        """vLLM's prefill kernel, which needs a key and a value for each head, and does not support float32."""
        self.chunks: Callable | None = None
        self.shares_heads = False
        if HAS_KERNELS and get_current_vllm_config().model_config.dtype != torch.float32:
            from vllm.third_party.flash_linear_attention.ops.kda import chunk_kda

            self.chunks = chunk_kda
