# SPDX-License-Identifier: Apache-2.0
"""Gated KalmaNet's Triton kernels: the Chebyshev iterations of whole chunks with their gradient, and one decoded token.

They compute what `gka._Solve` and `gka.step` do. A program takes one chunk of one head: keys, the covariance at the
chunk's start and the iterate stay on the chip for all steps. No autotuning, and the steps are a loop at run time, so
a kernel compiles in seconds.

Products run on bfloat16 tensor cores and are nearly those of float32: a float32 factor is a sum of two bfloat16 numbers
to 2^-17, and three products of such parts are a product to the same precision. TF32's 2^-11 would not do: the solve
multiplies an error by up to the condition number, 1 + 1 / ridge_strength.

Legend: S sequences, C chunk_size, H heads, K/V key/value head dims, D the power of two >= K, G chunks of one head.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .gka import Result, State, coefficients

CHUNK_SIZE = 64
MAX_HEAD_DIM = 128  # of keys
RESIDENT = 2  # programs of a decode step on a multiprocessor at a time, by their registers
STORED = 2**30  # bytes for iterates and their gradients in the backward, at a time
AHEAD = 200 * 2**10  # bytes of shared memory for one block, where loads may run ahead


def unsupported(q: torch.Tensor, k: torch.Tensor) -> str | None:
    """Why the kernels cannot run for queries and keys [..., K], or None."""
    if q.dtype == torch.float64:
        return "the kernels compute in float32, not float64"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the kernels have no version for head_dim {q.shape[-1]} (at most {MAX_HEAD_DIM})"
    needed = 80 if _width(q.shape[-1]) <= 64 else 150 if k.dtype == torch.bfloat16 else 180
    if q.is_cuda and _shared_memory(q.device) < needed * 2**10:
        return f"the kernels need {needed} KiB of shared memory for head_dim {q.shape[-1]} in {k.dtype}"
    return None


@triton.jit
def _parts(x):
    """Two bfloat16 tensors whose sum is x to 2^-17, the first of them x rounded (in integers: conversions are slow)."""
    high = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def _dot(a, a_low, b, b_low, to, B_EXACT: tl.constexpr = False):
    """to + (a + a_low) @ (b + b_low), the smallest terms first; B_EXACT: b_low is zero."""
    to = tl.dot(a_low, b, to)
    if not B_EXACT:
        to = tl.dot(a, b_low, to)
    return tl.dot(a, b, to)


@triton.jit
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0)


@triton.jit
def _solve(
    q, k, start, row, mask, weights, z, iterates, keep, num_iter,
    STORE: tl.constexpr, EXACT_KEYS: tl.constexpr, K: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """z of queries q [G, C, K]; with STORE, also the iterates 0 ... num_iter - 1 in parts [G, num_iter, 2, C, K]."""
    chunk = tl.program_id(0).to(tl.int64)
    t, d, e = tl.arange(0, C), tl.arange(0, D), tl.arange(0, D)
    inside, at = (d < K)[None, :], t[:, None] * K + d[None, :]
    keys, keys_low = _parts(_load(k + chunk * C * K, at, inside))
    first, first_low = _parts(_load(start + chunk * K * K, e[:, None] * K + d[None, :], (e < K)[:, None] & inside))
    first, first_low = tl.trans(first), tl.trans(first_low)
    row_t = tl.load(row + chunk * C + t)
    mask_ts = tl.load(mask + chunk * C * C + t[:, None] * C + t[None, :])
    rhs = _load(q + chunk * C * K, at, inside)
    now, before = rhs, tl.zeros_like(rhs)
    iterates += chunk * num_iter * 2 * C * K
    for n in range(num_iter):
        w = tl.load(weights + n)
        x, x_low = _parts(now)
        if STORE:
            tl.store(iterates + at, x, mask=inside)
            tl.store(iterates + C * K + at, x_low, mask=inside)
            iterates += 2 * C * K
        within = _dot(x, x_low, tl.trans(keys), tl.trans(keys_low), tl.zeros([C, C], tl.float32), EXACT_KEYS)
        product = _dot(x, x_low, first, first_low, tl.zeros([C, D], tl.float32)) * row_t[:, None]
        within, within_low = _parts(within * mask_ts)
        product = _dot(within, within_low, keys, keys_low, product, EXACT_KEYS)
        new = w * (keep * now - product + rhs) + (1 - w) * before
        before = now
        now = new
    tl.store(z + chunk * C * K + at, now, mask=inside)


@triton.jit
def _adjoint(
    grad_z, k, start, row, mask, weights, iterates, grads, grad_q, grad_row, keep, num_iter,
    EXACT_KEYS: tl.constexpr, K: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """`_solve` in reverse: from grad_z the gradients of q and row, and of every iterate, in parts like `iterates`."""
    chunk = tl.program_id(0).to(tl.int64)
    t, d, e = tl.arange(0, C), tl.arange(0, D), tl.arange(0, D)
    inside, at = (d < K)[None, :], t[:, None] * K + d[None, :]
    keys, keys_low = _parts(_load(k + chunk * C * K, at, inside))
    first, first_low = _parts(_load(start + chunk * K * K, e[:, None] * K + d[None, :], (e < K)[:, None] & inside))
    row_t = tl.load(row + chunk * C + t)
    mask_ts = tl.load(mask + chunk * C * C + t[:, None] * C + t[None, :])
    grad = _load(grad_z + chunk * C * K, at, inside)
    later, total, of_row = tl.zeros_like(grad), tl.zeros_like(grad), tl.zeros_like(row_t)
    stored = (chunk + 1) * num_iter * 2 * C * K
    for n in range(num_iter):
        w = tl.load(weights + num_iter - 1 - n)
        stored -= 2 * C * K
        x, x_low = _parts(grad)
        tl.store(grads + stored + at, x, mask=inside)
        tl.store(grads + stored + C * K + at, x_low, mask=inside)
        total += w * grad
        within = _dot(x, x_low, tl.trans(keys), tl.trans(keys_low), tl.zeros([C, C], tl.float32), EXACT_KEYS)
        product = _dot(x, x_low, first, first_low, tl.zeros([C, D], tl.float32))
        z = _load(iterates + stored, at, inside).to(tl.float32)
        z += _load(iterates + stored + C * K, at, inside).to(tl.float32)
        of_row -= w * tl.sum(product * z, axis=1)
        within, within_low = _parts(within * mask_ts)
        product = _dot(within, within_low, keys, keys_low, product * row_t[:, None], EXACT_KEYS)
        earlier = w * (keep * grad - product) + later
        later = (1 - w) * grad
        grad = earlier
    tl.store(grad_q + chunk * C * K + at, total + grad, mask=inside)
    tl.store(grad_row + chunk * C + t, of_row)


@triton.jit
def _key_grads(
    k, mask, weights, iterates, grads, grad_k, grad_mask, num_iter,
    EXACT_KEYS: tl.constexpr, K: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and mask: sums over the steps of products of the iterates and their gradients."""
    chunk = tl.program_id(0).to(tl.int64)
    t, d = tl.arange(0, C), tl.arange(0, D)
    inside, at = (d < K)[None, :], t[:, None] * K + d[None, :]
    keys, keys_low = _parts(_load(k + chunk * C * K, at, inside))
    mask_ts = tl.load(mask + chunk * C * C + t[:, None] * C + t[None, :])
    of_keys, of_mask = tl.zeros([C, D], tl.float32), tl.zeros([C, C], tl.float32)
    iterates += chunk * num_iter * 2 * C * K
    grads += chunk * num_iter * 2 * C * K
    for n in range(num_iter):
        w = tl.load(weights + n)
        z, z_low = _load(iterates, at, inside), _load(iterates + C * K, at, inside)
        x, x_low = _load(grads, at, inside), _load(grads + C * K, at, inside)
        iterates += 2 * C * K
        grads += 2 * C * K
        along = _dot(z, z_low, tl.trans(keys), tl.trans(keys_low), tl.zeros([C, C], tl.float32), EXACT_KEYS)
        across = _dot(x, x_low, tl.trans(keys), tl.trans(keys_low), tl.zeros([C, C], tl.float32), EXACT_KEYS) * -w
        of_mask += along * across
        along, along_low = _parts(along * mask_ts * -w)
        of_keys = _dot(tl.trans(along), tl.trans(along_low), x, x_low, of_keys)
        across, across_low = _parts(across * mask_ts)
        of_keys = _dot(tl.trans(across), tl.trans(across_low), z, z_low, of_keys)
    tl.store(grad_k + chunk * C * K + at, of_keys, mask=inside)
    tl.store(grad_mask + chunk * C * C + t[:, None] * C + t[None, :], of_mask)


