# SPDX-License-Identifier: Apache-2.0
"""Stage 1 on several processes, however they share the work, is Stage 1 on one."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from hmf.config.runs import DistillSettings
from hmf.config.training import ParallelSettings
from hmf.errors import HmfError
from hmf.training import strategy
from hmf.training.distill import distill
from hmf.training.strategy import deepspeed_config, strategy_arguments
from tests import numerics
from tests.parallel import ranks
from tests.training import cutting


@pytest.fixture(scope="module")
def stage0(tmp_path_factory):
    return cutting.make_tiny_stage0(tmp_path_factory.mktemp("tiny") / "model")


def recipe(stage0, **training):
    """Three steps of two rows, the first of them layer by layer; after each, three rows of evaluation."""
    return {
        "data": {"text": str(stage0.parent / "corpus"), "sequence_length": 32},
        "objective": {"layers": "mixer", "kl": 0.5, "kl_tokens": "supervised", "layerwise_steps": 1},
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 3e-3,
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "eval_rows": 3,
        }
        | training,
    }


@pytest.fixture(scope="module")
def alone(stage0, tmp_path_factory):
    """The run on one process, and another from weights that are off by a rounding."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {"exact": stage0, "nudged": numerics.nudged_checkpoint(stage0, folder / "stage0")}
    for name, model in runs.items():
        distill(model, folder / name, DistillSettings.model_validate(recipe(stage0)))
    return [cutting.result(folder / name) for name in runs]


def on(count, stage0, output, **training):
    ranks.run(ranks.train, count, count, ranks.free_port(), stage0, output, recipe(stage0, **training))


def same(output, alone):
    (weights, log), (wanted, wanted_log), (plain, plain_log) = cutting.result(output), *alone
    assert weights.keys() == wanted.keys() and len(log) == len(wanted_log)
    numerics.assert_near(weights, wanted, plain)
    names = ("loss", "loss_layerwise", "loss_hidden", "loss_mixer", "loss_kl", "grad_norm")
    names += ("eval_loss", "eval_loss_hidden", "eval_loss_mixer", "eval_loss_kl")
    assert sum("eval_loss_kl" in entry for entry in log) == 2
    numerics.assert_near(*([cutting.figures(entry, names) for entry in x] for x in (log, wanted_log, plain_log)))


@pytest.mark.slow
def test_rows_shared_by_pairs_of_four_processes(stage0, alone, tmp_path):
    on(4, stage0, tmp_path, sequence_parallel=2, per_device_train_batch_size=1)
    same(tmp_path, alone)
    assert "".join(file.read_text() for file in tmp_path.glob("rank*.txt")).count("1 GDN") == 1


@pytest.mark.slow
def test_parameters_shared_by_two_processes_and_a_resume(stage0, alone, tmp_path):
    on(2, stage0, tmp_path, strategy="fsdp2", per_device_train_batch_size=1)
    same(tmp_path, alone)
    config = json.loads((tmp_path / "stage1/config.json").read_text())
    assert config["architectures"] == ["HybridQwen3ForCausalLM"]
    finished = load_file(tmp_path / "stage1/model.safetensors")
    shutil.rmtree(tmp_path / "stage1")
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-3")
    on(2, stage0, tmp_path, strategy="fsdp2", per_device_train_batch_size=1)
    again = load_file(tmp_path / "stage1/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in finished.items())


@pytest.mark.slow
def test_rows_and_parameters_shared_in_bfloat16_with_checkpointing(tmp_path):
    """And with embeddings that are the head too, which Stage 1 does not run."""
    stage0 = cutting.make_tiny_stage0(tmp_path / "tiny" / "model", tied=True, dtype=torch.bfloat16)
    given = {"precision": "bfloat16", "gradient_checkpointing": True}
    distill(stage0, tmp_path / "alone", DistillSettings.model_validate(recipe(stage0, **given)))
    on(2, stage0, tmp_path / "two", strategy="fsdp2", sequence_parallel=2, **given)
    weights = load_file(tmp_path / "two/stage1/model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    losses = [
        [entry["loss"] for entry in cutting.result(tmp_path / name)[1] if "loss" in entry] for name in ("alone", "two")
    ]
    numerics.check(max(abs(y / x - 1) for x, y in zip(*losses, strict=True)), 0.01, "loss")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize(
    "shared",
    [
        {"per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 1, "strategy": "fsdp2"},
        {"sequence_parallel": 2},
        {"sequence_parallel": 2, "strategy": "fsdp2"},
    ],
    ids=str,
)
def test_two_gpus_over_nccl_and_a_resume(stage0, tmp_path, shared):
    """Losses as on one GPU, and a resume bit for bit."""
    given = recipe(stage0, **shared)
    ranks.run(ranks.train, 1, 1, ranks.free_port(), stage0, tmp_path / "alone", recipe(stage0), False)
    ranks.run(ranks.train, 2, 2, ranks.free_port(), stage0, tmp_path / "two", given, False)
    losses = [
        [entry["loss"] for entry in cutting.result(tmp_path / name)[1] if "loss" in entry] for name in ("alone", "two")
    ]
    numerics.check(max(abs(y / x - 1) for x, y in zip(*losses, strict=True)), 0.01, "loss")
    finished = load_file(tmp_path / "two/stage1/model.safetensors")
    shutil.rmtree(tmp_path / "two/stage1")
    shutil.rmtree(tmp_path / "two/checkpoints/checkpoint-3")
    ranks.run(ranks.train, 2, 2, ranks.free_port(), stage0, tmp_path / "two", given, False)
    again = load_file(tmp_path / "two/stage1/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in finished.items())


def test_what_does_not_fit_is_refused(stage0, tmp_path, monkeypatch):
    with pytest.raises(ValidationError, match="multiple of 12, twice training.sequence_parallel"):
        DistillSettings.model_validate(recipe(stage0, sequence_parallel=6))
    with pytest.raises(ValidationError, match="needs strategy ddp or fsdp2"):
        DistillSettings.model_validate(recipe(stage0, sequence_parallel=2, strategy="deepspeed"))
    with pytest.raises(HmfError, match="1 processes do not divide into groups of 2"):
        distill(stage0, tmp_path / "one", DistillSettings.model_validate(recipe(stage0, sequence_parallel=2)))
    with pytest.raises(HmfError, match="fsdp2 needs several processes"):
        distill(stage0, tmp_path / "two", DistillSettings.model_validate(recipe(stage0, strategy="fsdp2")))
    monkeypatch.setattr(strategy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HmfError, match="deepspeed is not installed"):
        distill(stage0, tmp_path / "three", DistillSettings.model_validate(recipe(stage0, strategy="deepspeed")))


@pytest.mark.slow
def test_deepspeed(stage0, alone, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    on(2, stage0, tmp_path / "two", strategy="deepspeed", per_device_train_batch_size=1)
    same(tmp_path / "two", alone)


def test_deepspeed_gets_what_the_recipe_says(stage0, monkeypatch):
    monkeypatch.setattr(strategy.importlib.util, "find_spec", lambda name: object())
    settings = ParallelSettings(
        max_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        precision="bfloat16",
        strategy="deepspeed",
    )
    assert strategy_arguments(settings, None)["bf16"] is False
    config = deepspeed_config(settings)
    assert config["zero_optimization"] == {"stage": 2} and config["gradient_clipping"] == 0.5
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (3, 2)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
