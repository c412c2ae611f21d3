# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of the results of study.py: `report.py OUT [OUT ...] --out DIR` reads OUT/results.jsonl of each OUT.

Intervals are of 95%, by Student's t over seeds. Two types are ordered if the interval of their difference, paired by
seed, does not have zero in it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from common import interval, read_lines
from selection.study import TASKS
from study import TYPES, WIDE

from hmf.errors import HmfError

# Columns of a run, by seed: {seed: {column: value}}, with "mean" among the columns.
Runs = dict[int, dict[str, float]]
Lines = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = [line for folder in options.folders for line in read_lines(folder / "results.jsonl")]
    lines = [line for line in lines if line.get("finished")]
    if not lines:
        raise HmfError(f"{options.folders[0]}/results.jsonl: holds no finished run yet; go on with study.py")
    options.out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([*recall(lines, options.out), *teachers(lines, options.out), *iterations(lines, options.out)])
    text = f"{text}\n\n## Cost\n\n{cost_table(lines)}"
    (options.out / "table.md").write_text(text + "\n")
    print(text)


def recall(lines: Lines, out: Path) -> Iterable[str]:
    """Every type at every rate, then each type at the rate with its best mean."""
    found: dict[tuple[str, float], Runs] = defaultdict(dict)
    about: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["kind"] == "recall" and "num_iter" not in line:
            found[line["type"], line["rate"]][line["seed"]] = percent(line["accuracy"])
            about[line["type"]] = line
    if not found:
        return
    best = at_best_rate(found)
    ceiling: dict[str, Runs] = defaultdict(dict)
    for line in lines:
        if line["kind"] == "attention":
            ceiling["attention" if line["heads"] > 1 else "attention-wide"][line["seed"]] = percent(line["accuracy"])
    shown = ceiling | {name: runs for name, (_, runs) in best.items()}
    columns = list(next(iter(next(iter(shown.values())).values())))
    yield "## Multi-query recall\n\nAccuracy in % by number of pairs, at the rate with the best mean over seeds."
    yield table(shown, columns, {name: about[name] | {"rate": rate} for name, (rate, _) in best.items()})
    yield "By learning rate: mean over numbers of pairs, with its interval, and the seeds."
    yield rates_table(found)
    yield order_text({name: runs for name, (_, runs) in best.items() if name not in WIDE}, "the same heads")
    equal = {name: runs for name, (_, runs) in best.items() if f"{name}-wide" not in WIDE}
    yield order_text(equal, "states of the same size")
    draw(out / "recall.png", shown, "pairs")


def teachers(lines: Lines, out: Path) -> Iterable[str]:
    found: dict[tuple[str, float], Runs] = defaultdict(dict)
    for line in lines:
        if line["kind"] == "prime":
            scores = {name: 100 * line["scores"][name] for name in TASKS}
            scores["mean"] = sum(scores.values()) / len(TASKS)
            found[line["type"], line["rate"]][line["seed"]] = scores | line["kl"]
    if not found:
        return
    best = {name: runs for name, (_, runs) in at_best_rate(found).items()}
    known = {line["seed"]: percent(line["scores"]) for line in lines if line["kind"] == "teacher"}
    yield "## The embedded teacher\n\nAccuracy in % by task, and KL on held-out rows in nats, at the best rate."
    columns = [*TASKS, "mean", "kl_text", "kl_answers"]
    yield table({"teacher": known, **best}, columns, {name: {} for name in best})
    if len({rate for _, rate in found}) > 1:
        yield rates_table(found)
    yield order_text(best, "mean accuracy of the tasks")
    yield order_text(best, "KL of answers", "kl_answers", smaller=True)
    draw(out / "teachers.png", best, "task", [*TASKS, "mean"])


