# SPDX-License-Identifier: Apache-2.0
"""Short causal depthwise convolution with a state, over rows or packed documents.

Legend: B batch, T tokens, S sequences (rows or documents), C channels, W conv_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import dispatch
from .varlen import kept, lengths_on, sequence_lengths

Result = tuple[torch.Tensor, torch.Tensor]


@dispatch.entry("conv")
def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Result:
    """SiLU(causal depthwise conv1d(x)); the last tap multiplies the current token.

    x [B, T, C]; weight [C, 1, W]; bias [C] or None; initial_state [S, C, W-1], the inputs that came before each
    sequence, oldest first (None: zeros); cu_seqlens [S+1] packs S documents in one row.
    Returns y [B, T, C] and final_state [S, C, W-1], both in x.dtype.
    """
    return dispatch.resolve("conv", x, weight)(x, weight, bias, initial_state, cu_seqlens)


@dispatch.implementation("conv", "reference")
def reference(x, weight, bias=None, initial_state=None, cu_seqlens=None) -> Result:
    """The definition: a loop over the tokens."""
    batch, tokens, channels = x.shape
    rows, outputs, states, first = x.flatten(0, 1), [], [], 0
    for s, length in enumerate(sequence_lengths(batch, tokens, cu_seqlens)):
        zeros = x.new_zeros(channels, weight.shape[-1] - 1)
        history = zeros if initial_state is None else initial_state[s].to(x.dtype)
        for token in rows[first : first + length]:
            taps = torch.cat([history, token[:, None]], 1)
            y = (taps * weight[:, 0].to(x.dtype)).sum(1)
            outputs.append(F.silu(y if bias is None else y + bias.to(x.dtype)))
            history = taps[:, 1:]
        states.append(history)
        first += length
    return torch.stack(outputs).view_as(x) if outputs else x, torch.stack(states)


@dispatch.implementation("conv", "chunked")
def chunked(x, weight, bias=None, initial_state=None, cu_seqlens=None) -> Result:
    """One convolution call for all sequences; each sequence is preceded by its history."""
    batch, tokens, channels = x.shape
    reach = weight.shape[-1] - 1
    if cu_seqlens is None:
        if initial_state is None:
            initial_state = x.new_zeros(batch, channels, reach)
        extended = torch.cat([initial_state.to(x.dtype), x.transpose(1, 2)], dim=-1)  # [B, C, W-1+T]
        y = F.silu(F.conv1d(extended, weight.to(x.dtype), _as(bias, x), groups=channels)).transpose(1, 2)
        return y, extended[..., tokens:]
    # Packed documents: W-1 slots of history stand before each, so that one convolution does not mix documents.
    lengths = lengths_on(x.device, batch, tokens, cu_seqlens)
    sequences = torch.arange(len(lengths), device=x.device)
    position = torch.arange(tokens, device=x.device) + (torch.repeat_interleave(sequences, lengths) + 1) * reach
    taps = torch.arange(reach, device=x.device)
    starts = torch.cumsum(lengths, 0) - lengths + sequences * reach
    if initial_state is None:
        initial_state = x.new_zeros(len(lengths), channels, reach)
    extended = x.new_zeros(tokens + len(lengths) * reach, channels)
    extended = extended.index_copy(0, position, x[0])
    history = initial_state.to(x.dtype).transpose(1, 2).reshape(-1, channels)
    extended = extended.index_copy(0, (starts[:, None] + taps).flatten(), history)
    y = F.silu(F.conv1d(extended.T[None], weight.to(x.dtype), _as(bias, x), groups=channels))
    y = y[0].T.index_select(0, position - reach)[None]
    last = (starts + lengths)[:, None] + taps
    return y, extended[last].transpose(1, 2)


@dispatch.implementation("conv", "fast", requires="triton")
def fast(x, weight, bias=None, initial_state=None, cu_seqlens=None) -> Result:
    """The Triton kernels of `conv_triton` (CUDA). For one token per row they are not faster than `chunked`."""
    if x.shape[1] == 1 and cu_seqlens is None:
        return chunked(x, weight, bias, initial_state)
    from .conv_triton import Conv

    batch, tokens, channels = x.shape
    reach, device = weight.shape[-1] - 1, x.device
    where = _bounds if cu_seqlens is None else _kept_bounds
    lengths, ends, bounds = where(cu_seqlens, batch, tokens, device)
    state = None if initial_state is None else initial_state.to(x.dtype)
    rows = x.reshape(-1, channels)
    y = Conv.apply(rows, weight[:, 0].to(x.dtype), _as(bias, x), state, bounds)
    if state is None:
        state = x.new_zeros(len(lengths), channels, reach)
    # The final state is the last W-1 inputs; in a shorter sequence it begins with the end of the initial state.
    at = lengths[:, None] + torch.arange(-reach, 0, device=device)  # [S, W-1] in the sequence; < 0: in its state
    own = (at + (ends - lengths)[:, None]).clamp(0, max(0, batch * tokens - 1))
    fresh = rows[own].transpose(1, 2) if len(rows) else torch.zeros_like(state)
    kept = state.gather(2, (at + reach).clamp(max=max(0, reach - 1))[:, None].expand_as(state))
    return y.view_as(x), torch.where((at >= 0)[:, None], fresh, kept)


def _bounds(
    cu_seqlens: torch.Tensor | None, batch: int, tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lengths and ends of the sequences [S], and the `bounds` of `conv_triton.Conv`."""
    lengths = lengths_on(device, batch, tokens, cu_seqlens)
    sequences = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=batch * tokens)
    ends = lengths.cumsum(0)
    return lengths, ends, torch.stack([(ends - lengths)[sequences], ends[sequences], sequences])


_kept_bounds = kept(_bounds)


def _as(bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if bias is None else bias.to(x.dtype)
