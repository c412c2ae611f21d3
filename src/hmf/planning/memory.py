# SPDX-License-Identifier: Apache-2.0
"""Memory of a served model, computed from its config: weights, the cache of each layer, and vLLM's blocks.

vLLM keeps all caches in one pool of blocks. A block has the same number of bytes for every type of layer: it holds some
tokens of a *group* of attention layers, or the state of a group of recurrent layers at one position. All groups have
the same number of layers, and each takes its own blocks for every sequence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from hmf.config.layers import base_head_dim, base_intermediate_size, experts_per_token
from hmf.config.pattern import ATTENTION
from hmf.errors import HmfError
from hmf.gpus import GIB
from hmf.layers.base import StateShape, split_heads
from hmf.layers.registry import layer_states
from hmf.model.configuration import building
from hmf.model.files import QUANTISED


@dataclass(frozen=True)
class Weights:
    """Bytes of all tensors, and of those of experts. A token uses `active` of `count` experts."""

    total: int
    experts: int = 0
    active: int = 1
    count: int = 1

    def read(self, sequences: float) -> float:
        """Expected bytes that a decode step of `sequences` tokens reads, if each token is routed at random."""
        used_share = 1 - (1 - self.active / self.count) ** sequences
        return self.total - self.experts + self.experts * used_share


def weights(config: Any, dtype: torch.dtype) -> Weights:
    """The weights of a model of this config in `dtype`, counted on the meta device."""
    with building(config.name_or_path), torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    sizes = {name: x.numel() * x.element_size() for name, x in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    if not experts:
        return Weights(sum(sizes.values()))
    return Weights(sum(sizes.values()), experts, config.num_experts_per_tok, config.num_experts)


@dataclass(frozen=True)
class LayerCache:
    """The cache of a layer for one sequence on one GPU.

    An attention layer has `token_bytes` for each token, or for each of the last `window` tokens. A recurrent layer has
    `state_bytes` at any length; a decode step reads and writes `moved_bytes`. Layers with equal caches form groups.
    """

    kind: str
    token_bytes: int = 0
    window: int | None = None
    state_bytes: int = 0
    moved_bytes: int = 0

    def bytes(self, context: int) -> int:
        tokens = context if self.window is None else min(context, self.window)
        return self.state_bytes + tokens * self.token_bytes


def layer_caches(
    config: Any,
    dtype: torch.dtype,
    ranks: int = 1,
    kv_dtype: torch.dtype | None = None,
    recurrent_dtype: torch.dtype | None = None,
) -> list[LayerCache]:
    """The cache of each layer of a hybrid `config` on one of `ranks` tensor-parallel GPUs.

    dtype: the model's, in which windows are kept; kv_dtype: of keys and values, None for the model's; recurrent_dtype:
    of recurrent states, None for the `state_dtype` of the config. A recurrent layer keeps all its states together,
    windows included. A layer with only windows counts as attention.
    """
    state_dtype = getattr(torch, config.state_dtype)
    kv_dtype, recurrent_dtype = kv_dtype or dtype, recurrent_dtype or state_dtype
    token_bytes = 2 * split_heads(config.num_key_value_heads, ranks) * base_head_dim(config) * kv_dtype.itemsize
    caches = []
    for index, (symbol, kind, window) in enumerate(
        zip(config.pattern.symbols, config.attention_types, config.attention_windows, strict=True)
    ):
        shapes = list(layer_states(config, index, ranks).values())
        if any(shape.kind == "recurrent" for shape in shapes):
            sizes = [shape.bytes(dtype, recurrent_dtype, state_dtype) for shape in shapes]
            moved = sum(_moved(shape, size) for shape, size in zip(shapes, sizes, strict=True))
            caches.append(
                LayerCache(kind if symbol == ATTENTION else symbol, state_bytes=sum(sizes), moved_bytes=moved)
            )
        elif shapes:
            reach = next(shape.shape[0] for shape in shapes if shape.kind == "window")
            caches.append(LayerCache("sliding_attention", token_bytes, reach + 1))
        else:
            caches.append(LayerCache(kind, token_bytes, window))
    return caches


def _moved(state: StateShape, size: int) -> int:
    """Bytes that a decode step reads and writes for a state of `size` bytes.

    A state is read and written once. Of a window, the positions in reach are read once.
    """
    if state.kind != "window":
        return 2 * size
    return size if state.reach is None else size * state.reach // state.shape[0]


@dataclass(frozen=True)
class Blocks:
    """vLLM's blocks: `tokens` and `bytes` of one block, and the number of groups of each kind of cache."""

    tokens: int
    bytes: int
    groups: Mapping[LayerCache, int]

    @classmethod
    def of(cls, caches: list[LayerCache], step: int) -> Blocks:
        """The blocks of vLLM 0.32: the tokens of a block are the smallest multiple of `step` that fits the largest
        state."""
        state, token = max(c.state_bytes for c in caches), max(c.token_bytes for c in caches)
        tokens = step * max(1, math.ceil(state / (step * token))) if token else step
        layers = Counter(caches)
        fewest, most = min(layers.values()), max(layers.values())
        size = most if most < 1.5 * fewest else fewest
        groups = {cache: math.ceil(count / size) for cache, count in layers.items()}
        return cls(tokens, size * (tokens * token or state), groups)

    @property
    def has_states(self) -> bool:
        return any(cache.state_bytes for cache in self.groups)

    def of_sequence(self, context: int, prefix_caching: bool = True, in_flight: int = 0) -> int:
        """Blocks that a sequence of `context` tokens holds, of which `in_flight` are scheduled but not yet finished.

        With prefix caching a recurrent group has two: the state at the last block boundary, and the current one.
        """
        total = 0
        for cache, count in self.groups.items():
            if cache.state_bytes:
                total += count * (2 if prefix_caching else 1)
            elif cache.window is None:
                total += count * math.ceil(context / self.tokens)
            else:
                total += count * (math.ceil(min(cache.window - 1 + in_flight, context) / self.tokens) + 1)
        return total


def working_bytes(config: Any, dtype: torch.dtype, ranks: int, batched_tokens: int, max_num_seqs: int) -> int:
    """An estimate of the bytes that vLLM needs on each GPU in addition to weights and caches.

    These are the activations of the largest prefill step, the logits of every sequence in float32, and 1 GiB for the
    CUDA context, kernels and captured graphs.
    """
    inner = base_intermediate_size(config)
    if active := experts_per_token(config):
        inner = active * (config.moe_intermediate_size + config.hidden_size)
    activations = batched_tokens * (4 * config.hidden_size + 3 * inner // ranks) * dtype.itemsize
    return activations + 4 * max_num_seqs * config.vocab_size + GIB


def require_unquantised(config: Any) -> None:
    """Raise HmfError for a config with quantised weights, whose size does not follow from the config."""
    if key := next((key for key in QUANTISED if getattr(config, key, None)), None):
        raise HmfError(
            f"{Path(config.name_or_path or '', 'config.json')}: {key}: plans need unquantised weights; "
            "plan the original, unquantised model"
        )
