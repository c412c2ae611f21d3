# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of a Stage-1 step in one fused model, compared with a teacher and a student as two models.

Every variant computes the same loss and the same gradients from the same random weights, in its own process.
"""

from __future__ import annotations

import copy
import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from hmf.bench import machine
from hmf.config.pattern import Pattern
from hmf.config.strict import parse_yaml
from hmf.errors import HmfError, unknown_name
from hmf.model.convert import drop_teacher, hybridise
from hmf.model.values import changed
from hmf.priming.objectives import Stage1Objective, train_only_mixers
from hmf.priming.stage0 import initialise
from hmf.training.run import compile_layers, narrow_frozen

WAYS = {
    "two models": "each called in the ordinary way: whole logits, activations of both stored",
    "two models, frugal": "no gradients for the teacher, frozen matrices in the dtype, logits only for KL",
    "one model": "as hmf distill does: also shared layers once, and logits in chunks",
}
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """The measured case: a base `config`, the layers that become mixers, and a batch of rows [rows, tokens].

    The loss is the MSE before the head plus `kl` times the divergence of the logits of all tokens. bfloat16 is
    autocast, over float32 weights that are trained. compiled: compile the decoder layers, and the divergence of the
    fused model's logits, as `training.torch_compile` does.
    """

    config: Any
    pattern: str
    rows: int
    tokens: int
    kl: float = 1.0
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 3
    compiled: bool = False


@dataclass(frozen=True)
class Result:
    """Seconds of each step, peak bytes of memory, and the loss."""

    seconds: list[float]
    peak_bytes: int
    loss: float


def with_overrides(config: Any, overrides: Iterable[str]) -> Any:
    """`config` with some keys overridden by "key=value"; values are in YAML."""
    known, values = config.to_dict(), {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise HmfError(f"--set {override}: write KEY=VALUE, for example num_hidden_layers=12")
        if key not in known:
            raise HmfError(f"--set {override}: {unknown_name('key', key, known)}")
        try:
            values[key] = parse_yaml(value)
        except ValueError as error:
            raise HmfError(f"--set {override}: the value is not valid YAML ({error}); quote it") from None
    if "vocab_size" in values:  # special tokens may be outside of it, and no step uses them
        values = {key: None for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in known} | values
    return changed(config, values, "--set")


def prepared(case: Case, way: str) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """The model that is trained, and a function that computes the loss of a batch."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(case.config, dtype=torch.float32)
    for parameter in base.parameters():  # weights of a published model are exact in a narrow dtype
        parameter.data = parameter.data.to(getattr(torch, case.dtype)).float()
    fused = hybridise(base, Pattern.parse(case.pattern, case.config.num_hidden_layers))
    initialise(fused)
    ids = torch.randint(case.config.vocab_size, (case.rows, case.tokens)).to(case.device)
    narrows = case.dtype == "bfloat16"
    if way == "one model":
        fused.to(case.device).train()
        train_only_mixers(fused)
        if narrows:
            narrow_frozen(fused)
        objective = Stage1Objective(kl=case.kl, compiled=case.compiled)
        if case.compiled:
            compile_layers(fused)
        return fused, lambda: fused(input_ids=ids, objective=objective)["loss"]
    frugal = way == "two models, frugal"
    teacher, student = copy.deepcopy(base).to(case.device).train(), drop_teacher(fused).to(case.device).train()
    train_only_mixers(student)
    if frugal and narrows:
        teacher.requires_grad_(False)
        narrow_frozen(teacher)
        narrow_frozen(student)
    for model in (teacher, student) if case.compiled else ():
        compile_layers(model)

    def run(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden, None if frugal and not case.kl else model.lm_head(hidden)

    def loss() -> torch.Tensor:
        with torch.set_grad_enabled(not frugal):
            target, their_logits = run(teacher)
        output, our_logits = run(student)
        total = (output.float() - target.detach().float()).square().mean()
        if case.kl and our_logits is not None and their_logits is not None:
            ours, theirs = (x.float().log_softmax(-1) for x in (our_logits, their_logits.detach()))
            total = (
                total + case.kl * nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean()
            )
        return total

    return student, loss


def measure(case: Case, way: str) -> Result:
    """Time forward and backward passes, without the optimiser, which is the same in every variant."""
    cuda, seconds, loss = case.device == "cuda", [], torch.tensor(0.0)
    _reset_peak(cuda)
    before = _peak(cuda)
    model, loss_of_batch = prepared(case, way)
    for step in range(WARM_UP + case.repeats):
        if step == WARM_UP:
            _reset_peak(cuda)
        start = _now(cuda)
        model.zero_grad()
        with torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = loss_of_batch()
        loss.backward()
        seconds.append(_now(cuda) - start)
    return Result(seconds[WARM_UP:], _peak(cuda) - before, loss.item())


def run(case: Case, rounds: int = 1, ways: Iterable[str] = WAYS) -> dict[str, Result]:
    """Run every variant `rounds` times in turn, each time in a new process. Returns all times and the largest peak."""
    if case.device not in ("cpu", "cuda"):
        raise HmfError(f"--device: {unknown_name('device', case.device, ('cpu', 'cuda'))}")
    if case.device == "cuda" and not torch.cuda.is_available():
        raise HmfError("--device cuda: PyTorch finds no GPU; omit --device")
    results: dict[str, Result] = {}
    for way in tqdm(list(ways) * rounds, "measuring", unit="process", disable=None):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            new = pool.submit(measure, case, way).result()
        old = results.get(way, Result([], 0, new.loss))
        results[way] = Result(old.seconds + new.seconds, max(old.peak_bytes, new.peak_bytes), new.loss)
    return results


def rows(case: Case, results: dict[str, Result]) -> list[dict[str, Any]]:
    """One row per variant, with its ratios to the first."""
    first = next(iter(results.values()))
    # The fastest step of each variant, because other load on the machine can only add time.
    return [
        {
            "way": way,
            "tokens_per_second": case.rows * case.tokens / min(result.seconds),
            "speedup": min(first.seconds) / min(result.seconds),
            "peak_bytes": result.peak_bytes,
            "memory_ratio": first.peak_bytes / result.peak_bytes,
            "loss": result.loss,
            "steps": len(result.seconds),
        }
        for way, result in results.items()
    ]


def print_rows(table_rows: list[dict[str, Any]], title: str) -> None:
    explained = [f"{row['way']}: {WAYS[row['way']]}" for row in table_rows]
    caption = "\n".join([*explained, *machine.lines()])
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("way")
    for name in ("tokens/s", "faster", "peak GiB", "less memory", "loss", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in table_rows:
        table.add_row(
            row["way"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['memory_ratio']:.2f}x",
            f"{row['loss']:.4f}",
            str(row["steps"]),
        )
    Console(width=max(110, Console().width)).print(table)


def _now(cuda: bool) -> float:
    """Seconds. On a CPU, the CPU time of this process per thread, so that other load does not count."""
    if not cuda:
        return time.process_time() / torch.get_num_threads()
    torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak(cuda: bool) -> None:
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current use


def _peak(cuda: bool) -> int:
    """Peak bytes: PyTorch's on a GPU, those of the process on a CPU."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        match = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(match[1]) * 1024 if match else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
