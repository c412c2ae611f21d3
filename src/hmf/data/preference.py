# SPDX-License-Identifier: Apache-2.0
"""Pairs of a better and a worse answer, packed into rows.

A file has one JSON object in each line:
    prompt     messages up to the answer, or the user's words
    chosen     the better answer: an assistant's message, a list with that one, or its words
    rejected   the worse one, likewise
    tools      optional: the tools that the prompt's system turn lists
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hmf.errors import HmfError, unknown_name

from .encoding import IGNORED, Encoded, encode_answers
from .packing import Row, row_tensors
from .tokenizer import document_separator

KEYS = ("prompt", "chosen", "rejected", "tools")
Pair = tuple[Encoded, Encoded]


class PairDataset(Dataset[Row]):
    """Rows of whole pairs, each chosen before rejected; row i depends on `seed` and i alone.

    Every pair comes once before any comes again, in another order. Beside the columns of every row there is
    `reference`, float32 [P, 2]: log-likelihoods of chosen and rejected under the model that training starts from, as
    `references` [number of different rows, P, 2] has them; NaN behind a row's last pair.
    """

    def __init__(self, packed: list[list[Pair]], sequence_length: int, filler: int, rows: int, seed: int = 0):
        self.packed, self.sequence_length, self.filler, self.rows, self.seed = (
            packed,
            sequence_length,
            filler,
            rows,
            seed,
        )
        self.references = torch.full((len(packed), max(map(len, packed)), 2), torch.nan)
        for row, pairs in enumerate(packed):
            self.references[row, : len(pairs)] = 0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Row:
        turn, place = divmod(index, len(self.packed))
        order = list(range(len(self.packed)))
        Random(f"{self.seed}:{turn}").shuffle(order)
        return self.row(order[place])

    def digest(self) -> str:
        """Changes with any token of any pair, and with how they are packed."""
        answers = [[(answer.ids, answer.labels) for pair in pairs for answer in pair] for pairs in self.packed]
        return hashlib.sha256(json.dumps(answers).encode()).hexdigest()

    def row(self, number: int) -> Row:
        """One of the different rows."""
        items = [answer for pair in self.packed[number] for answer in pair]
        if room := self.sequence_length - sum(map(len, items)):
            items.append(Encoded([self.filler] * room, [IGNORED] * room))
        return row_tensors(items) | {"reference": self.references[number]}


def pair_dataset(
    path: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int, rows: int, seed: int = 0
) -> PairDataset:
    """The pairs of a file, packed in its order; HmfError names the file, the line and the mend."""
    pairs = [
        (number, encode_pair(tokenizer, entry, f"{path}:{number}"))
        for number, entry in enumerate(_lines(path), 1)
        if entry
    ]
    if not pairs:
        raise HmfError(f"{path}: no pairs; give one JSON object a line with {', '.join(KEYS[:3])}")
    packed: list[list[Pair]] = []
    room = 0
    for number, pair in pairs:
        size = len(pair[0]) + len(pair[1])
        if size > sequence_length:
            raise HmfError(
                f"{path}:{number}: the pair has {size} tokens and a row {sequence_length}; raise "
                "pairs.sequence_length, or leave the pair out"
            )
        if size > room:
            packed.append([])
            room = sequence_length
        packed[-1].append(pair)
        room -= size
    return PairDataset(packed, sequence_length, document_separator(tokenizer), rows, seed)


def encode_pair(tokenizer: PreTrainedTokenizerBase, entry: dict[str, Any], where: str) -> Pair:
    """Both conversations, their last turns supervised; HmfError says what is wrong `where`."""
    for key in entry:
        if key not in KEYS:
            raise HmfError(f"{where}: {unknown_name('key', key, KEYS)}")
    prompt = _messages(entry.get("prompt"), "user", f"{where}: prompt")
    answers: list[dict[str, Any]] = []
    for key in ("chosen", "rejected"):
        answer = _messages(entry.get(key), "assistant", f"{where}: {key}")
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise HmfError(f"{where}: {key}: give the assistant's answer alone; what comes before it belongs to prompt")
        answers += answer
    try:
        chosen, rejected = encode_answers(tokenizer, list(prompt), answers, entry.get("tools"))
    except HmfError as error:
        raise HmfError(f"{where}: {error}") from None
    if chosen.ids == rejected.ids:
        raise HmfError(f"{where}: chosen and rejected are the same; leave the pair out")
    return chosen, rejected


def _messages(value: Any, role: str, where: str) -> Sequence[dict[str, Any]]:
    if isinstance(value, str) and value:
        return [{"role": role, "content": value}]
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise HmfError(f"{where}: give text, or messages with role and content")
    return messages


def _lines(path: Path) -> list[dict[str, Any] | None]:
    """The object in each line; None for an empty one."""
    if not path.is_file():
        raise HmfError(f"{path}: no such file; pairs.path is a file of JSON lines")
    found: list[dict[str, Any] | None] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            entry = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise HmfError(f"{path}:{number}: not valid JSON ({error})") from None
        if entry is not None and not isinstance(entry, dict):
            raise HmfError(f"{path}:{number}: a line holds one JSON object with {', '.join(KEYS[:3])}")
        found.append(entry)
    return found
