# SPDX-License-Identifier: Apache-2.0
"""Documents cut into chunks: one layout for equal rows and for packed documents.

Legend: B batch, T tokens, S sequences (rows or documents), N chunks, n chunks of a group, C chunk_size, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

GROUP = 4096  # tokens times heads whose chunks are computed together on a CPU, or its cache would not hold them


def sequence_lengths(batch: int, tokens: int, cu_seqlens: torch.Tensor | None) -> list[int]:
    """Lengths of the S sequences; with `cu_seqlens` [S+1] the batch must be one row that they cover exactly."""
    if cu_seqlens is None:
        return [tokens] * batch
    bounds = cu_seqlens.tolist()
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 (documents packed in one row), got {batch}")
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens}, got {bounds}")
    return [b - a for a, b in zip(bounds, bounds[1:], strict=False)]


class ChunkLayout:
    """Where each token lies when every sequence is cut into chunks of C tokens, zero-padded at its end.

    Chunks are ordered by their place in the sequence, then by sequence, longest first. So the j-th chunks of all
    sequences that have one are one slice `steps[j]`, and the sequences still active at step j are the first of `order`:
    a scan over chunks advances all documents in lockstep, without padding short ones to the longest.
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

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> [N, C, ...], zeros where a sequence has ended."""
        tokens, size = self.shape[1], self.chunk_size
        if self.equal:
            pad = len(self.steps) * size - tokens
            if pad:
                x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, pad])
            return x.unflatten(1, (len(self.steps), size)).transpose(0, 1).flatten(0, 1)
        x = torch.cat([x[0], x.new_zeros(1, *x.shape[2:])])
        return x.index_select(0, self._rows.flatten().to(x.device)).unflatten(0, self._rows.shape)

    def split_heads(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[B, T, H, ...] -> [N, H, C, ...] in `dtype`, contiguous: a batched product copies operands that are not."""
        return self.split(x).transpose(1, 2).to(dtype).contiguous()

    def by_step(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, ...] -> its `steps`. One split: the backward of N slices would fill a whole x with zeros N times."""
        return x.split([at.stop - at.start for at in self.steps])

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, ...] -> [B, T, ...]: the inverse of `split`."""
        batch, tokens = self.shape
        if self.equal:
            return x.unflatten(0, (len(self.steps), batch)).transpose(0, 1).flatten(1, 2)[:, :tokens]
        source = torch.empty(tokens + 1, dtype=torch.long)
        source[self._rows.flatten()] = torch.arange(self._rows.numel())
        return x.flatten(0, 1).index_select(0, source[:tokens].to(x.device)).unsqueeze(0)


def chunk_groups(layout: ChunkLayout, g: torch.Tensor) -> list[tuple[slice, list[int]]]:
    """Runs of the layout's steps: a slice of N, and how many sequences each step has. A GPU takes all at once.

    g [N, H, C] has one value for each token and head.
    """
    groups: list[tuple[slice, list[int]]] = []
    for step in layout.steps:
        if not groups or not (g.is_cuda or (step.stop - groups[-1][0].start) * g[0].numel() <= GROUP):
            groups.append((slice(step.start, step.start), []))
        at, sequences = groups[-1]
        groups[-1] = slice(at.start, step.stop), [*sequences, step.stop - step.start]
    return groups


def step_views(sequences: list[int], *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Of tensors [n, H, ...] of a group of chunks, each step's views with sequences and heads in one dimension."""
    heads = tensors[0].shape[1]
    sizes = [count * heads for count in sequences]
    return list(zip(*(x.flatten(0, 1).split(sizes) for x in tensors), strict=True))


def by_head(at: slice, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Chunks `at` of [N, C, H, ...] as [n, H, C, ...], contiguous: a batched product copies operands that are not.
    Views if there is one head."""
    return [x[at].transpose(1, 2).contiguous() for x in tensors]
