# SPDX-License-Identifier: Apache-2.0
"""Accuracy on generated tasks: greedy answers, compared exactly."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hmf.data.shards import Progress
from hmf.data.tasks import Sample
from hmf.errors import HmfError
from hmf.model.checkpoint import GENERATION
from hmf.training.checkpoints import replace_text

EXCERPT = 4000  # characters of a prompt that are kept beside its answer


@dataclass(frozen=True)
class TaskScore:
    """Share of exact answers out of `n`, and share of answers that did not end within the tokens allowed."""

    accuracy: float
    n: int
    truncated: float


class Answer(NamedTuple):
    """A generated text, whether it ended by itself, and how many tokens were generated."""

    text: str
    ended: bool
    tokens: int


def task_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    batch_size: int = 16,
    max_new_tokens: int = 160,
    title: str = "answers",
    answers_file: Path | None = None,
) -> TaskScore:
    """Generates the last turn of each sample from its prompt, in left-padded batches.

    title: what lines of progress begin with. answers_file: gets one line of JSON for each sample: index, prompt (the
    middle of a long one is left out), prompt_sha256, expected, answer, correct, truncated and tokens.
    """
    answers = generate_answers(model, tokenizer, samples, batch_size, max_new_tokens, title)
    correct = [sample.is_correct(answer.text) for sample, answer in zip(samples, answers, strict=True)]
    if answers_file is not None:
        lines = []
        for index, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
            prompt = sample.prompt(tokenizer)
            lines.append(
                {
                    "index": index,
                    "prompt": _excerpt(prompt),
                    "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
                    "expected": sample.answer,
                    "answer": answer.text,
                    "correct": correct[index],
                    "truncated": not answer.ended,
                    "tokens": answer.tokens,
                }
            )
        answers_file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(answers_file, "".join(json.dumps(line) + "\n" for line in lines))
    truncated = sum(not answer.ended for answer in answers)
    return TaskScore(sum(correct) / len(samples), len(samples), truncated / len(samples))


def _excerpt(prompt: str) -> str:
    if len(prompt) <= EXCERPT:
        return prompt
    half = EXCERPT // 2
    return f"{prompt[:half]}\n[... {len(prompt) - 2 * half:,} characters are left out ...]\n{prompt[-half:]}"


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """HmfError where a model with a generation_config.json cannot generate by what that file holds."""
    try:
        yield
    except (HmfError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: transformers uses these values before it checks them
        if not (file := Path(model.name_or_path) / GENERATION).is_file():
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HmfError(
            f"{file}: its values do not generate ({type(error).__name__}: {reason:.200}); correct or remove it"
        ) from error


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    batch_size: int = 16,
    max_new_tokens: int = 160,
    title: str = "answers",
) -> list[Answer]:
    """The answer to each sample, in their order."""
    prompts = [sample.prompt(tokenizer) for sample in samples]
    # Prompts of like lengths go together, so that little padding is computed.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [Answer("", False, 0)] * len(prompts)
    progress = Progress(title, len(prompts), unit=" answers")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[index] for index in chosen],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        with generating(model):
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )[:, batch["input_ids"].shape[1] :]
        for index, ids in zip(chosen, output.tolist(), strict=True):
            ended = tokenizer.eos_token_id in ids
            ids = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
            answers[index] = Answer(tokenizer.decode(ids), ended, len(ids))
        progress.add(len(chosen), output.numel())
    progress.close()
    return answers
