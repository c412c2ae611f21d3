# SPDX-License-Identifier: Apache-2.0
"""Tables and picture of the results of study.py: `report.py OUT` reads OUT/results.jsonl, also while the study runs.

Accuracy has Wilson's 95% interval over prompts; a change by Stage 2 that of the mean difference on the same prompts;
perplexity that of Student's t over texts.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from common import interval, read_lines
from study import MODELS

from hmf.errors import HmfError
from hmf.evaluation.results import wilson

Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    lines = read_lines(folder / "results.jsonl")
    scored = [line for line in lines if line["kind"] != "stage"]
    if not scored:
        raise HmfError(f"{folder}/results.jsonl: no model has been scored yet; go on with study.py")
    text = "\n\n".join([accuracy_table(scored), perplexity_table(scored), cost_table(lines)])
    (folder / "table.md").write_text(text + "\n")
    draw(scored, folder / "needles.png")
    print(text)


def models(lines: Iterable[Line]) -> list[str]:
    found = {line["model"] for line in lines}
    return [name for name in MODELS if name in found]


def of(lines: Iterable[Line], kind: str, model: str, length: int | None = None) -> list[Line]:
    """Lines of a kind and a model, by depth."""
    found = [x for x in lines if (x["kind"], x["model"]) == (kind, model) and length in (None, x["length"])]
    return sorted(found, key=lambda line: (line["length"], line["depth"] or 0))


def accuracy_table(lines: list[Line]) -> str:
    head = ["model", "length", "needle", "n", "worst depth", "change by Stage 2", "cut off", "recall", "n"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model in models(lines):
        for length in sorted({line["length"] for line in lines if line["kind"] == "needle"}):
            if not (found := of(lines, "needle", model, length)):
                continue
            correct = [right for line in found for right in line["correct"]]
            worst = min(found, key=lambda line: sum(line["correct"]) / line["n"])
            recall = [right for line in of(lines, "recall", model, length) for right in line["correct"]]
            before = of(lines, "needle", model.removesuffix("-extended"), length)
            earlier = [right for line in before for right in line["correct"]]
            change = ""
            if model.endswith("-extended") and len(earlier) == len(correct):
                change = "{:+.1f} ± {:.1f}".format(*paired(earlier, correct))
            cells = [
                *(model, f"{length:,}", share(correct), str(len(correct))),
                f"{100 * sum(worst['correct']) / worst['n']:.0f}% at {100 * worst['depth']:.0f}%",
                *(change, f"{100 * sum(line['cut_off'] for line in found) / len(correct):.0f}%"),
                *(share(recall), str(len(recall))),
            ]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def share(correct: Sequence[int]) -> str:
    if not correct:
        return ""
    low, high = wilson(sum(correct) / len(correct), len(correct))
    return f"{100 * sum(correct) / len(correct):.1f}% ({100 * low:.0f} to {100 * high:.0f})"


def paired(before: Sequence[int], after: Sequence[int]) -> tuple[float, float]:
    """Mean difference on the same prompts in points, and half of its 95% interval."""
    return interval([100 * (y - x) for x, y in zip(before, after, strict=True)])


def perplexity_table(lines: list[Line]) -> str:
    """Perplexity of library source by the number of tokens before the predicted one."""
    texts = {line["model"]: line["texts"] for line in lines if line["kind"] == "text"}
    if not texts:
        return "No text has been scored yet."
    places = [(part["start"], part["end"]) for part in next(iter(texts.values()))[0]]
    rows = ["| model | " + " | ".join(f"{start:,} to {end:,}" for start, end in places) + " |"]
    rows.append("|" + "---|" * (len(places) + 1))
    for model in models(lines):
        cells = []
        for parts in zip(*texts.get(model, []), strict=True):
            mean, half = interval([part["nats"] / part["tokens"] for part in parts])
            spread = "" if math.isnan(half) else f" ({math.exp(mean - half):.1f} to {math.exp(mean + half):.1f})"
            cells.append(f"{math.exp(mean):.1f}{spread}")
        if cells:
            rows.append("| " + " | ".join([model, *cells]) + " |")
    return "\n".join(rows)


def cost_table(lines: list[Line]) -> str:
    stages = [line for line in lines if line["kind"] == "stage"]
    rows = ["| stage | seconds | million tokens |", "|---|---|---|"]
    for line in stages:
        tokens = f"{line['tokens'] / 1e6:.1f}" if "tokens" in line else ""
        rows.append(f"| {line['stage']} | {line['seconds']:.0f} | {tokens} |")
    used = {", ".join([line["device"], *map(" ".join, line["versions"].items())]) for line in stages}
    return "\n".join([*rows, "", *sorted(used)])


def draw(lines: list[Line], picture: Path) -> None:
    """A heat map for each model: accuracy by depth, from start to end, and length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    needles = [line for line in lines if line["kind"] == "needle"]
    if not needles:
        return
    lengths, depths = (sorted({line[name] for line in needles}) for name in ("length", "depth"))
    names = models(needles)
    figure = Figure(figsize=(1.2 + 2.3 * len(names), 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, names, strict=True):
        found = {(line["length"], line["depth"]): line for line in of(needles, "needle", model)}
        grid = [
            [100 * sum(cell["correct"]) / cell["n"] if (cell := found.get((x, y))) else math.nan for x in lengths]
            for y in depths
        ]
        image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    colour = "black" if value > 60 else "white"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_title(model, fontsize=10)
        axes.set_xticks(range(len(lengths)), [f"{x // 1024}K" if x % 1024 == 0 else f"{x}" for x in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
        axes.set_xlabel("tokens")
    panels[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=list(panels), label="right answers, %", pad=0.01)
    FigureCanvasAgg(figure).print_png(picture)


if __name__ == "__main__":
    main()
