# SPDX-License-Identifier: Apache-2.0
"""Further files of a run folder that the report shows: logs, times and the selection of layers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmf.config.strict import parse_json, parse_sealed
from hmf.errors import HmfError
from hmf.evaluation.results import ANSWERS, Scores, TaskResult
from hmf.folders import reason
from hmf.selection.run import SELECTION

from .evidence import MODEL, PRIMED, STAGE0, TEACHER

TIMES = "times.json"
LOGS = {"training.log.json": "Pretraining", "stage1.log.json": "Stage 1, distillation", "stage2.log.json": "Stage 2"}
SUMMARY = ("train_", "total_flos")  # prefixes of the keys in the Trainer's final summary


def read(file: Path) -> str:
    """The text of a file. Raises HmfError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise HmfError(f"{file}: cannot be read: {why}") from None


def read_json(file: Path) -> Any:
    """The JSON content of a file. Raises HmfError if it is damaged or was changed."""
    try:
        content = parse_json(read(file))
        return parse_sealed(read(file), required=False) if isinstance(content, dict) else content
    except ValueError as error:
        raise HmfError(f"{file}: {error}; remove it and write it again") from None


@dataclass(frozen=True)
class Log:
    """The log of a training run: entries of named numbers, each with its step."""

    file: Path
    title: str
    entries: list[dict[str, Any]]

    @property
    def steps(self) -> int:
        return max((entry["step"] for entry in self.entries), default=0)

    @property
    def seconds(self) -> float | None:
        """The duration of the process that finished the training; None if it is unfinished."""
        return next((entry["train_runtime"] for entry in reversed(self.entries) if "train_runtime" in entry), None)

    @property
    def names(self) -> list[str]:
        """The names of the numbers that are logged over the steps, without those of the final summary."""
        series = dict.fromkeys(name for entry in self.entries for name in entry)
        return [name for name in series if name not in ("step", "epoch") and not name.startswith(SUMMARY)]

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        chosen = [entry for entry in self.entries if name in entry]
        return [entry["step"] for entry in chosen], [entry[name] for entry in chosen]


def logs(run: Path) -> list[Log]:
    """The logs in a run folder, in the order of the stages. Raises HmfError for a file that is not a log."""
    order = list(LOGS)
    files = sorted(run.glob("*.log.json"), key=lambda file: (file.name not in order, file.name))
    return [Log(file, LOGS.get(file.name, file.name), _entries(file)) for file in files]


def _entries(file: Path) -> list[dict[str, Any]]:
    """The entries with their finite numbers only, because charts cannot show other values."""
    content = read_json(file)
    if not isinstance(content, list) or not all(isinstance(one, dict) and _number(one.get("step")) for one in content):
        raise HmfError(f"{file}: is not a training log, which is a list of entries with a step; remove it")
    return [{name: value for name, value in one.items() if _number(value)} for one in content]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def times(run: Path) -> dict[str, float]:
    """Seconds of the steps of `hmf prime` by name; empty if they were not stored."""
    file = run / TIMES
    content = read_json(file) if file.is_file() else {}
    if not isinstance(content, dict) or not all(_number(value) for value in content.values()):
        raise HmfError(f"{file}: has no seconds by step; remove it")
    return content


def selection(run: Path, layers: int) -> dict[str, Any] | None:
    """The content of selection.json; None if there is no such file.

    Raises HmfError if it has `scores` that are not one number per layer.
    """
    file = run / SELECTION
    if not file.is_file():
        return None
    content = read_json(file)
    scores = content.get("scores") if isinstance(content, dict) else []
    if scores is not None and not (isinstance(scores, list) and len(scores) == layers and all(map(_number, scores))):
        raise HmfError(f"{file}: scores: are not one number for each of {layers} layers; remove it")
    return content


def suites(scores: Mapping[str, Scores]) -> dict[str, dict[str, str]]:
    """NAME of scores.NAME.json by suite ("" for the tasks of `hmf prime`) and by model. The teacher comes first.

    The final model of any run has the key `PRIMED`, even if `hmf prime` did not make it.
    """
    files: dict[str, dict[str, str]] = {}
    for name, content in scores.items():
        model = name.removesuffix(f"-{content.suite}") if content.suite else name
        files.setdefault(content.suite or "", {})[PRIMED if model == MODEL else model] = name
    first = {TEACHER: 0, PRIMED: 1, STAGE0: 3}
    return {
        suite: dict(sorted(models.items(), key=lambda pair: (first.get(pair[0], 2), pair[0])))
        for suite, models in sorted(files.items())
    }


def length_of(key: str, result: TaskResult) -> int | None:
    """Tokens of a task's prompts, from the result or from its key, such as needle@4096."""
    after = key.partition("@")[2]
    return result.length if result.length is not None else int(after) if after.isdecimal() else None


def described(run: Path) -> Iterator[dict[str, str]]:
    """The files of the run folder that the report uses, with size and hash."""
    patterns = ("recipe.yaml", "*.log.json", "*.json", f"{ANSWERS}/*/*.jsonl", "model/config.json", "model/README.md")
    for file in sorted({file for pattern in patterns for file in run.glob(pattern) if file.is_file()}):
        content = file.read_bytes()
        yield {
            "name": file.relative_to(run).as_posix(),
            "bytes": f"{len(content):,}",
            "sha256": hashlib.sha256(content).hexdigest(),
        }


def shown_json(value: Any) -> str:
    """A value of a results file as readable text."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)
