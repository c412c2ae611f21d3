# SPDX-License-Identifier: Apache-2.0
"""`hmf bench states`: what rounding the states after each token does to log-probabilities."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hmf.bench.states import state_drift
from hmf.cli import app
from hmf.errors import HmfError
from tests.hybrids import Case, random_ids, tiny_hybrid

SEVERAL = Case("GDN", "several")


def test_states_as_they_are_drift_nowhere():
    model = tiny_hybrid(SEVERAL, "X-*-GKA-M2-BMF").float()
    drifts = state_drift(model, random_ids(2, 20), torch.float32, parts=3)
    assert [(drift.first, drift.last) for drift in drifts] == [(0, 5), (6, 11), (12, 18)]
    assert all(drift.mean == drift.worst == drift.loss == drift.changed == 0 for drift in drifts)


@pytest.mark.parametrize("symbol", ["GDN", "GKA", "M2", "BMF"])
def test_fewer_bits_drift_more(symbol):
    model, ids = tiny_hybrid(Case(symbol, "drift")).float(), random_ids(2, 24)
    half, narrow = (state_drift(model, ids, dtype, parts=1)[0] for dtype in (torch.float16, torch.bfloat16))
    assert 0 < half.mean < narrow.mean <= narrow.worst < 1


def test_command(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tiny_hybrid(SEVERAL).float().save_pretrained(tmp_path)
    _characters(PreTrainedTokenizerFast).save_pretrained(tmp_path)
    arguments = ["bench", "states", str(tmp_path), "--tokens", "9", "--batch", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["first"], row["last"]) for row in rows] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert "positions" in CliRunner().invoke(app, arguments).output
    caught = CliRunner().invoke(app, [*arguments, "--tokens", "300"]).exception
    assert isinstance(caught, HmfError) and "--tokens: 300 is not between 2 and 256" in str(caught)
    assert CliRunner().invoke(app, [*arguments, "--dtype", "int8"]).exit_code == 2


def _characters(kind):
    """A tokenizer of single letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {chr(96 + i): i for i in range(1, 27)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return kind(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")
