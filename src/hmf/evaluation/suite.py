# SPDX-License-Identifier: Apache-2.0
"""Suites of generated tasks: the choice of prompts, resuming an interrupted evaluation, and the results files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from hmf.config.strict import parse_sealed, seal_json
from hmf.data.progress import Progress
from hmf.errors import HmfError, notice
from hmf.evaluation.positions import PERPLEXITY, WINDOWS, by_position, nats_by_range, window
from hmf.evaluation.prompts import Answer, Prompt, Prompter
from hmf.evaluation.results import ANSWERS, Answered, excerpt, read_answers, summary
from hmf.evaluation.retention import TASKS, Task
from hmf.evaluation.server import NotOffered
from hmf.folders import HOLDER, locked
from hmf.training.checkpoints import replace_text

SUITES: dict[str, tuple[str, ...]] = {"retention": (*TASKS, PERPLEXITY)}
SETTINGS, WINDOWS_FILE = "settings.json", "perplexity@{length}.json"
FREE = ("batch", "concurrency")  # settings that may change when an evaluation is resumed


class Engine(Protocol):
    """A model that answers: `hmf.evaluation.local.Local`, or `hmf.evaluation.server.Server`."""

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Answer, float | None]]: ...

    def token_log_probabilities(self, ids: Sequence[int]) -> list[float]: ...


@dataclass(frozen=True)
class Plan:
    """The work of an evaluation: `samples` prompts of each task; a task with a length runs at each of `lengths`."""

    suite: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    seed: int

    def parts(self) -> list[tuple[Task, int | None]]:
        chosen = [TASKS[name] for name in self.tasks if name != PERPLEXITY]
        return [(task, length) for task in chosen for length in (self.lengths if task.long else (None,))]


@dataclass
class Store:
    """The results of one model: scores.`name`.json in `folder`, and a folder of answers.

    Attributes:
        folder: None keeps the results in memory only.
        about: suite, settings, versions and model. Stored answers are reused only if these are equal.
    """

    folder: Path | None
    name: str
    about: dict[str, Any]
    scores: dict[str, Any] = field(default_factory=dict)
    answered: dict[str, list[Answered]] = field(default_factory=dict)

    @property
    def file(self) -> Path | None:
        return self.folder / f"scores.{self.name}.json" if self.folder else None

    @property
    def home(self) -> Path | None:
        return self.folder / ANSWERS / self.name if self.folder else None

    @contextmanager
    def open(self, restart: bool) -> Iterator[None]:
        """Lock the folder of the answers during the block.

        Raises HmfError if the folder has answers that were made with other settings. `restart` removes them instead.
        """
        if self.home is None or self.file is None:
            yield
            return
        with locked(self.home):
            if (self.home / SETTINGS).is_file():
                self._resume(self.home / SETTINGS, restart)
            replace_text(self.home / SETTINGS, seal_json(self.about))
            with suppress(FileNotFoundError, ValueError):
                self.scores = parse_sealed(self.file.read_text(encoding="utf-8"))
            try:
                yield
            finally:  # without results, the settings hold for nothing, and other ones may follow
                if not self.file.is_file() and {item.name for item in self.home.iterdir()} <= {SETTINGS, HOLDER}:
                    (self.home / SETTINGS).unlink()

    def _resume(self, file: Path, restart: bool) -> None:
        assert self.file is not None
        try:
            before = parse_sealed(file.read_text(encoding="utf-8"))
        except ValueError as error:
            if not restart:
                raise HmfError(f"{file}: {error}; give --restart to start again") from None
            before = {}
        changed = _changes(before, json.loads(json.dumps(self.about)))
        if changed and not restart:
            raise HmfError(
                f"{file.parent}: has answers that were made with other settings ({'; '.join(changed)}); give --restart "
                "to remove them and start again, or another --name or --out to keep them"
            )
        if restart:
            notice(f"{file.parent}: removed the answers; the evaluation starts again")
            for item in file.parent.iterdir():
                if item.suffix in (".jsonl", ".json"):
                    item.unlink()
            self.file.unlink(missing_ok=True)

    def before(self, key: str, prompts: Sequence[Prompt]) -> list[Answered]:
        """The answers of an earlier command to these prompts."""
        if self.home is None or not (file := self.home / f"{key}.jsonl").is_file():
            return []
        hashes = {prompt.index: prompt.sha256 for prompt in prompts}
        answers = read_answers(file)
        if other := [one.index for one in answers if hashes.get(one.index, one.prompt_sha256) != one.prompt_sha256]:
            raise HmfError(f"{file}: answer {other[0]} belongs to a different prompt; give --restart to start again")
        # Remove the incomplete line of an interrupted command, because new lines are appended.
        lines = "".join(f"{one.model_dump_json()}\n" for one in answers)
        if lines != file.read_text(encoding="utf-8"):
            replace_text(file, lines)
        return [one for one in answers if one.index in hashes]

    def add(self, key: str, one: Answered) -> None:
        if self.home is not None:
            with (self.home / f"{key}.jsonl").open("a", encoding="utf-8") as out:
                out.write(f"{one.model_dump_json()}\n")

    def save(self, **results: Any) -> None:
        """Add results to the file of scores; existing results stay."""
        merged = {**self.about, "tasks": {}, **self.scores}
        for key, value in results.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = {**merged[key], **value} if both else value
        for key in merged["tasks"].keys() & merged.get("not_measured", {}).keys():
            del merged["not_measured"][key]
        self.scores = merged
        if self.file is not None:
            replace_text(self.file, seal_json(merged))


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    changes = []
    for section in (now.keys() | before.keys()) - set(FREE):
        old, new = before.get(section), now.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _changes(old, new)
        elif old != new:
            changes.append(f"{section} was {old}, is now {new}")
    return sorted(changes)


def run(plan: Plan, prompter: Prompter, engine: Engine, store: Store) -> None:
    """Answer the prompts that have no answer yet, and save the scores after each task."""
    for task, length in plan.parts():
        key = task.name if length is None else f"{task.name}@{length}"
        title = f"{store.name}: {key}"
        prompts = list(prompter.prompts(task, length, plan.samples))
        done = {one.index: one for one in store.before(key, prompts)}
        progress = Progress(title, len(prompts), unit=" answers")
        progress.skip(len(done))
        for prompt, answer, likelihood in engine.answers([one for one in prompts if one.index not in done]):
            one = Answered(
                index=prompt.index,
                prompt_sha256=prompt.sha256,
                expected=prompt.problem.answer,
                answer=answer.text,
                correct=prompt.is_correct(answer),
                truncated=answer.truncated,
                tokens=answer.tokens,
                likelihood=likelihood,
                prompt=excerpt(prompt.text),
            )
            store.add(key, one)
            done[one.index] = one
            progress.add(1, answer.tokens)
        progress.close()
        store.answered[key] = [done[index] for index in sorted(done)]
        store.save(tasks={key: summary(store.answered[key], task.name, length)})
    if PERPLEXITY in plan.tasks:
        _perplexity(plan, prompter.tokenizer, engine, store)


def _perplexity(plan: Plan, tokenizer: PreTrainedTokenizerBase, engine: Engine, store: Store) -> None:
    length = max(plan.lengths)
    count = min(WINDOWS, plan.samples)
    file = store.home / WINDOWS_FILE.format(length=length) if store.home else None
    windows: list[Any] = []
    if file is not None:
        with suppress(FileNotFoundError, ValueError):
            windows = parse_sealed(file.read_text(encoding="utf-8"))["windows"][:count]
    title = f"{store.name}: {PERPLEXITY}@{length}"
    progress = Progress(title, count, unit=" texts")
    progress.skip(len(windows))
    for index in range(len(windows), count):
        try:
            windows.append(nats_by_range(engine, window(tokenizer, plan.seed, index, length)))
        except NotOffered as error:
            progress.close()
            notice(f"{PERPLEXITY}: not measured: {error}")
            store.save(not_measured={PERPLEXITY: str(error)})
            return
        if file is not None:
            replace_text(file, seal_json({"windows": windows}))
        progress.add(1, length)
    progress.close()
    store.save(positions=by_position(windows, title))
