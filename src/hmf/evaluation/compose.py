# SPDX-License-Identifier: Apache-2.0
"""State composition: the chunks of a long prompt are processed separately, and their caches are combined into one.

It needs no training. With keys "concatenated" or "sliding", no position exceeds those of a single chunk's run.
docs/composition.md explains the combined caches.

Legend: B prompts, n chunks of a prompt, T tokens, L cached positions, S sequences, H heads, K/V key/value head dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedModel

from hmf.errors import HmfError
from hmf.layers.registry import mixer_class
from hmf.model.cache import MixerCacheLayer, adopt
from hmf.ops import dispatch
from hmf.ops.varlen import sequence_lengths
from hmf.parallel.mixing import with_map

from .chunks import Composition, Parts

States = dict[int, dict[str, torch.Tensor]]  # by layer and name


@dataclass
class Composed:
    """B prompts whose chunks are in the cache and whose tails are not processed yet. Rows are padded on the left.

    Attributes:
        input_ids, attention_mask, position_ids: int [B, L + T], for the tokens in the cache and those of the tails.
            Tokens that the cache does not keep are not included. The positions of cached tokens are 0; they are unused.
        past_key_values: the cache of L positions. A forward pass changes it.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    past_key_values: Cache

    def for_generate(self) -> dict[str, Any]:
        """Arguments of `model.generate`. Its output begins with `input_ids`."""
        return dict(vars(self))

    def for_forward(self) -> dict[str, Any]:
        """Arguments of `model.forward` for the tails: logits [B, T, vocabulary]."""
        past = self.past_key_values.get_seq_length()
        new = {name: getattr(self, name)[:, past:] for name in ("input_ids", "position_ids")}
        return {**new, "attention_mask": self.attention_mask, "past_key_values": self.past_key_values}


@dataclass
class _Row:
    """One prompt: its cache (one sequence), the ids of the cached tokens, and the position of the next token."""

    cache: Cache
    kept: list[int]
    position: int


@torch.no_grad()
def prefill(model: PreTrainedModel, prompts: Sequence[Parts], composition: Composition) -> Composed:
    """Process the prefixes and chunks of `prompts`, and combine their caches. The chunks of a prompt form one batch.

    Args:
        model: a causal language model in evaluation mode, a Hybrid or a Transformer with full attention.
        prompts: from `hmf.evaluation.chunks`.
    Raises:
        HmfError: a layer whose cache cannot be combined, or no prompts.
    """
    if not prompts:
        raise HmfError("compose: there are no prompts; give at least one")
    return _joined(model, prompts, [_composed(model, parts, composition) for parts in prompts])


def _composed(model: PreTrainedModel, parts: Parts, composition: Composition) -> _Row:
    cache = _empty_cache(model.config)
    if parts.prefix:
        _read(model, [parts.prefix], cache)
    start = _recurrent(model.config, cache)
    ordered = composition.keys == "full" or len(parts.chunks) == 1
    run = _in_order if ordered else _apart
    finals, maps = run(model, parts, composition, cache, start)
    if len(parts.chunks) > 1:
        for layer, states in finals.items():
            for name, final in states.items():
                before = start[layer][name] if start else torch.zeros_like(final[:1])
                carry = maps[layer][name] if maps else None
                cache.layers[layer].states[name] = combine(composition.states, before, final, carry)
    last_only = composition.keys == "sliding" and not ordered
    kept = [token for part in (parts.prefix, *parts.chunks[-1 if last_only else 0 :]) for token in part]
    longest = sum(map(len, parts.chunks)) if ordered else max(map(len, parts.chunks))
    return _Row(cache, kept, len(parts.prefix) + longest)


def combine(states: str, start: torch.Tensor, finals: torch.Tensor, maps: torch.Tensor | None) -> torch.Tensor:
    """Combine the final states of n chunks, `finals` [n, H, K, V], into one state [1, H, K, V].

    All chunks began with the state `start` [1, H, K, V]. With states "fused", chunk i maps any state S to
    finals[i] + maps[i] (S - start), where maps are [n, H] (decays) or [n, H, K, K]; the maps are applied to `start` in
    order. If maps is None, each chunk began with the final state of the previous one.
    """
    if states == "averaged":
        return finals.mean(0, keepdim=True)
    if states == "dropped":
        return start
    if maps is None:
        return finals[-1:]
    state = finals[:1]
    for final, carry in zip(finals[1:], maps[1:], strict=True):
        moved = state - start
        state = final + (carry @ moved if carry.dim() > 1 else carry[:, None, None] * moved)
    return state


