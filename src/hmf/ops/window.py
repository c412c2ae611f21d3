# SPDX-License-Identifier: Apache-2.0
"""Attention over windows of one or more sets of keys and values, with one softmax over all of them.

Sliding-window attention has one set: the last w tokens, the query's own included. B'MOJO-F (arXiv 2407.06324) has two
sets: in-context tokens in the window, and fading tokens in the window before it.

Legend: B batch, T tokens, S sequences (rows or documents), N blocks, C block_size, n sequences that have a block at a
step, P past slots, L keys of a block, H query heads, Hk key/value heads, K/V head dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from hmf.errors import HmfError

from . import dispatch
from .varlen import ChunkLayout, chunk_layout, lengths_on, on_device, sequence_lengths


@dataclass(frozen=True)
class KeySet:
    """Keys and values of the current and of past tokens, and the range of positions that a query attends to.

    k [B, T, Hk, K], v [B, T, Hk, V]; query i attends to positions i - high to i - low, with 0 <= low <= high. past_k
    [S, P, Hk, K] and past_v [S, P, Hk, V] hold the P positions before each sequence's first token, oldest first, or
    both are None.
    """

    k: torch.Tensor
    v: torch.Tensor
    low: int
    high: int
    past_k: torch.Tensor | None = None
    past_v: torch.Tensor | None = None

    def __post_init__(self):
        if not 0 <= self.low <= self.high:
            raise HmfError(f"KeySet: low={self.low}, high={self.high}: a window needs 0 <= low <= high")
        if (self.past_k is None) != (self.past_v is None):
            raise HmfError("KeySet: only one of past_k and past_v is set; pass both or neither")


@dispatch.entry("window")
def windowed_attention(
    q: torch.Tensor,
    sets: Sequence[KeySet],
    scale: float,
    seen: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(scale q k^T) v over the union of the sets' windows.

    q [B, T, H, K] with H a multiple of Hk. seen [S] int is the number of tokens before each sequence: the last
    min(seen, P) of its past slots are used (None: no slots are used). cu_seqlens [S+1] packs S documents in one row
    (then B = 1). dropout is the share of the weights that become 0, in training. Returns [B, T, H, V] in q.dtype, with
    zeros for a query that has no key.
    """
    return dispatch.resolve("window", q)(q, sets, scale, seen, cu_seqlens, dropout)


@dispatch.implementation("window", "reference")
def reference(q, sets, scale, seen=None, cu_seqlens=None, dropout=0.0) -> torch.Tensor:
    """The definition: a loop over the queries, each with the keys in its window."""
    batch, tokens, heads, _ = q.shape
    compute = dispatch.compute_dtype(q)
    queries, outputs, first = q.to(compute).flatten(0, 1), [], 0
    for s, length in enumerate(sequence_lengths(batch, tokens, cu_seqlens)):
        own = slice(first, first + length)
        reached = [_with_past(keys, s, own, seen, heads, compute) for keys in sets]
        for t, query in enumerate(queries[own]):
            scores, values = [], []
            for keys, (k, v) in zip(sets, reached, strict=True):
                at = len(k) - length + t  # the query's position in k
                visible = slice(max(at - keys.high, 0), max(at - keys.low + 1, 0))
                scores.append(torch.einsum("hk,lhk->hl", query, k[visible]) * scale)
                values.append(v[visible])
            weights = F.dropout(torch.cat(scores, -1).softmax(-1), dropout).split([len(v) for v in values], -1)
            outputs.append(sum(torch.einsum("hl,lhv->hv", w, v) for w, v in zip(weights, values, strict=True)))
        first += length
    return torch.stack(outputs).unflatten(0, (batch, tokens)).to(q.dtype)


