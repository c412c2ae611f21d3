# SPDX-License-Identifier: Apache-2.0
"""vLLM's state backends for recurrent layers: one for each layer type.

With a backend per type, layer types with different states can be in one model. vLLM identifies backends by their
import path and sends it between its processes, so each has one: `hmf.serving.vllm.backends.GDN` and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend
from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

from .support import SERVED_BY, mixer_module

HAS_KERNELS = current_platform.is_cuda()  # whether vLLM's kernels of convolutions, GDN and Mamba2 are available
SSD_CHUNK = 256  # chunk size of vLLM's Mamba2 kernels, as in the published Mamba2 models


class RecurrentMetadata(BaseMambaAttentionMetadata):
    """Which requests of a batch decode or prefill, and their state slots."""


class RecurrentMetadataBuilder(BaseMambaAttentionMetadataBuilder[RecurrentMetadata]):
    metadata_cls = RecurrentMetadata
    needs_causal_conv1d_metadata = HAS_KERNELS


@dataclass
class SSDMetadata(RecurrentMetadata):
    """Metadata with the chunks for vLLM's Mamba2 kernels."""

    seq_idx_p: torch.Tensor | None = None  # the request of each chunk


class SSDMetadataBuilder(RecurrentMetadataBuilder):
    metadata_cls = SSDMetadata

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        if not metadata.num_prefills or not HAS_KERNELS:
            return metadata
        bounds, of, last, _ = self._build_chunk_metadata_tensors(SSD_CHUNK, metadata, common_attn_metadata)
        return replace(metadata, cu_chunk_seqlen_p=bounds, seq_idx_p=of, last_chunk_indices_p=last)


@dataclass
class WindowMetadata(SSDMetadata):
    """Metadata with the lengths of the prefills on the CPU, which avoids synchronisation with the GPU."""

    tokens_p: tuple[int, ...] = ()
    computed_p: tuple[int, ...] = ()  # tokens before them
    made: dict[Any, Any] = field(default_factory=dict)  # layouts that the layers of a step share


class WindowMetadataBuilder(SSDMetadataBuilder):  # a layer with windows may contain a Mamba2
    metadata_cls = WindowMetadata

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        if not metadata.num_prefills or not HAS_KERNELS:
            return metadata
        computed, bounds = self._prefill_cpu_metadata(
            common_attn_metadata, metadata.num_reqs, metadata.num_prefills, metadata.num_decode_tokens
        )
        return replace(metadata, tokens_p=tuple(bounds.diff().tolist()), computed_p=tuple(computed.tolist()), made={})


def fresh_requests(tokens: int, count: int, device: torch.device) -> WindowMetadata:
    """The metadata of `count` new requests with `tokens` tokens in total, in slots 1 ... count, for any layer type."""
    bounds = (torch.arange(count + 1) * tokens // count).int()
    nums, batch, offsets = compute_causal_conv1d_metadata(bounds, device=device)
    before = torch.zeros(count, dtype=torch.int32)
    chunks = BaseMambaAttentionMetadataBuilder._compute_chunk_metadata(SSD_CHUNK, count, before, bounds)
    starts, of, last = (torch.tensor(x, dtype=torch.int32, device=device) for x in chunks[:3])
    return WindowMetadata(
        num_prefills=count,
        num_prefill_tokens=tokens,
        num_decodes=0,
        num_decode_tokens=0,
        num_reqs=count,
        has_initial_states_p=torch.zeros(count, dtype=torch.bool, device=device),
        query_start_loc_p=bounds.to(device),
        state_indices_tensor_p=torch.arange(1, count + 1, dtype=torch.int32, device=device),
        state_indices_tensor_d=None,
        query_start_loc_d=None,
        num_accepted_tokens=None,
        seq_lens=bounds.diff().to(device),
        cu_chunk_seqlen_p=starts,
        seq_idx_p=of,
        last_chunk_indices_p=last,
        nums_dict=nums,
        batch_ptr=batch,
        token_chunk_offset_ptr=offsets,
        tokens_p=tuple(bounds.diff().tolist()),
        computed_p=(0,) * count,
    )


class RecurrentBackend(AttentionBackend):
    @classmethod
    def get_name(cls) -> str:
        return f"HMF_{cls.__name__}"

    @classmethod
    def get_builder_cls(cls) -> type[RecurrentMetadataBuilder]:
        return mixer_module(cls.__name__).BUILDER

    @classmethod
    def is_ssm(cls) -> bool:
        return True


for _symbol in SERVED_BY:
    globals()[_symbol] = type(_symbol, (RecurrentBackend,), {"__module__": __name__})


def state_backend(symbol: str) -> MambaAttentionBackendEnum:
    """The member of vLLM's enum of state backends for a layer symbol; it is registered on first use."""
    name = f"HMF_{symbol}"
    if name not in MambaAttentionBackendEnum.__members__:
        register_backend(name, f"{__name__}.{symbol}", is_mamba=True)
    return MambaAttentionBackendEnum[name]
