# SPDX-License-Identifier: Apache-2.0
"""`hmf bench states`: what rounding the states after each token does to log-probabilities."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hmf.bench.states import Stored, state_drift
from hmf.cli import app
from hmf.errors import HmfError
from tests.hybrids import Case, random_ids, tiny_hybrid

SEVERAL = Case("GDN", "several")


def test_states_as_they_are_drift_nowhere():
    model = tiny_hybrid(SEVERAL, "X-*-GKA-M2-BMF").float()
    drifts = state_drift(model, random_ids(2, 20), Stored(torch.float32), parts=3)
    assert [(drift.first, drift.last) for drift in drifts] == [(0, 5), (6, 11), (12, 18)]
    assert all(drift.mean == drift.worst == drift.loss == drift.changed == 0 for drift in drifts)


@pytest.mark.parametrize("symbol", ["GDN", "GKA", "M2", "BMF"])
def test_fewer_bits_drift_more(symbol):
    model, ids = tiny_hybrid(Case(symbol, "drift")).float(), random_ids(2, 24)
    half, narrow = (state_drift(model, ids, Stored(dtype), parts=1)[0] for dtype in (torch.float16, torch.bfloat16))
    assert 0 < half.mean < narrow.mean <= narrow.worst < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(dtype):
    """Each number becomes one of its two neighbours in the dtype, and the mean of many is the number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, generator=generator)
    x[:3] = torch.tensor([0.0, 1.0, -2.5])  # exact in both dtypes
    many = torch.stack([Stored(dtype, stochastic=True).rounded(x, generator) for _ in range(4000)])
    assert torch.equal(many, many.to(dtype).float())
    assert torch.equal(many[:, :3], x[:3].expand(4000, 3))
    step = torch.finfo(dtype).eps * x.abs()
    assert ((many - x).abs() <= step * (1 + 1e-6)).all()
    assert ((many.mean(0) - x).abs() <= 0.05 * step).all()
    assert ((x.to(dtype).float() - x).abs() > 0.1 * step).any()  # to the nearest is not


def test_keys_and_values_in_fewer_bits():
    model, ids = tiny_hybrid(SEVERAL, "X-*-X-*").float(), random_ids(2, 24)
    half, narrow = (
        state_drift(model, ids, Stored(kv_dtype=dtype), parts=1)[0] for dtype in (torch.float16, torch.float8_e4m3fn)
    )
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
    fewer = ["--dtype", "float32", "--kv-cache-dtype", "fp8"]
    shown = CliRunner().invoke(app, [*arguments, *fewer]).output
    assert "states in float32, keys and values in fp8" in " ".join(shown.split())
    shown = CliRunner().invoke(app, [*arguments, "--rounding", "stochastic"]).output
    assert "states in bfloat16, rounded at random" in " ".join(shown.split())
    caught = CliRunner().invoke(app, [*arguments, "--tokens", "300"]).exception
    assert isinstance(caught, HmfError) and "--tokens: 300 is not between 2 and 256" in str(caught)
    assert CliRunner().invoke(app, [*arguments, "--dtype", "int8"]).exit_code == 2
    shown = CliRunner().invoke(app, ["bench", "states", "--help"]).output
    assert "Device to run on. Default: cuda if a GPU is available, else cpu." in " ".join(shown.split())


def test_few_tokens_and_weights_that_are_not_finite():
    model, ids = tiny_hybrid(SEVERAL).float(), random_ids(1, 3)
    for tokens, places in ((3, [(0, 0), (1, 1)]), (2, [(0, 0)])):
        found = state_drift(model, ids[:, :tokens], Stored(torch.bfloat16))
        assert [(drift.first, drift.last) for drift in found] == places
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(HmfError, match="log-probabilities are not finite; check the weights of the model"):
        state_drift(model, ids, Stored(torch.bfloat16))


def _characters(kind):
    """A tokenizer of single letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {chr(96 + i): i for i in range(1, 27)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return kind(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")
