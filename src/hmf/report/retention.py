# SPDX-License-Identifier: Apache-2.0
"""The report's comparison of a Hybrid with its teacher: by task, by length, by position, and prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

from hmf.evaluation.results import ANSWERS, Answered, Scores

from . import charts, records
from .blocks import Answer, Block, Cell, Note, Samples, Table, Text
from .evidence import PRIMED, STAGE0, TEACHER, Evidence
from .suites import MISSING

COLOURS = {TEACHER: 0, PRIMED: 1, STAGE0: 2}
SHOWN = 2  # number of samples shown for a task
NOT_KEPT = "Answers to single prompts: not measured; the run folder has no files evaluation/NAME/TASK.jsonl."


@dataclass(frozen=True)
class Retention:
    """The comparison of the models of a run folder. title: the title of the primed model."""

    evidence: Evidence
    title: str

    @cached_property
    def suites(self) -> dict[str, dict[str, str]]:
        """NAME of scores.NAME.json, by suite and model."""
        return records.suites(self.evidence.scores)

    def scores(self, name: str) -> Scores:
        return self.evidence.scores[name]

    def called(self, model: str) -> str:
        """The display name of a model."""
        names = {TEACHER: "teacher", PRIMED: "this model", STAGE0: "Stage 0, not trained"}
        return names.get(model, model)

    def glance(self) -> tuple[list[str], list[list[Cell]]]:
        """(names of two models, a row of their figures for each measure), from the first suite that has both."""
        models = next((suite for suite in self.suites.values() if TEACHER in suite and PRIMED in suite), None)
        if models is None:
            return [], []
        names = [models[TEACHER], models[PRIMED]]
        both = [self.scores(name) for name in names]
        rows: list[list[Cell]] = []

        def add(measure: str, values: list[str | None]) -> None:
            cells = [
                Cell(MISSING) if value is None else Cell(value, _file(name))
                for value, name in zip(values, names, strict=True)
            ]
            rows.append([Cell(measure), *cells])

        add("Perplexity of held-out text", [f"{one.text.perplexity:.2f}" if one.text else None for one in both])
        for key in dict.fromkeys(key for one in both for key in one.tasks):
            tasks = [one.tasks.get(key) for one in both]
            shown = [None if task is None else f"{_percent(task.accuracy)} ({_span(task)})" for task in tasks]
            add(f"{key}, correct answers", shown)
        footprints = [getattr(one, "footprint", None) for one in both]
        for field, measure in (
            ("parameters", "Parameters"),
            ("kv_bytes_per_token", "KV cache, bytes per token"),
            ("state_bytes", "States, bytes per sequence"),
        ):
            if all(isinstance(one, dict) and isinstance(one.get(field), int) for one in footprints):
                add(measure, [f"{one[field]:,}" for one in footprints if one])
        return ["teacher", "this model"], rows

    def blocks(self) -> Iterator[Block]:
        if not self.suites:
            yield Note(f"Scores: {MISSING}; the run folder has no scores.NAME.json.")
        for suite, models in self.suites.items():
            yield Text(f"Suite {suite}" if suite else "Evaluation of hmf prime")
            keys = list(dict.fromkeys(key for name in models.values() for key in self.scores(name).tasks))
            where = f", suite {suite}" if suite else ""
            yield from self._text(models, where)
            if keys:
                yield from self._charts(suite or "prime", models, keys)
                yield self._table(models, keys, where)
                yield from self._pairs(models, keys, where)
            else:
                yield Note(f"Tasks: {MISSING}.")
            if TEACHER not in models:
                yield Note(f"The teacher in this evaluation: {MISSING}.")

    def _text(self, models: dict[str, str], where: str) -> Iterator[Block]:
        rows = []
        for model, name in models.items():
            if (text := self.scores(name).text) is not None:
                bits = getattr(text, "bits_per_byte", None)
                shown = MISSING if bits is None else f"{bits:.3f}"
                rows.append(
                    [
                        Cell(self.called(model)),
                        Cell(f"{text.perplexity:.2f}", _file(name)),
                        Cell(shown),
                        Cell(f"{text.tokens:,}"),
                    ]
                )
        if rows:
            head = ["model", "perplexity", "bits a byte", "tokens scored"]
            yield Table(f"Perplexity of held-out text{where}; lower is better", head, rows)
        series, files = [], []
        for number, (model, name) in enumerate(models.items()):
            if positions := self.scores(name).positions:
                x, y = [(p.start + p.end) / 2 for p in positions], [p.perplexity for p in positions]
                series.append(
                    charts.Series(self.called(model), x, y, colour=COLOURS.get(model, 3 + number), dash=number)
                )
                files.append(f"scores.{name}.json")
        if series:
            yield charts.lines(
                f"position-{charts.safe('-'.join(models.values()))}",
                "Perplexity by position",
                series,
                "tokens before",
                "perplexity",
                source=", ".join(files),
                x_shown=charts.tokens,
            )

    def _charts(self, suite: str, models: dict[str, str], keys: list[str]) -> Iterator[Block]:
        """One chart of all tasks with a single length, and a chart over length for each task with several lengths."""
        lengths: dict[str, dict[int, str]] = {}
        for key in keys:
            result = next(scores.tasks[key] for name in models.values() if key in (scores := self.scores(name)).tasks)
            if (length := records.length_of(key, result)) is not None:
                lengths.setdefault(self._task(key), {})[length] = key
        curves = {task: by_length for task, by_length in lengths.items() if len(by_length) > 1}
        single = [key for key in keys if self._task(key) not in curves]
        source = ", ".join(f"scores.{name}.json" for name in models.values())
        notes = ["Points: share of exact answers. Bars: 95% intervals. Truncated answers count as wrong."]
        if single:
            rows = [
                [key, self.called(model), _percent(task.accuracy), _span(task)]
                for key in single
                for model, name in models.items()
                if (task := self.scores(name).tasks.get(key)) is not None
            ]
            series = [self._series(models, model, single) for model in models]
            yield charts.intervals(
                f"tasks-{charts.safe(suite)}",
                "Correct answers by task",
                single,
                series,
                "correct answers, %",
                source=source,
                head=["task", "model", "correct", "95% interval"],
                rows=rows,
                notes=notes,
            )
        for name, keys_by_length in curves.items():
            ordered = dict(sorted(keys_by_length.items()))
            series = []
            for model in models:
                one = self._series(models, model, list(ordered.values()))
                x = [list(ordered)[int(place)] for place in one.x]
                series.append(charts.Series(one.name, x, one.y, one.low, one.high, one.colour, one.dash))
            yield charts.lines(
                f"lengths-{charts.safe(suite)}-{charts.safe(name)}",
                f"{name} by length",
                series,
                "tokens of context",
                "correct answers, %",
                source=source,
                log_x=True,
                x_ticks=list(ordered),
                bounds=(-5, 105),
                notes=notes,
                x_shown=charts.tokens,
            )

    def _series(self, models: dict[str, str], model: str, keys: list[str]) -> charts.Series:
        """A model's percentages. The `x` of the series are indices into `keys`."""
        tasks = self.scores(models[model]).tasks
        places = [place for place, key in enumerate(keys) if key in tasks]
        results = [tasks[keys[place]] for place in places]
        number = COLOURS.get(model, 3 + list(models).index(model))
        low, high = ([100 * one.interval[side] for one in results] for side in (0, 1))
        values = [100 * one.accuracy for one in results]
        return charts.Series(self.called(model), places, values, low, high, number, number)

    def _table(self, models: dict[str, str], keys: list[str], where: str) -> Table:
        rows = []
        teacher = self.scores(models[TEACHER]).tasks if TEACHER in models else {}
        for key in keys:
            for model, name in models.items():
                scores = self.scores(name)
                task = scores.tasks.get(key)
                if task is None:
                    rows.append([Cell(key), Cell(self.called(model)), Cell(MISSING), *[Cell("")] * 5])
                    continue
                length = records.length_of(key, task) or scores.length
                cut = MISSING if task.truncated is None else f"{round(task.truncated * task.n):,}"
                change = 100 * (task.accuracy - teacher[key].accuracy) if key in teacher and model != TEACHER else None
                rows.append(
                    [
                        Cell(key),
                        Cell(self.called(model)),
                        Cell(_percent(task.accuracy), _file(name)),
                        Cell(_span(task)),
                        Cell("" if change is None else f"{change:+.1f}"),
                        Cell(f"{task.n:,}"),
                        Cell(cut),
                        Cell(f"{length:,}" if length else ""),
                    ]
                )
        head = [
            "task",
            "model",
            "correct",
            "95% interval",
            "points above teacher",
            "prompts",
            "cut off",
            "tokens at most",
        ]
        return Table(f"Every score, with its interval and its file{where}", head, rows, text_columns=2)

    def _pairs(self, models: dict[str, str], keys: list[str], where: str) -> Iterator[Block]:
        """Tables that compare teacher and model on the same prompts."""
        rows = []
        for key in keys:
            if pair := self._paired(models, key):
                right = [(first.correct, second.correct) for first, second in pair]
                counts = [right.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))]
                rows.append([Cell(key), *(Cell(f"{count:,}") for count in counts)])
        if rows:
            head = ["task", "both", "only the teacher", "only this model", "neither"]
            yield Table(f"The same prompts{where}, answered correctly by", head, rows)

    def _answers(self, name: str, key: str) -> dict[int, Answered]:
        """The answers behind a task of scores.`name`.json, by index of the prompt; empty if they were not stored."""
        return {one.index: one for one in self.evidence.answers.get(name, {}).get(key, ())}

    def _paired(self, models: dict[str, str], key: str) -> list[tuple[Answered, Answered]]:
        """The answers of teacher and primed model to the same prompts."""
        if TEACHER not in models or PRIMED not in models:
            return []
        first, second = (self._answers(models[model], key) for model in (TEACHER, PRIMED))
        return [
            (first[index], second[index])
            for index in sorted(first.keys() & second.keys())
            if (first[index].prompt_sha256, first[index].expected)
            == (second[index].prompt_sha256, second[index].expected)
        ]

    def samples(self) -> Iterator[Block]:
        """For each task, the first prompts on which the models differ, followed by other prompts."""
        all_samples = [sample for models in self.suites.values() for sample in self._samples_of(models)]
        if all_samples:
            yield Note("For each task, prompts on which teacher and model differ come first.")
        else:
            yield Note(NOT_KEPT)
        yield from all_samples

    def _samples_of(self, models: dict[str, str]) -> Iterator[Samples]:
        remaining: dict[str, int] = {}
        for key in dict.fromkeys(key for name in models.values() for key in self.scores(name).tasks):
            chosen = [model for model in (TEACHER, PRIMED) if model in models] or list(models)[:1]
            answers_by_model = {model: self._answers(models[model], key) for model in chosen}
            answers_by_model = {model: answers for model, answers in answers_by_model.items() if answers}
            if TEACHER in answers_by_model and PRIMED in answers_by_model:
                pairs = self._paired(models, key)
                pairs.sort(key=lambda pair: pair[0].correct == pair[1].correct)
                indices = [pair[0].index for pair in pairs]
            else:
                indices = sorted(next(iter(answers_by_model.values()), {}))
            for index in indices[: remaining.setdefault(self._task(key), SHOWN)]:
                remaining[self._task(key)] -= 1
                yield self._sample(
                    models, key, index, {model: answers[index] for model, answers in answers_by_model.items()}
                )

    def _sample(self, models: dict[str, str], key: str, index: int, answers: dict[str, Answered]) -> Samples:
        first = next(iter(answers.values()))
        return Samples(
            f"{key}, prompt {index}",
            first.prompt,
            first.expected,
            [
                Answer(
                    self.called(model),
                    one.answer,
                    "correct" if one.correct else "cut off, counts as wrong" if one.truncated else "wrong",
                    quote(f"{ANSWERS}/{models[model]}/{key}.jsonl"),
                )
                for model, one in answers.items()
            ],
        )

    def _task(self, key: str) -> str:
        return key.partition("@")[0]


def _file(name: str) -> str:
    return f"scores.{quote(name)}.json"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _span(task: Any) -> str:
    low, high = task.interval
    return f"{100 * low:.1f}–{100 * high:.1f}%"
