# SPDX-License-Identifier: Apache-2.0
"""Three Triton kernels for Gated KalmaNet's prefill, for bfloat16 inputs and without gradients.

`_prepare` normalises the keys and sums the decays. `_states` advances both states of a sequence and head over its
chunks and writes their values at each chunk's start. `_outputs` computes one chunk of one head: norms, all Chebyshev
iterations and the output, without intermediate results in global memory. Query, key and value heads are shared without
expanding them. beta enters as the weight beta^2 of a key's terms in both states. `gka.reference` is the definition.

Precision: the products of the iterations use float16, whose significand has 11 bits (bfloat16 has 8). The covariance at
the chunk's start, the keys (scaled by powers of two, which is exact) and their weighted products are each one float16
number. The iterate is the sum of two float16 numbers, because with few keys it is large and the terms of the output
nearly cancel. The states and the output are products of bfloat16 numbers and of pairs of them, precise to 2^-16.

Legend: N tokens, S sequences, G chunks, C chunk_size, H heads, K/V key/value head dims, D the power of two >= K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gka_solve import Result, State, coefficients
from .gka_triton_common import halves, load, shared_memory, split, step_weights, tile_width
from .varlen import packed_chunks

CHUNK_SIZE = 64
# Tiles of narrower heads are padded to this width. With tiles of 16, Triton 3.6 compiled `_outputs` for Hopper to reads
# outside of shared memory (compute-sanitizer, head_dim 16).
NARROWEST = 64
COLUMNS = 32  # columns of a state that one program of `_states` computes


@triton.jit
def _normalised(x, eps, dtype: tl.constexpr):
    """Rows of x [C, D] divided by their norm, rounded as in the layer."""
    return (x / (tl.sqrt(tl.sum(x * x, axis=1)) + eps)[:, None]).to(dtype).to(tl.float32)


@triton.jit
def _power(x):
    """The largest power of two that is not above the float32 x >= 0; 1 for x = 0."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power > 0, power, 1.0)


