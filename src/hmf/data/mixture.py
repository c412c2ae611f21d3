# SPDX-License-Identifier: Apache-2.0
"""Rows of the section `data` of a training recipe: made from text and generated tasks, or prepared."""

import hashlib
from dataclasses import dataclass, field
from random import Random

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hmf.config.runs import DataSettings
from hmf.data import tasks, text
from hmf.data.encoding import Encoded, enclosed, encode_chat
from hmf.data.packing import PackedRow, row_tensors
from hmf.data.prepared import PreparedDataset, read_index
from hmf.data.tasks import Sample
from hmf.data.tokenizer import document_separator, encode_texts
from hmf.errors import HmfError, require_names, rewriting


def encode_conversation(tokenizer: PreTrainedTokenizerBase, conversation: Sample) -> Encoded:
    """A conversation in which only the last assistant turn is supervised, tokenised as in generation."""
    return encode_chat(tokenizer, conversation.messages, conversation.tools, turns="last")[0]


@dataclass
class MixtureDataset(Dataset[PackedRow]):
    """Rows that are randomly made from text and generated tasks. Row i depends only on `seed` and i.

    Args:
        texts: token ids of each document, as from `encode_texts`.
        weights: relative frequency of each task by name; half of the conversations have thinking, if the chat template
            writes it.
        text_share: share of the rows that hold only text; in the others, text fills the room after conversations.
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
    _modes: dict[str, list[bool]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        separator = document_separator(self.tokenizer)
        self._documents = [enclosed(ids, separator) for ids in self.texts]
        self._sizes = [len(document) for document in self._documents]
        drawn = [task for task, weight in self.weights.items() if weight and self.text_share < 1]
        self._modes = {task: self.modes(task, self.tokenizer) for task in drawn}

    @classmethod
    def modes(cls, task: str, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
        """Whether a task's conversations have thinking: the values for which the template writes all that they hold.

        Raises:
            HmfError: there are none.
        """
        modes, refusals = [], []
        for thinking in (False, True):
            try:
                encode_conversation(tokenizer, tasks.sample(task, 0, tokenizer, tasks.MIN_LENGTH, thinking=thinking))
                modes.append(thinking)
            except HmfError as error:
                refusals.append(error)
        if not modes:
            raise HmfError(f"tasks: {task}: {refusals[0]}, or leave the task out")
        return modes

    def __len__(self) -> int:
        return self.rows

    @property
    def epoch(self) -> None:
        """Rows in a pass over the data: None, because there are no passes."""

    def digest(self) -> str:
        """A hash of all tokens of all texts, and of everything else that a row depends on."""
        sha = hashlib.sha256(repr((type(self).__name__, self.sequence_length, self.text_share, self.seed)).encode())
        template = self.tokenizer.chat_template if self.weights else None
        sha.update(repr((sorted(self.weights.items()), template, [len(ids) for ids in self.texts])).encode())
        for ids in self.texts:
            sha.update(np.array(ids, dtype=np.int64).tobytes())
        return sha.hexdigest()

    def __getitem__(self, index: int) -> PackedRow:
        rng = Random(f"{self.seed}:{index}")
        row: list[Encoded] = []
        room = self.sequence_length
        if rng.random() >= self.text_share:
            names, weights = list(self.weights), list(self.weights.values())
            while room >= tasks.MIN_LENGTH:
                task = rng.choices(names, weights)[0]
                seed, length = rng.getrandbits(62), tasks.random_length(rng, room)
                thinking, modes = rng.random() < 0.5, self._modes[task]
                thinking = thinking if thinking in modes else modes[0]
                conversation = tasks.sample(task, seed, self.tokenizer, length, thinking=thinking)
                item = encode_conversation(self.tokenizer, conversation)
                if len(item) > room:
                    break
                row.append(item)
                room -= len(item)
        while room:
            # Documents are drawn in proportion to their lengths, and positions in them uniformly.
            document = rng.choices(self._documents, self._sizes)[0]
            start = rng.randrange(-room // 2, len(document))
            row.append(document.cut(max(0, start), max(0, start) + room))
            room -= len(row[-1])
        rng.shuffle(row)
        return row_tensors(row)


class PromptDataset(MixtureDataset):
    """Prompts {"prompt": ids} of at most `sequence_length` tokens that the student continues: prompts of conversations,
    or pieces of text of any length. Row i depends only on `seed` and i."""

    @classmethod
    def modes(cls, task: str, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
        tasks.require_template([task], tokenizer)
        return [False, True]

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


def check_tasks(key: str, data: DataSettings, kind: type[MixtureDataset] = MixtureDataset) -> None:
    """HmfError for a section `key` of which no rows of class `kind` can be made, with any tokenizer."""
    require_names(f"{key}.tasks", "task", list(data.tasks), tasks.TASKS)
    if not data.tasks and data.text_share < 1:
        raise HmfError(f"{key}.text_share: is below 1, but {key}.tasks is empty; name tasks or set it to 1")
    if data.text_share < 1 and kind is MixtureDataset and data.sequence_length < tasks.MIN_LENGTH:
        raise HmfError(
            f"{key}.sequence_length: {data.sequence_length} tokens are too short for {key}.tasks, which need "
            f"{tasks.MIN_LENGTH}; raise it, or set {key}.text_share to 1"
        )


def require_tasks(
    key: str, data: DataSettings, tokenizer: PreTrainedTokenizerBase, kind: type[MixtureDataset] = MixtureDataset
) -> None:
    """`check_tasks`, and HmfError for a task that the chat template cannot write in rows of class `kind`."""
    check_tasks(key, data, kind)
    if data.text_share < 1:
        with rewriting(f"{key}.{{}}".format):
            for task in [name for name, weight in data.tasks.items() if weight]:
                kind.modes(task, tokenizer)


def row_length(data: DataSettings) -> int:
    """Number of tokens in a row of `mixture`."""
    if data.prepared is not None:
        return read_index(data.prepared)["sequence_length"]
    return data.sequence_length


def mixture(
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    seed: int,
    kind: type[MixtureDataset] = MixtureDataset,
    split: text.Split | None = "train",
    key: str = "data",
) -> MixtureDataset | PreparedDataset:
    """The rows that a recipe's `data` section describes. Row i depends only on `seed` and i.

    Args:
        kind: the class of rows that are made from text and tasks.
        split: the part of the text; None for all of it.
        key: the section's key, for messages.
    """
    if data.prepared is not None:
        return PreparedDataset(data.prepared, tokenizer, rows, seed)
    require_tasks(key, data, tokenizer, kind)
    documents = [document.text for document in text.documents(data.text, split)]
    encoded = encode_texts(tokenizer, documents)
    if data.text_share and not any(encoded):
        raise HmfError(
            f"{key}.text: {data.text}: none of {len(documents)} documents has any text; choose another corpus"
        )
    return kind(encoded, tokenizer, data.sequence_length, data.tasks, rows, data.text_share, seed)
