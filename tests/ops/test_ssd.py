# SPDX-License-Identifier: Apache-2.0
"""Linear attention with decay, and Mamba2's state-space form of it."""

import functools

import torch
import torch.nn.functional as F

from hmf.ops import linear_attention, state_space_dual
from hmf.ops.ssd import chunked, reference
from tests.numerics import assert_near, assert_same
from tests.ops import recurrent
from tests.ops.cases import log_decay, normal

H, K, V = 2, 4, 3


def inputs(batch, tokens):
    q, k = (normal(batch, tokens, H, K) / 2 for _ in range(2))
    return [q, k, normal(batch, tokens, H, V), log_decay(batch, tokens, H)]


case = recurrent.RecurrentCase(
    inputs=inputs,
    states=lambda sequences: [normal(sequences, H, K, V)],
    reference=reference,
    chunked=functools.partial(chunked, chunk_size=8),
)


def test_strong_decay_stays_finite():
    q, k, v, g = (x.float() for x in inputs(1, 80))
    x = [q, k, v, 400 * g]
    sums = F.pad(x[3].cumsum(1), (0, 0, 1, 0))  # chunks take the decay from one token to another as their difference
    assert_near(chunked(*x), reference(*(y.double() for y in x)), reference(*x[:3], sums.diff(dim=1)))


def test_without_decay_it_is_attention_without_softmax():
    q, k, v, g = inputs(2, 13)
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    o, state = linear_attention(q, k, v, torch.zeros_like(g))
    assert_same([o, state], [torch.einsum("bhts,bshv->bthv", scores, v), torch.einsum("bshk,bshv->bhkv", k, v)])


def test_ssd_is_mamba2s_recurrence():
    B, C, x, _ = inputs(1, 9)
    dt, A, D = F.softplus(normal(1, 9, H)), -torch.rand(H, dtype=torch.float64) * 3, normal(H)
    y, state = state_space_dual(x, B, C, dt, A, D)
    S = torch.zeros(H, V, K, dtype=torch.float64)  # the paper's orientation
    for t in range(9):
        S = (dt[0, t] * A).exp()[:, None, None] * S + dt[0, t, :, None, None] * x[0, t, :, :, None] * B[0, t, :, None]
        assert_same(y[0, t], torch.einsum("hvk,hk->hv", S, C[0, t]) + D[:, None] * x[0, t])
    assert_same(state[0], S.mT)


def test_ssd_in_bfloat16_keeps_the_step_sizes_exact():
    B, C, x, _ = (y.bfloat16() for y in inputs(1, 40))
    dt, A = F.softplus(normal(1, 40, H)).float(), -torch.rand(H)
    y, state = state_space_dual(x, B, C, dt, A)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact = state_space_dual(x.double(), B.double(), C.double(), dt.double(), A.double())
    plain, plain_state = state_space_dual(x.float(), B.float(), C.float(), dt, A)
    assert_near([y, state], exact, [plain.bfloat16(), plain_state])
