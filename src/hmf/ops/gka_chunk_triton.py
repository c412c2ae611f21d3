# SPDX-License-Identifier: Apache-2.0
"""Gated KalmaNet's prefill in two Triton kernels, for tokens in bfloat16 and without gradients.

`_states` carries both states of a sequence and head over its chunks and writes what they are where each chunk starts.
`_outputs` takes one chunk of one head: norms, all Chebyshev iterations and the output, nothing of which leaves the chip
in between. Heads of queries, keys and values are shared by address, beta enters as the weight beta^2 of a key's terms
in both states, and q and k are normalised on the way. `gka.reference` is the definition.

Where products are rounded: the iterations' run in float16, with 11 bits where bfloat16 has 8. The covariance at the
chunk's start, the keys (scaled by powers of two, so exact) and their weighted products are one number each. The iterate
is two, because its rounding counts where keys are few: there it is long and the output's terms nearly cancel. The
states and what follows the solve are products of bfloat16 numbers and pairs of them, to 2^-16.

Legend: N tokens, S sequences, G chunks, C chunk_size, H heads, K/V key/value head dims, D the power of two >= K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gka import Result, State, coefficients
from .gka_triton import _load, _parts, _steps, _width

CHUNK_SIZE = 64
COLUMNS = 32  # of a state that one program of `_states` carries


@triton.jit
def _normalised(x, eps, dtype: tl.constexpr):
    """Rows of x [C, D] over their norm, rounded as the layer rounds them."""
    return (x / (tl.sqrt(tl.sum(x * x, axis=1)) + eps)[:, None]).to(dtype).to(tl.float32)


@triton.jit
def _power(x):
    """The power of two in a float32 x >= 0, 1 for zero."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power > 0, power, 1.0)


