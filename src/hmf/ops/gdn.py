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

import torch

from . import dispatch
from .ssd import chunk_decays, state_or_zeros
from .varlen import ChunkLayout, sequence_lengths

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
    """The gated delta rule by the best implementation for the tensors' device (see the module's head)."""
    return dispatch.resolve("gdn", q, k, v, g, beta)(q, k, v, g, beta, initial_state, cu_seqlens)


def step(q, k, v, g, beta, state) -> Result:
    """One token a sequence: q, k [S, H, K], v [S, H, V], g, beta [S, H], state [S, H, K, V] -> (o [S, H, V], state)."""
    state = state * g.exp()[..., None, None]
    error = v - torch.einsum("shkv,shk->shv", state, k)
    state = state + torch.einsum("shk,shv->shkv", k, error * beta[..., None])
    return torch.einsum("shkv,shk->shv", state, q) * q.shape[-1] ** -0.5, state


@dispatch.implementation("gdn", "reference")
def reference(q, k, v, g, beta, initial_state=None, cu_seqlens=None) -> Result:
    """Token by token: the definition."""
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
    """Matrix products inside chunks, a scan over chunks: the WY form of the paper's section 3.3.

    Within a chunk the corrected values u solve a unit lower-triangular system; what the incoming state adds is w.
    """
    out_dtype, compute = v.dtype, dispatch.compute_dtype(v)
    batch, tokens, heads, key_dim = q.shape
    if tokens == 1 and cu_seqlens is None:
        state = state_or_zeros(initial_state, (batch, heads, key_dim, v.shape[-1]), k, compute)
        q, k, v, g, beta = (x[:, 0].to(compute) for x in (q, k, v, g, beta))
        o, state = step(q, k, v, g, beta, state)
        return o[:, None].to(out_dtype), state
    layout = ChunkLayout(batch, tokens, cu_seqlens, chunk_size)
    q, k, v, g, beta = (layout.split_heads(x, compute) for x in (q, k, v, g, beta))  # [N, H, C, ...]
    q = q * key_dim**-0.5
    decay_in, decay, total = chunk_decays(g)
    k_beta = k * beta[..., None]
    # Of the system only what is below the diagonal is read. Its inverse times both right sides costs less than a solve.
    eye = torch.eye(chunk_size, dtype=compute, device=k.device).expand_as(decay)
    inverse = torch.linalg.solve_triangular(k_beta @ k.mT * decay, eye, upper=False, unitriangular=True)
    rhs = torch.cat([v * beta[..., None], k_beta * decay_in.exp()[..., None]], dim=-1)
    u, w = (inverse @ rhs).split([v.shape[-1], key_dim], dim=-1)
    within = q @ k.mT * decay
    q_in = q * decay_in.exp()[..., None]
    k_out = k * (total - decay_in).exp()[..., None]
    carry = total.exp()[..., None]

    state = state_or_zeros(initial_state, (layout.num_sequences, heads, key_dim, v.shape[-1]), k)[layout.order]
    starts, values, done = [state[:0]], [v[:0]], []
    for u_n, w_n, carry_n, k_n in zip(*map(layout.by_step, (u, w, carry, k_out)), strict=True):
        active = len(u_n)
        done.append(state[active:])
        starts.append(state[:active])
        values.append(u_n - w_n @ starts[-1])
        state = torch.addcmul(k_n.mT @ values[-1], carry_n, starts[-1])
    state = torch.cat([state, *reversed(done)])
    final = torch.empty_like(state).index_copy(0, torch.tensor(layout.order, device=state.device), state)
    o = q_in @ torch.cat(starts) + within @ torch.cat(values)
    return layout.merge(o.transpose(1, 2)).to(out_dtype), final


@dispatch.implementation("gdn", "fast", requires="fla")
def fast(q, k, v, g, beta, initial_state=None, cu_seqlens=None) -> Result:
    """flash-linear-attention's Triton kernels (CUDA)."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    one_token = q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()
    kernel = fused_recurrent_gated_delta_rule if one_token else chunk_gated_delta_rule
    state = None if initial_state is None else initial_state.float().contiguous()
    return kernel(
        q.contiguous(), k.contiguous(), v.contiguous(), g=g.float().contiguous(), beta=beta.contiguous(),
        initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens,
    )  # fmt: skip
