# SPDX-License-Identifier: Apache-2.0
"""Stage 1 on the student's own texts: it learns, only mixers move, and a stopped run goes on bit for bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hmf.config.runs import DistillSettings, OnPolicySettings
from hmf.errors import HmfError
from hmf.training import distill as module
from hmf.training.distill import distill
from tests.numerics import assert_near
from tests.training import cutting

pytest.importorskip("trl", reason="on-policy distillation needs trl")


def settings(stage0, **training):
    return DistillSettings.model_validate(
        {
            "data": {"text": str(stage0.parent / "corpus"), "sequence_length": 32},
            "objective": {"pre_lm_head": 0, "kl": 1, "kl_direction": "reverse", "kl_tokens": "supervised"},
            "on_policy": {"max_new_tokens": 8},
            "training": {"max_steps": 40, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 15}
            | training,
        }
    )


@pytest.fixture(scope="module")
def stage0(tmp_path_factory):
    return cutting.make_tiny_stage0(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def finished(stage0, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    distill(stage0, run, settings(stage0))
    return run


@pytest.mark.slow
def test_the_loss_falls_and_only_mixers_change(stage0, finished):
    losses = [entry["loss"] for entry in json.loads((finished / "stage1.log.json").read_text()) if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    before, after = load_file(stage0 / "model.safetensors"), load_file(finished / "stage1/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".gdn." in name}
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (stage0 / name).read_bytes() == (finished / "stage1" / name).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(stage0, finished, tmp_path):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-40")
    distill(stage0, tmp_path, settings(stage0))
    ours, wanted = (load_file(run / "stage1/model.safetensors") for run in (tmp_path, finished))
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_the_teacher_scores_what_the_student_wrote(stage0, tmp_path, monkeypatch):
    """Almost without chance the texts are what the exported student writes greedily, and the loss of a step is the mean
    over all tokens of theirs, by an objective called on each text alone."""
    from hmf.model.checkpoint import load_model
    from hmf.model.convert import drop_teacher
    from hmf.priming.objectives import objective_at
    from hmf.training.trainer import HybridTrainer

    seen, real = [], HybridTrainer.compute_loss

    def keep(self, model, batch, return_outputs, counts):
        if torch.is_grad_enabled():  # else the weights after the last step are looked at
            seen.append((batch, counts))
        return real(self, model, batch, return_outputs, counts)

    monkeypatch.setattr(HybridTrainer, "compute_loss", keep)
    chosen = settings(stage0, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    chosen = chosen.model_copy(update={"on_policy": OnPolicySettings(max_new_tokens=8, temperature=1e-4)})
    distill(stage0, tmp_path, chosen)
    (logged,) = [x["loss"] for x in json.loads((tmp_path / "stage1.log.json").read_text()) if "loss" in x]
    model, total, count = load_model(stage0, dtype=torch.float32), 0.0, 0
    module.train_only_mixers(model)
    student = drop_teacher(model)
    for batch, _ in seen:
        for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
            real_ids, real_labels = ids[mask.bool()][None], labels[mask.bool()][None]
            written = int((real_labels != -100).sum())
            assert 1 <= written <= 8 and (real_labels[0, -written:] == real_ids[0, -written:]).all()
            prompt = real_ids[:, :-written]
            ends = [282]  # the tokenizer's end of a turn
            greedy = student.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=0)
            assert torch.equal(greedy[:, prompt.shape[1] :][:, :written], real_ids[:, -written:])
            one = model(input_ids=real_ids, labels=real_labels, objective=objective_at(chosen.objective, 0))
            total, count = total + one["loss"].item() * written, count + written
    assert len(seen) == 2 and all(counts[1] == count for _, counts in seen)
    wanted = torch.tensor(total / count)
    assert_near(torch.tensor(logged), wanted, wanted)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"on_policy": {"max_new_tokens": 20}}, "max_new_tokens must leave 16"),
        ({"objective": {"layerwise_steps": 2}}, "layerwise_steps must be 0 with on_policy"),
        ({"data": {"prepared": "rows"}}, "leave out data.prepared"),
        ({"on_policy": {"max_new_token": 8}}, "max_new_token"),
    ],
)
def test_settings_that_do_not_fit_are_refused(stage0, change, said):
    with pytest.raises(ValueError, match=said):
        DistillSettings.model_validate(settings(stage0).model_dump() | change)


def test_without_trl_it_says_what_to_install(stage0, tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HmfError, match="on_policy: needs trl"):
        distill(stage0, tmp_path, settings(stage0))


@pytest.mark.slow
def test_what_the_last_step_made_of_the_weights_is_looked_at(stage0, tmp_path, monkeypatch):
    real = torch.optim.AdamW.step

    def spoil(self, *args, **kwargs):
        real(self, *args, **kwargs)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(1e38)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(HmfError, match="step 1: after it the loss is .*nothing is saved"):
        distill(stage0, tmp_path, settings(stage0, max_steps=1))
    assert not (tmp_path / "stage1").exists()
