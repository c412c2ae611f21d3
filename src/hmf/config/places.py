# SPDX-License-Identifier: Apache-2.0
"""Keys that say where records are read from, shared by data sources and pairs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue, model_validator

from .strict import Settings, Tokens


class PlaceSettings(Settings):
    """`path` (a file, a folder or a pattern with *) or `dataset` (a name that `datasets.load_dataset` takes)."""

    path: str | None = None  # file, folder, or pattern with *
    dataset: str | None = None  # name for datasets.load_dataset
    subset: str | None = None  # configuration of the dataset
    revision: str | None = None  # branch, tag or commit of the dataset
    split: str | None = None  # split of a dataset, by default train; for text: train or heldout, by a hash of the path
    # format of the files; left out: chosen by the suffix
    format: Literal["jsonl", "parquet", "csv", "text", "saved"] | None = None
    tools_field: str = "tools"  # field with the tools of a conversation
    ignore_fields: list[str] = Field(default_factory=list)  # fields of a row that are deliberately not used
    # keys of messages that are deliberately not used; other unknown keys are errors
    ignore_keys: list[str] = Field(default_factory=list)
    # variables of the chat template, such as enable_thinking; those in a row's field of this name take precedence
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    split_special_tokens: bool = False  # encode special tokens in texts and messages as plain text

    @model_validator(mode="after")
    def _one_place(self) -> PlaceSettings:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path or dataset")
        if set(self.ignore_keys) & {"role", "content"}:
            raise ValueError("ignore_keys: role and content are required in a message and cannot be ignored")
        for name, value in self.chat_template_kwargs.items():
            if value is None:
                raise ValueError(f"chat_template_kwargs.{name}: has no value; give one, or leave it out")
        for key in ("subset", "revision") if self.dataset is None else ("format",):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key} has no effect with {'path' if self.dataset is None else 'dataset'}; leave it out"
                )
        return self

    @property
    def key(self) -> str:
        """The key of this section in its recipe."""
        raise NotImplementedError

    @property
    def reads_text(self) -> bool:
        """Whether a record may be a plain text instead of a row with fields."""
        return False


class PairSettings(PlaceSettings):
    """Preference pairs: rows with a prompt, a chosen and a rejected answer; see docs/training.md."""

    # layout of a row; left out: the fields prompt_field, chosen_field and rejected_field
    shape: Literal["sharegpt", "alpaca", "ultrafeedback"] | None = None
    prompt_field: str = "prompt"  # field with the prompt
    chosen_field: str = "chosen"  # field with the better answer
    rejected_field: str = "rejected"  # field with the worse answer
    sequence_length: Tokens = 1024  # tokens in a row, which holds whole pairs
    # DPO's beta: the larger, the closer the model stays to its starting point
    beta: float = Field(0.1, ge=1e-6, le=10**6)

    @model_validator(mode="after")
    def _rows_with_fields(self) -> PairSettings:
        if self.format == "text":
            raise ValueError("format: pairs are rows with fields, not text; give jsonl, parquet, csv or saved")
        if self.shape in ("sharegpt", "alpaca") and "prompt_field" in self.model_fields_set:
            raise ValueError(f"prompt_field has no effect with shape {self.shape}; leave it out")
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
