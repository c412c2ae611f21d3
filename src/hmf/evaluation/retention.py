# SPDX-License-Identifier: Apache-2.0
"""The tasks of the suite "retention": abilities that a model may lose when attention layers are replaced.

A task is one function of this module. It makes a `Problem` from random numbers. All problems are then fitted to a
length and sent to a model in the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from hmf.data import phrases
from hmf.data.tasks import fitting, library_lines, parse_call
from hmf.data.tokenizer import special_tokens

LONGEST_COPY = 2048  # largest number of tokens of the passage in long_copy, at any length
Check = Callable[[str], bool]


@dataclass(frozen=True)
class Problem:
    """A question and the check of its answer.

    The user's turn consists of `lead`, as many of `lines` as fit into the length, and `question`; `facts` are inserted
    among the lines in their order. `check` receives the final answer: the text after the reasoning, stripped.
    """

    question: str
    answer: str  # a correct answer
    check: Check
    lead: str = ""
    lines: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    call: dict[str, Any] | None = None  # the call of one of the tools that is the answer
    thinking: bool | None = None  # None: the setting of the evaluation

    def text(self, kept: int, rng: Random) -> str:
        """The user's turn, with the first `kept` of the lines."""
        lines = self.lines[:kept]
        depths = sorted((rng.randrange(len(lines) + 1) for _ in self.facts), reverse=True)
        for depth, fact in zip(depths, reversed(self.facts), strict=True):
            lines.insert(depth, fact)
        body = "\n".join(([self.lead] if self.lead else []) + lines)
        return f"{body}\n\n{self.question}" if body else self.question


@dataclass(frozen=True)
class Draw:
    """The inputs of a task's function. `tokens`: the tokens available for prompt and answer; 0 for a task without a
    length."""

    index: int
    rng: Random
    tokenizer: PreTrainedTokenizerBase
    tokens: int

    def words(self, count: int) -> list[str]:
        """`count` distinct invented words."""
        words: dict[str, None] = {}
        while len(words) < count:
            words[phrases.word(self.rng)] = None
        return list(words)

    def numbers(self, count: int, digits: int = 5) -> list[str]:
        """`count` distinct numbers of `digits` digits."""
        return [str(number) for number in self.rng.sample(range(10 ** (digits - 1), 10**digits), count)]

    def library(self, tokens: int | None = None) -> list[str]:
        """Lines of library source, enough for `tokens` tokens (default: all available), without special tokens."""
        lines = library_lines(self.rng, "heldout", characters=5 * (self.tokens if tokens is None else tokens))
        special = special_tokens(self.tokenizer)
        return [line.rstrip() for line in lines if line.strip() and not special.search(line)]


@dataclass(frozen=True)
class Task:
    """A task. `rule`: which answers are correct, in words. `long`: whether the task runs at several lengths."""

    name: str
    make: Callable[[Draw], Problem]
    rule: str
    long: bool


TASKS: dict[str, Task] = {}


def task(rule: str, long: bool = True) -> Callable[[Callable[[Draw], Problem]], Callable[[Draw], Problem]]:
    """A decorator that registers a function as a task under the function's name."""

    def add(make: Callable[[Draw], Problem]) -> Callable[[Draw], Problem]:
        TASKS[make.__name__] = Task(make.__name__, make, rule, long)
        return make

    return add


# ---- rules


def bare(text: str) -> str:
    """The text without surrounding blanks, one pair of quotes, backticks or asterisks, and one final full stop."""
    text = text.strip().removesuffix(".").strip()
    for mark in ("**", '"', "'", "`"):
        if text.startswith(mark) and text.endswith(mark) and len(text) > 2 * len(mark):
            text = text[len(mark) : -len(mark)]
    return text.strip()


def exactly(answer: str) -> Check:
    return lambda text: bare(text) == answer


