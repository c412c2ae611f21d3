# SPDX-License-Identifier: Apache-2.0
"""A Triton kernel that advances the states of all sequences over their chunks, or gradients back over them.

Legend: S sequences, n chunks, H heads, K/V key/value head dims.
"""

from __future__ import annotations

import functools
from itertools import accumulate

import torch
import triton
import triton.language as tl

from .varlen import on_device

BLOCK = 512  # entries of a state for a program, which advances them over all chunks of a sequence


@triton.jit
def _scan(carry, update, out, state, firsts, counts, size, H: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # sequence and head
    sequence, head = row // H, row % H
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    count = tl.load(counts + sequence)
    now = tl.load(state + row * size + at, mask=inside, other=0.0)
    for n in range(count):
        step = count - 1 - n if REVERSE else n
        chunk = (tl.load(firsts + step) + sequence) * H + head
        tl.store(out + chunk * size + at, now, mask=inside)
        now = now * tl.load(carry + chunk) + tl.load(update + chunk * size + at, mask=inside, other=0.0)
    tl.store(state + row * size + at, now, mask=inside)


@functools.lru_cache(maxsize=8)
def _steps(sequences: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The first chunk of each step, and the number of chunks of each sequence."""
    firsts = [0, *accumulate(sequences[:-1])]
    counts = [sum(count > sequence for count in sequences) for sequence in range(max(sequences, default=0))]
    return on_device(firsts, device), on_device(counts, device)


def scan(
    sequences: list[int],
    carry: torch.Tensor,
    update: torch.Tensor,
    out: torch.Tensor,
    state: torch.Tensor,
    reverse: bool = False,
) -> None:
    """state <- carry_n state + update_n over the chunks of every sequence; `out` receives the state before each chunk.

    carry [n, H], update and out [n, H, K, V], state [S, H, K, V] of one dtype, contiguous; `state` and `out` are
    changed in place. The chunks are ordered as in `varlen.ChunkLayout`, and `sequences` is each step's number of them.
    reverse: from the last chunk of each sequence to its first.
    """
    if not sequences:
        return
    (_, heads, *shape), (firsts, counts) = update.shape, _steps(tuple(sequences), state.device)
    size = shape[0] * shape[1]
    grid = sequences[0] * heads, triton.cdiv(size, BLOCK)
    with torch.cuda.device_of(state):
        _scan[grid](carry, update, out, state, firsts, counts, size, H=heads, BLOCK=BLOCK, REVERSE=reverse, num_warps=4)
