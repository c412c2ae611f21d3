# SPDX-License-Identifier: Apache-2.0
"""Preference pairs: a chosen and a rejected answer to one prompt, packed into rows."""

from __future__ import annotations

import hashlib
import json
from random import Random

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hmf.config.places import PairSettings
from hmf.errors import HmfError, listed

from .encoding import IGNORED, Encoded, encode_answers
from .files import say_once
from .formats import Pair as AnswerPair
from .packing import PackedRow, row_tensors
from .sources import Source, pair_of
from .tokenizer import document_separator

Pair = tuple[Encoded, Encoded]


class PairDataset(Dataset[PackedRow]):
    """Rows of whole pairs, in which a chosen answer precedes its rejected one. Row i depends only on `seed` and i.

    One pass over the rows has every pair once; each further pass has another order. In addition to the columns of every
    row there is `reference`, float32 [P, 2]: log-likelihoods of chosen and rejected under the model that training
    starts from, copied from `references` [number of distinct rows, P, 2]; NaN after the last pair of a row.
    """

    def __init__(self, packed: list[list[Pair]], sequence_length: int, filler: int, rows: int, seed: int = 0):
        self.packed, self.sequence_length, self.filler = packed, sequence_length, filler
        self.rows, self.seed = rows, seed
        self.references = torch.full((len(packed), max(map(len, packed)), 2), torch.nan)
        for row, pairs in enumerate(packed):
            self.references[row, : len(pairs)] = 0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> PackedRow:
        turn, place = divmod(index, len(self.packed))
        order = list(range(len(self.packed)))
        Random(f"{self.seed}:{turn}").shuffle(order)
        return self.row(order[place])

    @property
    def epoch(self) -> int:
        """Rows of a pass over the data."""
        return len(self.packed)

    def part(self, start: int, stop: int) -> PairDataset:
        """A data set of one pass over the packed rows `start` to `stop` alone."""
        return PairDataset(self.packed[start:stop], self.sequence_length, self.filler, stop - start, self.seed)

    def pairs(self) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The tokens of each pair, independent of how they are packed."""
        return {(tuple(chosen.ids), tuple(rejected.ids)) for pairs in self.packed for chosen, rejected in pairs}

    def digest(self) -> str:
        """A hash of all tokens of all pairs, and of how they are packed."""
        answers = [[(answer.ids, answer.labels) for pair in pairs for answer in pair] for pairs in self.packed]
        return hashlib.sha256(json.dumps(answers).encode()).hexdigest()

    def row(self, number: int) -> PackedRow:
        """One of the distinct rows."""
        items = [answer for pair in self.packed[number] for answer in pair]
        if room := self.sequence_length - sum(map(len, items)):
            items.append(Encoded([self.filler] * room, [IGNORED] * room))
        return row_tensors(items) | {"reference": self.references[number]}


def pair_dataset(
    settings: PairSettings, tokenizer: PreTrainedTokenizerBase, rows: int | None = None, seed: int = 0
) -> PairDataset:
    """The pairs of the section `pairs` of a recipe, packed in their order; without `rows`, one pass over them.

    Raises:
        HmfError: a bad record (with its file and line), a pair that is longer than a row, or no pairs at all.
    """
    sequence_length = settings.sequence_length
    packed: list[list[Pair]] = []
    unread = dict[str, None]()
    room = 0
    for record in Source(settings).records():
        where = f"{settings.key}: {record.where}"
        try:
            answers = pair_of(record, settings)
            unread.update(dict.fromkeys(answers.unread))
            pair = encode_pair(tokenizer, answers, settings)
        except HmfError as error:
            raise HmfError(f"{where}: {error}") from None
        size = len(pair[0]) + len(pair[1])
        if size > sequence_length:
            raise HmfError(
                f"{where}: the pair has {size} tokens, a row {sequence_length}; raise "
                f"{settings.key}.sequence_length or remove the pair"
            )
        if size > room:
            packed.append([])
            room = sequence_length
        packed[-1].append(pair)
        room -= size
    if not packed:
        raise HmfError(
            f"{settings.key}: {settings.path or settings.dataset}: there are no pairs; give rows with prompt, "
            "chosen and rejected"
        )
    if unread:
        say_once(f"{settings.key}: fields that are not read: {listed(unread)}")
    return PairDataset(packed, sequence_length, document_separator(tokenizer), rows or len(packed), seed)


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: AnswerPair, settings: PairSettings) -> Pair:
    """Both conversations, with their last turns supervised. HmfError for a pair that cannot be used."""
    chosen, rejected = encode_answers(
        tokenizer,
        pair.prompt,
        [pair.chosen, pair.rejected],
        pair.tools,
        ignore_keys=settings.ignore_keys,
        split_special_tokens=settings.split_special_tokens,
        chat_template_kwargs=pair.chat_template_kwargs,
    )
    if chosen.ids == rejected.ids:
        raise HmfError("chosen and rejected are the same; remove the pair")
    return chosen, rejected
