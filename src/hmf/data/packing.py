# SPDX-License-Identifier: Apache-2.0
"""Tokenised documents and conversations in rows of one fixed length, without padding between them.

A row is a dict of int64 tensors of shape [T]:
    input_ids
    labels         the same ids where the model is to predict them, else -100 (the model shifts them itself)
    position_ids   count up from 0 within each document and restart at the next: they are the document boundaries
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hmf.data import tasks
from hmf.data.encoding import IGNORED, Encoded, enclosed, encode_chat
from hmf.data.tasks import Sample
from hmf.data.tokenizer import document_separator, encode_texts
from hmf.errors import HmfError

Row = dict[str, torch.Tensor]


def encode_conversation(tokenizer: PreTrainedTokenizerBase, conversation: Sample) -> Encoded:
    """The conversation as the model sees it when it answers: prompt (not supervised), then the last assistant turn."""
    return encode_chat(tokenizer, conversation.messages, conversation.tools, turns="last")[0]


class PackedDataset(Dataset[Row]):
    """Rows that were packed beforehand."""

    def __init__(self, rows: list[list[Encoded]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return row_tensors(self.rows[index])


def build_dataset(
    documents: Iterable[str],
    conversations: Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    seed: int,
) -> PackedDataset:
    """Packs every document and conversation exactly once, in an order given by `seed`.

    Conversations stay whole where they fit into a row at all; documents are cut to fill what conversations leave.
    The last row is filled up with separators that are not supervised.

    Raises:
        HmfError: there is nothing to pack.
    """
    separator = document_separator(tokenizer)
    texts = [enclosed(ids, separator) for ids in encode_texts(tokenizer, list(documents) or [""])]
    texts = [text for text in texts if len(text) > 2]
    turns = [encode_conversation(tokenizer, conversation) for conversation in conversations]
    if not texts and not turns:
        raise HmfError("dataset: no text and no conversations; give at least one of them")
    rng = Random(seed)
    rng.shuffle(texts)
    rng.shuffle(turns)
    rows = pack(turns, texts, sequence_length, separator)
    rng.shuffle(rows)
    return PackedDataset(rows)


def pack(
    whole: Sequence[Encoded], divisible: Sequence[Encoded], sequence_length: int, filler: int
) -> list[list[Encoded]]:
    """Rows of exactly `sequence_length` tokens that hold every token of both sequences once.

    Items of `whole` are cut only if they are longer than a row, or when nothing divisible is left to fill a row with.
    """
    rows: list[list[Encoded]] = []
    row: list[Encoded] = []
    room = sequence_length
    # Reversed, so that the next item is at the end, where taking it and putting back its rest is cheap.
    stream, waiting = list(reversed(divisible)), list(reversed(whole))

    def place(item: Encoded, rest: list[Encoded]) -> None:
        nonlocal row, room
        if len(item) > room:
            rest.append(item.cut(room, len(item)))
            item = item.cut(0, room)
        row.append(item)
        room -= len(item)
        if room == 0:
            rows.append(row)
            row, room = [], sequence_length

    while waiting:
        if stream and room < len(waiting[-1]) and room < sequence_length:
            place(stream.pop(), stream)
        else:
            place(waiting.pop(), waiting)
    while stream:
        place(stream.pop(), stream)
    if row:
        place(Encoded([filler] * room, [IGNORED] * room), [])
    return rows


def best_fit(lengths: Sequence[int], room: int, window: int) -> list[list[int]]:
    """Rows of at most `room` tokens that hold each item once, whole: the indices of each row's items.

    The items of a window are placed from the longest to the shortest, each in the open row that it fills best. No more
    than `window` rows stay open; the fullest are closed first. So the search stays short however many items there are.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # room left and number, by room
    for first in range(0, len(lengths), window):
        for item in sorted(range(first, min(first + window, len(lengths))), key=lambda i: -lengths[i]):
            if lengths[item] > room:
                raise ValueError(f"item {item} has {lengths[item]} tokens, a row has {room}")
            place = bisect_left(open_rows, (lengths[item], -1))
            if place < len(open_rows):
                left, row = open_rows.pop(place)
            else:
                left, row = room, len(rows)
                rows.append([])
            rows[row].append(item)
            if left > lengths[item]:
                insort(open_rows, (left - lengths[item], row))
        del open_rows[: max(0, len(open_rows) - window)]
    return rows


