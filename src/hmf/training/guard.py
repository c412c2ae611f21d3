# SPDX-License-Identifier: Apache-2.0
"""A run that goes wrong stops before it spoils its weights, and leaves the batch that did it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hmf.errors import HmfError
from hmf.model.files import follow_umask

MEMORY = 100  # losses that the median is taken over
LEAST = 20  # losses before which nothing counts as divergence
PATIENCE = 5  # batches in a row that must be above the bound
_Base: Any = object  # a mixin: transformers' classes come after it


class LossWatch:
    """Judges losses one by one; `state` is all it knows, made of plain numbers."""

    def __init__(self, factor: float, state: dict[str, Any] | None = None):
        """factor: how many times the median of recent losses is too much; 0 for any finite loss is fine."""
        self.factor = factor
        self.state: dict[str, Any] = {"recent": [], "above": 0} if state is None else state

    def judge(self, loss: float) -> str | None:
        """What is wrong with this loss, given the ones before; None if nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        recent = self.state["recent"]
        usual = median(recent) if len(recent) >= LEAST else 0.0
        if self.factor and 0 < self.factor * usual < loss:
            self.state["above"] += 1
            if self.state["above"] >= PATIENCE:
                usually = f"{self.factor:g} times its usual {usual:.4g}"
                return f"the loss is {loss:.4g}, above {usually} for {PATIENCE} batches"
            return None  # a loss that may be wrong is no part of what is usual
        self.state["above"] = 0
        recent.append(loss)
        del recent[:-MEMORY]
        return None


class GuardedLoss(_Base):
    """Put before a Trainer: HmfError on a loss or gradient that is not finite, and on a loss that runs away.

    Nor are weights saved that are not finite, or, after the last step, that make the loss of its batch so.

    The step is not taken. The batch, or each one of the step when only its gradient is wrong, goes to
    bad_batch.safetensors beside the checkpoints' folder, from the process that had it; names are <number>.<tensor>. Of
    a loss that runs away it is the batch where that began.
    """

    divergence_factor = 10.0
    _watch: LossWatch | None = None
    _batches: list[dict[str, Any]]  # of this step
    _suspect: list[dict[str, Any]]  # the first one above the bound
    _last: dict[str, Any] | None = None

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        # What is known of earlier losses travels in the Trainer's state, and so in every checkpoint.
        known = self.state.stateful_callbacks.setdefault("LossWatch", LossWatch(0).state)
        if self._watch is None or self._watch.state is not known:
            self._watch, self._batches, self._suspect = LossWatch(self.divergence_factor, known), [], []
        if isinstance(inputs, Mapping):
            self.remember(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        own = loss.item()
        # The mean over processes, so that all of them come to the same end.
        everyones = self.accelerator.reduce(loss.detach().clone(), "mean").item() if self.args.world_size > 1 else own
        wrong = self._watch.judge(everyones)
        if known["above"] < 2:
            self._suspect = self._batches[-1:] if known["above"] else []
        if wrong and math.isfinite(everyones):
            self._stop(wrong, self._suspect or self._batches[-1:])
        elif wrong:
            self._stop(wrong, [] if math.isfinite(own) else self._batches[-1:])
        return loss

    def remember(self, batch: Mapping[str, Any]) -> None:
        """A batch of this step; a Trainer that makes its batches itself calls this before it computes the loss."""
        self._last = dict(batch)
        self._batches.append(self._last)

    def loss_again(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of a batch that was remembered, by the weights as they are now."""
        return self.compute_loss(self.model_wrapped, self._prepare_inputs(batch))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # What a step made of the weights shows in the next one's loss. Nothing comes after the last.
        named = ((name, x) for name, x in self.model.named_parameters() if x.requires_grad)
        local = [(name, x.to_local() if hasattr(x, "to_local") else x) for name, x in named]
        wrong = next((f"{name} is not finite" for name, x in local if not x.detach().isfinite().all()), None)
        if self._last is not None and self.state.global_step >= self.state.max_steps:
            self.model_wrapped.eval()  # dropout would use up random numbers
            with torch.no_grad():
                loss = self.loss_again(self._last).item()
            self.model_wrapped.train()
            wrong = wrong or (None if math.isfinite(loss) else f"the loss is {loss}")
        count = torch.tensor(float(wrong is not None), device=self.args.device)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, "sum")
        if count.item():
            step = self.state.global_step
            raise HmfError(
                f"step {step}: after it {wrong or 'weights of another process are not finite'}; nothing is saved, the "
                "checkpoint before it stays; lower the learning rate, with a new output"
            )
        super()._save_checkpoint(model, trial)

    def forget_losses(self) -> None:
        """What was usual no longer is: the loss is another function from here on."""
        self.state.stateful_callbacks.setdefault("LossWatch", LossWatch(0).state)["recent"].clear()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(norm):
            self._stop(f"the gradient's norm is {float(norm)}", self._batches)
        self._batches = []
        return norm

    def _stop(self, wrong: str, batches: list[dict[str, Any]]) -> None:
        step, alone = self.state.global_step + 1, self.args.world_size == 1
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
        raise HmfError(
            f"step {step}: {wrong}; the batch is in {run / ('bad_batch.safetensors' if alone else 'bad_batch.*')}, the "
            "checkpoint before it stays; lower training.learning_rate, or mend the data, with a new output"
        )
