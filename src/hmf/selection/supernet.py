# SPDX-License-Identifier: Apache-2.0
"""A fused model with a mixer in every layer, and its short training, after which any choice can be scored.

First each mixer learns alone, from the teacher's inputs. Then a random subset of the layers is replaced at each step,
as in a supernet of weight-sharing architecture search, and its mixers are trained jointly by the recipe's objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from hmf.config.pattern import Pattern, mixer_symbol
from hmf.config.runs import CalibrationSettings, DataSettings, DistillSettings, ObjectiveSettings
from hmf.data.mixture import mixture, row_length
from hmf.model.checkpoint import load_model
from hmf.model.convert import hybridise
from hmf.priming.objectives import Objective, Stage1Objective, train_only_mixers
from hmf.priming.stage0 import calibrate_on, initialise
from hmf.training.losses import Measure
from hmf.training.run import arguments, rows_per_step, train
from hmf.training.stage1 import Stage1Loss
from hmf.training.strategy import strategy_arguments
from hmf.training.trainer import HybridTrainer


def fused_everywhere(
    base: str | Path,
    mixer: str,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    conv_start: str = "random",
    calibration: CalibrationSettings | None = None,
    data: DataSettings | None = None,
) -> PreTrainedModel:
    """The float32 model of `base` with a `mixer` in every layer beside its attention, initialised as in Stage 0."""
    teacher = load_model(base, dtype=torch.float32)
    everywhere = Pattern((mixer_symbol(mixer),) * teacher.config.num_hidden_layers)
    model = hybridise(teacher, everywhere, options)
    starts = initialise(model, seed, conv_start)
    if calibration is not None:
        calibrate_on(model, starts, base, calibration, data or DataSettings(), seed)
    train_only_mixers(model)
    return model


class SubsetLoss(Stage1Loss):
    """Stage 1's loss for a random subset of the layers.

    After the layerwise steps, a subset of any size is replaced at each step. It depends only on `seed` and the step.
    """

    def __init__(self, settings: ObjectiveSettings, layers: int, seed: int = 0):
        super().__init__(settings)
        self.layers, self.seed = layers, seed

    def at(self, step: int, measure: Measure) -> Objective:
        objective = super().at(step, measure)
        if not isinstance(objective, Stage1Objective):
            return objective
        rng = Random(f"{self.seed}:replaced at {step}")
        return replace(objective, replaced=frozenset(rng.sample(range(self.layers), rng.randint(1, self.layers))))


def align(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: DistillSettings,
    output: Path,
    seed: int = 0,
    draw: Callable[[Path], object] | None = None,
) -> None:
    """Train the mixers of a `fused_everywhere` model; resumes from `output`/checkpoints if they exist."""
    set_seed(seed)
    training = settings.training
    args = arguments(
        training,
        output / "checkpoints",
        seed,
        TrainingArguments,
        use_cache=model.config.use_cache,
        **strategy_arguments(training, model),
    )
    rows = mixture(settings.data, tokenizer, training.steps * rows_per_step(training), seed)
    trainer = HybridTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        loss=SubsetLoss(settings.objective, model.config.num_hidden_layers, seed),
        divergence_factor=training.divergence_factor,
    )
    row_tokens = row_length(settings.data)
    train(trainer, rows, "select", output / "select.log.json", training, row_tokens, draw=draw)


def training_of(settings: DistillSettings, layerwise_steps: int, subset_steps: int) -> DistillSettings:
    """A recipe's Stage 1 with another number of steps, with warmup and checkpoints in proportion, without evaluation.

    The warmup of a recipe with `num_train_epochs` is unchanged, because its number of steps is unknown here.
    """
    steps = layerwise_steps + subset_steps
    training = settings.training
    whole = training.max_steps or steps
    warmup = training.model_copy(update={"max_steps": whole, "num_train_epochs": None}).warmup
    warmup = round(warmup * min(1.0, steps / whole))
    return settings.model_copy(
        update={
            "eval_data": None,
            "objective": settings.objective.model_copy(update={"layerwise_steps": layerwise_steps}),
            "training": training.model_copy(
                update={
                    "max_steps": steps,
                    "num_train_epochs": None,
                    "eval_strategy": "no",
                    "eval_steps": None,
                    "eval_rows": None,
                    "warmup_steps": warmup,
                    "warmup_ratio": None,
                    "save_steps": min(training.save_steps, max(1, steps // 2)),
                    "save_total_limit": 1,
                }
            ),
        }
    )
