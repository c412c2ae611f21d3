# SPDX-License-Identifier: Apache-2.0
"""The gradients of the gated delta rule by Triton kernels: `Rule` is `gdn_chunk_triton` with a backward.

With the notation of `gdn_chunk_triton`, P = scale q k^T * exp(b_t - b_s) for s <= t, G(x) the gradient of x, and S' the
state after a chunk, whose gradient comes from the next chunk:
    G(u) = P^T G(o) + (exp(b_last - b) k) G(S')
    G(S) = (scale exp(b) q)^T G(o) + exp(b_last) G(S') - W^T G(u)
`_value_grads` computes the first product for all chunks at once, `_state_grads` the rest of both from the last chunk to
the first, and `fla_backend.chunk_grads` what q, k, b and W have in o and S'. With R = T^T G(u), the gradient of
beta (v - exp(b) k S), and Z = T^T G(W) = -R S^T, the system gives for A[t, s] and its factors
    G(A) = -R u^T below the diagonal,  G(v) = beta R
which `_system_grads` adds up. The forward is computed again, which takes a fraction of the time of the backward and
saves the memory of W, u and all states.

No factor of a product is the transpose of another product's result, because Triton 3.4 to 3.7.0 miscompiles that on
Hopper (see `fla_backend`): each transposed factor is a product of its own.

Legend: N tokens, S sequences, G chunks, C chunk_size, H heads, K/V key/value head dims.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import dispatch
from .fla_backend import chunk_grads
from .gdn_chunk_triton import CHUNK_SIZE, advance, chunked, decays, launch, launch_sequential, parts
from .gka_triton_common import load
from .varlen import kept_chunks


@triton.jit
def _later(b, row, column):
    """exp(b_column - b_row) for row <= column and 0 otherwise, from b [C]: the transpose of `decays`."""
    return tl.exp(tl.where(row <= column, b[None, :] - b[:, None], float("-inf")))


@triton.jit(do_not_specialize=["sequences"])
def _value_grads(
    q,
    k,
    g,
    grad_o,
    grad_u,
    bounds,
    chunks,
    sequence_of,
    sequences,
    scale,
    H: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
):
    """Some columns of P^T G(o) of one chunk and head."""
    PARTS: tl.constexpr = (V + B - 1) // B
    part, head = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % H
    chunk = (tl.program_id(0) // (PARTS * H)).to(tl.int64)
    sequence = tl.load(sequence_of + chunk)
    if sequence >= sequences:
        return
    first = tl.load(bounds + sequence) + (chunk - tl.load(chunks + sequence)) * SIZE
    stop = tl.load(bounds + sequence + 1)
    i, d, e = tl.arange(0, SIZE), tl.arange(0, D), part * B + tl.arange(0, B)
    t, s = i[:, None], i[None, :]
    there, row = first + i < stop, first * H + head
    in_key, in_value = there[:, None] & (d < K)[None, :], there[:, None] & (e < V)[None, :]
    query = load(q + row * K, t * (H * K) + d[None, :], in_key)
    key = load(k + row * K, t * (H * K) + d[None, :], in_key)
    b = tl.cumsum(load(g + row, i * H, there), axis=0)  # constant after the last token
    scores = tl.dot(key, tl.trans(query)) * _later(b, t, s) * scale
    upper = load(grad_o + row * V, t * (H * V) + e[None, :], in_value)
    result = tl.dot(scores.to(upper.dtype), upper)
    tl.store(grad_u + row * V + t * (H * V) + e[None, :], result.to(grad_u.dtype.element_ty), mask=in_value)


@triton.jit
def _state_grads(
    q,
    k,
    w,
    cumulated,
    share,
    total,
    grad_o,
    grad_u,
    grad_out,
    afters,
    grad_state,
    bounds,
    chunks,
    scale,
    H: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
):
    """Some columns of the gradients of the states of one sequence and head, from its last chunk to its first. Writes
    those of the states after each chunk, and completes G(u). The layouts are those of `_states`."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, d, e = tl.arange(0, SIZE), tl.arange(0, D), part * B + tl.arange(0, B)
    in_key, in_value = (d < K)[None, :], (e < V)[None, :]
    inside = (d < K)[:, None] & in_value
    slot = (sequence * H + head) * K * V + e[None, :] * K + d[:, None]
    now = load(grad_out, slot, inside)
    first, stop = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    chunk = (tl.load(chunks + sequence + 1).to(tl.int64) - 1) * H + head
    carry = tl.load(total + tl.maximum(chunk, head))
    count = (stop - first + SIZE - 1) // SIZE
    for n in range(count):
        token = first + (count - 1 - n) * SIZE
        row, there = token.to(tl.int64) * H + head, token + i < stop
        real = there[:, None]
        query = load(q + row * K, i[:, None] * (H * K) + d[None, :], real & in_key)
        key = load(k + row * K, i[:, None] * (H * K) + d[None, :], real & in_key)
        met = load(w + row * K, i[:, None] * (H * K) + d[None, :], real & in_key)
        upper = load(grad_o + row * V, i[:, None] * (H * V) + e[None, :], real & in_value)
        value = load(grad_u + row * V, i[:, None] * (H * V) + e[None, :], real & in_value)
        from_start, to_end = load(cumulated + row, i * H, there), load(share + row, i * H, there)
        rounded = now.to(key.dtype)
        tl.store(afters + chunk * K * V + d[:, None] * V + e[None, :], rounded, mask=inside)
        grad = value.to(tl.float32) + tl.dot(key, rounded) * to_end[:, None]
        at = grad_u + row * V + i[:, None] * (H * V) + e[None, :]
        tl.store(at, grad.to(grad_u.dtype.element_ty), mask=real & in_value)
        upper = (upper.to(tl.float32) * (tl.exp2(from_start) * scale)[:, None]).to(query.dtype)
        now = tl.dot(tl.trans(query), upper, now * carry)
        now = tl.dot(tl.trans(met), (-grad).to(met.dtype), now)
        chunk -= H
        carry = tl.load(total + tl.maximum(chunk, head))
    tl.store(grad_state + slot, now, mask=inside)


