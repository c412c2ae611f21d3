# SPDX-License-Identifier: Apache-2.0
"""Where records come from: the keys that data sources and pairs share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .strict import Settings, Tokens


class PlaceSettings(Settings):
    """`path` (a file, a folder or a pattern with *) or `dataset` (a name that `datasets.load_dataset` takes)."""

    path: str | None = None  # file, folder or pattern
    dataset: str | None = None  # name for datasets.load_dataset
    subset: str | None = None  # of the dataset: its configuration
    revision: str | None = None  # of the dataset: branch, tag or commit
    split: str | None = None  # of a dataset: train unless given; of text: train or heldout, by a hash of the path
    format: Literal["jsonl", "parquet", "text", "saved"] | None = None  # None: by the suffix
    tools_field: str = "tools"  # field with the tools of a conversation
    ignore_fields: list[str] = Field(default_factory=list)  # fields of a row that are left out knowingly
    ignore_keys: list[str] = Field(default_factory=list)  # likewise of messages, where an unknown key is an error
    split_special_tokens: bool = False  # special tokens in texts and messages are encoded as the text they look like

    @model_validator(mode="after")
    def _one_place(self) -> PlaceSettings:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path or dataset")
        if set(self.ignore_keys) & {"role", "content"}:
            raise ValueError("ignore_keys: role and content are what a message is; they cannot be ignored")
        for key in ("subset", "revision") if self.dataset is None else ("format",):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} has no meaning with {'path' if self.dataset is None else 'dataset'}")
        return self

    @property
    def key(self) -> str:
        """The section's place in its recipe."""
        raise NotImplementedError

    @property
    def reads_text(self) -> bool:
        """Whether a record may be a text, and not a row with fields."""
        return False

    @property
    def columns(self) -> list[str] | None:
        """The fields of a row that are read; None: all are looked at."""
        return None


class PairSettings(PlaceSettings):
    """Preferences: rows with a prompt, a chosen and a rejected answer; see docs/training.md."""

    shape: Literal["sharegpt", "alpaca", "ultrafeedback"] | None = None  # left out: prompt, chosen and rejected
    prompt_field: str = "prompt"  # field with the prompt
    chosen_field: str = "chosen"  # field with the better answer
    rejected_field: str = "rejected"  # field with the worse answer
    sequence_length: Tokens = 1024  # of a row, which holds whole pairs
    beta: float = Field(0.1, gt=0)  # how far the model may move from where it started, nats of reward to nats

    @model_validator(mode="after")
    def _rows_with_fields(self) -> PairSettings:
        if self.format == "text":
            raise ValueError("format: pairs are rows with fields; give jsonl, parquet or saved")
        if self.shape in ("sharegpt", "alpaca") and "prompt_field" in self.model_fields_set:
            raise ValueError(f"prompt_field has no meaning with shape {self.shape}")
        return self

    @property
    def key(self) -> str:
        return "pairs"


class EvalPairSettings(PairSettings):
    """Pairs of an evaluation; `beta` is that of `pairs`."""

    @model_validator(mode="after")
    def _beta_of_training(self) -> EvalPairSettings:
        if "beta" in self.model_fields_set:
            raise ValueError("beta is that of pairs; leave it out")
        return self

    @property
    def key(self) -> str:
        return "eval_pairs"
