# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism in a Trainer: neighbouring processes read the same rows and each keeps its part of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hmf.parallel.sequence import STARTS, attach, cut, sequence_group, with_shards

from .checkpoints import say


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


class SequenceParallel:
    """`ranks` neighbouring processes share rows. Attaches itself to the model.

    Batches then have `shards` and `shift_labels`; a loss must be a sum over the process's own tokens that is divided by
    what all processes count. After the first step one line says how many bytes each layer received from the others.
    """

    def __init__(self, model: PreTrainedModel, ranks: int):
        self.group = sequence_group(ranks)
        attach(model)
        self._reported = False

    def shared(self, rows: Any, batch_size: int) -> SharedRows:
        """The data set of a Trainer whose processes share `rows`."""
        return SharedRows(rows, batch_size, self.group.size)

    def own_part_of(self, collate: Callable[[list[Any]], dict[str, torch.Tensor]]) -> OwnPart:
        """The collator that keeps this process's part of what `collate` makes of whole rows."""
        return OwnPart(collate, self.group.rank, self.group.size)

    def with_shards(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch from `own_part_of` as the model takes it; others as they are."""
        return with_shards(self.group, inputs) if STARTS in inputs else inputs

    def report(self, main_process: bool) -> None:
        """After a batch: its traffic is printed, the first time."""
        if self.group.received:
            if main_process and not self._reported:
                say(traffic(self.group.received))
            self._reported = True
            self.group.received.clear()


def traffic(received: Counter[str]) -> str:
    """One line of what a `Group` counted: megabytes by layer."""
    layers = sorted(received.items(), key=lambda item: int(item[0].split()[0]))
    parts = ", ".join(f"{label} {size / 1e6:.3g}" for label, size in layers)
    total = sum(received.values()) / 1e6
    return f"sequence parallel: a batch brings a process {total:.3g} MB from the others; by layer, in MB: {parts}"
