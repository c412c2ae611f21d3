# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism in a Trainer: neighbouring processes read the same rows and each keeps its part of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from hmf.parallel.sequence import STARTS, attach, cut, sequence_group, with_shards

from .checkpoints import say

_Base: Any = object  # a mixin: transformers' classes come after it


class SharedRows(Dataset):
    """Rows in such an order that a Trainer, which deals batches out to processes in turn, gives the same ones to each
    of the `ranks` processes that share rows, and next ones to the next."""

    def __init__(self, rows: Any, batch_size: int, ranks: int):
        self.rows, self.batch_size, self.ranks = rows, batch_size, ranks

    def __len__(self) -> int:
        return len(self.rows) * self.ranks

    def __getitem__(self, index: int) -> Any:
        batch, place = divmod(index, self.batch_size)
        return self.rows[batch // self.ranks * self.batch_size + place]


class OwnPart:
    """A collator after another: what one process keeps of a batch of whole rows."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, torch.Tensor]], rank: int, ranks: int):
        self.collate, self.rank, self.ranks = collate, rank, ranks

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        return cut(self.collate(rows), self.rank, self.ranks)


class SequenceParallel(_Base):
    """Put before a Trainer: `sequence_parallel` neighbouring processes share rows; 1 leaves everything as it is.

    The batches that `compute_loss` gets have `shards` and `shift_labels`; its loss must be a sum over the process's own
    tokens that is divided by what all processes count. After the first step one line says how many bytes each layer
    received from the other processes.
    """

    train_dataset: Any
    data_collator: Any
    _told = False

    def __init__(self, *args: Any, sequence_parallel: int = 1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sequence = None
        if sequence_parallel > 1:
            self.sequence = sequence_group(sequence_parallel)
            attach(self.model)
            size = self.args.per_device_train_batch_size
            self.train_dataset = SharedRows(self.train_dataset, size, sequence_parallel)
            self.data_collator = OwnPart(self.data_collator, self.sequence.rank, sequence_parallel)

    def whole_rows(self, count: int) -> list[Any]:
        """The first rows of the data set, at most `count`; all processes get the same."""
        rows = self.train_dataset if self.sequence is None else self.train_dataset.rows
        return [rows[index] for index in range(min(count, len(rows)))]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        return inputs if self.sequence is None or STARTS not in inputs else with_shards(self.sequence, inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.sequence is not None and self.sequence.received:
            if self.is_world_process_zero() and not self._told:
                say(traffic(self.sequence.received))
            self._told = True
            self.sequence.received.clear()
        return loss


def traffic(received: Counter[str]) -> str:
    """One line of what a `Group` counted: megabytes by layer."""
    layers = sorted(received.items(), key=lambda item: int(item[0].split()[0]))
    parts = ", ".join(f"{label} {size / 1e6:.3g}" for label, size in layers)
    total = sum(received.values()) / 1e6
    return f"sequence parallel: a batch brings a process {total:.3g} MB from the others; by layer, in MB: {parts}"
