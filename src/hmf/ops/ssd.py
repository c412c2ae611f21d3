# SPDX-License-Identifier: Apache-2.0
"""Linear attention with one decay per head and token: the state-space dual of Mamba2 (arXiv 2405.21060).

Per head, with a state S [K, V] that maps keys to values:
    S <- exp(g_t) S + k_t v_t^T;   o_t = S^T q_t

All versions take q, k [B, T, H, K], v [B, T, H, V] with heads expanded; g (log decay) [B, T, H]; initial_state
[S, H, K, V] or None; cu_seqlens [S+1] or None (then B = 1 row of S packed documents). They return o [B, T, H, V] in
v.dtype and the final state [S, H, K, V] in float32 (float64 for float64 inputs).

Legend: B batch, T tokens, S sequences, N chunks, C chunk_size, H heads, K/V key/value head dims.
"""

from __future__ import annotations

import torch

from . import dispatch
from .varlen import ChunkLayout, by_head, chunk_groups, chunk_layout, on_device, sequence_lengths, step_views

Result = tuple[torch.Tensor, torch.Tensor]


def state_space_dual(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Result:
    """Mamba2's S <- exp(dt_t A) S + dt_t B_t x_t^T; y_t = S^T C_t + D x_t (arXiv 2405.21060, section 7).

    x [B, T, H, V] are the values, B the keys and C the queries [B, T, H, K]; dt [B, T, H] step sizes after softplus;
    A [H] negative; D [H] or None; initial_state [S, H, K, V]. Returns y [B, T, H, V] in x.dtype and the final state.
    """
    compute = dispatch.compute_dtype(x)
    dt = dt.to(compute)
    y, state = linear_attention(C, B.to(compute) * dt[..., None], x, dt * A.to(compute), initial_state, cu_seqlens)
    if D is not None:
        y = (y.to(compute) + D.to(compute)[:, None] * x.to(compute)).to(x.dtype)
    return y, state


@dispatch.entry("ssd", recurrence=True)
def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Result:
    """Decayed linear attention, by the implementation that `dispatch` chooses; arguments as in the module docstring."""
    return dispatch.resolve("ssd", v, q, k, g)(q, k, v, g, initial_state, cu_seqlens)


def step(q, k, v, g, state) -> Result:
    """One token per sequence: q, k [S, H, K], v [S, H, V], g [S, H], state [S, H, K, V] -> (o [S, H, V], state)."""
    state = state * g.exp()[..., None, None] + k[..., :, None] * v[..., None, :]
    return torch.einsum("shkv,shk->shv", state, q), state


@dispatch.implementation("ssd", "reference")
def reference(q, k, v, g, initial_state=None, cu_seqlens=None) -> Result:
    """The definition: a loop over the tokens."""
    batch, tokens, heads, _ = q.shape
    out_dtype, compute = v.dtype, dispatch.compute_dtype(v)
    q, k, v, g = (x.to(compute).flatten(0, 1) for x in (q, k, v, g))
    lengths = sequence_lengths(batch, tokens, cu_seqlens)
    initial = state_or_zeros(initial_state, (len(lengths), heads, k.shape[-1], v.shape[-1]), k)
    outputs, states, first = [], [], 0
    for s, length in enumerate(lengths):
        state = initial[s : s + 1]
        for t in range(first, first + length):
            at = slice(t, t + 1)
            o, state = step(q[at], k[at], v[at], g[at], state)
            outputs.append(o)
        states.append(state)
        first += length
    o = torch.cat(outputs) if outputs else v
    return o.unflatten(0, (batch, tokens)).to(out_dtype), torch.cat(states)


@dispatch.implementation("ssd", "chunked")
def chunked(q, k, v, g, initial_state=None, cu_seqlens=None, chunk_size: int = 64) -> Result:
    """Masked attention inside chunks and a scan over the states between chunks (section 6 of the paper)."""
    out_dtype, compute = v.dtype, dispatch.compute_dtype(v)
    batch, tokens, heads, key_dim = q.shape
    if tokens == 1 and cu_seqlens is None:
        state = state_or_zeros(initial_state, (batch, heads, key_dim, v.shape[-1]), k, compute)
        q, k, v, g = (x[:, 0].to(compute) for x in (q, k, v, g))
        o, state = step(q, k, v, g, state)
        return o[:, None].to(out_dtype), state
    layout = chunk_layout(batch, tokens, cu_seqlens, chunk_size)
    initial = state_or_zeros(initial_state, (layout.num_sequences, heads, key_dim, v.shape[-1]), k, compute)
    q, k, v = (layout.split(x.to(compute)) for x in (q, k, v))
    o, final = _Chunks.apply(layout, q, k, v, layout.split_heads(g, compute), initial)
    return layout.merge(o).to(out_dtype), final


class _Chunks(torch.autograd.Function):
    """o [N, C, H, V] and the final states [S, H, K, V] from q, k [N, C, H, K], v [N, C, H, V], g [N, H, C] and the
    initial states.

    Only the states before each chunk are stored for the backward. All other intermediate tensors are computed for a few
    chunks at a time, which fit into a CPU's cache, and computed again in the backward.
    """

    @staticmethod
    def forward(ctx, layout, q, k, v, g, initial):
        order = on_device(layout.order, v.device)
        state = initial[order]
        starts = state.new_empty(len(g), *state.shape[1:])
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        for at, sequences in chunk_groups(layout, g):
            q_n, k_n, v_n = by_head(at, q, k, v)
            decay, from_start, to_end, carry = decay_factors(g[at])
            _scan(sequences, carry[..., 0, 0], (k_n * to_end).mT @ v_n, starts[at], state)
            o_n = (q_n @ k_n.mT).mul_(decay) @ v_n
            o_n.flatten(0, 1).baddbmm_((q_n * from_start).flatten(0, 1), starts[at].flatten(0, 1))
            o[at] = o_n.transpose(1, 2)
        ctx.layout = layout
        ctx.save_for_backward(q, k, v, g, starts, order)
        return o, torch.empty_like(state).index_copy_(0, order, state)

    @staticmethod
    @dispatch.backward
    def backward(ctx, grad_o, grad_final):
        q, k, v, g, starts, order = ctx.saved_tensors
        grad_state = grad_final[order]  # gradient of the state after a chunk, from the last chunk to the first
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        grad_g = torch.empty_like(g)
        for at, sequences in reversed(chunk_groups(ctx.layout, g)):
            q_n, k_n, v_n, grad_n = by_head(at, q, k, v, grad_o)
            decay, from_start, to_end, carry = decay_factors(g[at])
            after = torch.empty_like(starts[at])
            update = (q_n * from_start).mT @ grad_n
            _scan(sequences, carry[..., 0, 0], update, after, grad_state, reverse=True)
            grad_scores = (grad_n @ v_n.mT).mul_(decay)
            grad_q = (grad_n @ starts[at].mT).mul_(from_start).add_(grad_scores @ k_n)
            grad_out = (v_n @ after.mT).mul_(to_end)
            grad_total = (grad_out * k_n).sum((-2, -1)) + (starts[at] * after).sum((-2, -1)) * carry[..., 0, 0]
            grad_k = grad_out.add_(grad_scores.mT @ q_n)
            grad_v = (q_n @ k_n.mT).mul_(decay).mT @ grad_n
            grad_v += (k_n * to_end) @ after
            # A score has the factor exp(decay_in) of the query's token and exp(-decay_in) of the key's token.
            grad_in = (grad_q * q_n).sum(-1) - (grad_k * k_n).sum(-1)
            grad_g[at] = grad_in.flip(-1).cumsum(-1).flip(-1) + grad_total[..., None]
            for grad, value in zip(grads, (grad_q, grad_k, grad_v), strict=True):
                grad[at] = value.transpose(1, 2)
        return None, *grads, grad_g, torch.empty_like(grad_state).index_copy_(0, order, grad_state)


def _scan(
    sequences: list[int],
    carry: torch.Tensor,
    update: torch.Tensor,
    out: torch.Tensor,
    state: torch.Tensor,
    reverse: bool = False,
) -> None:
    """As `scan_triton.scan`, which runs on a GPU."""
    if update.is_cuda and dispatch.installed("triton"):
        from .scan_triton import scan

        scan(sequences, carry.contiguous(), update.contiguous(), out, state, reverse)
        return
    steps = step_views(sequences, carry[..., None, None], update, out)
    for carry_t, update_t, out_t in reversed(steps) if reverse else steps:
        now = state.flatten(0, 1)[: len(out_t)]
        out_t.copy_(now)
        torch.addcmul(update_t, carry_t, now, out=now)


@dispatch.implementation("ssd", "fast", requires="fla")
def fast(q, k, v, g, initial_state=None, cu_seqlens=None) -> Result:
    """The Triton kernels of flash-linear-attention (CUDA)."""
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    from .fla_backend import install

    install()
    one_token = q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()
    kernel = fused_recurrent_simple_gla if one_token else chunk_simple_gla
    state = None if initial_state is None else initial_state.float().contiguous()
    return kernel(
        q.to(v.dtype).contiguous(),
        k.to(v.dtype).contiguous(),
        v.contiguous(),
        g=g.float().contiguous(),
        scale=1.0,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )


def chunk_decays(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From log decays g [..., C]: the log decay from the chunk's start to each token, that token included [..., C]; the
    decay from token s to token t, zero for s > t [..., C, C]; the log decay over the whole chunk [..., 1]."""
    decay_in = g.cumsum(-1)
    # Masked before exp too: above the diagonal the difference is positive and may overflow. The mask is 0 and not -inf,
    # because exp(-inf) is slow on a CPU.
    decay = (decay_in[..., :, None] - decay_in[..., None, :]).tril_().exp_()
    decay = decay.tril() if decay.requires_grad else decay.tril_()  # the gradient of exp reads its result
    return decay_in, decay, decay_in[..., -1:]


def decay_factors(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """From log decays g [..., C]: the decay from token s to token t, zero for s > t [..., C, C]; from the chunk's start
    to each token and from each token to the chunk's end [..., C, 1]; over the whole chunk [..., 1, 1]."""
    decay_in, decay, total = chunk_decays(g)
    return decay, *(x.exp()[..., None] for x in (decay_in, total - decay_in, total))


def scan_states(
    layout: ChunkLayout, log_decay: torch.Tensor, update: torch.Tensor, initial_state: torch.Tensor | None
) -> Result:
    """S <- exp(log_decay_n) S + update_n over the chunks of every sequence.

    log_decay [N, H, 1]; update [N, H, K, V]; initial_state [S, H, K, V] or None. Returns the states before each chunk
    [N, H, K, V] and the final ones [S, H, K, V].
    """
    state = state_or_zeros(initial_state, (layout.num_sequences, *update.shape[1:]), update)
    order = on_device(layout.order, state.device)
    starts, state = _Scan.apply(layout, log_decay[..., 0].exp(), update, state[order])
    return starts, torch.empty_like(state).index_copy(0, order, state)


class _Scan(torch.autograd.Function):
    """The states before each chunk and the final ones from carry [N, H], update [N, H, K, V] and the initial states.
    Sequences are in the layout's order."""

    @staticmethod
    def forward(ctx, layout, carry, update, state):
        ctx.sequences = [step.stop - step.start for step in layout.steps]
        starts, state = torch.empty_like(update, memory_format=torch.contiguous_format), state.clone()
        _scan(ctx.sequences, carry, update, starts, state)
        ctx.save_for_backward(carry, starts)
        return starts, state

    @staticmethod
    @dispatch.backward
    def backward(ctx, grad_starts, grad_state):
        carry, starts = ctx.saved_tensors
        after, grad_state = torch.empty_like(starts), grad_state.clone()  # `after`: of the state after each chunk
        _scan(ctx.sequences, carry, grad_starts, after, grad_state, reverse=True)
        return None, (after * starts).sum((-2, -1)), after, grad_state


def state_or_zeros(state, shape, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`state`, or zeros of `shape`, in `dtype` (default: that of `like`) on the device of `like`."""
    dtype = dtype or like.dtype
    return torch.zeros(shape, dtype=dtype, device=like.device) if state is None else state.to(dtype)
