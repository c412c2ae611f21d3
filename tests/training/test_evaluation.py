# SPDX-License-Identifier: Apache-2.0
"""Evaluation while a run trains, and epochs: rows that training does not see, and what a pass over the data is."""

import json
import math
import shutil
import sys
from fractions import Fraction
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hmf.config.data import DataRecipe
from hmf.config.recipes import load_recipe
from hmf.config.runs import DistillSettings, FinetuneRecipe
from hmf.config.training import OptimiserSettings
from hmf.data.prepare import prepare
from hmf.data.prepared import PreparedDataset
from hmf.errors import HmfError, print_once
from hmf.model.checkpoint import load_model
from hmf.report.curves import curves, draw_curves
from hmf.training.distill import distill
from hmf.training.finetune import finetune
from hmf.training.losses import CrossEntropy
from hmf.training.run import known_steps
from tests.numerics import assert_near
from tests.training import cutting

EVAL = {"eval_strategy": "steps", "eval_steps": 2, "eval_rows": 3}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return cutting.make_tiny_hybrid(tmp_path_factory.mktemp("tiny") / "model")


def prepared(hybrid, output, **changes):
    """Rows of 32 tokens of that Hybrid's corpus."""
    sources = [{"path": str(hybrid.parent / "corpus")}]
    recipe = {"output": output, "tokenizer": str(hybrid), "sequence_length": 32, "sources": sources}
    prepare(DataRecipe.model_validate(recipe | changes), hybrid)
    return output


def tuned(hybrid, run, rows=None, training=None, **changes):
    if rows is not None:
        changes["data"] = {"prepared": str(rows)}
    given = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1} | (training or {})
    recipe = cutting.finetune_recipe(hybrid, run, training={k: v for k, v in given.items() if v is not None}, **changes)
    return finetune(recipe)


def log_of(run, stage="stage2"):
    return json.loads((run / f"{stage}.log.json").read_text())


def evaluations(run, stage="stage2"):
    return {entry["step"]: entry for entry in log_of(run, stage) if "eval_loss" in entry}


def training_entries(run):
    weights, log = cutting.result(run, "stage2", "model")
    return weights, [entry for entry in log if "eval_loss" not in entry]


def test_the_figure_is_the_loss_of_rows_that_training_does_not_read(hybrid, tmp_path):
    data = prepared(hybrid, tmp_path / "data")
    whole = PreparedDataset(data)
    out = tuned(hybrid, tmp_path / "run", data, EVAL)
    assert list(evaluations(tmp_path / "run")) == [2, 4]
    held = [whole[len(whole) - count] for count in (3, 2, 1)]
    batch = {name: torch.stack([row[name] for row in held]) for name in held[0]}
    with torch.no_grad():
        exact = load_model(out, dtype=torch.float64)(**batch, objective=CrossEntropy())["loss"]
        plain = load_model(out, dtype=torch.float32)(**batch, objective=CrossEntropy())["loss"]
    assert_near(torch.tensor(evaluations(tmp_path / "run")[4]["eval_loss"]), exact, plain)
    # Training reads all other rows, in each pass once.
    train = whole.part(0, len(whole) - 3)
    train.rows = 3 * train.epoch
    for turn in range(3):
        places = [train.place(index) for index in range(turn * train.epoch, (turn + 1) * train.epoch)]
        assert sorted(places) == list(range(len(whole) - 3))
    assert train.digest() != whole.digest() and whole.part(0, 3).digest() != whole.part(1, 4).digest()


def test_training_has_the_same_bits_with_and_without_it(hybrid, tmp_path):
    """With dropout, which uses random numbers."""
    pytest.importorskip("peft")
    lora = {"groups": ["mlp"], "rank": 2, "dropout": 0.5, "learning_rate": 1e-3}
    tuned(hybrid, tmp_path / "without", lora=lora)
    tuned(
        hybrid,
        tmp_path / "with",
        training=EVAL | {"eval_steps": 1},
        lora=lora,
        eval_data={
            "text": str(hybrid.parent / "corpus" / "0.txt"),
            "sequence_length": 32,
        },
    )
    (weights, log), (plain, plain_log) = (training_entries(tmp_path / name) for name in ("with", "without"))
    assert log == plain_log and all(torch.equal(weights[name], value) for name, value in plain.items())
    assert list(evaluations(tmp_path / "with")) == [1, 2, 3, 4]
    assert len({entry["eval_loss"] for entry in evaluations(tmp_path / "with").values()}) == 4


