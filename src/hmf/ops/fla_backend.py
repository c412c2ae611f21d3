# SPDX-License-Identifier: Apache-2.0
"""One kernel of flash-linear-attention's backwards, for GPUs on which Triton miscompiles fla's own.

On Hopper, Triton 3.4 to 3.7.0 gets a product wrong whose factor is the transpose of another product's result
(fla-org/flash-linear-attention#640). Here the transposed scores are a product of their own, so none is transposed. fla
0.6 takes kernels of others by a registry, which `install` puts ours into.

Per chunk and head, of o = scale (exp(g) q h + (q k^T * M) v) and the state after it, exp(g_last) h + (exp(g_last - g)
k)^T v, where M[t, s] = exp(g_t - g_s) for s <= t, with g the log decay since the chunk's start; v = u - w h.

Legend: B batch, T tokens, S sequences, N chunks, C chunk_size, H heads, K/V key/value head dims.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import dispatch

BLOCK = 64  # of K and V


@triton.jit
def _chunk_grads(
    q,
    k,
    v,
    g,
    h,
    grad_o,
    grad_h,
    grad_v,
    grad_q,
    grad_k,
    grad_w,
    grad_g,
    cu_seqlens,
    chunks,
    scale,
    tokens,
    total,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    DELTA: tl.constexpr,
):
    """One block of keys' channels, of one chunk and head; grad_g gets a part from each block."""
    block, chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if PACKED:
        sequence, number = tl.load(chunks + 2 * chunk).to(tl.int64), tl.load(chunks + 2 * chunk + 1).to(tl.int64)
        first, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    else:
        count = tl.cdiv(tokens, C)
        sequence, number = chunk // count, chunk % count
        first, end = sequence * tokens, (sequence + 1) * tokens
    t, u = first + number * C + tl.arange(0, C), tl.arange(0, BV)
    d = block * BK + tl.arange(0, BK)
    there = t < end
    row, in_key = t * H + head, there[:, None] & (d < K)[None, :]
    key_at = row[:, None] * K + d[None, :]
    state = (chunk * H + head) * K * V
    last = tl.minimum(first + (number + 1) * C, end) - 1

    of_q, of_k = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    of_w = tl.zeros([C, BK], tl.float32)
    scores, transposed = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    of_last = 0.0
    for start in range(0, V, BV):
        in_value = there[:, None] & (start + u < V)[None, :]
        value_at = row[:, None] * V + start + u[None, :]
        value = tl.load(v + value_at, mask=in_value, other=0.0)
        upper = tl.load(grad_o + value_at, mask=in_value, other=0.0)
        state_at = state + d[None, :] * V + start + u[:, None]
        in_state = (start + u < V)[:, None] & (d < K)[None, :]
        before = tl.load(h + state_at, mask=in_state, other=0.0)
        after = tl.load(grad_h + state_at, mask=in_state, other=0.0)
        of_last += tl.sum(before.to(tl.float32) * after.to(tl.float32))
        scores = tl.dot(upper, tl.trans(value), scores)
        transposed = tl.dot(value, tl.trans(upper), transposed)
        before = before.to(value.dtype)
        of_q = tl.dot(upper, before, of_q)
        of_k = tl.dot(value, after.to(value.dtype), of_k)
        if DELTA:
            of_w = tl.dot(tl.load(grad_v + value_at, mask=in_value, other=0.0).to(value.dtype), before, of_w)
    if DELTA:
        tl.store(grad_w + key_at, (-of_w).to(grad_w.dtype.element_ty), mask=in_key)

    query = tl.load(q + key_at, mask=in_key, other=0.0)
    key = tl.load(k + key_at, mask=in_key, other=0.0)
    decay = tl.load(g + row, mask=there, other=0.0).to(tl.float32)  # to the base 2
    whole = tl.load(g + last * H + head).to(tl.float32)
    of_q *= tl.exp2(decay)[:, None] * scale
    of_k *= tl.where(there, tl.exp2(whole - decay), 0.0)[:, None]
    of_last = of_last * tl.exp2(whole) + tl.sum(of_k * key.to(tl.float32))
    seen = (t[:, None] >= t[None, :]) & there[:, None]
    met = (t[:, None] <= t[None, :]) & there[None, :]
    scores = tl.where(seen, scores * tl.exp2(tl.where(seen, decay[:, None] - decay[None, :], 0.0)), 0.0) * scale
    transposed = tl.where(met, transposed * tl.exp2(tl.where(met, decay[None, :] - decay[:, None], 0.0)), 0.0) * scale
    of_q = tl.dot(scores.to(key.dtype), key, of_q)
    of_k = tl.dot(transposed.to(query.dtype), query, of_k)
    tl.store(grad_q + key_at, of_q.to(grad_q.dtype.element_ty), mask=in_key)
    tl.store(grad_k + key_at, of_k.to(grad_k.dtype.element_ty), mask=in_key)
    of_g = tl.sum(of_q * query.to(tl.float32), axis=1) - tl.sum(of_k * key.to(tl.float32), axis=1)
    tl.store(grad_g + block * total + row, tl.where(t == last, of_g + of_last, of_g), mask=there)


