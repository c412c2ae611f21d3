# SPDX-License-Identifier: Apache-2.0
"""Seeded generators of conversations with exact answers: recall, needle, arithmetic, tool calls, small talk.

A sample is a function of (split, task, seed). The split is part of the random seed, so training and evaluation never
share a sample; keys and values come from about a million made-up words, and each arithmetic problem belongs to one
split by its hash.
"""

import json
import math
import zlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from hmf.data import phrases
from hmf.data.text import Split, stdlib_documents
from hmf.errors import HmfError

Message = dict[str, Any]
MIN_LENGTH = 96  # tokens: below this a recall or needle conversation has no room for its context
_OVERHEAD = 72  # tokens of a recall or needle conversation besides its context: turns, question, thinking, answer


@dataclass(frozen=True)
class Sample:
    """A conversation whose last message is the assistant's, and what an answer is scored against.

    `thinking` says how the last turn was made: with reasoning, or directly after an empty think block.
    `answer` is the exact text, or for a tool call the JSON object with name and arguments.
    """

    task: str
    messages: list[Message]
    answer: str
    thinking: bool
    tools: list[dict[str, Any]] | None = None

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What the model is given to generate the last turn."""
        return tokenizer.apply_chat_template(
            self.messages[:-1],
            tools=self.tools,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.thinking,
        )

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The whole conversation; starts with `prompt`."""
        return tokenizer.apply_chat_template(
            self.messages, tools=self.tools, tokenize=False, enable_thinking=self.thinking
        )

    def is_correct(self, generated: str) -> bool:
        """Whether a generated last turn (text without the end-of-turn token) gives the answer exactly."""
        final = generated.split("</think>")[-1].strip()
        if self.task != "tool_call":
            return final == self.answer
        body = final.removeprefix("<tool_call>").removesuffix("</tool_call>")
        if len(final) - len(body) != len("<tool_call></tool_call>"):
            return False
        try:
            return json.loads(body) == json.loads(self.answer)
        except json.JSONDecodeError:
            return False


def sample(
    task: str,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    split: Split = "train",
    thinking: bool | None = None,
) -> Sample:
    """One conversation of `task` (a name of `TASKS`).

    Args:
        length: most tokens of the whole conversation. Recall and needle fill it; the other tasks are short.
        thinking: with reasoning or without; None lets the seed choose.
    Raises:
        HmfError: unknown task, or a length too short for a task that fills it.
    """
    if task not in TASKS:
        raise HmfError(f"task {task!r}: unknown; choose from {', '.join(TASKS)}")
    if length < MIN_LENGTH:
        raise HmfError(f"task {task}: length {length} is too short; give at least {MIN_LENGTH} tokens")
    rng = Random(f"{split}:{task}:{seed}")
    chosen = rng.random() < 0.5
    return TASKS[task](rng, tokenizer, length, split, chosen if thinking is None else thinking)