def test_batches_do_not_change_the_figure(hybrid, tmp_path):
    data, found = prepared(hybrid, tmp_path / "data"), []
    for size, steps in ((1, 4), (2, 2), (4, 1)):  # one row at a time, two, and three: the most that divide 6
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        tuned(hybrid, tmp_path / f"{size}", data, EVAL | {"eval_rows": 6} | batches)
        found.append(torch.tensor([entry["eval_loss"] for entry in evaluations(tmp_path / f"{size}").values()]))
    assert_near(found[1], found[0], found[0])
    assert_near(found[2], found[0], found[0])


def test_stage_1_is_evaluated_by_its_objective_in_parts(tmp_path):
    stage0 = cutting.make_tiny_stage0(tmp_path / "model")
    given = cutting.settings(stage0).model_dump(mode="json", exclude_unset=True)
    given["objective"] = {"layers": "mixer", "kl": 0.5, "layerwise_steps": 2}
    given["eval_data"] = {"prepared": str(prepared(stage0, tmp_path / "eval"))}
    given["training"] |= {"max_steps": 4, **EVAL, "eval_rows": None}
    distill(stage0, tmp_path / "run", DistillSettings.model_validate(given), draw=draw_curves)
    first, last = evaluations(tmp_path / "run", "stage1").values()
    assert "eval_loss_kl" not in first  # the objective of the step before, layer by layer
    parts = [last[f"eval_loss_{name}"] for name in ("hidden", "kl", "mixer")]
    assert all(part > 0 for part in parts) and last["eval_loss"] == pytest.approx(sum(parts))
    losses, _, _ = curves(log_of(tmp_path / "run", "stage1"))
    assert losses["eval_loss"][0] == [2, 4] and losses["eval_loss_kl"][0] == [4]


