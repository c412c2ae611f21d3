# SPDX-License-Identifier: Apache-2.0
"""A run's log as a picture: losses, and how far each layer of the student is from the teacher."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

Curve = tuple[list[int], list[float]]
_LAYER = re.compile(r"error_layer_(\d+)")


def curves(log: list[dict[str, Any]]) -> tuple[dict[str, Curve], dict[int, Curve]]:
    """(losses by name, layer errors by layer index) of a log as the Trainer writes it; a curve is (steps, values)."""
    losses: dict[str, Curve] = {}
    layers: dict[int, Curve] = {}
    for entry in log:
        for name, value in entry.items():
            if found := _LAYER.fullmatch(name):
                steps, values = layers.setdefault(int(found[1]), ([], []))
            elif name == "loss" or name.startswith("loss_"):
                steps, values = losses.setdefault(name, ([], []))
            else:
                continue
            steps.append(entry["step"])
            values.append(value)
    return losses, dict(sorted(layers.items()))


def draw_curves(log_file: Path) -> Path:
    """Draw the log of a run beside it, as curves.png; returns the picture's path."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses, layers = curves(json.loads(log_file.read_text(encoding="utf-8")))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in losses.items():
        left.plot(*curve, label=name.removeprefix("loss_") if name != "loss" else "total", marker=".")
    left.set(title="loss", xlabel="step", yscale="log")
    colours = colormaps["viridis"].resampled(max(2, len(layers)))
    for place, (layer, curve) in enumerate(layers.items()):
        right.plot(*curve, label=str(layer), marker=".", color=colours(place))
    right.set(title="student to teacher, relative squared error", xlabel="step", yscale="log")
    for axes, what, title in ((left, losses, None), (right, layers, "after layer")):
        axes.grid(alpha=0.3)
        if what:
            axes.legend(title=title, ncols=1 + len(what) // 12, fontsize="small")
    picture = log_file.with_name("curves.png")
    part = picture.with_name("curves.png.part")
    FigureCanvasAgg(figure).print_png(part)
    os.replace(part, picture)
    return picture
