# SPDX-License-Identifier: Apache-2.0
"""One token of Gated KalmaNet for many sequences, also in place in a pool: the decode step of a server (Triton).

It computes what `hmf.ops.gka.step` does.

Legend: S sequences, H heads, K/V key/value head dims, D the power of two >= K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gka_solve import Result, State, coefficients
from .gka_triton_common import load, step_weights, tile_width


@triton.jit
def _step(
    q,
    k,
    v,
    g,
    gk,
    alpha,
    beta,
    C,
    U,
    o,
    C_out,
    U_out,
    slots,
    weights,
    q_row,
    k_row,
    v_row,
    C_slot,
    U_slot,
    null_slot,
    eps,
    c,
    keep,
    scale,
    num_iter,
    NORMALISE: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    STATE: tl.constexpr,
    POOL: tl.constexpr,
    H: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    INNER: tl.constexpr,
):
    """One token of one sequence and head: the covariance stays in registers for all steps.

    Its columns are two axes of the tile, [rows, D / INNER, INNER]: so the sum over them stays within a few threads.
    """
    at = tl.program_id(0).to(tl.int64)
    sequence, head = at // H, at % H
    i, u = tl.arange(0, D), tl.arange(0, DV)
    C_at, U_at = at * K * K, at * K * V
    if POOL:
        slot = tl.load(slots + sequence).to(tl.int64)
        if slot == null_slot:  # a row of padding
            tl.store(o + at * V + u, tl.zeros([DV], o.dtype.element_ty), mask=u < V)
            return
        C_at, U_at = slot * C_slot + head * K * K, slot * U_slot + head * K * V
    row = i[:, None, None]
    column = tl.arange(0, D // INNER)[None, :, None] * INNER + tl.arange(0, INNER)[None, None, :]
    inside = (row < K) & (column < K)
    if STATE:
        old = load(C + C_at, row * K + column, inside).to(tl.float32)
    key = load(k + sequence * k_row + (head // KEY_GROUP) * K, i, i < K).to(tl.float32)
    rhs = load(q + sequence * q_row + (head // QUERY_GROUP) * K, i, i < K).to(tl.float32)
    if NORMALISE:  # rounded as the layer rounds them
        key = (key / (tl.sqrt(tl.sum(key * key)) + eps)).to(k.dtype.element_ty).to(tl.float32)
        rhs = (rhs / (tl.sqrt(tl.sum(rhs * rhs)) + eps)).to(q.dtype.element_ty).to(tl.float32)
    if BETA:
        key *= tl.load(beta + at).to(tl.float32)
    cov = key[:, None, None] * tl.reshape(key, [1, D // INNER, INNER])
    if STATE:
        cov += tl.exp(tl.load(gk + at).to(tl.float32)) * old
    tl.store(C_out + C_at + row * K + column, cov.to(C_out.dtype.element_ty), mask=inside)
    query = rhs
    if num_iter > 0:
        square = tl.sum(tl.sum(tl.sum(cov * cov, axis=1), axis=1), axis=0)
        factor = tl.where(square > 0, c / tl.sqrt(tl.maximum(square, 1.2e-38)), 0.0)
        now, before = rhs, tl.zeros_like(rhs)
        for n in range(num_iter):
            w = tl.load(weights + n)
            product = tl.sum(tl.sum(cov * tl.reshape(now, [1, D // INNER, INNER]), axis=1), axis=1)
            new = w * (keep * now - factor * product + rhs) + (1 - w) * before
            before = now
            now = new
        share = 1.0
        if ALPHA:
            share = tl.load(alpha + at).to(tl.float32)
        query += share * (factor * now - rhs)
    inside = (i < K)[:, None] & (u < V)[None, :]
    value = load(v + sequence * v_row + (head // VALUE_GROUP) * V, u, u < V).to(tl.float32)
    if BETA:
        value *= tl.load(beta + at).to(tl.float32)
    state = key[:, None] * value[None, :]
    if STATE:
        old = load(U + U_at, i[:, None] * V + u[None, :], inside).to(tl.float32)
        state += tl.exp(tl.load(g + at).to(tl.float32)) * old
    tl.store(U_out + U_at + i[:, None] * V + u[None, :], state.to(U_out.dtype.element_ty), mask=inside)
    tl.store(o + at * V + u, (scale * tl.sum(state * query[:, None], axis=0)).to(o.dtype.element_ty), mask=u < V)


def step(
    q,
    k,
    v,
    g,
    gk,
    alpha,
    state: State | None,
    *,
    num_iter,
    ridge_strength,
    rescale,
    beta: torch.Tensor | None = None,
    eps: float | None = None,
    slots: torch.Tensor | None = None,
    null_slot: int = 0,
) -> Result:
    """`gka.step` without gradients: q [S, Hq, K], k [S, Hk, K], v [S, Hv, V], g, gk and alpha (or None) [S, H], of any
    dtypes.

    Heads of a row are side by side in memory, and Hq, Hk and Hv divide H. With beta [S, H] the key and the value of a
    head are multiplied by it; with eps q and k are normalised, x / (||x|| + eps), and rounded to their dtype.
    With slots [S], integers, `state` is a pool of states [slots, H, K, K|V] of any float dtypes, in whose rows the
    sequences' states stand and are changed in place: as a server keeps them, read and written once. All slots differ
    but for `null_slot`, whose rows give zeros and change nothing.
    """
    sequences, heads, key_dim, value_dim = len(q), g.shape[-1], k.shape[-1], v.shape[-1]
    q, k, v = (x if x.stride()[1:] == (x.shape[-1], 1) else x.contiguous() for x in (q, k, v))
    g, gk, alpha, beta = (None if x is None else x.contiguous() for x in (g, gk, alpha, beta))
    o = v.new_empty(sequences, heads, value_dim)
    if slots is None:
        C, U = (q, v) if state is None else (x.contiguous() for x in state)
        C_out = torch.empty(sequences, heads, key_dim, key_dim, dtype=torch.float32, device=q.device)
        U_out = torch.empty(sequences, heads, key_dim, value_dim, dtype=torch.float32, device=q.device)
    else:
        if state is None or any(not x[0].is_contiguous() for x in state):
            raise ValueError("slots need a pool whose states are contiguous, each by itself")
        C, U = C_out, U_out = state
    c, _, _ = coefficients(num_iter, ridge_strength)
    keep, weights = step_weights(num_iter, ridge_strength, q.device)
    with torch.cuda.device_of(q):
        _step[sequences * heads,](
            q,
            k,
            v,
            g,
            gk,
            g if alpha is None else alpha,
            g if beta is None else beta,
            C,
            U,
            o,
            C_out,
            U_out,
            g if slots is None else slots,
            weights,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            C_out.stride(0),
            U_out.stride(0),
            null_slot,
            eps or 0.0,
            c,
            keep,
            key_dim**-0.5 if rescale else 1.0,
            num_iter,
            NORMALISE=eps is not None,
            ALPHA=alpha is not None,
            BETA=beta is not None,
            STATE=state is not None,
            POOL=slots is not None,
            H=heads,
            QUERY_GROUP=heads // q.shape[1],
            KEY_GROUP=heads // k.shape[1],
            VALUE_GROUP=heads // v.shape[1],
            K=key_dim,
            V=value_dim,
            D=tile_width(key_dim),
            DV=tile_width(value_dim),
            INNER=min(32, tile_width(key_dim)),
            num_warps=8,
            maxnreg=128,  # two programs at a time on a multiprocessor
        )
    return o, (C_out, U_out)
