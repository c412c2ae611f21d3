# SPDX-License-Identifier: Apache-2.0
"""Converts results files of lm-eval and of NeMo Evaluator to `scores.NAME-SUITE.json`.

Three formats are supported: lm-eval's results*.json, NeMo Evaluator's results.yml for tasks of NeMo-Skills, and
NeMo-Skills' metrics.json. A metric that is known to be a share becomes a row of `tasks`. All others are kept under
`measures`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hmf.config.strict import parse_json, parse_sealed, parse_yaml, seal_json
from hmf.errors import HmfError, listed, notice
from hmf.evaluation.results import Z95, Scores, Share, wilson
from hmf.folders import reason

from . import nemo

# Metrics of lm-eval that are means over prompts of values from 0 to 1. Other metrics may be percentages, or not shares.
SHARES = {
    "acc",
    "acc_norm",
    "acc_bytes",
    "acc_mutual_info",
    "exact_match",
    "math_verify",
    "pass@1",
    "pass_at_1",
    "prompt_level_strict_acc",
    "prompt_level_loose_acc",
    "inst_level_strict_acc",
    "inst_level_loose_acc",
}
# The (metric, filter) that tables show, for tasks where it is not the first one listed.
HEADLINES = {
    **dict.fromkeys(("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa"), ("acc_norm", "none")),
    **dict.fromkeys(("gsm8k", "gsm8k_cot", "gsm8k_cot_zeroshot"), ("exact_match", "flexible-extract")),
    "gpqa_diamond_cot_zeroshot": ("exact_match", "flexible-extract"),
    "minerva_math500": ("math_verify", "none"),
}
ABSENT = -1  # value of tasks with a metric for each length, at a length that was not requested
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class _Samples(_Part):
    effective: Annotated[int, Field(ge=1)]


class _LmEval(_Part):
    """The keys that are read from a file of lm-eval."""

    results: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    samples: dict[str, _Samples] = Field(alias="n-samples")
    configs: dict[str, dict[str, Any]]
    config: dict[str, Any]
    lm_eval_version: str
    transformers_version: str | None = None
    versions: dict[str, Any] = {}
    shots: dict[str, Any] = Field({}, alias="n-shot")
    higher_is_better: dict[str, dict[str, Any]] = {}
    group_subtasks: dict[str, list[str]] = {}
    truncated: dict[str, Share] = {}  # added by hmf, since lm-eval does not count truncated answers
    hmf: dict[str, Any] = {}  # how hmf called lm-eval


@dataclass
class Reading:
    """The content of a results file: rows of `tasks`, other `measures`, and how they were obtained."""

    harness: str
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def read_results(file: Path) -> Reading:
    """The scores in a results file. Raises HmfError with the file, the key and the fix."""
    content = _parse(file, _bytes(file))
    if nemo.is_nemo(content):
        tasks, measures, settings, versions = nemo.read(file, content)
        return Reading("nemo", tasks, measures, settings, versions)
    if "results" not in content:
        raise HmfError(
            f"{file}: has no key results; give results*.json of lm-eval, results.yml of NeMo Evaluator, or "
            "metrics.json of NeMo-Skills"
        )
    try:
        return _lm_eval(file, _LmEval.model_validate(content))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise HmfError(f"{file}: {where}: {problem['msg']}; give a complete results file of lm-eval") from None


def require_name(option: str, value: str) -> None:
    """HmfError unless the value of an option can be a part of a file's name."""
    if not NAME.fullmatch(value):
        raise HmfError(f"{option}: {value!r} cannot be part of a file name; use letters, digits, '_', '.' and '-'")


def write_scores(run: Path, name: str, suite: str, files: Sequence[Path]) -> Path:
    """Read results files into RUN/scores.NAME-SUITE.json and return its path.

    The files are copied into the run folder, and each row names its copy under `source`. Existing rows of the scores
    are kept, except that a new row replaces the one with the same key. Raises HmfError if two files have the same row,
    or if the existing rows are not from results files.
    """
    require_name("--name", name)
    require_name("suite", suite)
    target = run / f"scores.{name}-{suite}.json"
    scores: dict[str, Any] = {"tasks": {}, "measures": {}, "suite": suite, "settings": {}, "versions": {}}
    scores |= _existing(target)
    origin: dict[str, Path] = {}
    copies: dict[str, bytes] = {}
    for file in files:
        reading, data = read_results(file), _bytes(file)
        source = copy_name(reading.harness, name, data, file.suffix)
        copies[source] = data
        for section, rows in (("tasks", reading.tasks), ("measures", reading.measures)):
            for key, row in rows.items():
                if (other := origin.setdefault(f"{section}.{key}", file)) != file:
                    raise HmfError(f"{file}: {key}: is also in {other}; give only one of the two files")
                scores[section][key] = row | {"source": source}
        scores["settings"][source] = reading.settings
        for package, version in reading.versions.items():
            before = scores["versions"].get(package)
            scores["versions"][package] = version if before in (None, version) else f"{before}, {version}"
        if reading.measures:
            notice(f"{file}: kept under measures and not shown in tables: {listed(reading.measures)}")
    used = {row["source"] for section in ("tasks", "measures") for row in scores[section].values()}
    scores["settings"] = {source: one for source, one in scores["settings"].items() if source in used}
    from hmf.training.checkpoints import replace_text  # imports torch

    try:
        for source, data in copies.items():
            (run / source).write_bytes(data)
        replace_text(target, seal_json(scores))
    except OSError as error:
        raise HmfError(f"{error.filename or target}: cannot be written: {reason(error)}") from None
    return target


