# SPDX-License-Identifier: Apache-2.0
"""The recurrence of Gated KalmaNet (arXiv 2511.21016): linear attention whose query solves a ridge regression.

Per head, with a key covariance C [K, K] and a value state U [K, V], both decayed:
    C <- exp(gk_t) C + k_t k_t^T;   lambda_t = ridge_strength ||C_t||_F;   x_t ~ (C_t + lambda_t I)^-1 q_t
    U <- exp(g_t) U + k_t v_t^T;    o_t = U^T (q_t + alpha_t (x_t - q_t))      (over sqrt(K) with `rescale`)

x_t is `num_iter` steps of Chebyshev's iteration for the spectrum [lambda, lambda + ||C||_F]; 0 leaves x = q. Because
lambda is ridge_strength times F = ||C||_F, the step is 2 / (2 lambda + F) = c / F with c = 2 / (1 + 2 ridge_strength),
and rho = F / (2 lambda + F) is a constant. The iteration therefore runs on c C / F with the same coefficients for every
token, and x = (c / F) z. Where C is zero, x is zero.

All versions take q, k [B, T, H, K], v [B, T, H, V] with heads expanded, normalised and gated by the layer; g, gk (log
decays) and alpha (None: 1) [B, T, H]; initial_state a pair (C [S, H, K, K], U [S, H, K, V]) or None; cu_seqlens [S+1]
or None (then B = 1 row of S packed documents). They return o [B, T, H, V] in v.dtype and the final pair, in float32
(float64 for float64 inputs).

Legend: B batch, T tokens, S sequences, N chunks, C chunk_size, H heads, K/V key/value head dims, G chunks of one head.
"""

from __future__ import annotations

import functools

import torch

from . import dispatch
from .gka_solve import (
    ChunkSolve,
    Result,
    State,
    coefficients,
    distance_bound,
    inverse_norm,
    solve_chebyshev,
    squared_norms,
)
from .ssd import chunk_decays, scan_states, state_or_zeros
from .ssd import chunked as linear_attention
from .ssd import step as linear_attention_step
from .varlen import chunk_layout, sequence_lengths


@dispatch.entry("gka", recurrence=True)
def gated_kalmanet(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    gk: torch.Tensor,
    alpha: torch.Tensor | None = None,
    initial_state: State | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    num_iter: int = 30,
    ridge_strength: float = 0.02,
    bp_lambda: bool = True,
    rescale: bool = True,
) -> Result:
    """Gated KalmaNet, by the implementation that `dispatch` chooses; arguments as in the module docstring.

    With `bp_lambda` False no gradient flows through lambda, nor through the bound of the spectrum, which is
    proportional to it.
    """
    options = {"num_iter": num_iter, "ridge_strength": ridge_strength, "bp_lambda": bp_lambda, "rescale": rescale}
    return dispatch.resolve("gka", q)(q, k, v, g, gk, alpha, initial_state, cu_seqlens, **options)


def step(
    q, k, v, g, gk, alpha, state: State, *, num_iter, ridge_strength, bp_lambda, rescale, solve=solve_chebyshev
) -> Result:
    """One token per sequence: q, k [S, H, K], v [S, H, V], g, gk, alpha [S, H] -> (o [S, H, V], state)."""
    C = state[0] * gk.exp()[..., None, None] + k[..., :, None] * k[..., None, :]
    if num_iter:
        q = mix(q, solve(C, q, num_iter, ridge_strength, bp_lambda), alpha)
    o, U = linear_attention_step(q, k, v, g, state[1])
    return o * (q.shape[-1] ** -0.5 if rescale else 1), (C, U)


def mix(q, x, alpha):
    return x if alpha is None else torch.lerp(q, x, alpha[..., None])


@dispatch.implementation("gka", "reference")
def reference(
    q,
    k,
    v,
    g,
    gk,
    alpha=None,
    initial_state=None,
    cu_seqlens=None,
    *,
    num_iter=30,
    ridge_strength=0.02,
    bp_lambda=True,
    rescale=True,
    solve=solve_chebyshev,
) -> Result:
    """The definition: a loop over the tokens. `solve` is `solve_chebyshev` or `solve_exact`."""
    batch, tokens, heads, key_dim = q.shape
    out_dtype, compute = v.dtype, dispatch.compute_dtype(v)
    q, k, v, g, gk = (x.to(compute).flatten(0, 1) for x in (q, k, v, g, gk))
    alpha = torch.ones_like(g) if alpha is None else alpha.to(compute).flatten(0, 1)
    lengths = sequence_lengths(batch, tokens, cu_seqlens)
    C, U = initial_state or (None, None)
    C = state_or_zeros(C, (len(lengths), heads, key_dim, key_dim), k)
    U = state_or_zeros(U, (len(lengths), heads, key_dim, v.shape[-1]), k)
    options = {"num_iter": num_iter, "ridge_strength": ridge_strength, "bp_lambda": bp_lambda, "rescale": rescale}
    outputs, states, first = [], [], 0
    for s, length in enumerate(lengths):
        state = C[s : s + 1], U[s : s + 1]
        for t in range(first, first + length):
            at = slice(t, t + 1)
            o, state = step(q[at], k[at], v[at], g[at], gk[at], alpha[at], state, **options, solve=solve)
            outputs.append(o)
        states.append(state)
        first += length
    o = torch.cat(outputs) if outputs else v
    final = torch.cat([C for C, _ in states]), torch.cat([U for _, U in states])
    return o.unflatten(0, (batch, tokens)).to(out_dtype), final