def _with_past(
    keys: KeySet, s: int, own: slice, seen: torch.Tensor | None, heads: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """k, v [used past slots + own tokens, H, K|V] of sequence s, heads repeated; `own`: its tokens in all rows."""
    k, v = keys.k.flatten(0, 1)[own], keys.v.flatten(0, 1)[own]
    if keys.past_k is not None and keys.past_v is not None and seen is not None:
        unused = max(keys.past_k.shape[1] - int(seen[s]), 0)
        k, v = torch.cat([keys.past_k[s, unused:], k]), torch.cat([keys.past_v[s, unused:], v])
    return [x.to(dtype).repeat_interleave(heads // x.shape[1], 1) for x in (k, v)]


@dispatch.implementation("window", "chunked")
def blockwise(q, sets, scale, seen=None, cu_seqlens=None, dropout=0.0, block_size: int | None = None) -> torch.Tensor:
    """Attention of each block of queries to the blocks of keys in its windows, in memory O(T window).

    Each block is one product for all sequences. Larger blocks copy fewer keys, but mask more of them. Small blocks do
    not fill a GPU.
    """
    batch, tokens, heads, _ = q.shape
    if block_size is None:
        window = max(keys.high - keys.low + 1 for keys in sets)
        block_size = max(window // 4, 512 if q.is_cuda else 64)
    layout = chunk_layout(batch, tokens, cu_seqlens, min(block_size, tokens))
    kv_heads = sets[0].k.shape[2]
    # Query heads that share a key head are stacked along the query axis, so that keys are not repeated.
    queries = layout.split(q).transpose(1, 2).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [N, Hk, H/Hk C, K]
    reaches = [_Reach(keys, layout, heads // kv_heads, seen) for keys in sets]
    sees_itself = any(keys.low == 0 for keys in sets)
    outputs, inner = [], None
    for step, query in enumerate(layout.by_step(queries)):
        ks, vs, biases = zip(*(reach.at(step, len(query)) for reach in reaches), strict=True)
        k, v = (torch.cat([x for parts in lists for x in parts], 1).transpose(1, 2) for lists in (ks, vs))
        if any(x is not reach.bias for x, reach in zip(biases, reaches, strict=True)):
            rows = max(map(len, biases))
            bias = torch.cat([x.expand(rows, -1, -1) for x in biases], -1)[:, None]  # [n or 1, 1, H/Hk C, L]
        else:  # away from the start all steps share one bias, also in what is stored for the backward
            bias = inner = torch.cat(biases, -1)[:, None] if inner is None else inner
        attend = partial(F.scaled_dot_product_attention, query, k, v, scale=scale, dropout_p=dropout)
        if sees_itself:
            outputs.append(attend(attn_mask=bias))
        else:  # softmax of a query without keys is NaN
            empty = (bias == -math.inf).all(-1, keepdim=True)
            outputs.append(attend(attn_mask=bias.masked_fill(empty, 0)).masked_fill(empty, 0))
    o = torch.cat([o.unflatten(2, (-1, layout.chunk_size)).permute(0, 3, 1, 2, 4) for o in outputs])
    o = layout.merge(o.flatten(2, 3))  # [N, C, H, V]
    if o.requires_grad:
        longest = max(sequence_lengths(batch, tokens, cu_seqlens), default=0)
        for keys in sets:
            if keys.low >= longest:  # no query reaches them, but their gradients are zeros: DDP and FSDP2 need all
                o = o + keys.k[:, :0].sum() + keys.v[:, :0].sum()
    return o


class _Reach:
    """The keys and values of one set that the queries of a step attend to: the last past slots, then whole chunks.

    These positions are one range that moves with the step. The bias of the scores, 0 or -inf, depends on distances
    only, so all steps share it; steps near the start use its end.
    """

    def __init__(self, keys: KeySet, layout: ChunkLayout, group: int, seen: torch.Tensor | None):
        self.size = size = layout.chunk_size
        self.chunks = [layout.by_step(layout.split(x)) for x in (keys.k, keys.v)]  # of each step [n, C, Hk, K|V]
        if keys.past_k is None or keys.past_v is None or seen is None:
            self.past = [x.new_zeros(layout.num_sequences, 0, *x.shape[2:]) for x in (keys.k, keys.v)]
            self.seen = None
        else:
            order = slice(None) if layout.equal else on_device(layout.order, keys.k.device)
            self.past = [x[order].to(keys.k.dtype) for x in (keys.past_k, keys.past_v)]  # [S, P, Hk, K|V]
            self.seen = seen.to(keys.k.device)[order, None, None]
        self.slots = self.past[0].shape[1]
        # Distance in chunks of a block's newest and oldest key; the oldest is limited to keys that can exist.
        self.near, self.far = keys.low // size, -(-keys.high // size)
        self.far = max(min(self.far, len(layout.steps) - 1 - (-self.slots // size)), self.near - 1)
        query = torch.arange(size, device=keys.k.device)[:, None]
        distance = query - torch.arange(-self.far * size, (1 - self.near) * size, device=keys.k.device)
        bias = torch.zeros(distance.shape, dtype=keys.k.dtype, device=keys.k.device)
        bias.masked_fill_((distance < keys.low) | (distance > keys.high), -math.inf)
        self.bias = bias.repeat(group, 1)[None]  # [1, H/Hk C, L]

    def at(self, step: int, active: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Parts of keys and of values [active, ..., Hk, K|V], and the scores' bias [active or 1, H/Hk C, L]."""
        oldest, stop = (step - self.far) * self.size, (step + 1 - self.near) * self.size  # positions
        first = max(oldest, -self.slots)
        past = slice(self.slots + first, max(self.slots + min(stop, 0), 0))
        whole = slice(max(step - self.far, 0), max(step + 1 - self.near, 0))
        k, v = (
            [before[:active, past], *(x if len(x) == active else x[:active] for x in chunks[whole])]
            for before, chunks in zip(self.past, self.chunks, strict=True)
        )
        bias = self.bias if first == oldest else self.bias[..., first - oldest :]
        if self.seen is not None and first < 0:
            position = torch.arange(first, max(first, stop), device=bias.device)
            bias = bias.masked_fill(position < -self.seen[:active], -math.inf)
        return k, v, bias


def latest(
    x: torch.Tensor, size: int, past: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """The last positions of each sequence of x [B, T, ...], at most `size`, which are the past of the next call.

    past [S, P, ...] is the result of the previous call, or None. Returns [S, min(size, P + longest), ...], oldest
    first, with zeros in slots of positions before the sequence.
    """
    longest = max(sequence_lengths(x.shape[0], x.shape[1], cu_seqlens))
    slots = 0 if past is None else past.shape[1]
    size = min(size, slots + longest)
    count = lengths_on(x.device, x.shape[0], x.shape[1], cu_seqlens)[:, None]
    sequence = torch.arange(len(count), device=x.device)[:, None]
    parts = [x.new_zeros(1, *x.shape[2:]), x.flatten(0, 1)]
    if past is not None:
        parts.append(past.to(x.dtype).flatten(0, 1))
    flat = torch.cat(parts)
    position = count + torch.arange(-size, 0, device=x.device)  # [S, size]
    token = 1 + count.cumsum(0) - count + position
    before = 1 + x.shape[0] * x.shape[1] + (sequence + 1) * slots + position
    return flat[torch.where(position >= 0, token, torch.where(position >= -slots, before, 0))]
