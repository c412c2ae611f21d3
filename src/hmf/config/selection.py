# SPDX-License-Identifier: Apache-2.0
"""How `hybrid.layers: auto` and `hmf select` choose the layers that keep attention."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from .strict import Settings, TokenCount

Method = Literal["supernet", "greedy", "kl", "window", "uniform", "scores"]


class SelectSettings(Settings):
    """Choice of the layers that keep attention; data, objective and training are those of the section distill."""

    # uniform spreads the layers; window and kl replace one layer at a time; greedy and supernet score whole choices;
    # scores reads a file
    method: Method = "supernet"
    layerwise_steps: int = Field(
        160, ge=0, le=10**9
    )  # steps in which each mixer learns alone; 0: mixers as Stage 0 leaves them
    subset_steps: int = Field(
        240, ge=0, le=10**9
    )  # of supernet: steps in which a random part of the layers is replaced
    rows: int = Field(48, ge=2, le=2**16)  # rows of data on which choices are scored
    window_size: TokenCount = Field(128, ge=1)  # of window: tokens that a layer still reads
    choices: int = Field(512, ge=1, le=2**20)  # most choices that are all scored; above this number, a search
    scores: Path | None = None  # of scores: JSON or CSV with a number for each layer, larger where attention is needed

    @model_validator(mode="after")
    def _file_of_its_method(self) -> SelectSettings:
        if (self.scores is not None) != (self.method == "scores"):
            raise ValueError("method scores needs the file scores, and no other method has one")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps before choices are scored."""
        layerwise = self.layerwise_steps if self.method in ("kl", "greedy", "supernet") else 0
        return layerwise + (self.subset_steps if self.method == "supernet" else 0)