def all_of(answers: list[str]) -> Check:
    """A check for all of the answers, once each, in any order, separated by commas or line breaks."""
    return lambda text: sorted(map(bare, re.split(r"[,\n]+", bare(text)))) == sorted(answers)


def unfenced(text: str) -> str:
    """The text without a code fence around it and without blanks at the ends of lines."""
    fenced = re.fullmatch(r"```[^\n]*\n(.*)\n```", text.strip(), re.DOTALL)
    return "\n".join(line.rstrip() for line in (fenced[1] if fenced else text).strip().split("\n"))


# ---- tasks


@task("one line `word: value` for each word asked, in the order of the question")
def multi_query_recall(draw: Draw) -> Problem:
    """Pairs of a word and a value fill the length. The question asks for the values of four words."""
    words = draw.words(4 + draw.tokens // 5)
    pairs = [f"{word}: {phrases.value(draw.rng)}" for word in words]
    asked = pairs[:4]
    draw.rng.shuffle(asked)
    names = ", ".join(pair.partition(":")[0] for pair in asked)
    return Problem(
        question=f"What is the value of {names}? Answer with one line for each, as `word: value`.",
        answer="\n".join(asked),
        check=lambda text: [bare(line) for line in text.split("\n") if line.strip()] == asked,
        lead="Remember these pairs.",
        lines=pairs[4:],
        facts=draw.rng.sample(asked, len(asked)),
    )


@task("the number, and nothing else")
def needle_single(draw: Draw) -> Problem:
    """One fact is hidden in library source."""
    return _needle(draw, 1)


@task("the number, and nothing else")
def needle_multi_key(draw: Draw) -> Problem:
    """Eight facts of the same kind about different names. The question asks for one of them."""
    return _needle(draw, 8)


def _needle(draw: Draw, stated: int) -> Problem:
    names, numbers = [word.capitalize() for word in draw.words(stated)], draw.numbers(stated)
    asked = draw.rng.randrange(stated)
    return Problem(
        question=f"What is the secret code of {names[asked]}? Answer with the code alone.",
        answer=numbers[asked],
        check=exactly(numbers[asked]),
        lines=draw.library(),
        facts=[f"The secret code of {name} is {number}." for name, number in zip(names, numbers, strict=True)],
    )


@task("the four numbers, in any order, and nothing else")
def needle_multi_value(draw: Draw) -> Problem:
    """Four facts about one name. The question asks for all of them."""
    name, numbers = draw.words(1)[0].capitalize(), draw.numbers(4)
    return Problem(
        question=f"What are the four secret codes of {name}? Answer with the codes alone, separated by commas.",
        answer=", ".join(numbers),
        check=all_of(numbers),
        lines=draw.library(),
        facts=[f"A secret code of {name} is {number}." for number in numbers],
    )


@task("the names of the variables that hold the value, in any order, and nothing else")
def variable_tracking(draw: Draw) -> Problem:
    """Two interleaved chains of five assignments from variable to variable. The question is about one value."""
    names, numbers = [word.upper() for word in draw.words(10)], draw.numbers(2)
    chains = [names[:5], names[5:]]
    steps = [
        [f"VAR {name} = {before}" for name, before in zip(chain, [number, *(f"VAR {n}" for n in chain)], strict=False)]
        for chain, number in zip(chains, numbers, strict=True)
    ]
    order = draw.rng.sample([0] * 5 + [1] * 5, 10)
    return Problem(
        question=f"Which variables have the value {numbers[0]}, directly or through other variables? Answer with "
        "their names alone, separated by commas.",
        answer=", ".join(chains[0]),
        check=all_of(chains[0]),
        lines=draw.library(),
        facts=[steps[which].pop(0) for which in order],
    )


@task("the passage, line by line; blanks at the ends of lines do not count, nor does a code fence around it")
def long_copy(draw: Draw) -> Problem:
    """The model copies a passage of library source that is surrounded by other lines.

    The passage has a third of the length, at most `LONGEST_COPY` tokens.
    """
    room = min(LONGEST_COPY, draw.tokens // 3)
    passage = draw.library(room)
    passage = passage[: max(1, fitting(draw.tokenizer, passage, room))]
    text = "\n".join(passage).strip()
    return Problem(
        question="Copy the lines between <passage> and </passage> exactly, and write nothing else.",
        answer=text,
        check=lambda answer: unfenced(answer) == unfenced(text),
        lines=draw.library(),
        facts=[f"<passage>\n{text}\n</passage>"],
    )


@task("the number, and nothing else", long=False)
def arithmetic(draw: Draw) -> Problem:
    """A nested expression of one to four sums, differences and products. Thinking is on if the template supports it."""
    operations = 1 + draw.index % 4
    result = draw.rng.randrange(10, 1000)
    expression = str(result)
    for step in range(operations):
        sign = draw.rng.choice("+-*" if result else "+")
        other = draw.rng.randrange(2, 10) if sign == "*" else draw.rng.randrange(10, 1000)
        if sign == "-":
            other = draw.rng.randrange(1, result + 1)
        expression = f"({expression}) {sign} {other}" if step else f"{expression} {sign} {other}"
        result = {"+": result + other, "-": result - other, "*": result * other}[sign]
    question = f"What is {expression}? Answer with the number alone."
    return Problem(question, str(result), exactly(str(result)), thinking=True)


@task("exactly one call, as JSON or as the chat template writes it, with values of the schema's types", long=False)
def tool_schema(draw: Draw) -> Problem:
    """Four tools are offered. The request matches one of them and states a value for each of its parameters."""
    offered = [_tool(draw, name) for name in draw.words(4)]
    tool = draw.rng.choice(offered)
    properties = tool["parameters"]["properties"]
    arguments = {name: _value(draw, schema) for name, schema in properties.items()}
    stated_values = "; ".join(f"{name}: {_spoken(value)}" for name, value in arguments.items())
    call = {"name": tool["name"], "arguments": arguments}
    tools = [{"type": "function", "function": tool} for tool in offered]
    return Problem(
        question=f"{tool['description']} Use these values. {stated_values}.",
        answer=f"<tool_call>\n{json.dumps(call)}\n</tool_call>",
        check=lambda text: list(map(_typed, _calls(text, tools))) == [_typed(call)],
        tools=tools,
        call=call,
    )


_TYPES: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "integer"},
    {"type": "boolean"},
    {"type": "array", "items": {"type": "string"}},
    {"type": "string", "enum": ["low", "medium", "high"]},
]


