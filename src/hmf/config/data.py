# SPDX-License-Identifier: Apache-2.0
"""The recipe of `hmf data prepare`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .runs import Settings, Share


class RepetitionSettings(Settings):
    """Shares of a document above which it is left out as repetitive; the values are Gopher's (Rae et al. 2021,
    table A1). N-grams count words, and their shares are of characters."""

    duplicate_paragraphs: Share = 0.30
    duplicate_paragraph_characters: Share = 0.20
    duplicate_lines: Share = 0.30
    duplicate_line_characters: Share = 0.20
    top_ngram: dict[int, Share] = {2: 0.20, 3: 0.18, 4: 0.16}
    duplicate_ngrams: dict[int, Share] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class FilterSettings(Settings):
    """Which documents are left out. `repetition: true` takes the usual thresholds."""

    min_tokens: int = Field(0, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    repetition: RepetitionSettings | None = None

    @field_validator("repetition", mode="before")
    @classmethod
    def _usual(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value


class SourceSettings(Settings):
    """Documents from one place: `path` (a file, a folder, a pattern with *, or "stdlib") or `dataset` (a name that
    `datasets.load_dataset` takes). A document is a text, or with `messages_field` a conversation."""

    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str | None = None  # of a dataset: train unless said; of text: train or heldout, by a hash of the path
    format: Literal["jsonl", "parquet", "text", "saved"] | None = None  # None: by the suffix
    name: str | None = None
    text_field: str | None = None
    messages_field: str | None = None
    tools_field: str = "tools"
    ignore_keys: list[str] = Field(default_factory=list)  # of messages: not read; any other unknown key is an error
    split_special_tokens: bool = False  # special tokens in texts and messages are encoded as the text they look like
    weight: float | None = Field(None, gt=0)
    filters: FilterSettings | None = None  # in place of the recipe's

    @model_validator(mode="after")
    def _one_place(self) -> SourceSettings:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path or dataset")
        if self.text_field is not None and self.messages_field is not None:
            raise ValueError("give either text_field or messages_field: a document is a text or a conversation")
        if set(self.ignore_keys) & {"role", "content"}:
            raise ValueError("ignore_keys: role and content are what a message is; they cannot be ignored")
        for key in ("subset", "revision") if self.dataset is None else ("format",):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} has no meaning with {'path' if self.dataset is None else 'dataset'}")
        return self

    @property
    def field(self) -> str:
        """Where a record has its text or its messages."""
        return self.messages_field or self.text_field or "text"

    @property
    def title(self) -> str:
        """`name`, or else the last part of the place."""
        if self.name is not None:
            return self.name
        place = self.path or self.dataset or ""
        return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(place).name.split(".")[0]).strip("-") or "source"


class DataRecipe(Settings):
    """`hmf data prepare`: sources are tokenised, mixed and packed into rows of `sequence_length` under `output`.

    Without weights every document is taken once. With weights, which are shares of the tokens, the mixture has `tokens`
    tokens, or as many as there can be without taking a document twice.
    """

    output: Path
    tokenizer: str  # a checkpoint directory, or "teacher" for the embedded one
    sequence_length: int = Field(ge=16)
    sources: list[SourceSettings] = Field(min_length=1)
    tokens: int | None = Field(None, ge=1)
    seed: int = 0
    thinking: Literal["keep", "strip"] = "keep"
    turns: Literal["all", "last"] = "all"  # which assistant turns are supervised
    filters: FilterSettings = Field(default_factory=FilterSettings)
    max_truncated_share: Share = 0.02  # of a source's conversations
    packing_window: int = Field(10_000, ge=1)  # documents that are packed together, and rows that stay open
    cache: Path | None = None  # keeps the tokenised documents for other recipes; None: removed at the end
    shard_documents: int = Field(1000, ge=1)  # what is tokenised at once, and lost by a kill

    @model_validator(mode="after")
    def _sources_agree(self) -> DataRecipe:
        titles = [source.title for source in self.sources]
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise ValueError(f"sources: two are called {twice[0]!r}; give each a name")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(f"sources: {titles[weighted.index(False)]!r} has no weight; give all of them one, or none")
        if self.tokens is not None and not any(weighted):
            raise ValueError("tokens: needs weights; without them every document is taken once")
        return self
