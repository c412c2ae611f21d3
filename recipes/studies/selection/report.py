# SPDX-License-Identifier: Apache-2.0
"""Table and plot of the results of study.py: `report.py OUT [OUT ...] --out DIR` reads OUT/results.jsonl of each OUT.

The regret of a method is the score of the best choice of the same size minus that of the method's choice, in points of
the mean accuracy over tasks, and in nats of KL.

Of runs with `--variants`: mean over choices and seeds of each variant, with 95% intervals over seeds (Student's t).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from common import interval, read_lines
from study import TASKS

from hmf.config.pattern import Pattern
from hmf.errors import HmfError
from hmf.selection.choose import by_rank, greedy, search, spearman
from hmf.selection.scores import Choice, cost

KL = ("kl_text", "kl_answers")
Costs = dict[Choice, float]
# By column: mean over seeds and half of the 95% interval, which is NaN with one seed.
Means = dict[str, tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS), help="tasks whose mean accuracy counts")
    options = parser.parse_args()
    lines = [line for folder in options.folders for line in read_lines(folder / "results.jsonl")]
    tasks = options.tasks.split(",")
    primed, methods, seconds = collected(lines, tasks)
    options.out.mkdir(parents=True, exist_ok=True)
    parts = []
    if len(means := variants(lines, tasks)) > 1:
        parts.append(variants_table(means, teacher_of(lines, tasks)))
        draw_variants(means, teacher_of(lines, tasks), options.out / "variants.png")
    if methods or not parts:
        if not primed:
            raise HmfError(f"{options.folders[0]}/results.jsonl: holds no finished run yet; go on with study.py")
        layers = 1 + max(max(choice) for choices in primed.values() for choice in choices)
        parts += [sizes_table(primed), regret_table(primed, methods, layers)]
        draw(primed, methods, options.out / "choices.png")
    text = "\n\n".join([*parts, cost_table(seconds)])
    (options.out / "table.md").write_text(text + "\n")
    print(text)


def collected(lines: list[dict[str, Any]], tasks: list[str]) -> tuple[Any, Any, Any]:
    """{choice: (mean accuracy, KL)} of primed choices by seed; {choice: sums} by seed and method; seconds by run."""
    primed: dict[int, dict[Choice, tuple[float, float]]] = defaultdict(dict)
    methods: dict[int, dict[str, dict[Choice, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    seconds: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line["kind"] == "teacher":
            continue
        choice = frozenset(line["replaced"])
        if line["kind"] == "method":
            methods[line["seed"]][line["method"]][choice] = torch.tensor(line["rows"], dtype=torch.float64)
        elif line.get("finished") and line["variant"] == "recipe":
            accuracy = sum(line["scores"][task] for task in tasks) / len(tasks)
            primed[line["seed"]][choice] = accuracy, (line["kl"]["kl_text"] + line["kl"]["kl_answers"]) / 2
        if line.get("finished"):
            name = line["method"] if line["kind"] == "method" else f"{line['variant']}, {len(choice)} replaced"
            seconds[name].append(line["seconds"])
    return primed, methods, seconds


def choices_of(known: dict[str, dict[Choice, torch.Tensor]], layers: int, keep: int) -> dict[str, Choice]:
    """The choice of each method, by name."""
    choices = {"uniform": frozenset(Pattern.generate(layers, "gdn", (layers - keep) / layers).replaced)}
    for name, sums in known.items():
        for label, measures in (("KL", KL), ("KL answers", ("kl_answers",)), ("differing", ("differ_answers",))):
            if name == "window":
                label, measures = "loss", ("loss_answers",)
            costs = {choice: mean_cost(x, measures) for choice, x in sums.items()}
            costs[frozenset(range(layers))] = costs.get(frozenset(range(layers)), math.inf)
            choices[f"{name}: one at a time, {label}"] = by_rank([costs[frozenset([i])] for i in range(layers)], keep)
            if name == "window":
                break
            score = partial(looked_up, costs)
            choices[f"{name}: greedy, {label}"] = greedy(score, layers, keep)
            choices[f"{name}: all, {label}"] = search(score, layers, keep, 10**6)
    return choices


def mean_cost(sums: torch.Tensor, measures: Sequence[str]) -> float:
    return sum(cost(sums.sum(0), (name,)).item() for name in measures) / len(measures)


def looked_up(costs: Costs, choices: Any) -> list[float]:
    return [costs[choice] for choice in choices]


def sizes_table(primed: Any) -> str:
    rows = ["| replaced | seed | choices | best | its accuracy | mean | worst | KL of the best |", "|" + "---|" * 8]
    for seed, scores in sorted(primed.items()):
        for size in sorted({len(choice) for choice in scores}):
            of_size = {choice: x for choice, x in scores.items() if len(choice) == size}
            best = max(of_size, key=lambda choice: of_size[choice][0])
            values = [100 * x[0] for x in of_size.values()]
            mean = sum(values) / len(values)
            rows.append(
                f"| {size} | {seed} | {len(values)} | {sorted(best)} | {max(values):.1f}% | {mean:.1f}% | "
                f"{min(values):.1f}% | {of_size[best][1]:.3f} |"
            )
    return "\n".join(rows)


def regrets(primed: Any, methods: Any, layers: int) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Regret in points and in nats for each seed, by method and size, if the method's choice was primed."""
    regrets_by_method: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for seed, scores in primed.items():
        for size in sorted({len(choice) for choice in scores}):
            of_size = {choice: x for choice, x in scores.items() if len(choice) == size}
            best, least = max(x[0] for x in of_size.values()), min(x[1] for x in of_size.values())
            for name, choice in choices_of(methods.get(seed, {}), layers, layers - size).items():
                if choice in of_size:
                    accuracy, kl = of_size[choice]
                    regrets_by_method[name][size].append((100 * (best - accuracy), kl - least))
    return regrets_by_method


