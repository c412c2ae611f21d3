# SPDX-License-Identifier: Apache-2.0
"""Evaluation during training: rows that training does not see, and their loss, the same for any number of processes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hmf.config.places import PairSettings
from hmf.config.runs import DataSettings
from hmf.config.training import OptimiserSettings
from hmf.data.mixture import mixture, row_length
from hmf.data.preference import pair_dataset
from hmf.errors import HmfError

ROWS = 64  # of an evaluation, unless the recipe gives another number or a data set of its own
OTHER_SEED = 2**32  # added to a recipe's seed, which is below it: rows that are drawn are not those of training


def with_evaluation(
    rows: Any,
    training: OptimiserSettings,
    data: DataSettings | PairSettings,
    eval_data: DataSettings | PairSettings | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> tuple[Any, Any]:
    """The rows that training reads of `rows`, the data set of `data`, and those of its evaluation (None without one).

    Without `eval_data` rows are held out: the last ones of a prepared set or of packed pairs, which training then does
    not read; of text and tasks, rows of the held-out text, drawn by another seed.

    Raises:
        HmfError: rows that training would see too, and fewer rows than the recipe asks for.
    """
    if training.eval_strategy == "no":
        return rows, None
    if isinstance(eval_data, PairSettings):
        return rows, _first(pair_dataset(eval_data, tokenizer, seed=seed), training.eval_rows, "eval_pairs")
    if eval_data is not None and eval_data.prepared is not None:
        given = mixture(eval_data, tokenizer, 0, seed)
        return rows, _first(given, training.eval_rows, "eval_data.prepared")
    count = training.eval_rows or ROWS
    if eval_data is not None or rows.epoch is None:
        return rows, _drawn(data, eval_data, tokenizer, count, seed)
    first = held_out_from(rows.epoch, training)
    for source in getattr(rows, "index", {}).get("sources", ()):
        if source.get("passes", 1) > 1:
            raise HmfError(
                f"training.eval_strategy: the prepared rows hold documents of {source['name']} {source['passes']:g} "
                "times, so none can be held out; prepare a set of other documents and give it as eval_data"
            )
    return rows.part(0, first), rows.part(first, rows.epoch)


def held_out_from(rows: int, training: OptimiserSettings) -> int:
    """The first of `rows` rows that is held out for the evaluation; HmfError where none would be left to train on."""
    count = training.eval_rows or ROWS
    if count >= rows:
        raise HmfError(
            f"training.eval_rows: {count} of the {rows} rows would be held out and leave none to train on; give fewer, "
            "or rows of their own (eval_data, eval_pairs)"
        )
    return rows - count


def _first(rows: Any, count: int | None, key: str) -> Any:
    if count is not None and count > rows.epoch:
        raise HmfError(f"training.eval_rows: {key} has {rows.epoch} rows and not {count}; lower it or leave it out")
    return rows.part(0, count or rows.epoch)


def _drawn(
    data: DataSettings | PairSettings,
    own: DataSettings | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    seed: int,
) -> Any:
    """Rows of text and tasks; `own`: of eval_data."""
    assert isinstance(data, DataSettings)
    settings = own or data
    text = Path(settings.text)
    shared = settings.text == "stdlib" or (data.prepared is None and text.resolve() == Path(data.text).resolve())
    if shared and settings.text_share and text.is_file():
        raise HmfError(
            f"training.eval_strategy: {settings.text} is one file, of which no part is held out; name another text in "
            "eval_data"
        )
    return mixture(settings, tokenizer, rows, seed + OTHER_SEED, split="heldout" if shared else None)


def evaluation_length(training: OptimiserSettings, eval_data: DataSettings | PairSettings | None) -> int:
    """Tokens of a row of `eval_data`; 0 without it."""
    if eval_data is None or training.eval_strategy == "no":
        return 0
    return eval_data.sequence_length if isinstance(eval_data, PairSettings) else row_length(eval_data)


class Epochs(TrainerCallback):
    """Passes over the data, where there are any, are what a run's epochs are: in its log, and for `eval_strategy`.

    The Trainer itself takes the rows of the whole run for one epoch, because a step may have rows of two passes.
    """

    def __init__(self, epoch_rows: int, rows_per_step: int, evaluate: bool):
        self.epoch_rows, self.rows_per_step, self.evaluate = epoch_rows, rows_per_step, evaluate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        read = state.global_step * self.rows_per_step
        state.epoch = read / self.epoch_rows
        ended = read // self.epoch_rows > (read - self.rows_per_step) // self.epoch_rows
        if self.evaluate and (ended or state.global_step >= state.max_steps):
            control.should_evaluate = True


class EvaluationLoss:
    """Adds up the loss of the rows of an evaluation as that of one large batch, over batches and processes.

    The Trainer's own mean of the batches' means would depend on how rows are split into batches, and on the rows that
    it repeats to give all processes equally many.

    Args:
        rows: the data set.
        batch_size: at most so many rows are a batch.
        ranks: processes that share rows.
    """

    def __init__(self, rows: Any, batch_size: int, ranks: int, accelerator: Accelerator):
        self.rows, self.ranks, self.accelerator = rows, ranks, accelerator
        # All batches are full: what the Trainer repeats are then whole batches, which do not count.
        self.batch_size = next(size for size in range(batch_size, 0, -1) if len(rows) % size == 0)
        self._counts: torch.Tensor | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._turn = 0

    def start(self) -> None:
        """Before the first batch."""
        self._sums, self._turn = {}, 0

    def counts(self, count: Callable[..., torch.Tensor], collate: Callable[[list[Any]], Any]) -> torch.Tensor:
        """What all rows count, by what `count` says of a batch; HmfError where they count nothing."""
        if self._counts is None:
            self._counts = sum(count(**collate([self.rows[index]])) for index in range(len(self.rows)))
            if not self._counts.all():
                raise HmfError("training.eval_strategy: the rows of the evaluation have no token that is supervised")
        return self._counts.to(self.accelerator.device)

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """The losses of this process's next batch, divided by the counts of all."""
        batch = (self._turn * self.accelerator.num_processes + self.accelerator.process_index) // self.ranks
        self._turn += 1
        counts = batch < len(self.rows) // self.batch_size
        for name, value in losses.items():
            value = value.detach().double() if counts else torch.zeros_like(value, dtype=torch.float64)
            self._sums[name] = self._sums.get(name, 0) + value

    def figures(self, prefix: str) -> dict[str, float]:
        """The loss by the name "loss", and its parts, where there are several, by `prefix` and their names."""
        found = {name: self.accelerator.reduce(value, "sum").item() for name, value in sorted(self._sums.items())}
        parts = {f"{prefix}{name}": value for name, value in found.items() if name != "loss"}
        return {"loss": found["loss"], **(parts if len(parts) > 1 else {})}


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """After the block all generators are as they were before it."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
