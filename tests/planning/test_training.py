# SPDX-License-Identifier: Apache-2.0
"""The dry run: every recipe in recipes/ passes it, and what it counts is what a trainer holds."""

import itertools
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hmf.cli import app
from hmf.config.data import DataRecipe
from hmf.config.pattern import Pattern
from hmf.data.prepare import prepare
from hmf.data.prepared import PreparedDataset
from hmf.errors import HmfError
from hmf.folders import resolve_base
from hmf.model.checkpoint import load_config
from hmf.model.convert import hybrid_config
from hmf.planning import training as planner
from hmf.training.distill import distill
from hmf.training.finetune import finetune
from hmf.training.trainer import HybridTrainer
from tests.training import cutting

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*/*.yaml"))
SIZES = {"qwen3-0.6b": 0.6, "qwen3-4b": 4.0, "qwen3-8b": 8.2, "qwen3-32b": 32.8, "llama-3.1-8b": 8.0}
TOKENS = {"1-prime": 39.8e9, "2-long": 28.2e9, "3-sft": 5e9, "4-reasoning": 10e9}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """All of them, in a folder where nothing has been trained but recipes/distill's Stage 0 has its config."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        teacher = load_config(resolve_base("teacher"), weights=False)
        hybrid_config(teacher, Pattern.generate(6, "gdn", 0.5).with_fused(True)).save_pretrained("runs/stage0")
        yield planner.Recipes(FILES, resolve_base)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_passes_the_dry_run(recipes, path):
    large = path.parent.name in SIZES
    plan = recipes.plan(path, None if large else "l4")
    if plan is None:  # no recipe of a Hybrid's training
        assert not large
        return
    assert plan.fits, plan.advice()
    assert plan.gpu_hours > 0
    memory, guide = planner.rows(plan)["sum, of each GPU"], (RECIPES.parent / "docs/guide.md").read_text()
    pages = (path.parent / "README.md").read_text() + (guide if path.parent.name == "qwen3-8b" else "")
    assert {*re.findall(rf"^\| {path.stem} \|.* ([\d.]+ GiB) ", pages, re.MULTILINE)} <= {memory}
    if path.parent.name == "qwen3-0.6b-1b":
        assert memory in re.findall(r"│ sum, of each GPU .*", guide)[0]
    if large:
        sizes = {planner.size_of(planner.figures(plan)["sum_bytes"])}
        table = [line for line in (path.parent / "README.md").read_text().splitlines() if f"| {path.stem} |" in line]
        assert all(sizes & {cell.strip() for cell in line.split("|")} for line in table)
        assert plan.tokens == pytest.approx(TOKENS[path.stem.split("-", 1)[1]], rel=0.01)


def test_the_configs_are_the_models_that_they_are_named_after():
    for name, size in SIZES.items():
        config = load_config(RECIPES / "configs" / name, weights=False)
        whole = hybrid_config(config, Pattern(("*",) * config.num_hidden_layers))
        count = sum(x.numel() for x in planner.without_memory(whole).parameters()) / 1e9
        assert count == pytest.approx(size, rel=0.02)


def test_the_long_context_of_one_stage_is_the_next_ones(recipes):
    path = RECIPES / "qwen3-8b" / "gdn-4-reasoning.yaml"
    config = recipes.job(path).model.config
    assert config.max_position_embeddings == 131072 and config.rope_parameters["rope_theta"] == 5e6
    assert config.hybrid_override_pattern.count("GDN") == 18 and not config.pattern.fused


class Recorded(Exception):
    pass


def record(monkeypatch):
    """Bytes of weights, gradients and moments in the second step of the next run."""
    found, real = {}, HybridTrainer.training_step

    def step(self, model, *args, **kwargs):
        loss = real(self, model, *args, **kwargs)
        parameters = list(self.model.parameters())
        found["weights"] = sum(x.numel() * x.element_size() for x in parameters)
        found["gradients"] = sum(x.grad.numel() * x.grad.element_size() for x in parameters if x.grad is not None)
        states = [x for state in self.optimizer.state.values() for x in state.values() if x.dim()]
        found["moments of AdamW"] = sum(x.numel() * x.element_size() for x in states)
        if self.state.global_step:
            raise Recorded
        return loss

    monkeypatch.setattr(HybridTrainer, "training_step", step)
    return found


@pytest.mark.parametrize("lora", [None, {"rank": 3, "learning_rate": 1e-3}])
@pytest.mark.parametrize(("precision", "widened"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_stage_2_holds_what_was_planned(tmp_path, monkeypatch, lora, precision, widened):
    if lora:
        pytest.importorskip("peft")
    model = cutting.make_tiny_hybrid(tmp_path / "model", dtype=getattr(torch, precision))
    if widened:  # as Stage 1 stores its result: all in float32, and trained mixers
        tensors = load_file(model / "model.safetensors")
        tensors = {name: x.float() + 1e-5 * (".gdn." in name) for name, x in tensors.items()}
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    recipe = cutting.finetune_recipe(model, tmp_path / "run", lora=lora)
    if widened:
        recipe = recipe.model_copy(update={"trainable": {"norms": 1e-3}})
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"precision": precision})})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    (plan,) = planner.plans([file], resolve_base, "l4")
    found = record(monkeypatch)
    with pytest.raises(Recorded):
        finetune(recipe)
    assert {name: plan.memory[name] for name in found} == found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stage_1_holds_what_was_planned(tmp_path, monkeypatch, precision):
    stage0 = cutting.make_tiny_stage0(tmp_path / "model", dtype=getattr(torch, precision))
    settings = cutting.settings(stage0, precision=precision)
    file = tmp_path / "recipe.yaml"
    content = settings.model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump(content | {"model": str(stage0), "output": str(tmp_path / "run")}))
    (plan,) = planner.plans([file], resolve_base, "l4")
    found = record(monkeypatch)
    with pytest.raises(Recorded):
        distill(stage0, tmp_path / "run", settings)
    assert {name: plan.memory[name] for name in found} == found


def plan_of(name, gpu=None, *overrides):
    (plan,) = planner.plans([RECIPES / name], resolve_base, gpu, overrides=overrides)
    return plan


def test_mixers_of_a_planned_stage_1_are_not_exact_in_bfloat16():
    """Its result is in float32; that of the next stage is cast to bfloat16."""
    primed, tuned = (
        plan_of(f"qwen3-8b/gdn-{stage}.yaml", "h200x4", "trainable={norms: 0.001}", "training.strategy=ddp").job
        for stage in ("2-long", "3-sft")
    )
    counts = [sum(x.numel() for x in job.narrow) for job in (primed, tuned)]
    mixers = [x for name, x in tuned.model.named_parameters() if ".gdn." in name]
    assert counts[1] - counts[0] == sum(x.numel() for x in mixers if x in tuned.narrow) > 0


def test_what_does_not_fit_says_what_to_change():
    big = plan_of("qwen3-32b/gdn-1-prime.yaml", "h200x8", "distill.training.strategy=ddp")
    assert not big.fits and big.advice() == "--set distill.training.strategy=fsdp2"
    long = plan_of("qwen3-8b/gdn-2-long.yaml", None, "training.sequence_parallel=1", "training.strategy=fsdp2")
    assert not long.fits and "--set training.sequence_parallel=" in long.advice()
    assert plan_of("qwen3-8b/gdn-3-sft.yaml", "l4x2").advice() == "more GPUs or larger ones, by --gpu"
    mended = plan_of("qwen3-32b/gdn-1-prime.yaml", "h200x8")
    assert mended.fits and mended.tokens_per_step == big.tokens_per_step


TIGHT = (
    "precision=float32",
    "gradient_checkpointing=false",
    "per_device_train_batch_size=4",
    "strategy=ddp",
    "sequence_parallel=1",
)
LARGE = {
    "distill/recipe.yaml": ("per_device_train_batch_size=65536",),
    "quickstart/sft.yaml": ("per_device_train_batch_size=65536",),
}


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        *itertools.product(LARGE, ["h200x8", "l4x2"]),
        *itertools.product(["qwen3-0.6b/gdn-2-long.yaml", "qwen3-8b/gdn-1-prime.yaml"], ["h200x8", "h100x6"]),
        ("qwen3-0.6b/gdn-2-long.yaml", "a100-40x4"),
        ("qwen3-8b/gdn-1-prime.yaml", "l4x2"),
    ],
)
def test_advice_can_be_applied_and_is_enough(recipes, name, gpu):
    """As it is printed, in recipes of every command and with settings that take much memory."""
    command = ["plan-training", str(RECIPES / name), "--gpu", gpu]
    section = "distill.training" if "hybrid" in yaml.safe_load((RECIPES / name).read_text()) else "training"
    for setting in TIGHT + LARGE.get(name, ()):
        command += ["--set", f"{section}.{setting}"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.exception
    (line,) = re.findall("does not fit; it needs (.*)", first.output)
    advice = line.strip().split(" ")
    if line.startswith("--set"):
        second = CliRunner().invoke(app, command + advice)
        assert second.exit_code == 0 and "does not fit" not in second.output
        kept = [re.search(r"tokens of a step\W+([\d,]+)", run.output)[1] for run in (first, second)]
        assert kept[0] == kept[1]
    else:
        assert line == "more GPUs or larger ones, by --gpu" and gpu != "h200x8"


def test_advice_is_what_the_recipe_may_have(recipes):
    """No sharing of a row in an odd number of parts, nor of what the recipe's other keys exclude."""
    base = ("training.strategy=ddp", "training.sequence_parallel=1")
    lora = "lora={learning_rate: 1e-4, groups: [attention, mlp]}"
    for extra in ((lora, "trainable={mixers: 1e-4}"), ("training.strategy=deepspeed",)):
        plan = plan_of("qwen3-8b/gdn-2-long.yaml", "h200x8", *base, *extra)
        assert not plan.fits
        options = re.findall(r"--set (\S+)", plan.advice())
        if options:
            assert plan_of("qwen3-8b/gdn-2-long.yaml", "h200x8", *base, *extra, *options).fits


def test_epochs_are_planned_as_the_steps_that_they_come_to(tmp_path, monkeypatch):
    """Of rows that are there, and of rows that another recipe will make."""
    monkeypatch.chdir(tmp_path)
    hybrid = cutting.make_tiny_hybrid(tmp_path / "tiny" / "model")
    data = {
        "output": "rows",
        "tokenizer": str(hybrid),
        "sequence_length": 32,
        "tokens": 3200,
        "sources": [{"path": str(hybrid.parent / "corpus"), "weight": 1}],
    }
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "eval_strategy": "epoch", "eval_rows": 10}
    stage2 = {
        "method": "cpt",
        "model": str(hybrid),
        "output": "run",
        "data": {"prepared": "rows"},
        "trainable": {"all": 1e-4},
        "training": training,
    }
    for name, content in (("data", data), ("stage2", stage2)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))

    def plan():
        return planner.plans([Path("stage2.yaml")], resolve_base, "l4x4")[0]

    assert plan().training.steps == 23  # 2 * (100 - 10) rows, 8 of a step
    prepare(DataRecipe.model_validate(data), hybrid)
    rows = len(PreparedDataset("rows"))
    assert plan().training.steps == -(-2 * (rows - 10) // 8) and plan().tokens == plan().training.steps * 8 * 32
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "rows").rename(tmp_path / "elsewhere")
    with pytest.raises(HmfError, match="does not exist, and no recipe in or beside this folder creates it"):
        plan()
    pairs = {"data": None, "pairs": {"path": "pairs.jsonl", "sequence_length": 64}, "method": "dpo"}
    (tmp_path / "stage2.yaml").write_text(yaml.safe_dump(stage2 | pairs))
    with pytest.raises(HmfError, match="rows of pairs is unknown before .* plan with --set training.max_steps=N"):
        plan()
    assert planner.plans([Path("stage2.yaml")], resolve_base, "l4", overrides=["training.max_steps=5"])


def test_divided_work_takes_less_of_each_gpu():
    wide = "training.precision=float32"
    whole = plan_of("qwen3-8b/gdn-3-sft.yaml", "h200", "training.strategy=ddp", wide).memory
    for strategy, shares in (("ddp", (1, 1)), ("fsdp2", (8, 8)), ("deepspeed", (1, 8))):
        parts = plan_of("qwen3-8b/gdn-3-sft.yaml", "h200x8", f"training.strategy={strategy}", wide).memory
        for name, share in zip(("weights", "gradients", "moments of AdamW"), (*shares, shares[1]), strict=True):
            assert parts[name] * share == whole[name]
    split = plan_of("qwen3-8b/gdn-3-sft.yaml", "h200x8", "training.sequence_parallel=4")
    one = plan_of("qwen3-8b/gdn-3-sft.yaml", "h200x8")
    assert split.memory["activations"] * 4 == one.memory["activations"]
    assert split.tokens_per_step * 4 == one.tokens_per_step


def test_compiled_layers_store_fewer_activations_unless_their_outputs_are_compared():
    """`objective.layers` reads outputs by hooks, with which the layers run uncompiled."""

    def activations(*overrides):
        return plan_of("quickstart/recipe.yaml", "h200", *overrides).memory["activations"]

    compiled = "distill.training.torch_compile=true"
    assert activations(compiled) < activations()
    assert activations(compiled, "distill.objective.layers=residuals") == activations()


def test_flops_are_those_of_the_parameters_and_of_attention(recipes):
    """A dense count of Qwen3-8B's 18 + 18 layers in rows of 131,072 tokens."""
    plan = recipes.plan(RECIPES / "qwen3-8b" / "gdn-2-long.yaml")
    kept = sum(x.numel() for n, x in plan.job.model.named_parameters() if ".mlp." in n or "lm_head" in n)
    trained = sum(x.numel() for n, x in plan.job.model.named_parameters() if x.requires_grad)
    scores = 18 * 3 * 2 * 2 * 32 * 128 * 131072 / 2
    assert plan.flops_per_token == 4 * kept + 6 * trained + scores
    assert plan.gpu_hours == pytest.approx(plan.tokens * plan.flops_per_token / (0.35 * 989.4e12) / 3600)


def test_the_command_and_its_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["plan-training", str(RECIPES / "qwen3-8b" / "gdn-1-prime.yaml"), "--gpu", "h100x8"])
    assert run.exit_code == 0 and "Planned, not measured" in run.output and "8 x h100" in run.output
    orphan = tmp_path / "sft.yaml"
    content = yaml.safe_load((RECIPES / "quickstart" / "sft.yaml").read_text())
    for change, said in (
        (
            {},
            "sft.yaml: model: runs/quickstart-cpt/model: no such directory; .*; and no recipe in or beside this folder",
        ),
        ({"modl": 1}, "sft.yaml: unknown key 'modl'; did you mean 'model'"),
    ):
        orphan.write_text(yaml.safe_dump(content | change))
        with pytest.raises(HmfError, match=said):
            planner.plans([orphan], resolve_base, "l4")
    with pytest.raises(HmfError, match="recipe.yaml: distill.training.gpus: is not set; set it, or give --gpu"):
        planner.plans([RECIPES / "quickstart" / "recipe.yaml"], resolve_base)
    with pytest.raises(HmfError, match="gdn-3-sft.yaml: training.strategy: fsdp2 needs several GPUs; choose ddp"):
        planner.plans(
            [RECIPES / "qwen3-8b" / "gdn-3-sft.yaml"],
            resolve_base,
            "h200",
            overrides=["training.strategy=fsdp2", "training.sequence_parallel=1"],
        )
    with pytest.raises(HmfError, match="sequence_parallel: 4 does not divide 6 GPUs"):
        planner.plans([RECIPES / "qwen3-8b" / "gdn-2-long.yaml"], resolve_base, "h200x6")
