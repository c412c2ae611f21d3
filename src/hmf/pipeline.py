# SPDX-License-Identifier: Apache-2.0
"""`hmf prime`: init, distil, export, evaluate, card and report in one run folder. Finished steps are not repeated."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hmf.config.pattern import Pattern
from hmf.config.runs import EvaluateSettings, FinetuneRecipe, PrimeRecipe
from hmf.config.strict import parse_sealed, seal_json
from hmf.data import tasks
from hmf.data.mixture import MixtureDataset, PromptDataset, require_tasks
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError, notice, require_names
from hmf.evaluation.results import ANSWERS
from hmf.evaluation.run import evaluate_checkpoint
from hmf.folders import BASE, resolve_base
from hmf.model.convert import base_pattern
from hmf.model.text_only import take_text
from hmf.priming.export import export
from hmf.priming.objectives import check_objective
from hmf.priming.stage0 import base_config, make_stage0
from hmf.report.card import write_card
from hmf.report.curves import draw_curves
from hmf.report.page import write_report
from hmf.report.records import TIMES
from hmf.report.selection import draw_selection
from hmf.selection.run import SELECTION, select
from hmf.training.checkpoints import replace_text, require_room
from hmf.training.distill import distill
from hmf.training.run import run_folder


def prime(recipe: PrimeRecipe, text: str, say: Any = print) -> dict[str, dict[str, Any]]:
    """Run every step of `hmf prime` that is not finished yet under `recipe.output`.

    Under torchrun, all processes train. The first process does everything else; the others return {} and may end.

    Args:
        text: content of the recipe file.
        say: function that prints a line of progress.
    Returns:
        Scores by model: "teacher", "stage 0" (mixers initialised, not trained) and "primed".
    """
    source, run = resolve_base(recipe.base), recipe.output
    base = run / BASE if recipe.text_only else source
    check_tasks(recipe.evaluate, source)
    for key, data in (("data", recipe.distill.data), ("eval_data", recipe.distill.eval_data)):
        if data is not None and data.prepared is None:
            kind = PromptDataset if recipe.distill.on_policy else MixtureDataset
            require_tasks(key, data, load_tokenizer(source), kind)
    config = base_config(source, recipe.text_only)
    check_objective(recipe.distill.objective, config.vocab_size)
    layers = config.num_hidden_layers
    pattern = base_pattern(config, recipe.hybrid.spread_evenly())
    automatic = recipe.hybrid.layers == "auto"
    if automatic and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (run / SELECTION).is_file():
        raise HmfError(
            f"{run}: hybrid.layers: auto is chosen by one process; start this recipe without torchrun until it prints "
            "the pattern, and then again with it"
        )
    options = recipe.hybrid.options_by_key()
    seconds: dict[str, float] = {}

    def start() -> None:
        check_disk(run, source)
        if recipe.text_only and not base.is_dir():
            say(f"{source}: {take_text(source, base).describe()}")
        if not (run / "stage0").is_dir():
            chosen = pattern
            if automatic:
                keep = layers - len(pattern.replaced)
                with timed(seconds, "selection"):
                    selection = select(base, layers, keep, recipe, run, draw_selection, draw_curves)
                chosen = Pattern.parse(selection["pattern"], layers, source=str(run / SELECTION))
            with timed(seconds, "stage0"):
                hybrid = recipe.hybrid
                report = make_stage0(
                    base,
                    chosen,
                    run / "stage0",
                    options,
                    recipe.seed,
                    hybrid.conv_start,
                    hybrid.calibrated,
                    recipe.distill.data,
                )
            say(report.describe())

    with run_folder(run, text, start) as first:
        distill(run / "stage0", run, recipe.distill, recipe.seed, draw=draw_curves)
        if not first:
            return {}
        if not (run / "model").is_dir():
            with timed(seconds, "export"):
                export(run / "stage1", run / "model")
        keep_times(run / TIMES, seconds)
        models = {"teacher": base, "stage 0": run / "stage0", "primed": run / "model"}
        scores = {
            name: scored(path, recipe.evaluate, run / f"scores.{name.replace(' ', '')}.json", name)
            for name, path in models.items()
        }
        try:
            say(f"saved {write_card(run, recipe)}, the model card")
        except HmfError as error:  # the model and its scores are complete without it
            notice(f"the model card was not written: {error}")
        try:
            say(f"saved {write_report(run, recipe)}, the report; open it in a browser")
        except Exception as error:  # a report that cannot be drawn must not fail a finished run
            notice(f"the report was not written: {error}")
        return scores


def check_tasks(settings: EvaluateSettings | None, model: Path) -> None:
    """HmfError if `settings.tasks` has an unknown task, one twice, or one that the model's template cannot write."""
    chosen = settings.tasks if settings else []
    require_names("evaluate.tasks", "task", chosen, tasks.TASKS)
    if chosen:
        try:
            tasks.require_template(chosen, load_tokenizer(model))
        except HmfError as error:
            raise HmfError(f"evaluate.{error}") from None


def finetuned_scores(recipe: FinetuneRecipe) -> dict[str, dict[str, Any]]:
    """Scores of the model before and after a finished run of `hmf finetune`, by the recipe's section `evaluate`."""
    if recipe.evaluate is None:
        return {}
    models = {"before": recipe.model, "model": recipe.output / "model"}
    return {
        name: scored(path, recipe.evaluate, recipe.output / f"scores.{name}.json", name)
        for name, path in models.items()
    }


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Measure the time of the block, and store it as `seconds[step]`."""
    started = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - started, 3)


def keep_times(file: Path, seconds: dict[str, float]) -> None:
    """Write the times of steps to `file`. Times of other steps in the file are kept."""
    if seconds:
        with suppress(FileNotFoundError, ValueError):
            seconds = parse_sealed(file.read_text(encoding="utf-8")) | seconds
        replace_text(file, seal_json(seconds))


def scored(path: Path, settings: EvaluateSettings, result: Path, name: str) -> dict[str, Any]:
    """Scores and footprint of a checkpoint. They are read from the file `result` if it is intact, else written."""
    with suppress(FileNotFoundError, ValueError):
        return parse_sealed(result.read_text(encoding="utf-8"))
    answers = result.parent / ANSWERS / result.stem.removeprefix("scores.")
    if not sys.stderr.isatty():  # a terminal has a progress bar for each task
        print(f"evaluate: {name}", file=sys.stderr, flush=True)
    try:
        scores = evaluate_checkpoint(path, settings, name=name, answers=answers)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"while evaluating {name}; the same command continues") from None
    replace_text(result, seal_json(scores))
    return scores


def disk_needed(base: Path) -> int:
    """Least number of bytes that a run writes: three checkpoints of the base's size and two training checkpoints."""
    return 5 * sum(file.stat().st_size for file in base.glob("*.safetensors"))


def check_disk(run: Path, base: Path) -> None:
    """HmfError when the disk of the run folder has too little space for the files that are still to be written."""
    written_bytes = sum(file.stat().st_size for file in run.rglob("*.safetensors"))
    require_room(run, disk_needed(base) - written_bytes)
