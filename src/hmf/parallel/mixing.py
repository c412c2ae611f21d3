# SPDX-License-Identifier: Apache-2.0
"""Wrappers of the ops, and an attention function, for rows that are divided over processes.

Recurrences: a chunk maps the state at its start to the state at its end by an affine map of fixed size. Every rank
receives the maps of all chunks, composes them, and so computes the initial states of its own chunks. Convolutions and
windows receive the positions before a chunk. Attention receives all keys and values of the row. Training does not need
final states, so they are None.

Legend: as in shards.py; N = 2cB tokens of this rank, H heads, K/V key/value head dims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hmf.ops import KeySet, windowed_attention
from hmf.ops.dispatch import compute_dtype

from .shards import Shards

ATTENTION = "sequence_parallel"  # the name of `attention` in transformers' registry


def op_wrappers(shards: Shards) -> dict[str, Callable]:
    """For each op, by name, the function that runs it on the rows that `shards` divides."""

    functions: dict[str, Callable] = {
        "conv": conv,
        "ssd": linear_attention,
        "gdn": gated_delta_rule,
        "kda": gated_delta_rule,
        "gka": gated_kalmanet,
        "window": window,
    }
    return {name: partial(function, shards) for name, function in functions.items()}


def conv(shards, op, x, weight, bias=None, initial_state=None, cu_seqlens=None):
    halo = shards.halo(x, weight.shape[-1] - 1)
    return op(x, weight, bias, _initial(shards, halo.mT), cu_seqlens)[0], None


def linear_attention(shards, op, q, k, v, g, initial_state=None, cu_seqlens=None):
    (state,) = entering(shards, (k, v, g))
    return op(q, k, v, g, _initial(shards, state), cu_seqlens)[0], None


def gated_kalmanet(shards, op, q, k, v, g, gk, alpha=None, initial_state=None, cu_seqlens=None, **options):
    states = entering(shards, (k, k, gk), (k, v, g))
    initial = tuple(_initial(shards, state) for state in states)
    return op(q, k, v, g, gk, alpha, initial, cu_seqlens, **options)[0], (None, None)


def gated_delta_rule(shards, op, q, k, v, g, beta, initial_state=None, cu_seqlens=None):
    """Run the op from a zero state, and without values from the identity matrix.

    This gives the outputs without an initial state, for each query the vector that multiplies the initial state, and
    the chunk's affine map. One product then adds the initial state's share to the outputs.
    """
    key_dim, value_dim, heads = k.shape[-1], v.shape[-1], k.shape[-2]
    compute = compute_dtype(v)
    zero = torch.zeros(len(shards.lengths), heads, key_dim, value_dim, dtype=compute, device=v.device)
    o, query, final = with_map(op, q, k, v, g, beta, zero, cu_seqlens)
    update, carry = shards.gather_chunks(final[shards.last]).split([value_dim, key_dim], -1)
    state = _compose(shards, update, carry, torch.matmul)
    query = query.to(compute).unflatten(1, (-1, shards.chunk))[0] * shards.in_first[..., None, None]
    added = torch.einsum("mchk,mhkv->mchv", query, state).flatten(0, 1)[None]
    return (o.to(compute) + added).to(v.dtype), None


def with_map(
    op: Callable, q, k, v, g, beta, initial: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gated delta rule `op` from `initial` [S, H, K, V] with the identity beside it.

    Returns the outputs [B, T, H, V]; for each query the vector [B, T, H, K] that multiplies the initial state; and
    [S, H, K, V + K], the final states beside the matrices that map initial states to them.
    """
    # Two calls, because GPU kernels have a largest width of values.
    o, final = op(q, k, v, g, beta, initial, cu_seqlens)
    eye = torch.eye(k.shape[-1], dtype=initial.dtype, device=v.device).expand(*initial.shape[:2], -1, -1)
    query, carry = op(q, k, torch.zeros_like(k, dtype=v.dtype), g, beta, eye, cu_seqlens)
    return o, query, torch.cat([final, carry], -1)


