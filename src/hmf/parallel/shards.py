# SPDX-License-Identifier: Apache-2.0
"""Rows divided over the processes of a group: the chunks of each rank, document bounds, and gathering across ranks.

A row of T tokens is 2R chunks. Rank r of R holds chunks r and 2R - 1 - r, so that causal attention costs the same on
all ranks. A segment is the part of a document that is in one chunk.

Legend: B rows, T tokens of a row, R ranks, c tokens of a chunk, M = 2B chunks of this rank (row by row, in order),
S segments of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hmf.errors import HmfError
from hmf.layers.layout import PackedLayout

from .collectives import Group


@dataclass(frozen=True)
class ShardedLayout(PackedLayout):
    """This rank's tokens in one row; the documents of the layout are the segments."""

    shards: Shards


@dataclass(frozen=True)
class _Halo:
    """The exchange of the `reach` positions before each chunk."""

    token: torch.Tensor  # indices of the local tokens to send, by destination
    send: list[int]
    receive: list[int]
    place: torch.Tensor  # indices of the received tokens in the result [M * reach]


class Shards:
    """The parts of a batch of rows that this rank of `group` holds."""

    def __init__(self, starts: torch.Tensor, group: Group):
        """starts [B, T]: whether a token begins a document, the same on all ranks; T is a multiple of 2R."""
        batch, tokens = starts.shape
        chunks = 2 * group.size
        self.group, self.batch, self.chunk = group, batch, tokens // chunks
        device, starts = starts.device, starts.cpu()
        starts = torch.cat([torch.ones(batch, 1, dtype=torch.bool), starts[:, 1:].bool()], 1)
        position = torch.arange(tokens).expand(batch, -1)
        begun = torch.where(starts, position, 0).cummax(1).values
        # For each chunk of each row [B, 2R]: how many tokens before it belong to the document at its start.
        self.before = (position - begun)[:, :: self.chunk]
        starts = starts.unflatten(1, (chunks, self.chunk))
        self.continues = ~starts[..., 0]  # [B, 2R]: the chunk begins inside a document
        self.whole = self.continues & ~starts[..., 1:].any(-1)  # and no document starts in the chunk
        self.own = own_chunks(group.rank, group.size)

        segment_starts = starts[:, self.own].clone()  # [B, 2, c]
        segment_starts[..., 0] = True
        segment_starts = segment_starts.flatten()
        bounds, total = segment_starts.nonzero()[:, 0], len(segment_starts)
        count = total // self.chunk
        first = torch.searchsorted(bounds, torch.arange(count) * self.chunk)
        bounds = torch.cat([bounds, bounds.new_tensor([total])])
        last = torch.cat([first[1:], first.new_tensor([len(bounds) - 1])]) - 1
        self.lengths = bounds.diff()
        self.first, self.last = first.to(device), last.to(device)  # [M]: indices of segments
        within = torch.arange(self.chunk)
        self.in_first = (within < self.lengths[first][:, None]).to(device)  # [M, c]
        self.in_last = (within >= self.chunk - self.lengths[last][:, None]).to(device)
        self.seen = self.before[:, self.own].flatten().to(device)  # [M]: `before` of this rank's chunks
        self.layout = ShardedLayout(
            torch.arange(total, device=device), bounds.to(device), (batch, 2 * self.chunk), self
        )
        # For each row and segment: the slice of the whole row from its document's start to the segment's end, or None
        # if the document starts with the segment.
        self.documents: list[list[slice | None]] = [[] for _ in range(batch)]
        for number, length in enumerate(self.lengths[first].tolist()):
            row, begin = number // 2, self.own[number % 2] * self.chunk
            before = int(self.before[row, self.own[number % 2]])
            inside = int(last[number] - first[number])  # number of further segments of the chunk
            self.documents[row] += [slice(begin - before, begin + length) if before else None, *[None] * inside]
        self._halos: dict[int, _Halo] = {}
        self._order = torch.tensor([place for rank in range(group.size) for place in own_chunks(rank, group.size)])
        self._order = self._order.argsort().to(device)

    def gather_tokens(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Whole rows, in order, from the parts x of all ranks; `dim` is the dimension of the 2c tokens."""
        parts = self.group.gather(x.movedim(dim, 0).unflatten(0, (2, self.chunk)))  # [R, 2, c, ...]
        return parts.flatten(0, 1).index_select(0, self._order).flatten(0, 1).movedim(0, dim)

    def gather_chunks(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, ...], one entry for each chunk of this rank -> [2R, B, ...], the entries of all chunks in order."""
        parts = self.group.gather(x.unflatten(0, (self.batch, 2)).transpose(0, 1))  # [R, 2, B, ...]
        return parts.flatten(0, 1).index_select(0, self._order)

    def own_chunks_of(self, x: torch.Tensor) -> torch.Tensor:
        """x [2R, B, ...] -> [M, ...]: the inverse of `gather_chunks`, on this rank."""
        return x[self.own].transpose(0, 1).flatten(0, 1)

    def halo(self, x: torch.Tensor, reach: int) -> torch.Tensor:
        """The `reach` positions before each of this rank's chunks [M, reach, ...], oldest first, from x [1, 2cB, ...].

        Zeros for positions of another document or before the row; these are not sent.
        """
        if reach not in self._halos:
            self._halos[reach] = self._plan(reach, x.device)
        plan = self._halos[reach]
        received = self.group.exchange(x[0].index_select(0, plan.token), plan.send, plan.receive)
        empty = x.new_zeros(len(self.seen) * reach, *x.shape[2:])
        return empty.index_copy(0, plan.place, received).unflatten(0, (-1, reach))

    def _plan(self, reach: int, device: torch.device) -> _Halo:
        size, rank = self.group.size, self.group.rank
        offsets = torch.arange(-reach, 0)
        tokens, send, receive, places = [], [], [], []
        for other in range(size):
            row, owner, local, place = self._halo_positions(other, offsets)
            tokens.append((row * 2 * self.chunk + local)[owner == rank])
            send.append(len(tokens[-1]))
            if other == rank:
                places = [place[owner == source] for source in range(size)]
                receive = [len(part) for part in places]
        return _Halo(torch.cat(tokens).to(device), send, receive, torch.cat(places).to(device))

    def _halo_positions(self, rank: int, offsets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For each position of a rank's halo: its row, the rank that holds it, its index in that rank's part of the
        row, and its index in the halo."""
        chunks = torch.tensor(own_chunks(rank, self.group.size))
        real = offsets >= -self.before[:, chunks][..., None]  # [B, 2, reach]
        row, slot, offset = real.nonzero().unbind(1)
        position = chunks[slot] * self.chunk + offsets[offset]
        chunk = position // self.chunk
        second = chunk >= self.group.size
        owner = torch.where(second, 2 * self.group.size - 1 - chunk, chunk)
        return row, owner, position % self.chunk + second * self.chunk, real.flatten().nonzero()[:, 0]


def own_chunks(rank: int, size: int) -> list[int]:
    """The two of the 2R chunks that rank `rank` of R = `size` holds."""
    return [rank, 2 * size - 1 - rank]


def own_part(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A rank's part of whole rows: [B, T, ...] -> [B, T/R, ...]. HmfError if T is not a multiple of 2R."""
    chunks = 2 * size
    if x.shape[1] % chunks:
        raise HmfError(
            f"sequence_length: rows of {x.shape[1]} tokens do not divide into {chunks} chunks for {size} processes; "
            f"choose a multiple of {chunks}"
        )
    return x.unflatten(1, (chunks, -1))[:, own_chunks(rank, size)].flatten(1, 2)
