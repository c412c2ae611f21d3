# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule of Gated DeltaNet (arXiv 2412.06464): definition, chunked form and GPU kernels.

Per head, with a state S [K, V] that maps keys to values:
    S <- exp(g_t) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   o_t = S^T q_t / sqrt(K)

All versions take q, k [B, T, H, K], v [B, T, H, V] with heads expanded and q, k normalised; g (log decay) and
beta [B, T, H]; initial_state [S, H, K, V] or None; cu_seqlens [S+1] or None (then B = 1 row of S packed documents).
They return o [B, T, H, V] in v.dtype and the final state [S, H, K, V] in float32 (float64 for float64 inputs).

Legend: B batch, T tokens, S sequences, N chunks, C chunk_size, H heads, K/V key/value head dims.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hmf.errors import HmfError

from . import dispatch
from .ssd import decay_factors, state_or_zeros
from .varlen import by_head, chunk_groups, chunk_layout, on_device, sequence_lengths, step_views

Result = tuple[torch.Tensor, torch.Tensor]


@dispatch.entry("gdn", recurrence=True)
def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Result:
    """The gated delta rule, by the implementation that `dispatch` chooses; arguments as in the module docstring."""
    return dispatch.resolve("gdn", q, k, v, g, beta)(q, k, v, g, beta, initial_state, cu_seqlens)


def step(q, k, v, g, beta, state) -> Result:
    """One token per sequence: q, k [S, H, K], v [S, H, V], g, beta [S, H], state [S, H, K, V].

    Returns o [S, H, V] and the new state.
    """
    state = state * g.exp()[..., None, None]
    error = v - torch.einsum("shkv,shk->shv", state, k)
    state = state + torch.einsum("shk,shv->shkv", k, error * beta[..., None])
    return torch.einsum("shkv,shk->shv", state, q) * q.shape[-1] ** -0.5, state


@dispatch.implementation("gdn", "reference")
def reference(q, k, v, g, beta, initial_state=None, cu_seqlens=None) -> Result:
    """The definition: a loop over the tokens."""
    return sequential(step, q, k, v, g, beta, initial_state, cu_seqlens)


def sequential(step: Callable, q, k, v, g, beta, initial_state, cu_seqlens) -> Result:
    """A delta rule as a loop over tokens that calls `step`. g [B, T, H, ...] may have further axes, as in `kda`."""
    batch, tokens, heads, _ = q.shape
    out_dtype, compute = v.dtype, dispatch.compute_dtype(v)
    q, k, v, g, beta = (x.to(compute).flatten(0, 1) for x in (q, k, v, g, beta))
    outputs, states, first = [], [], 0
    for s, length in enumerate(sequence_lengths(batch, tokens, cu_seqlens)):
        state = (
            k.new_zeros(1, heads, k.shape[-1], v.shape[-1])
            if initial_state is None
            else initial_state[s : s + 1].to(compute)
        )
        for t in range(first, first + length):
            at = slice(t, t + 1)
            o, state = step(q[at], k[at], v[at], g[at], beta[at], state)
            outputs.append(o)
        states.append(state)
        first += length
    o = torch.cat(outputs) if outputs else v
    return o.unflatten(0, (batch, tokens)).to(out_dtype), torch.cat(states)


@dispatch.implementation("gdn", "chunked")
def chunked(q, k, v, g, beta, initial_state=None, cu_seqlens=None, chunk_size: int = 64) -> Result:
    """Matrix products inside chunks and a scan over chunks: the WY form of section 3.3 of the paper."""
    return in_chunks(step, HeadDecay, q, k, v, g, beta, initial_state, cu_seqlens, chunk_size)


def in_chunks(step: Callable, decays: Callable, q, k, v, g, beta, initial_state, cu_seqlens, chunk_size: int) -> Result:
    """A delta rule in chunks.

    decays: the class that computes the decays of a group of chunks from g, such as `HeadDecay`.
    """
    out_dtype, compute = v.dtype, dispatch.compute_dtype(v)
    batch, tokens, heads, key_dim = q.shape
    if tokens == 1 and cu_seqlens is None:
        state = state_or_zeros(initial_state, (batch, heads, key_dim, v.shape[-1]), k, compute)
        q, k, v, g, beta = (x[:, 0].to(compute) for x in (q, k, v, g, beta))
        o, state = step(q, k, v, g, beta, state)
        return o[:, None].to(out_dtype), state
    layout = chunk_layout(batch, tokens, cu_seqlens, chunk_size)
    initial = state_or_zeros(initial_state, (layout.num_sequences, heads, key_dim, v.shape[-1]), k, compute)
    q, k, v = (layout.split(x.to(compute)) for x in (q, k, v))
    g, beta = (layout.split_heads(x, compute) for x in (g, beta))
    o, final = _Chunks.apply(layout, decays, q, k, v, g, beta, initial)
    return layout.merge(o).to(out_dtype), final


