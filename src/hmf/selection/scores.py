# SPDX-License-Identifier: Apache-2.0
"""What it costs to replace some layers: the student with these mixers beside the teacher, on rows that it has not seen.

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
from hmf.priming.objectives import LOGITS_AT_ONCE

Choice = frozenset[int]
# KL(teacher || student) in nats a token of text and of answers; of answers also the loss, and the share of tokens for
# which another token is the likeliest than the teacher's.
MEASURES = ("kl_text", "kl_answers", "loss_answers", "differ_answers")


class Scorer:
    """Scores choices on `rows`, each choice once.

    Args:
        model: fused, with a mixer in every layer; moved nowhere and left in evaluation mode.
        rows: of one length (`hmf.data.packing`).
        batch_size: rows that are computed together.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[PackedRow], batch_size: int = 4):
        self.model, self.rows, self.batch_size = model.eval(), rows, batch_size
        self.known: dict[Choice, torch.Tensor] = {}

    def __call__(self, choices: Iterable[Choice]) -> list[torch.Tensor]:
        """Of each choice float64 [rows, measures, 2]: sums over the tokens of a row, and how many tokens these are."""
        choices = list(choices)
        wanted = sorted({choice for choice in choices if choice not in self.known}, key=sorted)
        found: dict[Choice, list[torch.Tensor]] = {choice: [] for choice in wanted}
        if wanted:
            for start in range(0, len(self.rows), self.batch_size):
                batch = torch.utils.data.default_collate(self.rows[start : start + self.batch_size])
                for choice, sums in zip(wanted, self._batch(batch, wanted), strict=True):
                    found[choice].append(sums)
        self.known |= {choice: torch.cat(parts) for choice, parts in found.items()}
        return [self.known[choice] for choice in choices]

    @torch.no_grad()
    def _batch(self, batch: dict[str, torch.Tensor], choices: Sequence[Choice]) -> Iterator[torch.Tensor]:
        batch = {name: x.to(self.model.device) for name, x in batch.items()}
        labels, positions = batch.pop("labels"), batch["position_ids"]
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        counted = targets != IGNORED
        answers = _in_conversation(labels, positions)[counted]
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
        """Final hidden states [B, T, D] of each choice; what a choice shares with the one before is not run again."""
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
        """Hidden states [N, D] of both -> KL, loss of the targets and whether the likeliest tokens differ, [N] each."""
        head, parts = self.model.get_output_embeddings(), []
        size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        for ours, theirs, wanted in zip(student.split(size), teacher.split(size), targets.split(size), strict=True):
            log_q, log_p = (
                logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                for logits in (logits_of(self.model, head(ours)), logits_of(self.model, head(theirs)))
            )
            kl = torch.linalg.vecdot(log_p.exp(), log_p - log_q)
            loss = -log_q.gather(-1, wanted[:, None])[:, 0]
            parts.append(torch.stack([kl, loss, (log_q.argmax(-1) != log_p.argmax(-1)).to(kl.dtype)]))
        return torch.cat(parts, -1).unbind()


def _in_conversation(labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """bool [B, T]: tokens of documents of which a part alone is supervised, as of prompt and answer."""
    rows = torch.arange(len(labels), device=labels.device)[:, None] * labels.shape[1]
    documents = rows + (position_ids == 0).cumsum(1).clamp_min(1) - 1
    unsupervised = torch.zeros(labels.numel(), dtype=torch.long, device=labels.device)
    unsupervised.index_add_(0, documents.flatten(), (labels == IGNORED).long().flatten())
    return unsupervised[documents] > 1  # the first token of a text has no label either


def means(sums: torch.Tensor) -> dict[str, float]:
    """Each measure over all rows, of what a Scorer gives for a choice; without those of which there is no token."""
    total = sums.sum(0)
    return {name: (total[i, 0] / total[i, 1]).item() for i, name in enumerate(MEASURES) if total[i, 1]}


def cost(sums: torch.Tensor, measures: Sequence[str] = ("kl_text", "kl_answers")) -> torch.Tensor:
    """[..., measures, 2] -> [...]: the mean of some measures of which there are tokens, in nats a token."""
    chosen = sums[..., [MEASURES.index(name) for name in measures], :]
    there = chosen[..., 1] > 0
    return (chosen[..., 0] / chosen[..., 1].clamp_min(1) * there).sum(-1) / there.sum(-1).clamp_min(1)
