# SPDX-License-Identifier: Apache-2.0
"""The delta rule with decays of channels: its versions agree, the reference is the equation, and with equal decays it
is the gated delta rule."""

import functools

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hmf.ops import gdn, kda
from tests.numerics import assert_near, assert_same
from tests.ops import recurrent, test_gdn
from tests.ops.cases import QUICK, documents, log_decay, normal, outputs_and_grads, shape

H, K, V = 2, 4, 3


def inputs(batch, tokens, strongest=0.5):
    q, k, v, _, beta = test_gdn.inputs(batch, tokens)
    return [q, k, v, log_decay(batch, tokens, H, K, strongest=strongest), beta]


case = recurrent.RecurrentCase(
    inputs=inputs,
    states=lambda sequences: [normal(sequences, H, K, V)],
    reference=kda.reference,
    chunked=functools.partial(kda.chunked, chunk_size=8),
)


@QUICK
@given(st.sampled_from([4.0, 60.0, 800.0]), st.integers(1, 150), st.booleans())
def test_strong_decays(strongest, tokens, of_some_channels):
    """Channels that forget at once beside others that keep: no overflow and no lost digit in float32."""
    q, k, v, g, beta = inputs(1, tokens, strongest)
    if of_some_channels:
        g = torch.where(torch.rand(g.shape) < 0.2, g, -0.01)
    exact = [*(x.float().double() for x in (q, k, v, g, beta)), normal(1, H, K, V).float().double()]
    rounded = [x.float() for x in exact]
    found = outputs_and_grads(kda.chunked, rounded)
    assert all(x.isfinite().all() for x in found)
    assert_near(found, outputs_and_grads(kda.reference, exact), outputs_and_grads(kda.reference, rounded))


@QUICK
@given(documents, st.booleans(), st.sampled_from(["reference", "chunked"]))
def test_equal_decays_are_the_gated_delta_rule(lengths, with_state, version):
    """Outputs, states and gradients; that of a head's decay is the sum over its channels."""
    batch, tokens, sequences, cu_seqlens = shape(lengths)
    given = test_gdn.inputs(batch, tokens) + ([normal(sequences, H, K, V)] if with_state else [])

    def of_channels(q, k, v, g, beta, state=None):
        return getattr(kda, version)(q, k, v, g[..., None].expand_as(k), beta, state, cu_seqlens)

    def of_heads(q, k, v, g, beta, state=None):
        return getattr(gdn, version)(q, k, v, g, beta, state, cu_seqlens)

    assert_same(outputs_and_grads(of_channels, given), outputs_and_grads(of_heads, given))


def test_reference_is_the_equation():
    """S <- (I - beta k k^T) diag(e^g) S + beta k v^T, the form of the paper."""
    q, k, v, g, beta = (x[0, :, 0] for x in inputs(1, 5))
    S = torch.zeros(K, V, dtype=torch.float64)
    for t in range(5):
        keep = torch.eye(K, dtype=torch.float64) - beta[t] * torch.outer(k[t], k[t])
        S = keep @ torch.diag(g[t].exp()) @ S + beta[t] * torch.outer(k[t], v[t])
    o, state = kda.reference(*(x[None, :, None] for x in (q, k, v, g, beta)))
    assert_same([o[0, -1, 0], state[0, 0]], [q[-1] @ S * K**-0.5, S])


def test_a_channel_forgets_alone():
    """Keys of one channel each: the channel that forgets at once loses its value, the other one keeps it."""
    k = F.one_hot(torch.tensor([0, 1, 2]), K).double()[None, :, None]
    v, g = normal(1, 3, 1, V), torch.zeros(1, 3, 1, K, dtype=torch.float64)
    g[0, 2, 0, 0] = -1e4
    for version in (kda.reference, case.chunked):
        _, state = version(k, k, v, g, torch.ones(1, 3, 1, dtype=torch.float64))
        assert_same(state[0, 0, :3], torch.stack([torch.zeros_like(v[0, 0, 0]), v[0, 1, 0], v[0, 2, 0]]))
