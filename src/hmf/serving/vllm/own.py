# SPDX-License-Identifier: Apache-2.0
"""The base's own recurrent layers (Qwen3.5's Gated DeltaNet): vLLM's module, or that of `hmf.layers`.

vLLM's module needs a GPU and bfloat16 or float16. Its CPU kernels support neither float32 nor the float32 states of
convolutions that a Hybrid has by default.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import (
    QwenGatedDeltaNetAttention,
    _resolve_gdn_prefill_backend,
)

from hmf.layers.base import StateShape
from hmf.layers.own import own_recurrence_class, own_state_shapes

from .backends import HAS_KERNELS, RecurrentMetadataBuilder
from .gdn import has_flashinfer
from .hosted import HostedMixer
from .recurrent import Tensors

BUILDER = RecurrentMetadataBuilder
# vLLM's module joins the projections of Qwen3.5, as they are joined in the checkpoints of Qwen3-Next.
OWN_STACKED = {
    ".linear_attn.in_proj_qkv.": (".linear_attn.in_proj_qkvz.", (0, 1, 2)),
    ".linear_attn.in_proj_z.": (".linear_attn.in_proj_qkvz.", 3),
    ".linear_attn.in_proj_b.": (".linear_attn.in_proj_ba.", 0),
    ".linear_attn.in_proj_a.": (".linear_attn.in_proj_ba.", 1),
}


def states(symbol: str, config: Any, ranks: int) -> dict[str, StateShape]:
    """The states of one request on one of `ranks` ranks; those of vLLM's module have the same sizes."""
    return own_state_shapes(config, ranks)


def has_kernels(vllm_config: VllmConfig) -> bool:
    """Whether vLLM's module can run these layers."""
    return HAS_KERNELS and vllm_config.model_config.dtype != torch.float32


def build(symbol: str, config: Any, quant_config: Any, prefix: str, stock: nn.Module) -> nn.Module:
    """The layer's recurrence. `stock` is replaced in any case: it has the order of projections of Qwen3-Next."""
    vllm_config = get_current_vllm_config()
    if not has_kernels(vllm_config):
        return OwnRecurrence(symbol, config, prefix)
    choose_prefill(vllm_config)
    joined = hasattr(_hosted(config), "fix_query_key_value_ordering")  # the projections of Qwen3-Next
    return QwenGatedDeltaNetAttention(config, vllm_config, prefix, gqa_interleaved_layout=joined)


def choose_prefill(vllm_config: VllmConfig) -> None:
    """Select vLLM's Triton kernels where vLLM would choose those of FlashInfer but cannot import them.

    vLLM imports them at the first prefill, and the failure would stop the engine.
    """
    if _resolve_gdn_prefill_backend(vllm_config)[1] == "flashinfer" and not has_flashinfer():
        vllm_config.additional_config = (vllm_config.additional_config or {}) | {"gdn_prefill_backend": "triton"}


def _hosted(config: Any) -> Any:
    return own_recurrence_class(config.family.class_named(config.family.own_recurrence))


class OwnRecurrence(HostedMixer):
    states_of = staticmethod(states)

    def __init__(self, symbol: str, config: Any, prefix: str):
        super().__init__(symbol, config, prefix)
        for name in self.mixer.float32_parameters:
            parameter = self.mixer.get_parameter(name)
            parameter.data = parameter.data.float()

    @staticmethod
    def class_of(symbol: str, config: Any) -> Any:
        return _hosted(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """[N, D] -> [N, D], with the signature of vLLM's module."""
        return super().forward(None, hidden_states)

    def project(self, positions: None, hidden_states: torch.Tensor) -> tuple[Tensors, None]:
        return (hidden_states,), None

    def recur(self, inputs: Tensors, states: Tensors, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, Tensors]:
        mixed, after = self.mixer.mix(*inputs, dict(zip(self.states, states, strict=True)), cu_seqlens, None)
        return mixed, tuple(after[name] for name in self.states)
