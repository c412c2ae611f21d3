# SPDX-License-Identifier: Apache-2.0
"""A selection of layers as a table and as a picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_selection(selection: dict[str, Any]) -> None:
    """Print the pattern, a row for each layer, the stability of the choice, and its cost."""
    table = Table(title=selection["pattern"], title_justify="left")
    stability = selection.get("stability")
    columns = [
        "layer",
        "becomes",
        *(["score"] if "scores" in selection else []),
        *(["kept in resamples"] if stability else []),
    ]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for layer, symbol in enumerate(selection["pattern"].split("-")):
        row = [str(layer), "attention" if symbol == "*" else symbol]
        if "scores" in selection:
            row.append(f"{selection['scores'][layer]:.4g}")
        if stability:
            row.append(f"{stability['kept'][layer]:.0%}")
        table.add_row(*row)
    console = Console()
    console.print(table)
    if stability:
        console.print(f"the same choice in {stability['same_choice']:.0%} of resamples of the rows")
        for pair, values in selection["agreement"].items():
            if (tau := values["kendall"]) is not None:
                console.print(f"Kendall's tau of the rankings {pair.replace(', ', ' and ')}: {tau:.2f}")
        cost = selection["cost"]
        console.print(
            f"{cost['training_tokens']:,} tokens of training, {cost['scored_choices']} choices scored on "
            f"{cost['scored_tokens']:,} tokens, {selection['seconds']:.0f} s"
        )


def draw_selection(file: Path) -> Path | None:
    """Draw the scores of a selection.json as selection.png beside it. Returns None if the method has no scores."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    selection = json.loads(file.read_text(encoding="utf-8"))
    if "scores" not in selection:
        return None
    layers, kept = range(len(selection["scores"])), set(selection["kept"])
    rankings = selection.get("rankings", {})
    figure = Figure(figsize=(max(6.0, 0.3 * len(layers)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    colours = ["tab:blue" if layer in kept else "lightgray" for layer in layers]
    axes.bar(layers, selection["scores"], color=colours)
    for (name, values), marker in zip(rankings.items(), "ov^", strict=False):
        axes.plot(layers, values, marker, color="black", fillstyle="none", label=name, linestyle="none")
    if rankings:
        axes.legend()
    axes.set(title=f"{selection['method']}: blue layers keep attention", xlabel="layer", ylabel="score")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    picture = file.with_suffix(".png")
    part = picture.with_name(f"{picture.name}.part")
    FigureCanvasAgg(figure).print_png(part)
    os.replace(part, picture)
    return picture
