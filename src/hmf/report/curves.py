# SPDX-License-Identifier: Apache-2.0
"""Plots a run's log: losses, layer errors or preference metrics, learning rate and gradient norm."""

from __future__ import annotations

import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Curve = tuple[list[float], list[float]]
_LAYER = re.compile(r"error_layer_(\d+)")


def curves(log: list[dict[str, Any]]) -> tuple[dict[str, Curve], dict[int, Curve], dict[str, Curve]]:
    """The curves of a log of the Trainer; a curve is (steps, values).

    Returns:
        (losses by name, layer errors by layer index, metrics of preferences by name). Names of an evaluation begin
        with "eval_".
    """
    losses: dict[str, Curve] = {}
    layers: dict[int, Curve] = {}
    preferences: dict[str, Curve] = {}
    for entry in log:
        for name, value in entry.items():
            if match := _LAYER.fullmatch(name):
                steps, values = layers.setdefault(int(match[1]), ([], []))
            elif name == "loss" or name.startswith(("loss_", "eval_loss")):
                steps, values = losses.setdefault(name, ([], []))
            elif name in ("margin", "accuracy", "eval_margin", "eval_accuracy"):
                steps, values = preferences.setdefault(name, ([], []))
            else:
                continue
            steps.append(entry["step"])
            values.append(value)
    return losses, dict(sorted(layers.items())), preferences


def objective_changes(log: list[dict[str, Any]]) -> dict[int, str]:
    """Steps after which the terms of the loss change, with the names of the new terms."""
    changes: dict[int, str] = {}
    entries = [entry for entry in log if "loss" in entry]
    before, last = None, None
    for index, entry in enumerate(entries):
        terms = {name.removeprefix("loss_") for name, value in entry.items() if name.startswith("loss_") and value}
        if before is not None and terms != before:
            # A log entry that averages over steps before and after a change has the terms of both.
            if last != index - 1 or not terms < before:
                last, step = index, entries[index - 1]["step"]
            changes[step] = " + ".join(sorted(terms)) or "one term"
        before = terms
    return changes


def draw_curves(log_file: Path) -> Path:
    """Plot the log of a run to curves.png beside it, and return the path.

    A dashed line marks a change of the objective. Losses before and after it cannot be compared.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    log = json.loads(log_file.read_text(encoding="utf-8"))
    losses, layers, preferences = curves(log)
    changes = objective_changes(log)
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    right = "right" if layers or preferences else "loss"
    panels: Any = figure.subplot_mosaic([["loss", right], ["rate", "norm"]], height_ratios=(2, 1))
    colours: dict[str, Any] = {}  # by training loss; the dashed curve of its evaluation has the same colour
    for name, curve in losses.items():
        own = name.removeprefix("eval_")
        label = "total" if own == "loss" else own.removeprefix("loss_")
        (line,) = panels["loss"].plot(
            *broken(curve, changes),
            label=label if own == name else f"{label}, evaluation",
            marker=_marker(curve),
            color=colours.get(own),
            linestyle="-" if own == name else "--",
        )
        colours.setdefault(own, line.get_color())
    panels["loss"].set(title="loss")
    _log_scale(panels["loss"])
    if losses:
        panels["loss"].legend()
    if layers:  # a colour bar, because a legend of many layers hides them
        low, high = min(layers), max(max(layers), min(layers) + 1)
        shades = ScalarMappable(Normalize(low, high), "viridis")
        for layer, curve in layers.items():
            panels["right"].plot(*curve, color=shades.cmap((layer - low) / (high - low)), marker=_marker(curve))
        figure.colorbar(shades, ax=panels["right"], label="after layer", ticks=MaxNLocator(integer=True))
        panels["right"].set(title="relative squared error, student to teacher")
        _log_scale(panels["right"])
    elif preferences:
        for name, curve in preferences.items():
            panels["right"].plot(*curve, label=name, marker=_marker(curve))
        panels["right"].set(title="preferences: chosen against rejected")
        panels["right"].legend()
    groups = dict.fromkeys(name for entry in log for name in entry if name.startswith("learning_rate_"))
    for name in (*(groups or ["learning_rate"]), "grad_norm"):
        panel, label = "norm" if name == "grad_norm" else "rate", name.removeprefix("learning_rate_")
        curve = [entry["step"] for entry in log if name in entry], [entry[name] for entry in log if name in entry]
        colour = None if name in groups else "tab:gray"
        panels[panel].plot(*curve, color=colour, label=label, marker=_marker(curve))
    panels["rate"].set(title="learning rate", xlabel="step")
    panels["norm"].set(title="gradient norm", xlabel="step")
    if groups:
        panels["rate"].legend()
    _log_scale(panels["norm"])
    for axes in panels.values():
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for step in changes:
            axes.axvline(step, color="black", linestyle="--", linewidth=1)
    for step, terms in changes.items():
        panels["loss"].annotate(
            f"new objective:\n{terms}",
            (step, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            va="bottom",
            fontsize=8,
            bbox={"color": "white", "alpha": 0.7, "pad": 1},
        )
    picture = log_file.with_name("curves.png")
    part = picture.with_name("curves.png.part")
    FigureCanvasAgg(figure).print_png(part)
    os.replace(part, picture)
    return picture


def broken(curve: Curve, changes: Iterable[int]) -> Curve:
    """The curve with a gap at each change."""
    steps, values = list[float](curve[0]), list(curve[1])
    for change in changes:
        at = bisect_right(steps, change)
        steps.insert(at, change)
        values.insert(at, math.nan)
    return steps, values


def _log_scale(axes: Any) -> None:
    """A logarithmic scale with plain numbers, if the positive values differ by more than a factor of two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = [y for line in axes.get_lines() for y in line.get_ydata() if y > 0]
    if not values or max(values) <= 2 * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if max(values) > 1000 * min(values) else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _marker(curve: Curve) -> str | None:
    return "." if len(curve[0]) <= 30 else None
