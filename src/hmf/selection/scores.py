# SPDX-License-Identifier: Apache-2.0
"""The cost of replacing some layers: a comparison of the student with these mixers and the teacher on unseen rows.

A choice is the set of its replaced layers, a frozenset of indices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from hmf.data.encoding import IGNORED
from hmf.data.packing import PackedRow
from hmf.model.modeling import STUDENT, TEACHER, logits_of
from hmf.priming.divergence import LOGITS_AT_ONCE, wide

Choice = frozenset[int]
# KL(teacher || student) in nats per token, for text and for answers; for answers also the loss, and the share of
# positions at which student and teacher have different likeliest tokens.
MEASURES = ("kl_text", "kl_answers", "loss_answers", "differ_answers")
KL = ("kl_answers", "kl_text")  # what a choice costs: KL of answers, or of text if the data has no answers


class Scorer:
    """Scores choices on `rows`, each choice once.

    Args:
        model: a fused model with a mixer in every layer. It stays on its device, and is set to evaluation mode.
        rows: rows of equal length (`hmf.data.packing`).
        batch_size: number of rows in a forward pass.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[PackedRow], batch_size: int = 4):
        self.model, self.rows, self.batch_size = model.eval(), rows, batch_size
        self.known: dict[Choice, torch.Tensor] = {}

    def __call__(self, choices: Iterable[Choice]) -> list[torch.Tensor]:
        """For each choice float64 [rows, measures, 2]: sums over the tokens of a row, and the numbers of tokens."""
        choices = list(choices)
        new = sorted({choice for choice in choices if choice not in self.known}, key=sorted)
        sums_of: dict[Choice, list[torch.Tensor]] = {choice: [] for choice in new}
        if new:
            for start in range(0, len(self.rows), self.batch_size):
                batch = torch.utils.data.default_collate(self.rows[start : start + self.batch_size])
                for choice, sums in zip(new, self._batch(batch, new), strict=True):
                    sums_of[choice].append(sums)
        self.known |= {choice: torch.cat(parts) for choice, parts in sums_of.items()}
        return [self.known[choice] for choice in choices]

    @torch.no_grad()
    def _batch(self, batch: dict[str, torch.Tensor], choices: Sequence[Choice]) -> Iterator[torch.Tensor]:
        batch = {name: x.to(self.model.device) for name, x in batch.items()}
        labels, positions = batch.pop("labels"), batch["position_ids"]
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        counted = targets != IGNORED
        answers = in_conversation(labels, positions)[counted]
        rows = counted.nonzero()[:, 0]
        inputs = self.model.model.prepare(**batch, use_cache=False)
        hidden = self._hidden_states(inputs, [frozenset(), *choices])
        teacher = next(hidden)[counted]
        for student in hidden:
            kl, loss, differs = self._compare(student[counted], teacher, targets[counted])
            values = torch.stack([kl, kl, loss, differs], -1).double()  # [tokens, measures]
            tokens = torch.stack([~answers, answers, answers, answers], -1).double()
            sums = torch.zeros(len(labels), len(MEASURES), 2, dtype=torch.float64, device=labels.device)
            yield sums.index_add_(0, rows, torch.stack([values * tokens, tokens], -1)).cpu()

    def _hidden_states(self, inputs: Any, choices: Sequence[Choice]) -> Iterator[torch.Tensor]:
        """Final hidden states [B, T, D] of each choice. Layers are run again only from the first that changes."""
        decoder, before = self.model.model, None
        layers, states = len(decoder.layers), [inputs.hidden_states]
        for choice in choices:
            changed = range(layers) if before is None else sorted(choice ^ before)
            first = changed[0] if changed else layers
            del states[first + 1 :]
            for index in range(first, layers):
                path = STUDENT if index in choice else TEACHER
                states.append(decoder.run_layers(states[-1], inputs, range(index, index + 1), path))
            before = choice
            yield decoder.norm(states[-1])

    def _compare(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """KL, loss of the targets, and whether the likeliest tokens differ, [N] each, from hidden states [N, D]."""
        head, parts = self.model.get_output_embeddings(), []
        size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        for ours, theirs, labels in zip(student.split(size), teacher.split(size), targets.split(size), strict=True):
            log_q, log_p = (wide(logits_of(self.model, head(x))).log_softmax(-1) for x in (ours, theirs))
            kl = torch.linalg.vecdot(log_p.exp(), log_p - log_q)
            loss = -log_q.gather(-1, labels[:, None])[:, 0]
            parts.append(torch.stack([kl, loss, (log_q.argmax(-1) != log_p.argmax(-1)).to(kl.dtype)]))
        return torch.cat(parts, -1).unbind()


def in_conversation(labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """bool [B, T]: tokens of documents that are only partly supervised, such as a prompt with its answer."""
    rows = torch.arange(len(labels), device=labels.device)[:, None] * labels.shape[1]
    documents = rows + (position_ids == 0).cumsum(1).clamp_min(1) - 1
    unsupervised = torch.zeros(labels.numel(), dtype=torch.long, device=labels.device)
    unsupervised.index_add_(0, documents.flatten(), (labels == IGNORED).long().flatten())
    return unsupervised[documents] > 1  # more than one, because the first token of a text has no label


def means(sums: torch.Tensor) -> dict[str, float]:
    """The mean of each measure that has tokens over all rows, from a Scorer's sums for a choice."""
    total = sums.sum(0)
    return {name: (total[i, 0] / total[i, 1]).item() for i, name in enumerate(MEASURES) if total[i, 1]}


def cost(sums: torch.Tensor, measures: Sequence[str] = KL) -> torch.Tensor:
    """[..., measures, 2] -> [...]: the mean of the first of `measures` that has tokens, in nats per token."""
    chosen = sums[..., [MEASURES.index(name) for name in measures], :]
    first = (chosen[..., 1] > 0).int().argmax(-1)[..., None, None]
    total, tokens = chosen.take_along_dim(first, -2)[..., 0, :].unbind(-1)
    return total / tokens.clamp_min(1)
