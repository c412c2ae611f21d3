# SPDX-License-Identifier: Apache-2.0
"""A run's log as a picture: losses, and how far each layer is from the teacher or answers are from each other."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

Curve = tuple[list[int], list[float]]
_LAYER = re.compile(r"error_layer_(\d+)")


def curves(log: list[dict[str, Any]]) -> tuple[dict[str, Curve], dict[int, Curve], dict[str, Curve]]:
    """(losses by name, layer errors by layer index, what preferences come to by name) of a log as the Trainer writes
    it; a curve is (steps, values)."""
    losses: dict[str, Curve] = {}
    layers: dict[int, Curve] = {}
    preferences: dict[str, Curve] = {}
    for entry in log:
        for name, value in entry.items():
            if found := _LAYER.fullmatch(name):
                steps, values = layers.setdefault(int(found[1]), ([], []))
            elif name == "loss" or name.startswith("loss_"):
                steps, values = losses.setdefault(name, ([], []))
            elif name in ("margin", "accuracy"):
                steps, values = preferences.setdefault(name, ([], []))
            else:
                continue
            steps.append(entry["step"])
            values.append(value)
    return losses, dict(sorted(layers.items())), preferences


def draw_curves(log_file: Path) -> Path:
    """Draw the log of a run beside it, as curves.png; returns the picture's path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    losses, layers, preferences = curves(json.loads(log_file.read_text(encoding="utf-8")))
    panels = 2 if layers or preferences else 1
    figure = Figure(figsize=(5.5 * panels, 4.2), layout="constrained")
    left, *others = figure.subplots(1, panels, squeeze=False)[0]
    for name, curve in losses.items():
        left.plot(*curve, label="total" if name == "loss" else name.removeprefix("loss_"), marker=_marker(curve))
    left.set(title="loss", xlabel="step", yscale="log")
    if losses:
        left.legend()
    if layers:  # a colour bar, because a legend of many layers hides them
        right = others[0]
        low, high = min(layers), max(max(layers), min(layers) + 1)
        shades = ScalarMappable(Normalize(low, high), "viridis")
        for layer, curve in layers.items():
            right.plot(*curve, color=shades.cmap((layer - low) / (high - low)), marker=_marker(curve))
        figure.colorbar(shades, ax=right, label="after layer", ticks=MaxNLocator(integer=True))
        right.set(title="student to teacher, relative squared error", xlabel="step", yscale="log")
    elif preferences:
        right = others[0]
        for name, curve in preferences.items():
            right.plot(*curve, label=name, marker=_marker(curve))
        right.set(title="chosen against rejected", xlabel="step")
        right.legend()
    for axes in (left, *others):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    picture = log_file.with_name("curves.png")
    part = picture.with_name("curves.png.part")
    FigureCanvasAgg(figure).print_png(part)
    os.replace(part, picture)
    return picture


def _marker(curve: Curve) -> str | None:
    return "." if len(curve[0]) <= 30 else None