def test_preferences_are_evaluated_on_pairs_of_their_own_or_held_out_ones(hybrid, tmp_path):
    for name, count in (("train", 12), ("eval", 3)):
        rows = [{"prompt": f"{name} {n}", "chosen": f"two {n}", "rejected": f"six {n} {n}"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, own = ({"path": str(tmp_path / f"{name}.jsonl"), "sequence_length": 96} for name in ("train", "eval"))
    kind = {"method": "dpo", "data": None, "pairs": pairs, "trainable": {"all": 1e-3}}
    training = EVAL | {"eval_rows": None, "eval_steps": 1, "max_steps": 2, "save_steps": 1}
    for name, more, rows in (("own", {"eval_pairs": own}, None), ("held out", {}, 1)):
        run = tmp_path / name
        tuned(hybrid, run, training=training | {"eval_rows": rows}, **kind, **more)
        first, last = evaluations(run).values()
        assert last["eval_loss"] < first["eval_loss"] < math.log(2) and last["eval_margin"] > first["eval_margin"] > 0
        # A resumed run has the references of the start.
        for folder in ("model", "checkpoints/checkpoint-2"):
            shutil.rmtree(run / folder)
        tuned(hybrid, run, training=training | {"eval_rows": rows}, **kind, **more)
        assert evaluations(run)[2]["eval_loss"] == last["eval_loss"]


def test_pairs_that_training_reads_are_named(hybrid, tmp_path, capfd):
    for name, numbers in (("train", range(6)), ("all", range(2)), ("some", range(5, 8))):
        rows = [{"prompt": f"{n}?", "chosen": f"two {n}", "rejected": f"six {n}"} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, other, partly = (
        {"path": str(tmp_path / f"{name}.jsonl"), "sequence_length": length}
        for name, length in (("train", 96), ("all", 64), ("some", 64))
    )
    kind = {"method": "dpo", "data": None, "pairs": train, "training": EVAL | {"eval_rows": None, "max_steps": 1}}
    with pytest.raises(HmfError, match="eval_pairs: 2 of 2 pairs are read in training too; leave it out"):
        tuned(hybrid, tmp_path / "run", **kind, eval_pairs=other)
    tuned(hybrid, tmp_path / "run", **kind, eval_pairs=partly)
    assert "eval_pairs: 1 of 3 pairs are read in training too\n" in capfd.readouterr().err


def test_epochs_are_passes_over_prepared_rows(hybrid, tmp_path):
    data = prepared(hybrid, tmp_path / "data")
    rows = len(PreparedDataset(data)) - 3
    training = EVAL | {
        "max_steps": None,
        "num_train_epochs": 1.5,
        "eval_strategy": "epoch",
        "eval_steps": None,
        "save_steps": 1000,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
    }
    tuned(hybrid, tmp_path / "run", data, training)
    steps, log = math.ceil(Fraction(3, 2) * rows / 2), log_of(tmp_path / "run")
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, steps + 1))
    assert list(evaluations(tmp_path / "run")) == [math.ceil(rows / 2), steps]
    assert log[0]["epoch"] == pytest.approx(2 / rows, abs=1e-4) and log[-1]["epoch"] >= 1.5
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert rates[-1] == pytest.approx(rates[0] / steps)  # the schedule ends with the run


def test_epochs_of_less_than_a_step_are_named(capfd):
    print_once.cache_clear()
    for batch, named in ((9, False), (20, True)):
        rows = MagicMock(epoch=10)
        known_steps(OptimiserSettings(num_train_epochs=1, per_device_train_batch_size=batch), rows)
        assert ("num_train_epochs: 1 is less than one step, which reads 20" in capfd.readouterr().err) == named
        assert rows.rows == (18 if batch == 9 else 20)


@given(st.integers(1, 400).map(lambda n: n / 8), st.integers(1, 500), st.integers(1, 64))
def test_steps_of_epochs_read_all_rows_and_no_step_is_too_many(epochs, rows, step_rows):
    settings = OptimiserSettings(num_train_epochs=epochs, per_device_train_batch_size=1)
    steps = settings.with_steps(rows, step_rows).steps
    assert (steps - 1) * step_rows < epochs * rows <= steps * step_rows


def test_a_resumed_run_evaluates_the_same_and_other_rows_are_refused(hybrid, tmp_path):
    data, run = prepared(hybrid, tmp_path / "data"), tmp_path / "run"
    tuned(hybrid, run, data, EVAL)
    weights, log = cutting.result(run, "stage2", "model")
    for folder in ("model", "checkpoints/checkpoint-4"):
        shutil.rmtree(run / folder)
    with pytest.raises(HmfError, match="the data changed since the run began"):
        tuned(hybrid, run, data, EVAL | {"eval_rows": 2})
    tuned(hybrid, run, data, EVAL)
    again, again_log = cutting.result(run, "stage2", "model")
    assert again_log == log and all(torch.equal(again[name], value) for name, value in weights.items())


WRONG = [
    ({"max_steps": 1, "num_train_epochs": 1}, {}, "give max_steps or num_train_epochs, not both"),
    ({"max_steps": None}, {}, "give max_steps or num_train_epochs"),
    ({"max_steps": None, "num_train_epochs": 1}, {}, "drawn without end and have no epochs; give max_steps"),
    ({"eval_strategy": "epoch"}, {}, "training.eval_strategy: rows of text and tasks are drawn without end"),
    ({"eval_steps": 5}, {}, "eval_steps is read with eval_strategy steps"),
    ({"eval_rows": 5}, {}, "eval_rows is read with eval_strategy steps or epoch"),
    ({"wandb_project": "hybrids"}, {}, r"wandb_project is read with report_to: \[wandb\]"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 2}, {}, "constant has no warm-up; set constant_with_warmup"),
    ({"lr_scheduler_type": "cosine", "final_learning_rate_ratio": 0.2}, {}, "is read with .* cosine_with_min_lr"),
    ({}, {"data": {"tasks": {"recall": 1}}}, "text_share, the share of rows without tasks, is 1 if it is left out"),
    ({}, {"data": {"text_share": 0.5, "tasks": {"recall": 0, "chat": 0}}}, "weights must have a finite sum above 0"),
    ({}, {"eval_data": {"text": "stdlib"}}, "eval_data is read with training.eval_strategy"),
    (EVAL, {"eval_pairs": {"path": "x"}}, "eval_pairs is for dpo; give eval_data"),
    (EVAL, {"data": {"prepared": "a"}, "eval_data": {"prepared": "a"}}, "leave eval_data out, and rows are held out"),
    (EVAL, {"method": "dpo", "data": None, "pairs": {"path": "x"}, "eval_pairs": {"path": "y", "beta": 1}}, "beta is"),
    (
        EVAL | {"sequence_parallel": 2},
        {"data": {"prepared": "a"}, "eval_data": {"sequence_length": 30}},
        "eval_data.sequence_length must be a multiple of 4",
    ),
]


