# SPDX-License-Identifier: Apache-2.0
"""Evaluation during training: the loss of rows that are not trained on, independent of the number of processes."""

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
from hmf.errors import HmfError, counted, listed, notice

ROWS = 64  # default number of rows of an evaluation without its own data set
OTHER_SEED = 2**32  # added to a recipe's seed, which is smaller, so that other rows are drawn than for training


def with_evaluation(
    rows: Any,
    training: OptimiserSettings,
    data: DataSettings | PairSettings,
    eval_data: DataSettings | PairSettings | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> tuple[Any, Any]:
    """Split `rows`, the data set of `data`, into rows for training and rows for evaluation (None without evaluation).

    Without `eval_data`, rows are held out. For a prepared set or packed pairs, these are the last rows, which training
    does not read. For text and tasks, they are drawn from held-out text with another seed.

    Raises:
        HmfError: training would read rows of the evaluation, or there are fewer rows than the recipe requires.
    """
    if training.eval_strategy == "no":
        return rows, None
    if isinstance(eval_data, PairSettings):
        evaluated = _first(rows, pair_dataset(eval_data, tokenizer, seed=seed), training.eval_rows, "eval_pairs")
        if both := len((own := evaluated.pairs()) & rows.pairs()):
            line = f"eval_pairs: {both} of {counted(len(own), 'pair')} are read in training too"
            if both == len(own):
                raise HmfError(f"{line}; leave it out, and some of them are held out")
            notice(line)
        return rows, evaluated
    if eval_data is not None and eval_data.prepared is not None:
        evaluated = _first(rows, mixture(eval_data, tokenizer, 0, seed), training.eval_rows, "eval_data.prepared")
        if names := [name for facts, name in _sources(evaluated).items() if facts in _sources(rows)]:
            raise HmfError(
                f"eval_data.prepared: {listed(names)}: training reads the same documents; leave it out, and rows are "
                "held out, or prepare a set of other documents"
            )
        return rows, evaluated
    count = training.eval_rows or ROWS
    if eval_data is not None or rows.epoch is None:
        return rows, _drawn(data, eval_data, tokenizer, count, seed)
    first = held_out_from(rows.epoch, training)
    for source in getattr(rows, "index", {}).get("sources", ()):
        if source.get("passes", 1) > 1:
            raise HmfError(
                f"training.eval_strategy: the prepared rows contain documents of {source['name']} {source['passes']:g} "
                "times, so none can be held out; prepare a set of other documents and set eval_data to it"
            )
    return rows.part(0, first), rows.part(first, rows.epoch)


def held_out_from(rows: int, training: OptimiserSettings) -> int:
    """Index of the first held-out row of `rows` rows. Raises HmfError if no row would remain for training."""
    count = training.eval_rows or ROWS
    if count >= rows:
        raise HmfError(
            f"training.eval_rows: holding out {count} of {rows} rows leaves none for training; give fewer, or a "
            "separate data set (eval_data, eval_pairs)"
        )
    return rows - count


def _first(trained: Any, rows: Any, count: int | None, key: str) -> Any:
    """The first `count` of `rows`; all for None. HmfError if they are the rows `trained`, perhaps by another path."""
    if count is not None and count > rows.epoch:
        raise HmfError(
            f"training.eval_rows: {key} has {rows.epoch} rows, fewer than {count}; lower or remove eval_rows"
        )
    if rows.digest() == trained.digest():
        raise HmfError(f"{key}: these are the rows that training reads; leave it out, and some of them are held out")
    return rows.part(0, count or rows.epoch)


def _sources(rows: Any) -> dict[tuple[Any, ...], str]:
    """The names of the sources of a prepared set, by facts that differ unless their documents are the same."""
    sources = getattr(rows, "index", {}).get("sources", ())
    return {tuple(x.get(name) for name in ("content", "records", "tokens")): x["name"] for x in sources}


def _drawn(
    data: DataSettings | PairSettings,
    own: DataSettings | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    seed: int,
) -> Any:
    """Rows of text and tasks for the evaluation. own: the recipe's eval_data, if any."""
    assert isinstance(data, DataSettings)
    settings = own or data
    text = Path(settings.text)
    shared = settings.text == "stdlib" or (data.prepared is None and text.resolve() == Path(data.text).resolve())
    if shared and settings.text_share and text.is_file():
        raise HmfError(
            f"training.eval_strategy: {settings.text} is one file, which has no held-out part; name another text in "
            "eval_data"
        )
    key = "data" if own is None else "eval_data"
    return mixture(settings, tokenizer, rows, seed + OTHER_SEED, split="heldout" if shared else None, key=key)


def evaluation_length(training: OptimiserSettings, eval_data: DataSettings | PairSettings | None) -> int:
    """Number of tokens in a row of `eval_data`; 0 if there is none."""
    if eval_data is None or training.eval_strategy == "no":
        return 0
    return eval_data.sequence_length if isinstance(eval_data, PairSettings) else row_length(eval_data)


class Epochs(TrainerCallback):
    """Counts passes over a finite data set as epochs, for the log and for `eval_strategy`.

    The Trainer itself counts the rows of the whole run as one epoch, because a step may have rows of two passes.
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
    """Computes the loss over all rows of an evaluation as if they were one large batch.

    The Trainer's mean of the batches' means would depend on the split into batches, and on rows that are repeated to
    give all processes the same number of batches.

    Args:
        rows: the data set.
        batch_size: largest number of rows in a batch.
        ranks: number of processes that share rows.
    """

    def __init__(self, rows: Any, batch_size: int, ranks: int, accelerator: Accelerator):
        self.rows, self.ranks, self.accelerator = rows, ranks, accelerator
        # All batches are full. The Trainer therefore repeats only whole batches, which are not counted.
        self.batch_size = next(size for size in range(batch_size, 0, -1) if len(rows) % size == 0)
        self._counts: torch.Tensor | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._turn = 0

    def start(self) -> None:
        """Reset the sums. Call it before the first batch."""
        self._sums, self._turn = {}, 0

    def counts(self, count: Callable[..., torch.Tensor], collate: Callable[[list[Any]], Any]) -> torch.Tensor:
        """The counts of all rows, from `count` of each batch. Raises HmfError if nothing is supervised."""
        if self._counts is None:
            self._counts = sum(count(**collate([self.rows[index]])) for index in range(len(self.rows)))
            if not self._counts.all():
                raise HmfError(
                    "training.eval_strategy: no token of the evaluation's rows is supervised; use rows with labels"
                )
        return self._counts.to(self.accelerator.device)

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Add the losses of this process's next batch, which are divided by the counts of all rows."""
        batch = (self._turn * self.accelerator.num_processes + self.accelerator.process_index) // self.ranks
        self._turn += 1
        counts = batch < len(self.rows) // self.batch_size
        for name, value in losses.items():
            value = value.detach().double() if counts else torch.zeros_like(value, dtype=torch.float64)
            self._sums[name] = self._sums.get(name, 0) + value

    def figures(self, prefix: str) -> dict[str, float]:
        """The loss under the name "loss"; if it has several parts, also these, under `prefix` and their names."""
        totals = {name: self.accelerator.reduce(value, "sum").item() for name, value in sorted(self._sums.items())}
        parts = {f"{prefix}{name}": value for name, value in totals.items() if name != "loss"}
        return {"loss": totals["loss"], **(parts if len(parts) > 1 else {})}


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Restore the state of all random number generators after the block."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
