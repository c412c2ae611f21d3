# SPDX-License-Identifier: Apache-2.0
"""The recurrence of Gated KalmaNet (arXiv 2511.21016): linear attention whose query solves a ridge regression.

Per head, with a key covariance C [K, K] and a value state U [K, V], both decayed:
    C <- exp(gk_t) C + k_t k_t^T;   lambda_t = ridge_strength ||C_t||_F;   x_t ~ (C_t + lambda_t I)^-1 q_t
    U <- exp(g_t) U + k_t v_t^T;    o_t = U^T (q_t + alpha_t (x_t - q_t))      (over sqrt(K) with `rescale`)

x_t is `num_iter` steps of Chebyshev's iteration for the spectrum [lambda, lambda + ||C||_F]; 0 leaves x = q. Because
lambda is a fixed share of F = ||C||_F, so are the step 2 / (2 lambda + F) = c / F and rho = F / (2 lambda + F): with
c = 2 / (1 + 2 ridge_strength) the iteration runs on c C / F with the same numbers for every token, and x = (c / F) z.
Where C is zero, x is zero.

All versions take q, k [B, T, H, K], v [B, T, H, V] with heads expanded, normalised and gated by the layer; g, gk (log
decays) and alpha (None: 1) [B, T, H]; initial_state a pair (C [S, H, K, K], U [S, H, K, V]) or None; cu_seqlens [S+1]
or None (then B = 1 row of S packed documents). They return o [B, T, H, V] in v.dtype and the final pair, in float32
(float64 for float64 inputs).

Legend: B batch, T tokens, S sequences, N chunks, C chunk_size, H heads, K/V key/value head dims, G chunks of one head.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

from . import dispatch
from .ssd import chunk_decays, scan_states, state_or_zeros
from .ssd import chunked as linear_attention
from .ssd import step as linear_attention_step
from .varlen import ChunkLayout, sequence_lengths

State = tuple[torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, State]


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
    """Gated KalmaNet by the best implementation for the tensors' device (see the module's head).

    `bp_lambda` False lets no gradient through lambda (and the spectrum's bound, which is proportional to it).
    """
    options = {"num_iter": num_iter, "ridge_strength": ridge_strength, "bp_lambda": bp_lambda, "rescale": rescale}
    return dispatch.resolve("gka", q)(q, k, v, g, gk, alpha, initial_state, cu_seqlens, **options)


def coefficients(num_iter: int, ridge_strength: float) -> tuple[float, float, list[float]]:
    """c, the share of z that a step keeps (1 - c ridge_strength), and the weights w of the steps."""
    c, rho = 2 / (1 + 2 * ridge_strength), 1 / (1 + 2 * ridge_strength)
    weights, w = [], 2.0
    for _ in range(num_iter):
        w = 1 / (1 - rho * rho / 4 * w)
        weights.append(w)
    return c, 1 - c * ridge_strength, weights


def inverse_norm(square: torch.Tensor, bp_lambda: bool) -> torch.Tensor:
    """1 / sqrt(square), zero (with a zero gradient) where the square is zero."""
    inverse = torch.where(square > 0, square.clamp_min(torch.finfo(square.dtype).tiny).rsqrt(), 0)
    return inverse if bp_lambda else inverse.detach()


def solve_chebyshev(C, q, num_iter, ridge_strength, bp_lambda=True) -> torch.Tensor:
    """x [..., K] after `num_iter` Chebyshev steps for (C + lambda I) x = q, with C [..., K, K] and q [..., K]."""
    c, keep, weights = coefficients(num_iter, ridge_strength)
    scale = c * inverse_norm(C.square().sum((-2, -1)), bp_lambda)[..., None]
    z, before = q, torch.zeros_like(q)
    for w in weights:
        product = scale * torch.einsum("...kl,...l->...k", C, z)
        z, before = w * (keep * z - product + q) + (1 - w) * before, z
    return scale * z


def solve_exact(C, q, num_iter, ridge_strength, bp_lambda=True) -> torch.Tensor:
    """x [..., K] of (C + lambda I) x = q, the limit of many steps (`num_iter` is not used)."""
    size = torch.linalg.matrix_norm(C)
    if not bp_lambda:
        size = size.detach()
    system = C + (ridge_strength * size)[..., None, None] * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    return torch.linalg.solve(system, q)


def step(
    q, k, v, g, gk, alpha, state: State, *, num_iter, ridge_strength, bp_lambda, rescale, solve=solve_chebyshev
) -> Result:
    """One token a sequence: q, k [S, H, K], v [S, H, V], g, gk, alpha [S, H] -> (o [S, H, V], state)."""
    C = state[0] * gk.exp()[..., None, None] + k[..., :, None] * k[..., None, :]
    if num_iter:
        q = mix(q, solve(C, q, num_iter, ridge_strength, bp_lambda), alpha)
    o, U = linear_attention_step(q, k, v, g, state[1])
    return o * (q.shape[-1] ** -0.5 if rescale else 1), (C, U)


def mix(q, x, alpha):
    return x if alpha is None else torch.lerp(q, x, alpha[..., None])


@dispatch.implementation("gka", "reference")
def reference(
    q, k, v, g, gk, alpha=None, initial_state=None, cu_seqlens=None,
    *, num_iter=30, ridge_strength=0.02, bp_lambda=True, rescale=True, solve=solve_chebyshev,
) -> Result:  # fmt: skip
    """Token by token: the definition; `solve` is the Chebyshev iteration or `solve_exact`."""
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
    q, k, v, g, gk, alpha=None, initial_state=None, cu_seqlens=None,
    *, num_iter=30, ridge_strength=0.02, bp_lambda=True, rescale=True,
    exact_backward=False, chunk_size: int = 32, solver=None,
) -> Result:  # fmt: skip
    """All tokens of many chunks are solved at once, from the covariances at the chunks' starts.

    No token's covariance is ever formed: with C_0 at the chunk's start, d_t the decay since then and M_ts that from
    token s to t, C_t p = d_t C_0 p + sum_{s <= t} M_ts k_s (k_s . p), so a step for a whole chunk is three matrix
    products; ||C_t||_F comes from the chunk's Gram matrix. `exact_backward` differentiates the exact solution instead
    of the iterations: half the cost, and as far from the true gradient as the iterations are from the solution.
    `solver` (None: `_Solve`) is what runs the iterations of all chunks.
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
    layout = ChunkLayout(batch, tokens, cu_seqlens, chunk_size)
    keys, log_decay = (layout.split(x).to(compute).transpose(1, 2) for x in (k, gk))  # [N, H, C, K], [N, H, C]
    decay_in, decay, total = chunk_decays(log_decay)
    update = (keys * (total - decay_in).exp()[..., None]).mT @ keys
    starts, C = scan_states(layout, total.exp()[..., None], update, C)
    q = q.to(compute)
    if num_iter:
        queries = layout.split(q).transpose(1, 2)
        c, _, _ = coefficients(num_iter, ridge_strength)
        from_start = decay_in.exp()
        square = squared_norms(keys, starts, from_start, decay)
        scale = c * inverse_norm(square, bp_lambda)
        solve = solver or functools.partial(_Solve.apply, exact_backward)
        system = (x.flatten(0, 1) for x in (queries, keys, starts, from_start * scale, decay * scale[..., None]))
        z = solve(num_iter, ridge_strength, *system)
        x = z.view_as(queries) * scale[..., None]
        q = mix(q, layout.merge(x.transpose(1, 2)), None if alpha is None else alpha.to(compute))
    if rescale:
        q = q * key_dim**-0.5
    # In float32, by no kernel: where C is small x is large and its products nearly cancel, so their rounding counts.
    o, U = linear_attention(q, k, v, g, U, cu_seqlens)
    return o.to(out_dtype), (C, U)


@dispatch.implementation("gka", "fast", requires="triton")
def fast(
    q, k, v, g, gk, alpha=None, initial_state=None, cu_seqlens=None,
    *, num_iter=30, ridge_strength=0.02, bp_lambda=True, rescale=True,
) -> Result:  # fmt: skip
    """Our Triton kernels (CUDA): all of it for single tokens and in bfloat16, both without gradients; otherwise the
    iterations, with the rest as in `chunked`."""
    from . import gka_chunk_triton
    from . import gka_triton as kernels

    options = {"num_iter": num_iter, "ridge_strength": ridge_strength, "rescale": rescale}
    solver = None
    if reason := kernels.unsupported(q, k):
        dispatch.warn_once(f"gka: running the plain PyTorch version: {reason}")
    elif q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
        q, k, v, g, gk = (x[:, 0] for x in (q, k, v, g, gk))
        o, state = kernels.step(q, k, v, g, gk, None if alpha is None else alpha[:, 0], initial_state, **options)
        return o[:, None], state
    elif not torch.is_grad_enabled() and not gka_chunk_triton.unsupported(q, k, v):
        sequence_lengths(q.shape[0], q.shape[1], cu_seqlens)  # refuses wrong ones
        return gka_chunk_triton.rows(q, k, v, g, gk, alpha, initial_state, cu_seqlens, **options)
    else:
        # Keys that are numbers of bfloat16 spare some of the kernels' products.
        solver = functools.partial(kernels.Solve.apply, k.dtype == torch.bfloat16)
    options |= {"bp_lambda": bp_lambda, "chunk_size": kernels.CHUNK_SIZE, "solver": solver}
    return chunked(q, k, v, g, gk, alpha, initial_state, cu_seqlens, **options)


def squared_norms(k, starts, from_start, decay) -> torch.Tensor:
    """||C_t||_F^2 [N, H, C] of every token: sums of non-negative terms, so nothing cancels."""
    fresh = ((decay @ (k @ k.mT).square()) * decay).sum(-1)
    mixed = decay @ ((k @ starts.mT) * k).sum(-1, keepdim=True)
    old = starts.square().sum((-2, -1))[..., None]
    return from_start.square() * old + 2 * from_start * mixed[..., 0] + fresh


class _Solve(torch.autograd.Function):
    """z of a chunk's tokens: steps of z <- w (keep z - A_t z + q) + (1 - w) z_before from z = q, where
    A_t p = row_t C_0 p + sum_{s <= t} mask_ts k_s (k_s . p).

    q, k [G, C, K]; start [G, K, K]; row [G, C]; mask [G, C, C]. Nothing of the iterations outlives a call: the backward
    runs them again, for as many G at a time as a fixed amount of memory holds.
    """

    @staticmethod
    def forward(ctx, exact_backward, num_iter, ridge_strength, q, k, start, row, mask):
        _, keep, weights = coefficients(num_iter, ridge_strength)
        ctx.keep, ctx.weights, ctx.exact = keep, weights, exact_backward
        z = torch.empty_like(q, memory_format=torch.contiguous_format)
        for at in _groups(q, 8):
            z[at] = _last(_iterates(q[at], (k[at], start[at], row[at], mask[at]), keep, weights))
        ctx.save_for_backward(q, k, start, row, mask, *([z] if exact_backward else []))
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_z):
        q, k, start, row, mask, *solution = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, start, row, mask)]
        stored = 1 if ctx.exact else len(ctx.weights)
        for at in _groups(q, 8 + 4 * stored):
            system = k[at], start[at], row[at], mask[at]
            if ctx.exact:
                # A is symmetric, so the adjoint solution is the solution for the incoming gradient.
                grad_q = _last(_iterates(grad_z[at], system, ctx.keep, ctx.weights))
                z, grad_product = solution[0][at, None], -grad_q[:, None]
            else:
                grad_q, z, grad_product = _adjoint(q[at], grad_z[at], system, ctx.keep, ctx.weights)
            grads[0][at] = grad_q
            for grad, value in zip(grads[1:], _product_grads(z, grad_product, *system), strict=True):
                grad[at] = value
        return None, None, None, *grads


