# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of a server's decode step for GDN and KDA: one token of many sequences, in place in a state pool.

The step is bound by memory bandwidth. The kernel reads and writes each state once, and nothing else of that size: it
shares key and value heads without expanding them, normalises q and k, and addresses the states by slot.
`hmf.ops.gdn.step` and `hmf.ops.kda.step` are the definitions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _decode(
    q,
    k,
    v,
    g,
    beta,
    pool,
    slots,
    o,
    q_row,
    k_row,
    v_row,
    pool_slot,
    null_slot,
    scale,
    eps,
    H: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    sequence, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    key_at = tl.arange(0, BLOCK_K)
    value_at = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_key, in_value = key_at < K, value_at < V
    out = o + (sequence * H + head) * V + value_at
    slot = tl.load(slots + sequence).to(tl.int64)
    if slot == null_slot:  # padding
        tl.store(out, tl.zeros([BLOCK_V], o.dtype.element_ty), mask=in_value)
        return
    query = tl.load(q + sequence * q_row + head * K + key_at, mask=in_key, other=0).to(tl.float32)
    key = tl.load(k + sequence * k_row + head // KEY_GROUP * K + key_at, mask=in_key, other=0).to(tl.float32)
    value = tl.load(v + sequence * v_row + head // VALUE_GROUP * V + value_at, mask=in_value, other=0).to(tl.float32)
    query *= tl.rsqrt(tl.sum(query * query) + eps)
    key *= tl.rsqrt(tl.sum(key * key) + eps)
    # As in the layer, the normalised vectors are rounded to the model's dtype.
    query, key = query.to(q.dtype.element_ty).to(tl.float32), key.to(k.dtype.element_ty).to(tl.float32)
    if CHANNELS:
        decay = tl.exp(tl.load(g + (sequence * H + head) * K + key_at, mask=in_key, other=0).to(tl.float32))[None, :]
    else:
        decay = tl.exp(tl.load(g + sequence * H + head).to(tl.float32))
    strength = tl.load(beta + sequence * H + head).to(tl.float32)

    at = pool + slot * pool_slot + head * K * V + value_at[:, None] * K + key_at[None, :]
    mask = in_value[:, None] & in_key[None, :]
    state = tl.load(at, mask=mask, other=0).to(tl.float32) * decay
    error = (value - tl.sum(state * key[None, :], axis=1)) * strength
    state += error[:, None] * key[None, :]
    tl.store(out, (tl.sum(state * query[None, :], axis=1) * scale).to(o.dtype.element_ty), mask=in_value)
    tl.store(at, state.to(pool.dtype.element_ty), mask=mask)


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
    null_slot: int,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Advance the states of S sequences by one token; returns o [S, H, V] in v.dtype.

    q [S, Hq, K], k [S, Hk, K], v [S, Hv, V], not normalised. Hq = H, Hk and Hv divide H, and the last two dimensions
    are contiguous. g (log decay) [S, H], or [S, H, K] of each channel; beta [S, H]. pool [slots, H, V, K] (vLLM's
    layout) of any float dtype, changed in place. slots [S] integers, all different except for `null_slot`, which marks
    padding: its output is zero and no state changes. Raises ValueError for other layouts.
    """
    sequences, value_dim, key_dim, heads = v.shape[0], v.shape[-1], k.shape[-1], pool.shape[1]
    if q.shape[1] != heads or any(x.stride()[1:] != (x.shape[-1], 1) for x in (q, k, v)):
        raise ValueError(f"q must have the pool's {heads} heads; the last two dimensions of q, k, v must be contiguous")
    if pool.stride()[1:] != (key_dim * value_dim, key_dim, 1):
        raise ValueError("the states of a slot must be contiguous")
    o = v.new_empty(sequences, heads, value_dim)
    block_v = min(32, triton.next_power_of_2(value_dim))
    grid = (triton.cdiv(value_dim, block_v), sequences, heads)
    _decode[grid](
        q,
        k,
        v,
        g.contiguous(),
        beta.contiguous(),
        pool,
        slots,
        o,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        pool.stride(0),
        null_slot,
        key_dim**-0.5,
        eps,
        H=heads,
        KEY_GROUP=heads // k.shape[1],
        VALUE_GROUP=heads // v.shape[1],
        K=key_dim,
        V=value_dim,
        CHANNELS=g.dim() == 3,
        BLOCK_K=triton.next_power_of_2(key_dim),
        BLOCK_V=block_v,
        num_warps=4,
    )
    return o
