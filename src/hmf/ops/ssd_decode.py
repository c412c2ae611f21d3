# SPDX-License-Identifier: Apache-2.0
"""One token of Mamba2 for many sequences, in place in a pool of states: the decode step of a server (Triton).

As in `gdn_decode` each state is read and written once, and heads of keys and values are shared by address.
`hmf.ops.ssd.state_space_dual` is the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _decode(
    x,
    B,
    C,
    dt,
    A_log,
    dt_bias,
    D,
    pool,
    slots,
    y,
    x_row,
    B_row,
    C_row,
    dt_row,
    pool_slot,
    slots_step,
    null_slot,
    H: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    sequence, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    key_at = tl.arange(0, BLOCK_K)
    value_at = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_key, in_value = key_at < K, value_at < V
    out = y + (sequence * H + head) * V + value_at
    slot = tl.load(slots + sequence * slots_step).to(tl.int64)
    if slot == null_slot:  # a row of padding
        tl.store(out, tl.zeros([BLOCK_V], y.dtype.element_ty), mask=in_value)
        return
    at = pool + slot * pool_slot + head * K * V + value_at[:, None] * K + key_at[None, :]
    mask = in_value[:, None] & in_key[None, :]
    state = tl.load(at, mask=mask, other=0).to(tl.float32)
    query = tl.load(C + sequence * C_row + head * K + key_at, mask=in_key, other=0).to(tl.float32)
    key = tl.load(B + sequence * B_row + head // KEY_GROUP * K + key_at, mask=in_key, other=0).to(tl.float32)
    value = tl.load(x + sequence * x_row + head // VALUE_GROUP * V + value_at, mask=in_value, other=0).to(tl.float32)

    step = tl.load(dt + sequence * dt_row + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    grown = tl.exp(tl.minimum(step, 20.0))
    rounded = 1.0 + grown
    softplus = tl.where(rounded == 1.0, grown, tl.log(rounded) * (grown / (rounded - 1.0)))  # log1p, small ones too
    step = tl.where(step > 20.0, step, softplus)
    state = state * tl.exp(-step * tl.exp(tl.load(A_log + head).to(tl.float32)))
    state += value[:, None] * (key * step)[None, :]
    mixed = tl.sum(state * query[None, :], axis=1) + tl.load(D + head).to(tl.float32) * value
    tl.store(out, mixed.to(y.dtype.element_ty), mask=in_value)
    tl.store(at, state.to(pool.dtype.element_ty), mask=mask)


def decode(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    D: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
    null_slot: int,
) -> torch.Tensor:
    """Advance the states of S sequences by one token; returns y [S, H, V] in x.dtype.

    x [S, Hv, V], B [S, Hk, K], C [S, H, K], where Hv and Hk divide H, each row's heads side by side in memory; dt [S,
    H], before its bias and softplus; A_log (of -A), dt_bias, D [H]; pool [slots, H, V, K] of any float dtype, changed
    in place; slots [S] integers, all different but for `null_slot`, whose rows give zeros and change nothing.
    """
    sequences, value_dim, key_dim, heads = len(x), x.shape[-1], B.shape[-1], pool.shape[1]
    if C.shape[1] != heads or any(v.stride()[1:] != (v.shape[-1], 1) for v in (x, B, C)) or dt.stride(1) != 1:
        raise ValueError(f"C must have the pool's {heads} heads, and the heads of a row must be side by side in memory")
    if pool.stride()[1:] != (key_dim * value_dim, key_dim, 1):
        raise ValueError("the states of a slot must be contiguous")
    y = x.new_empty(sequences, heads, value_dim)
    block_v = min(32, triton.next_power_of_2(value_dim))
    _decode[triton.cdiv(value_dim, block_v), sequences, heads](
        x,
        B,
        C,
        dt,
        A_log,
        dt_bias,
        D,
        pool,
        slots,
        y,
        x.stride(0),
        B.stride(0),
        C.stride(0),
        dt.stride(0),
        pool.stride(0),
        slots.stride(0),
        null_slot,
        H=heads,
        VALUE_GROUP=heads // x.shape[1],
        KEY_GROUP=heads // B.shape[1],
        K=key_dim,
        V=value_dim,
        BLOCK_K=triton.next_power_of_2(key_dim),
        BLOCK_V=block_v,
        num_warps=4,
    )
    return y