def _in_order(
    model: PreTrainedModel, parts: Parts, composition: Composition, cache: Cache, start: States
) -> tuple[States, States]:
    """Process chunks in sequence. Attention and windows continue across chunks, as do recurrent states for "fused"."""
    chunk_states: list[States] = []
    for chunk in parts.chunks:
        if chunk_states and composition.states != "fused":
            for layer, states in chunk_states[0].items():
                cache.layers[layer].states |= start.get(layer) or {k: torch.zeros_like(x) for k, x in states.items()}
        _read(model, [chunk], cache)
        chunk_states.append(_recurrent(model.config, cache))
    finals = {
        i: {name: torch.cat([s[i][name] for s in chunk_states]) for name in states}
        for i, states in chunk_states[0].items()
    }
    return finals, {}


def _apart(
    model: PreTrainedModel, parts: Parts, composition: Composition, cache: Cache, start: States
) -> tuple[States, States]:
    """Process all chunks as one batch, each after the prefix. The cache keeps the windows of the last chunk, and the
    keys and values of the last chunk or of all chunks."""
    count, prefix = len(parts.chunks), len(parts.prefix)
    cache.batch_repeat_interleave(count)
    recorder = _Recorder()
    dispatch.set_wrappers(recorder.functions() if composition.states == "fused" else {})
    try:
        _read(model, parts.chunks, cache)
    finally:
        dispatch.set_wrappers({})
    finals = _recurrent(model.config, cache)
    maps: States = {}
    if composition.states == "fused":
        if len(recorder.maps) != len(finals):
            raise HmfError(
                f"compose: states: {len(recorder.maps)} of {len(finals)} recurrent layers support fused; use averaged "
                "or dropped"
            )
        maps = {
            i: dict(zip(finals[i], layer_maps, strict=True))
            for i, layer_maps in zip(finals, recorder.maps, strict=True)
        }
    longest = max(map(len, parts.chunks))
    kept = [(count - 1, parts.chunks[-1])] if composition.keys == "sliding" else [*enumerate(parts.chunks)]
    total = prefix + sum(len(chunk) for _, chunk in kept)
    for layer in cache.layers:
        if isinstance(layer, MixerCacheLayer):
            layer.states = {name: x[-1:] for name, x in layer.states.items()}
            layer.seen_tokens = total
        else:
            for name in ("keys", "values"):
                x = getattr(layer, name)  # [n, H, prefix + longest, K]
                own = [x[i : i + 1, :, prefix + longest - len(chunk) :] for i, chunk in kept]
                setattr(layer, name, torch.cat([x[:1, :, :prefix], *own], 2))
    return finals, maps


def _read(model: PreTrainedModel, rows: Sequence[Sequence[int]], cache: Cache) -> None:
    """Process the tokens of all rows into a cache with one sequence per row. Shorter rows are padded on the left."""
    longest, past = max(map(len, rows)), cache.get_seq_length()
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[1] * past + [0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    positions = torch.arange(past, past + longest, device=model.device).expand(len(rows), -1)
    model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)


