# SPDX-License-Identifier: Apache-2.0
"""B'MOJO-F inside vLLM: the served layer of its recurrent type, and two windows of keys and values in the pool.

States of a request: those of the recurrent layer, then near keys and values [W - 1, Hk, K] and fading ones
[2 W - 1, Hk, K] as ring buffers: position p has index p modulo the ring's size, so that a step writes one row. On a
GPU, in bfloat16 or float16, prefill runs flash attention for each window and merges the two by their log-sum-exps. A
decode step reads the rings in place.

Legend: N tokens of the batch, S sequences, T tokens per sequence, D model dim, H query heads, Hk key/value heads,
K head_dim, W window size, R size of a ring.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from hmf.config.layers import layer_options
from hmf.layers.base import StateShape
from hmf.layers.bmojo import INNER, BMojoF
from hmf.layers.registry import mixer_class
from hmf.ops import KeySet
from hmf.ops.window import latest

from .backends import HAS_KERNELS, WindowMetadata, WindowMetadataBuilder
from .hosted import HostedMixer
from .parts import joined
from .recurrent import Tensors
from .support import mixer_module

WINDOWS = ("k", "v", "fading_k", "fading_v")
BUILDER = WindowMetadataBuilder


def states(symbol: str, config: Any, ranks: int) -> dict[str, StateShape]:
    """The states of one request on one of `ranks` ranks. vLLM requires that a ring has at least one row."""
    inner = layer_options(config, symbol).inner_symbol
    states = {INNER + name: state for name, state in mixer_module(inner).states(inner, config, ranks).items()}
    shapes = mixer_class(symbol).state_shapes(config, ranks)
    for name in WINDOWS:
        positions, *rest = shapes[name].shape
        states[name] = shapes[name]._replace(shape=(max(1, positions), *rest))
    return states


def build(symbol: str, config: Any, quant_config: Any, prefix: str, attention: Any) -> nn.Module:
    """The mixer that replaces `attention`, with its rotary positions."""
    return BMojoMixer(symbol, config, prefix, attention)


class BMojoMixer(HostedMixer):
    mixer: BMojoF
    states_of = staticmethod(states)

    def __init__(self, symbol: str, config: Any, prefix: str, attention: Any):
        super().__init__(symbol, config, prefix)
        self.options, self.inner_name = self.mixer.options, self.mixer.inner_name
        delattr(self.mixer, self.inner_name)  # replaced by vLLM's
        inner = self.options.inner_symbol
        layer = mixer_module(inner).build(inner, config, None, f"{prefix}.{self.inner_name}", attention)
        layer.kept_by = prefix
        self.add_module(self.inner_name, layer)
        self.rotary = attention.rotary_emb
        self.reaches = (self.options.window_size - 1, 2 * self.options.window_size - 1)
        # One product for the projections of the input (four, or three if tied), another for the two of fading tokens.
        windows = ("",) if self.mixer.bmojo_attn.tied else ("", "_")
        self.projections = [f"{name}_proj{end}" for end in windows for name in "qkv"]
        linears = [getattr(self.mixer.bmojo_attn, name) for name in self.projections]
        self.ends = [0, *itertools.accumulate(linear.out_features for linear in linears)]
        self.register_buffer("weight", joined([linear.weight for linear in linears]), False)
        biased = linears[0].bias is not None
        self.register_buffer("bias", joined([linear.bias for linear in linears]) if biased else None, False)
        self.flash = None  # version of flash attention, if it can be used
        if HAS_KERNELS and self.options.head_dim % 8 == 0 and self.options.head_dim <= 256:
            self.flash = get_flash_attn_version()

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.get_submodule(self.inner_name).kv_cache = self.kv_cache[: -len(WINDOWS)]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.options.num_heads, self.options.head_dim)

    def project(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[Tensors, torch.Tensor | None]:
        attention = self.mixer.bmojo_attn
        fading = self.get_submodule(self.inner_name)(positions, hidden_states)
        q, k, v, *fading_q = self._projected(hidden_states, slice(4))
        fading_k, fading_v = self._projected(fading, slice(-2, None))
        q, k = self._rotated(positions, q, k)
        queries: Tensors = (q,)
        if attention.tied:
            (fading_k,) = self._rotated(positions, fading_k)
        else:
            other_q, fading_k = self._rotated(positions, fading_q[0], fading_k)
            queries = (q, other_q)
        for factor in self.mixer.positioned((hidden_states, hidden_states), positions[None])[2:]:
            queries = tuple(query * factor[0] for query in queries)
        gate = attention.gate_proj(hidden_states) if hasattr(attention, "gate_proj") else None
        return (positions, k, v, fading_k, fading_v, *queries), gate

    def _projected(self, x: torch.Tensor, part: slice) -> list[torch.Tensor]:
        """x [N, D] projected by some of `projections`; each result [N, heads, K] is normalised."""
        numbers = range(len(self.projections))[part]
        rows = slice(self.ends[numbers[0]], self.ends[numbers[-1] + 1])
        y = F.linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])
        parts = y.split([self.ends[n + 1] - self.ends[n] for n in numbers], dim=-1)
        return [self.mixer.bmojo_attn.heads(self.projections[n], y) for n, y in zip(numbers, parts, strict=True)]

    def _rotated(self, positions: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None = None) -> Tensors:
        inputs = [x for x in (first, second) if x is not None]
        rotated = self.rotary(positions, first.flatten(1), None if second is None else second.flatten(1))
        return tuple(y.view_as(x) for x, y in zip(inputs, rotated, strict=False))

    def finish(self, mixed: torch.Tensor, rest: torch.Tensor | None) -> torch.Tensor:
        mixed = mixed.flatten(1)
        return self.mixer.bmojo_attn.o_proj(mixed if rest is None else mixed * rest.sigmoid())

    def recur(self, inputs: Tensors, states: Tensors, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, Tensors]:
        """The two windows; `states` are their rings."""
        positions, k, v, fading_k, fading_v, *queries = inputs
        seen = positions[:, 0] if cu_seqlens is None else positions[0, cu_seqlens[:-1].long()]
        lengths = positions.new_ones(len(seen)) if cu_seqlens is None else cu_seqlens.diff()
        new, (near, far) = (k, v, fading_k, fading_v), self.reaches
        sizes = (near, near, far, far)
        pasts = [unrolled(ring, size, seen) for ring, size in zip(states, sizes, strict=True)]
        sets = [KeySet(k, v, 0, near, *pasts[:2]), KeySet(fading_k, fading_v, near + 1, far, *pasts[2:])]
        mixed = self.mixer.bmojo_attn.attend(queries, sets, seen, cu_seqlens)
        kept = (latest(x, size, past, cu_seqlens) for x, size, past in zip(new, sizes, pasts, strict=True))
        after = tuple(rolled(x, seen + lengths) if x.shape[1] else ring for x, ring in zip(kept, states, strict=True))
        return mixed, after

    def decode(self, inputs: Tensors, slots: torch.Tensor) -> torch.Tensor:
        pools = self.kv_cache[-len(WINDOWS) :]
        if not inputs[0].is_cuda:
            return self.step(inputs, pools, slots.long())
        from hmf.ops.window_decode import decode

        positions, *rows = inputs
        rows = [x if x.stride()[1:] == (x.shape[-1], 1) else x.contiguous() for x in rows]
        new, queries = rows[:4], rows[4:]
        window, scale = self.options.window_size, self.mixer.bmojo_attn.scale
        return decode((queries[0], queries[-1]), tuple(new), pools, positions, slots, NULL_BLOCK_ID, window, scale)

    def prefill(self, inputs: Tensors, pools: Tensors, metadata: WindowMetadata) -> torch.Tensor:
        pools = pools[-len(WINDOWS) :]
        if self.flash is None or inputs[1].dtype == torch.float32:
            return super().prefill(inputs, pools, metadata)
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        _, k, v, fading_k, fading_v, *queries = inputs
        slots, window, outputs = metadata.state_indices_tensor_p.long(), self.options.window_size, []
        pairs = ((k, v), (fading_k, fading_v))
        for number, (new, rings, query) in enumerate(
            zip(pairs, (pools[:2], pools[2:]), (queries[0], queries[-1]), strict=True)
        ):
            layout = self._layout(metadata, self.reaches[number], number * window, query.device)
            if layout.total:
                keys, values = (layout.gather(x, ring, slots) for x, ring in zip(new, rings, strict=True))
                outputs.append(self._attend(query, keys, values, layout, metadata))
            for x, ring in zip(new, rings, strict=True):
                layout.keep(x, ring, slots)
        (o, weight), *rest = outputs
        if not rest:
            return o
        mixed = torch.empty_like(o)
        merge_attn_states(mixed, o, weight, *rest[0])
        return mixed

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: WindowLayout, metadata: WindowMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output of one window [N, H, K] and the log-sum-exp of its scores [H, N]."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=metadata.query_start_loc_p,
            cu_seqlens_k=layout.bounds,
            max_seqlen_q=max(metadata.tokens_p),
            max_seqlen_k=layout.longest,
            softmax_scale=self.mixer.bmojo_attn.scale,
            causal=True,
            window_size=[self.options.window_size - 1, 0],
            return_softmax_lse=True,
            fa_version=self.flash,
        )

    @staticmethod
    def _layout(metadata: WindowMetadata, reach: int, lag: int, device: torch.device) -> WindowLayout:
        """The layout of a window, computed once per step for all layers."""
        if (reach, lag) not in metadata.made:
            metadata.made[reach, lag] = WindowLayout.of(metadata.tokens_p, metadata.computed_p, reach, lag, device)
        return metadata.made[reach, lag]

    def load(self, name: str, tensor: torch.Tensor) -> str | None:
        first, _, rest = name.partition(".")
        if first != self.inner_name:
            return super().load(name, tensor)
        inner = self.get_submodule(self.inner_name)
        loaded = inner.load(rest, tensor) if isinstance(inner, HostedMixer) else None
        return loaded and f"{first}.{loaded}"


@dataclass(frozen=True)
class WindowLayout:
    """The keys of one window for a batch of prefills.

    The keys of a sequence are those of its ring that a query can attend to, then its own without the last `lag`, which
    no query attends to. The window of a query then ends at its own index counted from the end, as in flash attention.

    bounds: bounds of the sequences' keys, [S + 1]; own, past: indices (from, to) and (sequence, from, to) of the copied
    keys; kept: indices (token, sequence, to) of the keys that are written into the rings.
    """

    bounds: torch.Tensor
    longest: int
    total: int
    alone: bool  # the keys are the first tokens of one sequence, in order
    own: Tensors
    past: Tensors
    kept: Tensors

    @classmethod
    def of(
        cls, tokens: Sequence[int], computed: Sequence[int], reach: int, lag: int, device: torch.device
    ) -> WindowLayout:
        """The layout for sequences with `tokens` new and `computed` earlier tokens, and rings of `reach` positions."""
        parts: list[list[np.ndarray]] = [[] for _ in range(8)]
        bounds, first = [0], 0
        for sequence, (count, before) in enumerate(zip(tokens, computed, strict=True)):
            start, end = max(0, before - reach), before + count
            stop = max(start, end - lag)
            past, own = np.arange(start, min(stop, before)), np.arange(before, max(before, stop))
            kept = np.arange(max(before, end - reach), end)
            at = bounds[-1]
            for part, indices in zip(
                parts,
                (
                    own - before + first,
                    own - start + at,
                    np.full(len(past), sequence),
                    past % max(1, reach),
                    past - start + at,
                    kept - before + first,
                    np.full(len(kept), sequence),
                    kept % max(1, reach),
                ),
                strict=True,
            ):
                part.append(indices)
            bounds.append(at + stop - start)
            first += count
        joined = [np.concatenate(part) for part in parts]
        flat = torch.from_numpy(np.concatenate([*joined, np.array(bounds)]).astype(np.int64))
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        *indices, ends = flat.split([*map(len, joined), len(bounds)])
        longest, alone = int(np.diff(bounds).max()), len(tokens) == 1 and not len(joined[2])
        by_use = tuple(indices[:2]), tuple(indices[2:5]), tuple(indices[5:])
        return cls(ends.int(), longest, bounds[-1], alone, *by_use)

    def gather(self, x: torch.Tensor, ring: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Keys or values [total, Hk, K] of tokens x [N, Hk, K] and of earlier tokens in `ring` [slots, R, ...]."""
        if self.alone:
            return x[: self.total]
        gathered = x.new_empty(self.total, *x.shape[1:])
        source, target = self.own
        gathered[target] = x[source]
        if len(self.past[0]):
            sequence, source, target = self.past
            gathered[target] = ring[slots[sequence], source]
        return gathered

    def keep(self, x: torch.Tensor, ring: torch.Tensor, slots: torch.Tensor) -> None:
        """Write the part of x that later tokens may attend to into `ring`."""
        token, sequence, target = self.kept
        if len(token):
            ring[slots[sequence], target] = x[token]


def unrolled(ring: torch.Tensor, size: int, seen: torch.Tensor) -> torch.Tensor:
    """The last `size` positions before position seen [S], oldest first, of rings [S, size, ...]."""
    at = (seen[:, None] + torch.arange(size, device=ring.device)) % max(1, size)
    return ring[torch.arange(len(ring), device=ring.device)[:, None], at]


def rolled(kept: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The inverse of `unrolled`: rings of `kept` [S, size, ...], the positions before seen [S]."""
    size = kept.shape[1]
    at = (torch.arange(size, device=kept.device) - seen[:, None]) % size
    return kept[torch.arange(len(kept), device=kept.device)[:, None], at]
