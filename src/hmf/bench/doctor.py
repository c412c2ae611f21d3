# SPDX-License-Identifier: Apache-2.0
"""Reports which implementation of each op runs on this machine, why, and whether it agrees with the reference.

The expected results are those of the reference on float64 copies of the same values, on the CPU. An error is the norm
of the difference divided by the norm of the expected tensor; the largest counts, over outputs, final states and, for
training, gradients of all inputs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hmf.bench import machine, workers
from hmf.errors import HmfError
from hmf.ops import dispatch
from hmf.ops.samples import Sample, Shape, flat, sample

# No length is a multiple of a chunk. Documents have several chunks, one token, or less than a chunk.
CASES = {
    "rows": Shape(batch=2, tokens=40, heads=2),
    "packed": Shape(lengths=(131, 1, 20), heads=2, with_state=True),
    "one token": Shape(batch=3, tokens=1, heads=2, with_state=True),
}
# A decode step has no gradient. On a GPU each case compiles kernels. Documents that start from states cover most of a
# backward pass; the tests have the other cases (`make test-gpu`).
TRAINING_CASES = {"cpu": ("rows", "packed"), "cuda": ("packed",)}
# bfloat16 rounds with a relative error of 2^-9 = 2e-3; on a GPU float32 products may round to TF32, 2^-11 = 5e-4.
TOLERANCES = {
    "cpu": {torch.float32: 1e-4, torch.bfloat16: 2e-2},
    "cuda": {torch.float32: 5e-3, torch.bfloat16: 2e-2},
}


@dataclass
class Check:
    """The check of one op on one device for one use.

    Attributes:
        version, reason: summary of `chosen` over all dtypes.
        errors: largest relative error by dtype.
        worst: tensor and case of that error by dtype.
    """

    op: str
    device: str
    use: str  # inference | training
    version: str | None
    reason: str
    errors: dict[str, float] = field(default_factory=dict)
    worst: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    chosen: dict[str, tuple[str, str]] = field(default_factory=dict)  # dtype -> version, reason


@dataclass
class Report:
    checks: list[Check]
    notes: list[str]
    seconds: float

    @property
    def passed(self) -> bool:
        return not any(check.problem for check in self.checks)

    def json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "notes": self.notes,
            "hardware": machine.hardware(),
            "versions": machine.versions(),
            "seconds": round(self.seconds, 1),
        }


def examine(progress: Callable[[str], None] = lambda line: None) -> Report:
    """Check every op on every kind of device of this machine. `progress` is called with a line for each check.

    GPU kernels are compiled first. Each compilation uses a CPU core, so several processes compile in parallel.
    """
    start = time.perf_counter()
    uses = [(op, use) for op in dispatch.ops() for use in ("inference", "training")]
    with contextlib.ExitStack() as stack:
        on_gpu: dict[tuple[str, str], list[Future[Check]]] = {}
        noted: Future[list[str]] | None = None
        if torch.cuda.is_available():
            at_once = min(len(uses) * len(TOLERANCES["cuda"]), max(1, (os.cpu_count() or 2) - 1))
            pool = stack.enter_context(ProcessPoolExecutor(at_once, workers.prepare(), _prepare_worker))
            noted = pool.submit(_notes)  # imports kernel libraries, which takes seconds
            for job in sorted(uses, key=lambda job: job[1] != "training"):  # training compiles most
                on_gpu[job] = [pool.submit(_check_on_gpu, *job, dtype) for dtype in TOLERANCES["cuda"]]
        stack.enter_context(_one_thread())
        checks = []
        for op in dispatch.ops():
            progress(f"{op}: reference")
            expected = _expected(op, TRAINING_CASES["cpu"])
            for use in ("inference", "training"):
                progress(f"{op}: {use} on cpu")
                checks.append(_joined([_check(op, "cpu", use, expected, dtype) for dtype in TOLERANCES["cpu"]]))
        for done, (job, parts) in enumerate(on_gpu.items()):
            progress(f"GPU kernels, {done} of {len(on_gpu)} done (the first run compiles them, about a minute)")
            checks.append(_result(*job, parts))
        notes = _notes() if noted is None else _noted(noted)
    checks.sort(key=lambda check: (check.op, check.device, check.use))
    return Report(checks, notes, time.perf_counter() - start)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread during the block: the tensors are small, and other processes compile at the same time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _prepare_worker() -> None:
    """Use one thread and discard the output, because kernel libraries print warnings in every process."""
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _check_on_gpu(op: str, use: str, dtype: torch.dtype) -> Check:
    """Run in a worker, with one variant of every autotuned kernel."""
    cases = TRAINING_CASES["cuda"] if use == "training" else ()
    with one_variant():
        return _check(op, "cuda", use, _expected(op, cases), dtype)


def _result(op: str, use: str, parts: Sequence[Future[Check]]) -> Check:
    """The merged checks of the workers for one op and use, over all dtypes. A failed check if a worker died."""
    try:
        return _joined([part.result() for part in parts])
    except BrokenProcessPool:  # the whole pool is then unusable
        return Check(op, "cuda", use, None, "", problem="not checked: a process that runs GPU kernels died")


def _noted(notes: Future[list[str]]) -> list[str]:
    try:
        return notes.result()
    except BrokenProcessPool:  # the checks report this error
        return []


def _expected(op: str, training_cases: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """The results of the reference in each case, with gradients in `training_cases`."""
    reference = dispatch.implementations(op)["reference"].function
    return {
        case: evaluate(reference, sample(op, shape), torch.float64, "cpu", case in training_cases)
        for case, shape in CASES.items()
    }


@contextlib.contextmanager
def one_variant() -> Iterator[None]:
    """During the block Triton's autotuner uses only the variant of each kernel with the fewest stages, then warps.

    All variants have the same source, and tuning would take minutes for sizes that are not used in practice. A compiler
    error in another variant is not found here; `make test-gpu` runs the tuned kernels at a realistic size.
    """
    from triton.runtime.autotuner import Autotuner

    every = Autotuner.prune_configs

    def smallest(tuner, kwargs):
        return [min(every(tuner, kwargs), key=lambda variant: (variant.num_stages, variant.num_warps))]

    Autotuner.prune_configs = smallest
    try:
        yield
    finally:
        Autotuner.prune_configs = every


def _check(op: str, device: str, use: str, expected: dict[str, dict], dtype: torch.dtype) -> Check:
    training, name = use == "training", _name(dtype)
    check = Check(op, device, use, None, "")
    try:
        chosen, reason = dispatch.choose(op, device, training, dtype)
    except HmfError as error:
        check.problem = str(error)
        return check
    check.version, check.reason, check.chosen = chosen.version, reason, {name: (chosen.version, reason)}
    for case in TRAINING_CASES[device] if training else CASES:
        try:
            results = evaluate(chosen.function, sample(op, CASES[case]), dtype, device, training)
        except Exception as error:  # any error of a kernel is reported
            check.problem = f"{name}, {case}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return check
        for tensor, value in results.items():
            distance = relative_error(value, expected[case][tensor])
            if not distance <= check.errors.get(name, -1.0):  # NaN counts as larger
                check.errors[name], check.worst[name] = distance, f"{tensor}, {case}"
    tolerance = allowed(device, dtype, training)
    if not check.errors[name] <= tolerance:
        worst = f"{check.worst[name]} has a relative error of {check.errors[name]:.1e}"
        check.problem = f"{name}: {worst} (at most {tolerance:.0e})"
    return check


def allowed(device: str, dtype: torch.dtype, gradients: bool) -> float:
    """The largest relative error that passes. It is twice as large for gradients on a GPU, because kernels store the
    tensors for the backward in the tokens' dtype."""
    return TOLERANCES[device][dtype] * (2 if gradients and device == "cuda" else 1)