@triton.jit
def _start_grads(
    row, weights, iterates, grads, grad_start, num_iter, K: tl.constexpr, C: tl.constexpr, D: tl.constexpr
):
    """Gradient of the covariance at the chunk's start: the like sum."""
    chunk = tl.program_id(0).to(tl.int64)
    t, d, e = tl.arange(0, C), tl.arange(0, D), tl.arange(0, D)
    inside, at = (d < K)[None, :], t[:, None] * K + d[None, :]
    row_t = tl.load(row + chunk * C + t)
    of_start = tl.zeros([D, D], tl.float32)
    iterates += chunk * num_iter * 2 * C * K
    grads += chunk * num_iter * 2 * C * K
    for n in range(num_iter):
        w = tl.load(weights + n)
        z, z_low = _load(iterates, at, inside), _load(iterates + C * K, at, inside)
        x = _load(grads, at, inside).to(tl.float32) + _load(grads + C * K, at, inside).to(tl.float32)
        iterates += 2 * C * K
        grads += 2 * C * K
        x, x_low = _parts(x * (row_t * -w)[:, None])
        of_start = _dot(tl.trans(x), tl.trans(x_low), z, z_low, of_start)
    tl.store(grad_start + chunk * K * K + e[:, None] * K + d[None, :], of_start, mask=(e < K)[:, None] & inside)


