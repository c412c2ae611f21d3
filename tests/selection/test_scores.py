# SPDX-License-Identifier: Apache-2.0
"""What a choice costs, beside models that have just these mixers; and which tokens count as answers."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmf.config.pattern import Pattern
from hmf.data.encoding import Encoded
from hmf.data.packing import row_tensors
from hmf.model.convert import hybridise
from hmf.priming.objectives import Stage1Objective, train_only_mixers
from hmf.priming.stage0 import initialise
from hmf.selection.scores import Scorer, means
from tests.numerics import assert_same

TEXT, TALK = [-100, *range(4, 20)], [-100] * 9 + [5, 6, 7]
pytestmark = pytest.mark.usefixtures("in_float64")
choices = st.lists(st.frozensets(st.integers(0, 3)), min_size=1, max_size=6)


def row(*documents):
    """A packed row; a document is its labels, and ids stand where there are none."""
    return row_tensors(
        [Encoded([11 if label < 0 else label for label in labels], list(labels)) for labels in documents]
    )


def started(folder, pattern):
    """A fused model in float64, its mixers started in float32 as always."""
    from transformers import Qwen3ForCausalLM

    model = hybridise(Qwen3ForCausalLM.from_pretrained(folder), Pattern.parse(pattern))
    initialise(model)
    train_only_mixers(model)
    return model.double().eval()


@pytest.fixture(scope="module")
def everywhere(tiny_qwen3_dir):
    return started(tiny_qwen3_dir, "GDN-GDN-GDN-GDN")


@pytest.fixture(scope="module", params=["GDN-*-*-*", "*-GDN-*-GDN", "GDN-GDN-GDN-GDN"])
def some(request, tiny_qwen3_dir):
    return started(tiny_qwen3_dir, request.param)


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices)
def test_choices_scored_together_are_as_each_alone(everywhere, wanted):
    rows = [row(TEXT, TALK), row(TALK, TEXT), row(TALK, TEXT)]
    together = Scorer(everywhere, rows, batch_size=2)(wanted)
    for choice, sums in zip(wanted, together, strict=True):
        alone = Scorer(everywhere, rows, batch_size=3)([choice])[0]
        assert_same(sums, alone)
        if not choice:
            assert_same(sums[:, :2, 0], torch.zeros(3, 2).double())
            assert not sums[:, 3, 0].any()


def test_a_choice_costs_what_the_model_with_these_mixers_is_off(everywhere, some):
    choice = frozenset(some.config.pattern.replaced)
    packed = row(TALK, TALK)
    batch = {name: x[None] for name, x in packed.items()}
    objective = Stage1Objective(pre_lm_head=0, kl=1, kl_tokens="supervised")
    with torch.no_grad():
        wanted = some(**batch, objective=objective)["kl"]
        chosen = Stage1Objective(pre_lm_head=0, kl=1, kl_tokens="supervised", layers="all", replaced=choice)
        inside = everywhere(**batch, objective=chosen)
        parts = some(**batch, objective=Stage1Objective(layers="all"))
    found = means(Scorer(everywhere, [packed])([choice])[0])["kl_answers"]
    assert_same(torch.tensor(found, dtype=torch.float64), wanted)
    names = ("decoder", "mlp", "mixer")
    assert_same([inside["kl"], *(inside[name] for name in names)], [wanted, *(parts[name] for name in names)])


def test_tokens_of_text_and_of_answers_are_counted_apart(everywhere):
    sums = Scorer(everywhere, [row(TEXT), row(TALK), row(TEXT, TALK, TALK)], batch_size=1)([frozenset([1])])[0]
    assert sums[..., 1].tolist() == [[16, 0, 0, 0], [0, 3, 3, 3], [16, 6, 6, 6]]
    assert means(sums[:1]).keys() == {"kl_text"}
