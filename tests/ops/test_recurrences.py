# SPDX-License-Identifier: Apache-2.0
"""What holds for every recurrence: its versions agree; cuts, packing, dtypes and autocast do not change results."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmf import ops
from hmf.ops import dispatch
from tests.ops import recurrent, test_gdn, test_gka, test_kda, test_ssd
from tests.ops.cases import QUICK, documents, outputs_and_grads

CASES = {"gdn": test_gdn.case, "gka": test_gka.case, "kda": test_kda.case, "ssd": test_ssd.case}
ENTRIES = {
    "gdn": ops.gated_delta_rule,
    "gka": ops.gated_kalmanet,
    "kda": ops.kimi_delta_attention,
    "ssd": ops.linear_attention,
}
every_op = pytest.mark.parametrize("op", CASES)


@pytest.mark.parametrize("op", ["gdn", "kda", "ssd"])  # test_gka.py has GKA's, with its options
@QUICK
@given(documents, st.booleans())
def test_chunked_is_the_reference(op, lengths, with_state):
    recurrent.check_versions_agree(CASES[op], lengths, with_state)


@every_op
@QUICK
@given(st.lists(st.integers(0, 22), max_size=4))
def test_split_is_whole(op, cuts):
    recurrent.check_split_is_whole(CASES[op], CASES[op].chunked, cuts, 23)


@every_op
@QUICK
@given(documents.filter(bool))
def test_packed_is_alone(op, lengths):
    recurrent.check_packed_is_alone(CASES[op], CASES[op].chunked, lengths)


@every_op
def test_groups_are_whole(op, monkeypatch):
    recurrent.check_groups_are_whole(CASES[op], monkeypatch)


@every_op
def test_arguments_stay(op):
    recurrent.check_arguments_stay(op, dispatch.implementations(op)["chunked"].function)


@every_op
def test_bfloat16(op):
    recurrent.check_bfloat16(CASES[op])


@every_op
def test_autocast_changes_nothing(op):
    """Autocast, as training in bfloat16 has it, leaves the recurrences' own products in float32."""
    given = [x.float() for x in CASES[op].inputs(1, 70)]
    expected = outputs_and_grads(ENTRIES[op], given)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_and_grads(ENTRIES[op], given)
    outputs = len(expected) - len(given)
    assert all(torch.equal(a, b) for a, b in zip(found[:outputs], expected[:outputs], strict=True))
    # A backward inside autocast rounds PyTorch's own products, around those of the op.
    assert all((a - b).norm() < 0.01 * b.norm() for a, b in zip(found[outputs:], expected[outputs:], strict=True))