@triton.jit(do_not_specialize=["sequences"])
def _system_grads(
    k,
    v,
    beta,
    u,
    inverses,
    g,
    grad_u,
    grad_w,
    grad_k,
    grad_v,
    grad_beta,
    grad_g,
    bounds,
    chunks,
    sequence_of,
    sequences,
    H: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
):
    """The gradients of one chunk and head that come from W and U; grad_k and grad_g have those of the rest, and grad_g
    that of b, which becomes the one of g."""
    chunk, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    sequence = tl.load(sequence_of + chunk)
    if sequence >= sequences:
        return
    first = tl.load(bounds + sequence) + (chunk - tl.load(chunks + sequence)) * SIZE
    stop = tl.load(bounds + sequence + 1)
    i, j = tl.arange(0, SIZE), tl.arange(0, B)
    t, s = i[:, None], i[None, :]
    there, row = first + i < stop, first * H + head
    b = tl.cumsum(load(g + row, i * H, there), axis=0)
    strength = load(beta + row, i * H, there)
    solve = tl.load(inverses + (chunk * H + head) * SIZE * SIZE + t * SIZE + s)

    below, above = tl.zeros([SIZE, SIZE], tl.float32), tl.zeros([SIZE, SIZE], tl.float32)
    of_beta = tl.zeros([SIZE], tl.float32)
    for start in range(0, V, B):
        column = (start + j)[None, :]
        at, inside = row * V + t * (H * V) + column, there[:, None] & (column < V)
        grad, value = load(grad_u, at, inside), load(u, at, inside)
        rhs = tl.dot(tl.trans(solve), grad)  # R, and its transpose
        across = tl.dot(tl.trans(grad), solve)
        of_beta += tl.sum(rhs * load(v, at, inside).to(tl.float32), axis=1)
        tl.store(grad_v + at, (rhs * strength[:, None]).to(grad_v.dtype.element_ty), mask=inside)
        below = tl.dot(rhs.to(value.dtype), tl.trans(value), below)
        above = tl.dot(value, across.to(value.dtype), above)
    below = tl.where(t > s, below * decays(b, t, s), 0.0)
    above = tl.where(t < s, above * _later(b, t, s), 0.0) * strength[None, :]
    below, above = (-below).to(u.dtype.element_ty), (-above).to(u.dtype.element_ty)

    of_b = tl.zeros([SIZE], tl.float32)
    for start in range(0, K, B):
        column = (start + j)[None, :]
        at, inside = row * K + t * (H * K) + column, there[:, None] & (column < K)
        key = load(k, at, inside)
        own = tl.dot(tl.trans(solve), load(grad_w, at, inside)) * tl.exp(b)[:, None]
        own = tl.dot(below, key, own)  # where a key corrects the value of its own token, without beta
        other = tl.dot(above, key)  # where later tokens meet it
        wide = key.to(tl.float32)
        of_own = tl.sum(own * wide, axis=1)
        of_beta += of_own
        of_b += of_own * strength - tl.sum(other * wide, axis=1)
        result = load(grad_k, at, inside).to(tl.float32) + own * strength[:, None] + other
        tl.store(grad_k + at, result.to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_beta + row + i * H, of_beta, mask=there)
    of_b += load(grad_g + row, i * H, there)
    tl.store(grad_g + row + i * H, tl.cumsum(of_b, axis=0, reverse=True), mask=there)


