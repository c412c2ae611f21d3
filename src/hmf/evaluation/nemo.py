# SPDX-License-Identifier: Apache-2.0
"""Results of NeMo-Skills, from NeMo Evaluator (results.yml) or its own (metrics.json), and the command that runs it.

Both files map task -> metric -> score -> number. results.yml writes "pass@1" as "pass_at_1". Shares are percentages.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hmf.errors import HmfError
from hmf.evaluation.results import wilson
from hmf.folders import ASSETS

CONFIG = "evaluation/nemo.yaml"
# The score of each benchmark in the card's table.
SCORES = {
    "aime24": "symbolic_correct",
    "aime25": "symbolic_correct",
    "gpqa": "symbolic_correct",
    "livecodebench": "accuracy",
    "ifbench": "average_score",
    "scicode": "subtask_accuracy",
    "bfcl_v3": "accuracy",
}
OVERALL = {"bfcl_v3": "overall_accuracy"}  # benchmarks with a metric of their own; others use that of the answers
PASS = re.compile(r"pass(?:@|_at_)1(?:[\[_]avg-of-(\d+)\]?)?")  # mean over one answer or several
BFCL4 = "bfcl_v4"
# The categories of BFCL v4 (Patil et al., 2025) except web search, which needs a key for a search engine. The category
# "format sensitivity" repeats entries of others and is not part of the benchmark's score.
CATEGORIES = (
    "simple_python",
    "simple_java",
    "simple_javascript",
    "parallel",
    "multiple",
    "parallel_multiple",
    "irrelevance",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_relevance",
    "live_irrelevance",
    "multi_turn_base",
    "multi_turn_miss_func",
    "multi_turn_miss_param",
    "multi_turn_long_context",
    "memory_kv",
    "memory_vector",
    "memory_rec_sum",
)
Numbers = dict[str, Any]  # by score
Row = dict[str, Any]


def command(model: str, url: str, output: Path) -> str:
    """The command line that runs the benchmarks of the card's table on the server at `url`, which serves `model`."""
    endpoint = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    return shlex.join(
        [
            "nemo-evaluator-launcher",
            "run",
            "--config",
            str(ASSETS / CONFIG),
            "-o",
            f"target.api_endpoint.model_id={model}",
            "-o",
            f"target.api_endpoint.url={endpoint}",
            "-o",
            f"execution.output_dir={output}",
        ]
    )


def is_nemo(content: Mapping[str, Any]) -> bool:
    """Whether a file is from NeMo Evaluator or NeMo-Skills. lm-eval's files have one mapping per task in results."""
    if "results" in content:
        results = content["results"]
        return isinstance(results, dict) and "n-samples" not in content and bool({"tasks", "groups"} & results.keys())
    return bool(content) and all(
        isinstance(metrics, dict) and metrics and all(isinstance(scores, dict) for scores in metrics.values())
        for metrics in content.values()
    )


def read(file: Path, content: Mapping[str, Any]) -> tuple[dict[str, Row], dict[str, Row], Row, dict[str, str]]:
    """Rows of tasks, other measures, settings and versions."""
    if "results" not in content:
        rows, measures = _rows(file, content)
        return rows, measures, {}, {}
    config, target, metadata = (_mapping(file, content, key) for key in ("config", "target", "metadata"))
    results = dict(_flatten(file, "results", content["results"]))
    if not results:
        raise HmfError(f"{file}: results: has no metric; run the task again")
    kind = str(config.get("type", ""))
    # Other harnesses of NeMo Evaluator write shares or percentages, without a common rule.
    rows, measures = _rows(file, results) if kind.startswith("ns_") else ({}, _measures(results))
    settings = {"type": kind, **(config.get("params") or {}), **{f"target.{k}": v for k, v in target.items()}}
    versions = {str(name): str(version) for name, version in (metadata.get("versioning") or {}).items()}
    return rows, measures, settings, versions


def _mapping(file: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key, {} if key == "metadata" else None)
    if not isinstance(value, dict):  # NeMo Evaluator writes the key target last, so it marks a complete file
        raise HmfError(f"{file}: {key}: is missing or not a mapping; give a complete results file")
    return value


def _flatten(file: Path, place: str, node: Any) -> Iterator[tuple[str, dict[str, Numbers]]]:
    """(task, metric -> score -> number) for the nested tasks and groups of results.yml."""
    if not isinstance(node, dict):
        raise HmfError(f"{file}: {place}: is not a mapping; give a complete results file")
    for section in ("tasks", "groups"):
        for name, part in (node.get(section) or {}).items():
            where = f"{place}.{section}.{name}"
            yield from _flatten(file, where, part)
            metrics: dict[str, Numbers] = {}
            for metric, scored in (part.get("metrics") or {}).items():
                try:
                    scores = scored["scores"]
                    metrics[metric] = {score: entry["value"] for score, entry in scores.items()}
                    counts = {(entry.get("stats") or {}).get("count") for entry in scores.values()} - {None}
                except (TypeError, KeyError, AttributeError):
                    raise HmfError(
                        f"{file}: {where}.metrics.{metric}: each score needs a value; run the task again"
                    ) from None
                if len(counts) == 1:
                    metrics[metric].setdefault("num_entries", counts.pop())
            if metrics:
                yield name, metrics


