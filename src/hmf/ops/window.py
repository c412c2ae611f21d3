# SPDX-License-Identifier: Apache-2.0
"""Attention over windows of one or more sets of keys and values, with one softmax over all of them.

Sliding-window attention has one set that reaches from the query back over w tokens; B'MOJO-F (arXiv 2407.06324) has
two, in-context tokens in the window and fading tokens in the window before it.

Legend: B batch, T tokens, S sequences (rows or documents), N blocks, C block_size, P past slots, L keys of a block,
H query heads, Hk key/value heads, K/V head dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import dispatch
from .varlen import ChunkLayout, sequence_lengths


@dataclass(frozen=True)
class KeySet:
    """Keys and values of the tokens, those of tokens before them, and which of these a query sees.

    k [B, T, Hk, K], v [B, T, Hk, V]; query i sees positions i - high to i - low. past_k [S, P, Hk, K] and past_v
    [S, P, Hk, V] hold the P positions before each sequence's first token, oldest first, or are None.
    """

    k: torch.Tensor
    v: torch.Tensor
    low: int
    high: int
    past_k: torch.Tensor | None = None
    past_v: torch.Tensor | None = None


@dispatch.entry("window")
def windowed_attention(
    q: torch.Tensor,
    sets: Sequence[KeySet],
    scale: float,
    seen: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v over the union of the sets' windows.

    q [B, T, H, K] with H a multiple of Hk; seen [S] int, how many tokens came before each sequence: of its past slots
    the last min(seen, P) are real (None: none are); cu_seqlens [S+1] packs S documents in one row (then B = 1).
    Returns [B, T, H, V] in q.dtype, zeros for a query that sees no key.
    """
    return dispatch.resolve("window", q)(q, sets, scale, seen, cu_seqlens)


@dispatch.implementation("window", "reference")
def reference(q, sets, scale, seen=None, cu_seqlens=None) -> torch.Tensor:
    """Every key against every query of a sequence: the definition. Memory grows with T^2."""
    batch, tokens, heads, _ = q.shape
    compute = dispatch.compute_dtype(q)
    outputs, first = [], 0
    for s, length in enumerate(sequence_lengths(batch, tokens, cu_seqlens)):
        row, at = (s, slice(None)) if cu_seqlens is None else (0, slice(first, first + length))
        first += length
        scores, values = [], []
        for keys in sets:
            k, v = keys.k[row, at], keys.v[row, at]
            past = 0
            if keys.past_k is not None and seen is not None:
                past = min(int(seen[s]), keys.past_k.shape[1])
                k = torch.cat([keys.past_k[s, keys.past_k.shape[1] - past :], k])
                v = torch.cat([keys.past_v[s, keys.past_v.shape[1] - past :], v])
            k, v = (x.to(compute).repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
            position = torch.arange(length, device=q.device)[:, None]
            distance = position - torch.arange(-past, length, device=q.device)
            hidden = (distance < keys.low) | (distance > keys.high)
            score = torch.einsum("thk,shk->hts", q[row, at].to(compute), k) * scale
            scores.append(score.masked_fill(hidden, float("-inf")))
            values.append(v)
        score = torch.cat(scores, -1)
        weights = score.masked_fill((score == float("-inf")).all(-1, keepdim=True), 0).softmax(-1)
        weights = weights.masked_fill(score == float("-inf"), 0)
        outputs.append(torch.einsum("hts,shv->thv", weights, torch.cat(values)).to(q.dtype))
    return torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]


@dispatch.implementation("window", "chunked")
def blockwise(q, sets, scale, seen=None, cu_seqlens=None, block_size: int | None = None) -> torch.Tensor:
    """Blocks of queries against the keys that any of them sees: memory O(T window).

    Larger blocks repeat fewer keys and mask more of them; the default is a quarter of the window, at least 64.
    """
    batch, tokens, heads, _ = q.shape
    if block_size is None:
        block_size = max(64, max(keys.high - keys.low + 1 for keys in sets) // 4)
    layout = ChunkLayout(batch, tokens, cu_seqlens, min(block_size, max(tokens, 1)))
    place = _Blocks(layout, cu_seqlens, q.device)
    gathered = [place.gather(keys, seen) for keys in sets]
    k, v, mask = (torch.cat(parts, 1) for parts in zip(*gathered, strict=True))  # [N, L, Hk, K|V]; mask along dim 1
    mask = mask.mT  # [N, C, L]
    empty = ~mask.any(-1)
    mask = mask | empty[..., None]  # a row without keys would give NaN, also where it is thrown away
    # Heads that share keys go along the query axis, so keys are never repeated.
    kv_heads, size = k.shape[2], layout.chunk_size
    grouped = layout.split(q).transpose(1, 2).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [N, Hk, H/Hk C, K]
    o = F.scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), scale=scale,
        attn_mask=mask[:, None].repeat(1, 1, heads // kv_heads, 1),
    )  # fmt: skip
    o = o.unflatten(2, (-1, size)).flatten(1, 2).transpose(1, 2)
    return layout.merge(o.masked_fill(empty[..., None, None], 0))


