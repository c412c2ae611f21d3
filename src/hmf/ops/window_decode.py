# SPDX-License-Identifier: Apache-2.0
"""One token of B'MOJO-F's two windows for many sequences, in place in a pool: the decode step of a server (Triton).

A window's keys and values stand in a ring: position p at index p modulo the ring's size. The rings are read once,
which is what bounds the step; programs share a window by stretches of positions, and a second kernel merges their
softmaxes with the token's own key and puts that in its place. `hmf.ops.window.reference` is the definition.

Legend: S sequences, H query heads, Hk key/value heads, K head_dim, W window size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 512  # that keep a GPU busy
STRETCHES = (1024, 512, 256, 128, 64)  # positions of one program
LOWEST = tl.constexpr(-1e30)  # below any score, and finite


@triton.jit
def _stretch(
    q,
    fading_q,
    near_k,
    near_v,
    fading_k,
    fading_v,
    positions,
    slots,
    maxima,
    sums,
    outputs,
    q_row,
    fading_q_row,
    near_slot,
    fading_slot,
    slots_step,
    null_slot,
    scale,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A stretch of one window's positions before the token: the first half of the stretches are the fading window's."""
    stretch, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    stretches = tl.num_programs(0)
    fading = stretch < stretches // 2
    slot = tl.load(slots + sequence * slots_step).to(tl.int64)
    position = tl.load(positions + sequence).to(tl.int32)
    of_group, of_key = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
    in_group = (of_group[:, None] < GROUP) & (of_key[None, :] < K)
    at_query = (head * GROUP + of_group[:, None]) * K + of_key[None, :]
    if fading:
        query = tl.load(fading_q + sequence * fading_q_row + at_query, mask=in_group, other=0)
        keys, values = fading_k + slot * fading_slot, fading_v + slot * fading_slot
    else:
        query = tl.load(q + sequence * q_row + at_query, mask=in_group, other=0)
        keys, values = near_k + slot * near_slot, near_v + slot * near_slot
    first = tl.where(fading, stretch, stretch - stretches // 2) * STRETCH
    size = tl.where(fading, 2 * WINDOW - 1, WINDOW - 1)
    count = tl.where(fading, WINDOW, WINDOW - 1)
    lowest = position - size
    end = tl.where(slot == null_slot, 0, count)  # none in a row of padding

    highest = tl.full([BLOCK_G], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    output = tl.zeros([BLOCK_G, BLOCK_K], tl.float32)
    for start in range(0, STRETCH, BLOCK_N):
        index = first + start + tl.arange(0, BLOCK_N)
        known = (index < end) & (lowest + index >= 0)
        ring = tl.where(known, lowest + index, 0) % tl.maximum(size, 1)
        at = (ring[:, None] * HEADS + head) * K + of_key[None, :]
        mask = known[:, None] & (of_key[None, :] < K)
        key = tl.load(keys + at, mask=mask, other=0)
        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee") * scale
        scores = tl.where(known[None, :], scores, -float("inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - above[:, None])
        before = tl.exp(highest - above)
        value = tl.load(values + at, mask=mask, other=0).to(query.dtype)
        output = output * before[:, None] + tl.dot(weights.to(query.dtype), value, input_precision="ieee")
        total = total * before + tl.sum(weights, 1)
        highest = above

    row = ((sequence * HEADS + head) * GROUP + of_group) * stretches + stretch
    tl.store(maxima + row, highest, mask=of_group < GROUP)
    tl.store(sums + row, total, mask=of_group < GROUP)
    tl.store(outputs + row[:, None] * K + of_key[None, :], output, mask=in_group)


@triton.jit
def _merge(
    q,
    k,
    v,
    fading_new_k,
    fading_new_v,
    near_k,
    near_v,
    fading_k,
    fading_v,
    positions,
    slots,
    maxima,
    sums,
    outputs,
    o,
    q_row,
    k_row,
    v_row,
    fading_k_row,
    fading_v_row,
    near_slot,
    fading_slot,
    slots_step,
    null_slot,
    scale,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    STRETCHES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One query head: the stretches and the token's own key under one softmax; its key and value into the rings."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    shared = head // GROUP
    of_key, of_stretch = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_S)
    inside = of_key < K
    slot = tl.load(slots + sequence * slots_step).to(tl.int64)
    out = o + (sequence * HEADS * GROUP + head) * K + of_key
    if slot == null_slot:  # a row of padding
        tl.store(out, tl.zeros([BLOCK_K], o.dtype.element_ty), mask=inside)
        return
    position = tl.load(positions + sequence).to(tl.int32)
    query = tl.load(q + sequence * q_row + head * K + of_key, mask=inside, other=0).to(tl.float32)
    key = tl.load(k + sequence * k_row + shared * K + of_key, mask=inside, other=0)
    value = tl.load(v + sequence * v_row + shared * K + of_key, mask=inside, other=0)
    own = tl.sum(query * key.to(tl.float32)) * scale

    row = (sequence * HEADS * GROUP + head) * STRETCHES + of_stretch
    there = of_stretch < STRETCHES
    highest = tl.load(maxima + row, mask=there, other=LOWEST)
    above = tl.maximum(tl.max(highest), own)
    weights, own = tl.exp(highest - above), tl.exp(own - above)
    total = tl.sum(weights * tl.load(sums + row, mask=there, other=0)) + own
    parts = tl.load(outputs + row[:, None] * K + of_key[None, :], mask=there[:, None] & inside[None, :], other=0)
    mixed = tl.sum(parts * weights[:, None], 0) + own * value.to(tl.float32)
    tl.store(out, (mixed / total).to(o.dtype.element_ty), mask=inside)

    if head % GROUP == 0:
        if WINDOW > 1:
            at = slot * near_slot + (position % (WINDOW - 1) * HEADS + shared) * K + of_key
            tl.store(near_k + at, key.to(near_k.dtype.element_ty), mask=inside)
            tl.store(near_v + at, value.to(near_v.dtype.element_ty), mask=inside)
        at = slot * fading_slot + (position % (2 * WINDOW - 1) * HEADS + shared) * K + of_key
        key = tl.load(fading_new_k + sequence * fading_k_row + shared * K + of_key, mask=inside, other=0)
        value = tl.load(fading_new_v + sequence * fading_v_row + shared * K + of_key, mask=inside, other=0)
        tl.store(fading_k + at, key.to(fading_k.dtype.element_ty), mask=inside)
        tl.store(fading_v + at, value.to(fading_v.dtype.element_ty), mask=inside)


def decode(
    queries: tuple[torch.Tensor, torch.Tensor],
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    pools: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slots: torch.Tensor,
    null_slot: int,
    window: int,
    scale: float,
) -> torch.Tensor:
    """Attend from one token of each of S sequences, and put its keys and values into the rings; o [S, H, K].

    queries: [S, H, K] for the near and for the fading window, which may be one tensor; new: k, v, fading k, fading v of
    the tokens, each [S, Hk, K], Hk divides H; a row's heads stand side by side in memory. pools: rings of these four,
    [slots, max(1, W - 1), Hk, K] the near and [slots, 2 W - 1, Hk, K] the fading ones, contiguous in each slot, changed
    in place. positions [S] integers; slots [S] integers, all different but for `null_slot`, whose rows give zeros and
    change nothing.
    """
    (q, fading_q), (near_k, near_v, fading_k, fading_v) = queries, pools
    sequences, heads, head_dim = q.shape
    kv_heads = near_k.shape[2]
    if any(x.stride()[1:] != (head_dim, 1) for x in (*queries, *new)):
        raise ValueError("the heads of a row must be side by side in memory")
    for k, v, size in ((near_k, near_v, max(1, window - 1)), (fading_k, fading_v, 2 * window - 1)):
        if k.shape[1] != size or k.stride() != v.stride() or not k[0].is_contiguous():
            raise ValueError(f"a ring of {size} positions must be contiguous, and alike for keys and values")
    parts = [2 * triton.cdiv(window, stretch) for stretch in STRETCHES]
    enough = (n for n, count in enumerate(parts) if sequences * kv_heads * count >= PROGRAMS)
    chosen = next(enough, len(parts) - 1)
    stretches, group = parts[chosen], heads // kv_heads
    maxima, sums = q.new_empty(2, sequences, heads, stretches, dtype=torch.float32)
    outputs = q.new_empty(sequences, heads, stretches, head_dim, dtype=torch.float32)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    shared = {
        "WINDOW": window,
        "HEADS": kv_heads,
        "GROUP": group,
        "K": head_dim,
        "BLOCK_K": max(16, triton.next_power_of_2(head_dim)),
    }
    _stretch[stretches, kv_heads, sequences](
        q,
        fading_q,
        *pools,
        positions,
        slots,
        maxima,
        sums,
        outputs,
        q.stride(0),
        fading_q.stride(0),
        near_k.stride(0),
        fading_k.stride(0),
        slots.stride(0),
        null_slot,
        scale,
        STRETCH=STRETCHES[chosen],
        BLOCK_N=64 if head_dim * q.element_size() <= 256 else 32,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        **shared,
        num_warps=4,
        num_stages=3,
    )
    _merge[heads, sequences](
        q,
        *new,
        *pools,
        positions,
        slots,
        maxima,
        sums,
        outputs,
        o,
        q.stride(0),
        *(x.stride(0) for x in new),
        near_k.stride(0),
        fading_k.stride(0),
        slots.stride(0),
        null_slot,
        scale,
        STRETCHES=stretches,
        BLOCK_S=triton.next_power_of_2(stretches),
        **shared,
        num_warps=4,
    )
    return o
