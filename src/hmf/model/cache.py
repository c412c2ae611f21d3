# SPDX-License-Identifier: Apache-2.0
"""The cache of a mixer, inside transformers' own cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from hmf.errors import HmfError


class MixerCacheLayer(CacheLayerMixin):
    """Named states of one mixer, each with the batch as its first dimension, and how many tokens they have seen.

    It counts tokens as an attention layer does, so a model without any attention layer still knows its length.
    """

    supports_early_init = False

    def __init__(self, **kwargs: Any):
        super().__init__()
        self.states: dict[str, torch.Tensor] = {}
        self.seen_tokens = 0

    def store(self, states: dict[str, torch.Tensor], tokens: int) -> None:
        """Replace the states by those after `tokens` more tokens."""
        self.states = states
        self.seen_tokens += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.states, self.seen_tokens, self.is_initialized = {}, 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.states = {name: x.index_select(0, indices.to(x.device)) for name, x in self.states.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.states.items()}

    def offload(self) -> None:
        self.states = {name: x.to("cpu", non_blocking=True) for name, x in self.states.items()}

    def prefetch(self) -> None:
        """States are moved to the op's device where they are used."""

    def crop(self, tokens_to_remove: int) -> None:
        raise HmfError("a recurrent state cannot be rolled back: assisted or speculative decoding is not supported")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise HmfError("a mixer's cache holds states, not keys and values")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        raise HmfError("a mixer's cache holds states, not keys and values")


def adopt(cache: Cache, config: Any) -> Cache:
    """Give every mixer of a hybrid `config` its own layer in a cache that transformers or the user made.

    Raises HmfError for a used cache of another model, or a kind of cache that cannot hold states.
    """
    symbols = config.pattern.symbols
    if not hasattr(cache, "layers") or any(isinstance(layer, StaticLayer) for layer in cache.layers):
        raise HmfError(
            f"past_key_values: {type(cache).__name__} is not supported; use DynamicCache(config=model.config)"
        )
    if not cache.layers and cache.layer_class_to_replicate is not None:
        cache.layers = [cache.layer_class_to_replicate() for _ in symbols]
    if len(cache.layers) != len(symbols):
        raise HmfError(
            f"past_key_values: has {len(cache.layers)} layers, the model {len(symbols)}; "
            "use DynamicCache(config=model.config)"
        )
    for index in config.pattern.replaced:
        layer = cache.layers[index]
        if isinstance(layer, MixerCacheLayer):
            continue
        if getattr(layer, "is_initialized", False):
            raise HmfError(
                "past_key_values: filled by another model; start from an empty DynamicCache(config=model.config)"
            )
        cache.layers[index] = MixerCacheLayer()
    return cache
