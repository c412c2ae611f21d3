# SPDX-License-Identifier: Apache-2.0
"""However a step is cut into accumulation steps and processes, it is the same step; and only one process writes."""

import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from hmf.config.runs import ObjectiveSettings, PrimeRecipe
from hmf.config.training import OptimiserSettings
from hmf.errors import HmfError
from hmf.model.checkpoint import load_model
from hmf.pipeline import prime
from hmf.priming.objectives import LayerwiseObjective, attention_sizes, train_only_mixers
from hmf.training.run import arguments, run_folder
from hmf.training.stage1 import Stage1Loss
from hmf.training.trainer import HybridTrainer
from tests.numerics import assert_near, check, nudged_checkpoint
from tests.training import cutting

OBJECTIVE = {"layerwise_steps": 1, "kl": 0.5, "kl_tokens": "supervised", "pre_lm_head": 2.0}
SUPERVISED = (1, 20, 0, 7, 15, 2, 0, 3)  # tokens with a label at the end of each row


def make_rows() -> list[dict[str, torch.Tensor]]:
    generator, rows = torch.Generator().manual_seed(1), []
    for count in SUPERVISED:
        ids = torch.randint(300, (24,), generator=generator)
        rows.append({"input_ids": ids, "labels": ids.where(torch.arange(24) >= 24 - count, -100)})
    return rows


class KeepGradients(TrainerCallback):
    def __init__(self, model, folder):
        self.model, self.folder = model, folder

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
            save_file(gradients, self.folder / f"gradients-{state.global_step}.safetensors")


def two_steps(stage0, folder, rows, accumulation, environment=None):
    """Gradients of a layer-by-layer step and of a KL step, of four rows each, into files; weights do not move."""
    os.environ.update(environment or {})
    model = load_model(stage0, dtype=torch.float64).double()
    train_only_mixers(model)
    training = OptimiserSettings(
        max_steps=2,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-12,
        max_grad_norm=1e9,
    )
    HybridTrainer(
        model=model,
        args=arguments(training, folder, 0, TrainingArguments, save_strategy="no", logging_steps=1),
        train_dataset=make_rows(),
        loss=Stage1Loss(ObjectiveSettings(**OBJECTIVE)),
        callbacks=[KeepGradients(model, folder)],
    ).train()


@pytest.fixture(scope="module")
def stage0(tmp_path_factory):
    return cutting.make_tiny_stage0(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def dense(stage0):
    """The same gradients from one batch, all logits at once and a teacher of its own, in float64."""
    rows = torch.utils.data.default_collate(make_rows())
    student, teacher = load_model(stage0, dtype=torch.float64).double(), None
    trained = train_only_mixers(student)
    first = {name: value[:4] for name, value in rows.items()}
    student(**first, objective=LayerwiseObjective(attention_sizes(student, **first)))["loss"].backward()
    layerwise = {name: student.get_parameter(name).grad.clone() for name in trained}
    student.zero_grad()
    ids, labels = rows["input_ids"][4:], rows["labels"][4:]
    teacher = AutoModelForCausalLM.from_pretrained(stage0.parent / "base", dtype=torch.float64)
    wanted, found = (model.model(input_ids=ids).last_hidden_state for model in (teacher, student))
    wanted = wanted.detach()
    log_p, log_q = (
        (x @ teacher.lm_head.weight.T).log_softmax(-1).detach()
        if x is wanted
        else (x @ teacher.lm_head.weight.detach().T).log_softmax(-1)
        for x in (wanted, found)
    )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1][labels[:, 1:] != -100]
    (2.0 * F.mse_loss(found, wanted) + 0.5 * kl.mean()).backward()
    return [layerwise, {name: student.get_parameter(name).grad for name in trained}]


@pytest.mark.parametrize(("rows", "accumulation", "processes"), [(4, 1, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2), (1, 1, 4)])
def test_gradients_are_the_dense_ones_for_any_accumulation_and_number_of_processes(
    stage0, dense, tmp_path, rows, accumulation, processes
):
    if processes == 1:
        two_steps(stage0, tmp_path, rows, accumulation)
    else:
        assert cutting.in_processes(two_steps, (stage0, tmp_path, rows, accumulation), processes) == [0] * processes
    for step, wanted in enumerate(dense):
        found = load_file(tmp_path / f"gradients-{step}.safetensors")
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            check(((found[name] - gradient).norm() / gradient.norm()).item(), 1e-7, f"step {step}: {name}")


def prime_tiny(stage0, run, rows, environment=None):
    os.environ.update(environment or {})
    distill = cutting.settings(stage0, per_device_train_batch_size=rows).model_dump(mode="json")
    recipe = PrimeRecipe.model_validate(
        {
            "base": str(stage0.parent / "base"),
            "output": str(run),
            "hybrid": {"pattern": "*-GDN"},
            "distill": distill,
            "evaluate": {"text_bytes": 500, "length": 96},
        }
    )
    scores = prime(recipe, "the recipe", say=lambda line: None)
    (run / f"seen-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(sorted(scores)))


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pictures")
def test_two_processes_prime_as_one_does_and_one_of_them_writes(stage0, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    prime_tiny(stage0, one, rows=4)
    assert cutting.in_processes(prime_tiny, (stage0, two, 2), 2) == [0, 0]
    names = ["primed", "stage 0", "teacher"]
    assert [json.loads((two / f"seen-{rank}.json").read_text()) for rank in (0, 1)] == [names, []]
    files = {path.name for path in one.iterdir()}
    assert {path.name for path in two.iterdir()} == files | {"seen-1.json"}
    other = tmp_path / "nudged"
    shutil.copytree(stage0.parent / "corpus", other / "corpus")
    nudged_checkpoint(stage0.parent / "base", other / "base")
    prime_tiny(other / "stage0", other / "run", rows=4)
    assert_near(*(load_file(run / "model/model.safetensors") for run in (two, one, other / "run")))


def claim_in_one(output, environment):
    os.environ.update(environment)
    try:
        with run_folder(output, "the recipe") as first:
            said = f"claimed {first}"
    except HmfError as error:
        said = str(error)
    (output.parent / f"said-{os.environ['RANK']}.txt").write_text(said)


def test_what_one_process_cannot_do_is_an_error_of_all(tmp_path):
    for name, wanted in (("new", ["claimed True", "claimed False"]), ("used", None)):
        output = tmp_path / name / "run"
        output.mkdir(parents=True)
        if wanted is None:
            (output / "mine.txt").touch()
        assert cutting.in_processes(claim_in_one, (output,), 2) == [0, 0]
        said = [(tmp_path / name / f"said-{rank}.txt").read_text() for rank in (0, 1)]
        assert said == wanted if wanted else all("holds other files" in line for line in said)