def _tool(draw: Draw, noun: str) -> dict[str, Any]:
    verb = draw.rng.choice(["book", "send", "open", "update"])
    names = draw.words(draw.rng.randint(2, 4))
    properties = {name: draw.rng.choice(_TYPES) for name in names}
    schema = {"type": "object", "properties": properties, "required": names}
    return {"name": f"{verb}_{noun}", "description": f"{verb.capitalize()} the {noun}.", "parameters": schema}


def _value(draw: Draw, schema: dict[str, Any]) -> Any:
    if "enum" in schema:
        return draw.rng.choice(schema["enum"])
    kinds: dict[str, Callable[[], Any]] = {
        "string": lambda: phrases.word(draw.rng).capitalize(),
        "integer": lambda: draw.rng.randrange(1, 1000),
        "boolean": lambda: draw.rng.random() < 0.5,
        "array": lambda: [phrases.word(draw.rng) for _ in range(draw.rng.randint(1, 3))],
    }
    return kinds[schema["type"]]()


def _spoken(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


# Of Mistral, Granite and Phi-4, and Llama. Decoding usually leaves them out.
_CALL_MARKS = re.compile(r"^\s*(?:\[TOOL_CALLS\]|<\|tool_call\|>|<\|python_tag\|>)|<\|/tool_call\|>\s*$")


def _calls(text: str, tools: list[dict[str, Any]]) -> Iterator[Any]:
    """The calls in an answer: in <tool_call> blocks, or without a block the whole answer, which may be a list of calls
    and begin with the token that some templates write before calls."""
    text = _CALL_MARKS.sub("", text)
    blocks = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL) or [unfenced(text)]
    if "<tool_call>" in text and re.sub(r"<tool_call>.*?</tool_call>", "", text, flags=re.DOTALL).strip():
        blocks = [text]  # other text beside the calls, or an unfinished call
    for block in blocks:
        try:
            made = parse_call(block, tools)
        except (ValueError, RecursionError):
            made = None
        for call in made if isinstance(made, list) and made else [made]:
            if isinstance(call, dict):
                call.pop("id", None)  # which Mistral's format has
                if "parameters" in call and "arguments" not in call:
                    call["arguments"] = call.pop("parameters")  # the key in Llama's format
            yield call