@dataclass
class MixtureDataset(Dataset[Row]):
    """Rows drawn from text and generated tasks without end: row i depends on `seed` and i alone.

    Args:
        texts: token ids of each document, as `encode_texts` gives them.
        weights: relative frequency of each task by name; half of the conversations are made with thinking.
        text_share: share of the rows that hold text only; in the others, text fills what conversations leave.
        rows: length of the data set.
    """

    texts: list[list[int]]
    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    weights: dict[str, float]
    rows: int
    text_share: float = 0.3
    seed: int = 0
    _documents: list[Encoded] = field(init=False, repr=False)
    _sizes: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        separator = document_separator(self.tokenizer)
        self._documents = [enclosed(ids, separator) for ids in self.texts]
        self._sizes = [len(document) for document in self._documents]

    def __len__(self) -> int:
        return self.rows

    def digest(self) -> str:
        """Changes with any token of any text, and with all else that a row depends on."""
        sha = hashlib.sha256(repr((type(self).__name__, self.sequence_length, self.text_share, self.seed)).encode())
        template = self.tokenizer.chat_template if self.weights else None
        sha.update(repr((sorted(self.weights.items()), template, [len(ids) for ids in self.texts])).encode())
        for ids in self.texts:
            sha.update(np.array(ids, dtype=np.int64).tobytes())
        return sha.hexdigest()

    def __getitem__(self, index: int) -> Row:
        rng = Random(f"{self.seed}:{index}")
        row: list[Encoded] = []
        room = self.sequence_length
        if rng.random() >= self.text_share:
            names, weights = list(self.weights), list(self.weights.values())
            while room >= tasks.MIN_LENGTH:
                task = rng.choices(names, weights)[0]
                seed, length = rng.getrandbits(62), tasks.random_length(rng, room)
                thinking = rng.random() < 0.5
                conversation = tasks.sample(task, seed, self.tokenizer, length, thinking=thinking)
                item = encode_conversation(self.tokenizer, conversation)
                if len(item) > room:
                    break
                row.append(item)
                room -= len(item)
        while room:
            # A document is as likely as it is long, and so is each place in it.
            document = rng.choices(self._documents, self._sizes)[0]
            start = rng.randrange(-room // 2, len(document))
            row.append(document.cut(max(0, start), max(0, start) + room))
            room -= len(row[-1])
        rng.shuffle(row)
        return row_tensors(row)


class PromptDataset(MixtureDataset):
    """Beginnings to go on from, {"prompt": ids}, of at most `sequence_length` tokens: the prompts of conversations, and
    pieces of text of any length. Row i depends on `seed` and i alone."""

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        rng, room = Random(f"{self.seed}:prompt {index}"), self.sequence_length
        if rng.random() >= self.text_share:
            task = rng.choices(list(self.weights), list(self.weights.values()))[0]
            seed, length = rng.getrandbits(62), tasks.random_length(rng, max(room, tasks.MIN_LENGTH))
            conversation = tasks.sample(task, seed, self.tokenizer, length, thinking=rng.random() < 0.5)
            prompt = encode_texts(self.tokenizer, [conversation.prompt(self.tokenizer)])[0]
            if len(prompt) <= room:
                return {"prompt": prompt}
        document = rng.choices(self._documents, self._sizes)[0]
        length = rng.randint(1, min(room, len(document)))
        start = rng.randrange(len(document) - length + 1)
        return {"prompt": document.ids[start : start + length]}


def cu_seqlens(position_ids: torch.Tensor) -> torch.Tensor:
    """Document boundaries of packed rows laid end to end.

    Args:
        position_ids: [B, T] or [T], restarting at 0 with each document.
    Returns:
        int32 [S + 1]: the S documents' starts in the flattened B * T tokens, and B * T.
    """
    flat = position_ids.reshape(-1)
    starts = torch.nonzero(flat == 0).reshape(-1)
    return torch.cat([starts, starts.new_tensor([flat.numel()])]).to(torch.int32)


def row_tensors(row: Sequence[Encoded]) -> Row:
    return {
        "input_ids": torch.tensor([token for item in row for token in item.ids]),
        "labels": torch.tensor([label for item in row for label in item.labels]),
        "position_ids": torch.tensor([position for item in row for position in range(len(item))]),
    }
