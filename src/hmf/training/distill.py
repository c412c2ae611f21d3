# SPDX-License-Identifier: Apache-2.0
"""Stage 1 on transformers' Trainer: a fused checkpoint's mixers learn from its own attention."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from hmf.config.runs import DistillSettings, ObjectiveSettings
from hmf.data.mixture import PromptDataset, mixture, row_length
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError
from hmf.model.checkpoint import load_model, save_checkpoint
from hmf.priming.distance import layer_errors, stage1_flops_per_token
from hmf.priming.objectives import Objective, attention_sizes, objective_at, token_counts, train_only_mixers

from .checkpoints import PublishedCheckpoints
from .guard import GuardedLoss
from .progress import require_reporters
from .run import arguments, rows_per_step, train
from .sequence import SequenceParallel
from .strategy import ShardedModel, strategy_arguments, whole_weights

_Base: Any = object  # a mixin: transformers' classes come after it
SIZED_ROWS = 4  # rows that the sizes of attention outputs are measured on


class Stage1Loss(_Base):
    """Put before a Trainer of a fused model: its loss is what a recipe's `objective` says at each step.

    Each part of the loss is logged as `loss_<part>`, and after each layer the student's distance from the teacher, on
    one row, as `error_layer_<index>`.
    """

    loss_is_scaled_for_ga = True  # from transformers 5.19 on; before that, model_accepts_loss_kwargs says so
    _row: dict[str, torch.Tensor]
    _parts: dict[str, torch.Tensor]  # sums since the last log, which was after this step:
    _logged_step: int | None = None

    def __init__(self, *args: Any, objective: ObjectiveSettings, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.objective = objective
        self._parts = {}
        self.model_accepts_loss_kwargs = True  # losses of a step add up: the Trainer is not to average them again

    def objective_at(self, step: int) -> Objective:
        return objective_at(self.objective, step)

    def stage1_loss(self, model: Any, batch: dict[str, torch.Tensor], counts: torch.Tensor | None) -> torch.Tensor:
        """This batch's share of the step's loss; `counts` as `token_counts` gives them, of the step in all processes.

        It is scaled for gradients that are averaged over processes.
        """
        losses = model(**batch, objective=self.objective_at(self.state.global_step), counts=counts)
        if counts is not None:
            losses = {name: value * self.accelerator.num_processes for name, value in losses.items()}
        for name, value in losses.items():
            if name != "loss" and torch.is_grad_enabled():
                self._parts[f"loss_{name}"] = self._parts.get(f"loss_{name}", 0) + value.detach()
        # With sequence parallelism all rows: parts of one alone would have other shards.
        self._row = {name: x if "shards" in batch else x[:1] for name, x in batch.items() if "labels" not in name}
        return losses["loss"]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self.state.global_step
        if self._logged_step is None:
            self._logged_step = step
        if step and self.objective_at(step) != self.objective_at(step - 1):
            self.forget_losses()
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            with torch.no_grad():  # else DDP would wait for a backward pass
                errors = self.model_wrapped(**self._row, objective=layer_errors)
            logs |= {f"error_layer_{index}": value.item() for index, value in errors.items()}
            if len(self._parts) > 1:
                steps = self.state.global_step - (self._logged_step or 0)
                means = {name: total / steps for name, total in self._parts.items()}
                logs |= {name: self.accelerator.reduce(mean, "mean").item() for name, mean in means.items()}
            self._parts, self._logged_step = {}, self.state.global_step
        super().log(logs, *args, **kwargs)


class DistillTrainer(PublishedCheckpoints, GuardedLoss, SequenceParallel, ShardedModel, Stage1Loss, Trainer):
    """Stage 1 on given rows."""

    def objective_at(self, step: int) -> Objective:
        layerwise = step < self.objective.layerwise_steps
        return objective_at(self.objective, step, self._attention_sizes if layerwise else None)

    @cached_property
    def _attention_sizes(self) -> tuple[float, ...]:
        """On the run's first rows: the same after a resume, and for any number of processes."""
        rows = self.whole_rows(SIZED_ROWS)
        with torch.no_grad():
            sizes = self.model_wrapped(**self._prepare_inputs(self.data_collator(rows)), objective=attention_sizes)
        # Of processes that share rows each has seen its part of all of them.
        means = self.accelerator.reduce(torch.tensor(sizes, device=self.args.device), "mean")
        return tuple(means.tolist())

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The step's batches, and what all their tokens count (`token_counts`), in all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.stack([token_counts(**batch).to(device) for batch in batches]).sum(0)
        return batches, self.accelerator.reduce(counts, "sum")

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        names = ("input_ids", "labels", "attention_mask", "position_ids", "shift_labels", "shards")
        loss = self.stage1_loss(model, {name: inputs[name] for name in names if name in inputs}, num_items_in_batch)
        return (loss, None) if return_outputs else loss