def iterations(lines: Lines, out: Path) -> Iterable[str]:
    """GKA trained with n iterations: its accuracy with n, and with other numbers."""
    rates = {line["rate"] for line in lines if "num_iter" in line}
    runs = [x for x in lines if x["kind"] == "recall" and x["type"] == "gka" and x["rate"] in rates]
    trained: dict[int, dict[str, Runs]] = defaultdict(lambda: defaultdict(dict))
    for line in runs:
        for tested, scores in line["over_iterations"].items():
            trained[line.get("num_iter", 30)][tested][line["seed"]] = percent(scores)
    if not trained:
        return
    tested = list(next(iter(trained.values())))
    yield "## GKA over num_iter\n\nMean recall in %: a row for the number in training, a column for that in use."
    rows = [["trained with", "seeds", *tested]]
    for count, by_tested in sorted(trained.items()):
        seeds = len(next(iter(by_tested.values())))
        cells = [spread([x["mean"] for x in by_tested[name].values()]) for name in tested]
        rows.append([str(count), str(seeds), *cells])
    yield markdown(rows)
    same = {str(n): by_tested[str(n)] for n, by_tested in sorted(trained.items()) if str(n) in by_tested}
    yield order_text(same, "num_iter in training and in use")
    draw_iterations(out / "iterations.png", trained, tested)


def percent(scores: dict[str, float]) -> dict[str, float]:
    values = {name: 100 * x for name, x in scores.items()}
    return values | {"mean": sum(values.values()) / len(values)}


def at_best_rate(found: dict[tuple[str, float], Runs]) -> dict[str, tuple[float, Runs]]:
    """By type, the best first: the rate with the best mean over the seeds that all its rates have, and its runs."""
    best = {}
    for name in dict.fromkeys(name for name, _ in found):
        by_rate = {rate: runs for (other, rate), runs in found.items() if other == name}
        shared = set.intersection(*(set(runs) for runs in by_rate.values())) or set().union(*by_rate.values())
        rate = max(by_rate, key=lambda rate: mean_of(by_rate[rate], shared))
        best[name] = rate, by_rate[rate]
    return dict(sorted(best.items(), key=lambda item: -mean_of(item[1][1], item[1][1])))


def mean_of(runs: Runs, seeds: Iterable[int]) -> float:
    values = [runs[seed]["mean"] for seed in seeds if seed in runs]
    return sum(values) / len(values)


def spread(values: list[float], digits: int = 1) -> str:
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def markdown(rows: list[list[str]]) -> str:
    head = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(head + ["| " + " | ".join(row) + " |" for row in rows[1:]])


def table(found: dict[str, Runs], columns: list[str], about: dict[str, dict[str, Any]]) -> str:
    """A row for each type; `about` has what else is known of it: its rate, and its sizes."""
    known = [name for name in ("rate", "parameters", "state", "convolutions") if any(name in x for x in about.values())]
    rows = [["type", "seeds", *columns, *known]]
    for name, runs in found.items():
        cells = [
            spread([x[column] for x in runs.values() if column in x], 3 if column.startswith("kl") else 1)
            for column in columns
        ]
        row = about.get(name, {})
        rows.append([name, str(len(runs)), *cells, *(str(row.get(column, "")) for column in known)])
    return markdown(rows)


def rates_table(found: dict[tuple[str, float], Runs]) -> str:
    rates, names = sorted({rate for _, rate in found}), list(dict.fromkeys(name for name, _ in found))
    rows = [["type", *(f"{rate:g}" for rate in rates)]]
    for name in names:
        values = [[x["mean"] for x in found.get((name, rate), {}).values()] for rate in rates]
        rows.append([name, *(f"{spread(x)} ({len(x)})" if x else "" for x in values)])
    return markdown(rows)


