# SPDX-License-Identifier: Apache-2.0
"""Stage 1 on transformers' Trainer: a fused checkpoint's mixers learn from its own attention."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from hmf.config.runs import DataSettings, DistillSettings, OptimiserSettings
from hmf.data import tasks, text
from hmf.data.packing import MixtureDataset
from hmf.data.tokenizer import encode_texts
from hmf.errors import HmfError, unknown_name
from hmf.model.checkpoint import load_model, save_checkpoint
from hmf.priming.distance import layer_errors, stage1_flops_per_token
from hmf.priming.objectives import LayerwiseObjective, Stage1Objective, train_only_mixers

from .checkpoints import PublishedCheckpoints
from .guard import GuardedLoss
from .progress import ProgressLine, RunLog, require_reporters

if TYPE_CHECKING:
    from hmf.data.prepare import PreparedDataset


class DistillTrainer(PublishedCheckpoints, GuardedLoss, Trainer):
    """A Trainer whose loss is a Stage-1 objective; each part of the loss is logged as `loss_<part>`, and after
    each layer the student's distance from the teacher, on one row, as `error_layer_<index>`."""

    def __init__(self, *args: Any, objective: Stage1Objective, layerwise_steps: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.objective, self.layerwise_steps = objective, layerwise_steps
        # Losses are means: the Trainer is to average them over accumulation steps itself.
        self.model_accepts_loss_kwargs = False
        self._parts: dict[str, list[torch.Tensor]] = {}

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        batch = {
            name: inputs[name] for name in ("input_ids", "labels", "attention_mask", "position_ids") if name in inputs
        }
        layerwise = self.state.global_step < self.layerwise_steps
        losses = model(**batch, objective=LayerwiseObjective() if layerwise else self.objective)
        for name, value in losses.items():
            if name != "loss":
                self._parts.setdefault(f"loss_{name}", []).append(value.detach())
        return (losses["loss"], None) if return_outputs else losses["loss"]

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        names = ("input_ids", "attention_mask", "position_ids")
        self._row = {name: inputs[name][:1] for name in names if name in inputs}
        if self.layerwise_steps and self.state.global_step == self.layerwise_steps:
            self.forget_losses()
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            errors = self.model_wrapped(**self._prepare_inputs(self._row), objective=layer_errors)
            logs |= {f"error_layer_{index}": value.item() for index, value in errors.items()}
        if "loss" in logs and len(self._parts) > 1:
            means = {name: torch.stack(values).mean() for name, values in self._parts.items()}
            logs |= {name: self.accelerator.reduce(mean, "mean").item() for name, mean in means.items()}
        self._parts.clear()
        super().log(logs, *args, **kwargs)


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
    tokenizer = AutoTokenizer.from_pretrained(model)
    training = settings.training
    rows = training.steps * training.rows_per_step * training.gradient_accumulation_steps
    trainer = DistillTrainer(
        model=fused,
        args=_arguments(training, checkpoints, seed),
        train_dataset=mixture(settings.data, tokenizer, rows, seed),
        objective=Stage1Objective(**settings.objective.model_dump(exclude={"layerwise_steps"})),
        layerwise_steps=settings.objective.layerwise_steps,
    )
    trainer.divergence_factor = training.divergence_factor
    trainer.remove_callback(PrinterCallback)
    tokens = training.rows_per_step * training.gradient_accumulation_steps * row_length(settings.data)
    log = RunLog(output / "stage1.log.json", draw)
    flops = stage1_flops_per_token(fused, head=settings.objective.kl > 0)
    trainer.add_callback(log)
    trainer.add_callback(ProgressLine("distil", tokens * trainer.args.world_size, flops))
    try:
        trainer.train(resume_from_checkpoint=trainer.start_from())
    finally:
        log.write(trainer.state)
    if trainer.is_world_process_zero():
        save_checkpoint(fused, target, companions=model)
    trainer.accelerator.wait_for_everyone()
    return target


def row_length(data: DataSettings) -> int:
    """Tokens of a row of `mixture`."""
    if data.prepared is not None:
        from hmf.data.prepare import read_index

        return read_index(data.prepared)["sequence_length"]
    return data.sequence_length


def mixture(
    data: DataSettings, tokenizer: PreTrainedTokenizerBase, rows: int, seed: int
) -> MixtureDataset | PreparedDataset:
    """The packed rows that a recipe's `data` section describes; row i depends on `seed` and i alone."""
    if data.prepared is not None:
        from hmf.data.prepare import PreparedDataset

        return PreparedDataset(data.prepared, tokenizer, rows, seed)
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
        logging_nan_inf_filter=False,  # our own guard stops there
        report_to=list(training.report_to),
        seed=seed,
        # Rows are independent draws already, and their order is part of the recipe.
        train_sampling_strategy="sequential",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
