# SPDX-License-Identifier: Apache-2.0
"""The error of Gated KalmaNet's Chebyshev iteration relative to the exact ridge solution, by number of steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hmf.bench import machine
from hmf.bench.doctor import evaluate, relative_error
from hmf.errors import HmfError
from hmf.ops import gka, gka_solve
from hmf.ops.samples import Shape, sample

STEPS = (1, 2, 5, 10, 15, 20, 25, 30, 40, 60)
TENSORS = ("output", "gradient of q", "gradient of k")


@dataclass(frozen=True)
class Distance:
    """Relative distances (norm of the difference over the norm) from the exact solution's results in float64."""

    num_iter: int
    bound: float  # theoretical bound of the iteration's error
    float64: dict[str, float]
    float32: dict[str, float]


def bound(num_iter: int, ridge_strength: float) -> float:
    """2 r^n with r = (sqrt(kappa) - 1) / (sqrt(kappa) + 1): Chebyshev's error after n steps, in the energy norm.

    kappa = (1 + ridge_strength) / ridge_strength bounds the system's condition, because the covariance's largest
    eigenvalue is at most its Frobenius norm (Saad, Iterative Methods for Sparse Linear Systems, section 6.11).
    """
    root = ((1 + ridge_strength) / ridge_strength) ** 0.5
    return min(1.0, 2 * ((root - 1) / (root + 1)) ** num_iter)


def distances(shape: Shape, ridge_strength: float = 0.02, steps: Sequence[int] = STEPS) -> list[Distance]:
    """Compare the iteration with the exact solution on random tokens of `shape`: one entry per number of steps."""
    if ridge_strength <= 0:
        raise HmfError("--ridge-strength: must be above 0, because the exact solution may not exist otherwise")
    made = sample("gka", shape)

    def run(function, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
        return evaluate(
            functools.partial(function, ridge_strength=ridge_strength, **options), made, dtype, "cpu", gradients=True
        )

    exact = run(gka.reference, torch.float64, solve=gka_solve.solve_exact)

    def errors(num_iter: int, dtype: torch.dtype) -> dict[str, float]:
        near = run(gka.chunked, dtype, num_iter=num_iter)
        return {name: relative_error(near[name], exact[name]) for name in TENSORS}

    return [
        Distance(n, bound(n, ridge_strength), *(errors(n, x) for x in (torch.float64, torch.float32))) for n in steps
    ]


def print_distances(distances: Sequence[Distance], title: str) -> None:
    table = Table(title=title, title_justify="left", caption="\n".join(machine.lines()), caption_justify="left")
    table.add_column("num_iter", justify="right")
    for name in TENSORS:
        table.add_column(name, justify="right")
    table.add_column("output, float32", justify="right")
    table.add_column("bound", justify="right")
    for distance in distances:
        values = [*distance.float64.values(), distance.float32["output"], distance.bound]
        table.add_row(str(distance.num_iter), *(f"{value:.1e}" for value in values))
    Console(width=max(100, Console().width)).print(table)


def plot(distances: Sequence[Distance], title: str, path: Path) -> None:
    """Plot the distances over `num_iter` to `path`."""
    from matplotlib.figure import Figure

    steps = [distance.num_iter for distance in distances]
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for name in TENSORS:
        axes.plot(steps, [distance.float64[name] for distance in distances], marker="o", markersize=4, label=name)
    axes.plot(
        steps, [distance.float32["output"] for distance in distances], "--", color="tab:blue", label="output, float32"
    )
    axes.plot(
        steps, [distance.bound for distance in distances], color="0.6", linewidth=1, label="bound of the solution"
    )
    axes.axvline(30, color="0.8", linewidth=1, zorder=0)  # the published number of steps
    axes.set(yscale="log", xlabel="num_iter", ylabel="relative distance", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise HmfError(f"--plot: {path}: {error}; give a .png or .svg file in an existing directory") from None
