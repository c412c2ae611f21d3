# SPDX-License-Identifier: Apache-2.0
"""Autocast, as training in bfloat16 has it, leaves the recurrences' own products in float32."""

import pytest
import torch

from hmf import ops
from tests.ops import test_gdn, test_gka, test_kda, test_ssd
from tests.ops.cases import flat

CASES = {
    ops.gated_delta_rule: test_gdn.case,
    ops.gated_kalmanet: test_gka.case,
    ops.kimi_delta_attention: test_kda.case,
    ops.linear_attention: test_ssd.case,
}


@pytest.mark.parametrize("op", CASES, ids=lambda op: op.__name__)
def test_autocast_changes_nothing(op):
    given = [x.float() for x in CASES[op].inputs(1, 70)]
    expected = flat(op(*given))
    with torch.autocast("cpu", torch.bfloat16):
        found = flat(op(*given))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
