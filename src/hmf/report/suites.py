# SPDX-License-Identifier: Apache-2.0
"""Scores of suites, for the terminal and for the model card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hmf.evaluation.paired import Pair, compare_all
from hmf.evaluation.results import SMALL, ParityResult, Scores, TaskResult, who
from hmf.planning.serving import short

from .evidence import MODEL, PRIMED, Evidence

MISSING = "not measured"


def print_suites(scores: Mapping[str, Scores], pairs: Mapping[str, Mapping[str, Pair | None]]) -> None:
    """Print a row for each task, length and model; then perplexity by position, paired comparisons, and parity."""
    tables = [_tasks(scores), _positions(scores), *(_pairs(first_of(scores), *each) for each in pairs.items())]
    console = Console(width=max(110, Console().width), markup=False, emoji=False)
    for table in filter(None, tables):
        widest = console.measure(table, options=console.options.update(width=1000)).maximum
        console.width = max(console.width, widest)
        console.print(table)
    for name, result in scores.items():
        if result.parity:
            console.print(f"{name}: {parity_line(result.parity)}", soft_wrap=True, highlight=False)
        for task, why in result.not_measured.items():
            console.print(f"{name}: {task}: not measured: {why}", soft_wrap=True, highlight=False)


def first_of(scores: Iterable[str]) -> str:
    return next(iter(scores))


def _tasks(scores: Mapping[str, Scores]) -> Table | None:
    keys = dict.fromkeys(key for result in scores.values() for key in result.tasks)
    if not keys:
        return None
    table = Table(caption=_caption(scores), caption_justify="left")
    for name in ("task", "model"):
        table.add_column(name, no_wrap=True)
    for name in ("score (95%)", "n", "correct", "wrong", "cut off", "log p/token"):
        table.add_column(name, justify="right", no_wrap=True)
    for key in keys:
        for model, result in scores.items():
            if (task := result.tasks.get(key)) is not None:
                table.add_row(title(key, task), model, *_cells(task))
    return table


def title(key: str, task: TaskResult) -> str:
    """The display name of a task with its length."""
    return f"{task.task or key} {short(task.length)}" if task.length else key


def key_title(key: str) -> str:
    """The display name of the task with this key, TASK@LENGTH or TASK."""
    task, _, length = key.rpartition("@")
    return f"{task} {short(int(length))}" if task and length.isdecimal() else key


def _cells(task: TaskResult) -> list[str]:
    low, high = task.interval
    cut = task.cut_off
    correct = round(task.accuracy * task.n)
    score = f"{100 * task.accuracy:.1f}% ({100 * low:.1f}–{100 * high:.1f})"
    wrong = "" if cut is None else str(task.n - correct - cut)
    likelihood = "not measured" if task.likelihood is None else f"{task.likelihood:.3f}"
    return [score, str(task.n), str(correct), wrong, "" if cut is None else str(cut), likelihood]


def _caption(scores: Mapping[str, Scores]) -> str:
    settings = next(iter(scores.values())).settings
    sampling = settings.get("sampling", {})
    drawn = "greedy answers"
    if sampling.get("temperature"):
        drawn = f"answers drawn at temperature {sampling['temperature']:g}, top-p {sampling.get('top_p', 1):g}"
    return (
        f"{drawn}, seed {settings.get('seed')}, thinking {'on' if settings.get('thinking') else 'off'}; cut off: "
        "answers that reached the token limit; they count in n, but are neither correct nor wrong; log p/token: mean "
        "log-probability of the expected answer's tokens, without thinking"
    )


def _positions(scores: Mapping[str, Scores]) -> Table | None:
    if not any(result.positions for result in scores.values()):
        return None
    return _side_by_side(
        "perplexity of library text, by the number of tokens before",
        {name: {(p.start, p.end): f"{p.perplexity:.3f}" for p in result.positions} for name, result in scores.items()},
        lambda place: f"{place[0]:,}–{place[1] - 1:,}",
    )


def _side_by_side(caption: str, columns: Mapping[str, Mapping[Any, str]], row: Callable[[Any], str]) -> Table:
    table = Table(caption=caption, caption_justify="left")
    table.add_column("tokens before", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for place in dict.fromkeys(place for cells in columns.values() for place in cells):
        table.add_row(row(place), *(cells.get(place, "not measured") for cells in columns.values()))
    return table


def _pairs(first: str, second: str, result: Mapping[str, Pair | None]) -> Table | None:
    if not result:
        return None
    table = Table(
        title=f"{first} minus {second}, on the same prompts",
        caption="difference in percentage points, 95% interval by the paired bootstrap; p: McNemar's exact test",
        caption_justify="left",
    )
    table.add_column("task", no_wrap=True)
    for name in ("difference (95%)", "n", "first only", "second only", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, pair in result.items():
        table.add_row(key_title(key), *pair_cells(pair))
    return table


def pair_cells(pair: Pair | None) -> Sequence[str]:
    if pair is None:
        return ["not compared: different prompts", "", "", "", ""]
    low, high = pair.interval
    difference = f"{100 * pair.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return [difference, str(pair.n), str(pair.first_only), str(pair.second_only), f"{pair.p:.3g}"]


def parity_line(result: ParityResult) -> str:
    """The result of the parity check in a sentence."""
    verdict = "passed" if result.passed else "NOT passed"
    return (
        f"parity of Hugging Face and the server: {verdict}. KL divergence per token: {result.prompt_kl:.2e} over "
        f"{result.prompt_tokens:,} prompt tokens, {result.generated_kl:.2e} over {result.generated_tokens:,} generated "
        f"tokens, at most {result.max_kl:.2e}; bound of both means {result.bound:g} nats (the server's "
        f"{result.top_k} likeliest tokens and the rest)"
    )


# ---- for the card


def card_suites(
    evidence: Evidence, named: Callable[[str, Scores], str], link: Callable[[str, str], str]
) -> Iterator[str]:
    """For each suite: a table of its tasks by model, perplexity by position, paired comparisons, and parity.

    Args:
        named: returns a model's name in the card, for NAME and content of its file.
        link: returns a text as a link to a file.
    """
    suites = dict.fromkeys(result.suite for result in evidence.scores.values() if result.suite not in (None, SMALL))
    for suite in suites:
        files = {name: result for name, result in evidence.scores.items() if result.suite == suite}
        titles = [_titled(name, result, named) for name, result in files.items()]
        yield f"\n### Suite: {suite}\n"
        keys = {key: task for result in files.values() for key, task in result.tasks.items()}
        if keys:
            cells = [
                [task_cell(result.tasks.get(key), name, link, evidence) for name, result in files.items()]
                for key in keys
            ]
            rows = [[title(key, task), *each] for (key, task), each in zip(keys.items(), cells, strict=True)]
            yield markdown(["Task", *titles], rows)
            yield "\n" + " ".join(
                f"{name}: {_how(result)}." for name, result in zip(titles, files.values(), strict=True)
            )
        if any(result.positions for result in files.values()):
            yield "\nPerplexity of library text, by the number of tokens before:\n"
            yield markdown(["Tokens before", *titles], _position_rows(files, link))
        yield from _card_pairs(evidence, files, named)
        for name, result in files.items():
            if result.parity:
                yield f"\nIn {link(f'scores.{name}.json', f'scores.{name}.json')}: {parity_line(result.parity)}."
            for task, why in result.not_measured.items():
                yield f"\n{_titled(name, result, named)}: {task}: {MISSING}: {why}."


def _titled(name: str, result: Scores, named: Callable[[str, Scores], str]) -> str:
    return named(name, result) + (" by a server" if result.settings.get("url") else "")


def _how(result: Scores) -> str:
    """The settings and versions that a file of scores states."""
    sampling, settings = result.settings.get("sampling") or {}, result.settings
    parts = []
    if "temperature" in sampling:
        parts.append(f"temperature {sampling['temperature']:g}, top-p {sampling.get('top_p', 1):g}")
    if (most := sampling.get("max_new_tokens")) is not None:
        parts.append(f"answers of at most {most} tokens in addition to the expected answer's")
    parts += [f"{key} {settings[key]}" for key in ("seed", "dtype", "device") if settings.get(key) is not None]
    if "thinking" in settings:
        parts.append(f"thinking {'on' if settings['thinking'] else 'off'}")
    parts += [f"{package} {number}" for package, number in result.versions.items()]
    return ", ".join(parts) or "the file states no settings"


def task_cell(task: TaskResult | None, name: str, link: Callable[[str, str], str], evidence: Evidence) -> str:
    """Score, n, interval, truncated answers and likelihood; those that were not measured are omitted.

    The score links to the harness's results file if there is one, otherwise to scores.`name`.json.
    """
    if task is None:
        return MISSING
    low, high = task.interval
    parts = [f"n = {task.n:,}", f"{100 * low:.1f}–{100 * high:.1f}"]
    parts += [] if task.cut_off is None else [f"{task.cut_off} cut off"]
    parts += [] if task.likelihood is None else [f"log p {task.likelihood:.3f}"]
    return f"{link(f'{100 * task.accuracy:.1f}', evidence.source(task) or f'scores.{name}.json')} ({'; '.join(parts)})"


def _position_rows(files: Mapping[str, Scores], link: Callable[[str, str], str]) -> list[list[str]]:
    places = dict.fromkeys((p.start, p.end) for result in files.values() for p in result.positions)
    cells = {
        name: {(p.start, p.end): link(f"{p.perplexity:.3f}", f"scores.{name}.json") for p in result.positions}
        for name, result in files.items()
    }
    return [
        [f"{start:,}–{end - 1:,}", *(each.get((start, end), MISSING) for each in cells.values())]
        for start, end in places
    ]


def _card_pairs(evidence: Evidence, files: Mapping[str, Scores], named: Callable[[str, Scores], str]) -> Iterator[str]:
    """Differences between this model and each other model that has answered the same prompts."""
    ours = [name for name, result in files.items() if who(name, result) in (PRIMED, MODEL)]
    rows = []
    for name, other in ((name, other) for name in ours for other in files if other not in ours):
        for key, pair in compare_all(evidence.answers[name], evidence.answers[other]).items():
            if pair is not None:
                rows.append([key_title(key), _titled(other, files[other], named), *pair_cells(pair)])
    if rows:
        yield "\nThis model minus another model on the same prompts, in percentage points:\n"
        head = ["Task", "Other model", "Difference (95%)", "n", "this one only", "the other only", "p"]
        yield markdown(head, rows)
        yield "\nThe interval is from the paired bootstrap; p is from McNemar's exact test."


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
