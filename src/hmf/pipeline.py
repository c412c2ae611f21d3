# SPDX-License-Identifier: Apache-2.0
"""The whole job under one run folder: init, distil, export, evaluate, card; every step is done once."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from hmf.config.runs import EvaluateSettings, FinetuneRecipe, PrimeRecipe
from hmf.config.strict import parse_sealed, seal_json
from hmf.data import tasks
from hmf.errors import HmfError, notice, unknown_name
from hmf.evaluation.run import evaluate_checkpoint
from hmf.folders import resolve_base
from hmf.priming.export import export
from hmf.priming.stage0 import base_layers, make_stage0
from hmf.report.card import write_card
from hmf.report.curves import draw_curves
from hmf.training.checkpoints import replace_text, require_room
from hmf.training.distill import distill
from hmf.training.run import run_folder


def prime(recipe: PrimeRecipe, text: str, say: Any = print) -> dict[str, dict[str, Any]]:
    """`hmf prime`: run every step that is not done yet under `recipe.output`; `text` is the recipe's file content.

    Returns the scores by model: "teacher", "stage 0" (mixers started, not trained) and "primed". Under torchrun all
    processes train; one does the rest, and the others return nothing and may end.
    """
    base, run = resolve_base(recipe.base), recipe.output
    check_tasks(recipe.evaluate)
    pattern = recipe.hybrid.layer_pattern(base_layers(base))
    options = recipe.hybrid.options_by_key()

    def start() -> None:
        check_disk(run, base)
        if not (run / "stage0").is_dir():
            report = make_stage0(base, pattern, run / "stage0", options, recipe.seed, recipe.hybrid.conv_start)
            say(report.describe())

    with run_folder(run, text, start) as first:
        distill(run / "stage0", run, recipe.distill, recipe.seed, draw=draw_curves)
        if not first:
            return {}
        if not (run / "model").is_dir():
            export(run / "stage1", run / "model")
        models = {"teacher": base, "stage 0": run / "stage0", "primed": run / "model"}
        scores = {
            name: scored(path, recipe.evaluate, run / f"scores.{name.replace(' ', '')}.json", name)
            for name, path in models.items()
        }
        try:
            say(f"saved {write_card(run, recipe)}, the model card")
        except HmfError as error:  # the model and its scores are finished all the same
            notice(f"no model card: {error}")
        return scores


def check_tasks(settings: EvaluateSettings | None) -> None:
    """HmfError for the name of a task that there is none of."""
    for task in settings.tasks if settings else ():
        if task not in tasks.TASKS:
            raise HmfError(f"evaluate.tasks: {unknown_name('task', task, tasks.TASKS)}")


def finetuned_scores(recipe: FinetuneRecipe) -> dict[str, dict[str, Any]]:
    """Scores of a finished run of `hmf finetune`, of the model before and after, as its recipe asks for them."""
    if recipe.evaluate is None:
        return {}
    models = {"before": recipe.model, "model": recipe.output / "model"}
    return {
        name: scored(path, recipe.evaluate, recipe.output / f"scores.{name}.json", name)
        for name, path in models.items()
    }


def scored(path: Path, settings: EvaluateSettings, result: Path, name: str) -> dict[str, Any]:
    """Scores and footprint of a checkpoint, read from the file `result` when it is there and whole."""
    with suppress(FileNotFoundError, ValueError):
        return parse_sealed(result.read_text(encoding="utf-8"))
    scores = evaluate_checkpoint(path, settings, name=name)
    replace_text(result, seal_json(scores))
    return scores


def disk_needed(base: Path) -> int:
    """Bytes that a run writes at least: three checkpoints of the base's size and two training checkpoints."""
    return 5 * sum(file.stat().st_size for file in base.glob("*.safetensors"))


def check_disk(run: Path, base: Path) -> None:
    """HmfError when the disk that holds `run` has no room for what it does not hold yet."""
    there = sum(file.stat().st_size for file in run.rglob("*.safetensors"))
    require_room(run, disk_needed(base) - there)
