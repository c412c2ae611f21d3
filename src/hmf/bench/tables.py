# SPDX-License-Identifier: Apache-2.0
"""The rows of `hmf bench serving`, as a table for a terminal and as the two tables of a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hmf.bench import machine
from hmf.planning import serving as planner

from .engine import Measured
from .throughput import Run, Subject

PARTS = {
    "prefill": "prefill_tokens_per_second",
    "ttft": "mean_ttft",
    "decode": "decode_tokens_per_second",
    "capacity": "capacity_tokens",
}


def rows(subjects: Sequence[Subject], measured: Sequence[Measured | None], run: Run) -> list[dict[str, Any]]:
    """One row per load and measured model. For models without a measurement, `measured` has None or is shorter.

    Ratios are relative to the first of `subjects`, and None if it has no row. bound_share: the rate at which decoding
    read weights and caches, divided by the GPU's copy rate.
    """
    result = []
    for index, asked in enumerate(run.loads):
        first: dict[str, Any] | None = None
        for one, measurement in zip(subjects, measured, strict=False):
            if measurement is None:
                continue
            load = one.loads[index]
            prefilled = load.prefilled or load.sequences
            decode = run.output * load.sequences / min(measurement.decode[index])
            share = None
            if one.plan and measurement.copy_rate:
                read = one.plan.step_bytes(load.sequences, load.tokens + run.output // 2)
                share = decode / load.sequences * read / measurement.copy_rate
            row: dict[str, Any] = {
                "model": one.name,
                "kind": one.kind,
                "context": load.tokens,
                "sequences": load.sequences,
                "filled": not asked.sequences,
                "prefilled_sequences": prefilled,
                "output": run.output,
                "prefill_seconds": measurement.prefill[index],
                "decode_seconds": measurement.decode[index],
                "ttft_seconds": measurement.ttft[index],
                "prefill_tokens_per_second": load.tokens * prefilled / min(measurement.prefill[index]),
                "mean_ttft": min(measurement.ttft[index]),
                "decode_tokens_per_second": decode,
                "bound_share": share,
                "capacity_tokens": measurement.capacity,
                "copy_bytes_per_second": measurement.copy_rate,
                "start_seconds": measurement.start,
                "cuda_graphs": measurement.cuda_graphs,
                "backends": measurement.backends,
            }
            if one is subjects[0]:
                first = row
            row |= {f"{part}_ratio": first and row[figure] / first[figure] for part, figure in PARTS.items()}
            result.append(row)
    return result


def print_rows(table_rows: list[dict[str, Any]], title: str, base: str) -> None:
    """base: the model whose ratios are 1."""
    models = {row["model"]: row for row in table_rows}
    notes = [
        f"{escape(name)}: {row['kind']}; CUDA graphs {row['cuda_graphs']}; {row['backends']}; started in "
        f"{row['start_seconds']:.0f} s"
        for name, row in models.items()
    ]
    if any(row["prefilled_sequences"] != row["sequences"] for row in table_rows):
        notes.append(f"prefill and time to first token (TTFT): as many sequences as {escape(base)} holds")
    if rate := table_rows[0]["copy_bytes_per_second"]:
        notes.append(f"of the bound: bytes that a decode step must move, at the copy rate of {rate / 1e12:.2f} TB/s")
    caption = "\n".join([*notes, *machine.lines()])
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("context")
    table.add_column("model")
    for name in (
        "prefill tok/s",
        "ratio",
        "mean TTFT ms",
        "ratio",
        "decode tok/s",
        "ratio",
        "step ms",
        "of the bound",
        "KV tokens",
        "ratio",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row, after in zip(table_rows, [*table_rows[1:], None], strict=True):
        share = row["bound_share"]
        ratios = iter([_ratio(row, part, base) for part in PARTS])
        table.add_row(
            f"{planner.short(row['context'])} x {row['sequences']}",
            escape(row["model"]),
            f"{row['prefill_tokens_per_second']:,.0f}",
            next(ratios),
            f"{row['mean_ttft'] * 1e3:,.0f}",
            next(ratios),
            f"{row['decode_tokens_per_second']:,.1f}",
            next(ratios),
            f"{min(row['decode_seconds']) / row['output'] * 1e3:.2f}",
            f"{share:.0%}" if share else "-",
            f"{row['capacity_tokens']:,}",
            next(ratios),
            end_section=after is None or _load(after) != _load(row),
        )
    Console(width=max(160, Console().width)).print(table)


def _load(row: dict[str, Any]) -> str:
    return planner.short(row["context"]) + ("" if row["filled"] else f" × {row['sequences']}")


def _ratio(row: dict[str, Any], part: str, base: str) -> str:
    if row["model"] == base:
        return "1"
    ratio = row[f"{part}_ratio"]
    return "-" if ratio is None else f"{ratio:.2f}x"


def card(table_rows: list[dict[str, Any]], base: str, ranks: int, hardware: Mapping[str, str] | None = None) -> str:
    """The two tables of a model card in Markdown: decode throughput and mean time to first token, by context.

    Hybrids come first and `base` last, as on the published cards. hardware: the measured hardware; None: this machine.
    """
    hardware = machine.hardware() if hardware is None else hardware
    gpus = [text.split(",")[0] for device, text in hardware.items() if device.startswith("cuda")][:ranks]
    where = f"{len(gpus)}× {gpus[0]} (TP={ranks})" if gpus else hardware.get("cpu", "hardware that is not stated")
    filled = all(row["filled"] for row in table_rows)
    cache = "with a saturated KV cache" if filled else "of the numbers of sequences that the columns name"
    first = "the Transformer" if table_rows[0].get("kind", "Transformer").startswith("Transformer") else base
    sizes = f"at {first}'s saturated batch size" if filled else "of the same sequences"
    return "\n".join(
        [
            f"Sustained decode throughput (tokens/s) on {where}, measured during pure decode {cache}. "
            "Benchmarked with random data (no prefix-caching benefits).",
            "",
            *_by_context(table_rows, base, "decode_tokens_per_second", "decode", "{:,.0f}", 1),
            "",
            f"Mean TTFT {sizes}:",
            "",
            *_by_context(table_rows, base, "mean_ttft", "ttft", "{:,.0f} ms", 1e3),
        ]
    )


def _by_context(
    table_rows: list[dict[str, Any]], base: str, figure: str, part: str, shown: str, scale: float
) -> list[str]:
    columns = list(dict.fromkeys(map(_load, table_rows)))
    cells: dict[str, dict[str, str]] = {}
    for row in table_rows:
        ratio = row[f"{part}_ratio"]
        text = shown.format(row[figure] * scale)
        beside = "" if row["model"] == base or ratio is None else f" ({ratio:.2f}×)"
        cells.setdefault(row["model"], {})[_load(row)] = text + beside
    order = sorted(cells, key=lambda model: model == base)
    return [
        f"| Model | {' | '.join(columns)} |",
        f"|{'---|' * (1 + len(columns))}",
        *(f"| {model} | {' | '.join(cells[model].get(name, '-') for name in columns)} |" for model in order),
    ]