class _Blocks:
    """Sequence, first position and token index of each block of a `ChunkLayout`."""

    def __init__(self, layout: ChunkLayout, cu_seqlens: torch.Tensor | None, device: torch.device):
        batch, tokens = layout.shape
        lengths = _lengths(batch, tokens, cu_seqlens, device)
        order = torch.arange(batch, device=device) if layout.equal else torch.tensor(layout.order, device=device)
        steps = [(order[: at.stop - at.start], step) for step, at in enumerate(layout.steps)]
        self.sequence = torch.cat([s for s, _ in steps])  # [N]
        self.position = torch.cat([torch.full_like(s, step * layout.chunk_size) for s, step in steps])
        self.size = layout.chunk_size
        self.start, self.length = lengths.cumsum(0) - lengths, lengths

    def gather(self, keys: KeySet, seen: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values that a block's queries may see [N, L, Hk, K|V], and which query sees which [N, L, C]."""
        device, sequence = self.position.device, self.sequence[:, None]
        steps = torch.arange(self.size, device=device)
        reach = torch.arange(-keys.high, self.size - keys.low, device=device)
        position = self.position[:, None] + reach  # [N, L], negative in the past
        real = position < self.length[sequence]
        token = self.start[sequence] + position
        k, v = keys.k.flatten(0, 1), keys.v.flatten(0, 1)
        if keys.past_k is None or keys.past_v is None or seen is None:
            real &= position >= 0
        else:
            slots = keys.past_k.shape[1]
            real &= position >= -seen.to(device).clamp(max=slots)[sequence]
            token = torch.where(position >= 0, token + slots * len(self.length), (sequence + 1) * slots + position)
            k, v = (torch.cat([x.to(k.dtype).flatten(0, 1), y]) for x, y in ((keys.past_k, k), (keys.past_v, v)))
        token = torch.where(real, token, 0)
        distance = steps - reach[:, None]  # [L, C]
        visible = (distance >= keys.low) & (distance <= keys.high)
        visible = visible & real[..., None] & (self.position[:, None] + steps < self.length[sequence])[:, None]
        return k[token], v[token], visible


def latest(
    x: torch.Tensor, size: int, past: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """What to keep of x [B, T, ...] as the past of the next call: the last positions of each sequence, at most `size`.

    past [S, P, ...] is what the call before kept (None: nothing). Returns [S, min(size, P + longest), ...], oldest
    first, zeros in slots of positions before the sequence.
    """
    longest = max(sequence_lengths(x.shape[0], x.shape[1], cu_seqlens))
    slots = 0 if past is None else past.shape[1]
    size = min(size, slots + longest)
    count = _lengths(x.shape[0], x.shape[1], cu_seqlens, x.device)[:, None]
    sequence = torch.arange(len(count), device=x.device)[:, None]
    parts = [x.new_zeros(1, *x.shape[2:]), x.flatten(0, 1)]
    if past is not None:
        parts.append(past.to(x.dtype).flatten(0, 1))
    flat = torch.cat(parts)
    position = count + torch.arange(-size, 0, device=x.device)  # [S, size]
    token = 1 + count.cumsum(0) - count + position
    before = 1 + x.shape[0] * x.shape[1] + (sequence + 1) * slots + position
    return flat[torch.where(position >= 0, token, torch.where(position >= -slots, before, 0))]


def _lengths(batch: int, tokens: int, cu_seqlens: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """`sequence_lengths` on the device; those of equal rows are made there, as a CUDA graph of a decode step needs."""
    if cu_seqlens is None:
        return torch.full((batch,), tokens, device=device)
    return torch.tensor(sequence_lengths(batch, tokens, cu_seqlens), device=device)
