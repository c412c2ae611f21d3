# SPDX-License-Identifier: Apache-2.0
"""The ways that `hmf bench distill` compares do the same work, and what it says of them is right."""

import functools

import pytest
import torch
from typer.testing import CliRunner

from hmf.bench import distill
from hmf.bench.distill import WAYS, Case, Result, measure, prepared, rows, run, with_overrides
from hmf.cli import app
from hmf.errors import HmfError
from tests import hybrids
from tests.hybrids import tiny_hybrid
from tests.numerics import assert_same


@pytest.mark.parametrize(("kl", "compiled"), [(0.0, False), (0.7, False), (0.7, True)])
@pytest.mark.usefixtures("in_float64")
def test_every_way_has_the_same_loss_and_gradients(tiny_qwen3_config, kl, compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    real = distill.AutoModelForCausalLM.from_config
    monkeypatch.setattr(distill.AutoModelForCausalLM, "from_config", lambda config, dtype: real(config).double())
    case = Case(tiny_qwen3_config, "*-GDN-*-GDN", rows=2, tokens=20, kl=kl, compiled=compiled)
    found = {}
    for way in WAYS:
        model, loss_of_batch = prepared(case, way)
        loss = loss_of_batch()
        loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert trained and all(".gdn." in name for name in trained)
        found[way] = loss, trained
    wanted_loss, wanted = found["two models"]
    for loss, gradients in found.values():
        assert gradients.keys() == wanted.keys()
        assert_same([loss, gradients], [wanted_loss, wanted])


def test_a_measurement_sees_memory_and_time(tiny_qwen3_config):
    case = Case(tiny_qwen3_config, "*-GDN-*-GDN", rows=1, tokens=16, repeats=2)
    result = measure(case, "one model")
    assert len(result.seconds) == 2 and min(result.seconds) > 0
    before = distill._peak(cuda=False)
    assert 0 <= result.peak_bytes < before
    ballast = torch.ones(2**26)  # 256 MiB
    assert distill._peak(cuda=False) > before + ballast.nbytes // 2


def test_rows_are_ratios_to_the_first_way(tiny_qwen3_config, capsys):
    case = Case(tiny_qwen3_config, "*-GDN-*-GDN", rows=2, tokens=50)
    found = {"two models": Result([3.0, 4.0, 3.5], 6000, 0.5), "one model": Result([1.5], 2000, 0.5)}
    first, second = rows(case, found)
    assert (first["speedup"], first["memory_ratio"]) == (1, 1)
    assert (second["tokens_per_second"], second["speedup"], second["memory_ratio"]) == (100 / 1.5, 2, 3)
    distill.print_rows([first, second], "a title")
    printed = capsys.readouterr().out
    assert "2.00x" in printed and "3.00x" in printed and "torch" in printed


def test_a_hybrid_is_refused_by_name(tmp_path):
    """A Hybrid's own mixers are no attention that could be replaced."""
    tiny_hybrid(hybrids.Case("GDN", "base"), "*-X-*-SWA").config.save_pretrained(tmp_path)
    with pytest.raises(HmfError, match=r"is already a Hybrid \(\*-GDN-\*-SWA\); give the base Transformer"):
        CliRunner().invoke(app, ["bench", "distill", str(tmp_path)], catch_exceptions=False)


def test_a_config_is_changed_by_known_keys_alone(tiny_qwen3_config):
    assert with_overrides(tiny_qwen3_config, ["num_hidden_layers=2"]).layer_types == ["full_attention"] * 2
    tiny_qwen3_config.pad_token_id = tiny_qwen3_config.vocab_size - 1
    smaller = with_overrides(tiny_qwen3_config, ["vocab_size=16"])
    assert (smaller.vocab_size, smaller.pad_token_id) == (16, None)
    assert prepared(Case(smaller, "*-GDN-*-GDN", 1, 4), "one model")[1]().isfinite()
    with pytest.raises(HmfError, match="did you mean 'hidden_size'"):
        with_overrides(tiny_qwen3_config, ["hiden_size=3"])
    with pytest.raises(HmfError, match="--set: hidden_size: 'wide' is not a whole number"):
        with_overrides(tiny_qwen3_config, ["hidden_size=wide"])
    with pytest.raises(HmfError, match="write KEY=VALUE"):
        with_overrides(tiny_qwen3_config, ["hidden_size"])
    with pytest.raises(HmfError, match="unknown device 'gpu'"):
        run(Case(tiny_qwen3_config, "*-GDN-*-GDN", 1, 4, device="gpu"))
