# SPDX-License-Identifier: Apache-2.0
"""Accuracy on generated tasks: greedy answers, compared exactly."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hmf.data.progress import Progress
from hmf.data.tasks import Sample
from hmf.data.tokenizer import encode_texts
from hmf.errors import HmfError
from hmf.evaluation.chunks import Composition, conversation_parts
from hmf.evaluation.compose import prefill
from hmf.evaluation.results import Answered, excerpt
from hmf.model.checkpoint import GENERATION
from hmf.training.checkpoints import replace_text


@dataclass(frozen=True)
class TaskScore:
    """Share of correct answers to `n` prompts, and share of answers that reached the token limit before their end. The
    latter are not correct."""

    accuracy: float
    n: int
    truncated: float


class Answer(NamedTuple):
    """A generated text, the text of the token that ended it ("" if it reached the limit), and its number of tokens."""

    text: str
    end: str
    tokens: int

    @property
    def ended(self) -> bool:
        return bool(self.end)


def task_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    batch_size: int = 16,
    max_new_tokens: int = 160,
    title: str = "answers",
    compose: Composition | None = None,
    answers_file: Path | None = None,
) -> TaskScore:
    """Generate the last turn of each sample from its prompt, in left-padded batches, and score it.

    Args:
        title: label of the progress lines.
        compose: how chunks of long prompts are combined. None: prompts are processed as a whole.
        answers_file: receives one line of JSON for each sample: index, prompt (a long one without its middle),
            prompt_sha256, expected, answer, correct, truncated and tokens.
    """
    answers = generate_answers(model, tokenizer, samples, batch_size, max_new_tokens, title, compose)
    correct = [
        one.ended and sample.is_correct(one.text, tokenizer) for sample, one in zip(samples, answers, strict=True)
    ]
    if answers_file is not None:
        lines = []
        for index, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
            prompt = sample.prompt(tokenizer)
            line = Answered(
                index=index,
                prompt_sha256=hashlib.sha256(prompt.encode()).hexdigest(),
                expected=sample.answer,
                answer=answer.text,
                correct=correct[index],
                truncated=not answer.ended,
                tokens=answer.tokens,
                prompt=excerpt(prompt),
            )
            lines.append(line.model_dump(exclude_none=True))
        answers_file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(answers_file, "".join(json.dumps(line) + "\n" for line in lines))
    truncated = sum(not answer.ended for answer in answers)
    return TaskScore(sum(correct) / len(samples), len(samples), truncated / len(samples))


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Turn a failure of `generate` into an HmfError that names the model's generation_config.json, if it has one."""
    try:
        yield
    except (HmfError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any type: transformers uses these values before it validates them
        if not (file := Path(model.name_or_path) / GENERATION).is_file():
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HmfError(
            f"{file}: generation fails with these values ({type(error).__name__}: {reason:.200}); correct or remove "
            "the file"
        ) from error


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's and those of the generation config. They differ in Gemma."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    configured_ids = configured if isinstance(configured, list) else [configured]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *configured_ids]) if token is not None]


def pad_token(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    """The token that fills rows. Any will do, since it is masked; many published tokenizers name none."""
    return next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, int64 [B, T], of rows of token ids."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def prompt_inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    compose: Composition | None = None,
) -> dict[str, Any]:
    """Arguments of `model.generate` for the samples' prompts, padded on the left; with `compose`, also the cache."""
    if compose is not None:
        parts = [
            conversation_parts(tokenizer, sample.messages[:-1], compose, sample.tools, sample.thinking)
            for sample in samples
        ]
        return prefill(model, parts, compose).for_generate()
    prompts = encode_texts(tokenizer, [sample.prompt(tokenizer) for sample in samples])
    return left_padded(prompts, pad_token(tokenizer, end_tokens(model, tokenizer)), model.device)


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    batch_size: int = 16,
    max_new_tokens: int = 160,
    title: str = "answers",
    compose: Composition | None = None,
) -> list[Answer]:
    """The answer to each sample, in their order."""
    prompts = [sample.prompt(tokenizer) for sample in samples]
    # Prompts of similar lengths share a batch, which needs little padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [Answer("", "", 0)] * len(prompts)
    ends = end_tokens(model, tokenizer)
    progress = Progress(title, len(prompts), unit=" answers")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = prompt_inputs(model, tokenizer, [samples[index] for index in chosen], compose)
        with generating(model):
            output = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends or None,
                pad_token_id=pad_token(tokenizer, ends),
            )[:, inputs["input_ids"].shape[1] :]
        for index, ids in zip(chosen, output.tolist(), strict=True):
            end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            answers[index] = Answer(tokenizer.decode(ids[:end]), tokenizer.decode(ids[end : end + 1]), end)
        progress.add(len(chosen), output.numel())
    progress.close()
    return answers
