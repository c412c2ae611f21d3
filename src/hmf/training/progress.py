# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a Trainer runs: one moving line on a terminal, a plain one now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback

PLAIN_INTERVAL = 15.0  # seconds between lines where there is no terminal


class ProgressLine(TrainerCallback):
    """Step, loss, tokens/s and the time left. Rates count this process's own steps: they are right after a resume."""

    def __init__(self, title: str, tokens_per_step: int):
        self.title, self.tokens_per_step = title, tokens_per_step
        self.losses: dict[str, float] = {}
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self.started, self.printed = state.global_step, time.perf_counter(), time.perf_counter()
        if not state.is_world_process_zero:
            return
        if sys.stderr.isatty():
            from tqdm.auto import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.losses = {name: value for name, value in (logs or {}).items() if name.startswith("loss")}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        now, done = time.perf_counter(), state.global_step - self.first_step
        rate = done * self.tokens_per_step / (now - self.started)
        status = " ".join([*(f"{name} {value:.4f}" for name, value in self.losses.items()), f"{rate:,.0f} tokens/s"])
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix_str(status, refresh=False)
        elif now - self.printed > PLAIN_INTERVAL or state.global_step == state.max_steps:
            left = (state.max_steps - state.global_step) * (now - self.started) / done
            print(
                f"{self.title}: step {state.global_step}/{state.max_steps} {status} ETA {left:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            self.printed = now

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
