# SPDX-License-Identifier: Apache-2.0
"""The loss of Stage 1: a recipe's `objective` section as a function of the step."""

from __future__ import annotations

from typing import Any

import torch

from hmf.config.runs import ObjectiveSettings
from hmf.priming.distance import layer_errors
from hmf.priming.objectives import Objective, attention_sizes, objective_at, token_counts

from .losses import Measure, TrainingLoss

SIZED_ROWS = 4  # number of rows on which the mean squares of attention outputs are measured


class Stage1Loss(TrainingLoss):
    """The loss of a fused model.

    The error of each layer (`layer_errors`), on one row of the latest batch, is logged as `error_layer_<index>`.
    """

    log_prefix = "loss_"

    def __init__(self, settings: ObjectiveSettings, compiled: bool = False):
        """compiled: compile the divergence of the logits."""
        self.settings, self.compiled = settings, compiled
        self._attention_sizes: tuple[float, ...] | None = None

    def count(self, **batch: Any) -> torch.Tensor:
        """Real tokens, and tokens whose next token has a label (`token_counts`)."""
        return token_counts(**batch)

    def at(self, step: int, measure: Measure) -> Objective:
        if step >= self.settings.layerwise_steps:
            return objective_at(self.settings, step, compiled=self.compiled)
        if self._attention_sizes is None:
            self._attention_sizes = measure(attention_sizes, SIZED_ROWS)
        return objective_at(self.settings, step, self._attention_sizes)

    def figures(self, model: Any, batch: dict[str, Any]) -> dict[str, float]:
        # With sequence parallelism all rows, because `shards` describes the whole batch.
        row = {name: x if "shards" in batch else x[:1] for name, x in batch.items() if "labels" not in name}
        with torch.no_grad():  # otherwise DDP waits for a backward pass
            errors = model(**row, objective=layer_errors)
        return {f"error_layer_{index}": value.item() for index, value in errors.items()}
