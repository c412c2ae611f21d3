# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism in a Trainer: neighbouring processes read the same rows, and each keeps its part of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hmf.parallel.sequence import STARTS, attach, sequence_group, split_batch, with_shards

from .checkpoints import say


class SharedRows(Dataset):
    """Repeats each batch of rows `ranks` times.

    A Trainer gives consecutive batches to consecutive processes, so the `ranks` processes of a group get the same rows.
    """

    def __init__(self, rows: Any, batch_size: int, ranks: int):
        self.rows, self.batch_size, self.ranks = rows, batch_size, ranks

    def __len__(self) -> int:
        return len(self.rows) * self.ranks

    def __getitem__(self, index: int) -> Any:
        batch, place = divmod(index, self.batch_size)
        return self.rows[batch // self.ranks * self.batch_size + place]


class OwnPart:
    """A collator that applies another one to whole rows and returns this process's part."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, torch.Tensor]], rank: int, ranks: int):
        self.collate, self.rank, self.ranks = collate, rank, ranks

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        return split_batch(self.collate(rows), self.rank, self.ranks)


class SequenceParallel:
    """Lets `ranks` neighbouring processes share rows, and prepares the model for it.

    Batches then have `shards` and `shift_labels`. A loss must be a sum over the process's own tokens, divided by the
    count of all processes. After the first batch, one line reports the bytes that each layer received.
    """

    def __init__(self, model: PreTrainedModel, ranks: int):
        self.group = sequence_group(ranks)
        attach(model)
        self._reported = False

    def shared(self, rows: Any, batch_size: int) -> SharedRows:
        """The data set for a Trainer whose processes share `rows`."""
        return SharedRows(rows, batch_size, self.group.size)

    def own_part_of(self, collate: Callable[[list[Any]], dict[str, torch.Tensor]]) -> OwnPart:
        """A collator that returns this process's part of the batch that `collate` makes."""
        return OwnPart(collate, self.group.rank, self.group.size)

    def with_shards(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch from `own_part_of` in the form that the model accepts; other batches unchanged."""
        return with_shards(self.group, inputs) if STARTS in inputs else inputs

    def report(self, main_process: bool) -> None:
        """Call after each batch; prints the traffic of the first one."""
        if self.group.received:
            if main_process and not self._reported:
                say(traffic(self.group.received))
            self._reported = True
            self.group.received.clear()


def traffic(received: Counter[str]) -> str:
    """One line with the megabytes that a `Group` counted, by layer."""
    layers = sorted(received.items(), key=lambda item: int(item[0].split()[0]))
    parts = ", ".join(f"{label} {size / 1e6:.3g}" for label, size in layers)
    total = sum(received.values()) / 1e6
    return f"sequence parallel: a process receives {total:.3g} MB for a batch; by layer, in MB: {parts}"
