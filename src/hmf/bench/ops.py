# SPDX-License-Identifier: Apache-2.0
"""Times of every op's versions, forward and backward, and their speed-ups over the first version.

A version that dispatch does not choose on this machine is not run. Its row states the reason, as does the row of a
version that fails.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from hmf.bench import machine
from hmf.errors import HmfError, require_names, unknown_name
from hmf.ops import dispatch
from hmf.ops.samples import Sample, Shape, flat, sample

PLAIN = ("reference", "chunked")  # versions without GPU kernels
# Warm-up runs at the full size. Without them, the first timed run would include the allocation of memory, which doubles
# the time of a reference.
WARM_UP = 2
LONGEST = 10.0  # seconds after which no further timed run starts; there is at least one timed run and one warm-up run


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat. `forward` stores activations for the backward, unless the backward is not timed.

    A list is empty if it was not timed; `reason` then states why, unless the caller disabled it. `failed`: the run
    raised an error.
    """

    op: str
    version: str
    forward: list[float]
    backward: list[float]
    reason: str | None = None
    failed: bool = False

    def speedup(self, baseline: Timing) -> list[float | None]:
        """Speed-ups over `baseline` of forward, backward and both, by medians; None if one of the two has no time."""
        slow, quick = ([_median(timing.forward), _median(timing.backward)] for timing in (baseline, self))
        return [_ratio(*pair) for pair in (*zip(slow, quick, strict=True), (_sum(slow), _sum(quick)))]


def _median(seconds: list[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


def _sum(parts: list[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _ratio(slow: float | None, quick: float | None) -> float | None:
    return None if slow is None or quick is None else slow / quick


def measure(
    op: str, version: str, shape: Shape, dtype: torch.dtype, device: str, repeats: int, backward: bool = True
) -> Timing:
    """Time one version, if dispatch allows it on this machine."""
    reason = None
    if version not in PLAIN:
        if refused := dispatch.not_fast(op, device, False, dtype, version=version):
            return Timing(op, version, [], [], refused)
        if backward and (reason := dispatch.not_fast(op, device, True, dtype, version=version)):
            backward, reason = False, f"forward only: {reason}"
    function, made = dispatch.implementations(op)[version].function, sample(op, shape)
    try:
        _repeated(function, made, dtype, device, WARM_UP, backward)
        times = _repeated(function, made, dtype, device, repeats, backward)
    except Exception as error:  # for example a kernel that does not compile; the other versions still run
        return Timing(op, version, [], [], " ".join(f"{type(error).__name__}: {error}".split()), failed=True)
    return Timing(op, version, [forward for forward, _ in times], [after for _, after in times if backward], reason)


def _repeated(
    function, made: Sample, dtype: torch.dtype, device: str, repeats: int, backward: bool
) -> list[tuple[float, float]]:
    """Call `_run` `repeats` times, or until the runs took `LONGEST` seconds."""
    times: list[tuple[float, float]] = []
    while len(times) < repeats and sum(map(sum, times)) < LONGEST:
        times.append(_run(function, made, dtype, device, backward))
    return times


def _run(function, made: Sample, dtype: torch.dtype, device: str, backward: bool) -> tuple[float, float]:
    """Seconds of one forward, and of the backward from its output and final states."""
    tensors = {name: x.requires_grad_(backward) for name, x in made.tensors(dtype, device).items()}
    start = _now(device)
    results = flat(made.call(function, tensors))
    middle = _now(device)
    if backward:
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
    backward: bool = True,
) -> list[Timing]:
    """Timings of `ops` (empty: all) in their `versions` (empty: all; on a CPU without GPU kernels)."""
    if device not in ("cpu", "cuda"):
        raise HmfError(f"--device: {unknown_name('device', device, ('cpu', 'cuda'))}")
    if device == "cuda" and not torch.cuda.is_available():
        raise HmfError("--device cuda: PyTorch finds no GPU; omit --device")
    for option, names, known in (("--ops", ops, dispatch.ops()), ("--versions", versions, dispatch.all_versions())):
        require_names(option, option[2:-1], names, known)
    chosen = [
        (op, version)
        for op in ops or dispatch.ops()
        for version in dispatch.all_versions()
        if version in dispatch.implementations(op)
        and (version in versions if versions else version in PLAIN or device == "cuda")
    ]
    timings = []
    with tqdm(chosen, unit="version", disable=None) as bar:
        for op, version in bar:
            bar.set_description(f"{op}: {version}")
            timings.append(measure(op, version, shape, dtype, device, repeats, backward))
    return timings


def rows(timings: Sequence[Timing]) -> list[dict]:
    """One row per timing, in milliseconds, with speed-ups over the first version of its op that has a time."""
    first: dict[str, Timing] = {}
    result = []
    for timing in timings:
        baseline = first.setdefault(timing.op, timing) if timing.forward else first.get(timing.op, timing)
        forward, backward, both = timing.speedup(baseline)
        result.append(
            {
                "op": timing.op,
                "version": timing.version,
                "repeats": len(timing.forward),
                "forward_ms": _milliseconds(timing.forward),
                "backward_ms": _milliseconds(timing.backward),
                "baseline": baseline.version,
                "forward_speedup": forward,
                "backward_speedup": backward,
                "speedup": both,
                "reason": timing.reason,
            }
        )
    return result


def _milliseconds(seconds: list[float]) -> dict[str, float] | None:
    return {"min": min(seconds) * 1e3, "median": statistics.median(seconds) * 1e3} if seconds else None


def print_rows(table_rows: list[dict], title: str) -> None:
    reasons = [f"{row['op']} {row['version']}: {row['reason']}" for row in table_rows if row["reason"]]
    caption = "\n".join([*map(escape, reasons), *machine.lines()])
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in ("op", "version"):
        table.add_column(name)
    for name in ("forward ms", "backward ms", "forward ratio", "backward ratio", "both", "repeats"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, after in zip(table_rows, [*table_rows[1:], None], strict=True):
        times = [row["forward_ms"], row["backward_ms"]]
        ratios = [row[key] for key in ("forward_speedup", "backward_speedup", "speedup")]
        first = row["version"] == row["baseline"]
        table.add_row(
            row["op"],
            row["version"],
            *("-" if time is None else "{min:,.1f} / {median:,.1f}".format(**time) for time in times),
            *("-" if ratio is None else "1" if first else f"{ratio:.1f}x" for ratio in ratios),
            str(row["repeats"]),
            end_section=after is None or after["op"] != row["op"],
        )
    Console(width=max(125, Console().width)).print(table)
