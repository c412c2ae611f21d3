# SPDX-License-Identifier: Apache-2.0
"""What the sections of the report consist of, beside charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from .charts import Chart


class Cell(NamedTuple):
    """A text, and where it is from: a file relative to the page, or a place in it."""

    text: str
    href: str = ""


@dataclass(frozen=True)
class Table:
    """left: columns of text, before those of numbers. folded: shown on demand. code: with file names and hashes."""

    name: ClassVar = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: int = 1
    folded: bool = False
    code: bool = False


@dataclass(frozen=True)
class Note:
    name: ClassVar = "note"
    text: str
    href: str = ""


@dataclass(frozen=True)
class Text:
    """A heading; or a block of code under its title; or a map of the layers: (index, symbol, attention, type) each."""

    name: ClassVar = "text"
    text: str
    kind: str = "heading"
    title: str = ""
    opened: bool = False
    items: Sequence[tuple[str, str, bool, str]] = ()


class Answer(NamedTuple):
    """Of a model to a prompt; `verdict` is correct, wrong, or cut off."""

    model: str
    text: str
    verdict: str
    href: str


@dataclass(frozen=True)
class Samples:
    """A prompt with the answers to it. prompt: None where its text was not kept."""

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
