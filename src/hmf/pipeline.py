# SPDX-License-Identifier: Apache-2.0
"""The whole job under one run folder: init, distil, export, evaluate; every step is done once."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from hmf.config.runs import EvaluateSettings, PrimeRecipe
from hmf.data import tasks
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError, unknown_name
from hmf.evaluation.run import evaluate_model
from hmf.model.checkpoint import load_model
from hmf.model.convert import footprint
from hmf.priming.export import export
from hmf.priming.stage0 import Stage0Report, base_layers, make_stage0
from hmf.report.curves import draw_curves
from hmf.training.checkpoints import by_one, replace_text, require_room
from hmf.training.distill import distill

EMBEDDED_TEACHER = "teacher"


def resolve_base(base: str) -> Path:
    """A base checkpoint's directory; the name "teacher" is the one that comes with the package."""
    if base == EMBEDDED_TEACHER and not Path(base).is_dir():
        return Path(str(resources.files("hmf") / "assets" / "teacher"))
    return Path(base)


def claim(output: Path, recipe: str) -> None:
    """Make `output` this recipe's run folder, or find that it is already; HmfError when it is something else's."""
    kept = output / "recipe.yaml"
    if kept.is_file():
        if kept.read_text(encoding="utf-8") != recipe:
            raise HmfError(f"{output}: was started with another recipe ({kept}); choose another output or remove it")
        return
    # What a claim that was cut off left, or another process of this run has just written, is no use of the folder.
    if output.exists() and (output.is_file() or any(not item.name.startswith(kept.name) for item in output.iterdir())):
        raise HmfError(f"{output}: the output directory is in use; choose another or remove it first")
    output.mkdir(parents=True, exist_ok=True)
    part = output / f"{kept.name}.{os.getpid()}.part"
    part.write_text(recipe, encoding="utf-8")
    os.replace(part, kept)


def prime(recipe: PrimeRecipe, text: str, say: Any = print) -> dict[str, dict[str, Any]]:
    """`hmf prime`: run every step that is not done yet under `recipe.output`; `text` is the recipe's file content.

    Returns the scores by model: "teacher", "stage 0" (mixers started, not trained) and "primed". Under torchrun all
    processes train; one does the rest, and the others return nothing and may end.
    """
    base, run = resolve_base(recipe.base), recipe.output
    for task in recipe.evaluate.tasks:
        if task not in tasks.TASKS:
            raise HmfError(f"evaluate.tasks: {unknown_name('task', task, tasks.TASKS)}")
    pattern = recipe.hybrid.layer_pattern(base_layers(base))
    options = recipe.hybrid.options_by_key()

    def start() -> None:
        check_disk(run, base)
        claim(run, text)
        if not (run / "stage0").is_dir():
            say(describe(make_stage0(base, pattern, run / "stage0", options, recipe.seed, recipe.hybrid.conv_start)))

    first = by_one(start)
    distill(run / "stage0", run, recipe.distill, recipe.seed, draw=draw_curves)
    if not first:
        return {}
    if not (run / "model").is_dir():
        export(run / "stage1", run / "model")
    models = {"teacher": base, "stage 0": run / "stage0", "primed": run / "model"}
    return {
        name: scored(path, recipe.evaluate, run / f"scores.{name.replace(' ', '')}.json", say)
        for name, path in models.items()
    }


def scored(path: Path, settings: EvaluateSettings, result: Path, say: Any = print) -> dict[str, Any]:
    """Scores and footprint of a checkpoint, read from the file `result` when it has been written before."""
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    say(f"evaluate: {path}")
    scores = evaluate_checkpoint(path, settings)
    replace_text(result, json.dumps(scores, indent=1) + "\n")
    return scores


def evaluate_checkpoint(path: str | Path, settings: EvaluateSettings) -> dict[str, Any]:
    """`hmf evaluate`: held-out text, generated tasks and footprint of a checkpoint, in float32 on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype="auto" if device == "cuda" else torch.float32, generates=bool(settings.tasks)).to(
        device
    )
    scores = evaluate_model(
        model,
        tokenizer,
        tasks=settings.tasks,
        n=settings.samples,
        length=settings.length,
        thinking=settings.thinking,
        max_new_tokens=settings.max_new_tokens,
        max_bytes=settings.text_bytes,
        batch_size=settings.batch_size,
    )
    return {**scores, "footprint": footprint(model)}


def describe(report: Stage0Report) -> str:
    """A Stage-0 report for people."""
    lines = [f"pattern {report.pattern}"]
    lines += [f"{count:6d} tensors {what}" for what, count in report.counts().items()]
    unused = {name: why for start in report.starts.values() for name, why in start.unused.items()}
    lines += [f"       not used by the mixers: {name} ({why})" for name, why in sorted(unused.items())]
    return "\n".join(lines)


def disk_needed(base: Path) -> int:
    """Bytes that a run writes at least: three checkpoints of the base's size and two training checkpoints."""
    return 5 * sum(file.stat().st_size for file in base.glob("*.safetensors"))


def check_disk(run: Path, base: Path) -> None:
    """HmfError when the disk that holds `run` has no room for what it does not hold yet."""
    there = sum(file.stat().st_size for file in run.rglob("*.safetensors"))
    require_room(run, disk_needed(base) - there)
