# SPDX-License-Identifier: Apache-2.0
"""Stage 1 on transformers' Trainer: a fused checkpoint's mixers learn from its own attention."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from hmf.config.runs import DataSettings, DistillSettings, OptimiserSettings
from hmf.data import tasks, text
from hmf.data.packing import MixtureDataset
from hmf.data.tokenizer import encode_texts
from hmf.errors import HmfError, unknown_name
from hmf.model.checkpoint import load_model, save_checkpoint
from hmf.priming.objectives import Stage1Objective, train_only_mixers

from .progress import ProgressLine


class DistillTrainer(Trainer):
    """A Trainer whose loss is a Stage-1 objective; each part of the loss is logged as `loss_<part>`."""

    def __init__(self, *args: Any, objective: Stage1Objective, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.objective = objective
        # Losses are means: the Trainer is to average them over accumulation steps itself.
        self.model_accepts_loss_kwargs = False
        self._parts: dict[str, list[torch.Tensor]] = {}

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        losses = model(**batch, objective=self.objective)
        for name, value in losses.items():
            if name != "loss":
                self._parts.setdefault(f"loss_{name}", []).append(value.detach())
        return (losses["loss"], None) if return_outputs else losses["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and len(self._parts) > 1:
            logs |= {name: torch.stack(values).mean().item() for name, values in self._parts.items()}
        self._parts.clear()
        super().log(logs, *args, **kwargs)


def distill(model: str | Path, output: str | Path, settings: DistillSettings, seed: int = 0) -> Path:
    """`hmf distill`: train the mixers of the fused checkpoint `model` and save the result at `output`/stage1.

    A run that was cut off goes on from its last checkpoint under `output`/checkpoints. Returns the saved folder.
    """
    output = Path(output)
    target, checkpoints = output / "stage1", output / "checkpoints"
    if target.is_dir():
        return target
    set_seed(seed)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader's processes are parallel already
    fused = load_model(model, dtype=torch.float32)
    if not getattr(getattr(fused.config, "pattern", None), "fused", False):
        raise HmfError(f"{model}: no fused checkpoint (teacher and student); make one with `hmf init`")
    train_only_mixers(fused)
    tokenizer = AutoTokenizer.from_pretrained(model)
    training = settings.training
    rows = training.steps * training.rows_per_step * training.gradient_accumulation_steps
    trainer = DistillTrainer(
        model=fused,
        args=_arguments(training, checkpoints, seed),
        train_dataset=mixture(settings.data, tokenizer, rows, seed),
        objective=Stage1Objective(settings.objective.layers, settings.objective.pre_lm_head),
    )
    trainer.remove_callback(PrinterCallback)
    tokens = training.rows_per_step * training.gradient_accumulation_steps * settings.data.sequence_length
    trainer.add_callback(ProgressLine("distil", tokens * trainer.args.world_size))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    if trainer.is_world_process_zero():
        (output / "stage1.log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
        save_checkpoint(fused, target, companions=model)
    return target


def mixture(data: DataSettings, tokenizer: PreTrainedTokenizerBase, rows: int, seed: int) -> MixtureDataset:
    """The packed rows that a recipe's `data` section describes; row i depends on `seed` and i alone."""
    for name in data.tasks:
        if name not in tasks.TASKS:
            raise HmfError(f"data.tasks: {unknown_name('task', name, tasks.TASKS)}")
    if not data.tasks and data.text_share < 1:
        raise HmfError("data.text_share: is below 1 but data.tasks is empty; name tasks or set it to 1")
    documents = [document.text for document in text.documents(data.text, "train")]
    encoded = encode_texts(tokenizer, documents)
    return MixtureDataset(encoded, tokenizer, data.sequence_length, data.tasks, rows, data.text_share, seed)


def _arguments(training: OptimiserSettings, checkpoints: Path, seed: int) -> TrainingArguments:
    schedule = {"min_lr_rate": training.final_learning_rate_ratio} if training.schedule == "cosine_with_min_lr" else {}
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=training.steps,
        per_device_train_batch_size=training.rows_per_step,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        lr_scheduler_kwargs=schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bfloat16",
        gradient_checkpointing=training.gradient_checkpointing,
        remove_unused_columns=False,
        save_steps=training.save_steps,
        save_total_limit=2,
        logging_steps=10,
        report_to=list(training.report_to),
        seed=seed,
        # Rows are independent draws already, and their order is part of the recipe.
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
