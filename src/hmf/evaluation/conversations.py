# SPDX-License-Identifier: Apache-2.0
"""`hmf data answers`: conversations in which a model answers prompts of the generated tasks, as training data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hmf.data import tasks
from hmf.data.encoding import encode_chat
from hmf.data.tasks import Sample
from hmf.errors import HmfError
from hmf.training.checkpoints import replace_text

from .generation import Answer, generate_answers
from .prompts import THINK_START


def prompts(
    tokenizer: PreTrainedTokenizerBase, weights: Mapping[str, float], samples: int, length: int, seed: int
) -> list[Sample]:
    """Samples of tasks drawn by `weights` and of at most `length` tokens, half of them with thinking; sample i depends
    on `seed` and i alone. Those of an evaluation are not among them."""
    drawn = []
    for index in range(samples):
        rng = Random(f"{seed}:answer {index}")
        task = rng.choices(list(weights), list(weights.values()))[0]
        own, size = rng.getrandbits(62), tasks.random_length(rng, length)
        drawn.append(tasks.sample(task, own, tokenizer, size, thinking=rng.random() < 0.5))
    return drawn


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    samples: list[Sample],
    batch_size: int = 16,
    max_new_tokens: int = 512,
    only_correct: bool = False,
) -> dict[str, Counter[str]]:
    """Answer `samples` greedily and write `file`: JSON lines of id, messages, tools and correct.

    An answer is left out that does not end within `max_new_tokens`, that the chat template would write otherwise than
    it was generated (training would then read another text) and, with `only_correct`, that is not the expected one.

    Returns:
        By task how many were asked, written, not ended, changed and wrong; wrong ones may be written.
    Raises:
        HmfError: no answer can be written.
    """
    answers = generate_answers(model, tokenizer, samples, batch_size, max_new_tokens, "answers")
    lines, counts = [], dict[str, Counter[str]]()
    for index, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        count = counts.setdefault(sample.task, Counter())
        correct = sample.is_correct(answer.text, tokenizer)
        count.update({"asked": 1, "wrong": int(not correct), "not ended": int(not answer.ended)})
        messages = answered(tokenizer, sample, answer) if answer.ended else None
        count["changed"] += answer.ended and messages is None
        if messages is None or (only_correct and not correct):
            continue
        count["written"] += 1
        line = {"id": f"{sample.task}-{index}", "messages": messages, "tools": sample.tools, "correct": correct}
        lines.append(json.dumps(line))
    if not lines:
        fix = "; raise --max-new-tokens" if any(count["not ended"] for count in counts.values()) else ""
        raise HmfError(f"{file}: none of {len(samples)} answers can be written: {described(counts)}{fix}")
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, "".join(line + "\n" for line in lines))
    return counts


def answered(tokenizer: PreTrainedTokenizerBase, sample: Sample, answer: Answer) -> list[dict[str, Any]] | None:
    """The sample's messages with this answer as the last one; None if they do not encode to the text of prompt and
    answer."""
    prompt = sample.prompt(tokenizer)
    # Some templates write the start of the thinking into the prompt.
    opened = f"{THINK_START}\n" if prompt.rstrip().endswith(THINK_START) else ""
    messages = [*sample.messages[:-1], {"role": "assistant", "content": opened + answer.text}]
    try:
        encoded = encode_chat(tokenizer, messages, sample.tools, turns="last")[-1]
    except HmfError:
        return None
    generated = prompt + answer.text + answer.end
    return messages if tokenizer.decode(encoded.ids) == generated else None


def described(counts: Mapping[str, Counter[str]]) -> str:
    """The counts of `write_answers` in one line."""
    parts = []
    for task, count in sorted(counts.items()):
        others = ", ".join(f"{count[name]} {name}" for name in ("wrong", "not ended", "changed") if count[name])
        parts.append(f"{task} {count['written']} of {count['asked']}" + (f" ({others})" if others else ""))
    return "; ".join(parts)