def _groups(q: torch.Tensor, stored: int) -> list[slice]:
    """Slices over G such that `stored` tensors like q stay small: in cache on a CPU, well filled launches on a GPU."""
    budget = 2**28 if q.is_cuda else 2**22
    size = max(1, budget // (stored * q[0].numel())) if len(q) else 1
    return [slice(first, first + size) for first in range(0, len(q), size)]


def _product(p, k, start, row, mask) -> torch.Tensor:
    """A_t p_t for all tokens t of a chunk."""
    y = torch.bmm(p, start.mT).mul_(row[..., None])
    return y.baddbmm_(torch.bmm(p, k.mT).mul_(mask), k)


def _iterates(q, system, keep, weights) -> Iterator[torch.Tensor]:
    z, before = q, None
    yield z
    for w in weights:
        new = _product(z, *system).mul_(-w).add_(z, alpha=w * keep).add_(q, alpha=w)
        if before is not None:
            new.add_(before, alpha=1 - w)
        z, before = new, z
        yield z


def _last(iterates: Iterator[torch.Tensor]) -> torch.Tensor:
    return deque(iterates, maxlen=1)[0]


def _adjoint(q, grad_z, system, keep, weights):
    """Reverse of `_iterates`: the gradient of q [G, C, K], and for each product A z_n its argument z_n and its incoming
    gradient [G, steps, C, K]."""
    k, start, row, mask = system
    z = torch.stack(list(_iterates(q, system, keep, weights))[:-1], dim=1)
    grad_product = torch.empty_like(z)
    grad_q, later, grad = torch.zeros_like(q), None, grad_z
    for n in reversed(range(len(weights))):
        w = weights[n]
        torch.mul(grad, -w, out=grad_product[:, n])
        grad_q.add_(grad, alpha=w)
        # transposed: A_t is symmetric only if the state that came in was
        earlier = _product(grad, k, start.mT, row, mask).mul_(-w).add_(grad, alpha=w * keep)
        if later is not None:
            earlier.add_(later)
        later, grad = grad * (1 - w), earlier
    return grad_q.add_(grad), z, grad_product


def _product_grads(z, grad, k, start, row, mask):
    """Gradients of k, start, row and mask from the products' arguments and incoming gradients [G, steps, C, K]."""
    steps = z.shape[1]
    z, flat = z.flatten(1, 2), grad.flatten(1, 2)  # [G, steps C, K]
    grad_row = (torch.bmm(flat, start) * z).sum(-1).unflatten(1, (steps, -1)).sum(1)
    grad_start = torch.bmm((grad * row[:, None, :, None]).flatten(1, 2).mT, z)
    along, across = (torch.bmm(x, k.mT).unflatten(1, (steps, -1)) for x in (z, flat))  # [G, steps, C, C]
    grad_mask = (along * across).sum(1)
    along, across = (x.mul_(mask[:, None]).flatten(1, 2) for x in (along, across))
    grad_k = torch.bmm(along.mT, flat).baddbmm_(across.mT, z)
    return grad_k, grad_start, grad_row, grad_mask
