# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of Gated KalmaNet for training: the Chebyshev iterations of whole chunks, forward and backward.

They compute the same as `gka_solve.ChunkSolve`. A program takes one chunk of one head: keys, the covariance at the
chunk's start and the iterate stay in registers and shared memory during all iterations. There is no autotuning, and the
iterations are a loop at run time, so that a kernel compiles in seconds.

Products run on bfloat16 tensor cores with nearly the precision of float32: a float32 factor is the sum of two bfloat16
numbers with an error of 2^-17, and three products of such parts have the same precision. TF32's 2^-11 is not enough,
because the solve amplifies an error by up to the condition number, 1 + 1 / ridge_strength.

Legend: C chunk_size, K key head dim, D the power of two >= K, G chunks of one head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import dispatch
from .gka_solve import product_grads
from .gka_triton_common import load, shared_memory, split, step_weights, tile_width

CHUNK_SIZE = 64
MAX_HEAD_DIM = 128  # of keys
STORED = 2**30  # bytes for the iterates and their gradients that the backward holds at a time
AHEAD = 200 * 2**10  # bytes of shared memory per block from which on loads are pipelined (num_stages=2)


def unsupported(q: torch.Tensor, k: torch.Tensor) -> str | None:
    """The reason why the kernels cannot run for queries and keys [..., K], or None."""
    if q.dtype == torch.float64:
        return "the kernels compute in float32, not float64"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the kernels have no version for head_dim {q.shape[-1]} (at most {MAX_HEAD_DIM})"
    needed = 80 if tile_width(q.shape[-1]) <= 64 else 150 if k.dtype == torch.bfloat16 else 180
    if q.is_cuda and shared_memory(q.device) < needed * 2**10:
        return f"the kernels need {needed} KiB of shared memory for head_dim {q.shape[-1]} in {k.dtype}"
    return None


@triton.jit
def _dot(a, a_low, b, b_low, to, B_EXACT: tl.constexpr = False):
    """to + (a + a_low) @ (b + b_low), without a_low @ b_low, smallest terms first; B_EXACT: b_low is zero."""
    to = tl.dot(a_low, b, to)
    if not B_EXACT:
        to = tl.dot(a, b_low, to)
    return tl.dot(a, b, to)


@triton.jit
def _solve(
    q,
    k,
    start,
    row,
    mask,
    weights,
    z,
    iterates,
    keep,
    num_iter,
    STORE: tl.constexpr,
    EXACT_KEYS: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
):
    """z of queries q [G, C, K]; with STORE also the iterates 0 ... num_iter - 1, each as two bfloat16 numbers
    [G, num_iter, 2, C, K]."""
    chunk = tl.program_id(0).to(tl.int64)
    t, d, e = tl.arange(0, C), tl.arange(0, D), tl.arange(0, D)
    inside, at = (d < K)[None, :], t[:, None] * K + d[None, :]
    keys, keys_low = split(load(k + chunk * C * K, at, inside))
    first, first_low = split(load(start + chunk * K * K, e[:, None] * K + d[None, :], (e < K)[:, None] & inside))
    first, first_low = tl.trans(first), tl.trans(first_low)
    row_t = tl.load(row + chunk * C + t)
    mask_ts = tl.load(mask + chunk * C * C + t[:, None] * C + t[None, :])
    rhs = load(q + chunk * C * K, at, inside)
    now, before = rhs, tl.zeros_like(rhs)
    iterates += chunk * num_iter * 2 * C * K
    for n in range(num_iter):
        w = tl.load(weights + n)
        x, x_low = split(now)
        if STORE:
            tl.store(iterates + at, x, mask=inside)
            tl.store(iterates + C * K + at, x_low, mask=inside)
            iterates += 2 * C * K
        within = _dot(x, x_low, tl.trans(keys), tl.trans(keys_low), tl.zeros([C, C], tl.float32), EXACT_KEYS)
        product = _dot(x, x_low, first, first_low, tl.zeros([C, D], tl.float32)) * row_t[:, None]
        within, within_low = split(within * mask_ts)
        product = _dot(within, within_low, keys, keys_low, product, EXACT_KEYS)
        new = w * (keep * now - product + rhs) + (1 - w) * before
        before = now
        now = new
    tl.store(z + chunk * C * K + at, now, mask=inside)


