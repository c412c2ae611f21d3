# SPDX-License-Identifier: Apache-2.0
"""Memory and throughput in the report: planned from the config, and measured by `hmf bench serving`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

from hmf.errors import HmfError
from hmf.planning import serving as planner

from . import charts, records
from .blocks import Block, Cell, Note, Table, Text
from .evidence import Evidence
from .licence import NOT_STATED
from .suites import MISSING


def planned(config: Any, evidence: Evidence, gpu: str) -> Iterator[Block]:
    """Memory and throughput as computed by `hmf plan`. config: the model's config; None if there is no model yet."""
    if config is None:
        yield Note("Not planned: the run folder has no checkpoint yet.")
        return
    longest = config.max_position_embeddings
    contexts = [longest >> halvings for halvings in range(7, -1, -1) if longest >> halvings >= 128] or [longest]
    try:
        plans = planner.plans(config, gpu)
    except HmfError as error:
        yield Note(f"Not planned for {gpu}: {str(error).removeprefix('--gpu: ')}")
        return
    where = planner.devices(plans[0])
    yield Text("Computed, not measured")
    yield Note(
        f"From the config alone, for {where} with at most {plans[0].max_num_seqs:,} sequences: "
        f"hmf plan {evidence.model} --gpu {gpu} --context {longest}"
    )
    size, unit = (2**30, "GiB") if longest > 2**14 else (2**20, "MiB")
    measures: list[tuple[str, str, str, Callable[[Any, int], float]]] = [
        ("cache", "Cache of a sequence", unit, lambda plan, n: sum(plan.sequence_bytes(n)) * plan.ranks / size),
        ("fit", "Sequences at once", "sequences", lambda plan, n: _fit(plan, n)),
        ("rate", "Decode throughput", "tokens/s", lambda plan, n: plan.decode_rate(_fit(plan, n), n)),
    ]
    for key, title, label, value in measures:
        series = []
        for number, plan in enumerate(reversed(plans)):  # if there are two, the base comes first
            fitting = [n for n in contexts if plan.sequences(n)]
            name = planner.title(plan).partition(",")[0]
            values = [value(plan, n) for n in fitting]
            series.append(charts.Series(name, fitting, values, colour=number, dash=number))
        yield charts.lines(
            f"plan-{key}",
            f"{title}, {where}",
            series,
            "tokens of context",
            label,
            log_x=True,
            log_y=True,
            source="model/config.json",
            computed=True,
            x_ticks=contexts[::-2][::-1],
            x_shown=charts.tokens,
        )


def measured(evidence: Evidence) -> Iterator[Block]:
    """Throughput as measured by `hmf bench serving`."""
    yield Text("Measured")
    if not evidence.serving:
        yield Note(f"Throughput and time to first token: {MISSING}. hmf bench serving --json-file writes them.")
    for name, serving in evidence.serving.items():
        hardware = ", ".join(f"{device}: {text}" for device, text in serving.hardware.items()) or NOT_STATED
        for part, title, unit, scale in (
            ("decode_tokens_per_second", "Decode throughput", "tokens/s", 1.0),
            ("mean_ttft", "Mean time to first token", "ms", 1e3),
        ):
            points: dict[str, dict[int, float]] = {}
            for row in serving.rows:
                label = row.model if row.filled else f"{row.model}, {row.sequences} sequences"
                points.setdefault(label, {})[row.context] = getattr(row, part) * scale
            series = [
                charts.Series(label, sorted(curve), [curve[x] for x in sorted(curve)], colour=number, dash=number)
                for number, (label, curve) in enumerate(points.items())
            ]
            ticks = sorted({row.context for row in serving.rows})
            yield charts.lines(
                f"{charts.safe(name)}-{part}",
                f"{title}, measured",
                series,
                "tokens of context",
                unit,
                source=name,
                log_x=True,
                x_ticks=ticks,
                x_shown=charts.tokens,
                notes=[f"On {hardware}."],
            )
        yield Table(
            f"Rows of {name}",
            ["model", "context", "sequences", "decode tokens/s", "ratio", "mean TTFT, ms", "ratio"],
            [
                [
                    Cell(row.model),
                    Cell(f"{row.context:,}"),
                    Cell(f"{row.sequences:,}{' (full)' * row.filled}"),
                    Cell(f"{row.decode_tokens_per_second:,.1f}", quote(name)),
                    Cell(_ratio(row.decode_ratio)),
                    Cell(f"{row.mean_ttft * 1e3:,.1f}", quote(name)),
                    Cell(_ratio(row.ttft_ratio)),
                ]
                for row in serving.rows
            ],
        )
        others = serving.model_dump(mode="json", exclude={"rows"})
        yield Text(records.shown_json(others), kind="code", title=f"Hardware, options and versions of {name}")


def _fit(plan: Any, context: int) -> int:
    return min(plan.sequences(context), plan.max_num_seqs)


def _ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}×"
