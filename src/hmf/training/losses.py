# SPDX-License-Identifier: Apache-2.0
"""What a loss has to offer to the Trainer, and the losses of Stage 2 on packed rows. Full logits never exist.

Cross entropy and preferences between two answers are called as `model(**batch, objective=loss)`, with input_ids [B, T],
labels [B, T] (-100 where nothing is to be learned; or shift_labels, each position's next one) and position_ids [B, T]
that restart at 0 with each document. They return scalars by name, "loss" the one to minimise. Each is a sum divided by
`counts`: that of the batch, or of everything that an optimiser step sees, in all processes; then the losses of its
batches add up to that of a large one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hmf.data.encoding import IGNORED
from hmf.priming.objectives import LOGITS_AT_ONCE

# measure(objective, rows): what an objective that returns numbers comes to on the run's first so many rows.
Measure = Callable[[Callable[..., tuple[float, ...]], int], tuple[float, ...]]


class TrainingLoss(ABC):
    """What a HybridTrainer minimises."""

    log_prefix = ""  # of the parts of the loss, by which they are logged

    @abstractmethod
    def count(self, *args: Any, **batch: Any) -> torch.Tensor:
        """What a batch adds to the counts that the losses of an optimiser step are divided by."""

    def at(self, step: int, measure: Measure) -> Any:
        """The objective of an optimiser step; this loss itself, where that is the same at every step.

        `model(**batch, objective=..., counts=...)` returns scalars by name: "loss" is minimised, others are its parts.
        With the counts of the whole step, the losses of all its batches, in all processes, add up to that of one large
        batch.
        """
        return self

    def figures(self, model: Any, batch: dict[str, Any]) -> dict[str, float]:
        """What else is to be logged, by name, measured on a batch of the latest step. All processes call it."""
        return {}


def token_losses(
    hidden_states: torch.Tensor, labels: torch.Tensor, head: nn.Module, chunk_size: int | None = None
) -> torch.Tensor:
    """Negative log-likelihood of each label [N] after the hidden states [N, D]: [N] in nats, float32 or wider.

    Logits exist for `chunk_size` tokens at a time (left out: as many as fit LOGITS_AT_ONCE numbers), in the backward
    pass too, where they are computed again.
    """

    def of_chunk(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = head(x)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y, reduction="none")

    size = chunk_size or max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    chunks = zip(hidden_states.split(size), labels.split(size), strict=True)
    return torch.cat([checkpoint(of_chunk, x, y, use_reentrant=False) for x, y in chunks])


def _next_labels(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor:
    """[B, T]: the label of each position's next token; `shift_labels` are that already."""
    if shift_labels is not None:
        return shift_labels
    assert labels is not None
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def labels_count(
    labels: torch.Tensor | None = None, shift_labels: torch.Tensor | None = None, **batch: Any
) -> torch.Tensor:
    """Positions of a batch whose next token has a label."""
    return (_next_labels(labels, shift_labels) != IGNORED).sum()


def _label_losses(model: PreTrainedModel, next_labels: torch.Tensor, chunk_size: int | None, **batch: Any):
    """Where the next token has a label, bool [B, T], and the loss of each of those, [N], in reading order."""
    supervised = next_labels != IGNORED
    final = model.model(**batch, use_cache=False).last_hidden_state[supervised]
    return supervised, token_losses(final, next_labels[supervised], model.get_output_embeddings(), chunk_size)


@dataclass(frozen=True)
class CrossEntropy(TrainingLoss):
    """Mean negative log-likelihood of supervised tokens, in nats."""

    chunk_size: int | None = None

    def count(self, **batch: Any) -> torch.Tensor:
        """Supervised tokens of a batch."""
        return labels_count(**batch)

    def __call__(
        self,
        model: PreTrainedModel,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        **batch: Any,
    ) -> dict[str, torch.Tensor]:
        supervised, losses = _label_losses(model, _next_labels(labels, shift_labels), self.chunk_size, **batch)
        return {"loss": losses.sum() / (supervised.sum() if counts is None else counts).clamp_min(1)}


@dataclass(frozen=True)
class Preference(TrainingLoss):
    """Direct preference optimisation, equation 7 of arXiv 2305.18290: -log sigmoid of the margin of rewards, by pair.

    The reward of an answer is `beta` times how much likelier it has become, in nats, than the model that training
    started from made it. The rows' documents are pairs, chosen before rejected; documents without a label, at the end
    of a row, do not count. `reference` [B, P, 2] holds the start's log-likelihoods of chosen and rejected; NaN where a
    row has fewer than P pairs. Also returns mean margin, in nats of reward, and accuracy: how often chosen wins.
    """

    beta: float = 0.1
    chunk_size: int | None = None

    def count(self, reference: torch.Tensor, **batch: Any) -> torch.Tensor:
        """Pairs of a batch."""
        return (~reference[..., 0].isnan()).sum()

    def __call__(
        self, model: PreTrainedModel, reference: torch.Tensor, counts: torch.Tensor | None = None, **batch: Any
    ) -> dict[str, torch.Tensor]:
        number = (self.count(reference) if counts is None else counts).clamp_min(1)
        has_pair = ~reference[..., 0].isnan()
        gained = (self.likelihoods(model, reference.shape[1], **batch) - reference)[has_pair]
        margin = self.beta * (gained[:, 0] - gained[:, 1])
        return {
            "loss": -F.logsigmoid(margin).sum() / number,
            "margin": margin.detach().sum() / number,
            "accuracy": (margin.detach() > 0).sum() / number,
        }

    def likelihoods(
        self, model: PreTrainedModel, pairs: int, labels: torch.Tensor, position_ids: torch.Tensor, **batch: Any
    ) -> torch.Tensor:
        """Log-likelihood in nats of each answer [B, `pairs`, 2], summed over its supervised tokens."""
        next_labels = _next_labels(labels, None)
        supervised, losses = _label_losses(model, next_labels, self.chunk_size, position_ids=position_ids, **batch)
        rows, _ = supervised.nonzero(as_tuple=True)
        documents = ((position_ids == 0).cumsum(1) - 1)[supervised]
        sums = losses.new_zeros(len(labels) * 2 * pairs).index_add(0, rows * 2 * pairs + documents, -losses)
        return sums.view(len(labels), pairs, 2)
