# SPDX-License-Identifier: Apache-2.0
"""The short convolution: whole, split, packed; its kernels in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hmf.bench import doctor
from hmf.ops import short_conv
from hmf.ops.samples import Shape, sample
from tests import numerics
from tests.ops import recurrent
from tests.ops.cases import QUICK, documents, normal, shape

C, W = 3, 4
weight, bias = torch.linspace(-1, 1, C * W, dtype=torch.float64).view(C, 1, W), torch.arange(C, dtype=torch.float64)


def by_token(x, initial_state=None, cu_seqlens=None):
    """Sum over taps, token by token and sequence by sequence: the definition."""
    bounds = range(len(x) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    rows = x if cu_seqlens is None else [x[0, a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    outputs, states = [], []
    for s, row in enumerate(rows):
        history = x.new_zeros(C, W - 1) if initial_state is None else initial_state[s]
        for token in row:
            taps = torch.cat([history, token[:, None]], 1)
            outputs.append(F.silu((taps * weight[:, 0]).sum(1) + bias))
            history = taps[:, 1:]
        states.append(history)
    return torch.stack(outputs).view(x.shape), torch.stack(states)


def conv(x, initial_state=None, cu_seqlens=None):
    return short_conv(x, weight, bias, initial_state, cu_seqlens)


case = recurrent.RecurrentCase(
    inputs=lambda batch, tokens: [normal(batch, tokens, C)],
    states=lambda sequences: [normal(sequences, C, W - 1)],
    reference=by_token,
    chunked=conv,
)


@QUICK
@given(documents, st.booleans())
def test_is_the_definition(lengths, with_state):
    recurrent.check_versions_agree(case, lengths, with_state)


@QUICK
@given(st.lists(st.integers(0, 10), max_size=4))
def test_split_is_whole(cuts):
    recurrent.check_split_is_whole(case, conv, cuts, 11)


@QUICK
@given(documents.filter(bool))
def test_packed_is_alone(lengths):
    recurrent.check_packed_is_alone(case, conv, lengths)


@pytest.mark.parametrize("lengths", [None, [5, 0, 2]])
def test_gradients_of_weight_and_bias(lengths):
    batch, tokens, sequences, cu_seqlens = shape(lengths)
    x, state = normal(batch, tokens, C), normal(sequences, C, W - 1)
    parameters = [y.clone().requires_grad_() for y in (weight, bias)]
    assert torch.autograd.gradcheck(lambda w, b: short_conv(x, w, b, state, cu_seqlens), parameters)


def check_kernels():
    from hmf.ops import conv as versions

    for case_shape in (
        Shape(lengths=(37, 0, 1, 2, 40), heads=2, head_dim=70, with_state=True),
        Shape(batch=2, tokens=5, heads=1, head_dim=12),
        Shape(lengths=(0, 3), heads=1, head_dim=12),
    ):
        made = sample("conv", case_shape)
        exact, plain, found = (
            doctor.evaluate(version, made, dtype, "cpu", True)
            for version, dtype in (
                (versions.reference, torch.float64),
                (versions.chunked, torch.float32),
                (versions.fast, torch.float32),
            )
        )
        for name, value in found.items():
            numerics.assert_near(value, exact[name], plain[name], what=f"{case_shape}: {name}")


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HMF_OPS": ""}
    program = [sys.executable, "-c", "from tests.ops.test_conv import check_kernels; check_kernels()"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
