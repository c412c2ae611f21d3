# SPDX-License-Identifier: Apache-2.0
"""Linear attention with one decay a head and token: the state-space dual of Mamba2 (arXiv 2405.21060).

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
from .varlen import ChunkLayout, sequence_lengths

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

    x [B, T, H, V] values; B, C [B, T, H, K] in the place of keys and queries; dt [B, T, H] step sizes after softplus;
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
    """Decayed linear attention by the best implementation for the tensors' device (see the module's head)."""
    return dispatch.resolve("ssd", v, q, k, g)(q, k, v, g, initial_state, cu_seqlens)


def step(q, k, v, g, state) -> Result:
    """One token a sequence: q, k [S, H, K], v [S, H, V], g [S, H], state [S, H, K, V] -> (o [S, H, V], state)."""
    state = state * g.exp()[..., None, None] + k[..., :, None] * v[..., None, :]
    return torch.einsum("shkv,shk->shv", state, q), state


@dispatch.implementation("ssd", "reference")
def reference(q, k, v, g, initial_state=None, cu_seqlens=None) -> Result:
    """Token by token: the definition."""
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
    """Masked attention inside chunks, one scan over chunk states between them (the paper's section 6)."""
    out_dtype, compute = v.dtype, dispatch.compute_dtype(v)
    batch, tokens, heads, key_dim = q.shape
    if tokens == 1 and cu_seqlens is None:
        state = state_or_zeros(initial_state, (batch, heads, key_dim, v.shape[-1]), k, compute)
        q, k, v, g = (x[:, 0].to(compute) for x in (q, k, v, g))
        o, state = step(q, k, v, g, state)
        return o[:, None].to(out_dtype), state
    layout = ChunkLayout(batch, tokens, cu_seqlens, chunk_size)
    q, k, v, g = (layout.split_heads(x, compute) for x in (q, k, v, g))  # [N, H, C, K|V], g [N, H, C]
    decay_in, decay, total = chunk_decays(g)
    update = (k * (total - decay_in).exp()[..., None]).mT @ v
    starts, final = scan_states(layout, total.exp()[..., None], update, initial_state)
    o = torch.baddbmm(
        ((q @ k.mT * decay) @ v).flatten(0, 1), (q * decay_in.exp()[..., None]).flatten(0, 1), starts.flatten(0, 1)
    ).view_as(v)
    return layout.merge(o.transpose(1, 2)).to(out_dtype), final


@dispatch.implementation("ssd", "fast", requires="fla")
def fast(q, k, v, g, initial_state=None, cu_seqlens=None) -> Result:
    """flash-linear-attention's Triton kernels (CUDA)."""
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    one_token = q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()
    kernel = fused_recurrent_simple_gla if one_token else chunk_simple_gla
    state = None if initial_state is None else initial_state.float().contiguous()
    return kernel(
        q.to(v.dtype).contiguous(), k.to(v.dtype).contiguous(), v.contiguous(), g=g.float().contiguous(),
        scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def chunk_decays(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From log decays g [..., C]: the log decay from the chunk's start to each token, that token included [..., C]; the
    decay from token s to token t, zero for s > t [..., C, C]; the log decay over the whole chunk [..., 1]."""
    size = g.shape[-1]
    decay_in = g.cumsum(-1)
    later = torch.full((size, size), float("-inf"), dtype=g.dtype, device=g.device).triu(1)
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    decay = (decay_in[..., :, None] - decay_in[..., None, :]).add_(later).exp_()
    return decay_in, decay, decay_in[..., -1:]


def scan_states(
    layout: ChunkLayout, carry: torch.Tensor, update: torch.Tensor, initial_state: torch.Tensor | None
) -> Result:
    """S <- carry_n S + update_n over the chunks of every sequence.

    carry broadcasts to update [N, H, K, V]; initial_state [S, H, K, V] or None. Returns the states before each chunk
    [N, H, K, V] and the final ones [S, H, K, V].
    """
    state = state_or_zeros(initial_state, (layout.num_sequences, *update.shape[1:]), update)
    state = state[layout.order]
    starts, done = [update[:0]], []
    for carry_n, update_n in zip(layout.by_step(carry), layout.by_step(update), strict=True):
        active = len(update_n)
        done.append(state[active:])
        starts.append(state[:active])
        state = torch.addcmul(update_n, carry_n, state[:active])
    state = torch.cat([state, *reversed(done)])
    order = torch.tensor(layout.order, device=state.device)
    return torch.cat(starts), torch.empty_like(state).index_copy(0, order, state)


def state_or_zeros(state, shape, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`state`, or zeros of `shape`, in `dtype` (default: that of `like`) on the device of `like`."""
    dtype = dtype or like.dtype
    return torch.zeros(shape, dtype=dtype, device=like.device) if state is None else state.to(dtype)
