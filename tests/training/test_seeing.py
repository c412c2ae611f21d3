# SPDX-License-Identifier: Apache-2.0
"""What a run shows while and after it runs, and how it stops when it goes wrong."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner

from hmf.cli import app
from hmf.errors import HmfError
from hmf.gpus import peak_flops
from hmf.model.checkpoint import load_model
from hmf.priming.distance import layer_errors, stage1_flops_per_token
from hmf.priming.objectives import train_only_mixers
from hmf.report.curves import curves, draw_curves, objective_changes
from hmf.training import progress
from hmf.training.checkpoints import newest_valid
from hmf.training.distill import distill
from hmf.training.guard import ABOVE, LEAST, LossWatch
from hmf.training.progress import ProgressLine
from hmf.training.trainer import HybridTrainer
from tests.numerics import assert_golden
from tests.training import cutting


@pytest.fixture(scope="module")
def stage0(tmp_path_factory):
    return cutting.make_tiny_stage0(tmp_path_factory.mktemp("tiny") / "model")


def test_time_left_and_rate_count_this_processes_steps(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    line, args = ProgressLine("distil", tokens_per_step=64), SimpleNamespace(device=torch.device("cpu"))
    state = SimpleNamespace(global_step=900, max_steps=1000, is_world_process_zero=True)
    now = 40.0
    line.on_train_begin(args, state, None)
    line.on_step_begin(args, state, None)
    state.global_step, now = 901, 100.0  # the first step of a process takes a minute and does not count
    line.on_step_begin(args, state, None)
    state.global_step, now = 911, 120.0  # 10 steps in 20 s: 89 more need 178 s
    line.on_log(args, state, None, {"loss": 0.5, "train_loss": 2.0})
    line.on_step_end(args, state, None)
    assert capsys.readouterr().err == "distil: step 911/1000 loss 0.5000 32 tokens/s ETA 178 s\n"
    now = 125.0  # figures of the log, and a checkpoint
    line.on_log(args, state, None, {"loss": 0.25, "loss_kl": 0.5, "learning_rate": 1.234e-4, "grad_norm": 2.5})
    now = 130.0
    line.on_save(args, state, None)
    line.on_log(args, state, None, {"train_loss": 2.0})  # the summary at the end
    line.on_train_end(args, state, None)
    said = "loss 0.2500 loss_kl 0.5000 lr 0.000123 grad norm 2.5 32 tokens/s"
    assert capsys.readouterr().err == f"distil: step 911/1000 {said} ETA 267 s\n"
    now = 131.0
    line.on_step_begin(args, state, None)
    state.global_step, now = 912, 132.0  # the time in which the rows of the step were made counts
    assert line.status(args, state).endswith("32 tokens/s")
    groups = {"learning_rate_mixers": 1e-3, "learning_rate_norms": 1e-4}
    line.on_log(args, state, None, {"loss": 0.5, "learning_rate": 1e-3, **groups})
    assert line.status(args, state).startswith("loss 0.5000 lr mixers 0.001 lr norms 0.0001 ")


def test_rows_of_any_length_have_no_rate_of_tokens():
    line, args = ProgressLine("distil", 0, rows_per_step=4), SimpleNamespace(device=torch.device("cpu"))
    line.first_step, line.started = 0, progress.time.perf_counter() - 1e6
    assert line.status(args, SimpleNamespace(global_step=500_000)) == "2.00 rows/s"


def test_peak_memory_is_shown_on_cuda(monkeypatch):
    line, args = ProgressLine("distil", 64), SimpleNamespace(device=torch.device("cuda", 0), world_size=1)
    line.first_step, line.started = 0, 0.0
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    assert line.status(args, SimpleNamespace(global_step=1)).endswith("tokens/s peak 1.5 GiB")


def test_utilisation_is_shown_on_gpus_of_known_peak(monkeypatch):
    line = ProgressLine("distil", 64, flops_per_token=1e9)
    args = SimpleNamespace(device=torch.device("cuda", 0), world_size=2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert line.utilisation(989.4e3, args) == pytest.approx(0.5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert line.utilisation(1e6, args) is None
    assert line.utilisation(1e6, SimpleNamespace(device=torch.device("cpu"), world_size=1)) is None
    assert peak_flops("NVIDIA H100 PCIe") < peak_flops("NVIDIA H200") and peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA GH200 480GB") == peak_flops("NVIDIA H200") and peak_flops("NVIDIA L40") is None


def test_operations_of_a_token_are_those_that_run(stage0):
    from torch.utils.flop_counter import FlopCounterMode

    from hmf.priming.objectives import Stage1Objective

    model = load_model(stage0, dtype=torch.float32)
    train_only_mixers(model)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(16)[None], objective=Stage1Objective())["loss"].backward()
    counts = counter.get_flop_counts()["Global"]
    # Products with weights; those with other activations (bmm) grow with the sequence and do not count.
    assert stage1_flops_per_token(model) == pytest.approx(counts[torch.ops.aten.mm] / 16, rel=0.15)


def test_layer_errors_start_at_the_first_mixer_and_end_where_the_head_reads(stage0):
    model = load_model(stage0, dtype=torch.float32).eval()
    batch = {"input_ids": torch.arange(20)[None], "attention_mask": torch.ones(1, 20)}
    errors = layer_errors(model, **batch)
    assert list(errors) == [1]
    assert_golden([errors[1]], (0.412379,), "relative error")
    model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    assert layer_errors(model, **batch)[1] == 0


def test_curves_are_data_and_a_picture(stage0, tmp_path):
    distill(stage0, tmp_path, cutting.settings(stage0, max_steps=4, save_steps=2), draw=draw_curves)
    losses, layers, _ = curves(json.loads((tmp_path / "stage1.log.json").read_text()))
    assert losses.keys() == {"loss", "loss_hidden", "loss_mixer"} and layers.keys() == {1}
    assert losses["loss"][0] == layers[1][0] == [2, 4]
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def entries(*kinds, every=10):
    """A log whose intervals have losses of these terms."""
    return [
        {"step": every * (index + 1), "loss": 1.0, **{f"loss_{term}": 0.5 for term in kind.split()}}
        for index, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("log", "changes"),
    [
        (entries("", "", "kl hidden", "kl hidden"), {20: "hidden + kl"}),
        (entries("kl hidden", "hidden", "hidden"), {10: "hidden"}),
        (entries("mixer", "mixer kl hidden", "kl hidden", "kl hidden"), {10: "hidden + kl"}),  # changed in between
        (entries("", "a b", "a b", ""), {10: "a + b", 30: "one term"}),
        (entries("kl", "kl"), {}),
        ([], {}),
    ],
)
def test_a_change_of_the_objective_is_found_and_marked(log, changes, tmp_path):
    assert objective_changes([*log, {"step": 50, "train_loss": 1.0}]) == changes
    (tmp_path / "log.json").write_text(json.dumps(log))
    assert draw_curves(tmp_path / "log.json").is_file()


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path, capsys):
    def draw(path):
        raise RuntimeError("no fonts\nat all")

    log = progress.RunLog(tmp_path / "stage1.log.json", draw)
    log.write(SimpleNamespace(is_world_process_zero=True, log_history=[{"loss": 1.0}]))
    assert json.loads((tmp_path / "stage1.log.json").read_text()) == [{"loss": 1.0}]
    assert "stage1.log.json: the plot of this log failed (no fonts at all)" in capsys.readouterr().err


def test_checkpoints_in_quick_succession_share_a_picture(tmp_path, monkeypatch):
    state, drawn, now = SimpleNamespace(is_world_process_zero=True, log_history=[{"loss": 1.0}]), [], 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    log = progress.RunLog(tmp_path / "stage1.log.json", lambda path: drawn.append(now))
    for now in (1.0, 21.0, 22.0, 40.0, 42.0):  # noqa: B007, the clock reads it
        log.on_save(None, state, None)
    now = 43.0
    log.write(state)
    assert drawn == [21.0, 42.0, 43.0]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_reporter_is_one_line(stage0, tmp_path, name, monkeypatch):
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(HmfError, match=f"report_to: {name} is not installed; `pip install {name}`"):
        distill(stage0, tmp_path, cutting.settings(stage0, report_to=[name]))


def watch(losses, factor=10.0):
    watching = LossWatch(factor)
    return [watching.judge(loss) for loss in losses]


def test_a_loss_that_runs_away_is_found_and_a_spike_is_not():
    usual = [1.0 + 0.1 * math.sin(i) for i in range(LEAST)]
    spike = [50.0] * (ABOVE - 1)
    assert not any(watch([*usual, *spike, *usual, *spike, *usual]))
    verdicts = watch([*usual, *spike, 50.0])
    assert not any(verdicts[:-1]) and "above 10 times its median" in verdicts[-1]
    assert not any(watch([*usual, *spike, 50.0], factor=0))


@given(st.lists(st.floats(0.5, 4.9), max_size=150), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_only_what_is_not_finite_stops_a_bounded_loss(losses, bad):
    assert not any(watch(losses))
    assert "the loss is" in watch([*losses, bad])[-1]


@given(st.lists(st.floats(0, 100), max_size=60), st.integers(0, 60))
def test_a_watch_goes_on_from_its_state(losses, cut):
    first, whole = LossWatch(3.0), watch(losses, 3.0)
    before = [first.judge(loss) for loss in losses[:cut]]
    second = LossWatch(3.0, json.loads(json.dumps(first.state)))
    assert before + [second.judge(loss) for loss in losses[cut:]] == whole


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_keeps_its_batch(stage0, tmp_path, monkeypatch, where):
    real, batches = HybridTrainer.compute_loss, []

    def spoil(self, model, inputs, *args, **kwargs):
        loss = real(self, model, inputs, *args, **kwargs)
        batches.append(inputs["input_ids"].clone())
        if self.state.global_step < 2:
            return loss
        # sqrt at 0: the value is finite, its gradient is not
        return loss * math.nan if where == "loss" else loss + (loss - loss.detach()).sqrt()

    monkeypatch.setattr(HybridTrainer, "compute_loss", spoil)
    recipe = tmp_path / "recipe.yaml"
    settings = cutting.settings(stage0).model_dump(mode="json")
    recipe.write_text(json.dumps(settings | {"model": str(stage0), "output": str(tmp_path / "run")}))
    done = CliRunner().invoke(app, ["distill", str(recipe)])
    assert isinstance(done.exception, HmfError)
    assert "step 3: the " in str(done.exception) and "\n" not in str(done.exception)
    with safe_open(tmp_path / "run/bad_batch.safetensors", "pt") as kept:
        assert torch.equal(kept.get_tensor("0.input_ids"), batches[-1])
        assert kept.metadata()["step"] == "3" and "nan" in kept.metadata()["reason"]
    assert newest_valid(tmp_path / "run/checkpoints", 1).name == "checkpoint-2"
    assert [entry["step"] for entry in json.loads((tmp_path / "run/stage1.log.json").read_text())] == [1, 2]


def test_a_first_loss_that_is_not_finite_is_not_blamed_on_the_learning_rate(stage0, tmp_path, monkeypatch):
    real = HybridTrainer.compute_loss
    monkeypatch.setattr(HybridTrainer, "compute_loss", lambda *args, **kwargs: real(*args, **kwargs) * math.nan)
    with pytest.raises(HmfError, match="step 1: the loss is nan; .*; check the weights of the model, and the data"):
        distill(stage0, tmp_path, cutting.settings(stage0))


def test_a_loss_that_runs_away_stops_the_run_and_keeps_the_batch_where_it_began(stage0, tmp_path, monkeypatch):
    real, batches = HybridTrainer.compute_loss, []

    def run_away(self, model, inputs, *args, **kwargs):
        batches.append(inputs["input_ids"].clone())
        return real(self, model, inputs, *args, **kwargs) * (1000 if self.state.global_step >= 22 else 1)

    monkeypatch.setattr(HybridTrainer, "compute_loss", run_away)
    with pytest.raises(HmfError, match=f"step {22 + ABOVE}: the loss is .*, above 10 times its median"):
        distill(stage0, tmp_path, cutting.settings(stage0, max_steps=40, save_steps=20))
    with safe_open(tmp_path / "bad_batch.safetensors", "pt") as kept:
        assert torch.equal(kept.get_tensor("0.input_ids"), batches[22])


@pytest.mark.parametrize("how", ["weights that are not finite", "a loss that is not"])
def test_what_the_last_step_made_of_the_weights_is_looked_at(stage0, tmp_path, monkeypatch, how):
    real = torch.optim.AdamW.step

    def spoil(self, *args, **kwargs):
        real(self, *args, **kwargs)
        spoil.calls += 1
        if spoil.calls == 3:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(math.nan if how.startswith("weights") else 1e38)

    spoil.calls = 0
    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(
        HmfError, match=r"step 3: after this step .*(not finite|the loss is).*nothing is saved"
    ) as caught:
        distill(stage0, tmp_path, cutting.settings(stage0))
    assert "\n" not in str(caught.value)
    assert newest_valid(tmp_path / "checkpoints", 1).name == "checkpoint-2" and not (tmp_path / "stage1").exists()
