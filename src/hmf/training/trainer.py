# SPDX-License-Identifier: Apache-2.0
"""The subclass of transformers' Trainer. It overrides all hooks; plain objects do the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hmf.errors import HmfError
from hmf.model.checkpoint import without_generation_config

from .checkpoints import PublishedCheckpoints, without_config
from .evaluation import EvaluationLoss, same_random_numbers
from .groups import ALL, ParameterGroup, group_rates, optimiser_groups
from .guard import LossGuard
from .losses import TrainingLoss, labels_count
from .sequence import SequenceParallel
from .strategy import (
    autocast_forward,
    complete_accelerator,
    complete_units,
    keep_parameter_dtypes,
    reach_inner_mixers,
)


class HybridTrainer(Trainer):
    """A Trainer for all stages. Its `output_dir` holds only its checkpoints, and all processes must share it.

    The objects, which do not depend on each other:

    - `loss`: the loss to minimise; None is the model's own.
    - `groups`: groups of parameters with their learning rates; None is one rate for all trained parameters.
    - `sequence`: sequence parallelism; None with `sequence_parallel` 1.
    - `guard`: stops the run before a bad loss damages the weights.
    - `checkpoints`: publishes complete checkpoints.
    - `evaluation`: sums the loss over `eval_dataset`; None without one.

    The overridden hooks in the order in which a run calls them; "base" is the Trainer's own hook:

    1. `create_accelerator_and_postprocess`: FSDP2 keeps dtypes; base; FSDP on CPUs.
    2. `_load_from_checkpoint`: base, on a view of the checkpoint without its config.
    3. `_prepare_for_training`: base, which creates the optimiser (4) and wraps the model; then FSDP2 is set up for
       mixers inside mixers, for modules that do not run and for autocast.
    4. `create_optimizer`: from `groups`.
    5. `get_batch_samples`: base; the counts of `loss` for the step's batches, summed over all processes.
    6. `training_step`, for each batch: `guard` remembers it, and forgets earlier losses if the objective changes; base,
       which calls 7 and 8 and runs the backward pass; `sequence` reports its traffic; `guard` checks the loss.
    7. `_prepare_inputs`: base; `sequence` adds `shards`.
    8. `compute_loss`: the batch's share of the step's loss; its parts are summed for the log.
    9. `_get_grad_norm`: base; `guard` checks the norm. The optimiser's step follows.
    10. `log`: the summary of a resumed run is corrected; the learning rates of `groups`, and figures and parts of
        `loss` are added; base.
    11. `evaluate`, when an evaluation is due: base; the state of random numbers is restored.
    12. `evaluation_loop`: base, which calls 13; the sums of `evaluation` become the figures that 10 logs.
    13. `prediction_step`, for each batch: 7; `evaluation` adds the batch's share of the loss of all rows.
    14. `_save_checkpoint`: `checkpoints` checks the free space; `guard` checks the weights; base; `checkpoints`
        publishes.
    15. `_get_output_dir`: the folder into which base writes a checkpoint, from `checkpoints`.

    A class that combines this one with a trainer of another library lists this one first; "base" is then the other's.
    """

    optimizer: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any

    def __init__(
        self,
        *args: Any,
        loss: TrainingLoss | None = None,
        groups: list[ParameterGroup] | None = None,
        sequence_parallel: int = 1,
        divergence_factor: float = 10.0,
        **kwargs: Any,
    ):
        if loss is not None:
            self.loss_is_scaled_for_ga = True  # since transformers 5.19; before it, model_accepts_loss_kwargs (below)
        super().__init__(*args, **kwargs)
        self.loss, self.groups = loss, groups
        self.checkpoints = PublishedCheckpoints(self.args)
        self.guard = LossGuard(self.args, self.accelerator, divergence_factor)
        self.sequence: SequenceParallel | None = None
        self._rows, self._collate = self.train_dataset, self.data_collator
        self.evaluation: EvaluationLoss | None = None
        if self.eval_dataset is not None:
            batch = self.args.per_device_train_batch_size
            self.evaluation = EvaluationLoss(self.eval_dataset, batch, sequence_parallel, self.accelerator)
            self.args.per_device_eval_batch_size = self.evaluation.batch_size
        if sequence_parallel > 1:
            self.sequence = SequenceParallel(self.model, sequence_parallel)
            self.train_dataset = self.sequence.shared(self.train_dataset, self.args.per_device_train_batch_size)
            self.data_collator = self.sequence.own_part_of(self.data_collator)
            if self.evaluation is not None:
                self.eval_dataset = self.sequence.shared(self.eval_dataset, self.evaluation.batch_size)
        if loss is not None:
            self.model_accepts_loss_kwargs = (
                True  # the losses of a step are summed, so the Trainer must not average them
            )
        # Sums of the parts of the loss since the last log entry, and the step of that entry.
        self._part_sums: dict[str, torch.Tensor] = {}
        self._logged_step: int | None = None
        self._latest_batch: dict[str, Any] = {}

    def start_from(self) -> str | None:
        """Remove unfinished files of an interrupted run. Returns the checkpoint to resume from, or None; the result is
        the same in all processes."""
        return self.checkpoints.start_from(self.model, self.optimizer)

    # Preparation

    def create_accelerator_and_postprocess(self) -> None:
        keep_parameter_dtypes(self.args)
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = complete_accelerator(self.args, self.accelerator.state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with without_config(resume_from_checkpoint) as view:
            super()._load_from_checkpoint(view, model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        reach_inner_mixers(self.model)
        if self.is_fsdp_enabled:
            complete_units(self.model)
            if self.args.bf16:
                autocast_forward(self.model, self.args.device.type)
        return prepared

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
            groups = self.groups or [ParameterGroup(ALL, trained, self.args.learning_rate)]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(optimiser_groups(model, groups, self.args.weight_decay), **options)
        return self.optimizer

    # A step

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.loss is None:
            return batches, count
        counts = torch.stack([self.loss.count(**batch).to(device) for batch in batches]).sum(0)
        return batches, self.accelerator.reduce(counts, "sum")

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self.state.global_step
        if self._logged_step is None:
            self._logged_step = step
        if isinstance(inputs, Mapping):
            self.guard.remember(inputs)
        if step and self.loss is not None and self.objective_at(step) != self.objective_at(step - 1):
            self.guard.forget_losses(self.state)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.sequence is not None:
            self.sequence.report(self.is_world_process_zero())
        self.guard.check_loss(self.state, loss)
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        return inputs if self.sequence is None else self.sequence.with_shards(inputs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """`num_items_in_batch`: the counts of the whole step; None gives the loss of this batch alone."""
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = model(**inputs, objective=self.objective_at(self.state.global_step), counts=num_items_in_batch)
        if torch.is_grad_enabled():
            self._latest_batch = inputs
            for name, value in losses.items():
                if name != "loss":
                    self._part_sums[name] = self._part_sums.get(name, 0) + value.detach()
        # Gradients are averaged over processes, but these losses must be summed.
        loss = losses["loss"] * (1 if num_items_in_batch is None else self.accelerator.num_processes)
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.check_gradient(self.state, norm)
        return norm

    # After a step

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" in logs:
            logs |= self.checkpoints.summary(logs, self.state)
        if "learning_rate" in logs:
            logs |= group_rates(self.groups or (), logs["learning_rate"])
        if "loss" in logs and self.loss is not None:
            logs |= self.loss.figures(self.model_wrapped, self._latest_batch)
            logs |= self._part_means()
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.checkpoints.written(self.state.global_step, self.model, self.optimizer):
            self.guard.check_weights(self.state, self.model, self._loss_now)
            with without_generation_config(self.model):
                super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any = None) -> str:
        return self.checkpoints.staging or super()._get_output_dir(trial)

    # An evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with same_random_numbers(self.args.device):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        assert self.evaluation is not None
        self.evaluation.start()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        figures = self.evaluation.figures(self.loss.log_prefix if self.loss is not None else "")
        if not math.isfinite(figures["loss"]):
            raise HmfError(
                f"step {self.state.global_step}: the loss of the evaluation is {figures['loss']}; the last checkpoint "
                "is kept; lower the learning rate, or fix the rows of the evaluation, with a new output"
            )
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        assert self.evaluation is not None
        counts = self.evaluation.counts(self.loss.count if self.loss is not None else labels_count, self._collate)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.loss is None:
                loss = self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=counts)
                losses = {"loss": loss / self.accelerator.num_processes}
            else:  # the objective of the last completed step
                objective = self.objective_at(max(0, self.state.global_step - 1))
                losses = self.model_wrapped(**inputs, objective=objective, counts=counts)
        self.evaluation.add(losses)
        return None, None, None

    # Helpers of the hooks

    def objective_at(self, step: int) -> Callable[..., dict[str, torch.Tensor]]:
        """The objective that the model is called with at an optimiser step."""
        assert self.loss is not None
        return self.loss.at(step, self._measured)

    def _measured(self, objective: Callable[..., tuple[float, ...]], count: int) -> tuple[float, ...]:
        """The values of `objective` on the run's first `count` rows. They do not depend on resumes or on the number of
        processes."""
        rows = [self._rows[index] for index in range(min(count, len(self._rows)))]
        with torch.no_grad():
            values = self.model_wrapped(**self._prepare_inputs(self.data_collator(rows)), objective=objective)
        # Processes that share rows measured different parts of them.
        means = self.accelerator.reduce(torch.tensor(values, device=self.args.device), "mean")
        return tuple(means.tolist())

    def _loss_now(self, batch: dict[str, Any]) -> float:
        """The loss of a batch with the current weights."""
        self.model_wrapped.eval()  # dropout would advance the random number generator
        with torch.no_grad():
            loss = self.compute_loss(self.model_wrapped, self._prepare_inputs(batch)).item()
        self.model_wrapped.train()
        return loss

    def _part_means(self) -> dict[str, float]:
        """The mean of each part of the loss over the steps since the last log; empty if there is only one part."""
        assert self.loss is not None
        steps, sums = self.state.global_step - (self._logged_step or 0), self._part_sums
        self._part_sums, self._logged_step = {}, self.state.global_step
        if len(sums) < 2:
            return {}
        means = {name: total / steps for name, total in sums.items()}
        return {
            f"{self.loss.log_prefix}{name}": self.accelerator.reduce(mean, "sum").item() for name, mean in means.items()
        }