@triton.jit
def _halves(x):
    """Two float16 tensors whose sum is x to 2^-22, where x is at most 65504."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _states(
    k, v, g, gk, beta, C, U, C_starts, U_starts, C_out, U_out, bounds, chunks, k_row, v_row, eps,
    NORMALISE: tl.constexpr, BETA: tl.constexpr, STATE: tl.constexpr, H: tl.constexpr, KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Some columns of a state of one sequence and head: first the covariance's programs, then the values'."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    covariance_parts: tl.constexpr = (K + B - 1) // B
    covariance = part < covariance_parts
    at_k = k + (head // KEY_GROUP) * K
    if covariance:
        x, x_row, log_decay, state, starts, out = at_k, k_row, gk, C, C_starts, C_out
        first_column, columns = part * B, K
    else:
        x, x_row, log_decay, state, starts, out = v + (head // VALUE_GROUP) * V, v_row, g, U, U_starts, U_out
        first_column, columns = (part - covariance_parts) * B, V
    t, i, j = tl.arange(0, SIZE), tl.arange(0, D), first_column + tl.arange(0, B)
    inside = (i < K)[:, None] & (j < columns)[None, :]
    at = head * K * columns + i[:, None] * columns + j[None, :]
    slot = H * K * columns  # values of a state of all heads
    now = tl.zeros([D, B], tl.float32)
    if STATE:
        now += _load(state + sequence * slot, at, inside).to(tl.float32)
    first, stop = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    chunk = tl.load(chunks + sequence).to(tl.int64)
    for token in range(first, stop, SIZE):
        tl.store(starts + chunk * slot + at, now, mask=inside)
        chunk += 1
        tokens = (token + t).to(tl.int64)
        real = tokens < stop
        keys = _load(at_k + tokens[:, None] * k_row, i[None, :], real[:, None] & (i < K)[None, :])
        values = _load(x + tokens[:, None] * x_row, j[None, :], real[:, None] & (j < columns)[None, :])
        decay = tl.cumsum(_load(log_decay, tokens * H + head, real), axis=0)
        total = tl.sum(_load(log_decay, tokens * H + head, real), axis=0)
        weight = tl.exp(total - decay)
        if BETA:
            strength = _load(beta, tokens * H + head, real)
            weight *= strength * strength
        wide = values.to(tl.float32)
        if NORMALISE:
            key = keys.to(tl.float32)
            norm = tl.sqrt(tl.sum(key * key, axis=1)) + eps
            keys = (key / norm[:, None]).to(keys.dtype)
            if covariance:
                wide = (wide / norm[:, None]).to(values.dtype).to(tl.float32)
        high, low = _parts(wide * weight[:, None])
        now = tl.dot(tl.trans(keys), low, now * tl.exp(total))
        now = tl.dot(tl.trans(keys), high, now)
    tl.store(out + sequence * slot + at, now, mask=inside)


@triton.jit
def _outputs(
    q, k, v, g, gk, alpha, beta, C_starts, U_starts, o, bounds, chunks, sequence_of, weights,
    q_row, k_row, v_row, sequences, eps, c, keep, scale, num_iter,
    NORMALISE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, H: tl.constexpr, QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
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

    keys = _load(k + (head // KEY_GROUP) * K + token[:, None] * k_row, d[None, :], inside)
    query = _load(q + (head // QUERY_GROUP) * K + token[:, None] * q_row, d[None, :], inside).to(tl.float32)
    if NORMALISE:
        keys = _normalised(keys.to(tl.float32), eps, keys.dtype).to(keys.dtype)
        query = _normalised(query, eps, q.dtype.element_ty)
    strength = tl.full([SIZE], 1.0, tl.float32)
    if BETA:
        strength = _load(beta, gate, real)
        strength *= strength

    if num_iter > 0:
        # Keys and covariance with largest entries in [1, 2), by powers of two that go into their weights.
        key = keys.to(tl.float32)
        power = _power(tl.max(tl.abs(key), axis=1))
        unit = (key / power[:, None]).to(tl.float16)
        old = _load(C_starts + (chunk * H + head) * K * K, e[:, None] * K + d[None, :], (e < K)[:, None] & (d < K)[None, :])
        size = _power(tl.max(tl.max(tl.abs(old), axis=1), axis=0))
        old /= size
        start = old.to(tl.float16)
        log_decay = tl.cumsum(_load(gk, gate, real), axis=0)
        weight = tl.where(causal, tl.exp(log_decay[:, None] - log_decay[None, :]), 0.0)
        weight *= (strength * power * power)[None, :]
        # ||C_t||_F^2: sums of non-negative terms, so nothing cancels.
        gram = tl.dot(unit, tl.trans(unit))
        fresh = tl.sum(tl.dot(weight, gram * gram) * weight, axis=1)
        along = tl.sum(tl.dot(unit, start) * unit.to(tl.float32), axis=1)
        mixed = tl.sum(weight * along[None, :], axis=1)
        row = tl.exp(log_decay) * size
        square = row * row * tl.sum(tl.sum(old * old, axis=1), axis=0) + 2 * row * mixed + fresh
        factor = tl.where(square > 0, c / tl.sqrt(tl.maximum(square, 1.2e-38)), 0.0)
        row *= factor
        weight *= factor[:, None]

        length = _power(tl.max(tl.abs(query), axis=1))
        rhs = query / length[:, None]
        now, before = rhs, tl.zeros_like(rhs)
        for n in range(num_iter):
            w = tl.load(weights + n)
            high, low = _halves(now)
            within = tl.dot(high, tl.trans(unit), tl.dot(low, tl.trans(unit)))
            product = tl.dot(high, tl.trans(start), tl.dot(low, tl.trans(start))) * row[:, None]
            product = tl.dot((within * weight).to(tl.float16), unit, product)
            new = w * (keep * now - product + rhs) + (1 - w) * before
            before = now
            now = new
        solution = now * (factor * length)[:, None]
        share = tl.full([SIZE], 1.0, tl.float32)
        if ALPHA:
            share = _load(alpha, gate, real)
        query = rhs * length[:, None]
        query += share[:, None] * (solution - query)

    high, low = _parts(query * scale)
    log_decay = tl.cumsum(_load(g, gate, real), axis=0)
    weight = tl.where(causal, tl.exp(log_decay[:, None] - log_decay[None, :]), 0.0) * strength[None, :]
    in_value = (u < V)[None, :]
    state = _load(U_starts + (chunk * H + head) * K * V, e[:, None] * V + u[None, :], (e < K)[:, None] & in_value)
    state_high, state_low = _parts(state)
    result = tl.dot(low, state_high, tl.dot(high, state_low))
    result = tl.dot(high, state_high, result) * tl.exp(log_decay)[:, None]
    scores = tl.dot(high, tl.trans(keys), tl.dot(low, tl.trans(keys)))
    scores, scores_low = _parts(scores * weight)
    values = _load(v + (head // VALUE_GROUP) * V + token[:, None] * v_row, u[None, :], real[:, None] & in_value)
    result = tl.dot(scores, values, tl.dot(scores_low, values, result))
    out = o + (token[:, None] * H + head) * V + u[None, :]
    tl.store(out, result.to(o.dtype.element_ty), mask=real[:, None] & in_value)


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the kernels cannot run for q, k [..., K] and v [..., V], or None. It is no fault: others do then."""
    if any(x.dtype != torch.bfloat16 for x in (q, k, v)):
        return "tokens are not bfloat16"
    if max(q.shape[-1], v.shape[-1]) > 128:
        return "heads are wider than 128"
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

    q [N, Hq, K], k [N, Hk, K], v [N, Hv, V] bfloat16, whose heads of a token are side by side in memory and in number
    divide H; g, gk (log decays), alpha and beta (or None) [N, H]; state: a pair [S, H, K, K|V] or None; cu_seqlens
    [S+1] integers, on the device. With beta the key and the value of a head are multiplied by it; with eps q and k are
    normalised, x / (||x|| + eps), and rounded to bfloat16.
    """
    if any(x.stride()[1:] != (x.shape[-1], 1) for x in (q, k, v)):
        raise ValueError("the heads of a token must be side by side in memory")
    tokens, heads, key_dim, value_dim = len(q), g.shape[-1], k.shape[-1], v.shape[-1]
    sequences = len(cu_seqlens) - 1
    g, gk, alpha, beta = (None if x is None else x.float().contiguous() for x in (g, gk, alpha, beta))
    # Nothing is asked of the device: there are at most so many chunks.
    most = tokens // CHUNK_SIZE + min(sequences, tokens)
    bounds = cu_seqlens.int()
    chunks = torch.zeros_like(bounds)
    torch.cumsum((bounds.diff() + CHUNK_SIZE - 1) // CHUNK_SIZE, 0, out=chunks[1:])
    sequence_of = torch.searchsorted(chunks, torch.arange(most, device=q.device, dtype=torch.int32), right=True) - 1
    new = {"dtype": torch.float32, "device": q.device}
    C_starts, C_out = (torch.empty(count, heads, key_dim, key_dim, **new) for count in (most, sequences))
    U_starts, U_out = (torch.empty(count, heads, key_dim, value_dim, **new) for count in (most, sequences))
    o = v.new_empty(tokens, heads, value_dim)
    C, U = (C_out, U_out) if state is None else (x.contiguous() for x in state)
    c, _, _ = coefficients(num_iter, ridge_strength)
    keep, weights = _steps(num_iter, ridge_strength, q.device)
    width, value_width = _width(key_dim), _width(value_dim)
    columns = min(COLUMNS, width, value_width)
    common = {
        "NORMALISE": eps is not None, "BETA": beta is not None, "H": heads, "KEY_GROUP": heads // k.shape[1],
        "VALUE_GROUP": heads // v.shape[1], "K": key_dim, "V": value_dim, "SIZE": CHUNK_SIZE, "D": width,
    }  # fmt: skip
    eps, factor = eps or 0.0, g if beta is None else beta
    with torch.cuda.device_of(q):
        parts = triton.cdiv(key_dim, columns) + triton.cdiv(value_dim, columns)
        _states[parts, heads, sequences](
            k, v, g, gk, factor, C, U, C_starts, U_starts, C_out, U_out, bounds, chunks, k.stride(0), v.stride(0), eps,
            STATE=state is not None, B=columns, num_warps=4, num_stages=2, **common,
        )  # fmt: skip
        if most:
            _outputs[most * heads,](
                q, k, v, g, gk, g if alpha is None else alpha, factor, C_starts, U_starts, o, bounds, chunks,
                sequence_of, weights, q.stride(0), k.stride(0), v.stride(0), sequences, eps, c, keep,
                key_dim**-0.5 if rescale else 1.0, num_iter, ALPHA=alpha is not None, QUERY_GROUP=heads // q.shape[1],
                DV=value_width, num_warps=8 if width > 64 else 4, num_stages=1, **common,
            )  # fmt: skip
    return o, (C_out, U_out)


def rows(q, k, v, g, gk, alpha, state: State | None, cu_seqlens: torch.Tensor | None, **options) -> Result:
    """`chunked` for rows [B, T, ...], or for one of packed documents, as `gka.reference` takes them."""
    batch, tokens = q.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=q.device) * tokens
    q, k, v, g, gk = (x.contiguous().flatten(0, 1) for x in (q, k, v, g, gk))
    alpha = None if alpha is None else alpha.contiguous().flatten(0, 1)
    o, state = chunked(q, k, v, g, gk, alpha, state, cu_seqlens, **options)
    return o.unflatten(0, (batch, tokens)), state