def _joined(parts: Sequence[Check]) -> Check:
    """Merge the checks of several dtypes into one."""
    check = parts[0]
    for part in parts[1:]:
        check.chosen |= part.chosen
        check.errors |= part.errors
        check.worst |= part.worst
        check.problem = check.problem or part.problem
    if check.chosen:
        versions, reasons = ({name: pair[n] for name, pair in check.chosen.items()} for n in (0, 1))
        check.version, check.reason = _summary(versions), _summary(reasons)
    return check


def _summary(by_dtype: dict[str, str]) -> str:
    """The value that all dtypes share, or the value of each dtype."""
    values = set(by_dtype.values())
    return values.pop() if len(values) == 1 else "; ".join(f"{value} ({dtype})" for dtype, value in by_dtype.items())


def evaluate(
    function: Callable, made: Sample, dtype: torch.dtype, device: str, gradients: bool
) -> dict[str, torch.Tensor]:
    """The results of `function` for a sample, by name, in float64 on the CPU: output, final states and, with
    `gradients`, the gradients of a fixed random combination of these with respect to all tensors."""
    tensors = {name: x.detach().requires_grad_(gradients) for name, x in made.tensors(dtype, device).items()}
    with torch.set_grad_enabled(gradients):
        results = flat(made.call(function, tensors))
    names = ["output", *(f"final state {n}" for n in range(1, len(results)))]
    tensors_by_name = dict(zip(names, results, strict=True))
    if gradients:
        generator = torch.Generator().manual_seed(1)
        # Values that bfloat16 represents exactly, so that all dtypes use the same combination.
        weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in results]
        grads = torch.autograd.grad(results, list(tensors.values()), weights, allow_unused=True, materialize_grads=True)
        tensors_by_name |= {f"gradient of {name}": grad for name, grad in zip(tensors, grads, strict=True)}
    return {name: x.detach().to("cpu", torch.float64) for name, x in tensors_by_name.items()}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference divided by the norm of `expected`; infinite if the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _notes() -> list[str]:
    notes = []
    if forced := os.environ.get("HMF_OPS"):
        notes.append(
            f"HMF_OPS={forced} selects the implementation of every op that has it; unset it for the default choice"
        )
    for op in dispatch.ops():
        by_dtype = {_name(dtype): dispatch.known_bad_backward(op, dtype) for dtype in TOLERANCES["cuda"]}
        for reason in dict.fromkeys(filter(None, by_dtype.values())):
            notes.append(f"known bad: {op}: {reason}")
    return notes


