# SPDX-License-Identifier: Apache-2.0
"""Seeded generators of conversations with exact answers: recall, needle, arithmetic, tool calls, small talk.

A sample depends only on (split, task, seed). The split is a part of the random seed, so training and evaluation do not
share samples. Keys and values come from about a million made-up words. Each arithmetic problem belongs to one split, by
its hash.
"""

import json
import math
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import permutations
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from hmf.config.strict import scan_json
from hmf.data import phrases
from hmf.data.template import Template
from hmf.data.text import Split, stdlib_documents
from hmf.data.tokenizer import special_tokens
from hmf.errors import HmfError

Message = dict[str, Any]
MIN_LENGTH = 96  # tokens; a shorter recall or needle conversation has no room for its context
_CALL_ID = "a1b2c3d4e"  # Mistral's templates ask for one of this length
_OVERHEAD = 72  # tokens of a recall or needle conversation besides its context: turns, question, thinking, answer


@dataclass(frozen=True)
class Sample:
    """A conversation whose last message is the assistant's, and the answer that generated text is compared with.

    Attributes:
        thinking: whether the last turn has reasoning; otherwise it follows an empty think block.
        answer: the exact text or, for a tool call, the JSON object with name and arguments.
    """

    task: str
    messages: list[Message]
    answer: str
    thinking: bool
    tools: list[dict[str, Any]] | None = None

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The prompt from which the model generates the last turn."""
        return Template.of(tokenizer).render(
            self.messages[:-1], self.tools, add_generation_prompt=True, enable_thinking=self.thinking
        )

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The whole conversation, which starts with `prompt`."""
        return Template.of(tokenizer).render(self.messages, self.tools, enable_thinking=self.thinking)

    def is_correct(self, generated: str, tokenizer: PreTrainedTokenizerBase | None = None) -> bool:
        """Whether a generated last turn (text without the end-of-turn token) has exactly this answer.

        tokenizer: a call may also be in the form in which this tokenizer's chat template writes it.
        """
        final = after_thinking(generated).strip()
        if self.task != "tool_call":
            return final == self.answer
        call, body = json.loads(self.answer), final.removeprefix("<tool_call>").removesuffix("</tool_call>")
        with suppress(ValueError, RecursionError):
            tagged = len(final) - len(body) == len("<tool_call></tool_call>")
            if tagged and parse_call(body, self.tools or ()) == call:
                return True
        return tokenizer is not None and is_written_call(final, call, self.messages[:-1], self.tools, tokenizer)


def after_thinking(answer: str) -> str:
    """The part of an answer after its thinking. Ministral's templates write [/THINK] at the end of it."""
    return re.split(r"</think>|\[/THINK\]", answer)[-1]