def _recall(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """Pairs of a made-up word and a value; the question names one of the words, or several of them."""
    line, question = rng.choice(phrases.RECALL)
    numbers = rng.random()
    # A pair is at least six tokens, so this many are sure to fill the length.
    keys = list(dict.fromkeys(phrases.word(rng) for _ in range(length // 6)))
    values = [phrases.number(rng) if rng.random() < numbers else phrases.word(rng) for _ in keys]
    lines = [line.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    asked = rng.choice((1, 1, 1, 2, 4)) if length >= 2 * MIN_LENGTH else 1
    kept = max(asked, _fitting(tokenizer, lines, length - _OVERHEAD - (asked - 1) * 20))
    chosen = rng.sample(range(kept), asked)
    lead = rng.choice(phrases.RECALL_LEAD)
    names = ", ".join(keys[i] for i in chosen)
    user = lead + "\n" + "\n".join(lines[:kept]) + "\n\n" + question.format(key=names)
    reasoning = "\n".join(lines[i] for i in chosen)
    return _answered("recall", user, reasoning, "\n".join(values[i] for i in chosen), thinking)


def _needle(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """A made-up fact somewhere in library source; at times a second fact of the same kind about another name."""
    statement, question = rng.choice(phrases.NEEDLE)
    facts = []
    for _ in range(rng.choice((1, 2))):
        value = phrases.number(rng) if rng.random() < 0.5 else phrases.word(rng)
        facts.append((phrases.word(rng).capitalize(), value))
    stated = [statement.format(name=name, value=value) for name, value in facts]
    room = length - _OVERHEAD - len(stated) * 24
    lines = _library_lines(rng, split, characters=6 * length)  # more than fit: a token is three or four characters
    lines = lines[: max(1, _fitting(tokenizer, lines, room))]
    for text in stated:
        lines.insert(rng.randrange(len(lines) + 1), text)
    name, value = facts[0]
    user = "\n".join(lines) + "\n\n" + question.format(name=name)
    return _answered("needle", user, stated[0], value, thinking)


def _library_lines(rng: Random, split: Split, characters: int) -> list[str]:
    """Consecutive lines of library source, from a random place on, and of further files when the first one ends."""
    library = stdlib_documents(split)
    index = rng.randrange(len(library))
    source = library[index].text
    source = source[source.rfind("\n", 0, rng.randrange(len(source))) + 1 :]
    while len(source) < characters:
        index = (index + 1) % len(library)
        source += library[index].text
    return [line[:100] for line in source[:characters].split("\n")]


def _fitting(tokenizer: PreTrainedTokenizerBase, lines: list[str], budget: int) -> int:
    """How many of the first lines, each with its newline, fit into `budget` tokens."""
    text = "\n".join(lines) + "\n"
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= budget:
        return len(lines)
    ends, position = [], 0
    for line in lines:
        position += len(line) + 1
        ends.append(position)
    return bisect_right(ends, offsets[max(0, budget)][0])


def _arithmetic(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """Sums and differences to three digits, products with one digit; without thinking, operands are smaller."""
    while True:
        sign = rng.choice("+-*")
        limit = 10 ** rng.choice((1, 2, 3) if thinking else (1, 2))
        a, b = rng.randrange(limit), rng.randrange(limit)
        if sign == "*":
            a, b = (a % 100 if thinking else a % 10), rng.randrange(2, 10)
        elif sign == "-":
            a, b = max(a, b), min(a, b)
        heldout = zlib.crc32(f"{a}{sign}{b}".encode()) % 8 == 0
        if heldout == (split == "heldout"):
            break
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    steps = {"+": _add_steps, "-": _subtract_steps, "*": _multiply_steps}[sign](a, b)
    user = rng.choice(phrases.ARITHMETIC).format(problem=f"{a} {sign} {b}")
    return _answered("arithmetic", user, "\n".join([*steps, f"{a} {sign} {b} = {result}"]), str(result), thinking)


def _add_steps(a: int, b: int) -> list[str]:
    steps, carry, place = [], 0, 0
    while a or b or place == 0:
        total = a % 10 + b % 10 + carry
        carried = f" + {carry}" if carry else ""
        steps.append(f"{a % 10} + {b % 10}{carried} = {total}, write {total % 10}, carry {total // 10}")
        carry, a, b, place = total // 10, a // 10, b // 10, place + 1
    return steps + ([f"write {carry}"] if carry else [])


def _subtract_steps(a: int, b: int) -> list[str]:
    steps, borrow, place = [], 0, 0
    while a or b or place == 0:
        difference = a % 10 - b % 10 - borrow
        lent = " + 10" if difference < 0 else ""
        borrowed = f" - {borrow}" if borrow else ""
        digit = difference % 10
        steps.append(f"{a % 10}{lent} - {b % 10}{borrowed} = {digit}, write {digit}, borrow {int(difference < 0)}")
        borrow, a, b, place = int(difference < 0), a // 10, b // 10, place + 1
    return steps


def _multiply_steps(a: int, b: int) -> list[str]:
    if a < 10:
        return []
    tens, ones = a // 10 * 10, a % 10
    sum_steps = _add_steps(tens * b, ones * b)
    return [f"{tens} * {b} = {tens * b}", f"{ones} * {b} = {ones * b}", f"{tens * b} + {ones * b}:", *sum_steps]


def _tool_call(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """One to three tools are offered; the request fits one of them."""
    messages, call, tools = _tool_request(rng)
    arguments = ", ".join(f"{key} {value}" for key, value in call["arguments"].items())
    reasoning = f"I call {call['name']} with {arguments}."
    # Arguments arrive as a JSON string from OpenAI clients and as a dict from others: the same text either way.
    reply = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    if thinking:
        reply["reasoning_content"] = reasoning
    return Sample("tool_call", [*messages, reply], json.dumps(call), thinking, tools)


def _tool_answer(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """The turn after a tool's result: say what it was."""
    messages, call, tools = _tool_request(rng)
    result = phrases.number(rng) if rng.random() < 0.5 else phrases.word(rng)
    key = rng.choice(("result", "value", "answer", "status"))
    content = json.dumps({key: result}) if rng.random() < 0.6 else result
    reply = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    if thinking:
        arguments = ", ".join(f"{key} {value}" for key, value in call["arguments"].items())
        reply["reasoning_content"] = f"I call {call['name']} with {arguments}."
    answer = f"The result is {result}."
    final = {"role": "assistant", "content": answer}
    if thinking:
        final["reasoning_content"] = f"The tool says {result}."
    messages = [*messages, reply, {"role": "tool", "content": content}, final]
    return Sample("tool_answer", messages, answer, thinking, tools)


def _tool_request(rng: Random) -> tuple[list[Message], dict[str, Any], list[dict[str, Any]]]:
    offered = {}
    for _ in range(rng.choice((1, 1, 2, 3))):
        tool = phrases.tool(rng)
        offered[tool.name] = tool
    wanted = rng.choice(list(offered.values()))
    request, arguments = wanted.request(rng)
    messages = [{"role": "user", "content": request}]
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": rng.choice(phrases.SYSTEM)})
    return messages, {"name": wanted.name, "arguments": arguments}, [tool.schema() for tool in offered.values()]


def _chat(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """Small talk and a few questions about the house, at times after an earlier exchange."""
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(phrases.SYSTEM)})
    for _ in range(rng.choice((1, 1, 2))):
        questions, reasoning, answer = rng.choice(phrases.CHAT)
        messages += [{"role": "user", "content": rng.choice(questions)}, {"role": "assistant", "content": answer}]
    if thinking:
        messages[-1]["reasoning_content"] = reasoning
    return Sample("chat", messages, answer, thinking)


def _answered(task: str, user: str, reasoning: str, answer: str, thinking: bool) -> Sample:
    reply = {"role": "assistant", "content": answer}
    if thinking:
        reply["reasoning_content"] = reasoning
    return Sample(task, [{"role": "user", "content": user}, reply], answer, thinking)


Generator = Callable[[Random, PreTrainedTokenizerBase, int, Split, bool], Sample]
TASKS: dict[str, Generator] = {
    "recall": _recall,
    "needle": _needle,
    "arithmetic": _arithmetic,
    "tool_call": _tool_call,
    "tool_answer": _tool_answer,
    "chat": _chat,
}


def random_length(rng: Random, longest: int) -> int:
    """A length for a training sample: short and long ones equally often on a logarithmic scale, some at the limit."""
    if rng.random() < 0.25:
        return longest
    return round(math.exp(rng.uniform(math.log(MIN_LENGTH), math.log(longest))))