@triton.jit
def _adjoint(
    grad_z,
    k,
    start,
    row,
    mask,
    weights,
    iterates,
    grads,
    grad_q,
    grad_row,
    keep,
    num_iter,
    EXACT_KEYS: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
):
    """The backward of `_solve`: from grad_z the gradients of q, of row and of every iterate, stored like `iterates`."""
    chunk = tl.program_id(0).to(tl.int64)
    t, d, e = tl.arange(0, C), tl.arange(0, D), tl.arange(0, D)
    inside, at = (d < K)[None, :], t[:, None] * K + d[None, :]
    keys, keys_low = split(load(k + chunk * C * K, at, inside))
    first, first_low = split(load(start + chunk * K * K, e[:, None] * K + d[None, :], (e < K)[:, None] & inside))
    row_t = tl.load(row + chunk * C + t)
    mask_ts = tl.load(mask + chunk * C * C + t[:, None] * C + t[None, :])
    grad = load(grad_z + chunk * C * K, at, inside)
    later, total, of_row = tl.zeros_like(grad), tl.zeros_like(grad), tl.zeros_like(row_t)
    stored = (chunk + 1) * num_iter * 2 * C * K
    for n in range(num_iter):
        w = tl.load(weights + num_iter - 1 - n)
        stored -= 2 * C * K
        x, x_low = split(grad)
        tl.store(grads + stored + at, x, mask=inside)
        tl.store(grads + stored + C * K + at, x_low, mask=inside)
        total += w * grad
        within = _dot(x, x_low, tl.trans(keys), tl.trans(keys_low), tl.zeros([C, C], tl.float32), EXACT_KEYS)
        product = _dot(x, x_low, first, first_low, tl.zeros([C, D], tl.float32))
        z = load(iterates + stored, at, inside).to(tl.float32)
        z += load(iterates + stored + C * K, at, inside).to(tl.float32)
        of_row -= w * tl.sum(product * z, axis=1)
        within, within_low = split(within * mask_ts)
        product = _dot(within, within_low, keys, keys_low, product * row_t[:, None], EXACT_KEYS)
        earlier = w * (keep * grad - product) + later
        later = (1 - w) * grad
        grad = earlier
    tl.store(grad_q + chunk * C * K + at, total + grad, mask=inside)
    tl.store(grad_row + chunk * C + t, of_row)


@triton.jit
def _key_grads(
    k,
    mask,
    weights,
    iterates,
    grads,
    grad_k,
    grad_mask,
    num_iter,
    EXACT_KEYS: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
):
    """Gradients of keys and mask: sums over the iterations of products of the iterates and their gradients."""
    chunk = tl.program_id(0).to(tl.int64)
    t, d = tl.arange(0, C), tl.arange(0, D)
    inside, at = (d < K)[None, :], t[:, None] * K + d[None, :]
    keys, keys_low = split(load(k + chunk * C * K, at, inside))
    mask_ts = tl.load(mask + chunk * C * C + t[:, None] * C + t[None, :])
    of_keys, of_mask = tl.zeros([C, D], tl.float32), tl.zeros([C, C], tl.float32)
    iterates += chunk * num_iter * 2 * C * K
    grads += chunk * num_iter * 2 * C * K
    for n in range(num_iter):
        w = tl.load(weights + n)
        z, z_low = load(iterates, at, inside), load(iterates + C * K, at, inside)
        x, x_low = load(grads, at, inside), load(grads + C * K, at, inside)
        iterates += 2 * C * K
        grads += 2 * C * K
        along = _dot(z, z_low, tl.trans(keys), tl.trans(keys_low), tl.zeros([C, C], tl.float32), EXACT_KEYS)
        across = _dot(x, x_low, tl.trans(keys), tl.trans(keys_low), tl.zeros([C, C], tl.float32), EXACT_KEYS) * -w
        of_mask += along * across
        along, along_low = split(along * mask_ts * -w)
        of_keys = _dot(tl.trans(along), tl.trans(along_low), x, x_low, of_keys)
        across, across_low = split(across * mask_ts)
        of_keys = _dot(tl.trans(across), tl.trans(across_low), z, z_low, of_keys)
    tl.store(grad_k + chunk * C * K + at, of_keys, mask=inside)
    tl.store(grad_mask + chunk * C * C + t[:, None] * C + t[None, :], of_mask)


@triton.jit
def _start_grads(
    row, weights, iterates, grads, grad_start, num_iter, K: tl.constexpr, C: tl.constexpr, D: tl.constexpr
):
    """Gradient of the covariance at the chunk's start: a sum over the iterations as in `_key_grads`."""
    chunk = tl.program_id(0).to(tl.int64)
    t, d, e = tl.arange(0, C), tl.arange(0, D), tl.arange(0, D)
    inside, at = (d < K)[None, :], t[:, None] * K + d[None, :]
    row_t = tl.load(row + chunk * C + t)
    of_start = tl.zeros([D, D], tl.float32)
    iterates += chunk * num_iter * 2 * C * K
    grads += chunk * num_iter * 2 * C * K
    for n in range(num_iter):
        w = tl.load(weights + n)
        z, z_low = load(iterates, at, inside), load(iterates + C * K, at, inside)
        x = load(grads, at, inside).to(tl.float32) + load(grads + C * K, at, inside).to(tl.float32)
        iterates += 2 * C * K
        grads += 2 * C * K
        x, x_low = split(x * (row_t * -w)[:, None])
        of_start = _dot(tl.trans(x), tl.trans(x_low), z, z_low, of_start)
    tl.store(grad_start + chunk * K * K + e[:, None] * K + d[None, :], of_start, mask=(e < K)[:, None] & inside)


