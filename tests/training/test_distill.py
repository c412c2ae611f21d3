# SPDX-License-Identifier: Apache-2.0
"""Stage 1 by the Trainer: it learns, touches only mixers, and goes on after a stop as if there had been none."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from hmf.config.pattern import Pattern
from hmf.config.runs import DataSettings, DistillSettings, ObjectiveSettings
from hmf.errors import HmfError, print_once
from hmf.folders import resolve_base
from hmf.priming import divergence
from hmf.priming.stage0 import make_stage0
from hmf.training.distill import distill
from hmf.training.run import check_windows
from hmf.training.trainer import HybridTrainer
from tests.hybrids import Case, tiny_config, tiny_hybrid
from tests.numerics import assert_golden, assert_near
from tests.training import cutting


def settings(**training) -> DistillSettings:
    return DistillSettings.model_validate(
        {
            "data": {"sequence_length": 96, "text_share": 0.5, "tasks": {"recall": 1}},
            "objective": {"layers": "mixer"},
            "training": {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "save_steps": 3}
            | training,
        }
    )


@pytest.fixture(scope="module")
def stage0(tmp_path_factory):
    out = tmp_path_factory.mktemp("distill") / "stage0"
    make_stage0(resolve_base("teacher"), Pattern.parse("*-GDN-*-*-GDN-*"), out)
    return out


@pytest.fixture(scope="module")
def finished(stage0, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    distill(stage0, run, settings())
    return run


def test_only_mixers_change_and_the_loss_is_logged_in_parts(stage0, finished):
    before, after = load_file(stage0 / "model.safetensors"), load_file(finished / "stage1/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {name for name in before if ".gdn." in name}
    log = json.loads((finished / "stage1.log.json").read_text())
    assert {"loss", "loss_hidden", "loss_mixer"} <= log[0].keys()
    assert log[0]["loss"] == pytest.approx(log[0]["loss_hidden"] + log[0]["loss_mixer"], rel=1e-3)


def test_frozen_matrices_in_bfloat16_give_the_same_bits(tmp_path, monkeypatch):
    """A base of bfloat16, trained in it: as with all weights in float32, which the result has in either case."""
    stage0 = cutting.make_tiny_stage0(tmp_path / "tiny", dtype=torch.bfloat16)
    bytes_seen, real = [], HybridTrainer.training_step

    def seen(self, model, *args, **kwargs):
        bytes_seen.append(sum(x.numel() * x.element_size() for x in model.parameters()))
        return real(self, model, *args, **kwargs)

    monkeypatch.setattr(HybridTrainer, "training_step", seen)
    distill(stage0, tmp_path / "narrow", cutting.settings(stage0, precision="bfloat16"))
    monkeypatch.setattr("hmf.training.distill.narrow_frozen", lambda model: None)
    distill(stage0, tmp_path / "wide", cutting.settings(stage0, precision="bfloat16"))
    assert bytes_seen[0] < 0.8 * bytes_seen[-1]
    (weights, log), (wanted, wanted_log) = (cutting.result(tmp_path / name) for name in ("narrow", "wide"))
    assert {x.dtype for x in weights.values()} == {torch.float32}
    assert all(weights[name].equal(x) for name, x in wanted.items())
    assert [entry.get("loss") for entry in log] == [entry.get("loss") for entry in wanted_log]


def test_tokenizer_files_and_config_stay_as_they_are(stage0, finished):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        wanted = (resolve_base("teacher") / name).read_bytes()
        assert (stage0 / name).read_bytes() == wanted
        assert (finished / "stage1" / name).read_bytes() == wanted
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (stage0, finished / "stage1"))
    assert after == before | {"dtype": "float32"}  # which it was trained in


def test_a_stopped_run_ends_bit_for_bit_like_an_uninterrupted_one(stage0, finished, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    real = HybridTrainer.compute_loss

    def stop_later(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise Stopped
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HybridTrainer, "compute_loss", stop_later)
        with pytest.raises(Stopped):
            distill(stage0, tmp_path, settings())
    assert not (tmp_path / "stage1").exists()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-3"]
    distill(stage0, tmp_path, settings())
    ours, wanted = (load_file(run / "stage1/model.safetensors") for run in (tmp_path, finished))
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("symbol", ["GDN", "KDA", "GKA", "M2", "BMF"])
def test_weight_decay_is_for_matrices_only(symbol, tmp_path):
    model = tiny_hybrid(Case(symbol, "gqa"))
    args = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True)
    groups = HybridTrainer(model=model, args=args, train_dataset=[]).create_optimizer().param_groups
    decay = {id(x): group["weight_decay"] for group in groups for x in group["params"]}
    assert decay == {id(x): 0.1 if x.dim() > 1 else 0.0 for x in model.parameters()}
    assert any(name.endswith("A_log") for name, _ in model.named_parameters())


def test_rows_beyond_the_teachers_positions_are_named(tmp_path, capfd):
    stage0 = cutting.make_tiny_stage0(tmp_path / "tiny")
    print_once.cache_clear()
    for length in (128, 160):
        given = cutting.settings(stage0, max_steps=2, save_steps=2, warmup_steps=2)
        data = given.data.model_copy(update={"sequence_length": length})
        distill(stage0, tmp_path / str(length), given.model_copy(update={"data": data}))
        err = capfd.readouterr().err
        assert ("data: rows of 160 tokens are longer than the 128 positions" in err) == (length == 160)
        assert ("warm-up of 2 steps is not shorter than the run of 2" in err) == (length == 128)  # printed once


def test_rows_within_the_window_of_a_recurrent_layer_are_named(capfd):
    print_once.cache_clear()
    check_windows(tiny_config(Case("BMF", "short"), "X-*-SWA-X"), 6)
    check_windows(tiny_config(Case("SWA", "short"), "X-*-GDN"), 5)
    assert capfd.readouterr().err == ""
    check_windows(tiny_config(Case("BMF", "short"), "X-*-SWA-X"), 5)
    assert "rows of 5 tokens do not reach beyond the window_size 5 of layers 0, 3, whose" in capfd.readouterr().err


def test_an_objective_that_no_step_reaches_is_named(stage0, tmp_path, capfd):
    print_once.cache_clear()
    for layerwise in (1, 2):
        given = settings(max_steps=2, save_steps=2)
        objective = ObjectiveSettings(kl=1, layerwise_steps=layerwise)
        distill(stage0, tmp_path / str(layerwise), given.model_copy(update={"objective": objective}))
        assert ("2 is not below the run's 2 steps, so" in (err := capfd.readouterr().err)) == (layerwise == 2)
    assert "without kl\n" in err


def test_longer_training_lowers_the_loss(stage0, tmp_path):
    distill(stage0, tmp_path, settings(max_steps=40, save_steps=100))
    losses = [entry["loss"] for entry in json.loads((tmp_path / "stage1.log.json").read_text()) if "loss" in entry]
    assert_golden([losses[0], losses[-1]], (7.420635, 4.058746))


def test_accumulation_is_the_same_as_a_larger_batch(stage0, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    distill(stage0, one, settings(max_steps=1, per_device_train_batch_size=4))
    distill(stage0, two, settings(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    first, second = (json.loads((run / "stage1.log.json").read_text())[-1] for run in (one, two))
    first, second = (torch.tensor(log["train_loss"]) for log in (first, second))
    assert_near(second, first, first)


@pytest.mark.parametrize("layers", ["none", "mixer"])  # the second reads the outputs of parts of a layer
def test_compiled_layers_compute_the_same(stage0, tmp_path, monkeypatch, layers):
    """By the backend that runs the captured graphs as they are. The evaluation runs them without gradients."""
    captured = []

    def backend(graph, inputs):
        captured.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    divergence._compiled_divergence.cache_clear()
    objective = {"layers": layers, "kl": 0.5, "layerwise_steps": 1}
    for compiled in (False, True):
        options = {"max_steps": 2, "torch_compile": compiled, "eval_strategy": "steps", "eval_rows": 2}
        given = settings(**options, logging_steps=1)
        given = given.model_copy(update={"objective": ObjectiveSettings.model_validate(objective)})
        distill(stage0, tmp_path / str(compiled), given)
    divergence._compiled_divergence.cache_clear()
    assert len(captured) > (15 if layers == "none" else 0)
    (weights, log), (wanted, wanted_log) = (cutting.result(tmp_path / str(compiled)) for compiled in (True, False))
    torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-6)
    for entry, other in zip(log, wanted_log, strict=True):
        assert {name: x for name, x in entry.items() if "loss" in name} == pytest.approx(
            {name: x for name, x in other.items() if "loss" in name}, rel=1e-4
        )


def test_bad_settings_are_one_clear_line(stage0, tmp_path):
    empty = tmp_path / "corpus"
    empty.mkdir()
    bad = settings()
    bad = bad.model_copy(update={"data": bad.data.model_copy(update={"text": str(empty)})})
    with pytest.raises(HmfError, match="corpus: nothing to read; use files that end with .py, .txt, .md"):
        distill(stage0, tmp_path / "run", bad)
    unknown = settings().model_copy(update={"data": settings().data.model_copy(update={"tasks": {"recal": 1.0}})})
    with pytest.raises(HmfError, match="did you mean 'recall'"):
        distill(stage0, tmp_path / "run", unknown)
    with pytest.raises(HmfError, match="not a fused checkpoint"):
        distill(resolve_base("teacher"), tmp_path / "run", settings())
    late = ObjectiveSettings(layerwise_steps=2, kl={2: 0.5}, kl_top_k=2048)
    with pytest.raises(HmfError, match="^objective.kl_top_k: 2048 is not below the vocabulary size"):
        distill(stage0, tmp_path / "run", settings().model_copy(update={"objective": late}))
    plain = shutil.copytree(stage0, tmp_path / "plain")
    (plain / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    )
    rare = DataSettings(text_share=0.9, sequence_length=96, tasks={"recall": 1, "tool_call": 0.01})
    given = settings(eval_strategy="steps")
    for key in ("data", "eval_data"):
        with pytest.raises(HmfError, match=rf"^{key}.tasks: tool_call: the chat template leaves tools out"):
            distill(plain, tmp_path / "run", given.model_copy(update={key: rare}))
    assert not (tmp_path / "run/checkpoints").exists()
    shutil.rmtree(empty)