@dispatch.implementation("gka", "chunked")
def chunked(
    q,
    k,
    v,
    g,
    gk,
    alpha=None,
    initial_state=None,
    cu_seqlens=None,
    *,
    num_iter=30,
    ridge_strength=0.02,
    bp_lambda=True,
    rescale=True,
    exact_backward=False,
    chunk_size: int = 32,
    solver=None,
) -> Result:
    """Solve for all tokens of many chunks in parallel, from the covariances at the chunks' starts.

    The covariance of a single token is never formed. With C_0 at the chunk's start, d_t the decay since then and M_ts
    the decay from token s to t, C_t p = d_t C_0 p + sum_{s <= t} M_ts k_s (k_s . p), so an iteration for a whole chunk
    is three matrix products. ||C_t||_F comes from the chunk's Gram matrix.

    exact_backward: differentiate the exact solution instead of the iterations, as the published software does. This
    halves the cost or more; its error is of the size of the iterations' distance from the exact solution
    (`gka_solve.distance_bound`).
    solver: runs the iterations of all chunks; None is `ChunkSolve`.
    """
    batch, tokens, heads, key_dim = q.shape
    out_dtype, compute = v.dtype, dispatch.compute_dtype(v)
    C, U = initial_state or (None, None)
    if tokens == 1 and cu_seqlens is None:
        C = state_or_zeros(C, (batch, heads, key_dim, key_dim), k, compute)
        U = state_or_zeros(U, (batch, heads, key_dim, v.shape[-1]), k, compute)
        q, k, v, g, gk = (x[:, 0].to(compute) for x in (q, k, v, g, gk))
        alpha = None if alpha is None else alpha[:, 0].to(compute)
        options = {"num_iter": num_iter, "ridge_strength": ridge_strength, "bp_lambda": bp_lambda, "rescale": rescale}
        o, state = step(q, k, v, g, gk, alpha, (C, U), **options)
        return o[:, None].to(out_dtype), state
    layout = chunk_layout(batch, tokens, cu_seqlens, chunk_size)
    keys, log_decay = (layout.split(x).to(compute).transpose(1, 2) for x in (k, gk))  # [N, H, C, K], [N, H, C]
    decay_in, decay, total = chunk_decays(log_decay)
    update = (keys * (total - decay_in).exp()[..., None]).mT @ keys
    starts, C = scan_states(layout, total, update, C)
    q = q.to(compute)
    if num_iter:
        queries = layout.split(q).transpose(1, 2)
        c, _, _ = coefficients(num_iter, ridge_strength)
        from_start = decay_in.exp()
        square = squared_norms(keys, starts, from_start, decay)
        scale = c * inverse_norm(square, bp_lambda)
        solve = solver or functools.partial(ChunkSolve.apply, exact_backward)
        system = (x.flatten(0, 1) for x in (queries, keys, starts, from_start * scale, decay * scale[..., None]))
        z = solve(num_iter, ridge_strength, *system)
        x = z.view_as(queries) * scale[..., None]
        q = mix(q, layout.merge(x.transpose(1, 2)), None if alpha is None else alpha.to(compute))
    if rescale:
        q = q * key_dim**-0.5
    # In float32 and without a kernel: where C is small, x is large and its products nearly cancel, so that rounding
    # them to bfloat16 would be a large relative error.
    o, U = linear_attention(q, k, v, g, U, cu_seqlens)
    return o.to(out_dtype), (C, U)


@dispatch.implementation("gka", "fast", requires="triton")
def fast(
    q,
    k,
    v,
    g,
    gk,
    alpha=None,
    initial_state=None,
    cu_seqlens=None,
    *,
    num_iter=30,
    ridge_strength=0.02,
    bp_lambda=True,
    rescale=True,
) -> Result:
    """The Triton kernels of this package (CUDA).

    Without gradients, kernels compute the whole op for single tokens and for bfloat16 inputs. Otherwise a kernel
    computes the iterations, and the rest is as in `chunked`.
    """
    from . import gka_chunk_triton, gka_decode
    from . import gka_triton as kernels

    options = {"num_iter": num_iter, "ridge_strength": ridge_strength, "rescale": rescale}
    solver = None
    if reason := kernels.unsupported(q, k):
        dispatch.warn_once(f"gka: running the plain PyTorch version: {reason}")
    elif q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
        q, k, v, g, gk = (x[:, 0] for x in (q, k, v, g, gk))
        o, state = gka_decode.step(q, k, v, g, gk, None if alpha is None else alpha[:, 0], initial_state, **options)
        return o[:, None], state
    elif not torch.is_grad_enabled() and not gka_chunk_triton.unsupported(q, k, v):
        sequence_lengths(q.shape[0], q.shape[1], cu_seqlens)  # raises for invalid cu_seqlens
        return gka_chunk_triton.rows(q, k, v, g, gk, alpha, initial_state, cu_seqlens, **options)
    else:
        # For bfloat16 keys the kernels need fewer products. Gradients that differ by less than bfloat16 rounds are
        # those of the exact solution, as in the published software.
        exact_keys = k.dtype == torch.bfloat16
        exact_backward = exact_keys and distance_bound(num_iter, ridge_strength) < 2**-10
        solver = functools.partial(kernels.Solve.apply, exact_keys, exact_backward)
    options |= {"bp_lambda": bp_lambda, "chunk_size": kernels.CHUNK_SIZE, "solver": solver}
    return chunked(q, k, v, g, gk, alpha, initial_state, cu_seqlens, **options)
