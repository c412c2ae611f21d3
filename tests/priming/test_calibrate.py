# SPDX-License-Identifier: Apache-2.0
"""Calibrated starts: the new layers come closer to their attention on text that the fit has not read."""

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from hmf.cli import app
from hmf.config.pattern import Pattern
from hmf.config.recipes import load_recipe
from hmf.config.runs import CalibrationSettings, DataSettings, PrimeRecipe
from hmf.data.mixture import mixture
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError
from hmf.folders import resolve_base
from hmf.model.checkpoint import load_model
from hmf.model.convert import hybridise
from hmf.pipeline import prime
from hmf.priming.calibrate import calibrate
from hmf.priming.objectives import LayerwiseObjective
from hmf.priming.stage0 import initialise, make_stage0
from tests.conftest import ROOT
from tests.hybrids import random_ids
from tests.model.test_families import BASES, stock_model

DATA = DataSettings(text=str(ROOT / "docs"), sequence_length=128)
FIT = CalibrationSettings(rows=16, steps=10)
SHORT = CalibrationSettings(rows=8, steps=4)  # what it gives is not measured


def stage0(out, symbol, calibration=FIT, seed=0, layers=(1, 4)):
    """Stage 0 of the embedded teacher; all but `layers` keep their attention."""
    pattern = Pattern.parse("-".join(symbol if layer in layers else "*" for layer in range(6)))
    windows = {name: {"window_size": 16} for name in ("swa_config", "bmojo_config") if symbol in ("SWA", "BMF")}
    return make_stage0(resolve_base("teacher"), pattern, out, windows, seed, calibration=calibration, data=DATA)


def error(folder, text="src/hmf/data", rows=8):
    """Squared error of the mixers' outputs relative to the attention's, on text that no fit here reads."""
    model = load_model(folder, dtype=torch.float32)
    data = DATA.model_copy(update={"text": str(ROOT / text)})
    unseen = mixture(data, load_tokenizer(folder), rows, 99)
    batch = torch.utils.data.default_collate([unseen[index] for index in range(rows)])
    with torch.no_grad():
        return LayerwiseObjective()(model, **batch)["loss"].item()


@pytest.mark.parametrize("symbol", ["GDN", "KDA", "GKA", "M2", "BMF", "SWA"])
def test_the_error_falls_on_text_that_was_not_read(tmp_path, symbol):
    stage0(tmp_path / "copied", symbol, None)
    report = stage0(tmp_path / "calibrated", symbol)
    before, after = error(tmp_path / "copied"), error(tmp_path / "calibrated")
    assert after < (0.8 if symbol not in ("BMF", "SWA") else 1.0) * before
    assert all(after < before for before, after in report.errors.values()) and len(report.errors) == 2
    assert report.describe().count("calibrated: model.layers.") == 2


def test_nothing_but_the_mixers_changes_and_the_seed_decides_the_result(tmp_path):
    copied, first, again, other = (
        (
            stage0(tmp_path / str(number), "GDN", fit, seed, (1,)),
            load_file(tmp_path / str(number) / "model.safetensors"),
        )[1]
        for number, (fit, seed) in enumerate([(None, 0), (SHORT, 0), (SHORT, 0), (SHORT, 1)])
    )
    changed = {name for name in copied if not torch.equal(copied[name], first[name])}
    assert all(".gdn." in name for name in changed)
    kept = {name for name in copied if name.endswith((".q_proj.weight", ".k_proj.weight", ".v_proj.weight"))}
    assert not changed & kept and any(name.endswith("gdn.o_proj.weight") for name in changed)
    assert {name: x.dtype for name, x in first.items()} == {name: x.dtype for name, x in copied.items()}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in changed)


def test_without_steps_only_the_output_projection_is_fitted(tmp_path, monkeypatch):
    """Also where PyTorch was built for GPUs and there is none."""

    def built_for(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for)
    stage0(tmp_path / "copied", "M2", None)
    stage0(tmp_path / "solved", "M2", FIT.model_copy(update={"steps": 0}))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("copied", "solved"))
    assert {name.rpartition("layers.")[2] for name in a if not torch.equal(a[name], b[name])} == {
        f"{layer}.mamba.out_proj.weight" for layer in (1, 4)
    }
    assert error(tmp_path / "solved") < error(tmp_path / "copied")


def test_a_fit_that_does_not_help_is_not_kept(tmp_path):
    """At this rate Adam ruins every layer; the rows that are held out see it."""
    stage0(tmp_path / "copied", "GDN", None)
    report = stage0(tmp_path / "wild", "GDN", CalibrationSettings(rows=4, steps=4, learning_rate=1e4))
    assert all(after <= before for before, after in report.errors.values())
    assert error(tmp_path / "wild") < 1.1 * error(tmp_path / "copied")


