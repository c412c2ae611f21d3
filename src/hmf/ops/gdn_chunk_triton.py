# SPDX-License-Identifier: Apache-2.0
"""Three Triton kernels for the prefill of the gated delta rule, for bfloat16 or float16 tokens, without gradients.

With the notation of `hmf.ops.gdn`, b the log decay since the start of a chunk and S the state there, a chunk is:
    T = (1 + A)^-1,  A[t, s] = beta_t exp(b_t - b_s) k_t . k_s for s < t
    W = T (beta exp(b) k),  U = T (beta v),  u = U - W S                          (the corrected values)
    o = scale (exp(b) q S + (q k^T * exp(b_t - b_s), s <= t) u),  S <- exp(b_last) S + (exp(b_last - b) k)^T u

`_prepare` computes W and U, `_states` advances the states of a sequence and head over its chunks, and `_outputs`
computes o. Only `_states` is sequential, so it does nothing else. q and k are normalised inside, and heads that share
keys or values are not expanded.

What is fused follows from 16,384 tokens of 32 heads of 128, which are 8,192 chunks of a head, on an H200:
- The products are 0.1 TFLOP, 0.2 ms at half of the peak. W, U, u and the states at the chunks' starts are 0.67 GB,
  written and read once, and q, k, v and o 0.4 GB: 0.45 ms. T, scores and norms of queries stay in registers.
- `_states` has 128 programs of 32 columns for one document, for 132 multiprocessors. Each of its 256 steps is two
  dependent products with their rounding, about 1,300 cycles: 0.2 ms. Loads do not depend on the state, and are issued
  ahead in three stages of 36 KiB. The outputs are not computed there, because that would lengthen every step.

Precision: W, U, u and the states that products read are numbers of the tokens' dtype. T is rounded to it last; before,
it is computed in float32 and by products of float16 numbers, or of pairs of these for float16 tokens. The state itself,
decays and all sums are float32. All exponents are differences of cumulated logs that are at most 0.

Legend: N tokens, S sequences, G chunks, C chunk_size, H heads, K/V key/value head dims, D the power of two >= K.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .gka_triton_common import halves, load, multiprocessors, shared_memory, tile_width
from .varlen import packed_chunks

CHUNK_SIZE = 64
BLOCK = 16  # rows of a block that `_inverse` solves by substitution
# Narrower heads are padded to this width, because Triton 3.6 compiled products of tiles of 16 columns for Hopper to
# reads outside of shared memory (see `gka_chunk_triton`).
NARROWEST = 64


class Launch(NamedTuple):
    columns: int | None  # of a state or of an output that one program computes; None: all
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers of a thread


# Chosen by the reasoning above and by what the compiler reports for Hopper with heads of 128. `states` is for programs
# that have a multiprocessor each, and `many_states` for more. The last four are of `gdn_grads_triton`.
LAUNCH = {
    "prepare": Launch(None, 4, 1, 168),  # 32 KiB: three programs on a multiprocessor; 196 registers without the limit
    "states": Launch(32, 4, 3),  # 117 KiB
    "many_states": Launch(64, 4, 2),  # 97 KiB and 242 registers: two programs, with half the reads of keys and W
    "outputs": Launch(64, 4, 1),  # 33 KiB and 154 registers: three programs; with 128 columns 224 registers
    "value_grads": Launch(64, 4, 1),  # 32 KiB and 100 registers: five programs
    "state_grads": Launch(32, 4, 2),  # 117 KiB
    "many_state_grads": Launch(64, 4, 2),  # 137 KiB
    "system_grads": Launch(64, 4, 1),
}
SHARED_MEMORY = 137  # KiB of a block, the most of these


@triton.jit
def _inverse_norms(x, eps):
    """1 / sqrt(sum x^2 + eps) of each row of x [C, D]."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, axis=1) + eps)


@triton.jit
def decays(log_decay, t, s):
    """exp(b_t - b_s) for s <= t and 0 for s > t, from b [C]."""
    return tl.exp(tl.where(t >= s, log_decay[:, None] - log_decay[None, :], float("-inf")))


