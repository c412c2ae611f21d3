# SPDX-License-Identifier: Apache-2.0
"""Properties of every recurrent op, checked for any pair of its versions.

An op comes as a `RecurrentCase`: how to make its token-wise inputs and its states, and how to call a version of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hmf.ops import varlen
from hmf.ops.samples import Shape, sample
from tests.numerics import assert_near, assert_same
from tests.ops.cases import flat, outputs_and_grads, shape


@dataclass(frozen=True)
class RecurrentCase:
    inputs: Callable[[int, int], list[torch.Tensor]]  # (batch, tokens) -> tensors [B, T, ...]
    states: Callable[[int], list[torch.Tensor]]  # (sequences) -> tensors [S, ...]
    # version(*inputs, initial_state, cu_seqlens); an op of one state takes and returns it bare
    reference: Callable
    chunked: Callable

    def call(self, version: Callable, inputs, states, cu_seqlens=None):
        given = None if not states else states[0] if len(states) == 1 else tuple(states)
        return version(*inputs, given, cu_seqlens)


def check_versions_agree(case: RecurrentCase, lengths, with_state: bool, tolerance: float = 1e-9):
    """Outputs, final states and all gradients of the chunked version are the reference's."""
    batch, tokens, sequences, cu_seqlens = shape(lengths)
    inputs = case.inputs(batch, tokens)
    states = case.states(sequences) if with_state else []

    def run(version):
        return outputs_and_grads(
            lambda *x: case.call(version, x[: len(inputs)], x[len(inputs) :], cu_seqlens), inputs + states
        )

    assert_same(run(case.chunked), run(case.reference), tolerance)


def check_split_is_whole(case: RecurrentCase, version: Callable, cuts: list[int], tokens: int):
    """Any cut of a sequence into calls that hand on the state gives the uncut result."""
    inputs, states = case.inputs(2, tokens), case.states(2)
    whole = case.call(version, inputs, states)
    parts, bounds = [], sorted({0, tokens, *(cut % tokens for cut in cuts)})
    for first, stop in zip(bounds, bounds[1:], strict=False):
        o, *states = flat(case.call(version, [x[:, first:stop] for x in inputs], states))
        parts.append(o)
    assert_same([torch.cat(parts, 1), *states], whole)


def check_packed_is_alone(case: RecurrentCase, version: Callable, lengths: list[int]):
    """Each packed document has the outputs and final state that it has alone."""
    _, tokens, sequences, cu_seqlens = shape(lengths)
    inputs, states = case.inputs(1, tokens), case.states(sequences)
    o, *final = flat(case.call(version, inputs, states, cu_seqlens))
    for s, (first, stop) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        if first == stop:
            assert_same([x[s] for x in final], [x[s] for x in states])
            continue
        alone = case.call(version, [x[:, first:stop] for x in inputs], [x[s : s + 1] for x in states])
        assert_same([o[:, first:stop], *(x[s : s + 1] for x in final)], alone)


def check_groups_are_whole(case: RecurrentCase, monkeypatch):
    """Chunks computed a few at a time give what all at once give."""
    _, tokens, sequences, cu_seqlens = shape([9, 50, 17])
    inputs, states = case.inputs(1, tokens), case.states(sequences)

    def run(group):
        monkeypatch.setattr(varlen, "GROUP", group)
        return outputs_and_grads(
            lambda *x: case.call(case.chunked, x[: len(inputs)], x[len(inputs) :], cu_seqlens), inputs + states
        )

    for group in (1, 64):
        assert_same(run(group), run(10_000))


def check_arguments_stay(op: str, version: Callable):
    """No argument is written to, also with one head and whole chunks, where another order of dimensions is a view."""
    made = sample(op, Shape(tokens=128, heads=1, head_dim=8, with_state=True))
    tensors = {name: x.requires_grad_() for name, x in made.tensors(torch.float32).items()}
    before = {name: x.detach().clone() for name, x in tensors.items()}
    results = flat(made.call(version, tensors))
    weights = [torch.ones_like(x) for x in results]
    torch.autograd.backward(results, weights)
    after, wanted = [*tensors.values(), *weights], [*before.values(), *map(torch.ones_like, weights)]
    assert all(torch.equal(x, y) for x, y in zip(after, wanted, strict=True))


def check_bfloat16(case: RecurrentCase):
    """bfloat16 tokens give bfloat16 outputs near the float64 ones and float32 states, from all versions alike."""
    exact, states = case.inputs(1, 40), case.states(1)
    rounded = [x.bfloat16() for x in exact]
    expected = flat(case.call(case.reference, [x.double() for x in rounded], states))
    o, *final = flat(case.call(case.reference, [x.float() for x in rounded], [x.float() for x in states]))
    plain = [o.bfloat16(), *final]
    for version in (case.reference, case.chunked):
        o, *final = flat(case.call(version, rounded, [x.float() for x in states]))
        assert o.dtype == torch.bfloat16
        assert all(x.dtype == torch.float32 for x in final)
        assert_near([o, *final], expected, plain)