def regret_table(primed: Any, methods: Any, layers: int) -> str:
    by_method = regrets(primed, methods, layers)
    sizes = sorted({size for by_size in by_method.values() for size in by_size})
    head = " | ".join(f"{size} replaced" for size in sizes)
    rows = [f"| method | {head} | mean, points | mean, nats | choices |", "|" + "---|" * (len(sizes) + 4)]
    table = []
    for name, by_size in by_method.items():
        values = [x for size in sizes for x in by_size[size]]
        points, nats = (sum(x[i] for x in values) / len(values) for i in (0, 1))
        cells = [" ".join(f"{x[0]:.1f}" for x in by_size[size]) or "-" for size in sizes]
        seed = min(primed)
        chosen = [choices_of(methods.get(seed, {}), layers, layers - size).get(name) for size in sizes]
        shown = " ".join("".join(map(str, sorted(choice or ()))) for choice in chosen)
        table.append((points, f"| {name} | {' | '.join(cells)} | {points:.1f} | {nats:.3f} | {shown} |"))
    return "\n".join(rows + [row for _, row in sorted(table, key=lambda item: item[0])])


def variants(lines: list[dict[str, Any]], tasks: list[str]) -> dict[str, Means]:
    """By variant, the best mean accuracy first: accuracy of each task and their mean in points, and KL in nats.

    A seed counts for a variant if all choices that any variant has are there. "seeds" and "against recipe" (mean
    accuracy, seeds paired) are columns too.
    """
    runs: dict[str, dict[int, dict[Choice, dict[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        if line["kind"] == "prime" and line.get("finished"):
            columns = {task: 100 * line["scores"][task] for task in tasks}
            columns |= {"mean": sum(columns.values()) / len(tasks), **{name: line["kl"][name] for name in KL}}
            runs[line["variant"]][line["seed"]][frozenset(line["replaced"])] = columns
    choices = {choice for by_seed in runs.values() for of_seed in by_seed.values() for choice in of_seed}
    whole = {
        name: {
            seed: {column: sum(x[column] for x in found.values()) / len(found) for column in (*tasks, "mean", *KL)}
            for seed, found in sorted(by_seed.items())
            if found.keys() == choices
        }
        for name, by_seed in runs.items()
    }
    means = {}
    for name, by_seed in whole.items():
        if by_seed:
            means[name] = {column: interval([x[column] for x in by_seed.values()]) for column in (*tasks, "mean", *KL)}
            paired = [
                x["mean"] - whole["recipe"][seed]["mean"]
                for seed, x in by_seed.items()
                if seed in whole.get("recipe", {})
            ]
            means[name] |= {"seeds": (len(by_seed), math.nan)}
            means[name] |= {"against recipe": interval(paired)} if paired and name != "recipe" else {}
    return dict(sorted(means.items(), key=lambda item: -item[1]["mean"][0]))


def teacher_of(lines: list[dict[str, Any]], tasks: list[str]) -> dict[str, float]:
    """The teacher's accuracy in points by task, and "mean"; empty if it was not scored."""
    for line in lines:
        if line["kind"] == "teacher" and line.get("finished"):
            scores = {task: 100 * line["scores"][task] for task in tasks}
            return scores | {"mean": sum(scores.values()) / len(tasks)}
    return {}


def variants_table(means: dict[str, Means], teacher: dict[str, float]) -> str:
    columns = [name for name in next(iter(means.values())) if name != "seeds" and name != "against recipe"]
    head = ["variant", "seeds", *columns, "against recipe"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    if teacher:
        known = [f"{teacher[name]:.1f}" if name in teacher else "0" for name in columns]
        rows.append("| " + " | ".join(["teacher", "", *known, ""]) + " |")
    for name, of_variant in means.items():
        cells = [f"{of_variant['seeds'][0]}"]
        for column in (*columns, "against recipe"):
            mean, half = of_variant.get(column, (math.nan, math.nan))
            digits = 3 if column in KL else 1
            spread = "" if math.isnan(half) else f" ± {half:.{digits}f}"
            cells.append("" if math.isnan(mean) else f"{mean:.{digits}f}{spread}")
        rows.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(rows)


def draw_variants(means: dict[str, Means], teacher: dict[str, float], picture: Path) -> None:
    """A panel for each column, a line for each variant, with its interval; the teacher is a vertical line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [name for name in next(iter(means.values())) if name != "seeds" and name != "against recipe"]
    names = list(reversed(means))
    figure = Figure(figsize=(3 + 2.4 * len(columns), 1.2 + 0.3 * len(names)), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True):
        middle = [means[name][column][0] for name in names]
        spread = [0 if math.isnan(half := means[name][column][1]) else half for name in names]
        axes.errorbar(middle, range(len(names)), xerr=spread, fmt="o", markersize=4, capsize=2)
        if column in teacher:
            axes.axvline(teacher[column], color="grey", linestyle=":")
        axes.set(title=column, xlabel="nats" if column in KL else "%", yticks=range(len(names)), yticklabels=names)
        axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(picture)


def cost_table(seconds: dict[str, list[float]]) -> str:
    rows = ["| run | number | mean seconds |", "|---|---|---|"]
    return "\n".join(rows + [f"| {name} | {len(x)} | {sum(x) / len(x):.0f} |" for name, x in sorted(seconds.items())])


def draw(primed: Any, methods: Any, picture: Path) -> None:
    """Plot the measured accuracy of each choice over a method's score of it, with one panel per method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    names = sorted({name for known in methods.values() for name in known if name != "window"})
    figure = Figure(figsize=(1 + 4 * len(names), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False):
        for size in range(1, 64):
            points = [
                (cost(known[name][choice].sum(0)).item(), 100 * x[0])
                for seed, known in methods.items()
                if name in known
                for choice, x in primed[seed].items()
                if len(choice) == size and choice in known[name]
            ]
            if points:
                across, up = zip(*points, strict=True)
                rho = spearman([-x for x in across], up)
                axes.scatter(across, up, s=14, label=f"{size} replaced, rho {math.nan if rho is None else rho:.2f}")
        axes.set(title=name, xlabel="KL of answers before priming", ylabel="accuracy after priming, %", xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(picture)


if __name__ == "__main__":
    main()
