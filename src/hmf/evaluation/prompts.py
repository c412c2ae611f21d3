# SPDX-License-Identifier: Apache-2.0
"""Prompts of generated tasks with a set length in tokens of the model's own tokenizer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from hmf.data.tasks import after_thinking, fitting, is_written_call, written_call
from hmf.data.template import Template
from hmf.data.tokenizer import encode_parts, encode_texts
from hmf.errors import HmfError
from hmf.evaluation.retention import Draw, Problem, Task

THINK_START, THINK_END = "<think>", "</think>"
PLAIN_END = "\n\n"  # the end of an answer to a prompt without a chat template


@dataclass(frozen=True)
class Answer:
    """A model's answer. `truncated`: it reached the token limit before its end."""

    text: str
    truncated: bool
    tokens: int


@dataclass(frozen=True)
class Prompt:
    """A problem in the form that a model receives.

    Attributes:
        ids: tokens of the prompt.
        direct: the prompt without thinking; the likelihood of the expected answer is measured after it.
        answer_ids: tokens of the expected answer.
        limit: largest number of tokens of an answer.
        messages, thinking: for servers that render the prompt. `messages` is empty without a chat template.
    """

    index: int
    problem: Problem
    text: str
    ids: list[int]
    direct: str
    answer_ids: list[int]
    limit: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    thinking: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def direct_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return self.ids if self.direct == self.text else encode_texts(tokenizer, [self.direct])[0]

    @property
    def stop(self) -> str | None:
        """Text that ends an answer, in addition to the model's end-of-text tokens."""
        return None if self.messages else PLAIN_END

    def is_correct(self, answer: Answer) -> bool:
        """Whether an answer is correct by the task's rule. A truncated answer, or one with unfinished reasoning, is
        incorrect."""
        if answer.truncated:
            return False
        final = after_thinking(answer.text)
        return not any(start in final for start in (THINK_START, "[THINK]")) and self.problem.check(final.strip())


@dataclass(frozen=True)
class Prompter:
    """Makes prompts with a tokenizer's chat template, or as plain text if it has none.

    Attributes:
        max_new_tokens: tokens of an answer in addition to those of the expected answer.
        context: largest number of tokens of prompt and answer.
        of: completes the phrase "the CONTEXT tokens that ..." in messages; it names what limits the context.
    """

    tokenizer: PreTrainedTokenizerBase
    seed: int
    thinking: bool
    max_new_tokens: int
    context: int
    of: str

    def require(self, lengths: list[int]) -> None:
        """Raise HmfError for a length beyond the context."""
        for length in lengths:
            if length > self.context:
                raise HmfError(
                    f"--lengths: {length:,} tokens exceed the {self.context:,} that {self.of}; give smaller lengths"
                )

    def prompts(self, task: Task, length: int | None, count: int) -> Iterator[Prompt]:
        """The first `count` prompts of a task. With `length`, a prompt and its longest answer have up to that many
        tokens.

        Raises:
            HmfError: the length is too small for the prompt, or the context is too short.
        """
        for index in range(count):
            rng = Random(f"{self.seed}:{task.name}:{length}:{index}")
            problem = self._called(task.make(Draw(index, rng, self.tokenizer, (length or 0) - self.max_new_tokens)))
            made = self._fitted(index, problem, length, rng.getrandbits(32), task.name)
            if len(made.ids) + made.limit > self.context:
                raise HmfError(
                    f"{task.name}: a prompt of {len(made.ids):,} tokens and an answer of {made.limit:,} exceed the "
                    f"{self.context:,} that {self.of}; lower --max-new-tokens"
                )
            yield made

    def _called(self, problem: Problem) -> Problem:
        """The problem, whose answer is a call in the form of the chat template, if it writes tools and calls."""
        call, tools, tokenizer = problem.call, problem.tools, self.tokenizer
        if call is None or not tokenizer.chat_template:
            return problem
        prompt = [{"role": "user", "content": problem.question}]
        try:
            answer = written_call(call, prompt, tools, tokenizer)
        except HmfError:
            return problem
        return replace(
            problem,
            answer=answer,
            check=lambda text: problem.check(text) or is_written_call(text, call, prompt, tools, tokenizer),
        )

    def _fitted(self, index: int, problem: Problem, length: int | None, places: int, name: str) -> Prompt:
        limit = len(encode_texts(self.tokenizer, [problem.answer])[0]) + self.max_new_tokens
        thinking = self.thinking if problem.thinking is None else problem.thinking
        bare = self._prompt(index, problem, problem.text(0, Random(places)), limit, thinking)
        if length is None:
            return bare
        room = length - limit - len(bare.ids)
        kept = fitting(self.tokenizer, problem.lines, room) if room > 0 else 0
        while kept > 0:
            made = self._prompt(index, problem, problem.text(kept, Random(places)), limit, thinking)
            beyond = len(made.ids) + limit - length
            if beyond <= 0:
                return made
            kept -= max(1, math.ceil(kept * beyond / room))  # facts between the lines cost a few more tokens
        needed = -(-(length - room) // 64) * 64 + 64
        raise HmfError(
            f"--lengths: {length:,} is too small for the prompt of {name} and an answer of {limit:,} tokens; give "
            f"at least {needed:,}, or lower --max-new-tokens"
        )

    def _prompt(self, index: int, problem: Problem, user: str, limit: int, thinking: bool) -> Prompt:
        messages = [{"role": "user", "content": user}]
        if not self.tokenizer.chat_template:
            text = f"{_with_tools(user, problem.tools)}\n\nAnswer:"
            ids = self.tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
            _, answered = encode_parts(self.tokenizer, ["Answer:", f" {problem.answer}"])
            return Prompt(index, problem, text, ids, text, answered, limit, [], None, False)
        tools = problem.tools
        text = self._rendered(messages, tools, thinking)
        if tools and not all(tool["function"]["name"] in text for tool in tools):  # the template omits tools
            messages, tools = [{"role": "user", "content": _with_tools(user, tools)}], None
            text = self._rendered(messages, tools, thinking)
        ids, answered = encode_parts(self.tokenizer, [text, problem.answer])
        direct = self._rendered(messages, tools, False) if thinking else text
        return Prompt(index, problem, text, ids, direct, answered, limit, messages, tools, thinking)

    def _rendered(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, thinking: bool) -> str:
        return Template.of(self.tokenizer).render(messages, tools, add_generation_prompt=True, enable_thinking=thinking)


def _with_tools(user: str, tools: list[dict[str, Any]] | None) -> str:
    """A request with the tools' schemas as text, for models whose template does not write tools."""
    if not tools:
        return user
    schemas = "\n".join(json.dumps(tool["function"]) for tool in tools)
    return f'Tools:\n{schemas}\n\n{user}\nAnswer with one call alone, as JSON: {{"name": NAME, "arguments": {{...}}}}'
