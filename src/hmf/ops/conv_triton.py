# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the short convolution with SiLU, forward and backward. Tokens are neither reordered nor padded.

Legend: B batch, T tokens, N = B T, S sequences (rows or documents), C channels, W conv_size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import dispatch

BLOCK_T, BLOCK_C = 32, 128


@triton.jit
def _tap(x, state, t, c, inside, first, sequence, channels, back: tl.constexpr, W: tl.constexpr, STATE: tl.constexpr):
    """The inputs [BLOCK_T, BLOCK_C] that are `back` tokens before tokens t, from their sequence or from its state."""
    at = t - back
    own = (at >= first)[:, None]
    value = tl.load(x + at[:, None] * channels + c[None, :], mask=inside & own, other=0.0).to(tl.float32)
    if STATE:
        kept = (sequence[:, None] * channels + c[None, :]) * (W - 1) + (at - first + W - 1)[:, None]
        value += tl.load(state + kept, mask=inside & (own == 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def _filtered(
    x,
    weight,
    bias,
    state,
    t,
    c,
    inside,
    first,
    sequence,
    channels,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The convolution's output of a block before SiLU, in float32."""
    before = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for w in tl.static_range(W):
        taps = tl.load(weight + c * W + w, mask=c < channels, other=0.0).to(tl.float32)
        before += _tap(x, state, t, c, inside, first, sequence, channels, W - 1 - w, W, STATE) * taps[None, :]
    if BIAS:
        before += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    return before


@triton.jit
def _forward(
    x,
    weight,
    bias,
    state,
    starts,
    sequences,
    y,
    total,
    channels,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (t < total)[:, None] & (c < channels)[None, :]
    first = tl.load(starts + t, mask=t < total, other=0)
    sequence = tl.load(sequences + t, mask=t < total, other=0)
    before = _filtered(
        x, weight, bias, state, t, c, inside, first, sequence, channels, W, BIAS, STATE, BLOCK_T, BLOCK_C
    )
    after = before / (1 + tl.exp(-before))
    tl.store(y + t[:, None] * channels + c[None, :], after.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _before_silu(
    x,
    weight,
    bias,
    state,
    starts,
    sequences,
    grad_y,
    grad,
    sums,
    total,
    channels,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient before SiLU, and a block's partial sums of the gradients of weight and bias [blocks, W + 1, C]."""
    block = tl.program_id(0).to(tl.int64)
    t, c = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (t < total)[:, None] & (c < channels)[None, :]
    first = tl.load(starts + t, mask=t < total, other=0)
    sequence = tl.load(sequences + t, mask=t < total, other=0)
    before = _filtered(
        x, weight, bias, state, t, c, inside, first, sequence, channels, W, BIAS, STATE, BLOCK_T, BLOCK_C
    )
    share = 1 / (1 + tl.exp(-before))
    upper = tl.load(grad_y + t[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
    upper *= share * (1 + before * (1 - share))
    tl.store(grad + t[:, None] * channels + c[None, :], upper.to(grad.dtype.element_ty), mask=inside)
    sums += block * (W + 1) * channels + c
    for w in tl.static_range(W):
        value = _tap(x, state, t, c, inside, first, sequence, channels, W - 1 - w, W, STATE)
        tl.store(sums + w * channels, tl.sum(value * upper, axis=0), mask=c < channels)
    tl.store(sums + W * channels, tl.sum(upper, axis=0), mask=c < channels)


@triton.jit
def _input_grad(
    grad, weight, ends, grad_x, total, channels, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (t < total)[:, None] & (c < channels)[None, :]
    end = tl.load(ends + t, mask=t < total, other=0)
    result = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for ahead in tl.static_range(W):
        taps = tl.load(weight + c * W + W - 1 - ahead, mask=c < channels, other=0.0).to(tl.float32)
        met = inside & (t + ahead < end)[:, None]
        result += tl.load(grad + (t + ahead)[:, None] * channels + c[None, :], mask=met, other=0.0) * taps[None, :]
    tl.store(grad_x + t[:, None] * channels + c[None, :], result.to(grad_x.dtype.element_ty), mask=inside)


class Conv(torch.autograd.Function):
    """y [N, C] from x [N, C], weight [C, W], bias [C] or None and state [S, C, W-1] or None.

    bounds [3, N] int64: for each token the index of its sequence's first token, the index after its last token, and
    the number of the sequence.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, state, bounds):
        x, weight = x.contiguous(), weight.contiguous()
        state = None if state is None else state.contiguous()
        ctx.save_for_backward(x, weight, bias, state, bounds)
        y = torch.empty_like(x)
        if x.numel():
            starts, _, sequences = bounds
            _forward[_grid(x)](x, weight, bias, state, starts, sequences, y, **_launch(x, weight, bias, state))
        return y

    @staticmethod
    @dispatch.backward
    def backward(ctx, grad_y):
        x, weight, bias, state, bounds = ctx.saved_tensors
        (total, channels), size = x.shape, weight.shape[1]
        starts, ends, sequences = bounds
        grid, launch = _grid(x), _launch(x, weight, bias, state)
        grad = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        grad_x, sums = torch.empty_like(x), grad.new_zeros(grid[0], size + 1, channels)
        if x.numel():
            _before_silu[grid](x, weight, bias, state, starts, sequences, grad_y.contiguous(), grad, sums, **launch)
            del launch["BIAS"], launch["STATE"]
            _input_grad[grid](grad, weight, ends, grad_x, **launch)
        *of_weight, of_bias = sums.sum(0)
        of_weight = torch.stack(of_weight, -1).to(weight.dtype)
        of_state = None
        if ctx.needs_input_grad[3]:
            of_state = torch.zeros_like(state, dtype=torch.float32)
            for token in range(size - 1):  # only the first W-1 tokens of a sequence read its state
                at = torch.nonzero(torch.arange(total, device=x.device) == starts + token)[:, 0]
                at = at[ends[at] > at]
                for tap in range(size - 1 - token):
                    of_state[sequences[at], :, token + tap] += grad[at] * weight[:, tap].float()
            of_state = of_state.to(state.dtype)
        return grad_x, of_weight, None if bias is None else of_bias.to(bias.dtype), of_state, None


def _grid(x: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], BLOCK_T), triton.cdiv(x.shape[1], BLOCK_C)


def _launch(x, weight, bias, state) -> dict[str, int | bool]:
    return {
        "total": x.shape[0],
        "channels": x.shape[1],
        "W": weight.shape[1],
        "BIAS": bias is not None,
        "STATE": state is not None,
        "BLOCK_T": BLOCK_T,
        "BLOCK_C": BLOCK_C,
        "num_warps": 8,
    }