class _Recorder:
    """Wraps the ops while chunks are processed separately for "fused".

    maps: for each recurrent layer in order, how its chunks map an initial state, in the order of the layer's states.
    """

    def __init__(self) -> None:
        self.maps: list[tuple[torch.Tensor, ...]] = []

    def functions(self) -> dict[str, Callable]:
        def plain(op: Callable, *args: Any, **kwargs: Any) -> Any:
            return op(*args, **kwargs)

        functions: dict[str, Callable] = dict.fromkeys(dispatch.ops(), plain)
        delta_rules = {"gdn": self.gdn, "kda": self.gdn}
        return functions | {"conv": self.conv, "ssd": self.ssd, "gka": self.gka} | delta_rules

    def conv(self, op, x, weight, bias=None, initial_state=None, cu_seqlens=None):
        """A chunk's convolution continues from the tokens of the previous chunk, as in a pass over the whole prompt.

        Its final window depends on the previous chunk only if the chunk is shorter than the convolution's context.
        """
        shortest = min(sequence_lengths(x.shape[0], x.shape[1], cu_seqlens))
        before = initial_state
        for _ in range(-(-(weight.shape[-1] - 1) // shortest)):
            _, last = op(x, weight, bias, before, cu_seqlens)
            first = torch.zeros_like(last[:1]) if initial_state is None else initial_state[:1].to(last)
            before = torch.cat([first, last[:-1]])
        return op(x, weight, bias, before, cu_seqlens)

    def ssd(self, op, q, k, v, g, initial_state=None, cu_seqlens=None):
        self.maps.append((_decay(g, v, cu_seqlens),))
        return op(q, k, v, g, initial_state, cu_seqlens)

    def gka(self, op, q, k, v, g, gk, alpha=None, initial_state=None, cu_seqlens=None, **options):
        self.maps.append((_decay(gk, v, cu_seqlens), _decay(g, v, cu_seqlens)))
        return op(q, k, v, g, gk, alpha, initial_state, cu_seqlens, **options)

    def gdn(self, op, q, k, v, g, beta, initial_state=None, cu_seqlens=None):
        if initial_state is None:
            count = len(sequence_lengths(v.shape[0], v.shape[1], cu_seqlens))
            initial_state = v.new_zeros(count, *v.shape[2:3], k.shape[-1], v.shape[-1], dtype=dispatch.compute_dtype(v))
        o, _, final = with_map(op, q, k, v, g, beta, initial_state, cu_seqlens)
        final, carry = final.split([v.shape[-1], k.shape[-1]], -1)
        self.maps.append((carry,))
        return o, final


def _decay(g: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """The total decay of each sequence, [S, H], from log decays g [B, T, H]."""
    g = g.to(dispatch.compute_dtype(v))
    if cu_seqlens is None:
        return g.sum(1).exp()
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=g.device), lengths)
    return g.new_zeros(len(lengths), g.shape[-1]).index_add(0, sequence, g[0]).exp()


def _empty_cache(config: Any) -> Cache:
    """A cache for the model of `config`. Raises HmfError for a layer that is neither full attention nor a mixer."""
    cache = DynamicCache(config=config)
    if hasattr(config, "pattern"):
        adopt(cache, config)
    for index, layer in enumerate(cache.layers):
        own = hasattr(config, "pattern") and index in config.recurrent_layers and index not in config.pattern.replaced
        if own or (not isinstance(layer, MixerCacheLayer) and type(layer) is not DynamicLayer):
            kind = (getattr(config, "layer_types", None) or {index: type(layer).__name__})[index]
            raise HmfError(
                f"compose: layer {index} ({kind}): only full attention and this package's mixers can be composed; "
                "process the prompt as a whole"
            )
    return cache


def _recurrent(config: Any, cache: Cache) -> States:
    """The recurrent states in a cache by layer and name. A layer that has processed no token is not included."""
    recurrent: States = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, MixerCacheLayer) and layer.is_initialized:
            shapes = mixer_class(config.pattern.symbols[index]).state_shapes(config)
            if states := {name: layer.states[name] for name, shape in shapes.items() if shape.kind == "recurrent"}:
                recurrent[index] = states
    return recurrent


def _joined(model: PreTrainedModel, prompts: Sequence[Parts], rows: Sequence[_Row]) -> Composed:
    """The rows as one batch. Caches are padded on the left to the longest cache, and tails to the longest tail."""
    cached, new = max(len(row.kept) for row in rows), max(len(parts.tail) for parts in prompts)
    ids, mask, positions = [], [], []
    for parts, row in zip(prompts, rows, strict=True):
        before, between = cached - len(row.kept), new - len(parts.tail)
        ids.append([0] * before + row.kept + [0] * between + list(parts.tail))
        mask.append([0] * before + [1] * len(row.kept) + [0] * between + [1] * len(parts.tail))
        unused = [0] * (cached + between)  # positions of cached tokens and padding
        positions.append([*unused, *range(row.position, row.position + len(parts.tail))])
    cache = rows[0].cache
    for index, layer in enumerate(cache.layers):
        layers: list[Any] = [row.cache.layers[index] for row in rows]
        if isinstance(layer, MixerCacheLayer):
            layer.states = {name: torch.cat(_alike([x.states[name] for x in layers])) for name in layer.states}
            layer.seen_tokens = cached
        else:
            for name in ("keys", "values"):
                tensors = [getattr(x, name) for x in layers]
                padded = [F.pad(x, (0, 0, cached - x.shape[2], 0)) for x in tensors]
                setattr(layer, name, torch.cat(padded))
    input_ids, attention_mask, position_ids = (torch.tensor(x, device=model.device) for x in (ids, mask, positions))
    return Composed(input_ids, attention_mask, position_ids, cache)


def _alike(states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Pad windows on the left to the same number of slots: those of short prompts have fewer."""
    if states[0].dim() < 2:
        return states
    slots = max(x.shape[1] for x in states)
    return [torch.cat([x.new_zeros(len(x), slots - x.shape[1], *x.shape[2:]), x], 1) for x in states]
