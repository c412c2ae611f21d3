# SPDX-License-Identifier: Apache-2.0
"""Windowed attention over one and two sets of keys, whole, packed and continued from a past."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmf.errors import HmfError
from hmf.ops import KeySet, windowed_attention
from hmf.ops.window import blockwise, latest, reference
from tests.numerics import assert_same
from tests.ops.cases import QUICK, documents, normal, outputs_and_grads, shape

H, HK, K = 4, 2, 4
SCALE = 0.4


def windows(window: int, fading: bool) -> list[tuple[int, int]]:
    return [(0, window - 1), *([(window, 2 * window - 1)] if fading else [])]


def tokens_of(batch, tokens, sets, value_dim=3):
    return [normal(batch, tokens, H, K)] + [normal(batch, tokens, HK, d) for _ in range(sets) for d in (K, value_dim)]


def call(version, x, bounds, past=None, seen=None, cu_seqlens=None):
    q, *kv = x
    pasts = [None] * len(kv) if past is None else past
    sets = [KeySet(*kv[2 * i : 2 * i + 2], *b, *pasts[2 * i : 2 * i + 2]) for i, b in enumerate(bounds)]
    return version(q, sets, SCALE, seen, cu_seqlens)


@pytest.mark.parametrize("value_dim", [3, K])  # equal head dims have a kernel of their own in PyTorch
@pytest.mark.parametrize("only", [slice(0, 1), slice(0, 2), slice(1, 2)], ids=["near", "both", "far"])
@QUICK
@given(documents, st.integers(1, 9), st.booleans(), st.integers(1, 12))
def test_blockwise_is_the_reference(only, value_dim, lengths, window, with_past, block_size):
    batch, tokens, sequences, cu_seqlens = shape(lengths)
    bounds = windows(window, True)[only]
    x, past, seen = tokens_of(batch, tokens, len(bounds), value_dim), [], None
    if with_past:
        seen = torch.randint(0, 3 * window, (sequences,))
        slots = [high + block_size % 3 for _, high in bounds]  # more than are in reach do no harm
        past = [normal(sequences, n, HK, d) for n in slots for d in (K, value_dim)]

    def run(version):
        return outputs_and_grads(
            lambda *y: call(version, y[: len(x)], bounds, y[len(x) :] if past else None, seen, cu_seqlens), x + past
        )

    assert_same(run(functools.partial(blockwise, block_size=block_size)), run(reference))


@QUICK
@given(st.lists(st.integers(0, 22), max_size=4), st.integers(1, 9), st.booleans())
def test_split_is_whole(cuts, window, fading):
    """Calls that keep only the window's past give the uncut result."""
    tokens, bounds = 23, windows(window, fading)
    x = tokens_of(2, tokens, len(bounds))
    parts, past, ends = [], None, sorted({0, tokens, *cuts})
    for first, stop in zip(ends, ends[1:], strict=False):
        part = [y[:, first:stop] for y in x]
        parts.append(call(blockwise, part, bounds, past, torch.full((2,), first)))
        reach = [high for _, high in bounds for _ in range(2)]
        past = [
            latest(y, n, None if past is None else past[i])
            for i, (y, n) in enumerate(zip(part[1:], reach, strict=True))
        ]
    assert_same(torch.cat(parts, 1), call(reference, x, bounds))


@QUICK
@given(documents.filter(bool), st.integers(1, 6))
def test_latest_keeps_the_end_of_each_sequence(lengths, size):
    _, tokens, sequences, cu_seqlens = shape(lengths)
    x, past = normal(1, tokens, 2), normal(sequences, size, 2)
    kept = latest(x, size, past, cu_seqlens)
    for s, (first, stop) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        assert_same(kept[s], torch.cat([past[s], x[0, first:stop]])[-size:])
        if stop > first:
            assert_same(latest(x[:, first:stop], size)[0], x[0, first:stop][-size:])


def test_latest_grows_to_its_size():
    x = normal(1, 5, 1)
    kept = latest(x[:, :2], 3)
    assert_same(kept, x[:, :2])
    kept = latest(x[:, 2:4], 3, kept)
    assert_same(kept, x[:, 1:4])
    assert_same(latest(x[:, 4:], 3, kept), x[:, 2:])


def test_a_window_over_all_is_causal_attention():
    x = tokens_of(2, 9, 1)
    q, k, v = (y.transpose(1, 2) for y in x)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    assert_same(call(windowed_attention, x, [(0, 100)]), expected.transpose(1, 2))


def test_two_adjoining_sets_of_the_same_keys_are_one_window():
    q, k, v = tokens_of(1, 30, 1)
    assert_same(
        call(blockwise, [q, k, v, k, v], windows(5, True)),
        call(reference, [q, k, v], [(0, 9)]),
    )


@pytest.mark.parametrize("version", [reference, blockwise])
def test_a_query_that_sees_no_key_gives_zeros_and_finite_gradients(version):
    o, *grads = outputs_and_grads(lambda *x: call(version, x, [(3, 5)]), tokens_of(1, 9, 1))
    assert not o[:, :3].any()
    assert o[:, 3:].all()
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("version", [reference, blockwise])
def test_keys_that_no_query_reaches_have_gradients_of_zero(version):
    """Not None: DDP fails without a gradient for each parameter, and FSDP2 could not resume."""
    q, *kv = (x.requires_grad_() for x in tokens_of(1, 5, 2))
    o = call(version, [q, *kv], windows(5, True))
    assert not any(grad.any() for grad in torch.autograd.grad(o.sum(), kv[2:]))


def test_block_memory_is_the_windows():
    """Twice the tokens keep twice the memory for the backward, not four times; a window beyond them costs nothing."""

    def saved(tokens, window):
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = [y.requires_grad_() for y in tokens_of(1, tokens, 1, K)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call(functools.partial(blockwise, block_size=64), x, [(0, window - 1)])
        return sum(sizes.values())

    assert saved(2048, 16) < 2.2 * saved(1024, 16)
    assert saved(256, 10**6) == saved(256, 256)


def test_a_window_that_looks_ahead_is_refused():
    x = normal(1, 3, HK, K)
    with pytest.raises(HmfError, match="low=-1, high=4"):
        KeySet(x, x, -1, 4)


def test_half_a_past_is_refused():
    x = normal(1, 3, HK, K)
    with pytest.raises(HmfError, match="pass both or neither"):
        KeySet(x, x, 0, 4, past_k=x)


@pytest.mark.parametrize("version", [reference, blockwise])
def test_dropout_leaves_the_mean(version):
    """Each weight is 0 in a share of the calls, and larger in the others."""
    x, bounds = tokens_of(1, 6, 2), windows(3, True)
    sets = [KeySet(x[1 + 2 * i], x[2 + 2 * i], *b) for i, b in enumerate(bounds)]
    calls = torch.stack([version(x[0], sets, SCALE, dropout=0.3) for _ in range(600)])
    whole = version(x[0], sets, SCALE)
    assert (calls.std(0) > 0).all()
    assert (calls.mean(0) - whole).abs().max() < 6 * calls.std(0).max() / 600**0.5