def _typed(value: Any) -> str:
    """JSON text that is equal only for equal values of equal types. In Python, True == 1."""
    return json.dumps(value, sort_keys=True)


@task("the instruction is followed to the letter; a program checks it", long=False)
def instructions(draw: Draw) -> Problem:
    """An instruction about the form of the answer, which a program can check. There are six kinds."""
    return INSTRUCTIONS[draw.index % len(INSTRUCTIONS)](draw)


def _sorted_words(draw: Draw) -> Problem:
    words = draw.words(6)
    answer = ", ".join(sorted(words))
    listed = ", ".join(words)
    return Problem(
        f"Write these words in alphabetical order, separated by commas, and nothing else: {listed}",
        answer,
        lambda text: re.split(r",\s*", bare(text)) == sorted(words),
    )


def _capitals(draw: Draw) -> Problem:
    answer = " ".join(draw.words(7))
    question = f"Write this in capital letters, and nothing else: {answer}"
    return Problem(question, answer.upper(), exactly(answer.upper()))


def _backwards(draw: Draw) -> Problem:
    words = draw.words(6)
    answer = " ".join(reversed(words))
    question = f"Write these words in the opposite order, with blanks between, and nothing else: {' '.join(words)}"
    return Problem(question, answer, exactly(answer))


def _repeated(draw: Draw) -> Problem:
    word, times = draw.words(1)[0], draw.rng.randint(4, 12)
    answer = " ".join([word] * times)
    question = f"Write the word {word} exactly {times} times, with blanks between, and nothing else."
    return Problem(question, answer, exactly(answer))


def _object(draw: Draw) -> Problem:
    values = dict(zip(draw.words(3), map(int, draw.numbers(3, 3)), strict=True))
    listed = ", ".join(f"{name} is {value}" for name, value in values.items())
    question = f"Write one JSON object, and nothing else, with three keys and their numbers: {listed}."

    def check(text: str) -> bool:
        try:
            return _typed(json.loads(unfenced(text))) == _typed(values)
        except (ValueError, RecursionError):
            return False

    return Problem(question, json.dumps(values), check)


def _marked_lines(draw: Draw) -> Problem:
    words = draw.words(3)
    count, word = draw.rng.randint(3, 6), words[0]
    question = (
        f"Write exactly {count} lines, and nothing else. Each line begins with a hyphen and a blank, holds the word "
        f"{word}, and has at least three words. Use no comma."
    )

    def check(text: str) -> bool:
        lines = text.split("\n")
        marked = all(line.startswith("- ") and len(line[2:].split()) >= 3 for line in lines)
        held = all(re.search(rf"\b{word}\b", line) for line in lines)
        return len(lines) == count and marked and held and "," not in text

    return Problem(question, "\n".join([f"- {' '.join(words)}"] * count), check)


INSTRUCTIONS = [_sorted_words, _capitals, _backwards, _repeated, _object, _marked_lines]