class Solve(torch.autograd.Function):
    """`ChunkSolve` on CUDA: q, k [G, C, K]; start [G, K, K]; row [G, C]; mask [G, C, C], all float32 -> z [G, C, K].

    exact_keys: the values of k are bfloat16 numbers, which saves a third of the products with k.
    exact_backward: as in `gka.chunked`. Otherwise the backward computes the iterations again, for as many chunks at a
    time as `STORED` bytes hold.
    """

    @staticmethod
    def forward(ctx, exact_keys, exact_backward, num_iter, ridge_strength, q, k, start, row, mask):
        q, k, start, row, mask = (x.contiguous() for x in (q, k, start, row, mask))
        ctx.options = exact_keys, exact_backward, num_iter, ridge_strength
        z = _solved(q, k, start, row, mask, exact_keys, num_iter, ridge_strength)
        ctx.save_for_backward(z if exact_backward else q, k, start, row, mask)
        return z

    @staticmethod
    @dispatch.backward
    def backward(ctx, grad_z):
        q, k, start, row, mask = ctx.saved_tensors
        exact_keys, exact_backward, num_iter, ridge_strength = ctx.options
        if exact_backward:
            transposed = start.mT.contiguous()
            grad_q = _solved(grad_z.contiguous(), k, transposed, row, mask, exact_keys, num_iter, ridge_strength)
            system = product_grads(q[:, None], -grad_q[:, None], k, start, row, mask)  # q is the solution here
            return None, None, None, None, grad_q, *system
        keep, weights = step_weights(num_iter, ridge_strength, q.device)
        grad_z = grad_z.contiguous()
        grad_q, grad_k, grad_start, grad_row, grad_mask = (torch.empty_like(x) for x in (q, k, start, row, mask))
        size = max(1, STORED // (2 * num_iter * q.shape[1] * q.shape[2] * 4))
        iterates, grads = q.new_empty(2, min(size, len(q)), num_iter, 2, *q.shape[1:], dtype=torch.bfloat16)
        stages = 2 if shared_memory(q.device) >= AHEAD else 1
        with torch.cuda.device_of(q):
            for first in range(0, len(q), size):
                at = slice(first, first + size)
                grid, launch = (len(q[at]),), _launch(q)
                system, sums = (k[at], start[at], row[at], mask[at], weights), (weights, iterates, grads)
                _solve[grid](
                    q[at],
                    *system,
                    grad_q[at],
                    iterates,
                    keep,
                    num_iter,  # z once more, to be overwritten
                    STORE=True,
                    EXACT_KEYS=exact_keys,
                    **launch,
                    num_stages=1,
                )
                _adjoint[grid](
                    grad_z[at],
                    *system,
                    iterates,
                    grads,
                    grad_q[at],
                    grad_row[at],
                    keep,
                    num_iter,
                    EXACT_KEYS=exact_keys,
                    **launch,
                    num_stages=1,
                )
                _key_grads[grid](
                    k[at],
                    mask[at],
                    *sums,
                    grad_k[at],
                    grad_mask[at],
                    num_iter,
                    EXACT_KEYS=exact_keys,
                    **launch,
                    num_stages=stages,
                )
                _start_grads[grid](row[at], *sums, grad_start[at], num_iter, **launch, num_stages=stages)
        return None, None, None, None, grad_q, grad_k, grad_start, grad_row, grad_mask


def _solved(q, k, start, row, mask, exact_keys: bool, num_iter: int, ridge_strength: float) -> torch.Tensor:
    """z of `_solve`, without the iterates."""
    keep, weights = step_weights(num_iter, ridge_strength, q.device)
    z = torch.empty_like(q)
    if len(q):
        with torch.cuda.device_of(q):
            _solve[len(q),](
                q,
                k,
                start,
                row,
                mask,
                weights,
                z,
                z,
                keep,
                num_iter,
                STORE=False,
                EXACT_KEYS=exact_keys,
                **_launch(q),
                num_stages=1,
            )
    return z


def _launch(q: torch.Tensor) -> dict[str, int]:
    _, size, key_dim = q.shape
    width = tile_width(key_dim)
    return {"K": key_dim, "C": size, "D": width, "num_warps": 8 if width > 64 else 4}
