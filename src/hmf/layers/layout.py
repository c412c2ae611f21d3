# SPDX-License-Identifier: Apache-2.0
"""Padding and packing, decided once a forward pass and the same for every mixer.

Padding of any kind (left, right, holes) is the same thing as packing: the real tokens are taken out, run as documents
in one row, and put back. So a pad can enter neither a convolution nor a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hmf.errors import HmfError


@dataclass(frozen=True)
class PackedLayout:
    """Real tokens of a batch [B, T] as S documents in one row of N tokens.

    indices [N] into the flattened batch; cu_seqlens [S+1].
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
) -> PackedLayout | None:
    """The layout of a batch, or None when its rows are whole sequences without padding.

    attention_mask [B, past + T], nonzero where a token is real; position_ids [B or 1, T], which restart at each packed
    document; cu_seqlens [S+1], the documents of a one-row batch, given explicitly. Raises HmfError for packing
    combined with padding or with a cache.
    """
    batch, tokens = shape
    real = None if attention_mask is None else attention_mask[:, -tokens:].bool()
    if real is not None and bool(real.all()):
        real = None
    if cu_seqlens is None and real is None and (tokens == 1 or has_past):
        return None
    starts = None if has_past or cu_seqlens is not None else document_starts(shape, position_ids)  # [B, T]
    if real is not None:
        # Pads may carry any position; a real token that follows a real one must continue its document.
        if cu_seqlens is not None or (starts is not None and bool((starts[:, 1:] & real[:, 1:] & real[:, :-1]).any())):
            raise HmfError("attention_mask: padding and packed documents in one batch; drop the padding tokens instead")
        return PackedLayout(real.flatten().nonzero()[:, 0], _cumulative(real.sum(1)), shape)
    if cu_seqlens is not None:
        if batch != 1 or has_past:
            raise HmfError("cu_seq_lens_q: packed documents need a batch of one row and an empty cache")
        return PackedLayout(torch.arange(tokens, device=cu_seqlens.device), cu_seqlens.long(), shape)
    if starts is None or not bool(starts[:, 1:].any()):
        return None
    bounds = starts.flatten().nonzero()[:, 0]
    end = bounds.new_tensor([batch * tokens])
    return PackedLayout(torch.arange(batch * tokens, device=bounds.device), torch.cat([bounds, end]), shape)


def document_starts(shape: tuple[int, int], position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """[B, T], true where a position does not follow its left neighbour's; None when there are no positions to read."""
    if position_ids is None or position_ids.dim() != 2 or shape[1] == 1:
        return None
    starts = torch.ones(shape, dtype=torch.bool, device=position_ids.device)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
