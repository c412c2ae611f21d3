# SPDX-License-Identifier: Apache-2.0
"""Short causal depthwise convolution with its state, over rows or packed documents.

Legend: B batch, T tokens, S sequences (rows or documents), C channels, W conv_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import dispatch
from .varlen import sequence_lengths


@dispatch.entry("conv")
def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU(causal depthwise conv1d(x)); the last tap multiplies the current token.

    x [B, T, C]; weight [C, 1, W]; bias [C] or None; initial_state [S, C, W-1], the inputs that came before each
    sequence, oldest first (None: zeros); cu_seqlens [S+1] packs S documents in one row.
    Returns y [B, T, C] and final_state [S, C, W-1], both in x.dtype.
    """
    batch, tokens, channels = x.shape
    reach = weight.shape[-1] - 1
    if cu_seqlens is None:
        if initial_state is None:
            initial_state = x.new_zeros(batch, channels, reach)
        extended = torch.cat([initial_state.to(x.dtype), x.transpose(1, 2)], dim=-1)  # [B, C, W-1+T]
        y = F.silu(F.conv1d(extended, weight.to(x.dtype), _as(bias, x), groups=channels)).transpose(1, 2)
        return y, extended[..., tokens:]
    # Documents in one row: W-1 slots of history before each, so that one convolution serves all and none sees another.
    lengths = torch.tensor(sequence_lengths(batch, tokens, cu_seqlens), device=x.device)
    sequences = torch.arange(len(lengths), device=x.device)
    place = torch.arange(tokens, device=x.device) + (torch.repeat_interleave(sequences, lengths) + 1) * reach
    taps = torch.arange(reach, device=x.device)
    starts = torch.cumsum(lengths, 0) - lengths + sequences * reach
    if initial_state is None:
        initial_state = x.new_zeros(len(lengths), channels, reach)
    extended = x.new_zeros(tokens + len(lengths) * reach, channels)
    extended = extended.index_copy(0, place, x[0])
    history = initial_state.to(x.dtype).transpose(1, 2).reshape(-1, channels)
    extended = extended.index_copy(0, (starts[:, None] + taps).flatten(), history)
    y = F.silu(F.conv1d(extended.T[None], weight.to(x.dtype), _as(bias, x), groups=channels))
    y = y[0].T.index_select(0, place - reach)[None]
    last = (starts + lengths)[:, None] + taps
    return y, extended[last].transpose(1, 2)


def _as(bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if bias is None else bias.to(x.dtype)