def copy_name(harness: str, name: str, data: bytes, suffix: str) -> str:
    """The name of a results file's copy in the run folder. Different files have different names."""
    return f"{harness}.{name}.{hashlib.sha256(data).hexdigest()[:12]}{suffix}"


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise HmfError(f"{file}: cannot be read: {reason(error)}") from None


def _parse(file: Path, data: bytes) -> dict[str, Any]:
    parse = parse_yaml if file.suffix in (".yml", ".yaml") else parse_json
    try:
        content = parse(data.decode())
    except ValueError as error:
        raise HmfError(f"{file}: cannot be read: {error}; give a complete results file") from None
    if not isinstance(content, dict):
        raise HmfError(f"{file}: is not a mapping; give a complete results file")
    return content


def _existing(target: Path) -> dict[str, Any]:
    if not target.exists():
        return {}
    try:
        content = parse_sealed(_bytes(target).decode(), required=False)
        Scores.model_validate(content)
    except ValueError as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise HmfError(f"{target}: is not a file of scores: {why}; remove it and write it again") from None
    measures = content.get("measures", {})
    rows = [*content["tasks"].values(), *(measures.values() if isinstance(measures, dict) else [measures])]
    if not all(isinstance(row, dict) and "source" in row for row in rows):
        raise HmfError(f"{target}: has scores of `hmf evaluate`; give another --suite or --name")
    return content


def _lm_eval(file: Path, report: _LmEval) -> Reading:
    reading = Reading("lm-eval")
    for task, values in report.results.items():
        metrics = dict(_metrics(file, task, values))
        better = report.higher_is_better.get(task, {})
        shares = [
            key
            for key, (value, _) in metrics.items()
            if (key[0] in SHARES or key[0].isdecimal()) and 0 <= value <= 1 and better.get(key[0]) is not False
        ]
        lengths = [key for key in shares if key[0].isdecimal()]
        headline = HEADLINES.get(task)
        if headline in metrics and not 0 <= metrics[headline][0] <= 1:
            raise HmfError(
                f"{file}: results.{task}.{','.join(headline)}: {metrics[headline][0]} is not a share from 0 to 1; "
                "give the file as lm-eval wrote it"
            )
        chosen = lengths or [headline if headline in shares else key for key in shares[:1]]
        common = {
            "harness": "lm-eval",
            "version": report.versions.get(task),
            "shots": report.shots.get(task),
            "truncated": report.truncated.get(task),
        }
        for metric, filtered in chosen:
            value, stderr = metrics[metric, filtered]
            n = _prompts(file, report, task, metric)
            others = {",".join(key): number for key, (number, _) in metrics.items() if key not in chosen}
            row = {"task": task, "accuracy": value, "n": n, "metric": metric, "filter": filtered, "stderr": stderr}
            row["interval"] = _interval(value, n, stderr if task in report.group_subtasks else None)
            if metric.isdecimal():
                row["length"] = int(metric)
            key = f"{task}@{metric}" if metric.isdecimal() else task
            reading.tasks[key] = row | common | ({"others": others} if others else {})
        if metrics and not chosen:
            reading.measures[task] = common | {",".join(key): value for key, (value, _) in metrics.items()}
    if not reading.tasks and not reading.measures:
        raise HmfError(f"{file}: results: has no metric; run the harness again")
    reading.settings = {key: value for key, value in {**report.config, **report.hmf}.items() if value is not None}
    stated = {"lm_eval": report.lm_eval_version, "transformers": report.transformers_version}
    reading.versions = {package: version for package, version in stated.items() if version}
    return reading


def _metrics(
    file: Path, task: str, values: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, str], tuple[float, float | None]]]:
    """((metric, filter), (value, standard error)) of a task, in the file's order. Keys in the file: "METRIC,FILTER"."""
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        base = metric.removesuffix("_stderr")
        if not comma or (base != metric and f"{base},{filtered}" in values):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise HmfError(f"{file}: results.{task}.{key}: {value!r} is not a number; run the task again")
        stderr = values.get(f"{metric}_stderr,{filtered}")
        error = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
        if not (metric.isdecimal() and value == ABSENT):
            yield (metric, filtered), (float(value), error)


def _prompts(file: Path, report: _LmEval, task: str, metric: str) -> int:
    """The number of prompts behind a metric of a task. For a group, the prompts of its tasks that have the metric."""
    if parts := report.group_subtasks.get(task):
        having = [
            part for part in parts if any(key.partition(",")[0] == metric for key in report.results.get(part, {}))
        ]
        return sum(_prompts(file, report, part, metric) for part in having or parts)
    if task not in report.samples:
        raise HmfError(f"{file}: n-samples.{task}: is missing; give a complete results file of lm-eval")
    n = report.samples[task].effective
    if not metric.isdecimal():
        return n
    lengths = (report.configs.get(task, {}).get("metadata") or {}).get("max_seq_lengths") or [int(metric)]
    if len(lengths) > 1 and (report.config.get("limit") is not None or n % len(lengths)):
        raise HmfError(
            f"{file}: config.limit: it is unknown how many of {n} prompts have each of {len(lengths)} lengths; "
            f"run {task} without a limit, or one length at a time"
        )
    return n // len(lengths)


def _interval(value: float, n: int, stderr: float | None) -> tuple[float, float]:
    """Wilson's interval for a share of `n`. For a group, whose tasks may have other weights, the interval from its
    standard error."""
    if not stderr:
        return wilson(value, n)
    return max(0.0, value - Z95 * stderr), min(1.0, value + Z95 * stderr)
