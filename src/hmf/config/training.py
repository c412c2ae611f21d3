# SPDX-License-Identifier: Apache-2.0
"""The section `training` of recipes, and former names of its keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from hmf.errors import notice

from .strict import Rate, Settings, Steps, require_none

# Former names of keys of `training`; they are accepted until the next release.
RENAMED = {"steps": "max_steps", "rows_per_step": "per_device_train_batch_size", "schedule": "lr_scheduler_type"}

# Keys of `training` of which a recipe has one: `--set` of one replaces the other.
ALTERNATIVES = {"max_steps": "num_train_epochs", "num_train_epochs": "max_steps"}


def _as_precision(value: Any) -> Any:
    return "bfloat16" if value == "bf16" else value


def _as_strategy(value: Any) -> Any:
    return "no" if value is False else value  # what YAML makes of a plain no


def _as_factor(value: float) -> float:
    if 0 < value < 1:
        raise ValueError("losses that do not grow would stop the run; give 1 or more, or 0 to turn the check off")
    return value


class OptimiserSettings(Settings):
    """AdamW with a warm-up. Keys that transformers' Trainer also has have its names and values."""

    max_steps: Steps | None = None  # optimiser steps of the run; give this or num_train_epochs
    # passes over `data.prepared` or `pairs`, in place of max_steps; the last step may include rows of the next pass
    num_train_epochs: float | None = Field(None, gt=0, le=10**6)
    # rows in a batch of one process; see gradient_accumulation_steps
    per_device_train_batch_size: int = Field(ge=1, le=2**16)
    gradient_accumulation_steps: int = Field(1, ge=1, le=2**16)  # batches per optimiser step and process
    learning_rate: Rate = 1e-4  # learning rate; `hmf finetune` has one per group, in trainable
    # schedule of the learning rate
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"] = (
        "constant_with_warmup"
    )
    # last learning rate of cosine_with_min_lr, relative to the highest
    final_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    warmup_steps: int = Field(0, ge=0, le=10**9)  # number of first steps in which the learning rate rises from 0
    # number of warm-up steps as a share of max_steps, rounded up; in place of warmup_steps
    warmup_ratio: float | None = Field(None, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0, le=10**3)  # weight decay of AdamW, for matrices only
    adam_beta2: float = Field(0.95, gt=0, lt=1)  # second beta of AdamW; the first is 0.9
    max_grad_norm: float = Field(1.0, ge=1e-9)  # gradients are clipped to this norm
    logging_steps: Steps = 10  # steps between log entries; there is one at each checkpoint, too
    save_steps: Steps = 500  # steps between checkpoints
    save_total_limit: int = Field(2, ge=1)  # number of checkpoints that are kept; older ones are removed
    workers: int = Field(0, ge=0, le=1024)  # processes that make the rows; 0: the training process makes them itself
    # when the loss on held-out rows is computed; steps: after every eval_steps steps and at the end; epoch: at the end
    # of every epoch
    eval_strategy: Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_as_strategy)] = "no"
    eval_steps: Steps | None = None  # steps between evaluations; left out: logging_steps
    # rows of an evaluation; left out: all rows of eval_data.prepared or eval_pairs, otherwise 64
    eval_rows: int | None = Field(None, ge=1, le=2**24)
    # dtype of the computation; bfloat16 (or bf16): autocast, with parameters in float32
    precision: Annotated[Literal["float32", "bfloat16"], BeforeValidator(_as_precision)] = "float32"
    gradient_checkpointing: bool = False  # whether activations are computed again in the backward pass, to save memory
    torch_compile: bool = False  # whether decoder layers are compiled, which takes a minute or more when a run starts
    # GPUs that the recipe is written for, such as h200x8, for `hmf plan-training`
    gpus: str | None = None
    # the run stops if the loss stays above this multiple, 1 or more, of the median of recent losses; 0: never
    divergence_factor: Annotated[float, AfterValidator(_as_factor)] = Field(10.0, ge=0)
    # experiment trackers that receive the log
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    run_name: str | None = None  # name of the run in the trackers; left out: chosen by the tracker
    # project in Weights & Biases; left out: that of WANDB_PROJECT
    wandb_project: str | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _present_names(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, Mapping):
            return values
        # If a key is given under both names, the former name stays and is refused as an unknown key.
        former = {old: new for old, new in RENAMED.items() if old in values and new not in values}
        if former:
            place = f"{info.context['file']}: " if info.context else ""
            names = ", ".join(f"{old} is now {new}" for old, new in former.items())
            notice(f"{place}training: {names}; the former names are read until the next release")
        return {former.get(name, name): value for name, value in values.items()}

    @model_validator(mode="after")
    def _one_choice(self) -> OptimiserSettings:
        require_none(self._choices())
        return self

    def _choices(self) -> Iterator[str]:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            yield f"give max_steps or num_train_epochs{'' if self.max_steps is None else ', not both'}"
        if self.warmup_ratio is not None and self.warmup_steps:
            yield "give warmup_steps or warmup_ratio, not both"
        if self.lr_scheduler_type == "constant" and (self.warmup_ratio or self.warmup_steps):
            yield "lr_scheduler_type constant has no warm-up; set constant_with_warmup, or leave the warm-up out"
        usual = type(self).model_fields["final_learning_rate_ratio"].default  # a recipe that was written out has it
        if self.final_learning_rate_ratio != usual and self.lr_scheduler_type != "cosine_with_min_lr":
            yield (
                "final_learning_rate_ratio is read with lr_scheduler_type cosine_with_min_lr; set that, or leave "
                "final_learning_rate_ratio out"
            )
        if self.eval_steps is not None and self.eval_strategy != "steps":
            yield "eval_steps is read with eval_strategy steps; set that, or leave eval_steps out"
        if self.eval_rows is not None and self.eval_strategy == "no":
            yield "eval_rows is read with eval_strategy steps or epoch; set that, or leave eval_rows out"
        if self.wandb_project is not None and "wandb" not in self.report_to:
            yield "wandb_project is read with report_to: [wandb]; set that, or leave wandb_project out"

    @property
    def steps(self) -> int:
        """Optimiser steps of the run; with num_train_epochs only of what `with_steps` returns."""
        assert self.max_steps is not None
        return self.max_steps

    def with_steps(self, epoch_rows: int | None, rows_per_step: int) -> Self:
        """These settings with `max_steps` in place of `num_train_epochs`, where an epoch has `epoch_rows` rows."""
        if self.num_train_epochs is None:
            return self
        assert epoch_rows is not None  # the recipe's validator saw to it
        rows = Fraction(str(self.num_train_epochs)) * epoch_rows
        return self.model_copy(update={"max_steps": math.ceil(rows / rows_per_step), "num_train_epochs": None})

    @property
    def warmup(self) -> int:
        """Number of warm-up steps."""
        if self.warmup_ratio is None:
            return self.warmup_steps
        return math.ceil(Fraction(str(self.warmup_ratio)) * self.steps)  # 0.07 of 100 steps is 7, in floats above it


class ParallelSettings(OptimiserSettings):
    """Optimiser, log and checkpoints, and how the processes that torchrun starts share the work."""

    # what is sharded over the processes. ddp: nothing; fsdp2: parameters, gradients and optimiser states; deepspeed
    # (ZeRO 2): gradients and optimiser states
    strategy: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    sequence_parallel: int = Field(1, ge=1)  # number of processes that share each row

    @property
    def narrows_frozen(self) -> bool:
        """Whether frozen matrices are stored in bfloat16 (`hmf.training.run.narrow_frozen`)."""
        return self.precision == "bfloat16" and self.strategy != "deepspeed"

    @model_validator(mode="after")
    def _known_to_work(self) -> ParallelSettings:
        if self.strategy == "deepspeed" and self.sequence_parallel > 1:
            raise ValueError("sequence_parallel needs strategy ddp or fsdp2, not deepspeed")
        if self.torch_compile and self.sequence_parallel > 1:
            raise ValueError("sequence_parallel is not supported with torch_compile; leave one of them out")
        return self
