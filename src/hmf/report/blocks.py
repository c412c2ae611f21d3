# SPDX-License-Identifier: Apache-2.0
"""The blocks of the report's sections, except for charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from .charts import Chart


class Cell(NamedTuple):
    """A text with a link to its source: a file relative to the page, or an anchor on the page."""

    text: str
    href: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        text_columns: number of left-aligned columns with text, which precede the columns of numbers.
        folded: whether the reader must open the table.
        code: whether the cells are file names and hashes, in a monospaced font.
    """

    name: ClassVar = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1
    folded: bool = False
    code: bool = False


@dataclass(frozen=True)
class Note:
    name: ClassVar = "note"
    text: str
    href: str = ""


@dataclass(frozen=True)
class Text:
    """A heading, a block of code with its title, or a map of the layers: (index, symbol, attention, type) each."""

    name: ClassVar = "text"
    text: str
    kind: str = "heading"
    title: str = ""
    opened: bool = False
    items: Sequence[tuple[str, str, bool, str]] = ()


class Answer(NamedTuple):
    """A model's answer to a prompt. `verdict` is correct, wrong, or cut off."""

    model: str
    text: str
    verdict: str
    href: str


@dataclass(frozen=True)
class Samples:
    """A prompt with its answers. prompt: None if its text was not stored."""

    name: ClassVar = "samples"
    title: str
    prompt: str | None
    expected: str
    answers: Sequence[Answer]


Block = Table | Note | Text | Samples | Chart


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    blocks: Sequence[Block]
