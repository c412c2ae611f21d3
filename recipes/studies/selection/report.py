# SPDX-License-Identifier: Apache-2.0
"""Table and plot of the results of study.py: `report.py OUT [OUT ...] --out DIR` reads OUT/results.jsonl of each OUT.

The regret of a method is the score of the best choice of the same size minus that of the method's choice, in points of
the mean accuracy over tasks, and in nats of KL.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from study import TASKS, read_lines

from hmf.config.pattern import Pattern
from hmf.selection.choose import by_rank, greedy, search, spearman
from hmf.selection.scores import Choice, cost

KL = ("kl_text", "kl_answers")
Costs = dict[Choice, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS), help="tasks whose mean accuracy counts")
    options = parser.parse_args()
    lines = [line for folder in options.folders for line in read_lines(folder / "results.jsonl")]
    tasks = options.tasks.split(",")
    primed, methods, seconds = collected(lines, tasks)
    layers = 1 + max(max(choice) for choices in primed.values() for choice in choices)
    options.out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([sizes_table(primed), regret_table(primed, methods, layers), cost_table(seconds)])
    (options.out / "table.md").write_text(text + "\n")
    print(text)
    draw(primed, methods, options.out / "choices.png")


def collected(lines: list[dict[str, Any]], tasks: list[str]) -> tuple[Any, Any, Any]:
    """{choice: (mean accuracy, KL)} of primed choices by seed; {choice: sums} by seed and method; seconds by run."""
    primed: dict[int, dict[Choice, tuple[float, float]]] = defaultdict(dict)
    methods: dict[int, dict[str, dict[Choice, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    seconds: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        choice = frozenset(line["replaced"])
        if line["kind"] == "method":
            methods[line["seed"]][line["method"]][choice] = torch.tensor(line["rows"], dtype=torch.float64)
        elif line.get("finished") and line["variant"] == "recipe":
            accuracy = sum(line["scores"][task] for task in tasks) / len(tasks)
            primed[line["seed"]][choice] = accuracy, (line["kl"]["kl_text"] + line["kl"]["kl_answers"]) / 2
        if line.get("finished"):
            seconds[line["method"] if line["kind"] == "method" else f"primed, {len(choice)}"].append(line["seconds"])
    return primed, methods, seconds


def choices_of(known: dict[str, dict[Choice, torch.Tensor]], layers: int, keep: int) -> dict[str, Choice]:
    """The choice of each method, by name."""
    choices = {"uniform": frozenset(Pattern.generate(layers, "gdn", (layers - keep) / layers).replaced)}
    for name, sums in known.items():
        for label, measures in (("KL", KL), ("KL answers", ("kl_answers",)), ("differing", ("differ_answers",))):
            if name == "window":
                label, measures = "loss", ("loss_answers",)
            costs = {choice: cost(x.sum(0), measures).item() for choice, x in sums.items()}
            costs[frozenset(range(layers))] = costs.get(frozenset(range(layers)), math.inf)
            choices[f"{name}: one at a time, {label}"] = by_rank([costs[frozenset([i])] for i in range(layers)], keep)
            if name == "window":
                break
            score = partial(looked_up, costs)
            choices[f"{name}: greedy, {label}"] = greedy(score, layers, keep)
            choices[f"{name}: all, {label}"] = search(score, layers, keep, 10**6)
    return choices


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
                (cost(known[name][choice].sum(0), KL).item(), 100 * x[0])
                for seed, known in methods.items()
                if name in known
                for choice, x in primed[seed].items()
                if len(choice) == size and choice in known[name]
            ]
            if points:
                across, up = zip(*points, strict=True)
                rho = spearman([-x for x in across], up)
                axes.scatter(across, up, s=14, label=f"{size} replaced, rho {math.nan if rho is None else rho:.2f}")
        axes.set(title=name, xlabel="KL before priming, nats", ylabel="accuracy after priming, %", xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(picture)


if __name__ == "__main__":
    main()
