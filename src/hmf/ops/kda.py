# SPDX-License-Identifier: Apache-2.0
"""Kimi Delta Attention (arXiv 2510.26692): the gated delta rule with a decay for each channel of the key.

Per head, with a state S [K, V] that maps keys to values and log decays g_t [K]:
    S <- diag(exp(g_t)) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   o_t = S^T q_t / sqrt(K)

With equal decays of all channels it is the rule of `gdn`. All versions take q, k [B, T, H, K], v [B, T, H, V] with
heads expanded and q, k normalised; g [B, T, H, K]; beta [B, T, H]; initial_state [S, H, K, V] or None; cu_seqlens [S+1]
or None (then B = 1 row of S packed documents). They return o [B, T, H, V] in v.dtype and the final state [S, H, K, V]
in float32 (float64 for float64 inputs).

Legend: B batch, T tokens, S sequences, n chunks of a group, C chunk_size, H heads, K/V key/value head dims.
"""

from __future__ import annotations

import torch

from . import dispatch, gdn

Result = tuple[torch.Tensor, torch.Tensor]


@dispatch.entry("kda", recurrence=True)
def kimi_delta_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Result:
    """The delta rule with a decay for each channel, by the implementation that `dispatch` chooses.

    Arguments and result are described in the module docstring.
    """
    return dispatch.resolve("kda", q, k, v, g, beta)(q, k, v, g, beta, initial_state, cu_seqlens)


def step(q, k, v, g, beta, state) -> Result:
    """One token per sequence: q, k, g [S, H, K], v [S, H, V], beta [S, H], state [S, H, K, V].

    Returns o [S, H, V] and the new state.
    """
    state = state * g.exp()[..., None]
    error = v - torch.einsum("shkv,shk->shv", state, k)
    state = state + torch.einsum("shk,shv->shkv", k, error * beta[..., None])
    return torch.einsum("shkv,shk->shv", state, q) * q.shape[-1] ** -0.5, state


@dispatch.implementation("kda", "reference")
def reference(q, k, v, g, beta, initial_state=None, cu_seqlens=None) -> Result:
    """The definition: a loop over the tokens."""
    return gdn.sequential(step, q, k, v, g, beta, initial_state, cu_seqlens)


@dispatch.implementation("kda", "chunked")
def chunked(q, k, v, g, beta, initial_state=None, cu_seqlens=None, chunk_size: int = 64) -> Result:
    """As `gdn.chunked`, with a decay for each channel. `chunk_size` must be a power of two."""
    return gdn.in_chunks(step, ChannelDecay, q, k, v, g, beta, initial_state, cu_seqlens, chunk_size)


class ChannelDecay:
    """As `gdn.HeadDecay`, from log decays g [n, H, C, K] of each channel.

    One product cannot give the decayed scores of a chunk: exp(g_in_t) exp(-g_in_s) overflows where the decay is strong.
    The chunk is therefore divided into halves, recursively, down to single tokens. For a token t of a second half and a
    token s of the first half, the decay is exp(log decay from the border to t) exp(log decay from s to the border). No
    exponent is positive.
    """

    def __init__(self, g: torch.Tensor):
        since, until = g.clone(), torch.zeros_like(g)  # log decay from a block's start to a token, from it to its end
        self.levels = []  # (size of the halves, factors of second halves, of first halves [n, H, blocks, size, K])
        size = 1
        while size < g.shape[2]:
            (since_1, since_2), until_1 = _halves(since, size), _halves(until, size)[0]
            self.levels.append((size, since_2.exp(), until_1.exp()))
            until_1 += since_2[..., -1:, :]
            since_2 += since_1[..., -1:, :]
            size *= 2
        self.from_start, self.to_end, self.carry = since.exp(), until.exp(), since[:, :, -1].exp()[..., None]

    def scores(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores = x.new_zeros(*x.shape[:-1], x.shape[2])
        scores.diagonal(dim1=-2, dim2=-1).copy_((x * y).sum(-1))
        for size, since, until in self.levels:
            _below(scores, size).copy_((_halves(x, size)[1] * since) @ (_halves(y, size)[0] * until).mT)
        return scores

    def score_grads(self, grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = grad.diagonal(dim1=-2, dim2=-1)[..., None]
        grad_x, grad_y = own * y, own * x
        for size, since, until in self.levels:
            part, later, earlier = _below(grad, size), _halves(x, size)[1], _halves(y, size)[0]
            _halves(grad_x, size)[1].addcmul_(part @ (earlier * until), since)
            _halves(grad_y, size)[0].addcmul_(part.mT @ (later * since), until)
        return grad_x, grad_y

    def of_channels(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _halves(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and second halves, `size` tokens each, of blocks of [n, H, C, K]: [n, H, blocks, size, K]."""
    first, second = x.unflatten(2, (-1, 2, size)).unbind(3)
    return first, second


def _below(scores: torch.Tensor, size: int) -> torch.Tensor:
    """The view of [n, H, C, C] on second by first halves of each block: [n, H, blocks, size, size]."""
    blocks = scores.unflatten(3, (-1, 2, size)).unflatten(2, (-1, 2, size))
    return blocks[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 2)


@dispatch.implementation("kda", "fast", requires="fla")
def fast(q, k, v, g, beta, initial_state=None, cu_seqlens=None) -> Result:
    """The Triton kernels of flash-linear-attention (CUDA)."""
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    one_token = q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()
    state = None if initial_state is None else initial_state.float().contiguous()
    return (fused_recurrent_kda if one_token else chunk_kda)(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        g=g.float().contiguous(),
        beta=beta.contiguous(),
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
