# SPDX-License-Identifier: Apache-2.0
"""Stops a run whose loss, gradient or weights are not finite or whose loss diverges, and saves the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerState, TrainingArguments

from hmf.errors import HmfError
from hmf.model.files import follow_umask

MEMORY = 100  # number of recent losses whose median is used
LEAST = 20  # number of losses before divergence is checked
ABOVE = 5  # number of consecutive batches above the bound that counts as divergence


class LossWatch:
    """Checks losses one by one. `state` holds everything that it remembers, as plain numbers."""

    def __init__(self, factor: float, state: dict[str, Any] | None = None):
        """factor: a loss above this multiple of the median of recent losses is too large; 0 turns the check off."""
        self.factor = factor
        self.state: dict[str, Any] = {"recent": [], "above": 0} if state is None else state

    def judge(self, loss: float) -> str | None:
        """The problem with this loss in view of earlier losses, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        recent = self.state["recent"]
        usual = median(recent) if len(recent) >= LEAST else 0.0
        if self.factor and 0 < self.factor * usual < loss:
            self.state["above"] += 1
            if self.state["above"] >= ABOVE:
                bound = f"{self.factor:g} times its median {usual:.4g}"
                return f"the loss is {loss:.4g}, above {bound} for {ABOVE} batches"
            return None  # a suspect loss does not enter the median
        self.state["above"] = 0
        recent.append(loss)
        del recent[:-MEMORY]
        return None


class LossGuard:
    """Raises HmfError for a loss or gradient that is not finite, and for a loss that diverges.

    Weights that are not finite are never saved. After the last step, weights are also not saved if they give a loss
    that is not finite on that step's batch.

    A bad step is not applied. The process that read its batch saves it to bad_batch.safetensors beside the folder of
    checkpoints, with names <number>.<tensor>. If only the gradient is bad, all batches of the step are saved. If the
    loss diverges, the first batch above the bound is saved.

    Earlier losses are stored in the Trainer's state, and therefore in every checkpoint. All processes must call the
    checks together.
    """

    def __init__(self, args: TrainingArguments, accelerator: Accelerator, divergence_factor: float):
        self.args, self.accelerator, self.divergence_factor = args, accelerator, divergence_factor
        self._step_batches: list[dict[str, Any]] = []
        self._suspect: list[dict[str, Any]] = []  # the first batch above the bound
        self._last: dict[str, Any] | None = None

    def remember(self, batch: Mapping[str, Any]) -> None:
        """Remember a batch of this step before its loss is computed."""
        self._last = dict(batch)
        self._step_batches.append(self._last)

    def forget_losses(self, state: TrainerState) -> None:
        """Forget earlier losses, because the loss is another function from here on."""
        _history(state)["recent"].clear()

    def check_loss(self, state: TrainerState, loss: torch.Tensor) -> None:
        """`loss`: the loss of the batch that was remembered last, as the Trainer logs it."""
        own, history = loss.item(), _history(state)
        # The mean over processes, so that all of them make the same decision.
        mean = self.accelerator.reduce(loss.detach().clone(), "mean").item() if self.args.world_size > 1 else own
        wrong = LossWatch(self.divergence_factor, history).judge(mean)
        if history["above"] < 2:
            self._suspect = self._step_batches[-1:] if history["above"] else []
        if wrong and math.isfinite(mean):
            self._stop(state, wrong, self._suspect or self._step_batches[-1:])
        elif wrong:
            self._stop(state, wrong, [] if math.isfinite(own) else self._step_batches[-1:])

    def check_gradient(self, state: TrainerState, norm: Any) -> None:
        """`norm`: the norm of the step's gradient, before the optimiser's step."""
        if norm is not None and not math.isfinite(norm):
            self._stop(state, f"the gradient's norm is {float(norm)}", self._step_batches)
        self._step_batches = []

    def check_weights(self, state: TrainerState, model: nn.Module, loss_of: Callable[[dict[str, Any]], float]) -> None:
        """Check the weights before they are saved.

        The weights after a step are checked by the loss of the next step. The last step has none, so `loss_of` computes
        the loss of its batch again.
        """
        named = ((name, x) for name, x in model.named_parameters() if x.requires_grad)
        local = [(name, x.to_local() if hasattr(x, "to_local") else x) for name, x in named]
        wrong = next((f"{name} is not finite" for name, x in local if not x.detach().isfinite().all()), None)
        if self._last is not None and state.global_step >= state.max_steps:
            loss = loss_of(self._last)
            wrong = wrong or (None if math.isfinite(loss) else f"the loss is {loss}")
        count = torch.tensor(float(wrong is not None), device=self.args.device)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, "sum")
        if count.item():
            raise HmfError(
                f"step {state.global_step}: after this step {wrong or 'weights of another process are not finite'}; "
                "nothing is saved, the last checkpoint is kept; lower the learning rate, with a new output"
            )

    def _stop(self, state: TrainerState, wrong: str, batches: list[dict[str, Any]]) -> None:
        step, alone = state.global_step + 1, self.args.world_size == 1
        run = Path(self.args.output_dir).parent
        tensors = {
            f"{number}.{key}": value.detach().cpu().contiguous()
            for number, batch in enumerate(batches)
            for key, value in batch.items()
            if torch.is_tensor(value)
        }
        if tensors:
            name = "bad_batch.safetensors" if alone else f"bad_batch.{self.args.process_index}.safetensors"
            save_file(tensors, run / name, {"step": str(step), "reason": wrong})
            follow_umask(run / name)
        self.accelerator.wait_for_everyone()
        # Before the first step, the learning rate has changed nothing.
        fix = "lower the learning rate, or fix the data" if step > 1 else "check the weights of the model, and the data"
        raise HmfError(
            f"step {step}: {wrong}; the batch is in {run / ('bad_batch.safetensors' if alone else 'bad_batch.*')}, and "
            f"the last checkpoint is kept; {fix}, with a new output"
        )


def _history(state: TrainerState) -> dict[str, Any]:
    """The state of a LossWatch, stored in the Trainer's state."""
    return state.stateful_callbacks.setdefault("LossWatch", LossWatch(0).state)
