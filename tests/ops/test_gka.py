# SPDX-License-Identifier: Apache-2.0
"""Gated KalmaNet: the iteration, its limit, its gradients and its memory."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hmf.ops import gated_kalmanet, gka, gka_solve
from hmf.ops.ssd import scan_states
from hmf.ops.varlen import ChunkLayout
from tests.numerics import assert_same
from tests.ops import recurrent
from tests.ops.cases import QUICK, documents, log_decay, normal, outputs_and_grads

H, K, V = 2, 4, 3


def inputs(batch, tokens, heads=H, key_dim=K, value_dim=V):
    shape = batch, tokens, heads
    q, k = (F.normalize(normal(*shape, key_dim), dim=-1) for _ in range(2))
    beta, alpha = torch.rand(2, *shape, dtype=torch.float64)
    return [q, k * beta[..., None], normal(*shape, value_dim), log_decay(*shape), log_decay(*shape), alpha]


def states(sequences):
    factor = normal(sequences, H, K, K)
    return [factor @ factor.mT / K, normal(sequences, H, K, V)]


def case_of(**options):
    return recurrent.RecurrentCase(
        inputs=inputs,
        states=states,
        reference=functools.partial(gka.reference, **options),
        chunked=functools.partial(gka.chunked, chunk_size=8, **options),
    )


case = case_of(num_iter=6)


@QUICK
@given(documents, st.booleans(), st.integers(0, 5), st.booleans(), st.booleans())
def test_chunked_is_the_reference(lengths, with_state, num_iter, bp_lambda, rescale):
    options = {"num_iter": num_iter, "bp_lambda": bp_lambda, "rescale": rescale}
    recurrent.check_versions_agree(case_of(**options), lengths, with_state)


@QUICK
@given(documents.filter(bool), st.booleans())
def test_states_of_all_sequences_together(lengths, with_state):
    """Also with decays that leave nothing of earlier chunks."""
    layout = ChunkLayout(1, sum(lengths), torch.tensor([0, *lengths]).cumsum(0), 1)
    x = [-(torch.rand(sum(lengths), H, 1).double() ** 4) * 2000, normal(sum(lengths), H, K, V)]
    x += [normal(len(lengths), H, K, V)] if with_state else []

    def together(log_decay, update, state=None):
        decays, updates = (layout.split(y[None])[:, 0] for y in (log_decay, update))
        starts, final = scan_states(layout, decays, updates, state)
        return layout.merge(starts[:, None])[0], final

    def one_by_one(log_decay, update, state=None):
        starts, final, first = [], [], 0
        for s, length in enumerate(lengths):
            now = torch.zeros_like(update[0]) if state is None else state[s]
            for t in range(first, first + length):
                starts.append(now)
                now = log_decay[t, :, :, None].exp() * now + update[t]
            final.append(now)
            first += length
        return torch.stack(starts) if starts else update, torch.stack(final)

    assert_same(outputs_and_grads(together, x), outputs_and_grads(one_by_one, x))


def test_alpha_none_is_one():
    q, k, v, g, gk, alpha = inputs(1, 11)
    for version in (case.reference, case.chunked):
        assert_same(version(q, k, v, g, gk), version(q, k, v, g, gk, torch.ones_like(alpha)))


def test_without_steps_it_is_linear_attention():
    q, k, v, g, gk, alpha = inputs(1, 11)
    o, (C, U) = gated_kalmanet(q, k, v, g, gk, alpha, num_iter=0, rescale=False)
    expected, state = gka.linear_attention(q, k, v, g)
    decay = (gk.cumsum(1)[:, -1:] - gk.cumsum(1)).exp()
    assert_same([o, U, C], [expected, state, torch.einsum("bth,bthk,bthl->bhkl", decay, k, k)])


def test_iteration_converges_to_the_exact_solution():
    """The distance falls with every step, in outputs and in gradients."""
    x, steps = inputs(1, 24, key_dim=8), (5, 15, 30, 60)
    exact = outputs_and_grads(functools.partial(gka.reference, solve=gka_solve.solve_exact), x)
    distances = []
    for num_iter in steps:
        near = outputs_and_grads(functools.partial(gka.chunked, chunk_size=8, num_iter=num_iter), x)
        distances.append([((a - e).norm() / e.norm()).item() for a, e in zip(near, exact, strict=True)])
    # Chebyshev's rate is (sqrt(51) - 1) / (sqrt(51) + 1) = 0.75 a step; gradients carry the step's number as a factor.
    for tensor in (0, 3, 4):  # outputs, gradients of q and k
        for n in range(3):
            assert distances[n + 1][tensor] < distances[n][tensor] * 0.85 ** (steps[n + 1] - steps[n])
    assert distances[0][0] > 1e-2
    assert distances[-1][0] < 1e-6


@pytest.mark.parametrize("num_iter", [1, 3, 10, 30])
def test_distance_bound(num_iter):
    """The distance from the exact solution in the system's norm, from the start's, is below the bound."""
    k = normal(40, 16) * torch.logspace(0, -4, 16, dtype=torch.float64)
    C, q = k.T @ k, normal(16)
    system, exact = C + 0.02 * C.norm() * torch.eye(16), gka_solve.solve_exact(C, q, 0, 0.02)

    def distance(steps):
        away = gka_solve.solve_chebyshev(C, q, steps, 0.02) - exact
        return (away @ system @ away).sqrt()

    bound = gka_solve.distance_bound(num_iter, 0.02)
    assert bound / 5 < distance(num_iter) / distance(0) < bound


def test_exact_backward_is_the_solutions_gradient():
    """With enough steps, differentiating the solution and differentiating the iterations are the same thing, also from
    a covariance that is not symmetric."""
    x = inputs(1, 19)
    C, U = states(1)
    C = C + 0.02 * normal(1, H, K, K)

    def run(exact):
        options = {"chunk_size": 8, "num_iter": 90, "exact_backward": exact}
        return outputs_and_grads(lambda *y: gka.chunked(*y[:6], y[6:], **options), [*x, C, U])

    assert_same(run(True), run(False), 1e-7)


@pytest.mark.parametrize("bp_lambda", [True, False])
def test_detached_lambda_is_the_exact_solutions(bp_lambda):
    x = inputs(1, 9)
    near = outputs_and_grads(functools.partial(gka.chunked, num_iter=120, bp_lambda=bp_lambda), x)
    exact = outputs_and_grads(functools.partial(gka.reference, solve=gka_solve.solve_exact, bp_lambda=bp_lambda), x)
    assert_same(near, exact, 1e-7)


def test_gradcheck():
    x = [y.requires_grad_() for y in inputs(1, 5, heads=1, key_dim=2, value_dim=2)]
    C, U = (y.requires_grad_() for y in (torch.eye(2, dtype=torch.float64)[None, None] + 0.1, normal(1, 1, 2, 2)))

    def function(*x):
        o, (C, U) = gka.chunked(*x[:6], (x[6], x[7]), num_iter=4, chunk_size=3)
        return o, C, U

    assert torch.autograd.gradcheck(function, (*x, C, U))


def test_gradients_of_a_start_that_is_not_symmetric():
    """As gradients ask for it: they are those of every number of the covariance by itself."""
    x = inputs(1, 19)
    C, U = states(1)
    C = C + 0.2 * normal(*C.shape)

    def run(version):
        return outputs_and_grads(lambda *y: version(*y[:6], (y[6], y[7])), [*x, C, U])

    for num_iter in (1, 6):
        version = case_of(num_iter=num_iter)
        assert_same(run(version.chunked), run(version.reference))


def test_a_state_of_zeros_and_keys_of_zeros_give_finite_zeros():
    q, k, v, g, gk, alpha = inputs(1, 5)
    k = torch.zeros_like(k)
    for version in (case.reference, case.chunked):
        o, *grads = outputs_and_grads(lambda *x: version(*x)[0], [q, k, v, g, gk, alpha])  # noqa: B023
        assert not o.any()
        assert all(x.isfinite().all() for x in grads)


def test_memory_kept_for_the_backward_does_not_grow_with_the_steps():
    def saved(num_iter):
        x = [y.requires_grad_() for y in inputs(1, 64)]
        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gka.chunked(*x, num_iter=num_iter)
        return sum(sizes.values())

    assert saved(40) == saved(5)


def test_solver_groups_do_not_change_the_result(monkeypatch):
    x = inputs(2, 40)
    together = outputs_and_grads(case.chunked, x)
    monkeypatch.setattr(gka_solve, "_groups", lambda q, stored: [slice(i, i + 3) for i in range(0, len(q), 3)])
    assert_same(outputs_and_grads(case.chunked, x), together)