def _rows(file: Path, results: Mapping[str, Mapping[str, Numbers]]) -> tuple[dict[str, Row], dict[str, Row]]:
    rows: dict[str, Row] = {}
    parts = {name: re.sub(rf"^{BFCL4}[._]", "", name) for name in results if re.match(rf"{BFCL4}[._]", name)}
    if parts or BFCL4 in results:
        rows[BFCL4] = _weighted(file, {part: results[name] for name, part in parts.items()})
        rows[BFCL4]["others"] = {name: dict(results[name]) for name in (BFCL4, *parts) if name in results}
    for task, score in SCORES.items():
        if task in results:
            metric, repeats = (OVERALL[task], 1) if task in OVERALL else _pass(file, task, results[task])
            rows[task] = _row(file, task, metric, score, results[task]) | {"repeats": repeats}
            rows[task]["others"] = dict(results[task])
    known = {*rows, *parts}
    return rows, _measures({task: metrics for task, metrics in results.items() if task not in known})


def _measures(results: Mapping[str, Mapping[str, Numbers]]) -> dict[str, Row]:
    return {task: {"harness": "nemo", "metrics": dict(metrics)} for task, metrics in results.items()}


def _pass(file: Path, task: str, metrics: Mapping[str, Numbers]) -> tuple[str, int]:
    """The pass@1 metric with the most answers per prompt, and the number of answers per prompt."""
    known = [(int(match[1] or 1), name) for name in metrics if (match := PASS.fullmatch(name))]
    if not known:
        raise HmfError(f"{file}: {task}: has no metric pass@1; it has {', '.join(metrics)}; run the task again")
    repeats, metric = max(known)
    return metric, repeats


def _number(file: Path, task: str, metric: str, score: str, metrics: Mapping[str, Numbers], fix: str) -> float:
    scores = metrics.get(metric)
    value = scores.get(score) if isinstance(scores, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        what = "is missing" if value is None else f"{value!r} is not a number of at least 0"
        raise HmfError(f"{file}: {task}.{metric}.{score}: {what}; {fix}")
    return float(value)


def _row(file: Path, task: str, metric: str, score: str, metrics: Mapping[str, Numbers]) -> Row:
    percent = _number(file, task, metric, score, metrics, "run the task again")
    if percent > 100:
        raise HmfError(f"{file}: {task}.{metric}.{score}: {percent} is not a percentage; run the task again")
    counted = "give NeMo-Skills' metrics.json of the same run, which counts them"
    n = int(_number(file, task, metric, "num_entries", metrics, counted))
    if n < 1:
        raise HmfError(f"{file}: {task}.{metric}.num_entries: {n} is less than 1; run the task again")
    return {
        "task": task,
        "accuracy": percent / 100,
        "n": n,
        "truncated": None,
        "interval": wilson(percent / 100, n),
        "metric": f"{metric}/{score}",
        "filter": "none",
        "stderr": None,
        "harness": "nemo",
    }


def _weighted(file: Path, results: Mapping[str, Mapping[str, Numbers]]) -> Row:
    """BFCL v4 without web search: the mean over categories, weighted by their entries. All categories are needed."""
    if missing := [name for name in CATEGORIES if name not in results]:
        raise HmfError(
            f"{file}: {BFCL4}.{missing[0]}: is missing ({len(missing)} of {len(CATEGORIES)} categories are missing); "
            "run the rest, or give NeMo-Skills' metrics.json, which has each category"
        )
    rows, repeats = [], set()
    for name in CATEGORIES:
        metric, answers = _pass(file, f"{BFCL4}.{name}", results[name])
        rows.append(_row(file, f"{BFCL4}.{name}", metric, "accuracy", results[name]))
        repeats.add(answers)
    if len(repeats) > 1:
        counts = " and ".join(map(str, sorted(repeats)))
        raise HmfError(
            f"{file}: {BFCL4}: the number of answers per entry differs between categories ({counts}); finish the run"
        )
    n = sum(row["n"] for row in rows)
    accuracy = sum(row["accuracy"] * row["n"] for row in rows) / n
    return rows[0] | {
        "task": BFCL4,
        "accuracy": accuracy,
        "n": n,
        "interval": wilson(accuracy, n),
        "repeats": repeats.pop(),
        "metric": "accuracy of all categories except web search, weighted by entries",
    }
