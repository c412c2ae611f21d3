# SPDX-License-Identifier: Apache-2.0
"""Stage 1 on transformers' Trainer: the mixers of a fused checkpoint learn from its original attention."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from hmf.config.pattern import require_fused
from hmf.config.runs import DistillSettings
from hmf.data.mixture import PromptDataset, mixture, row_length
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError, counted, listed, notice
from hmf.model.checkpoint import load_model, save_checkpoint
from hmf.priming.distance import stage1_flops_per_token
from hmf.priming.objectives import check_objective, train_only_mixers

from .evaluation import with_evaluation
from .progress import require_reporters
from .run import arguments, check_windows, known_steps, narrow_frozen, rows_per_step, train, widen_frozen
from .stage1 import Stage1Loss
from .strategy import strategy_arguments, whole_weights
from .trainer import HybridTrainer


def distill(
    model: str | Path,
    output: str | Path,
    settings: DistillSettings,
    seed: int = 0,
    draw: Callable[[Path], object] | None = None,
) -> Path:
    """`hmf distill`: train the mixers of the fused checkpoint `model` and save the result at `output`/stage1.

    An interrupted run resumes from its last complete checkpoint under `output`/checkpoints. Its log is
    `output`/stage1.log.json; `draw` is called with that path from time to time. Returns the saved folder.

    Raises:
        HmfError: the settings or the data are invalid, a loss is not finite or diverges (its batch is saved), or the
            disk is full.
    """
    output = Path(output)
    target, checkpoints = output / "stage1", output / "checkpoints"
    if target.is_dir():
        return target
    require_reporters(settings.training.report_to)
    set_seed(seed)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader already uses several processes
    fused = load_model(model, dtype=torch.float32)
    require_fused(fused.config, model)
    length = row_length(settings.data)
    check_positions(fused.config, length)
    check_objective(settings.objective, fused.config.vocab_size)
    train_only_mixers(fused)
    if settings.training.narrows_frozen and settings.on_policy is None:
        narrow_frozen(fused)
    tokenizer = load_tokenizer(model)
    training = settings.training
    make = _trainer if settings.on_policy is None else _on_policy_trainer
    trainer, rows = make(fused, tokenizer, settings, checkpoints, seed)
    flops = stage1_flops_per_token(fused, head=any(settings.objective.kl.values()))
    row_tokens = length if settings.on_policy is None else None
    train(trainer, rows, "distil", output / "stage1.log.json", training, row_tokens, flops, draw)
    weights = whole_weights(fused)
    if trainer.is_world_process_zero():
        if weights is None:
            widen_frozen(fused)
        else:
            weights = {name: x.float() for name, x in weights.items()}
        save_checkpoint(fused, target, companions=model, weights=weights)
    trainer.accelerator.wait_for_everyone()
    return target


def check_positions(config: Any, length: int) -> None:
    """Print a notice if rows of `length` tokens exceed the teacher's positions, which Stage 1 cannot extend, or if they
    are too short for layers with a window."""
    check_windows(config, length)
    if length > config.max_position_embeddings:
        notice(
            f"data: rows of {length:,} tokens are longer than the {config.max_position_embeddings:,} positions "
            "(max_position_embeddings) for which the teacher was trained"
        )


def _trainer(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: DistillSettings, checkpoints: Path, seed: int
) -> tuple[HybridTrainer, Any]:
    """The Trainer on the rows of a data set, and that data set."""
    training = settings.training
    rows, evaluated = with_evaluation(
        mixture(settings.data, tokenizer, 0, seed), training, settings.data, settings.eval_data, tokenizer, seed
    )
    training = known_steps(training, rows)
    layerwise, steps = settings.objective.layerwise_steps, training.steps
    if layerwise >= steps and (others := settings.objective.model_fields_set - {"layerwise_steps"}):
        notice(
            f"objective.layerwise_steps: {layerwise:,} is not below the run's {counted(steps, 'step')}, so every mixer "
            f"is trained on its own throughout, without {listed(sorted(others))}"
        )
    args = arguments(
        training,
        checkpoints,
        seed,
        TrainingArguments,
        use_cache=model.config.use_cache,
        **strategy_arguments(training, model),
    )
    trainer = HybridTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=evaluated,
        loss=Stage1Loss(settings.objective, training.torch_compile),
        sequence_parallel=training.sequence_parallel,
        divergence_factor=training.divergence_factor,
    )
    return trainer, rows


def _on_policy_trainer(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: DistillSettings, checkpoints: Path, seed: int
) -> tuple[HybridTrainer, Any]:
    """The Trainer on texts that the student writes, and the data set of their prompts."""
    training, on_policy = settings.training, settings.on_policy
    assert on_policy is not None
    if not importlib.util.find_spec("trl"):
        raise HmfError(
            "on_policy: needs trl; `make setup-train` or pip install 'hybrid-model-factory[onpolicy]' installs it"
        )
    # trl is optional, and importing it takes seconds.
    from .on_policy import OnPolicyArguments, OnPolicyTrainer, generation_arguments

    args = arguments(
        training,
        checkpoints,
        seed,
        OnPolicyArguments,
        use_cache=model.config.use_cache,
        **generation_arguments(on_policy),
    )
    # A row is a prompt and the student's continuation.
    data = settings.data.model_copy(
        update={"sequence_length": settings.data.sequence_length - on_policy.max_new_tokens}
    )
    prompts = mixture(data, tokenizer, training.steps * rows_per_step(training), seed, PromptDataset)
    student = OnPolicyTrainer(
        model=model,
        processing_class=tokenizer,
        args=args,
        train_dataset=prompts,
        loss=Stage1Loss(settings.objective),
        divergence_factor=training.divergence_factor,
    )
    return student, prompts
