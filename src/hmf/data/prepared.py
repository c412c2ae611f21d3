# SPDX-License-Identifier: Apache-2.0
"""Prepared rows as a data set for training, and checks of their files. prepare.py writes them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hmf.config.strict import parse_sealed
from hmf.data.encoding import IGNORED
from hmf.data.packing import PackedRow
from hmf.data.progress import Progress
from hmf.data.shards import vocabulary
from hmf.errors import HmfError

INDEX, TOKENISED = "index.json", "tokenised"


class PreparedDataset(Dataset[PackedRow]):
    """Rows of a prepared data set. The first pass has the stored order, each further pass an order by `seed`.

    Args:
        tokenizer: the tokenizer of the model that reads the rows; None to skip the check that it fits.
        rows: length of the data set, in as many passes as needed; None for one pass.
    Raises:
        HmfError: the set is unfinished, a file was changed, or it was prepared with another tokenizer.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rows: int | None = None,
        seed: int = 0,
    ):
        import datasets

        folder = Path(folder)
        self.index = read_index(folder)
        if tokenizer is not None and vocabulary(tokenizer) != self.index["vocabulary"]:
            raise HmfError(
                f"{folder}: was prepared with another tokenizer than the model's; prepare it again with the model's "
                "tokenizer"
            )
        check_files(folder, self.index)
        self.stored = datasets.concatenate_datasets(
            [datasets.Dataset.from_file(str(folder / name)) for name in sorted(self.index["files"])]
        ).with_format("numpy")
        if len(self.stored) != self.index["rows"]:
            raise HmfError(f"{folder / INDEX}: is damaged; prepare the set again")
        self.rows = len(self.stored) if rows is None else rows
        self.sequence_length, self.seed = int(self.index["sequence_length"]), seed
        self._part: list[int] | None = None
        self._order: tuple[int, np.ndarray] = (0, np.arange(len(self.stored)))

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> PackedRow:
        row = self.stored[self.place(index)]
        ids = torch.tensor(row["input_ids"], dtype=torch.int64)
        supervised = torch.tensor(row["supervised"])
        positions = [torch.arange(length) for length in row["lengths"].tolist()]
        labels = torch.where(supervised, ids, IGNORED)
        return {"input_ids": ids, "labels": labels, "position_ids": torch.cat(positions)}

    @property
    def epoch(self) -> int:
        """Rows of a pass over the data."""
        return len(self.stored)

    def part(self, start: int, stop: int) -> PreparedDataset:
        """A data set of one pass over the stored rows `start` to `stop` alone."""
        other = copy.copy(self)
        other.stored = self.stored.select(range(start, stop))
        other.rows, other._part, other._order = stop - start, [start, stop], (0, np.arange(stop - start))
        return other

    def digest(self) -> str:
        """A hash of all tokens of all rows, and of their order."""
        facts = [self.index["files"], self.sequence_length, self.seed]
        if self._part is not None:
            facts.append(self._part)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def place(self, index: int) -> int:
        """Number of the stored row at an index."""
        if not 0 <= index < self.rows:
            raise IndexError(index)
        number, place = divmod(index, len(self.stored))
        if number and self._order[0] != number:
            self._order = number, np.random.default_rng([self.seed, number]).permutation(len(self.stored))
        return int(self._order[1][place]) if number else place


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a prepared data set. HmfError if the set is unfinished, or a file is missing or has a wrong size."""
    path = folder / INDEX
    if not path.is_file():
        started = (folder / TOKENISED).is_dir()
        fix = "run `hmf data prepare` again" if started else "create it with `hmf data prepare`"
        raise HmfError(f"{folder}: is not a finished prepared data set (there is no {INDEX}); {fix}")
    try:
        index = parse_sealed(path.read_text(encoding="utf-8"), required=False)  # older sets have no seal
        files = {name: facts["bytes"] for name, facts in index["files"].items() if facts["sha256"]}
        if missing := {"recipe", "sequence_length", "rows", "sources", "vocabulary"} - index.keys():
            raise KeyError(*missing)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise HmfError(f"{path}: is damaged; prepare the set again") from None
    for name, size in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise HmfError(f"{folder / name}: is missing or damaged; prepare the set again")
    return index


def check_files(folder: Path, index: dict[str, Any]) -> None:
    """HmfError if the hash of a file of rows is wrong. The processes of a machine share the work."""
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    files = sorted(index["files"].items())[rank::ranks]  # of this process
    progress = Progress(f"check {folder}", sum(facts["bytes"] for _, facts in files))
    try:
        for name, facts in files:
            if sha256_of(folder / name) != facts["sha256"]:
                raise HmfError(
                    f"{folder / name}: is damaged (its hash is not the one in {INDEX}); prepare the set again"
                )
            progress.add(facts["bytes"], 0)
    finally:
        progress.close()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