class HeadDecay:
    """The decays inside chunks, from log decays g [n, H, C] of one value for each head.

    from_start, to_end: from the chunk's start to each token and from each token to its end [n, H, C, 1] (or K for 1);
    carry: over the whole chunk [n, H, 1, 1] (or K, 1).
    """

    def __init__(self, g: torch.Tensor):
        self.within, self.from_start, self.to_end, self.carry = decay_factors(g)

    def scores(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x_t . y_s, each product decayed from token s to token t, for s <= t: x, y [n, H, C, K] -> [n, H, C, C]."""
        return (x @ y.mT).mul_(self.within)

    def score_grads(self, grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of x and y from `grad` [n, H, C, C], that of `scores(x, y)`, which is overwritten."""
        grad.mul_(self.within)
        return grad @ y, grad.mT @ x

    def of_channels(self, x: torch.Tensor) -> torch.Tensor:
        """The gradient of a log decay from the contributions of the channels [..., K]."""
        return x.sum(-1)


class _Chunks(torch.autograd.Function):
    """o [N, C, H, V] and the final states [S, H, K, V] from q, k [N, C, H, K], v [N, C, H, V], g [N, H, C, ...],
    beta [N, H, C] and the initial states. As in `ssd`, a few chunks are computed at a time.

    The corrected values of a chunk are u = (1 + A)^-1 beta (v - exp(g_in) k S), where S is the state before the chunk,
    g_in the log decay since its start, and A[t, s] = beta_t (k_t . k_s) exp(g_in_t - g_in_s) for s < t. The backward
    uses stored u, inverses and states before chunks.
    """

    @staticmethod
    def forward(ctx, layout, decays, q, k, v, g, beta, initial):
        order = on_device(layout.order, v.device)
        state = initial[order]
        starts = state.new_empty(len(beta), *state.shape[1:])
        inverses = beta.new_empty(*beta.shape, beta.shape[-1])
        values = beta.new_empty(*beta.shape, v.shape[-1])
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        for at, sequences in chunk_groups(layout, beta):
            q_n, k_n, v_n = by_head(at, q, k, v)
            q_n = q_n * q.shape[-1] ** -0.5
            decay = decays(g[at])
            inverses[at] = _inverse(decay.scores(k_n, k_n).mul_(beta[at][..., None]))
            solve, u = inverses[at] * beta[at][..., None, :], values[at]
            torch.matmul(solve, v_n, out=u)
            from_state, k_out = solve @ (k_n * decay.from_start), k_n * decay.to_end
            for u_t, w, k_t, decayed, start in step_views(sequences, u, from_state, k_out.mT, decay.carry, starts[at]):
                now = state.flatten(0, 1)[: len(start)]
                start.copy_(now)
                u_t.baddbmm_(w, now, alpha=-1)
                now.mul_(decayed).baddbmm_(k_t, u_t)
            o_n = decay.scores(q_n, k_n) @ u
            o_n.flatten(0, 1).baddbmm_((q_n * decay.from_start).flatten(0, 1), starts[at].flatten(0, 1))
            o[at] = o_n.transpose(1, 2)
        ctx.layout, ctx.decays = layout, decays
        ctx.save_for_backward(q, k, v, g, beta, starts, inverses, values, order)
        return o, torch.empty_like(state).index_copy_(0, order, state)

    @staticmethod
    @dispatch.backward
    def backward(ctx, grad_o, grad_final):
        q, k, v, g, beta, starts, inverses, values, order = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        grad_state = grad_final[order]  # gradient of the state after a chunk, from the last chunk to the first
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        grad_g, grad_beta = torch.empty_like(g), torch.empty_like(beta)
        for at, sequences in reversed(chunk_groups(ctx.layout, beta)):
            q_n, k_n, v_n, grad_n = by_head(at, q, k, v, grad_o)
            q_n = q_n * scale
            decay = ctx.decays(g[at])
            beta_n, start, u = beta[at][..., None], starts[at], values[at]
            from_state, k_out = (inverses[at] * beta_n.mT) @ (k_n * decay.from_start), k_n * decay.to_end
            grad_u = decay.scores(q_n, k_n).mT @ grad_n
            grad_start = (q_n * decay.from_start).mT @ grad_n
            after = torch.empty_like(start)
            steps = step_views(sequences, grad_u, k_out, from_state.mT, decay.carry, grad_start, after)
            for grad_t, k_t, w, decayed, update, end in reversed(steps):
                now = grad_state.flatten(0, 1)[: len(end)]
                end.copy_(now)
                grad_t.baddbmm_(k_t, now)
                torch.addcmul(update, decayed, now, out=now).baddbmm_(w, grad_t, alpha=-1)
            grad_rhs = inverses[at].mT @ grad_u  # gradient of beta (v - exp(g_in) k S)
            grad_q, grad_met = decay.score_grads(grad_n @ u.mT, q_n, k_n)
            grad_q += (grad_n @ start.mT).mul_(decay.from_start)
            # A is beta times scores(k, k) below the diagonal.
            grad_system = (grad_rhs @ u.mT).tril_(-1).neg_()
            grad_own, grad_other = decay.score_grads(grad_system, beta_n * k_n, k_n)
            # A key occurs twice: grad_own is its gradient where it corrects the value of its own token, with a factor
            # exp(g_in); grad_met where it occurs in the terms of later tokens, with a factor exp(-g_in).
            grad_own -= (grad_rhs @ start.mT).mul_(decay.from_start)
            grad_beta[at] = (grad_rhs * v_n).sum(-1) + (grad_own * k_n).sum(-1)
            grad_own *= beta_n
            grad_met += grad_other
            grad_out = (u @ after.mT).mul_(decay.to_end)
            grad_total = (grad_out * k_n).sum(-2) + (start * after).sum(-1) * decay.carry[..., 0]
            grad_met += grad_out
            grad_in = decay.of_channels(grad_q * q_n + (grad_own - grad_met) * k_n)
            grad_g[at] = grad_in.flip(2).cumsum(2).flip(2) + decay.of_channels(grad_total).unsqueeze(2)
            for grad, value in zip(grads, (grad_q * scale, grad_own + grad_met, grad_rhs * beta_n), strict=True):
                grad[at] = value.transpose(1, 2)
        return None, None, *grads, grad_g, grad_beta, torch.empty_like(grad_state).index_copy_(0, order, grad_state)


def _inverse(below: torch.Tensor) -> torch.Tensor:
    """(1 + A)^-1 for A [..., C, C]; only the entries below the diagonal of A are read."""
    eye = torch.eye(below.shape[-1], dtype=below.dtype, device=below.device).expand_as(below)
    return torch.linalg.solve_triangular(below, eye, upper=False, unitriangular=True)


@dispatch.implementation("gdn", "fast", requires="fla")
def fast(q, k, v, g, beta, initial_state=None, cu_seqlens=None) -> Result:
    """The Triton kernels of flash-linear-attention (CUDA)."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    from .fla_backend import install

    install()
    one_token = q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()
    kernel = fused_recurrent_gated_delta_rule if one_token else chunk_gated_delta_rule
    state = None if initial_state is None else initial_state.float().contiguous()
    return kernel(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        g=g.float().contiguous(),
        beta=beta.contiguous(),
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )


def _unsupported(dtype: torch.dtype, head_dim: int, device: str = "cuda") -> str | None:
    from .gdn_chunk_triton import unsupported

    return unsupported(dtype, head_dim, torch.device(device))


@dispatch.implementation("gdn", "triton", requires="triton", unsupported=_unsupported)
def triton(q, k, v, g, beta, initial_state=None, cu_seqlens=None) -> Result:
    """The Triton kernels of this package (CUDA, bfloat16 or float16, heads up to 128). HmfError for other inputs."""
    from . import gdn_grads_triton

    if reason := _unsupported(q.dtype, max(q.shape[-1], v.shape[-1]), q.device.type):
        raise HmfError(f"gdn: the version triton cannot run: {reason}; unset HMF_OPS, or select another version")
    batch, tokens = q.shape[:2]
    if (tokens == 1 and cu_seqlens is None) or not q.dtype == k.dtype == v.dtype:  # a step, or tokens of several dtypes
        return chunked(q, k, v, g, beta, initial_state, cu_seqlens)
    bounds = torch.arange(batch + 1, device=q.device) * tokens if cu_seqlens is None else cu_seqlens
    q, k, v, g, beta = (x.contiguous().flatten(0, 1) for x in (q, k, v, g, beta))
    state = None if initial_state is None else initial_state.mT.contiguous()
    o, state = gdn_grads_triton.Rule.apply(q, k, v, g, beta, state, bounds)
    return o.unflatten(0, (batch, tokens)), state.mT.contiguous()
