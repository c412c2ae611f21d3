# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule: its versions agree, and the reference is the equation."""

import functools

import torch
import torch.nn.functional as F

from hmf.ops import gated_delta_rule, gdn
from tests.numerics import assert_near, assert_same
from tests.ops import recurrent
from tests.ops.cases import log_decay, normal

H, K, V = 2, 4, 3


def inputs(batch, tokens):
    q, k = (F.normalize(normal(batch, tokens, H, K), dim=-1) for _ in range(2))
    beta = 2 * torch.rand(batch, tokens, H, dtype=torch.float64)  # up to 2: negative eigenvalues
    return [q, k, normal(batch, tokens, H, V), log_decay(batch, tokens, H), beta]


case = recurrent.RecurrentCase(
    inputs=inputs,
    states=lambda sequences: [normal(sequences, H, K, V)],
    reference=gdn.reference,
    chunked=functools.partial(gdn.chunked, chunk_size=8),
)


def test_strong_decay_stays_finite():
    q, k, v, g, beta = (x.float() for x in inputs(1, 80))
    x = [q, k, v, 400 * g, beta]
    assert_near(gdn.chunked(*x), gdn.reference(*(y.double() for y in x)), gdn.reference(*x))


def test_reference_is_the_equation():
    """S <- e^g (I - beta k k^T) S + beta k v^T, the form of the paper, with the decay put first."""
    q, k, v, g, beta = (x[0, :, 0] for x in inputs(1, 5))
    S = torch.zeros(K, V, dtype=torch.float64)
    for t in range(5):
        keep = torch.eye(K, dtype=torch.float64) - beta[t] * torch.outer(k[t], k[t])
        S = keep @ (g[t].exp() * S) + beta[t] * torch.outer(k[t], v[t])
    o, state = gdn.reference(*(x[None, :, None] for x in (q, k, v, g, beta)))
    assert_same([o[0, -1, 0], state[0, 0]], [q[-1] @ S * K**-0.5, S])


def test_a_key_read_back_gives_its_value():
    """Written with beta 1 and no decay, the last value of a key is exact whatever came before."""
    _, k, v, g, beta = inputs(1, 9)
    o, _ = gated_delta_rule(k, k, v, torch.zeros_like(g), torch.ones_like(beta))
    assert_same(o * K**0.5, v)
