# SPDX-License-Identifier: Apache-2.0
"""Memory of a served model, from its config alone: weights, what each layer keeps of a sequence, and vLLM's blocks.

vLLM keeps all caches in one pool of blocks. A block holds the same number of bytes for every kind of layer: some
tokens of a *group* of attention layers, or the state that a group of recurrent layers has at one position. Groups
have equally many layers; each takes blocks of its own for every sequence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from hmf.config.layers import base_head_dim
from hmf.config.pattern import ATTENTION
from hmf.errors import HmfError
from hmf.gpus import GIB
from hmf.layers.base import StateShape, split_heads
from hmf.layers.registry import mixer_class
from hmf.model.configuration import building


@dataclass(frozen=True)
class Weights:
    """Bytes of all tensors, of the experts among them, and how many of how many experts a token reads."""

    total: int
    experts: int = 0
    active: int = 1
    count: int = 1

    def read(self, sequences: float) -> float:
        """Bytes that a decode step of `sequences` tokens reads: each expert that any of them is sent to (at random)."""
        touched = 1 - (1 - self.active / self.count) ** sequences
        return self.total - self.experts + self.experts * touched


def weights(config: Any, dtype: torch.dtype) -> Weights:
    """Counted on the model itself, built without memory."""
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
    """What a layer keeps of one sequence on one GPU: `token_bytes` for each token, or for the last `window` ones, or
    `state_bytes` whatever the length, for which a decode step moves `moved_bytes`. Equal ones share blocks."""

    kind: str
    token_bytes: int = 0
    window: int | None = None
    state_bytes: int = 0
    moved_bytes: int = 0

    def bytes(self, context: int) -> int:
        tokens = context if self.window is None else min(context, self.window)
        return self.state_bytes + tokens * self.token_bytes


def layer_caches(config: Any, dtype: torch.dtype, ranks: int = 1) -> list[LayerCache]:
    """Every layer's cache under a hybrid `config` on one of `ranks` tensor-parallel GPUs, keys and values in `dtype`.

    A layer with a recurrence keeps all its states together, windows included; one with windows alone is attention.
    """
    state_dtype = getattr(torch, config.state_dtype)
    token_bytes = 2 * split_heads(config.num_key_value_heads, ranks) * base_head_dim(config) * dtype.itemsize
    found = []
    for symbol, kind, window in zip(
        config.pattern.symbols, config.attention_types, config.attention_windows, strict=True
    ):
        shapes = [] if symbol == ATTENTION else list(mixer_class(symbol).state_shapes(config, ranks).values())
        if any(shape.kind == "recurrent" for shape in shapes):
            sizes = [shape.bytes(dtype, state_dtype, state_dtype) for shape in shapes]
            moved = sum(_moved(shape, size) for shape, size in zip(shapes, sizes, strict=True))
            found.append(LayerCache(symbol, state_bytes=sum(sizes), moved_bytes=moved))
        elif shapes:
            reach = next(shape.shape[0] for shape in shapes if shape.kind == "window")
            found.append(LayerCache("sliding_attention", token_bytes, reach + 1))
        else:
            found.append(LayerCache(kind, token_bytes, window))
    return found


def _moved(state: StateShape, size: int) -> int:
    """Bytes that a decode step reads and writes of a state of `size` bytes: all of it twice, but of a window the
    positions in reach once."""
    if state.kind != "window":
        return 2 * size
    return size if state.reach is None else size * state.reach // state.shape[0]


@dataclass(frozen=True)
class Blocks:
    """vLLM's blocks: `tokens` and `bytes` of one, and how many groups of each kind of cache take them."""

    tokens: int
    bytes: int
    groups: Mapping[LayerCache, int]

    @classmethod
    def of(cls, caches: list[LayerCache], step: int) -> Blocks:
        """As vLLM 0.32 does: a block has as many tokens, a multiple of `step`, as make room for the largest state."""
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
        """Blocks that a sequence of `context` tokens holds; `in_flight` of them may be computed but not yet settled.

        With prefix caching a recurrent group holds two: the state at the last block boundary, and the current one.
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
    """About what vLLM needs on each GPU beside weights and caches.

    Activations of the largest prefill step, logits of every sequence in float32, and 1 GiB for the CUDA context,
    kernels and captured graphs.
    """
    inner = config.intermediate_size
    if getattr(config, "num_experts_per_tok", None):
        inner = config.num_experts_per_tok * (config.moe_intermediate_size + config.hidden_size)
    activations = batched_tokens * (4 * config.hidden_size + 3 * inner // ranks) * dtype.itemsize
    return activations + 4 * max_num_seqs * config.vocab_size + GIB


def require_unquantised(config: Any) -> None:
    """HmfError for a config of quantised weights: their size is not in the config."""
    if getattr(config, "quantization_config", None):
        raise HmfError(
            "config.json: quantization_config: plans are for unquantised weights; plan the model it came from"
        )