@triton.jit(do_not_specialize=["tokens", "most", "sequences"])
def _prepare(
    k,
    g,
    gk,
    beta,
    unit,
    weight,
    total,
    bounds,
    chunks,
    sequence_of,
    k_row,
    unit_row,
    tokens,
    most,
    sequences,
    eps,
    NORMALISE: tl.constexpr,
    BETA: tl.constexpr,
    H: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
):
    """For one chunk and head: the weight of each token in both states at the chunk's end, the decay of both states over
    the chunk, and the normalised keys."""
    chunk, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    sequence = tl.load(sequence_of + chunk)
    if sequence >= sequences:  # there are at most so many chunks as programs
        return
    stop, t, d = tl.load(bounds + sequence + 1), tl.arange(0, SIZE), tl.arange(0, D)
    token = tl.load(bounds + sequence) + (chunk - tl.load(chunks + sequence)) * SIZE + t.to(tl.int64)
    real = token < stop
    strength = tl.full([SIZE], 1.0, tl.float32)
    if BETA:
        strength = load(beta, token * H + head, real)
        strength *= strength
    for state in tl.static_range(2):
        log_decay = load(g if state else gk, token * H + head, real)
        whole = tl.sum(log_decay, axis=0)
        share = tl.exp(whole - tl.cumsum(log_decay, axis=0)) * strength
        tl.store(weight + (state * tokens + token) * H + head, share, mask=real)
        tl.store(total + (state * most + chunk) * H + head, tl.exp(whole))
    if NORMALISE:  # only the first of the heads that share a key head writes
        inside = (token < tl.where(head % KEY_GROUP == 0, stop, 0))[:, None] & (d < K)[None, :]
        column = (head // KEY_GROUP) * K + d[None, :]
        key = load(k + token[:, None] * k_row, column, inside).to(tl.float32)
        key = _normalised(key, eps, k.dtype.element_ty)
        tl.store(unit + token[:, None] * unit_row + column, key.to(unit.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "most"])
def _states(
    k,
    v,
    weight,
    total,
    C,
    U,
    C_starts,
    scales,
    squares,
    U_starts,
    C_out,
    U_out,
    bounds,
    chunks,
    k_row,
    v_row,
    tokens,
    most,
    STATE: tl.constexpr,
    H: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
):
    """Some columns of one state of one sequence and head: the first programs take the covariance, the others U.

    At every chunk's start the covariance is written in float16, divided by a power of two for these columns, together
    with the columns' sum of squares. U is written as two bfloat16 numbers.
    """
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    covariance_parts: tl.constexpr = (K + B - 1) // B
    covariance = part < covariance_parts
    at_k = k + (head // KEY_GROUP) * K
    if covariance:
        x, x_row, state, out = at_k, k_row, C, C_out
        first_column, columns = part * B, K
    else:
        x, x_row, state, out = v + (head // VALUE_GROUP) * V, v_row, U, U_out
        first_column, columns = (part - covariance_parts) * B, V
        weight += tl.cast(tokens, tl.int64) * H  # Triton makes an argument that is 1 a constant without `.to`
        total += tl.cast(most, tl.int64) * H
    t, i, j = tl.arange(0, SIZE), tl.arange(0, D), first_column + tl.arange(0, B)
    inside = (i < K)[:, None] & (j < columns)[None, :]
    at = i[:, None] * columns + j[None, :]
    slot = (sequence * H + head) * K * columns
    now = tl.zeros([D, B], tl.float32)
    if STATE:
        now += load(state + slot, at, inside).to(tl.float32)
    first, stop = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    chunk = tl.load(chunks + sequence).to(tl.int64) * H + head
    for token in range(first, stop, SIZE):
        row = (token + t).to(tl.int64)
        real = row < stop
        keys = load(at_k + row[:, None] * k_row, i[None, :], real[:, None] & (i < K)[None, :])
        values = load(x + row[:, None] * x_row, j[None, :], real[:, None] & (j < columns)[None, :])
        share = load(weight, row * H + head, real)
        carry = tl.load(total + chunk)
        if covariance:
            scale = _power(tl.max(tl.max(tl.abs(now), axis=1), axis=0))
            tl.store(C_starts + chunk * K * K + at, (now / scale).to(tl.float16), mask=inside)
            tl.store(scales + chunk * covariance_parts + part, scale)
            tl.store(squares + chunk * covariance_parts + part, tl.sum(tl.sum(now * now, axis=1), axis=0))
        else:
            high, low = split(now)
            tl.store(U_starts + chunk * 2 * K * V + at, high, mask=inside)
            tl.store(U_starts + (chunk * 2 + 1) * K * V + at, low, mask=inside)
        chunk += H
        high, low = split(values.to(tl.float32) * share[:, None])
        now = tl.dot(tl.trans(keys), low, now * carry)
        now = tl.dot(tl.trans(keys), high, now)
    tl.store(out + slot + at, now, mask=inside)


@triton.jit(do_not_specialize=["sequences"])
def _outputs(
    q,
    k,
    v,
    g,
    gk,
    alpha,
    beta,
    C_starts,
    scales,
    squares,
    U_starts,
    o,
    bounds,
    chunks,
    sequence_of,
    weights,
    q_row,
    k_row,
    v_row,
    sequences,
    eps,
    c,
    keep,
    scale,
    num_iter,
    SOLVE: tl.constexpr,
    NORMALISE: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    H: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    B: tl.constexpr,
):
    """o of one chunk and head. The keys k are normalised already."""
    chunk, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    sequence = tl.load(sequence_of + chunk)
    if sequence >= sequences:  # there are at most so many chunks as programs
        return
    stop = tl.load(bounds + sequence + 1)
    t, s, d, e, u = tl.arange(0, SIZE), tl.arange(0, SIZE), tl.arange(0, D), tl.arange(0, D), tl.arange(0, DV)
    token = tl.load(bounds + sequence) + (chunk - tl.load(chunks + sequence)) * SIZE + t.to(tl.int64)
    real = token < stop
    inside = real[:, None] & (d < K)[None, :]
    gate = token * H + head
    causal = t[:, None] >= s[None, :]

    keys = load(k + (head // KEY_GROUP) * K + token[:, None] * k_row, d[None, :], inside)
    strength = tl.full([SIZE], 1.0, tl.float32)
    if BETA:
        strength = load(beta, gate, real)
        strength *= strength

    if SOLVE:
        # Scale keys and covariance by powers of two to a largest entry in [1, 2); the weights take up the scales.
        power = _power(tl.max(tl.abs(keys.to(tl.float32)), axis=1))
        unit = (keys.to(tl.float32) / power[:, None]).to(tl.float16)
        part: tl.constexpr = (K + B - 1) // B
        at = (chunk * H + head) * part
        scale_of = load(scales + at, d // B, d < K)
        size = tl.max(scale_of, axis=0)
        old = tl.sum(load(squares + at, d, d < part), axis=0)
        at, filled = e[:, None] * K + d[None, :], (e < K)[:, None] & (d < K)[None, :]
        start = load(C_starts + (chunk * H + head) * K * K, at, filled)
        start *= (scale_of / size).to(tl.float16)[None, :]
        log_decay = tl.cumsum(load(gk, gate, real), axis=0)
        weight = tl.where(causal, tl.exp(log_decay[:, None] - log_decay[None, :]), 0.0)
        weight *= (strength * power * power)[None, :]
        # ||C_t||_F^2 is a sum of non-negative terms, so there is no cancellation.
        gram = tl.dot(unit, tl.trans(unit))
        gram = (gram * gram * (16 / (D * D))).to(tl.float16)  # at most 256
        top = _power(tl.max(weight, axis=1))
        fresh = tl.dot((weight / top[:, None]).to(tl.float16), gram)
        fresh = tl.sum(fresh * weight, axis=1) * top * (D * D / 16)
        along = tl.sum(tl.dot(unit, start) * unit.to(tl.float32), axis=1) * size
        mixed = tl.sum(weight * along[None, :], axis=1)
        row = tl.exp(log_decay)
        square = row * row * old + 2 * row * mixed + fresh
        factor = tl.where(square > 0, c / tl.sqrt(tl.maximum(square, 1.2e-38)), 0.0)
        row = tl.where(old > 0, row * size * factor, 0.0)  # without old tokens factor may be beyond float16
        weight = (weight * factor[:, None]).to(tl.float16)
    # Loaded only here, because of register pressure.
    query = load(q + (head // QUERY_GROUP) * K + token[:, None] * q_row, d[None, :], inside).to(tl.float32)
    if NORMALISE:
        query = _normalised(query, eps, q.dtype.element_ty)
    if SOLVE:
        length = _power(tl.max(tl.abs(query), axis=1))
        now = query / length[:, None]
        rhs = now.to(tl.bfloat16)
        before = tl.zeros_like(now)
        for n in range(num_iter):
            w = tl.load(weights + n)
            high, low = halves(now)
            within = tl.dot(high, tl.trans(unit), tl.dot(low, tl.trans(unit)))
            within = (within * (-w * weight.to(tl.float32))).to(tl.float16)
            new = (w * keep) * now + w * rhs.to(tl.float32) + (1 - w) * before
            high, low = halves(now * (-w * row)[:, None])
            new = tl.dot(high, tl.trans(start), tl.dot(low, tl.trans(start), new))
            new = tl.dot(within, unit, new)
            before = now
            now = new
        solution = now * (factor * length)[:, None]
        share = tl.full([SIZE], 1.0, tl.float32)
        if ALPHA:
            share = load(alpha, gate, real)
        query = rhs.to(tl.float32) * length[:, None]
        query += share[:, None] * (solution - query)

    high, low = split(query * scale)
    log_decay = tl.cumsum(load(g, gate, real), axis=0)
    weight = tl.where(causal, tl.exp(log_decay[:, None] - log_decay[None, :]), 0.0) * strength[None, :]
    in_value = (u < V)[None, :]
    at, filled = e[:, None] * V + u[None, :], (e < K)[:, None] & in_value
    state = load(U_starts + (chunk * H + head) * 2 * K * V, at, filled)
    result = tl.dot(high, state, tl.dot(low, state))
    state = load(U_starts + ((chunk * H + head) * 2 + 1) * K * V, at, filled)
    result = tl.dot(high, state, result) * tl.exp(log_decay)[:, None]
    scores = tl.dot(high, tl.trans(keys), tl.dot(low, tl.trans(keys)))
    scores, scores_low = split(scores * weight)
    values = load(v + (head // VALUE_GROUP) * V + token[:, None] * v_row, u[None, :], real[:, None] & in_value)
    result = tl.dot(scores, values, tl.dot(scores_low, values, result))
    out = o + (token[:, None] * H + head) * V + u[None, :]
    tl.store(out, result.to(o.dtype.element_ty), mask=real[:, None] & in_value)


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """The reason why these kernels cannot run for q, k [..., K] and v [..., V], or None. `gka.fast` has others."""
    if any(x.dtype != torch.bfloat16 for x in (q, k, v)):
        return "tokens are not bfloat16"
    if max(q.shape[-1], v.shape[-1]) > 128:
        return "heads are wider than 128"
    needed = 112 if max(q.shape[-1], v.shape[-1]) > 64 else 64
    if q.is_cuda and shared_memory(q.device) < needed * 2**10:
        return f"a block has less than {needed} KiB of shared memory"
    return None


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    gk: torch.Tensor,
    alpha: torch.Tensor | None,
    state: State | None,
    cu_seqlens: torch.Tensor,
    *,
    num_iter: int,
    ridge_strength: float,
    rescale: bool,
    beta: torch.Tensor | None = None,
    eps: float | None = None,
) -> Result:
    """Gated KalmaNet over S sequences packed in N tokens: o [N, H, V] in v.dtype and the final states in float32.

    q [N, Hq, K], k [N, Hk, K], v [N, Hv, V] bfloat16, whose last two dimensions are contiguous; Hq, Hk and Hv divide H.
    g, gk (log decays), alpha and beta (or None) [N, H]; state: a pair [S, H, K, K|V] or None; cu_seqlens [S+1]
    integers, on the device. With beta, the key and the value of a head are multiplied by it. With eps, q and k are
    normalised, x / (||x|| + eps), and rounded to bfloat16. Raises ValueError for another memory layout.
    """
    if any(x.stride()[1:] != (x.shape[-1], 1) for x in (q, k, v)):
        raise ValueError("the last two dimensions of q, k and v must be contiguous")
    tokens, heads, key_dim, value_dim = len(q), g.shape[-1], k.shape[-1], v.shape[-1]
    sequences = len(cu_seqlens) - 1
    g, gk, alpha, beta = (None if x is None else x.float().contiguous() for x in (g, gk, alpha, beta))
    bounds, chunks, sequence_of = packed_chunks(cu_seqlens, tokens, CHUNK_SIZE)
    most = len(sequence_of)
    c, _, _ = coefficients(num_iter, ridge_strength)
    keep, weights = step_weights(num_iter, ridge_strength, q.device)
    width, value_width = (max(NARROWEST, tile_width(dim)) for dim in (key_dim, value_dim))
    columns = min(COLUMNS, width, value_width)
    parts = triton.cdiv(key_dim, columns)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    C_out, U_out = (new(sequences, heads, key_dim, dim) for dim in (key_dim, value_dim))
    C, U = (C_out, U_out) if state is None else (x.contiguous() for x in state)
    C_starts, U_starts = (
        new(most, heads, key_dim, key_dim, dtype=torch.float16),
        new(most, heads, 2, key_dim, value_dim, dtype=torch.bfloat16),
    )
    scales, squares = new(2, most, heads, parts)
    weight, total = new(2, tokens, heads), new(2, most, heads)
    unit = k if eps is None else new(*k.shape, dtype=k.dtype)
    o = v.new_empty(tokens, heads, value_dim)
    common = {"H": heads, "KEY_GROUP": heads // k.shape[1], "K": key_dim, "SIZE": CHUNK_SIZE, "D": width}
    values = {"VALUE_GROUP": heads // v.shape[1], "V": value_dim, "B": columns}
    gates = {"NORMALISE": eps is not None, "BETA": beta is not None}
    eps, strength, share = eps or 0.0, g if beta is None else beta, g if alpha is None else alpha
    with torch.cuda.device_of(q):
        if most:
            _prepare[most * heads,](
                k,
                g,
                gk,
                strength,
                unit,
                weight,
                total,
                bounds,
                chunks,
                sequence_of,
                k.stride(0),
                unit.stride(0),
                tokens,
                most,
                sequences,
                eps,
                **gates,
                **common,
                num_warps=4,
            )
        _states[parts + triton.cdiv(value_dim, columns), heads, sequences](
            unit,
            v,
            weight,
            total,
            C,
            U,
            C_starts,
            scales,
            squares,
            U_starts,
            C_out,
            U_out,
            bounds,
            chunks,
            unit.stride(0),
            v.stride(0),
            tokens,
            most,
            STATE=state is not None,
            **common,
            **values,
            num_warps=4,
            num_stages=3,
        )
        if most:
            _outputs[most * heads,](
                q,
                unit,
                v,
                g,
                gk,
                share,
                strength,
                C_starts,
                scales,
                squares,
                U_starts,
                o,
                bounds,
                chunks,
                sequence_of,
                weights,
                q.stride(0),
                unit.stride(0),
                v.stride(0),
                sequences,
                eps,
                c,
                keep,
                key_dim**-0.5 if rescale else 1.0,
                num_iter,
                SOLVE=num_iter > 0,
                ALPHA=alpha is not None,
                QUERY_GROUP=heads // q.shape[1],
                DV=value_width,
                **gates,
                **common,
                **values,
                num_warps=4,
                num_stages=1,
            )
    return o, (C_out, U_out)


def rows(q, k, v, g, gk, alpha, state: State | None, cu_seqlens: torch.Tensor | None, **options) -> Result:
    """`chunked` for rows [B, T, ...] or one row of packed documents, with the arguments of `gka.reference`."""
    batch, tokens = q.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=q.device) * tokens
    q, k, v, g, gk = (x.contiguous().flatten(0, 1) for x in (q, k, v, g, gk))
    alpha = None if alpha is None else alpha.contiguous().flatten(0, 1)
    o, state = chunked(q, k, v, g, gk, alpha, state, cu_seqlens, **options)
    return o.unflatten(0, (batch, tokens)), state