def chunk_grads(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    h: torch.Tensor,
    dh: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    w: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 64,
    chunk_indices: torch.Tensor | None = None,
    g_gamma: None = None,
    state_v_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Gradients of q, k, w (None without w) and g, float32, by fla's names: those of `fla.ops.common.chunk_o`.

    q, k, w [B, T, H, K]; v, do (of o), dv (of v) [B, T, H, V]; g [B, T, H] log decays to the base 2 since a chunk's
    start, whose gradient is to the base e; h the states before chunks and dh the gradients of those after [B, N, H, K,
    V]; chunk_indices [N, 2]: sequence and number in it of each chunk, where cu_seqlens [S+1] packs sequences.
    """
    (batch, tokens, heads, key_dim), value_dim = k.shape, v.shape[-1]
    chunks = None if cu_seqlens is None else chunk_indices
    if cu_seqlens is not None and chunks is None:
        from fla.ops.utils import prepare_chunk_indices

        chunks = prepare_chunk_indices(cu_seqlens, chunk_size)
    count = batch * triton.cdiv(tokens, chunk_size) if chunks is None else len(chunks)
    widths = [min(BLOCK, max(16, triton.next_power_of_2(size))) for size in (key_dim, value_dim)]
    blocks = triton.cdiv(key_dim, widths[0])
    q, k, v, do, h, dh, g = (x.contiguous() for x in (q, k, v, do, h, dh, g))
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dg = torch.empty(blocks, *g.shape, dtype=torch.float32, device=g.device)
    dw = None if w is None else torch.empty_like(w, memory_format=torch.contiguous_format)
    if count:
        _chunk_grads[blocks, count, heads](
            q,
            k,
            v,
            g,
            h,
            do,
            dh,
            v if dv is None else dv.contiguous(),
            dq,
            dk,
            dq if dw is None else dw,
            dg,
            cu_seqlens,
            chunks,
            scale,
            tokens,
            g.numel(),
            H=heads,
            K=key_dim,
            V=value_dim,
            C=chunk_size,
            BK=widths[0],
            BV=widths[1],
            PACKED=chunks is not None,
            DELTA=dw is not None,
            num_warps=4,
            num_stages=2,
        )
    return dq, dk, dw, dg.sum(0)


@functools.cache
def install() -> None:
    """Have fla take `chunk_grads` on this machine, where its own kernel is wrong; nothing elsewhere."""
    if not dispatch.miscompiled():
        return
    from fla.backends import BaseBackend, register

    @register("common")
    class Backend(BaseBackend):
        backend_type = "hmf"
        priority = 0

        def get_implementation(self, function_name: str):
            return chunk_grads if function_name == "chunk_bwd_dqkwg" else None

        def chunk_bwd_dqkwg_verifier(
            self, q, k, v, do, h, dh, w=None, g=None, g_gamma=None, dv=None, scale=None, state_v_first=False, **kwargs
        ) -> tuple[bool, str | None]:
            """The calls that `hmf.ops` makes; others go on to fla's next."""
            ours = g is not None and g_gamma is None and not state_v_first and q.shape[2] == v.shape[2]
            return ours, None if ours else "not a call of hmf's"
