# SPDX-License-Identifier: Apache-2.0
"""Answers and log-probabilities of a Hugging Face model in this process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from hmf.errors import HmfError
from hmf.evaluation.generation import end_tokens, generating, left_padded, pad_token
from hmf.evaluation.prompts import Answer, Prompt
from hmf.priming.divergence import wide

BATCH_LENGTH = 4096  # tokens; batches of longer prompts have fewer prompts
CHUNK = 2048  # tokens that are scored in one forward pass


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. Temperature 0 is greedy decoding."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def drawn(self) -> bool:
        return self.temperature > 0


@dataclass(frozen=True)
class Local:
    """A model in evaluation mode. likelihood: whether the likelihood of the expected answers is measured too."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    batch_size: int
    likelihood: bool = True

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Answer, float | None]]:
        """Yield each prompt, its answer, and the mean log-probability of the expected answer's tokens, or None.

        A batch holds prompts of similar lengths.
        """
        order = sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.index))
        for batch in self._batches(order):
            try:
                likelihoods = self._likelihoods(batch) if self.likelihood else [None] * len(batch)
                answers = self._generated(batch)
            except torch.OutOfMemoryError:
                raise HmfError(
                    f"--batch-size: no memory for {len(batch)} prompts of {len(batch[-1].ids):,} tokens; lower it, or "
                    "give --no-likelihood"
                ) from None
            yield from zip(batch, answers, likelihoods, strict=True)

    def _batches(self, order: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
        batch: list[Prompt] = []
        for prompt in order:  # the longest comes last
            if batch and (len(batch) + 1) * max(BATCH_LENGTH, len(prompt.ids)) > self.batch_size * BATCH_LENGTH:
                yield batch
                batch = []
            batch.append(prompt)
        if batch:
            yield batch

    @torch.inference_mode()
    def _generated(self, batch: Sequence[Prompt]) -> list[Answer]:
        ends = end_tokens(self.model, self.tokenizer)
        pad = pad_token(self.tokenizer, ends)
        inputs = left_padded([prompt.ids for prompt in batch], pad, self.model.device)
        width = inputs["input_ids"].shape[1]
        options: dict[str, Any] = {"do_sample": False}
        if self.sampling.drawn:
            torch.manual_seed(self.sampling.seed + batch[0].index)
            options = {
                "do_sample": True,
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "top_k": 0,
            }
        stop = batch[0].stop
        criteria = [_Stop(self.tokenizer, width, stop)] if stop else []
        with generating(self.model):
            output = self.model.generate(
                **inputs,
                max_new_tokens=max(prompt.limit for prompt in batch),
                eos_token_id=ends or None,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList(criteria),
                **options,
            )[:, width:]
        return [self._answer(ids, prompt, ends) for ids, prompt in zip(output.tolist(), batch, strict=True)]

    def _answer(self, ids: list[int], prompt: Prompt, ends: list[int]) -> Answer:
        ids = ids[: prompt.limit]
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        kept = ids if end is None else ids[:end]
        text, ended = self.tokenizer.decode(kept), end is not None
        if prompt.stop and prompt.stop in text:
            text, ended = text.partition(prompt.stop)[0], True
        return Answer(text, not ended, len(kept) + (end is not None))

    @torch.inference_mode()
    def _likelihoods(self, batch: Sequence[Prompt]) -> list[float | None]:
        rows = [(prompt.direct_ids(self.tokenizer), prompt.answer_ids) for prompt in batch]
        longest = max(len(before) + len(answer) for before, answer in rows)
        ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
        # Padding is on the right, where no real token attends to it.
        for row, (before, answer) in enumerate(rows):
            ids[row, : len(before) + len(answer)] = torch.tensor([*before, *answer])
            mask[row, : len(before) + len(answer)] = 1
        spans = [range(len(before) - 1, len(before) + len(answer) - 1) for before, answer in rows]
        places = sorted({place for span in spans for place in span})
        ids = ids.to(self.model.device)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask.to(self.model.device),
            use_cache=False,
            logits_to_keep=torch.tensor(places, device=self.model.device),
        ).logits
        if logits.shape[1] != len(places):  # an architecture without this option
            logits = logits[:, places]
        where = {place: number for number, place in enumerate(places)}
        likelihoods: list[float | None] = []
        for row, (span, (_, answer)) in enumerate(zip(spans, rows, strict=True)):
            chosen = wide(logits[row, [where[place] for place in span]])
            loss = F.cross_entropy(chosen, torch.tensor(answer, device=chosen.device)).item()
            if not math.isfinite(loss):
                raise HmfError(
                    f"{self.model.name_or_path}: the log-likelihood of an answer is {-loss}; check the weights of the "
                    "model"
                )
            likelihoods.append(-loss)
        return likelihoods

    @torch.inference_mode()
    def log_probabilities(self, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Log-probabilities of the next token, over the vocabulary, after each token except the last.

        Yields chunks [tokens, vocabulary] in float32 or wider. The cache carries over from chunk to chunk, so that only
        the cache grows with the text.
        """
        row = torch.tensor([list(ids)], device=self.model.device)
        cache = None
        for start in range(0, len(ids) - 1, CHUNK):
            chunk = row[:, start : min(start + CHUNK, len(ids) - 1)]
            output = self.model(input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            yield wide(output.logits[0]).log_softmax(-1)

    def token_log_probabilities(self, ids: Sequence[int]) -> list[float]:
        """Log-probability of each token except the first, given the tokens before it."""
        scores: list[float] = []
        for chunk in self.log_probabilities(ids):
            next_ids = torch.tensor(ids[len(scores) + 1 : len(scores) + 1 + len(chunk)], device=chunk.device)
            scores += chunk.gather(1, next_ids[:, None])[:, 0].tolist()
        return scores


class _Stop(StoppingCriteria):
    """Stops a row once its answer, which begins at position `width`, contains the stop text."""

    TAIL = 8  # number of last tokens that are searched for the text

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, text: str):
        self.tokenizer, self.width, self.text = tokenizer, width, text

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tails = input_ids[:, max(self.width, input_ids.shape[1] - self.TAIL) :].tolist()
        return torch.tensor([self.text in self.tokenizer.decode(tail) for tail in tails], device=input_ids.device)