@pytest.mark.parametrize(("training", "changes", "message"), WRONG, ids=[case[2][:40] for case in WRONG])
def test_keys_that_do_not_fit_together_are_refused(tmp_path, training, changes, message):
    given = {"max_steps": 3, "per_device_train_batch_size": 2} | training
    training = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(ValidationError, match=message):
        cutting.finetune_recipe(tmp_path / "hybrid", tmp_path / "run", training=training, **changes)


def test_rows_that_cannot_be_held_out_are_refused(hybrid, tmp_path):
    corpus, data = hybrid.parent / "corpus", prepared(hybrid, tmp_path / "data")
    with pytest.raises(HmfError, match="training.eval_rows: holding out 64 of .* rows"):
        tuned(hybrid, tmp_path / "run", data, EVAL | {"eval_rows": None})
    other = prepared(hybrid, tmp_path / "other")
    with pytest.raises(HmfError, match="eval_data.prepared has .* rows, fewer than 1000"):
        tuned(hybrid, tmp_path / "run", data, EVAL | {"eval_rows": 1000}, eval_data={"prepared": str(other)})
    with pytest.raises(HmfError, match="eval_data.prepared: these are the rows that training reads"):
        tuned(hybrid, tmp_path / "run", data, EVAL, eval_data={"prepared": str(other)})
    longer = prepared(hybrid, tmp_path / "longer", sequence_length=48, packing_window=3)
    with pytest.raises(HmfError, match="eval_data.prepared: corpus: training reads the same documents"):
        tuned(hybrid, tmp_path / "run", data, EVAL, eval_data={"prepared": str(longer)})
    sources = [{"path": str(corpus), "name": "words", "weight": 1}]
    twice = prepared(hybrid, tmp_path / "twice", sources=sources, tokens=4000)
    with pytest.raises(HmfError, match="documents of words .* times, so none can be held out"):
        tuned(hybrid, tmp_path / "run", twice, EVAL)
    file = {"text": str(corpus / "0.txt"), "sequence_length": 32}
    with pytest.raises(HmfError, match="0.txt is one file, which has no held-out part"):
        tuned(hybrid, tmp_path / "run", training=EVAL, data=file)


def test_rows_of_text_are_refused_as_conversations_also_where_they_are_filled_up(hybrid, tmp_path):
    data = prepared(hybrid, tmp_path / "data", sequence_length=128)
    rows = PreparedDataset(data)
    assert any((rows[index]["labels"][1:] == -100).sum() > 10 for index in range(len(rows)))
    with pytest.raises(HmfError, match="every token is supervised, also in prompts; use method cpt for text"):
        tuned(hybrid, tmp_path / "run", data, method="sft")


def test_a_plain_no_of_yaml_and_a_value_in_place_of_epochs(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "method: cpt\nmodel: m\noutput: o\ndata: {prepared: d}\ntrainable: {all: 1.0e-3}\n"
        "training: {num_train_epochs: 2, per_device_train_batch_size: 1, eval_strategy: no}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml", FinetuneRecipe)
    assert recipe.training.eval_strategy == "no" and recipe.training.num_train_epochs == 2
    for name in ("max_steps", "steps"):
        short = load_recipe(tmp_path / "recipe.yaml", FinetuneRecipe, [f"training.{name}=20"]).training
        assert (short.max_steps, short.num_train_epochs) == (20, None)


def test_wandb_gets_the_project_the_name_and_the_evaluation(hybrid, tmp_path, monkeypatch):
    """By the Trainer's own callback, with a package of that name that only remembers."""
    wandb = MagicMock(run=None, __version__="0.20.0", __spec__=ModuleSpec("wandb", None))
    wandb.init.side_effect = lambda **options: setattr(wandb, "run", MagicMock())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, name, MagicMock(ConfigError=ValueError))
    monkeypatch.setenv("WANDB_PROJECT", "of the environment")
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    names = {"report_to": ["wandb"], "wandb_project": "hybrids", "run_name": "first"}
    tuned(hybrid, tmp_path / "run", prepared(hybrid, tmp_path / "data"), EVAL | names)
    assert wandb.init.call_args.kwargs == {"project": "hybrids", "name": "first"}
    assert any("eval/loss" in call.args[0] for call in wandb.log.call_args_list)
