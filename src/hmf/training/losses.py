# SPDX-License-Identifier: Apache-2.0
"""The interface of losses for the Trainer, and the losses of Stage 2 on packed rows. Logits are computed in chunks.

Cross entropy and preferences between two answers are called as `model(**batch, objective=loss)`, with input_ids [B, T],
labels [B, T] (-100: no loss; or shift_labels, the label of each position's next token) and position_ids [B, T], which
restart at 0 with each document. They return scalars by name, of which "loss" is minimised. Each is a sum divided by
`counts`: the batch's own, or those of the whole optimiser step in all processes. With the latter, the losses of all
batches of the step add up to the loss of one large batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hmf.data.encoding import IGNORED
from hmf.model.modeling import logits_of
from hmf.priming.divergence import LOGITS_AT_ONCE, wide

# measure(objective, count): the numbers that an objective returns for the first `count` rows of the run.
Measure = Callable[[Callable[..., tuple[float, ...]], int], tuple[float, ...]]


class TrainingLoss(ABC):
    """The loss that a HybridTrainer minimises."""

    log_prefix = ""  # prefix of the names under which the parts of the loss are logged

    @abstractmethod
    def count(self, *args: Any, **batch: Any) -> torch.Tensor:
        """The counts of a batch. Their sum over the optimiser step divides the step's losses."""

    def at(self, step: int, measure: Measure) -> Any:
        """The objective of an optimiser step; by default this loss itself.

        `model(**batch, objective=..., counts=...)` returns scalars by name: "loss" is minimised, others are its parts.
        With the counts of the whole step, the losses of all its batches, in all processes, add up to the loss of one
        large batch.
        """
        return self

    def figures(self, model: Any, batch: dict[str, Any]) -> dict[str, float]:
        """Further values to log, by name, measured on a batch of the latest step. All processes call it."""
        return {}


def token_losses(
    hidden_states: torch.Tensor, labels: torch.Tensor, model: PreTrainedModel, chunk_size: int | None = None
) -> torch.Tensor:
    """Negative log-likelihood of each label [N] for final hidden states [N, D]: [N] in nats, float32 or wider.

    Logits are computed for `chunk_size` tokens at a time (None: as many as fit LOGITS_AT_ONCE elements), and again in
    the backward pass.
    """

    def of_chunk(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(wide(logits_of(model, head(x))), y, reduction="none")

    head: Any = model.get_output_embeddings()
    size = chunk_size or max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    chunks = zip(hidden_states.split(size), labels.split(size), strict=True)
    return torch.cat([checkpoint(of_chunk, x, y, use_reentrant=False) for x, y in chunks])


def _next_labels(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor:
    """[B, T]: the label of each position's next token. `shift_labels`, if given, are already shifted."""
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
    """bool [B, T], whether the next token has a label, and the loss [N] of each such position, in reading order."""
    supervised = next_labels != IGNORED
    final = model.model(**batch, use_cache=False).last_hidden_state[supervised]
    return supervised, token_losses(final, next_labels[supervised], model, chunk_size)


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
    """Direct preference optimisation, equation 7 of arXiv 2305.18290: -log sigmoid of the margin of rewards, per pair.

    The reward of an answer is `beta` times its log-likelihood minus that of the initial model. The documents of a row
    are pairs, the chosen answer before the rejected one; documents without labels at the end of a row do not count.
    `reference` [B, P, 2] holds the initial model's log-likelihoods of chosen and rejected answers, and NaN if a row has
    fewer than P pairs. Also returns the mean margin and the accuracy, the share of pairs with a positive margin.
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
        log_ratios = (self.likelihoods(model, reference.shape[1], **batch) - reference)[has_pair]
        margin = self.beta * (log_ratios[:, 0] - log_ratios[:, 1])
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
