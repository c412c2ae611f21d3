# SPDX-License-Identifier: Apache-2.0
"""Padding and packing, computed once per forward pass for all mixers.

Padding of any kind (left, right, holes) is handled as packing: the real tokens are gathered, run as documents in one
row, and scattered back. Padding therefore enters neither a convolution nor a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hmf.errors import HmfError


@dataclass(frozen=True)
class PackedLayout:
    """The real tokens of a batch [B, T] as S documents in one row of N tokens.

    indices [N]: positions of the real tokens in the flattened batch; cu_seqlens [S+1].
    """

    indices: torch.Tensor
    cu_seqlens: torch.Tensor
    shape: tuple[int, int]

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> [1, N, ...]"""
        return x.expand(*self.shape, *x.shape[2:]).flatten(0, 1).index_select(0, self.indices)[None]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[1, N, ...] -> [B, T, ...], zeros at padding."""
        flat = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return flat.index_copy(0, self.indices, x[0]).unflatten(0, self.shape)


def packed_layout(
    shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    has_past: bool,
    may_jump: bool = False,
) -> PackedLayout | None:
    """The layout of a batch, or None when its rows are whole sequences without padding.

    attention_mask [B, past + T], nonzero for real tokens; position_ids [B or 1, T], which restart at each packed
    document; cu_seqlens [S+1], the bounds of the documents in a batch of one row. Raises HmfError for packing combined
    with padding or with a cache.

    may_jump: whether positions that jump would go on in the same text in transformers, as they do with a mask and with
    a cache. HmfError for such positions, except for those that restart at 0: they begin documents here.
    """
    batch, tokens = shape
    real = None if attention_mask is None else attention_mask[:, -tokens:].bool()
    if real is not None and bool(real.all()):
        real = None
    if cu_seqlens is None and real is None and (tokens == 1 or has_past):
        return None
    starts = None if has_past or cu_seqlens is not None else document_starts(shape, position_ids)  # [B, T]
    if starts is not None and position_ids is not None:
        inner = starts[:, 1:]
        if real is not None:
            # Padding may have any position. A real token after a real token must continue its document.
            inner = inner & real[:, 1:] & real[:, :-1]
        if not bool(inner.any()):
            starts = None
        elif may_jump:
            _require_restarts(inner, position_ids)
    if real is not None:
        if cu_seqlens is not None or starts is not None:
            raise HmfError("attention_mask: a batch has both padding and packed documents; remove the padding tokens")
        return PackedLayout(real.flatten().nonzero()[:, 0], _cumulative(real.sum(1)), shape)
    if cu_seqlens is not None:
        if batch != 1 or has_past:
            raise HmfError("cu_seq_lens_q: packed documents need a batch of one row and no cached tokens")
        return PackedLayout(torch.arange(tokens, device=cu_seqlens.device), cu_seqlens.long(), shape)
    if starts is None:
        return None
    bounds = starts.flatten().nonzero()[:, 0]
    end = bounds.new_tensor([batch * tokens])
    return PackedLayout(torch.arange(batch * tokens, device=bounds.device), torch.cat([bounds, end]), shape)


def _require_restarts(inner: torch.Tensor, position_ids: torch.Tensor) -> None:
    """HmfError if a document that starts inside a row, at `inner` [B, T-1], has a first position other than 0."""
    jumps = inner & (position_ids[:, 1:] != 0)
    if bool(jumps.any()):
        row, at = jumps.nonzero()[0].tolist()
        before, after = position_ids.expand(len(inner), -1)[row, at : at + 2].tolist()
        raise HmfError(
            f"position_ids: jump from {before} to {after}: with an attention_mask or a cache, transformers goes on in "
            "the same text there, and a Hybrid does not; give positions that grow by one, or without a mask and with "
            "use_cache=False if documents begin there"
        )


def default_positions(
    tokens: int,
    past: int,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Positions [B or 1, tokens] of new tokens: from 0 in each document of `cu_seqlens`, or after `past` tokens.

    With an attention mask [B, past + tokens], the first real token of a row is at 0. This matters because after a short
    convolution the result depends on absolute rotary positions, not only on differences. Later padding has positions
    too, as in transformers.
    """
    if cu_seqlens is not None:
        first = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
        return (torch.arange(tokens, device=device) - first)[None]
    if attention_mask is not None:
        first = attention_mask.bool().long().argmax(1, keepdim=True)
        return (torch.arange(attention_mask.shape[1], device=device) - first).clamp_min(0)[:, -tokens:]
    return (torch.arange(tokens, device=device) + past)[None]


def document_starts(shape: tuple[int, int], position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """bool [B, T], true where a position is not its left neighbour's plus one; None without 2-D position_ids."""
    if position_ids is None or position_ids.dim() != 2 or shape[1] == 1:
        return None
    starts = torch.ones(shape, dtype=torch.bool, device=position_ids.device)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