def _reasons(checks: Sequence[Check]) -> list[str]:
    """Why each version runs: a line for each reason, with its ops."""
    uses: dict[tuple[str, str], dict[str, list[str]]] = {}
    for check in checks:
        if check.reason:
            uses.setdefault((check.device, check.reason), {}).setdefault(check.op, []).append(check.use)
    return [
        f"on {device}: {', '.join(op if len(of) > 1 else f'{op} ({of[0]})' for op, of in ops.items())}: {reason}"
        for (device, reason), ops in uses.items()
    ]


def print_report(report: Report) -> None:
    title = "Errors against the reference, relative to its norm: outputs, states and, in training, gradients"
    table = Table(title=title, title_justify="left", caption="\n".join(machine.lines()), caption_justify="left")
    for name in ("op", "device", "for", "runs"):
        table.add_column(name, no_wrap=True)
    for dtype in TOLERANCES["cpu"]:
        table.add_column(_name(dtype), justify="right")
    table.add_column("verdict")
    for check in report.checks:
        errors = (check.errors.get(_name(dtype)) for dtype in TOLERANCES["cpu"])
        table.add_row(
            check.op,
            check.device,
            check.use,
            check.version or "nothing",
            *("" if error is None else f"{error:.0e}" for error in errors),
            "wrong" if check.problem else "ok",
        )
    console = Console(width=max(100, Console().width))
    console.print(table)
    failures = [check for check in report.checks if check.problem]
    problems = [f"wrong: {check.op}, {check.use} on {check.device}: {check.problem}" for check in failures]
    for note in [*_reasons(report.checks), *report.notes, *problems]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    names = ", ".join(sorted({check.op for check in failures}))
    verdict = f"wrong here: {names}" if failures else "every op equals its reference here"
    console.print(f"{verdict} ({report.seconds:.0f} s)", highlight=False)
