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

    # how layers are chosen. uniform: spread evenly; window and kl: by the effect of replacing each layer alone; greedy
    # and supernet: by scores of whole choices; scores: by the numbers of a file
    method: Method = "supernet"
    # steps in which each mixer is trained on its own; 0: the mixers of Stage 0 are scored
    layerwise_steps: int = Field(160, ge=0, le=10**9)
    # for supernet: steps in which a random subset of the layers is replaced
    subset_steps: int = Field(240, ge=0, le=10**9)
    rows: int = Field(48, ge=2, le=2**16)  # rows of data on which choices are scored
    window_size: TokenCount = Field(128, ge=1, le=2**24)  # for window: number of tokens to which a layer still attends
    # if there are at most this many choices, all are scored; otherwise a search scores some of them
    choices: int = Field(512, ge=1, le=2**20)
    # for scores: JSON or CSV file with a number for each layer, larger where attention is needed
    scores: Path | None = None

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