@triton.jit
def _product(x, y, PAIRS: tl.constexpr):
    """x y of float32 [C, C] with entries up to 65504, by one product of float16 numbers, or three for pairs of them."""
    if PAIRS:
        x, x_low = halves(x)
        y, y_low = halves(y)
        return tl.dot(x, y, tl.dot(x_low, y, tl.dot(x, y_low)))
    else:
        return tl.dot(x.to(tl.float16), y.to(tl.float16))


@triton.jit
def _inverse(A, t, s, SIZE: tl.constexpr, BLOCK: tl.constexpr, DOUBLINGS: tl.constexpr, PAIRS: tl.constexpr):
    """(1 + A)^-1 of a strictly lower triangular A [C, C] with rows t [C, 1] and columns s [1, C].

    The blocks on the diagonal are solved together by substitution, a column at a time. Then their size doubles: the
    inverse of ((a, 0), (c, d)) is ((a^-1, 0), (-d^-1 c a^-1, d^-1)). With normalised keys and beta up to 2, no entry of
    an inverse is above 2, because it is an entry of a contraction times beta.
    """
    COUNT: tl.constexpr = SIZE // BLOCK
    n, i = tl.arange(0, COUNT), tl.arange(0, BLOCK)
    diagonal = n[:, None, None, None] == n[None, None, :, None]
    row, column = i[None, :, None], i[None, None, :]
    below = tl.sum(tl.where(diagonal, tl.reshape(A, [COUNT, BLOCK, COUNT, BLOCK]), 0.0), axis=2)
    solved = tl.where(row == column, 1.0, tl.zeros_like(below))
    for j in range(BLOCK - 1):
        factor = tl.sum(tl.where(column == j, below, 0.0), axis=2)
        solved -= factor[:, :, None] * tl.sum(tl.where(row == j, solved, 0.0), axis=1)[:, None, :]
    inverse = tl.reshape(tl.where(diagonal, solved[:, :, None, :], 0.0), [SIZE, SIZE])
    for doubling in tl.static_range(DOUBLINGS):
        x, y = t // (BLOCK << doubling), s // (BLOCK << doubling)
        between = (x != y) & (x // 2 == y // 2)
        inverse -= _product(inverse, _product(tl.where(between, A, 0.0), inverse, PAIRS), PAIRS)
    return inverse


@triton.jit(do_not_specialize=["sequences"])
def _prepare(
    k,
    v,
    g,
    beta,
    unit,
    w,
    u,
    share,
    total,
    inverses,
    cumulated,
    bounds,
    chunks,
    sequence_of,
    k_row,
    v_row,
    unit_row,
    sequences,
    eps,
    NORMALISE: tl.constexpr,
    KEEP: tl.constexpr,
    H: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
):
    """For one chunk and head: W, U, the decays from each token to the chunk's end (`share`) and over the whole chunk
    (`total`), and the normalised keys, rounded as in the layer. With KEEP also T and b, to the base 2."""
    chunk, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    sequence = tl.load(sequence_of + chunk)
    if sequence >= sequences:  # there are at most so many chunks as programs
        return
    first = tl.load(bounds + sequence) + (chunk - tl.load(chunks + sequence)) * SIZE
    stop = tl.load(bounds + sequence + 1)
    i, d, e = tl.arange(0, SIZE), tl.arange(0, D), tl.arange(0, B)
    t, s = i[:, None], i[None, :]
    there, row = first + i < stop, first * H + head
    in_key, in_value = there[:, None] & (d < K)[None, :], there[:, None] & (e < V)[None, :]
    log_decay = load(g + row, i * H, there)
    strength = load(beta + row, i * H, there)
    whole = tl.sum(log_decay, axis=0)
    log_decay = tl.cumsum(log_decay, axis=0)
    tl.store(share + row + i * H, tl.exp(tl.minimum(whole - log_decay, 0.0)), mask=there)
    tl.store(total + chunk * H + head, tl.exp(whole))

    key = load(k + first * k_row + (head // KEY_GROUP) * K, t * k_row + d[None, :], in_key)
    if NORMALISE:
        key = (key.to(tl.float32) * _inverse_norms(key, eps)[:, None]).to(key.dtype)
        if head % KEY_GROUP == 0:  # one of the heads that share the key
            tl.store(unit + first * unit_row + (head // KEY_GROUP) * K + t * unit_row + d[None, :], key, mask=in_key)
    A = tl.dot(key, tl.trans(key)) * strength[:, None]
    A = tl.where(t > s, A * decays(log_decay, t, s), 0.0)
    solve = _inverse(A, t, s, SIZE, BLOCK, DOUBLINGS, PAIRS)
    if KEEP:
        at = inverses + (chunk * H + head) * SIZE * SIZE + t * SIZE + s
        tl.store(at, solve.to(inverses.dtype.element_ty))
        tl.store(cumulated + row + i * H, log_decay * 1.4426950408889634, mask=there)
    solve *= strength[None, :]
    value = load(v + first * v_row + (head // VALUE_GROUP) * V, t * v_row + e[None, :], in_value)
    result = tl.dot(solve.to(value.dtype), value)
    tl.store(u + row * V + t * (H * V) + e[None, :], result.to(u.dtype.element_ty), mask=in_value)
    result = tl.dot((solve * tl.exp(log_decay)[None, :]).to(key.dtype), key)
    tl.store(w + row * K + t * (H * K) + d[None, :], result.to(w.dtype.element_ty), mask=in_key)


@triton.jit
def _states(
    unit,
    w,
    u,
    share,
    total,
    state,
    starts,
    out,
    bounds,
    chunks,
    unit_row,
    STATE: tl.constexpr,
    H: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
):
    """Some columns of the state of one sequence and head. Writes the state at every chunk's start, and u in place of U.

    The state is [V, K] in `state` and `out`, and [K, V] in `starts`.
    """
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, d, e = tl.arange(0, SIZE), tl.arange(0, D), part * B + tl.arange(0, B)
    in_key, in_value = (d < K)[None, :], (e < V)[None, :]
    inside = (d < K)[:, None] & in_value
    slot = (sequence * H + head) * K * V + e[None, :] * K + d[:, None]
    now = tl.zeros([D, B], tl.float32)
    if STATE:
        now += load(state, slot, inside).to(tl.float32)
    first, stop = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    chunk = tl.load(chunks + sequence).to(tl.int64) * H + head
    carry = tl.load(total + chunk)
    for token in range(first, stop, SIZE):
        at = tl.cast(token, tl.int64)
        row, real = at * H + head, (token + i < stop)[:, None]
        met = load(w + row * K, i[:, None] * (H * K) + d[None, :], real & in_key)
        value = load(u + row * V, i[:, None] * (H * V) + e[None, :], real & in_value)
        key = load(unit + at * unit_row + (head // KEY_GROUP) * K, i[:, None] * unit_row + d[None, :], real & in_key)
        decay = load(share + row, i * H, token + i < stop)
        rounded = now.to(met.dtype)
        tl.store(starts + chunk * K * V + d[:, None] * V + e[None, :], rounded, mask=inside)
        corrected = value.to(tl.float32) - tl.dot(met, rounded)
        at = u + row * V + i[:, None] * (H * V) + e[None, :]
        tl.store(at, corrected.to(u.dtype.element_ty), mask=real & in_value)
        now = tl.dot(tl.trans(key), (corrected * decay[:, None]).to(key.dtype), now * carry)
        chunk += H
        carry = tl.load(total + chunk)  # of the next chunk, as the compiler does not load a scalar ahead
    tl.store(out + slot, now, mask=inside)


@triton.jit(do_not_specialize=["sequences"])
def _outputs(
    q,
    unit,
    u,
    g,
    starts,
    o,
    bounds,
    chunks,
    sequence_of,
    q_row,
    unit_row,
    sequences,
    eps,
    scale,
    NORMALISE: tl.constexpr,
    H: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
):
    """Some columns of o of one chunk and head."""
    PARTS: tl.constexpr = (V + B - 1) // B
    part, head = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % H
    chunk = (tl.program_id(0) // (PARTS * H)).to(tl.int64)
    sequence = tl.load(sequence_of + chunk)
    if sequence >= sequences:
        return
    first = tl.load(bounds + sequence) + (chunk - tl.load(chunks + sequence)) * SIZE
    stop = tl.load(bounds + sequence + 1)
    i, d, j, e = tl.arange(0, SIZE), tl.arange(0, D), tl.arange(0, D), part * B + tl.arange(0, B)
    t, s = i[:, None], i[None, :]
    there, row = first + i < stop, first * H + head
    in_key, in_value = there[:, None] & (d < K)[None, :], there[:, None] & (e < V)[None, :]
    query = load(q + first * q_row + (head // QUERY_GROUP) * K, t * q_row + d[None, :], in_key)
    key = load(unit + first * unit_row + (head // KEY_GROUP) * K, t * unit_row + d[None, :], in_key)
    log_decay = tl.cumsum(load(g + row, i * H, there), axis=0)
    scores = (tl.dot(query, tl.trans(key)) * decays(log_decay, t, s)).to(query.dtype)
    in_state = (j < K)[:, None] & (e < V)[None, :]
    state = load(starts + (chunk * H + head) * K * V, j[:, None] * V + e[None, :], in_state)
    result = tl.dot(query, state) * tl.exp(log_decay)[:, None]
    value = load(u + row * V, t * (H * V) + e[None, :], in_value)
    result = tl.dot(scores, value, result)
    result *= scale
    if NORMALISE:  # the norm of a query is a factor of its output
        result *= _inverse_norms(query, eps)[:, None]
    tl.store(o + row * V + t * (H * V) + e[None, :], result.to(o.dtype.element_ty), mask=in_value)


def unsupported(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """The reason why these kernels cannot run for tokens of `dtype` with heads of at most `head_dim`, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return "its kernels support only bfloat16 and float16"
    if head_dim > 128:
        return "its kernels support heads of at most 128"
    if device.type == "cuda" and shared_memory(device) < SHARED_MEMORY * 2**10:
        return f"a block has less than {SHARED_MEMORY} KiB of shared memory"
    return None


def launch(kernel: str, k: torch.Tensor, v: torch.Tensor, heads: int) -> dict[str, Any]:
    """The shapes and options of a kernel for k [N, Hk, K] and v [N, Hv, V]."""
    width, value_width = (max(NARROWEST, tile_width(x.shape[-1])) for x in (k, v))
    columns, num_warps, num_stages, maxnreg = LAUNCH[kernel]
    shapes = {"H": heads, "K": k.shape[-1], "V": v.shape[-1], "SIZE": CHUNK_SIZE, "D": width}
    shapes |= {"KEY_GROUP": heads // k.shape[1], "B": min(columns or value_width, value_width)}
    return shapes | {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}


def parts(options: dict[str, Any]) -> int:
    """The number of programs for all columns."""
    return triton.cdiv(options["V"], options["B"])


def launch_sequential(kernel: str, k: torch.Tensor, v: torch.Tensor, heads: int, sequences: int) -> dict[str, Any]:
    """`launch` of a kernel with programs for each sequence and head, by whether they fill the multiprocessors."""
    options = launch(f"many_{kernel}", k, v, heads)
    few = parts(options) * heads * sequences < multiprocessors(k.device)
    return launch(kernel, k, v, heads) if few else options


class Advanced(NamedTuple):
    """The corrected values u [N, H, V], the states before chunks [G, H, K, V] and the final ones [S, H, V, K]; and what
    they follow from: normalised keys, W, and the decays from tokens to a chunk's end [N, H] and over chunks."""

    unit: torch.Tensor
    w: torch.Tensor
    u: torch.Tensor
    share: torch.Tensor
    total: torch.Tensor
    starts: torch.Tensor
    out: torch.Tensor
    inverses: torch.Tensor  # T [G, H, C, C] and b [N, H] to the base 2; without `keep` they are empty
    cumulated: torch.Tensor


def advance(k, v, g, beta, state, packed: tuple[torch.Tensor, ...], eps: float | None, keep: bool = False) -> Advanced:
    """`_prepare` and `_states`. The arguments are those of `chunked`, with `packed_chunks` of the sequences."""
    (tokens, heads), most, sequences = g.shape, len(packed[2]), len(packed[0]) - 1
    result = Advanced(
        unit=k if eps is None else k.new_empty(k.shape),
        w=k.new_empty(tokens, heads, k.shape[-1]),
        u=v.new_empty(tokens, heads, v.shape[-1]),
        share=g.new_empty(tokens, heads),
        total=g.new_empty(most + 1, heads),
        starts=v.new_empty(most, heads, k.shape[-1], v.shape[-1]),
        out=g.new_empty(sequences, heads, v.shape[-1], k.shape[-1]),
        inverses=k.new_empty(most if keep else 0, heads, CHUNK_SIZE, CHUNK_SIZE),
        cumulated=g.new_empty(tokens if keep else 0, heads),
    )
    with torch.cuda.device_of(k):
        if most:
            _prepare[most * heads,](
                k,
                v,
                g,
                beta,
                *result[:5],
                result.inverses,
                result.cumulated,
                *packed,
                k.stride(0),
                v.stride(0),
                result.unit.stride(0),
                sequences,
                eps or 0.0,
                NORMALISE=eps is not None,
                KEEP=keep,
                VALUE_GROUP=heads // v.shape[1],
                BLOCK=BLOCK,
                DOUBLINGS=(CHUNK_SIZE // BLOCK).bit_length() - 1,
                PAIRS=k.dtype == torch.float16,
                **launch("prepare", k, v, heads),
            )
        options = launch_sequential("states", k, v, heads, sequences)
        _states[parts(options), heads, sequences](
            *result[:5],
            result.out if state is None else state.contiguous(),
            result.starts,
            result.out,
            *packed[:2],
            result.unit.stride(0),
            STATE=state is not None,
            **options,
        )
    return result


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    *,
    eps: float | None = None,
    packed: tuple[torch.Tensor, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule over S sequences packed in N tokens: o [N, H, V] in v.dtype and the final states in float32.

    q [N, Hq, K], k [N, Hk, K], v [N, Hv, V] bfloat16 or float16, whose last two dimensions are contiguous; Hq, Hk and
    Hv divide H. g (log decay) and beta [N, H]; state [S, H, V, K] (vLLM's layout, also of the result) of any float
    dtype, or None; cu_seqlens [S+1] integers, on the device. With eps, q and k are divided by sqrt(sum x^2 + eps);
    without it they must be normalised. packed: the result of `packed_chunks`, if it is known already. Raises ValueError
    for another memory layout.
    """
    if any(x.stride()[1:] != (x.shape[-1], 1) for x in (q, k, v)):
        raise ValueError("the last two dimensions of q, k and v must be contiguous")
    tokens, heads = g.shape
    g, beta = g.float().contiguous(), beta.float().contiguous()
    packed = packed or packed_chunks(cu_seqlens, tokens, CHUNK_SIZE)
    made = advance(k, v, g, beta, state, packed, eps)
    o = v.new_empty(tokens, heads, v.shape[-1])
    options = launch("outputs", k, v, heads)
    with torch.cuda.device_of(q):
        if tokens:
            _outputs[len(packed[2]) * heads * parts(options),](
                q,
                made.unit,
                made.u,
                g,
                made.starts,
                o,
                *packed,
                q.stride(0),
                made.unit.stride(0),
                len(cu_seqlens) - 1,
                eps or 0.0,
                q.shape[-1] ** -0.5,
                NORMALISE=eps is not None,
                QUERY_GROUP=heads // q.shape[1],
                **options,
            )
    return o, made.out