class Solve(torch.autograd.Function):
    """`gka._Solve` on CUDA: q, k [G, C, K]; start [G, K, K]; row [G, C]; mask [G, C, C], all float32 -> z [G, C, K].

    exact_keys: k holds numbers of bfloat16, which spares a third of their products. The backward runs the iterations
    again, for as many G at a time as `STORED` bytes hold.
    """

    @staticmethod
    def forward(ctx, exact_keys, num_iter, ridge_strength, q, k, start, row, mask):
        q, k, start, row, mask = (x.contiguous() for x in (q, k, start, row, mask))
        ctx.save_for_backward(q, k, start, row, mask)
        ctx.options = exact_keys, num_iter, ridge_strength
        keep, weights = _steps(num_iter, ridge_strength, q.device)
        z = torch.empty_like(q)
        if len(q):
            with torch.cuda.device_of(q):
                _solve[len(q),](
                    q, k, start, row, mask, weights, z, z, keep, num_iter,
                    STORE=False, EXACT_KEYS=exact_keys, **_launch(q), num_stages=1,
                )  # fmt: skip
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_z):
        q, k, start, row, mask = ctx.saved_tensors
        exact_keys, num_iter, ridge_strength = ctx.options
        keep, weights = _steps(num_iter, ridge_strength, q.device)
        grad_z = grad_z.contiguous()
        grad_q, grad_k, grad_start, grad_row, grad_mask = (torch.empty_like(x) for x in (q, k, start, row, mask))
        size = max(1, STORED // (2 * num_iter * q.shape[1] * q.shape[2] * 4))
        iterates, grads = q.new_empty(2, min(size, len(q)), num_iter, 2, *q.shape[1:], dtype=torch.bfloat16)
        stages = 2 if _shared_memory(q.device) >= AHEAD else 1
        with torch.cuda.device_of(q):
            for first in range(0, len(q), size):
                at = slice(first, first + size)
                grid, launch = (len(q[at]),), _launch(q)
                system, sums = (k[at], start[at], row[at], mask[at], weights), (weights, iterates, grads)
                _solve[grid](
                    q[at], *system, grad_q[at], iterates, keep, num_iter,  # z once more, to be overwritten
                    STORE=True, EXACT_KEYS=exact_keys, **launch, num_stages=1,
                )  # fmt: skip
                _adjoint[grid](
                    grad_z[at], *system, iterates, grads, grad_q[at], grad_row[at], keep, num_iter,
                    EXACT_KEYS=exact_keys, **launch, num_stages=1,
                )  # fmt: skip
                _key_grads[grid](
                    k[at], mask[at], *sums, grad_k[at], grad_mask[at], num_iter,
                    EXACT_KEYS=exact_keys, **launch, num_stages=stages,
                )  # fmt: skip
                _start_grads[grid](row[at], *sums, grad_start[at], num_iter, **launch, num_stages=stages)
        return None, None, None, grad_q, grad_k, grad_start, grad_row, grad_mask


def _launch(q: torch.Tensor) -> dict[str, int]:
    _, size, key_dim = q.shape
    width = _width(key_dim)
    return {"K": key_dim, "C": size, "D": width, "num_warps": 8 if width > 64 else 4}


def _width(head_dim: int) -> int:
    """The least tile that holds `head_dim` and that a tensor core takes."""
    return max(16, triton.next_power_of_2(head_dim))


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one block may use, 0 on a CPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 0


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """0 on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


@functools.cache
def _steps(num_iter: int, ridge_strength: float, device: torch.device) -> tuple[float, torch.Tensor]:
    """What a step keeps, and the steps' weights [num_iter] (one more, so that there is always a tensor)."""
    _, keep, weights = coefficients(num_iter, ridge_strength)
    return keep, torch.tensor([*weights, 0.0], dtype=torch.float32, device=device)


@triton.jit
def _fetch_early(state, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Start to bring a state of SIZE values, at most WIDE, into the L2 cache, and go on."""
    LINE: tl.constexpr = 1024 // state.dtype.element_ty.primitive_bitwidth  # values in 128 bytes
    lines = state + tl.minimum(tl.arange(0, WIDE // LINE) * LINE, SIZE - 1)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], tl.int32, False, 1)


@triton.jit
def _step(
    q, k, v, g, gk, alpha, beta, C, U, o, C_out, U_out, slots, weights,
    q_row, k_row, v_row, C_slot, U_slot, null_slot, eps, c, keep, scale, num_iter,
    NORMALISE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, STATE: tl.constexpr, POOL: tl.constexpr,
    H: tl.constexpr, QUERY_GROUP: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, INNER: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One token of one sequence and head: the covariance stays in registers for all steps.

    Its columns are two axes of the tile, [rows, D / INNER, INNER]: so the sum over them stays within a few threads.
    The solve moves nothing. So that memory is not idle meanwhile, what comes after it is fetched before: the values'
    state, and in a pool the covariance of the program AHEAD of this one, which follows it on the multiprocessor.
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
        old = _load(C + C_at, row * K + column, inside).to(tl.float32)
        if AHEAD > 0:
            _fetch_early(U + U_at, K * V, D * DV)
            later = at + AHEAD
            if POOL and later < tl.num_programs(0):
                slot = tl.load(slots + later // H).to(tl.int64)
                _fetch_early(C + slot * C_slot + later % H * K * K, K * K, D * D)
    key = _load(k + sequence * k_row + (head // KEY_GROUP) * K, i, i < K).to(tl.float32)
    rhs = _load(q + sequence * q_row + (head // QUERY_GROUP) * K, i, i < K).to(tl.float32)
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
    value = _load(v + sequence * v_row + (head // VALUE_GROUP) * V, u, u < V).to(tl.float32)
    if BETA:
        value *= tl.load(beta + at).to(tl.float32)
    state = key[:, None] * value[None, :]
    if STATE:
        old = _load(U + U_at, i[:, None] * V + u[None, :], inside).to(tl.float32)
        state += tl.exp(tl.load(g + at).to(tl.float32)) * old
    tl.store(U_out + U_at + i[:, None] * V + u[None, :], state.to(U_out.dtype.element_ty), mask=inside)
    tl.store(o + at * V + u, (scale * tl.sum(state * query[:, None], axis=0)).to(o.dtype.element_ty), mask=u < V)


def step(
    q, k, v, g, gk, alpha, state: State | None, *, num_iter, ridge_strength, rescale,
    beta: torch.Tensor | None = None, eps: float | None = None,
    slots: torch.Tensor | None = None, null_slot: int = 0,
) -> Result:  # fmt: skip
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
    keep, weights = _steps(num_iter, ridge_strength, q.device)
    with torch.cuda.device_of(q):
        _step[sequences * heads,](
            q, k, v, g, gk, g if alpha is None else alpha, g if beta is None else beta, C, U, o, C_out, U_out,
            g if slots is None else slots, weights, q.stride(0), k.stride(0), v.stride(0), C_out.stride(0),
            U_out.stride(0), null_slot, eps or 0.0, c, keep, key_dim**-0.5 if rescale else 1.0, num_iter,
            NORMALISE=eps is not None, ALPHA=alpha is not None, BETA=beta is not None, STATE=state is not None,
            POOL=slots is not None, H=heads, QUERY_GROUP=heads // q.shape[1], KEY_GROUP=heads // k.shape[1],
            VALUE_GROUP=heads // v.shape[1], K=key_dim, V=value_dim, D=_width(key_dim), DV=_width(value_dim),
            INNER=min(32, _width(key_dim)), AHEAD=RESIDENT * _multiprocessors(q.device), num_warps=8, maxnreg=128,
        )  # fmt: skip
    return o, (C_out, U_out)
