# SPDX-License-Identifier: Apache-2.0
"""The cache of a mixer, inside transformers' own cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, CacheLayerMixin, StaticLayer
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from hmf.errors import HmfError


class MixerCacheLayer(CacheLayerMixin):
    """Named states of one mixer, each with the batch as its first dimension, and the number of tokens so far.

    It counts tokens as an attention layer does, so that a model without attention layers knows its sequence length.
    """

    supports_early_init = False

    def __init__(self, **kwargs: Any):
        super().__init__()
        self.states: dict[str, torch.Tensor] = {}
        self.seen_tokens = 0

    def store(self, states: dict[str, torch.Tensor], tokens: int) -> None:
        """Replace the states by those after `tokens` further tokens."""
        self.states = states
        self.seen_tokens += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        if not self.states:
            # An AttributeError, as from transformers' own layers.
            raise AttributeError("batch_size: not known before the first tokens")
        return next(iter(self.states.values())).shape[0]

    def reset(self) -> None:
        self.states, self.seen_tokens, self.is_initialized = {}, 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.states = {name: x.index_select(0, beam_idx.to(x.device)) for name, x in self.states.items()}

    def batch_select_indices(self, indices: torch.Tensor) -> None:  # of numbers, or bool, as in transformers' layers
        self.states = {name: x[indices, ...] for name, x in self.states.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.states.items()}

    def crop(self, tokens_to_remove: int) -> None:
        # transformers passes either a negative number of tokens to remove, or the positive length to keep.
        if tokens_to_remove == 0 or tokens_to_remove >= self.seen_tokens:
            return
        raise HmfError("a recurrent state cannot be rolled back: assisted or speculative decoding is not supported")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise HmfError("a mixer's cache holds states, not keys and values")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        raise HmfError("a mixer's cache holds states, not keys and values")


# An offloading cache moves keys and values between GPU and CPU. It does not move the small states of linear-attention
# layers, which it recognises by this class.
LinearAttentionCacheLayerMixin.register(MixerCacheLayer)


def adopt(cache: Cache, config: Any, batch: int | None = None) -> Cache:
    """Put a `MixerCacheLayer` for every mixer of a hybrid `config` into a cache that transformers or the user created.

    batch: the number of sequences of the next tokens. Raises HmfError for a cache with tokens of another model, with
    another number of sequences or with layers of different lengths, and for a class of cache that cannot hold states.
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
            f"past_key_values: the cache has {len(cache.layers)} layers and the model has {len(symbols)}; "
            "use DynamicCache(config=model.config)"
        )
    for index in config.recurrent_layers:
        layer = cache.layers[index]
        if isinstance(layer, MixerCacheLayer):
            continue
        if getattr(layer, "is_initialized", False):
            raise HmfError(
                "past_key_values: another model, or prefix tuning, filled the cache; start from an empty "
                "DynamicCache(config=model.config)"
            )
        cache.layers[index] = MixerCacheLayer()
    lengths = {layer.get_seq_length() for layer in cache.layers}
    if len(lengths) > 1:
        raise HmfError(
            f"past_key_values: its layers hold {sorted(lengths)} tokens, as after crop, reset or a forward pass that "
            "failed; start from an empty DynamicCache(config=model.config)"
        )
    for index in config.recurrent_layers:
        rows = getattr(cache.layers[index], "batch_size", batch)
        if batch not in (None, rows):
            raise HmfError(
                f"past_key_values: the cache holds {rows} sequences and the batch has {batch}; give the cache of these "
                "sequences, or an empty DynamicCache(config=model.config)"
            )
    if getattr(cache, "offloading", False):
        _check_offloading(len(symbols) - len(config.recurrent_layers))
    return cache


def _check_offloading(attentions: int) -> None:
    """transformers prefetches the keys of the next attention layer on a CUDA stream, so there must be two of them."""
    if not torch.cuda.is_available():
        raise HmfError("cache_implementation='offloaded': needs a CUDA device; leave it out")
    if attentions < 2:
        raise HmfError(
            f"cache_implementation='offloaded': needs at least two attention layers and the model has {attentions}; "
            "leave it out"
        )