def order_text(found: dict[str, Runs], what: str, column: str = "mean", smaller: bool = False) -> str:
    """Every pair of types with the difference of `column`, and which of them are ordered."""
    names = sorted(found, key=lambda name: sum(x[column] for x in found[name].values()) / len(found[name]))
    names = names if smaller else names[::-1]
    digits = 3 if column.startswith("kl") else 1
    ordered: list[str] = []
    open_: list[str] = []
    for first, second in combinations(names, 2):
        seeds = sorted(found[first].keys() & found[second].keys())
        if len(seeds) < 2:
            continue
        mean, half = interval([found[first][seed][column] - found[second][seed][column] for seed in seeds])
        text = f"{first} and {second}: {mean:+.{digits}f} ± {half:.{digits}f}"
        (ordered if abs(mean) > half else open_).append(text)
    count = len(ordered) + len(open_)
    if not count:
        return f"**Order by {what}.** No two types have two seeds in common, so that no difference has an interval."
    lines = [
        f"**Order by {what}.** Differences paired by seed; {len(ordered)} of {count} pairs are ordered. At 95%, "
        f"{count / 20:.1f} pairs would be so by chance alone.",
        "",
        *(f"- ordered: {text}" for text in ordered),
        *(f"- not ordered: {text}" for text in open_),
    ]
    return "\n".join(lines)


def cost_table(lines: Lines) -> str:
    seconds: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        name = " ".join(str(line[x]) for x in ("kind", "type", "num_iter") if x in line)
        seconds[name].append(line["core_seconds"])
    rows = [["run", "number", "mean core-seconds", "core-minutes in all"]]
    for name, x in seconds.items():
        rows.append([name, str(len(x)), f"{sum(x) / len(x):.0f}", f"{sum(x) / 60:.1f}"])
    rows.append(["all", str(len(lines)), "", f"{sum(map(sum, seconds.values())) / 60:.1f}"])
    return markdown(rows)


def draw(picture: Path, found: dict[str, Runs], label: str, columns: list[str] | None = None) -> None:
    """Accuracy of each type over the columns, with bars from the lowest to the highest seed; tasks have no lines."""
    figure, axes = new_figure()
    numbered = columns is None
    columns = columns or [column for column in next(iter(next(iter(found.values())).values())) if column != "mean"]
    for index, (name, runs) in enumerate(found.items()):
        across = [position + 0.5 * (index / len(found) - 0.5) for position in range(len(columns))]
        middle, bars = ranges([[x[column] for x in runs.values()] for column in columns])
        style = {"linestyle": "-" if numbered else "", "marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1}
        family = name.removesuffix("-wide")
        style |= {"color": "grey" if family == "attention" else f"C{TYPES.index(family)}"}
        if family != name and numbered:
            style |= {"linestyle": "--", "markerfacecolor": "white"}
        axes.errorbar(across, middle, yerr=bars, label=name, **style)
    axes.set(xlabel=label, ylabel="accuracy, %", ylim=(-3, 103), xticks=range(len(columns)), xticklabels=columns)
    save(figure, axes, picture)


def ranges(values: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far the lowest and the highest value are from them."""
    means = [fmean(x) for x in values]
    down, up = ([abs(end(x) - middle) for x, middle in zip(values, means, strict=True)] for end in (min, max))
    return means, [down, up]


def draw_iterations(picture: Path, trained: dict[int, dict[str, Runs]], tested: list[str]) -> None:
    """A line for each number in training, over the number in use; the point of its own number is larger."""
    figure, axes = new_figure()
    for count, by_tested in sorted(trained.items()):
        middle, bars = ranges([[x["mean"] for x in by_tested[name].values()] for name in tested])
        line = axes.errorbar(range(len(tested)), middle, yerr=bars, marker="o", markersize=3, capsize=2, linewidth=1)
        line.set_label(f"trained with {count}")
        if str(count) in tested:
            at = tested.index(str(count))
            axes.plot([at], [middle[at]], "o", markersize=9, color=line.lines[0].get_color())
    axes.set(xlabel="num_iter in use", ylabel="mean recall, %", xticks=range(len(tested)), xticklabels=tested)
    save(figure, axes, picture)


def new_figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    return figure, figure.subplots()


def save(figure: Any, axes: Any, picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    FigureCanvasAgg(figure).print_png(picture)


if __name__ == "__main__":
    main()
