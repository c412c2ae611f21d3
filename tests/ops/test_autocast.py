# SPDX-License-Identifier: Apache-2.0
"""Autocast, as training in bfloat16 has it, leaves the recurrences' own products in float32."""

import pytest
import torch

from hmf import ops
from tests.ops import test_gdn, test_gka, test_kda, test_ssd
from tests.ops.cases import outputs_and_grads

CASES = {
    ops.gated_delta_rule: test_gdn.case,
    ops.gated_kalmanet: test_gka.case,
    ops.kimi_delta_attention: test_kda.case,
    ops.linear_attention: test_ssd.case,
}


@pytest.mark.parametrize("op", CASES, ids=lambda op: op.__name__)
def test_autocast_changes_nothing(op):
    given = [x.float() for x in CASES[op].inputs(1, 70)]
    expected = outputs_and_grads(op, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_and_grads(op, given)
    outputs = len(expected) - len(given)
    assert all(torch.equal(a, b) for a, b in zip(found[:outputs], expected[:outputs], strict=True))
    # A backward inside autocast rounds PyTorch's own products, around those of the op.
    assert all((a - b).norm() < 0.01 * b.norm() for a, b in zip(found[outputs:], expected[outputs:], strict=True))
