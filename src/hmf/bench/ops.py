# SPDX-License-Identifier: Apache-2.0
"""Time of every op's versions, forward and backward, and how many times faster than the first version each is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hmf.bench import machine
from hmf.errors import HmfError, unknown_name
from hmf.ops import dispatch
from hmf.ops.samples import Sample, Shape, flat, sample

# At the full size, or the first run of an op in a process would pay for all the memory that later ones find there:
# twice the time, for a reference.
WARM_UP = 2
LONGEST = 10.0  # seconds of timed runs, of which there is one in any case; the warm-up is one run if it takes as long


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat; `forward` keeps what the backward needs."""

    op: str
    version: str
    forward: list[float]
    backward: list[float]

    def speedup(self, baseline: Timing) -> tuple[float, float, float]:
        """How many times faster than `baseline`: forward, backward, and one after the other, by medians."""
        parts = [[statistics.median(x) for x in (timing.forward, timing.backward)] for timing in (baseline, self)]
        (slow_forward, slow_backward), (forward, backward) = parts
        both = (slow_forward + slow_backward) / (forward + backward)
        return slow_forward / forward, slow_backward / backward, both


def available(op: str, device: str) -> list[str]:
    """Versions of `op` that can run on `device`, slowest first."""
    fast = dispatch.choose(op, device, False, torch.float32)[0].version == "fast"
    known = dispatch.implementations(op)
    return [version for version in dispatch.VERSIONS if version in known and (version != "fast" or fast)]


def measure(op: str, version: str, shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> Timing:
    function, made = dispatch.implementations(op)[version].function, sample(op, shape)
    _repeated(function, made, dtype, device, WARM_UP)
    times = _repeated(function, made, dtype, device, repeats)
    return Timing(op, version, [forward for forward, _ in times], [backward for _, backward in times])


def _repeated(function, made: Sample, dtype: torch.dtype, device: str, repeats: int) -> list[tuple[float, float]]:
    """`_run` until there are `repeats` or all took `LONGEST`."""
    times: list[tuple[float, float]] = []
    while len(times) < repeats and sum(map(sum, times)) < LONGEST:
        times.append(_run(function, made, dtype, device))
    return times


def _run(function, made: Sample, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Seconds of one forward and of its backward for the output and the final states."""
    tensors = {name: x.requires_grad_() for name, x in made.tensors(dtype, device).items()}
    start = _now(device)
    results = flat(made.call(function, tensors))
    middle = _now(device)
    torch.autograd.backward(results, [torch.ones_like(x) for x in results])
    return middle - start, _now(device) - middle


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def run(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    repeats: int = 5,
    ops: Sequence[str] = (),
    versions: Sequence[str] = (),
) -> list[Timing]:
    """Timings of `ops` (empty: all) in those of their `versions` (empty: all) that run on `device`."""
    if device not in ("cpu", "cuda"):
        raise HmfError(f"--device: {unknown_name('device', device, ('cpu', 'cuda'))}")
    if device == "cuda" and not torch.cuda.is_available():
        raise HmfError("--device cuda: PyTorch sees no GPU; leave --device out")
    for option, names, known in (("--ops", ops, dispatch.ops()), ("--versions", versions, dispatch.VERSIONS)):
        for name in names:
            if name not in known:
                raise HmfError(f"{option}: {unknown_name(option[2:-1], name, known)}")
    chosen = [
        (op, version)
        for op in ops or dispatch.ops()
        for version in available(op, device)
        if not versions or version in versions
    ]
    found = []
    with tqdm(chosen, unit="version", disable=None) as bar:
        for op, version in bar:
            bar.set_description(f"{op}: {version}")
            found.append(measure(op, version, shape, dtype, device, repeats))
    return found


def rows(timings: Sequence[Timing]) -> list[dict]:
    """One row a timing, in milliseconds, with its ratios to the first version of its op."""
    first: dict[str, Timing] = {}
    result = []
    for timing in timings:
        baseline = first.setdefault(timing.op, timing)
        forward, backward, both = timing.speedup(baseline)
        result.append({
            "op": timing.op, "version": timing.version, "repeats": len(timing.forward),
            "forward_ms": _milliseconds(timing.forward), "backward_ms": _milliseconds(timing.backward),
            "baseline": baseline.version, "forward_speedup": forward, "backward_speedup": backward, "speedup": both,
        })  # fmt: skip
    return result


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return {"min": min(seconds) * 1e3, "median": statistics.median(seconds) * 1e3}


def print_rows(table_rows: list[dict], title: str) -> None:
    table = Table(title=title, title_justify="left", caption="\n".join(machine.lines()), caption_justify="left")
    for name in ("op", "version"):
        table.add_column(name)
    for name in ("forward ms", "backward ms", "forward ratio", "backward ratio", "both", "repeats"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, after in zip(table_rows, [*table_rows[1:], None], strict=True):
        first = row["version"] == row["baseline"]
        table.add_row(
            row["op"], row["version"],
            *("{min:,.1f} / {median:,.1f}".format(**row[f"{part}_ms"]) for part in ("forward", "backward")),
            *("1" if first else f"{row[key]:.1f}x" for key in ("forward_speedup", "backward_speedup", "speedup")),
            str(row["repeats"]),
            end_section=after is None or after["op"] != row["op"],
        )  # fmt: skip
    Console(width=max(125, Console().width)).print(table)