class Rule(torch.autograd.Function):
    """q, k [N, H, K], v [N, H, V], g and beta [N, H], state [S, H, V, K] or None, cu_seqlens [S+1] -> o and the final
    states, as `chunked` of normalised q and k without shared heads."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, cu_seqlens):
        ctx.save_for_backward(q, k, v, g, beta, state, cu_seqlens)
        return chunked(q, k, v, g, beta, state, cu_seqlens, packed=kept_chunks(cu_seqlens, len(q), CHUNK_SIZE))

    @staticmethod
    @dispatch.backward
    def backward(ctx, grad_o, grad_out):
        q, k, v, g, beta, state, cu_seqlens = ctx.saved_tensors
        (tokens, heads), scale = g.shape, k.shape[-1] ** -0.5
        log_decay, strength = (x.float().contiguous() for x in (g, beta))
        packed = kept_chunks(cu_seqlens, tokens, CHUNK_SIZE)
        made = advance(k, v, log_decay, strength, state, packed, None, keep=True)
        grad_o, grad_out = grad_o.contiguous(), grad_out.contiguous()
        grad_u, afters, grad_state = torch.empty_like(made.u), torch.empty_like(made.starts), torch.empty_like(grad_out)
        programs, sequences = len(packed[2]) * heads, len(cu_seqlens) - 1
        with torch.cuda.device_of(q):
            options = launch("value_grads", k, v, heads)
            if tokens:
                _value_grads[programs * parts(options),](
                    q, k, log_decay, grad_o, grad_u, *packed, sequences, scale, **options
                )
            options = launch_sequential("state_grads", k, v, heads, sequences)
            _state_grads[parts(options), heads, sequences](
                q,
                k,
                made.w,
                made.cumulated,
                made.share,
                made.total,
                grad_o,
                grad_u,
                grad_out,
                afters,
                grad_state,
                *packed[:2],
                scale,
                **options,
            )
            # For each chunk its sequence and its number in it, without synchronisation: programs of chunks that do not
            # exist have tokens after the end of the last sequence, for which they write nothing.
            bounds, chunks, sequence_of = packed
            sequence = sequence_of.clamp(max=sequences - 1)
            number = torch.arange(len(sequence), device=q.device) - chunks[sequence]
            x = (y[None] for y in (q, k, made.u, grad_o, made.starts, afters, made.cumulated, made.w, grad_u))
            named = dict(zip(("q", "k", "v", "do", "h", "dh", "g", "w", "dv"), x, strict=True))
            indices = torch.stack([sequence, number], 1)
            grad_q, grad_k, grad_w, grad_b = chunk_grads(
                **named, scale=scale, cu_seqlens=bounds, chunk_size=CHUNK_SIZE, chunk_indices=indices
            )
            grad_v, grad_beta = torch.empty_like(made.u), torch.empty_like(strength)
            if tokens:
                _system_grads[programs,](
                    k,
                    v,
                    strength,
                    made.u,
                    made.inverses,
                    log_decay,
                    grad_u,
                    grad_w,
                    grad_k,
                    grad_v,
                    grad_beta,
                    grad_b,
                    *packed,
                    sequences,
                    **launch("system_grads", k, v, heads),
                )
        grads = grad_q[0], grad_k[0], grad_v, grad_b[0].to(g.dtype), grad_beta.to(beta.dtype)
        return *grads, None if state is None else grad_state.to(state.dtype), None