def entering(shards: Shards, *decayed: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """The states [M, H, K, V] at the start of this rank's chunks, of S <- exp(g_t) S + k_t v_t^T for each (k, v, g)."""
    updates, decays = [], []
    for k, v, g in decayed:
        compute = compute_dtype(v)
        k, v, g = (x[0].unflatten(0, (-1, shards.chunk)).to(compute) for x in (k, v, g))  # [M, c, H, ...]
        since = g.flip(1).cumsum(1).flip(1)  # log decay from before each token to the chunk's end
        weight = (since - g).exp() * shards.in_last[..., None]
        updates.append(torch.einsum("mchk,mchv->mhkv", k * weight[..., None], v))
        decays.append(since[:, 0].exp())
    # All tensors are exchanged in a single all-gather.
    message = torch.cat([*(x.flatten(1) for x in updates), *decays], -1)
    parts = shards.gather_chunks(message).split([x[0].numel() for x in (*updates, *decays)], -1)
    return [
        _compose(shards, part.unflatten(-1, update.shape[1:]), decay[..., None, None], torch.mul)
        for part, update, decay in zip(parts, updates, parts[len(updates) :], strict=False)
    ]


def _compose(shards: Shards, update: torch.Tensor, carry: torch.Tensor, product: Callable) -> torch.Tensor:
    """States [M, ...] at the start of this rank's chunks, where chunk n maps S to product(carry[n], S) + update[n].

    update and carry [2R, B, ...]. A chunk in which a document starts does not pass S on.
    """
    shape = (-1, shards.batch, *[1] * (update.dim() - 2))
    whole, continues = (x.T.to(update).view(shape) for x in (shards.whole, shards.continues))
    state, initial = torch.zeros_like(update[0]), []
    for chunk, added in enumerate(update):
        initial.append(continues[chunk] * state)
        state = added + whole[chunk] * product(carry[chunk], state)
    return shards.own_chunks_of(torch.stack(initial))


def _initial(shards: Shards, entering: torch.Tensor) -> torch.Tensor:
    """Initial states of all segments [S, ...]: those of first segments from `entering` [M, ...], zeros for others."""
    return entering.new_zeros(len(shards.lengths), *entering.shape[1:]).index_copy(0, shards.first, entering)


def window(shards, op, q, sets, scale, seen=None, cu_seqlens=None, dropout=0.0):
    """The first segment of a chunk needs the positions before the chunk. Other segments begin in the chunk."""
    in_first = shards.in_first.flatten()
    token, rest = in_first.nonzero()[:, 0], (~in_first).nonzero()[:, 0]
    is_first = torch.zeros(len(shards.lengths), dtype=torch.bool, device=q.device).index_fill(0, shards.first, True)
    lengths = shards.lengths.to(q.device)

    def part(token: torch.Tensor, lengths: torch.Tensor, sets: list[KeySet], seen: torch.Tensor | None) -> torch.Tensor:
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        sets = [replace(keys, k=keys.k[:, token], v=keys.v[:, token]) for keys in sets]
        return op(q[:, token], sets, scale, seen, bounds, dropout)

    with_past = []
    for keys in sets:
        halo = shards.halo(torch.cat([keys.k, keys.v], -1), keys.high)
        past_k, past_v = halo.split([keys.k.shape[-1], keys.v.shape[-1]], -1)
        with_past.append(replace(keys, past_k=past_k, past_v=past_v))
    o = part(token, lengths[is_first], with_past, shards.seen)
    o = o.new_zeros(*q.shape[:3], o.shape[-1]).index_copy(1, token, o)
    if len(rest):
        o = o.index_copy(1, rest, part(rest, lengths[~is_first], sets, None))
    return o


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    shards: Shards | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with transformers' interface: query [B, H, 2c, K], key and value [B, Hk, 2c, K] -> [B, 2c, H, K].

    Without `shards` it is transformers' own "sdpa".
    """
    if shards is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    shards.group.label = f"{module.layer_idx} attention"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sliding_window is not None:
        q, k, v = (x.transpose(1, 2).flatten(0, 1)[None] for x in (query, key, value))
        o = window(shards, windowed_attention, q, [KeySet(k, v, 0, sliding_window - 1)], scale, dropout=dropout)
        return o[0].unflatten(0, (shards.batch, -1)), None
    row = shards.gather_tokens(torch.cat([key, value], -1), 2)
    row_k, row_v = row.split([key.shape[-1], value.shape[-1]], -1)
    # Each segment attends to its document's tokens up to its own: no mask, and no scores between documents.
    outputs, lengths = [], iter(shards.lengths.tolist())
    for number, documents in enumerate(shards.documents):
        sizes = [next(lengths) for _ in documents]
        parts = zip(documents, *(x[number].split(sizes, 1) for x in (query, key, value)), strict=True)
        for seen, q, k, v in parts:
            if seen is not None:
                k, v = row_k[number, :, seen], row_v[number, :, seen]
            outputs.append(_causal(q[None], k[None], v[None], scale, dropout)[0])
    o = torch.cat(outputs, 1).unflatten(1, (shards.batch, -1)).permute(1, 2, 0, 3)
    return _DependsOn.apply(o, row), None


class _DependsOn(torch.autograd.Function):
    """Returns `o` unchanged, with a dependence on `row` in the graph.

    On ranks that did not use `row`, its backward would not run, and the other ranks would wait for its collective.
    """

    @staticmethod
    def forward(ctx: Any, o: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        ctx.like = row.new_empty(0), row.shape
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        like, shape = ctx.like
        return grads[0], like.new_zeros(shape)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout: float) -> torch.Tensor:
    """Causal attention of the last queries of a sequence to all of its keys."""
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout, "enable_gqa": q.shape[1] != k.shape[1]}
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(queries, keys), **options)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
