# SPDX-License-Identifier: Apache-2.0
"""vLLM's state backends for recurrent layers: one for each layer type, all alike.

A backend of its own lets layer types with different states share a model. vLLM names backends by their path and sends
the names between its processes, so each needs a path: `hmf.serving.vllm.backends.GDN` and so on.
"""

from __future__ import annotations

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

from .support import MIXERS


class RecurrentMetadata(BaseMambaAttentionMetadata):
    """Which requests of a batch decode or prefill, and their state slots."""


class RecurrentMetadataBuilder(BaseMambaAttentionMetadataBuilder[RecurrentMetadata]):
    metadata_cls = RecurrentMetadata
    needs_causal_conv1d_metadata = False


class RecurrentBackend(AttentionBackend):
    @classmethod
    def get_name(cls) -> str:
        return f"HMF_{cls.__name__}"

    @staticmethod
    def get_builder_cls() -> type[RecurrentMetadataBuilder]:
        return RecurrentMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


for _symbol in MIXERS:
    globals()[_symbol] = type(_symbol, (RecurrentBackend,), {"__module__": __name__})


def state_backend(symbol: str) -> MambaAttentionBackendEnum:
    """The member of vLLM's table of state backends that stands for a layer symbol, made on first use."""
    name = f"HMF_{symbol}"
    if name not in MambaAttentionBackendEnum.__members__:
        register_backend(name, f"{__name__}.{symbol}", is_mamba=True)
    return MambaAttentionBackendEnum[name]
