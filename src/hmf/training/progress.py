# SPDX-License-Identifier: Apache-2.0
"""Progress of a Trainer: a progress bar on a terminal, plain lines elsewhere, and the log file of a run."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hmf.errors import HmfError
from hmf.gpus import peak_flops

from .checkpoints import replace_text, say

PLAIN_INTERVAL = 15.0  # seconds between plain lines
DRAWN_EVERY = 20.0  # seconds between plots of the log, at least


def require_reporters(names: Iterable[str]) -> None:
    """Raise HmfError for an entry of `report_to` whose package is not installed."""
    for name in names:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES.get(name, (name,))):
            raise HmfError(f"training.report_to: {name} is not installed; `pip install {name}`, or remove it")


_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}


class ProgressLine(TrainerCallback):
    """Shows step, loss, the last evaluation's loss, learning rate, gradient norm, tokens/s, peak memory (on CUDA) and
    the remaining time.

    Rates are computed from the steps of this process, so that they are correct after a resume. Its first step does not
    count once there are others: it compiles and tunes kernels, which takes minutes on a GPU. Log entries, evaluations
    and checkpoints between the steps count for the remaining time, but not for the rates.

    flops_per_token: FLOPs of the model per token. With it, GPUs of known peak show the model FLOPs utilisation (MFU).
    rows_per_step: shown as rows/s instead, where rows have any number of tokens.
    """

    def __init__(
        self,
        title: str,
        tokens_per_step: int,
        flops_per_token: float | None = None,
        rows_per_step: int | None = None,
    ):
        self.title, self.tokens_per_step, self.flops_per_token = title, tokens_per_step, flops_per_token
        self.rows_per_step = rows_per_step
        self.logged: dict[str, float] = {}  # the Trainer's last log entry with a loss
        self.evaluated: float | None = None  # the last evaluation's loss
        self.bar: Any = None
        self.between_steps = 0.0  # seconds of the rates' time that were not spent on steps
        self.step_ended: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.printed = state.global_step, time.perf_counter()
        self._start_counting(state)
        if not state.is_world_process_zero:
            return
        if args.device.type == "cuda":
            say(f"{self.title}: the first step compiles GPU kernels; on a new machine this takes minutes")
        if sys.stderr.isatty():
            from tqdm.auto import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.logged = logs
        if logs and "eval_loss" in logs:
            self.evaluated = logs["eval_loss"]
        self._leave_out()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave_out()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_ended = None
        if state.global_step == self.began + 1:
            self._start_counting(state)

    def _start_counting(self, state: Any) -> None:
        """Begin with the steps that rates count."""
        self.first_step, self.started = state.global_step, time.perf_counter()
        self.between_steps, self.step_ended = 0.0, None

    def _leave_out(self) -> None:
        """Do not count the time since the end of the step, in which a log entry or a checkpoint was made."""
        if self.step_ended is not None:
            now = time.perf_counter()
            self.between_steps += now - self.step_ended
            self.step_ended = now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_ended = time.perf_counter()
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix_str(self.status(args, state), refresh=False)
        elif time.perf_counter() - self.printed > PLAIN_INTERVAL and state.global_step < state.max_steps:
            self.print_line(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(self.status(args, state))
            self.bar.close()
        elif state.global_step > self.began:
            self.print_line(args, state)

    def print_line(self, args: Any, state: Any) -> None:
        if state.is_world_process_zero:
            line = f"{self.title}: step {state.global_step}/{state.max_steps} {self.status(args, state)}"
            print(f"{line} ETA {self.seconds_left(state):.0f} s", file=sys.stderr, flush=True)
        self.printed = time.perf_counter()

    def seconds_left(self, state: Any) -> float:
        per_step = (time.perf_counter() - self.started) / (state.global_step - self.first_step)
        return (state.max_steps - state.global_step) * per_step

    def status(self, args: Any, state: Any) -> str:
        seconds = time.perf_counter() - self.started - self.between_steps
        steps_per_second = (state.global_step - self.first_step) / seconds
        parts = [f"{name} {value:.4f}" for name, value in self.logged.items() if name.startswith("loss")]
        if self.evaluated is not None:
            parts.append(f"eval_loss {self.evaluated:.4f}")
        groups = [(f"lr {name[14:]}", name) for name in self.logged if name.startswith("learning_rate_")]
        names = (*(groups or [("lr", "learning_rate")]), ("grad norm", "grad_norm"))
        parts += [f"{short} {float(self.logged[name]):.3g}" for short, name in names if name in self.logged]
        if self.rows_per_step is not None:
            parts.append(f"{steps_per_second * self.rows_per_step:,.2f} rows/s")
        else:
            rate = steps_per_second * self.tokens_per_step
            parts.append(f"{rate:,.0f} tokens/s")
            if (share := self.utilisation(rate, args)) is not None:
                parts.append(f"MFU {share:.1%}")
        if args.device.type == "cuda":
            parts.append(f"peak {torch.cuda.max_memory_allocated(args.device) / 2**30:.1f} GiB")
        return " ".join(parts)

    def utilisation(self, tokens_per_second: float, args: Any) -> float | None:
        """Model FLOPs utilisation over all GPUs; None on a CPU and on a GPU of unknown peak."""
        if self.flops_per_token is None or args.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(args.device))
        return None if peak is None else tokens_per_second * self.flops_per_token / (peak * args.world_size)


class RunLog(TrainerCallback):
    """Writes the log of the whole run, a JSON list with an entry for each log step, to a file beside the checkpoints.

    Every checkpoint is also a log step, so that no mean in the log spans a resume. `draw` is called with the file's
    path at the end and at checkpoints, there at most once in `DRAWN_EVERY` seconds, because a plot takes about one.
    """

    def __init__(self, path: Path, draw: Callable[[Path], object] | None = None):
        self.path, self.draw, self.drawn = path, draw, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write(state, time.monotonic() - self.drawn > DRAWN_EVERY)

    def write(self, state: Any, draw: bool = True) -> None:
        if state.is_world_process_zero and state.log_history:
            replace_text(self.path, json.dumps(state.log_history, indent=1) + "\n")
            if draw and self.draw is not None:
                self.drawn = time.monotonic()
                try:
                    self.draw(self.path)
                except Exception as error:  # a failed plot must not stop the run
                    say(f"{self.path}: the plot of this log failed ({' '.join(str(error).split())})")