def distill(
    model: str | Path,
    output: str | Path,
    settings: DistillSettings,
    seed: int = 0,
    draw: Callable[[Path], object] | None = None,
) -> Path:
    """`hmf distill`: train the mixers of the fused checkpoint `model` and save the result at `output`/stage1.

    A run that was cut off goes on from its last whole checkpoint under `output`/checkpoints. Its log is `output`/
    stage1.log.json; `draw` gets that path whenever it has been written. Returns the saved folder.

    Raises:
        HmfError: also for a loss that is not finite or runs away (its batch is kept) and a disk that is full.
    """
    output = Path(output)
    target, checkpoints = output / "stage1", output / "checkpoints"
    if target.is_dir():
        return target
    require_reporters(settings.training.report_to)
    set_seed(seed)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader's processes are parallel already
    fused = load_model(model, dtype=torch.float32)
    if not getattr(getattr(fused.config, "pattern", None), "fused", False):
        raise HmfError(f"{model}: no fused checkpoint (teacher and student); make one with `hmf init`")
    train_only_mixers(fused)
    tokenizer = load_tokenizer(model)
    training = settings.training
    trainer, rows = _trainer(fused, tokenizer, settings, checkpoints, seed)
    step_rows = rows_per_step(trainer.args, training.sequence_parallel)
    flops = stage1_flops_per_token(fused, head=any(settings.objective.kl.values()))
    tokens, log = step_rows * row_length(settings.data), output / "stage1.log.json"
    train(trainer, rows, "distil", log, tokens, training.divergence_factor, flops, draw)
    weights = whole_weights(fused)
    if trainer.is_world_process_zero():
        save_checkpoint(fused, target, companions=model, weights=weights)
    trainer.accelerator.wait_for_everyone()
    return target


def _trainer(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: DistillSettings, checkpoints: Path, seed: int
) -> tuple[Any, Any]:
    """The Trainer, and its data set."""
    training, own = settings.training, settings.on_policy
    if own is None:
        args = arguments(
            training, checkpoints, seed, TrainingArguments,
            use_cache=model.config.use_cache, **strategy_arguments(training, model),
        )  # fmt: skip
        ranks = training.sequence_parallel
        rows = mixture(settings.data, tokenizer, training.steps * rows_per_step(args, ranks), seed)
        trainer = DistillTrainer(
            model=model, args=args, train_dataset=rows, objective=settings.objective, sequence_parallel=ranks
        )
        return trainer, rows
    if not importlib.util.find_spec("trl"):
        raise HmfError("on_policy: needs trl; `pip install hybrid-model-factory[onpolicy]`, or leave on_policy out")
    from .on_policy import OnPolicyArguments, OnPolicyTrainer, generation_arguments

    args = arguments(
        training, checkpoints, seed, OnPolicyArguments, use_cache=model.config.use_cache, **generation_arguments(own)
    )
    # A prompt and what the student writes after it are one row.
    data = settings.data.model_copy(update={"sequence_length": settings.data.sequence_length - own.max_new_tokens})
    prompts = mixture(data, tokenizer, training.steps * rows_per_step(args), seed, PromptDataset)
    student = OnPolicyTrainer(
        model=model, processing_class=tokenizer, args=args, train_dataset=prompts, objective=settings.objective
    )
    return student, prompts
