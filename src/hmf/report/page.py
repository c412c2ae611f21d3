# SPDX-License-Identifier: Apache-2.0
"""`hmf report`: a run folder as one HTML page, which needs no network. Each number links to its file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import hmf
from hmf.config.layers import LAYER_KINDS
from hmf.config.pattern import ATTENTION, is_fused
from hmf.config.runs import DistillRecipe, FinetuneRecipe, PrimeRecipe
from hmf.errors import HmfError, counted
from hmf.folders import ASSETS, RECIPE, reason
from hmf.model.checkpoint import load_config
from hmf.planning import serving as planner
from hmf.training.checkpoints import replace_text

from . import charts, records
from .blocks import Block, Cell, Note, Section, Table, Text
from .card import Card
from .curves import broken, curves, objective_changes
from .efficiency import measured, planned
from .evidence import MODEL, Evidence, Stage
from .licence import NOT_STATED
from .references import reference
from .retention import Retention
from .suites import MISSING

REPORT, TEMPLATE = "report.html", "report.html.jinja"
MARKER = '<meta name="generator" content="hmf '  # identifies a page that hmf wrote


def write_report(place: Path, recipe: Stage | None = None, gpu: str = "h200", force: bool = False) -> Path:
    """`hmf report`: write report.html into the run folder `place`, and return its path.

    Args:
        gpu: the GPUs of the serving plan.
        force: replace a report.html that hmf did not write.
    Raises:
        HmfError: the folder is not a run folder, a file in it is damaged, or hmf did not write its report.html.
    """
    page = Page(_evidence(place, recipe), gpu)
    file = page.evidence.run / REPORT
    if not force and file.exists() and MARKER not in file.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise HmfError(f"{file}: was not written by hmf; use --force to overwrite it, or move it")
    text = page.render()
    try:
        replace_text(file, text)
    except OSError as error:
        raise HmfError(f"{file}: cannot be written: {reason(error)}") from None
    return file


def _evidence(place: Path, recipe: Stage | None) -> Evidence:
    """The evidence of a finished or unfinished run. Raises HmfError for a folder that is not a run folder."""
    try:
        return Evidence.of(place, recipe)
    except HmfError:
        begun = place.is_dir() and ((place / RECIPE).is_file() or any(place.glob("*.log.json")))
        if not begun:
            raise
    return Evidence(place, place / MODEL, recipe)


@dataclass(frozen=True)
class Page:
    """The page of a run folder. `gpu` names the GPUs of the serving plan."""

    evidence: Evidence
    gpu: str

    def render(self) -> str:
        environment = Environment(
            loader=FileSystemLoader(ASSETS / "report"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        sections = [
            Section("glance", "At a glance", list(self.glance())),
            Section("pipeline", "Pipeline", list(self.pipeline())),
            Section("training", "Training", list(self.training())),
            Section("layers", "Layers", list(self.layers())),
            Section("retention", "Retention", list(self.retention.blocks())),
            Section(
                "efficiency",
                "Memory and throughput",
                [*planned(self.config, self.evidence, self.gpu), *measured(self.evidence)],
            ),
            Section("samples", "Samples side by side", list(self.retention.samples())),
            Section("provenance", "Provenance", list(self.provenance())),
        ]
        return environment.get_template(TEMPLATE).render(
            title=self.title, sections=sections, version=hmf.__version__, run=str(self.evidence.run)
        )

    # ---- shared by the sections

    @cached_property
    def config(self) -> Any | None:
        """The config of the model, or of the last stage before it; None if there is no checkpoint yet."""
        run = self.evidence.run
        folders = (self.evidence.model, run / "stage1", run / "stage0")
        return next((load_config(folder) for folder in folders if (folder / "config.json").is_file()), None)

    @cached_property
    def pattern(self) -> Any | None:
        return None if self.config is None else planner.as_hybrid(self.config).pattern.with_fused(False)

    @cached_property
    def own(self) -> frozenset[int]:
        """The layers that keep a recurrent layer of the base."""
        if self.pattern is None:
            return frozenset()
        return frozenset(planner.as_hybrid(self.config).recurrent_layers) - set(self.pattern.replaced)

    @cached_property
    def title(self) -> str:
        if self.config is None or is_fused(self.config) or not getattr(self.config, "pattern", None):
            return self.evidence.run.resolve().name
        return Card(self.evidence, self.gpu).title

    @cached_property
    def logs(self) -> list[records.Log]:
        return records.logs(self.evidence.run)

    @cached_property
    def selection(self) -> dict[str, Any] | None:
        return None if self.pattern is None else records.selection(self.evidence.run, len(self.pattern))

    @cached_property
    def retention(self) -> Retention:
        return Retention(self.evidence, self.title)

    @cached_property
    def errors(self) -> tuple[str, dict[int, float]]:
        """(log file, last relative squared error by layer) from the last log that has layer errors."""
        for log in reversed(self.logs):
            if layers := curves(log.entries)[1]:
                return log.file.name, {layer: values[-1] for layer, (_, values) in layers.items()}
        return "", {}

    def kind(self, symbol: str) -> str:
        """The display name of a layer type."""
        if symbol == ATTENTION:
            return "Attention"
        return reference(LAYER_KINDS[symbol])[0] if symbol in LAYER_KINDS else symbol

    # ---- sections

    def glance(self) -> Iterator[Block]:
        rows: list[list[Cell]] = []
        if self.pattern is not None:
            replaced, layers = len(self.pattern.replaced), len(self.pattern)
            types = ", ".join(dict.fromkeys(self.kind(self.pattern.symbols[index]) for index in self.pattern.replaced))
            attention = len(planner.as_hybrid(self.config).attention_layers)
            before = f"all {layers} are Attention"
            if attention < layers:
                before = f"{attention} of {layers} are Attention, {layers - attention} are recurrent"
            mixed = f"{replaced} of {layers} are {types}" if replaced else "as in the base"
            rows.append([Cell("Layers"), Cell(before), Cell(mixed, "#layers")])
        head, comparison = self.retention.glance()
        if comparison:
            yield Table("The model and its teacher", ["", *head], [*rows, *comparison])
        else:
            yield Note(f"Scores: {MISSING}.")
        yield Note(f"Base: {self.evidence.base_name}.")

    def pipeline(self) -> Iterator[Block]:
        """The steps of the run with their times."""
        run, stages = self.evidence.run, self.evidence.stages
        times = records.times(run)
        rows: list[list[Cell]] = []

        def add(step: str, what: str, seconds: float | None, file: str) -> None:
            time = Cell(MISSING) if seconds is None else Cell(_duration(seconds), quote(file))
            rows.append([Cell(step), Cell(what), time])

        for stage, after in zip(stages, stages[1:], strict=False):
            folder = Path(after.model).parent if isinstance(after, FinetuneRecipe) else None
            rows.append([Cell(_stage(stage)), Cell(f"in the run folder {folder}"), Cell("see its report")])
        last = stages[-1] if stages else None
        if self.selection is not None:
            seconds = self.selection.get("seconds")
            add("Selection of layers", f"by {self.selection.get('method', NOT_STATED)}", seconds, records.SELECTION)
        if isinstance(last, PrimeRecipe):
            add(
                "Stage 0",
                f"mixers start from the attention of {self.evidence.base_name}",
                times.get("stage0"),
                records.TIMES,
            )
        for log in self.logs:
            title = _stage(last) if last is not None and log.file.name != "training.log.json" else log.title
            add(title, f"{log.steps:,} optimiser steps", log.seconds, log.file.name)
        if not self.logs:
            rows.append([Cell("Training"), Cell("the run folder has no log"), Cell(MISSING)])
        if isinstance(last, PrimeRecipe):
            add("Export", "the Hybrid without its teacher", times.get("export"), records.TIMES)
        for name in (name for models in self.retention.suites.values() for name in models.values()):
            scores = self.evidence.scores[name]
            prompts = sum(task.n for task in scores.tasks.values())
            what = f"{name}: {counted(len(scores.tasks), 'task')}, {counted(prompts, 'prompt')}"
            add("Evaluation", what, getattr(scores, "seconds", None), f"scores.{name}.json")
        yield Table("Steps of the run", ["step", "what", "time"], rows, text_columns=2)
        yield Note(
            "The time of a training is that of the last process only; a resumed run took longer. Each time links to "
            "its file."
        )

    def training(self) -> Iterator[Block]:
        if not self.logs:
            yield Note(f"Loss and errors: {MISSING}; the run folder has no log.")
        for log in self.logs:
            yield from self._log(log)

    def _log(self, log: records.Log) -> Iterator[Block]:
        losses, layers, preferences = curves(log.entries)
        changes, key, source = objective_changes(log.entries), log.file.name.partition(".")[0], log.file.name
        if len(self.logs) > 1:
            yield Text(log.title)
        if losses:
            notes = ["Losses before and after a dashed line cannot be compared."] if changes else []
            marks = {float(step): f"from here on the loss is the sum of {terms}" for step, terms in changes.items()}
            loss_series = [
                charts.Series(_loss(name), *broken(curve, changes), colour=1 + number, dash=number)
                for number, (name, curve) in enumerate(losses.items())
            ]
            positive = all(value > 0 for _, values in losses.values() for value in values)
            yield charts.lines(
                f"{key}-loss",
                "Loss",
                loss_series,
                "step",
                "loss",
                source=source,
                log_y=positive,
                marks=marks,
                notes=notes,
            )
        if layers:
            ends = min(layers), max(layers)
            shades = [
                charts.Series(f"layer {layer}", *curve, shade=(layer - ends[0]) / max(1, ends[1] - ends[0]))
                for layer, curve in layers.items()
            ]
            yield charts.lines(
                f"{key}-layers",
                "Distance of each layer from the teacher",
                shades,
                "step",
                "relative squared error",
                source=source,
                log_y=all(value > 0 for _, values in layers.values() for value in values),
                legend=lambda one: one in (shades[0], shades[-1]),
                notes=["The error of each layer's output. The colour changes evenly from the first to the last layer."],
            )
        for name in log.names:
            if name not in losses and not name.startswith("error_layer_"):
                words = name.replace("_", " ").replace("grad norm", "gradient norm")
                one = charts.Series(words, *log.curve(name), colour=3 if name in preferences else 0)
                yield charts.lines(
                    f"{key}-{charts.safe(name)}", words.capitalize(), [one], "step", words, source=source
                )

    def layers(self) -> Iterator[Block]:
        if self.pattern is None:
            yield Note("The run folder has no checkpoint yet, so the layers are unknown.")
            return
        symbols, (log, errors) = self.pattern.symbols, self.errors
        selection_record = self.selection or {}
        scores, resamples = selection_record.get("scores"), (selection_record.get("stability") or {}).get("kept")
        yield Text(
            str(self.pattern),
            kind="layers",
            items=[
                (str(index), "R", True, "Recurrent layer of the base")
                if index in self.own
                else (str(index), "A" if symbol == ATTENTION else symbol, symbol == ATTENTION, self.kind(symbol))
                for index, symbol in enumerate(symbols)
            ],
        )
        prime = next((stage for stage in self.evidence.stages if isinstance(stage, PrimeRecipe)), None)
        if prime is not None:
            chosen = yaml.safe_dump(
                prime.hybrid.model_dump(mode="json", exclude_unset=True), default_flow_style=True, width=1000
            ).strip()
            yield Note(f"The recipe's choice: hybrid: {chosen}", RECIPE)
        else:
            yield Note(f"The choice of layers is {NOT_STATED}: the run folder has no recipe of hmf prime.")
        if scores:
            yield charts.bars(
                "selection",
                "Scores that chose the layers",
                [str(index) for index in range(len(symbols))],
                scores,
                ["attention" if symbol == ATTENTION else "replaced" for symbol in symbols],
                "layer",
                "score",
                source=records.SELECTION,
                notes=[
                    f"Method: {selection_record.get('method', NOT_STATED)}. A larger score means that attention is "
                    "needed more."
                ],
            )
        if errors:
            yield charts.bars(
                "errors",
                "Last distance from the teacher",
                [str(index) for index in errors],
                list(errors.values()),
                [
                    "recurrent" if i in self.own else "attention" if symbols[i] == ATTENTION else "replaced"
                    for i in errors
                ],
                "layer",
                "relative squared error",
                source=log,
                notes=["The error of each layer's output at the last log entry. Errors accumulate over layers."],
            )
        head = ["layer", "type"] + ["score"] * bool(scores) + ["kept in resamples"] * bool(resamples)
        rows = []
        for index, symbol in enumerate(symbols):
            row = [Cell(str(index)), Cell(self.kind(symbol))]
            if scores:
                row.append(Cell(f"{scores[index]:.4g}", records.SELECTION))
            if resamples:
                row.append(Cell(f"{resamples[index]:.0%}", records.SELECTION))
            if errors:
                value = f"{errors[index]:.4g}" if index in errors else MISSING
                row.append(Cell(value, quote(log) if index in errors else ""))
            rows.append(row)
        yield Table("Each layer", [*head, *["last error"] * bool(errors)], rows, text_columns=2, folded=True)

    def provenance(self) -> Iterator[Block]:
        evidence = self.evidence
        files = [
            [Cell(one["name"], quote(one["name"])), Cell(one["bytes"]), Cell(one["sha256"])]
            for one in records.described(evidence.run)
        ]
        yield Table("Files of the run folder that this page uses", ["file", "bytes", "SHA-256"], files, code=True)
        rows = []
        for stage in evidence.stages:
            if not isinstance(stage, DistillRecipe):
                rows.append([Cell(f"{_stage(stage)}, recipe"), Cell(str(stage.seed)), Cell(NOT_STATED)])
        for name, scores in evidence.scores.items():
            settings, versions = (getattr(scores, key, None) for key in ("settings", "versions"))
            seed = settings.get("seed") if isinstance(settings, dict) else None
            shown = ", ".join(f"{key} {value}" for key, value in versions.items()) if isinstance(versions, dict) else ""
            cells = [Cell(NOT_STATED if seed is None else str(seed)), Cell(shown or NOT_STATED)]
            rows.append([Cell(f"scores.{name}.json", f"scores.{quote(name)}.json"), *cells])
        for name, serving in evidence.serving.items():
            versions = getattr(serving, "versions", None) or {}
            shown = ", ".join(f"{key} {value}" for key, value in versions.items()) or NOT_STATED
            rows.append([Cell(name, quote(name)), Cell("none: random data"), Cell(shown)])
        yield Table("Seeds and versions", ["of", "seed", "versions"], rows, text_columns=3)
        for name, scores in evidence.scores.items():
            yield Text(
                records.shown_json(scores.model_dump(mode="json")), kind="code", title=f"All of scores.{name}.json"
            )
        recipe = evidence.run / RECIPE
        if recipe.is_file():
            yield Text(records.read(recipe), kind="code", title="The recipe, recipe.yaml", opened=True)
        else:
            yield Note(f"The recipe is {NOT_STATED}: the run folder has no recipe.yaml.")


def _stage(stage: Stage) -> str:
    return f"Stage 2, {stage.method}" if isinstance(stage, FinetuneRecipe) else "Stage 1, distillation"


def _loss(name: str) -> str:
    return "total" if name == "loss" else name.removeprefix("loss_").replace("_", " ")


def _duration(seconds: float) -> str:
    """For example 8.1 s, 2 min 27 s or 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
