# SPDX-License-Identifier: Apache-2.0
"""The whole job under one run folder: init, distil, export, evaluate, card; every step is done once."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from hmf.config.pattern import Pattern
from hmf.config.runs import EvaluateSettings, PrimeRecipe
from hmf.config.strict import parse_sealed, seal_json
from hmf.data import tasks
from hmf.errors import HmfError, notice, unknown_name
from hmf.evaluation.run import evaluate_checkpoint
from hmf.folders import resolve_base
from hmf.priming.export import export
from hmf.priming.stage0 import base_layers, make_stage0
from hmf.report.card import write_card
from hmf.report.curves import draw_curves
from hmf.report.selection import draw_selection
from hmf.selection.run import SELECTION, select
from hmf.training.checkpoints import replace_text, require_room
from hmf.training.distill import distill
from hmf.training.run import run_folder


def prime(recipe: PrimeRecipe, text: str, say: Any = print) -> dict[str, dict[str, Any]]:
    """`hmf prime`: run every step that is not done yet under `recipe.output`; `text` is the recipe's file content.

    Returns the scores by model: "teacher", "stage 0" (mixers started, not trained) and "primed". Under torchrun all
    processes train; one does the rest, and the others return nothing and may end.
    """
    base, run = resolve_base(recipe.base), recipe.output
    for task in recipe.evaluate.tasks:
        if task not in tasks.TASKS:
            raise HmfError(f"evaluate.tasks: {unknown_name('task', task, tasks.TASKS)}")
    layers = base_layers(base)
    pattern = recipe.hybrid.spread_evenly().layer_pattern(layers)
    automatic = recipe.hybrid.layers == "auto"
    if automatic and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (run / SELECTION).is_file():
        raise HmfError(
            f"{run}: hybrid.layers: auto is chosen by one process; start this recipe without torchrun until it prints "
            "the pattern, and then again with it"
        )
    options = recipe.hybrid.options_by_key()

    def start() -> None:
        check_disk(run, base)
        if not (run / "stage0").is_dir():
            chosen = pattern
            if automatic:
                keep = layers - len(pattern.replaced)
                selection = select(base, layers, keep, recipe, run, draw_selection, draw_curves)
                chosen = Pattern.parse(selection["pattern"], layers, source=str(run / SELECTION))
            report = make_stage0(base, chosen, run / "stage0", options, recipe.seed, recipe.hybrid.conv_start)
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
