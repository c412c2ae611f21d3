# SPDX-License-Identifier: Apache-2.0
"""Shared by all kinds of training: the Trainer's arguments, and a run that can be interrupted and resumed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import PrinterCallback

from hmf.config.training import OptimiserSettings, ParallelSettings
from hmf.errors import HmfError, counted, listed, notice
from hmf.folders import claimed
from hmf.gpus import parse_gpus
from hmf.layers.registry import layer_states

from .checkpoints import newest_valid, on_main_process
from .evaluation import Epochs
from .progress import ProgressLine, RunLog
from .trainer import HybridTrainer

Arguments = TypeVar("Arguments", bound=TrainingArguments)
Training = TypeVar("Training", bound=OptimiserSettings)


@contextmanager
def run_folder(output: Path, recipe: str, start: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Claim `output` for the recipe text `recipe` during the block, and call `start` first.

    The main process does both while the others wait. Yields whether this is the main process. See
    `hmf.folders.claimed`.
    """
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(claimed(output, recipe))
            start()

        yield on_main_process(begin)


def arguments(
    training: OptimiserSettings, checkpoints: Path, seed: int, kind: type[Arguments], **others: Any
) -> Arguments:
    """A recipe's `training` section as the Trainer's arguments of class `kind`; `others` override them."""
    if training.wandb_project is not None:
        os.environ["WANDB_PROJECT"] = training.wandb_project  # read by the Trainer's callback
    if training.gpus is not None:
        try:
            parse_gpus(training.gpus)
        except HmfError as error:
            raise HmfError(str(error).replace("--gpu", "training.gpus", 1)) from None
    if training.warmup >= training.steps:
        effect = "only rises" if training.steps > 1 else "is 0"
        notice(
            f"training: the warm-up of {counted(training.warmup, 'step')} is not shorter than the run of "
            f"{training.steps:,}, so the learning rate {effect}"
        )
    schedule = (
        {"min_lr_rate": training.final_learning_rate_ratio}
        if training.lr_scheduler_type == "cosine_with_min_lr"
        else {}
    )
    return kind(
        **{
            "output_dir": str(checkpoints),
            "max_steps": training.steps,
            "per_device_train_batch_size": training.per_device_train_batch_size,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
            "learning_rate": training.learning_rate,
            "lr_scheduler_type": training.lr_scheduler_type,
            "lr_scheduler_kwargs": schedule,
            "warmup_steps": training.warmup,
            "weight_decay": training.weight_decay,
            "adam_beta2": training.adam_beta2,
            "max_grad_norm": training.max_grad_norm,
            "use_cpu": not torch.accelerator.is_available(),  # needed for the process group of CPU processes
            "bf16": training.precision == "bfloat16",
            "gradient_checkpointing": training.gradient_checkpointing,
            "remove_unused_columns": False,
            "save_steps": training.save_steps,
            "save_total_limit": training.save_total_limit,
            "eval_strategy": "no" if training.eval_strategy == "epoch" else training.eval_strategy,  # see Epochs
            "eval_steps": training.eval_steps or training.logging_steps,
            "logging_steps": training.logging_steps,
            "logging_nan_inf_filter": False,  # LossGuard stops the run instead
            "report_to": list(training.report_to),
            "run_name": training.run_name,
            "seed": seed,
            # Rows are already drawn independently, and their order is part of the recipe.
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": torch.cuda.is_available(),
            "dataloader_num_workers": training.workers,
            "dataloader_prefetch_factor": 4 if training.workers else None,
            "disable_tqdm": True,
            "ddp_find_unused_parameters": False,  # there are none, and the search takes time
            **others,
        }
    )


def rows_per_step(training: OptimiserSettings) -> int:
    """Number of rows in an optimiser step, over all processes. Processes may share rows."""
    sharing = training.sequence_parallel if isinstance(training, ParallelSettings) else 1
    readers = int(os.environ.get("WORLD_SIZE", 1)) // sharing  # set by torchrun
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * readers


def known_steps(training: Training, rows: Any) -> Training:
    """The settings with `max_steps` set for the data set `rows`, whose length is set to the rows that are read."""
    step_rows, epochs = rows_per_step(training), training.num_train_epochs
    training = training.with_steps(rows.epoch, step_rows)
    if epochs is not None and training.steps * step_rows >= 2 * epochs * rows.epoch:
        notice(
            f"training.num_train_epochs: {epochs:g} is less than one step, which reads {step_rows:,} rows, where an "
            f"epoch has {rows.epoch:,}; lower the batch size or gradient_accumulation_steps"
        )
    rows.rows = training.steps * step_rows
    return training


