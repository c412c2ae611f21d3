# SPDX-License-Identifier: Apache-2.0
"""Sequences divided into chunks: one layout for rows of equal length and for packed documents.

Legend: B batch, T tokens, S sequences (rows or documents), N chunks, n chunks of a group, C chunk_size, H heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")
GROUP = 4096  # tokens times heads of the chunks that a CPU computes together; more would not fit into its cache
_KEPT = WeakTensorKeyDictionary()  # cu_seqlens -> its version, and results of `kept` functions


def sequence_lengths(batch: int, tokens: int, cu_seqlens: torch.Tensor | None) -> list[int]:
    """Lengths of the S sequences. ValueError if `cu_seqlens` [S+1] does not cover one row of `tokens` exactly."""
    if cu_seqlens is None:
        return [tokens] * batch
    bounds = _values(cu_seqlens)
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 (documents packed in one row), got {batch}")
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens must not decrease and must go from 0 to {tokens}, got {bounds}")
    return [b - a for a, b in zip(bounds, bounds[1:], strict=False)]


def kept(make: Callable[..., T]) -> Callable[..., T]:
    """make(cu_seqlens, *arguments), whose results are kept as long as the tensor `cu_seqlens` exists and has the same
    version. The ops of all layers ask for the same values, and reading them makes the CPU wait for the GPU."""

    @functools.wraps(make)
    def get(cu_seqlens: torch.Tensor, *arguments: Any) -> T:
        if cu_seqlens.is_inference():  # has no version
            return make(cu_seqlens, *arguments)
        version, results = _KEPT.get(cu_seqlens, (None, {}))
        if version != cu_seqlens._version:
            version, results = _KEPT[cu_seqlens] = cu_seqlens._version, {}
        key = make, torch.is_inference_mode_enabled(), *arguments
        if key not in results:
            results[key] = make(cu_seqlens, *arguments)
        return results[key]

    return get


@kept
def _values(cu_seqlens: torch.Tensor) -> list[int]:
    return cu_seqlens.tolist()


def lengths_on(device: torch.device, batch: int, tokens: int, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """`sequence_lengths` as a tensor [S] on `device`; for equal rows without a copy, which CUDA graphs do not allow."""
    if cu_seqlens is None:
        return torch.full((batch,), tokens, device=device)
    return on_device(sequence_lengths(batch, tokens, cu_seqlens), device)


def on_device(values: list[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Integers of the CPU on `device`. A GPU receives them in its order of work, and the CPU does not wait for it."""
    x = torch.as_tensor(values, dtype=torch.long)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class ChunkLayout:
    """Positions of the tokens when every sequence is divided into chunks of C tokens, with zeros at its end.

    Chunks are ordered by their index in the sequence, then by sequence, longest first. The j-th chunks of all sequences
    are therefore one slice `steps[j]`, and the sequences that are still active at step j are the first of `order`. A
    scan over chunks advances all documents together, without padding short documents to the longest.
    """

    def __init__(self, batch: int, tokens: int, cu_seqlens: torch.Tensor | None, chunk_size: int):
        lengths = sequence_lengths(batch, tokens, cu_seqlens)
        self.shape, self.chunk_size = (batch, tokens), chunk_size
        self.num_sequences = len(lengths)
        counts = [-(-length // chunk_size) for length in lengths]
        self.equal = cu_seqlens is None
        self.order = sorted(range(len(lengths)), key=lambda s: -counts[s])
        self.steps: list[slice] = []
        starts = [0] * len(lengths)
        for s in range(1, len(lengths)):
            starts[s] = starts[s - 1] + lengths[s - 1]
        rows, begin = [], 0
        for step in range(max(counts, default=0)):
            active = [s for s in self.order if counts[s] > step]
            self.steps.append(slice(begin, begin + len(active)))
            begin += len(active)
            if not self.equal:
                for s in active:
                    first, stop = starts[s] + step * chunk_size, starts[s] + lengths[s]
                    rows.append([t if t < stop else tokens for t in range(first, first + chunk_size)])
        self._rows = torch.tensor(rows, dtype=torch.long).view(-1, chunk_size)  # empty for equal rows
        self._source = torch.empty(0 if self.equal else tokens + 1, dtype=torch.long)  # position of each token in rows
        self._source[self._rows.flatten()] = torch.arange(self._rows.numel())
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def _positions(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The token of each position of the chunks, and the position of each token, on `device`."""
        if device not in self._on:
            self._on[device] = on_device(self._rows.flatten(), device), on_device(self._source[:-1], device)
        return self._on[device]

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> [N, C, ...], zeros after the end of a sequence."""
        tokens, size = self.shape[1], self.chunk_size
        if self.equal:
            pad = len(self.steps) * size - tokens
            if pad:
                x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, pad])
            return x.unflatten(1, (len(self.steps), size)).transpose(0, 1).flatten(0, 1)
        x = torch.cat([x[0], x.new_zeros(1, *x.shape[2:])])
        return x.index_select(0, self._positions(x.device)[0]).unflatten(0, self._rows.shape)

    def split_heads(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[B, T, H, ...] -> [N, H, C, ...] in `dtype`, contiguous, because bmm copies operands that are not."""
        return self.split(x).transpose(1, 2).to(dtype).contiguous()

    def by_step(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, ...] -> a tensor for each of `steps`."""
        # One split, because the backward of each slice would fill a tensor like x.
        return x.split([at.stop - at.start for at in self.steps])

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, ...] -> [B, T, ...]: the inverse of `split`."""
        batch, tokens = self.shape
        if self.equal:
            return x.unflatten(0, (len(self.steps), batch)).transpose(0, 1).flatten(1, 2)[:, :tokens]
        return x.flatten(0, 1).index_select(0, self._positions(x.device)[1]).unsqueeze(0)


def chunk_layout(batch: int, tokens: int, cu_seqlens: torch.Tensor | None, chunk_size: int) -> ChunkLayout:
    """`ChunkLayout`, kept for further ops on the same `cu_seqlens`."""
    if cu_seqlens is None:
        return ChunkLayout(batch, tokens, None, chunk_size)
    return _kept_layout(cu_seqlens, batch, tokens, chunk_size)


@kept
def _kept_layout(cu_seqlens: torch.Tensor, batch: int, tokens: int, chunk_size: int) -> ChunkLayout:
    return ChunkLayout(batch, tokens, cu_seqlens, chunk_size)


def packed_chunks(
    cu_seqlens: torch.Tensor, tokens: int, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The chunks of S sequences packed in `tokens` tokens, for kernels: all int32, without synchronisation.

    cu_seqlens [S+1] again, the number of chunks before each sequence [S+1], and the sequence of each chunk [most],
    where `most` is at least the number of chunks. The sequence of a chunk that does not exist is S.
    """
    bounds = cu_seqlens.to(torch.int32, copy=True)  # never the argument itself, which keeps results (`kept_chunks`)
    most = tokens // chunk_size + min(len(bounds) - 1, tokens)
    chunks = torch.zeros_like(bounds)
    torch.cumsum((bounds.diff() + chunk_size - 1) // chunk_size, 0, out=chunks[1:])
    numbers = torch.arange(most, device=bounds.device, dtype=torch.int32)
    return bounds, chunks, torch.searchsorted(chunks, numbers, right=True, out_int32=True) - 1


kept_chunks = kept(packed_chunks)


def chunk_groups(layout: ChunkLayout, g: torch.Tensor) -> list[tuple[slice, list[int]]]:
    """Groups of the layout's steps to compute together: a slice of N, and each step's number of sequences.

    g [N, H, C] has one value for each token and head. On a GPU all steps are one group.
    """
    groups: list[tuple[slice, list[int]]] = []
    for step in layout.steps:
        if not groups or not (g.is_cuda or (step.stop - groups[-1][0].start) * g[0].numel() <= GROUP):
            groups.append((slice(step.start, step.start), []))
        at, sequences = groups[-1]
        groups[-1] = slice(at.start, step.stop), [*sequences, step.stop - step.start]
    return groups


def step_views(sequences: list[int], *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """For each step of a group of chunks, views of tensors [n, H, ...] with sequences and heads in one dimension."""
    heads = tensors[0].shape[1]
    sizes = [count * heads for count in sequences]
    return list(zip(*(x.flatten(0, 1).split(sizes) for x in tensors), strict=True))


def by_head(at: slice, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Chunks `at` of [N, C, H, ...] as [n, H, C, ...], contiguous, because bmm copies operands that are not. With one
    head the result is a view."""
    return [x[at].transpose(1, 2).contiguous() for x in tensors]
