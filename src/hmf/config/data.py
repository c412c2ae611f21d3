# SPDX-License-Identifier: Apache-2.0
"""The recipe of `hmf data prepare`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .places import PlaceSettings
from .runs import Share
from .strict import Seed, Settings, TokenCount, Tokens


class RepetitionSettings(Settings):
    """A document is left out as repetitive if it exceeds one of these shares. The defaults are Gopher's (Rae et al.
    2021, table A1). N-grams are n-grams of words. Shares of characters are relative to the whole document."""

    duplicate_paragraphs: Share = 0.30  # largest share of duplicate paragraphs, of all paragraphs
    duplicate_paragraph_characters: Share = 0.20  # largest share of characters in duplicate paragraphs
    duplicate_lines: Share = 0.30  # largest share of duplicate lines, of all lines
    duplicate_line_characters: Share = 0.20  # largest share of characters in duplicate lines
    # largest share of characters in the most frequent n-gram, by n
    top_ngram: dict[int, Share] = {2: 0.20, 3: 0.18, 4: 0.16}
    # largest share of characters in n-grams that repeat, by n
    duplicate_ngrams: dict[int, Share] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class FilterSettings(Settings):
    """Which documents are left out. `repetition: true` selects the default thresholds."""

    min_tokens: TokenCount = Field(0, ge=0)  # shorter documents are left out
    max_tokens: TokenCount | None = Field(None, ge=1, le=2**50)  # longer documents are left out
    repetition: RepetitionSettings | None = None  # thresholds of the repetition filters; left out: no such filters

    @field_validator("repetition", mode="before")
    @classmethod
    def _usual(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value


class SourceSettings(PlaceSettings):
    """Documents from one place; `path` may also be "stdlib". Documents are conversations if `messages_field` or `shape`
    is given, and texts otherwise."""

    name: str | None = None  # name in tables and errors; left out: derived from the place
    text_field: str | None = None  # field with a text; left out: text
    messages_field: str | None = None  # field with messages; the documents are then conversations
    # layout of a conversation; left out: messages with role and content
    shape: Literal["sharegpt", "alpaca", "prompt_completion"] | None = None
    weight: float | None = Field(None, ge=1e-9, le=10**9)  # share of the mixture's tokens
    filters: FilterSettings | None = None  # filters of this source; left out: the recipe's

    @model_validator(mode="after")
    def _one_kind(self) -> SourceSettings:
        if self.text_field is not None and self.chat:
            other = "messages_field" if self.messages_field is not None else "shape"
            raise ValueError(f"give either text_field or {other}: a document is either a text or a conversation")
        of_chat = {"tools_field", "ignore_keys", "chat_template_kwargs"} & self.model_fields_set
        if of_chat and not self.chat:
            raise ValueError(f"{min(of_chat)} has no effect on texts; set messages_field or shape, or leave it out")
        if self.messages_field is not None and self.shape in ("alpaca", "prompt_completion"):
            raise ValueError(
                f"messages_field has no effect with shape {self.shape}, which has its own field names; leave it out"
            )
        return self

    @property
    def chat(self) -> bool:
        """Whether documents are conversations."""
        return self.messages_field is not None or self.shape is not None

    @property
    def field(self) -> str:
        """Name of the field that holds a record's text or messages."""
        return self.messages_field or self.text_field or ("conversations" if self.shape == "sharegpt" else "text")

    @property
    def key(self) -> str:
        return f"sources.{self.title}"

    @property
    def reads_text(self) -> bool:
        return not self.chat

    @property
    def title(self) -> str:
        """`name`, or the last part of the place if there is no name."""
        if self.name is not None:
            return self.name
        place = self.path or self.dataset or ""
        return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(place).name.split(".")[0]).strip("-") or "source"


class DataRecipe(Settings):
    """`hmf data prepare`: sources are tokenised, mixed and packed into rows of `sequence_length` under `output`.

    Without weights, every document is used once. With weights, which are shares of the tokens, the mixture has `tokens`
    tokens. If `tokens` is left out, the mixture is as large as it can be without using a document twice.
    """

    output: Path  # output folder
    tokenizer: str  # a checkpoint directory, or "teacher" for the embedded one
    sequence_length: Tokens  # tokens in a row
    sources: list[SourceSettings] = Field(min_length=1)  # sources of documents
    tokens: TokenCount | None = Field(None, ge=1, le=2**50)  # tokens of the whole mixture; needs weights
    seed: Seed = 0  # seed of the order of documents
    thinking: Literal["keep", "strip"] = "keep"  # whether assistant turns keep their thinking; strip: it is removed
    turns: Literal["all", "last"] = "all"  # which assistant turns are supervised
    # filters of the sources that have none of their own
    filters: FilterSettings = Field(default_factory=FilterSettings)
    max_truncated_share: Share = 0.02  # largest share of a source's conversations that may be cut to a row
    packing_window: int = Field(10_000, ge=1)  # number of documents packed at a time, and of rows that stay open
    cache: Path | None = None  # folder that keeps tokenised documents for other recipes; left out: they are removed
    shard_documents: int = Field(1000, ge=1)  # documents per shard of tokenised documents, the unit of resuming

    @model_validator(mode="after")
    def _sources_agree(self) -> DataRecipe:
        titles = [source.title for source in self.sources]
        if duplicates := sorted({title for title in titles if titles.count(title) > 1}):
            raise ValueError(f"sources: two sources have the name {duplicates[0]!r}; give each its own name")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"sources: {titles[weighted.index(False)]!r} has no weight; give weights to all sources or to none"
            )
        if self.tokens is not None and not any(weighted):
            raise ValueError("tokens: needs weights; without weights, every document is used once")
        return self