def check_windows(config: Any, length: int) -> None:
    """Print a notice if rows of `length` tokens do not train the recurrent parts of layers that also have a window."""
    short: dict[int, list[int]] = {}
    for index in config.pattern.replaced:
        states = layer_states(config, index).values()
        windows = [state.shape[0] + 1 for state in states if state.kind == "window"]
        if windows and min(windows) >= length and any(state.kind == "recurrent" for state in states):
            short.setdefault(min(windows), []).append(index)
    for window, layers in short.items():
        notice(
            f"data: rows of {length:,} tokens do not reach beyond the window_size {window:,} of layers "
            f"{listed(map(str, layers))}, whose recurrent parts are not trained by them"
        )


class SameData(TrainerCallback):
    """Stores the digest of a run's data in the Trainer's state. Raises HmfError if a run is resumed with other data."""

    def __init__(self, digest: str):
        self.digest = digest

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.stateful_callbacks.setdefault("data", {"digest": self.digest})["digest"] != self.digest:
            raise HmfError(
                f"{args.output_dir}: the data changed since the run began (texts, rows, pairs or the chat template); "
                "restore it, or choose another output"
            )


def compile_layers(model: nn.Module) -> None:
    """Compile every decoder layer of `model` in place. The ops of `hmf.ops` run as they are between the compiled parts.

    Layers of one class share the compiled code, so the time for it does not grow with their number.
    """
    from torch._dynamo import config

    # A frame is compiled again for each projection that it is called for, with and without gradients.
    config.recompile_limit = max(config.recompile_limit, 64)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # the base class of all decoder layers
            module.compile()


def frozen_matrices(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The frozen parameters of linear layers, except a head's that are tied to the embeddings: those stay as wide as
    the residual stream."""
    embeddings = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and parameter is not embeddings:
                    yield parameter


def narrow_frozen(model: PreTrainedModel) -> None:
    """Store `frozen_matrices` in bfloat16, in place, if they are exact in it. For training with bfloat16.

    Autocast rounds them to bfloat16 in every forward pass anyway, so results keep their bits. The weights need half of
    the memory, autocast stores no copies of them, and FSDP2 sends half as much.
    """
    for parameter in frozen_matrices(model):
        narrow = parameter.data.bfloat16()
        if narrow.to(parameter.dtype).equal(parameter.data):
            parameter.data = narrow


def widen_frozen(model: PreTrainedModel) -> None:
    """Undo `narrow_frozen`, at the end of a run. On the CPU, as the GPU may lack the memory for these weights."""
    model.cpu()
    for parameter in frozen_matrices(model):
        parameter.data = parameter.data.float()


def train(
    trainer: HybridTrainer,
    rows: Any,
    title: str,
    log_file: Path,
    training: OptimiserSettings,
    row_tokens: int | None,
    flops_per_token: float | None = None,
    draw: Callable[[Path], object] | None = None,
) -> None:
    """Run a Trainer to its end, from its last complete checkpoint if there is one.

    Args:
        rows: the data set. Every checkpoint stores its digest and that of the evaluation's rows. A run cannot be
            resumed with other data.
        row_tokens: tokens of a row; None if rows have any number of them.
        draw: called with the path of the log at the end, and from time to time before it.
    """
    step_rows, digest = rows_per_step(training), rows.digest()
    trainer.remove_callback(PrinterCallback)
    if trainer.evaluation is not None:
        digest = hashlib.sha256(f"{digest} {trainer.evaluation.rows.digest()}".encode()).hexdigest()
    trainer.add_callback(SameData(digest))
    if rows.epoch is not None:
        trainer.add_callback(Epochs(rows.epoch, step_rows, training.eval_strategy == "epoch"))
    log = RunLog(log_file, draw)
    trainer.add_callback(log)
    written = step_rows if row_tokens is None else None  # rows that the model writes end anywhere
    if training.torch_compile:
        compile_layers(trainer.model)
    trainer.add_callback(ProgressLine(title, step_rows * (row_tokens or 0), flops_per_token, written))
    try:
        trainer.train(resume_from_checkpoint=trainer.start_from())
    except KeyboardInterrupt:
        last = newest_valid(checkpoints := Path(trainer.args.output_dir))
        start = f"step {last.name.rpartition('-')[2]}, its last checkpoint in {checkpoints}" if last else "the start"
        done = f"at step {trainer.state.global_step} of {trainer.state.max_steps}"
        raise KeyboardInterrupt(f"{done}; the same command resumes from {start}") from None
    finally:
        log.write(trainer.state)