def require_template(tasks: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """HmfError if the tokenizer has no chat template that writes all that these tasks need: tools and calls, too."""
    for task in tasks:
        try:
            Template.of(tokenizer)
            if task in ("tool_call", "tool_answer"):
                made = sample(task, 0, tokenizer, MIN_LENGTH, thinking=False)
                Template.of(tokenizer).read(made.messages, made.tools, {len(made.messages) - 1: False}, variables={})
                made.prompt(tokenizer)
                if task == "tool_call":
                    written_call(json.loads(made.answer), made.messages[:-1], made.tools, tokenizer)
        except HmfError as error:
            raise HmfError(f"tasks: {task}: {error}, or leave the task out") from None


def written_call(
    call: Message, prompt: list[Message], tools: list[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase
) -> str:
    """What the tokenizer's chat template writes for a turn with this call after `prompt`, without special tokens at the
    end. HmfError if it leaves out the call or the tools."""
    template, turn = Template.of(tokenizer), _call_turn(call, thinking=False)
    messages = template.read([*prompt, turn], tools, {len(prompt): False}, variables={}).messages
    whole = template.render(messages, tools, enable_thinking=False)
    for thinking in (False, True):
        before = template.render(messages[:-1], tools, add_generation_prompt=True, enable_thinking=thinking)
        if whole.startswith(before):
            return _without_end(after_thinking(whole[len(before) :]), tokenizer)
    raise HmfError("the chat template writes another prompt before a call than for generation; use another template")


def is_written_call(
    text: str,
    call: Message,
    prompt: list[Message],
    tools: list[dict[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> bool:
    """Whether a text is `written_call`, up to special tokens at the end, the order of arguments, the call's id, the
    layout of JSON, and blanks beside punctuation."""
    given = _without_layout(_without_end(text, tokenizer))
    orders = ({**call, "arguments": dict(order)} for order in permutations(call["arguments"].items()))
    return any(given == _without_layout(written_call(order, prompt, tools, tokenizer)) for order in orders)


def _without_end(turn: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return re.sub(rf"(?:\s|{special_tokens(tokenizer).pattern})*$", "", turn).strip()


def _without_layout(text: str) -> str:
    """The text with its JSON in one layout, without the ids of calls, and without blanks beside punctuation."""
    parts, place, plain = list[str](), 0, 0
    while place < len(text):
        if text[place] in '[{"':
            with suppress(ValueError):
                value, end = scan_json(text, place)
                for part in value if isinstance(value, list) else [value]:
                    if isinstance(part, dict) and "name" in part:
                        part.pop("id", None)
                parts += [_dense(text[plain:place]), json.dumps(value, sort_keys=True)]
                place = plain = end
                continue
        place += 1
    return "".join([*parts, _dense(text[plain:])])


def _dense(text: str) -> str:
    return re.sub(r"\s+(?=\W|$)|(?<=\W)\s+|^\s+", "", text)


_XML_CALL = re.compile(r"<function=([^>\s]+)>(?:\s*<parameter=[^>\s]+>.*?</parameter>)*\s*</function>", re.DOTALL)
_XML_ARGUMENT = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def parse_call(text: str, tools: Iterable[Message]) -> Any:
    """The call in a text: JSON, or the XML of Qwen3.5's templates, where values are text that the tool's schema types.

    Args:
        tools: the offered tools, each an object with `function`.
    Raises:
        ValueError: neither JSON nor such XML, or a value that does not have its type.
    """
    if not (match := _XML_CALL.fullmatch(text.strip())):
        return json.loads(text)
    offered = {tool["function"]["name"]: tool["function"]["parameters"].get("properties", {}) for tool in tools}
    types = {name: schema.get("type") for name, schema in offered.get(match[1], {}).items()}
    arguments = {}
    for name, value in _XML_ARGUMENT.findall(match[0]):
        if types.get(name, "string") == "string":
            arguments[name] = value
        else:
            arguments[name] = json.loads(value.lower() if types[name] == "boolean" else value)
    return {"name": match[1], "arguments": arguments}


def sample(
    task: str,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    split: Split = "train",
    thinking: bool = True,
) -> Sample:
    """Generate one conversation of `task`, a name in `TASKS`.

    Args:
        length: most tokens of the whole conversation. Recall and needle fill it; the other tasks are short.
        thinking: whether the answer has reasoning, which is the chat template's default.
    Raises:
        HmfError: an unknown task, or a length below `MIN_LENGTH`.
    """
    if task not in TASKS:
        raise HmfError(f"task {task!r}: unknown; choose from {', '.join(TASKS)}")
    if length < MIN_LENGTH:
        raise HmfError(f"task {task}: length {length} is too short; give at least {MIN_LENGTH} tokens")
    return TASKS[task](Random(f"{split}:{task}:{seed}"), tokenizer, length, split, thinking)


def _recall(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """Pairs of a made-up word and a value; the question names one of the words."""
    return _pairs("recall", rng, tokenizer, length, thinking, asked=1)


def _recall_many(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """Recall with a question about several words, which gives many more supervised tokens."""
    return _pairs("recall_many", rng, tokenizer, length, thinking, asked=rng.randint(2, max(2, length // 64)))


def _pairs(
    task: str, rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, thinking: bool, asked: int
) -> Sample:
    line, question = rng.choice(phrases.RECALL)
    numbers = rng.random()
    # A pair is about nine tokens, seldom fewer than seven: this many fill the length.
    keys = list(dict.fromkeys(phrases.word(rng) for _ in range(length // 7)))
    values = [phrases.value(rng, numbers) for _ in keys]
    lines = [line.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    # A further word costs about 28 tokens: in the question, in the reasoning and in the answer.
    kept = max(asked, fitting(tokenizer, lines, length - _OVERHEAD - (asked - 1) * 28))
    chosen = rng.sample(range(kept), asked)
    lead = rng.choice(phrases.RECALL_LEAD)
    names = ", ".join(keys[i] for i in chosen)
    user = lead + "\n" + "\n".join(lines[:kept]) + "\n\n" + question.format(key=names)
    asked_lines = "\n".join(lines[i] for i in chosen)
    return _answered(task, user, asked_lines, values[chosen[0]] if asked == 1 else asked_lines, thinking)


def _needle(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """A made-up fact within library source code; sometimes with a second fact of the same kind about another name."""
    return _facts("needle", rng, tokenizer, length, split, thinking, stated=rng.choice((1, 2)), asked=1)


def _needle_many(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """Several facts and a question about some of them, which gives more supervised tokens."""
    stated = rng.randint(2, max(2, length // 96))
    return _facts("needle_many", rng, tokenizer, length, split, thinking, stated, asked=rng.randint(2, stated))


def _facts(
    task: str,
    rng: Random,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    split: Split,
    thinking: bool,
    stated: int,
    asked: int,
) -> Sample:
    statement, question = rng.choice(phrases.NEEDLE)
    distinct: dict[str, None] = {}
    while len(distinct) < stated:
        distinct[phrases.word(rng).capitalize()] = None
    names = list(distinct)
    values = [phrases.value(rng) for _ in names]
    statements = [statement.format(name=name, value=value) for name, value in zip(names, values, strict=True)]
    # A statement is about 20 tokens. Those that the question asks for are repeated in reasoning and answer.
    room = length - _OVERHEAD - stated * 20 - (asked - 1) * 48
    lines = library_lines(rng, split, characters=4 * length)  # enough: a token is about three characters
    lines = lines[: max(1, fitting(tokenizer, lines, room))]
    for text in statements:
        lines.insert(rng.randrange(len(lines) + 1), text)
    user = "\n".join(lines) + "\n\n" + question.format(name=", ".join(names[:asked]))
    asked_statements = "\n".join(statements[:asked])
    return _answered(task, user, asked_statements, values[0] if asked == 1 else asked_statements, thinking)


def library_lines(rng: Random, split: Split, characters: int) -> list[str]:
    """Consecutive lines of library source, from a random place on, and of further files when the first one ends."""
    library = stdlib_documents(split)
    index = rng.randrange(len(library))
    source = library[index].text
    source = source[source.rfind("\n", 0, rng.randrange(len(source))) + 1 :]
    while len(source) < characters:
        index = (index + 1) % len(library)
        source += library[index].text
    return [line[:100] for line in source[:characters].split("\n")]


def fitting(tokenizer: PreTrainedTokenizerBase, lines: list[str], budget: int) -> int:
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
    """With thinking: sums and differences of numbers of up to three digits, products of two digits and one digit.

    Without: sums and differences of a number of up to two digits and one digit.
    """
    while True:
        sign = rng.choice("+-*" if thinking else "+-")
        limit = 10 ** rng.choice((1, 2, 3) if thinking else (1, 2))
        a, b = rng.randrange(limit), rng.randrange(limit if thinking else 10)
        if sign == "*":
            a, b = a % 100, rng.randrange(2, 10)
        elif sign == "-":
            a, b = max(a, b), min(a, b)
        # The steps consist of one-digit problems, so all of these are for training.
        heldout = a > 9 and zlib.crc32(f"{a}{sign}{b}".encode()) % 8 == 0
        if heldout == (split == "heldout"):
            break
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    steps = {"+": _add_steps, "-": _subtract_steps, "*": _multiply_steps}[sign](a, b)
    user = rng.choice(phrases.ARITHMETIC).format(problem=f"{a} {sign} {b}")
    return _answered("arithmetic", user, "\n".join([*steps, f"{a} {sign} {b} = {result}"]), str(result), thinking)


def _add_steps(a: int, b: int) -> list[str]:
    steps: list[str] = []
    carry = 0
    while a or b or not steps:
        total = a % 10 + b % 10 + carry
        carried = f" + {carry}" if carry else ""
        steps.append(f"{a % 10} + {b % 10}{carried} = {total}, write {total % 10}, carry {total // 10}")
        carry, a, b = total // 10, a // 10, b // 10
    return steps + ([f"write {carry}"] if carry else [])


def _subtract_steps(a: int, b: int) -> list[str]:
    steps: list[str] = []
    borrow = 0
    while a or b or not steps:
        lends = a % 10 < b % 10 + borrow
        upper, lower = a % 10 + 10 * lends, b % 10 + borrow
        steps.append(f"{upper} - {lower} = {upper - lower}, write {upper - lower}, borrow {int(lends)}")
        borrow, a, b = int(lends), a // 10, b // 10
    return steps


def _multiply_steps(a: int, b: int) -> list[str]:
    if a < 10:
        return []
    tens, ones = a // 10 * 10, a % 10
    sum_steps = _add_steps(tens * b, ones * b)
    return [f"{tens} * {b} = {tens * b}", f"{ones} * {b} = {ones * b}", f"{tens * b} + {ones * b}:", *sum_steps]


def _tool_call(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """A request for one of one to three offered tools."""
    messages, call, tools = _tool_request(rng)
    return Sample("tool_call", [*messages, _call_turn(call, thinking)], json.dumps(call), thinking, tools)


def _tool_answer(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """The turn after a tool's result, which states the result."""
    messages, call, tools = _tool_request(rng)
    result = phrases.value(rng)
    key = rng.choice(("result", "value", "answer", "status"))
    content = json.dumps({key: result}) if rng.random() < 0.6 else result
    answer = f"The result is {result}."
    final = {"role": "assistant", "content": answer}
    if thinking:
        final["reasoning_content"] = f"The tool says {result}."
    told = {"role": "tool", "tool_call_id": _CALL_ID, "content": content}
    messages = [*messages, _call_turn(call, thinking), told, final]
    return Sample("tool_answer", messages, answer, thinking, tools)


def _tool_request(rng: Random) -> tuple[list[Message], dict[str, Any], list[dict[str, Any]]]:
    offered = {}
    for _ in range(rng.choice((1, 1, 2, 3))):
        tool = phrases.tool(rng)
        offered[tool.name] = tool
    requested_tool = rng.choice(list(offered.values()))
    request, arguments = requested_tool.request(rng)
    messages = [{"role": "user", "content": request}]
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": rng.choice(phrases.SYSTEM)})
    return messages, {"name": requested_tool.name, "arguments": arguments}, [tool.schema() for tool in offered.values()]


def _call_turn(call: dict[str, Any], thinking: bool) -> Message:
    """The assistant's turn with one call of a tool."""
    # OpenAI clients send arguments as a JSON string, others as a dict; the rendered text is the same.
    tool_call = {"id": _CALL_ID, "type": "function", "function": call}
    turn = {"role": "assistant", "content": "", "tool_calls": [tool_call]}
    if thinking:
        arguments = ", ".join(f"{key} {value}" for key, value in call["arguments"].items())
        turn["reasoning_content"] = f"I call {call['name']} with {arguments}."
    return turn


def _chat(rng: Random, tokenizer: PreTrainedTokenizerBase, length: int, split: Split, thinking: bool) -> Sample:
    """Small talk and a few questions about a household, sometimes after an earlier exchange."""
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
    "recall_many": _recall_many,
    "needle": _needle,
    "needle_many": _needle_many,
    "arithmetic": _arithmetic,
    "tool_call": _tool_call,
    "tool_answer": _tool_answer,
    "chat": _chat,
}


def random_length(rng: Random, longest: int) -> int:
    """A random length for a training sample: log-uniform up to `longest`, and a quarter exactly `longest`."""
    if rng.random() < 0.25:
        return longest
    return round(math.exp(rng.uniform(math.log(MIN_LENGTH), math.log(longest))))