@pytest.mark.usefixtures("blank_pictures")
def test_the_recipe_and_the_command_calibrate(tmp_path, monkeypatch):
    content = {
        "base": "teacher",
        "output": str(tmp_path / "run"),
        "hybrid": {"mixer": "gdn", "layers": [2], "start": "calibrated", "calibration": {"rows": 4, "steps": 2}},
        "distill": {
            "data": {"text": DATA.text, "sequence_length": 96},
            "training": {"max_steps": 1, "per_device_train_batch_size": 1},
        },
        "evaluate": {"samples": 1, "text_bytes": 500, "length": 96},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    lines = []
    prime(load_recipe(file, PrimeRecipe), file.read_text(), lines.append)
    assert "calibrated: model.layers.2.gdn" in lines[0]

    command = ["init", "teacher", "--layers", "2", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--text", DATA.text])
    assert isinstance(result.exception, HmfError) and "--start calibrated" in str(result.exception)
    # The command has no option that makes the fit short, so this one keeps only what it would read.
    monkeypatch.setattr("hmf.priming.stage0.calibrate", lambda model, starts, rows, fit: {f"{len(rows)} rows": (1, 0)})
    result = CliRunner().invoke(app, [*command, "--start", "calibrated", "--text", DATA.text])
    assert result.exit_code == 0 and "calibrated: 16 rows, relative squared error 1.000 -> 0.000" in result.output

    content["hybrid"] |= {"start": "copied"}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(HmfError, match=r"hybrid: calibration is read with start: calibrated"):
        load_recipe(file, PrimeRecipe)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_5_text"])
def test_bases_with_layers_of_several_kinds(family):
    """Rotary positions by layer type, and layers that are recurrent in the base."""
    fused = hybridise(stock_model(family, next(iter(BASES[family]))), Pattern.parse("*-GDN-*-GDN"))
    rows = [{"input_ids": ids, "position_ids": torch.arange(24)} for ids in random_ids(8, 24)]
    errors = calibrate(fused, initialise(fused), rows, CalibrationSettings(rows=8, steps=4))
    assert list(errors) == ["model.layers.1.gdn", "model.layers.3.gdn"]
    assert all(after < before for before, after in errors.values())


def fused_in(times, symbol, narrow=None):
    """Layer 0 of the embedded teacher with each channel of the hidden states `times` times: the same function.

    narrow: the tensors of the model with `times` 1, from which those of a wider one are made.
    """
    teacher = load_model(resolve_base("teacher"), dtype=torch.float32)
    config = teacher.config.to_dict() | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    config["hidden_size"] = times * teacher.config.hidden_size
    fused = hybridise(type(teacher)(type(teacher.config)(**config)), Pattern.parse(symbol), {})
    own = fused.state_dict()
    with torch.no_grad():
        for name, x in (narrow or teacher.state_dict()).items():
            if name not in own:
                continue
            for dim, size in enumerate(own[name].shape):
                if x.shape[dim] != size:  # a matrix that reads these channels sums over `times` as many
                    x = x.repeat_interleave(times, dim) / (times if dim == 1 and "embed" not in name else 1)
            own[name].copy_(x)
    return fused


@pytest.mark.parametrize("symbol", ["GDN", "GKA"])
def test_the_fit_does_not_depend_on_the_width_of_the_model(symbol):
    made = mixture(DATA.model_copy(update={"sequence_length": 96}), load_tokenizer(resolve_base("teacher")), 8, 0)
    rows = [made[index] for index in range(8)]
    narrow, fit = fused_in(1, symbol), CalibrationSettings(rows=8, steps=15, learning_rate=0.02)
    starts = initialise(narrow, conv_start="identity")
    wide = fused_in(8, symbol, narrow.state_dict())  # 1,536 channels
    (before, of_narrow), (same, of_wide) = (
        next(iter(calibrate(model, starts, rows, fit).values())) for model in (narrow, wide)
    )
    assert same == pytest.approx(before, rel=0.05) and of_narrow < 0.7 * before
    assert of_wide == pytest.approx(of_narrow, rel=0.1)


def test_long_rows_go_through_a_layer_one_after_another(tiny_qwen3_dir):
    fused = hybridise(load_model(tiny_qwen3_dir, dtype=torch.float32), Pattern.parse("GDN-*-*-*"))
    starts, sizes = initialise(fused), []
    fused.model.layers[0].gdn.register_forward_hook(lambda module, args, output: sizes.append(output[0].shape[:2]))
    rows = [{"input_ids": ids, "position_ids": torch.arange(4500)} for ids in random_ids(8, 4500)]
    calibrate(fused, starts, rows, CalibrationSettings(rows=8, steps=0))
    assert set(sizes) == {(1, 4500)}
