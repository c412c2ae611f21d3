# SPDX-License-Identifier: Apache-2.0
"""Gated KalmaNet's solve x ~ (C + lambda I)^-1 q in plain PyTorch, for single tokens and for whole chunks.

The equations are in `hmf.ops.gka`. Its versions and kernels share these functions.

Legend: C chunk_size (or the covariance), K key head dim, N chunks, H heads, G chunks of one head.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import torch

from . import dispatch

State = tuple[torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, State]


def coefficients(num_iter: int, ridge_strength: float) -> tuple[float, float, list[float]]:
    """c, the factor `keep` of z in an iteration (1 - c ridge_strength), and the weight w of each iteration."""
    c, rho = 2 / (1 + 2 * ridge_strength), 1 / (1 + 2 * ridge_strength)
    weights, w = [], 2.0
    for _ in range(num_iter):
        w = 1 / (1 - rho * rho / 4 * w)
        weights.append(w)
    return c, 1 - c * ridge_strength, weights


def distance_bound(num_iter: int, ridge_strength: float) -> float:
    """The largest distance of `num_iter` Chebyshev steps from the exact solution, as a share of the distance at their
    start, in the norm of the system: 1 / T_n((kappa + 1) / (kappa - 1)) with the condition number kappa (Saad,
    Iterative Methods for Sparse Linear Systems, section 6.11). It is 4e-4 for 30 steps and a ridge of 0.02."""
    return 1 / math.cosh(num_iter * math.acosh(1 + 2 * ridge_strength))


def inverse_norm(square: torch.Tensor, bp_lambda: bool) -> torch.Tensor:
    """1 / sqrt(square); where square is zero, the result and its gradient are zero."""
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


def squared_norms(k, starts, from_start, decay) -> torch.Tensor:
    """||C_t||_F^2 [N, H, C] of every token. All terms of the sum are non-negative, so nothing cancels."""
    fresh = ((decay @ (k @ k.mT).square()) * decay).sum(-1)
    mixed = decay @ ((k @ starts.mT) * k).sum(-1, keepdim=True)
    old = starts.square().sum((-2, -1))[..., None]
    return from_start.square() * old + 2 * from_start * mixed[..., 0] + fresh


class ChunkSolve(torch.autograd.Function):
    """z of a chunk's tokens: iterations z <- w (keep z - A_t z + q) + (1 - w) z_before from z = q, where
    A_t p = row_t C_0 p + sum_{s <= t} mask_ts k_s (k_s . p).

    q, k [G, C, K]; start [G, K, K]; row [G, C]; mask [G, C, C]. The iterates are not stored for the backward. It
    computes them again, for as many chunks at a time as a fixed amount of memory holds.
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
    @dispatch.backward
    def backward(ctx, grad_z):
        q, k, start, row, mask, *solution = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, start, row, mask)]
        stored = 1 if ctx.exact else len(ctx.weights)
        for at in _groups(q, 8 + 4 * stored):
            system = k[at], start[at], row[at], mask[at]
            if ctx.exact:
                # Transposed, because A_t is symmetric only if the initial state is.
                transposed = k[at], start[at].mT, row[at], mask[at]
                grad_q = _last(_iterates(grad_z[at], transposed, ctx.keep, ctx.weights))
                z, grad_product = solution[0][at, None], -grad_q[:, None]
            else:
                grad_q, z, grad_product = _adjoint(q[at], grad_z[at], system, ctx.keep, ctx.weights)
            grads[0][at] = grad_q
            for grad, value in zip(grads[1:], product_grads(z, grad_product, *system), strict=True):
                grad[at] = value
        return None, None, None, *grads


def _groups(q: torch.Tensor, stored: int) -> list[slice]:
    """Slices of G. `stored` tensors of a slice fit into a CPU's cache, or occupy a GPU."""
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
    """The backward of `_iterates`: the gradient of q [G, C, K], and for each product A z_n the argument z_n and the
    incoming gradient [G, steps, C, K]."""
    k, start, row, mask = system
    z = torch.stack(list(_iterates(q, system, keep, weights))[:-1], dim=1)
    grad_product = torch.empty_like(z)
    grad_q, later, grad = torch.zeros_like(q), None, grad_z
    for n in reversed(range(len(weights))):
        w = weights[n]
        torch.mul(grad, -w, out=grad_product[:, n])
        grad_q.add_(grad, alpha=w)
        # Transposed, because A_t is symmetric only if the initial state is.
        earlier = _product(grad, k, start.mT, row, mask).mul_(-w).add_(grad, alpha=w * keep)
        if later is not None:
            earlier.add_(later)
        later, grad = grad * (1 - w), earlier
    return grad_q.add_(grad), z, grad_product


def product_grads(z, grad, k, start, row, mask):
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
