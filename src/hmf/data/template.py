# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer's chat template makes of a conversation, and whether it writes all of it.

A template can leave out anything without an error: a role that it does not know, a key, a part of a content. So every
conversation is also rendered with a marker in the place of each of its texts: the markers show which of them are
written, how often and in which order, however short or common the texts are. What the markers show depends only on the
shape of a conversation and is kept. The text itself must then hold the texts in that order.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hmf.data import rendering
from hmf.data.conversation import REASONING_FIELDS, RESULT_ROLES, ROLES, THINK_BLOCK, Message, untagged
from hmf.errors import HmfError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKER = re.compile("\ue000(\\d+)\ue001|9173(\\d{9})")  # in the place of a text, or of a number
# A list of parts as Python or JSON write it, and an object in JSON text that was encoded once more.
_NOTATION = re.compile(r"""['"]text['"]: ?['"]\ue000|\\": ?(?:9173\d{9}|\\"\ue000)""")
_PYTHON = "(?:'\ue000|9173\\d{9}|None|True|False|\\[)"  # after the name of an argument in Python's quotes
_SHAPES = 1024  # how many are kept for each template
_TOOLS = -1  # in the place of a message's index


@dataclass(frozen=True)
class Leaf:
    """A text or number of a conversation that the model is to see, and where it stands."""

    message: int
    what: str
    path: str
    value: str | int | float


@dataclass(frozen=True)
class Form:
    """How a conversation is given to a template: what the OpenAI format leaves open is what the template reads."""

    contents: str = "given"  # lists as they are; "joined": text; "parts": all as lists
    no_content: str | None = ""  # in messages with calls
    arguments: type = dict  # or str: JSON text
    reasoning: str | None = None  # name of the field; None: as given
    developer: str = "system"  # the role of developer's messages

    def apply(self, messages: list[Message]) -> list[Message]:
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Message:
        made = {key: value for key, value in message.items() if key != "weight"}
        content = made["content"]
        if self.contents == "joined" and isinstance(content, list):
            made["content"] = "\n".join(part["text"] for part in content)  # as vLLM joins them
        elif self.contents == "parts" and isinstance(content, str) and content:
            made["content"] = [{"type": "text", "text": content}]
        if calls := made.get("tool_calls"):
            made["content"] = made["content"] or self.no_content
            if self.arguments is str:
                made["tool_calls"] = [
                    call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
                    for call in calls
                    for function in [call["function"]]
                ]
        if self.reasoning:
            for name in REASONING_FIELDS:
                if name in made:
                    made[self.reasoning] = made.pop(name)
        if made["role"] == "developer":
            made["role"] = self.developer
        return made


class Talk:
    """A conversation, and the same with markers in the place of its leaves.

    Attributes:
        messages, marked: in the form that the template reads, once `read` has found it.
        leaves: what the markers stand for, by their numbers.
        names: of arguments and of tools' properties; not marked, since templates may look for them.
    """

    def __init__(self, messages: list[Message], tools: list[Any] | None):
        self.given, self.tools = messages, tools
        self.leaves: list[Leaf] = []
        self.names: list[Leaf] = []
        self.marked_tools = [self._tool(tool, number) for number, tool in enumerate(tools)] if tools else None
        self._marked = [self._message(message, number) for number, message in enumerate(messages)]
        self.shape = repr((self._marked, self.marked_tools))

    def take(self, form: Form) -> None:
        self.messages, self.marked = form.apply(self.given), form.apply(self._marked)
        self.shapes = [repr(message) for message in self.marked]

    def _mark(self, value: Any, message: int, what: str, path: str) -> Any:
        """A value with markers in the place of its texts and numbers."""
        match value:
            case dict():
                self.names += [Leaf(message, what, path, name) for name in value]
                return {name: self._mark(item, message, what, f"{path}.{name}") for name, item in value.items()}
            case list():
                return [self._mark(item, message, what, f"{path}[{number}]") for number, item in enumerate(value)]
            case bool() | None:
                return value
            case str() if not value.strip():
                return value
        self.leaves.append(Leaf(message, what, path, value))
        number = len(self.leaves) - 1
        return f"\ue000{number}\ue001" if isinstance(value, str) else int(f"9173{number:09d}")

    def _message(self, message: Message, index: int) -> Message:
        made = dict(message)
        for key in REASONING_FIELDS:
            if key in message:
                made[key] = self._thought(message[key], index, key)
        # A result's name that is its call's does not have to be there again.
        if "name" in message and not (message["role"] in RESULT_ROLES and self._is_called(message["name"], index)):
            made["name"] = self._mark(message["name"], index, "name", "name")
        parts = message["content"]
        if isinstance(parts, list):
            made["content"] = [
                part | {"text": self._content(part["text"], index, f"content[{number}].text", number == 0)}
                for number, part in enumerate(parts)
            ]
        else:
            made["content"] = self._content(parts, index, "content", True)
        if calls := message.get("tool_calls"):
            made["tool_calls"] = []
            for number, call in enumerate(calls):
                path, function = f"tool_calls[{number}].function", call["function"]
                name = self._mark(function["name"], index, "tool calls", f"{path}.name")
                arguments = self._mark(function["arguments"], index, "tool calls", f"{path}.arguments")
                made["tool_calls"].append(call | {"function": {"name": name, "arguments": arguments}})
        return made

    def _content(self, text: str, index: int, path: str, first: bool) -> str:
        thought = THINK_BLOCK.match(text) if first and self.given[index]["role"] == "assistant" else None
        if thought is None:
            return self._mark(text, index, "content", path)
        return self._thought(thought[0], index, path) + self._mark(text[thought.end() :], index, "content", path)

    def _thought(self, text: str, index: int, path: str) -> str:
        """Thinking with its tags as they are: templates look for them."""
        inside = untagged(text.strip())
        return text.replace(inside, self._mark(inside, index, "thinking", path), 1) if inside else text

    def _is_called(self, name: str, before: int) -> bool:
        calls = (call for message in self.given[:before] for call in message.get("tool_calls", ()))
        return any(call["function"]["name"] == name for call in calls)

    def _tool(self, tool: Message, index: int) -> Message:
        """A tool with its name and description marked; how its schema is written is up to the template."""
        function = tool.get("function") or tool
        schema = function.get("parameters")
        properties = schema.get("properties") if isinstance(schema, dict) else None
        if isinstance(properties, dict):
            self.names += [Leaf(_TOOLS, "tools", function["name"], name) for name in properties]
        made = dict(function)
        for key in ("name", "description"):
            if isinstance(function.get(key), str):
                made[key] = self._mark(function[key], _TOOLS, "tools", function["name"])
        return tool | {"function": made} if tool.get("function") else made


class _Failure(HmfError):
    """A template does not get through a conversation, and is not one that refuses it in its own words."""


class _Limit(HmfError):
    """A template takes too much time or memory; it is not asked for another form."""


class Template:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str):
        self.tokenizer = tokenizer
        # The rule by which vLLM takes a developer's message for the system's.
        self.developers = ("developer", "system") if "developer" in source else ("system",)
        self.place = f"{tokenizer.name_or_path}: " if tokenizer.name_or_path else ""
        self.forms: dict[Any, Form] = {}
        self.orders: dict[Any, tuple[int, ...]] = {}

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> Template:
        """HmfError for a tokenizer without a chat template."""
        if not (source := tokenizer.chat_template):
            raise HmfError("the tokenizer has no chat template; take an instruction model's, or give it one")
        return _template(tokenizer, source if isinstance(source, str) else json.dumps(source))

    def marks_turns(self, tools: list[Any] | None) -> bool:
        return bool(_GENERATION.search(self.tokenizer.get_chat_template(tools=tools)))

    def render(self, messages: list[Message], tools: list[Any] | None = None, **options: Any) -> str:
        """The template's text; `options` are variables of the template. HmfError also for a prompt without any text."""
        text, _ = self._run(messages, tools, options)
        if not text and options.get("add_generation_prompt"):
            raise HmfError(f"{self.place}the chat template writes nothing; take one that writes the messages")
        return text

    def render_marked(
        self, messages: list[Message], tools: list[Any] | None = None, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The template's text, and where the parts of it that {% generation %} marks start and end."""
        return self._run(messages, tools, options | {"return_assistant_tokens_mask": True})

    def _run(self, messages: list[Message], tools: list[Any] | None, options: Any) -> tuple[str, list[tuple[int, int]]]:
        chosen = self.tokenizer.get_chat_template(tools=tools)
        given = {**self.tokenizer.special_tokens_map, **options}
        try:
            return rendering.render(messages=messages, tools=tools, chat_template=chosen, **given)
        except rendering.RenderLimit as error:
            raise _Limit(f"{self.place}the chat template does not end well: {error}; fix it") from None
        except rendering.RenderError as error:
            if error.refused:
                raise HmfError(f"the chat template fails: {error}") from None
            raise _Failure(f"{self.place}the chat template fails: {error}") from None

    def read(self, messages: list[Message], tools: list[Any] | None, answers: dict[int, bool]) -> Talk:
        """A conversation in the first form of which the template writes everything.

        Args:
            answers: the turns that are to be written in full, and whether the template is to enable thinking.
        Raises:
            HmfError: there is no such form; of the first that the template does not fail on, what it leaves out.
        """
        talk = Talk(messages, tools)
        key = (talk.shape, *answers.items())
        refusals: list[HmfError] = []
        for form in [self.forms[key]] if key in self.forms else self._candidates(messages):
            talk.take(form)
            try:
                for index, thinking in answers.items():
                    self.order(talk, index, thinking)
            except _Limit:
                raise
            except HmfError as error:
                refusals.append(error)
                continue
            _keep(self.forms, key, form)
            return talk
        raise next((error for error in refusals if not isinstance(error, _Failure)), refusals[0])

    def _candidates(self, messages: list[Message]) -> Iterator[Form]:
        """The usual form, then those that differ in what these messages have."""
        lists = any(isinstance(message["content"], list) for message in messages)
        calls = any("tool_calls" in message for message in messages)
        thoughts = any(name in message for message in messages for name in REASONING_FIELDS)
        choices: list[tuple[Any, ...]] = [
            ("given", "joined", "parts") if lists else ("given", "parts"),
            ("", None) if calls else ("",),
            (dict, str) if calls else (dict,),
            (None, *REASONING_FIELDS) if thoughts else (None,),
            self.developers if any(message["role"] == "developer" for message in messages) else ("system",),
        ]
        return itertools.starmap(Form, itertools.product(*choices))

    def order(self, talk: Talk, last: int, thinking: bool) -> tuple[int, ...]:
        """Numbers of the leaves in the order in which the template writes them, of the messages up to `last`.

        Raises:
            HmfError: a leaf is not written, but for thinking before the last message, which many templates take out;
                an answer's is written twice; messages are written in another order.
        """
        key = ("".join(talk.shapes[: last + 1]), repr(talk.marked_tools), thinking)
        if key in self.orders:
            return self.orders[key]
        text = self.render(talk.marked[: last + 1], talk.marked_tools, enable_thinking=thinking)
        names = [re.escape(repr(leaf.value)) for leaf in talk.names if 0 <= leaf.message <= last]
        if _NOTATION.search(text) or (names and re.search(f"(?:{'|'.join(names)}): {_PYTHON}", text)):
            raise HmfError("the chat template writes contents or arguments as Python does, or encodes them twice")
        numbers = Counter(int(found[1] or found[2]) for found in _MARKER.finditer(text))
        for number, leaf in enumerate(talk.leaves):
            if leaf.message > last:
                break
            if number not in numbers and (leaf.what != "thinking" or leaf.message == last):
                raise self._lost(talk, leaf)
            answer = leaf.message >= 0 and talk.given[leaf.message]["role"] == "assistant"
            if answer and leaf.what == "content" and numbers[number] > 1:
                raise HmfError(f"messages[{leaf.message}].{leaf.path}: the chat template writes it more than once")
        # A template may move what the system says, to the turn before the answer for instance.
        found = [talk.leaves[number].message for number in numbers if talk.leaves[number].what == "content"]
        turns = [index for index in found if talk.given[index]["role"] not in ("system", "developer")]
        for before, after in itertools.pairwise(turns):
            if after < before:
                raise HmfError(f"messages[{after}]: the chat template writes it after messages[{before}]")
        _keep(self.orders, key, tuple(numbers))
        return self.orders[key]

    def check(self, talk: Talk, last: int, thinking: bool, text: str, turn: int = 0) -> None:
        """HmfError when `text`, what the template makes of the messages up to `last`, lacks any of what they hold.

        Args:
            turn: where the last message's text starts; 0 where that is not known.
        """
        place, begun = 0, False
        for number in self.order(talk, last, thinking):
            leaf = talk.leaves[number]
            if leaf.message == last and not begun:
                place, begun = max(place, turn), True
            if (found := _find(text, leaf.value, place)) is not None:
                place = found
            elif leaf.what != "thinking" or leaf.message == last:
                raise self._lost(talk, leaf)
        for leaf in talk.names:
            if leaf.message <= last and _find(text, leaf.value, 0) is None:
                raise self._lost(talk, leaf)

    def _lost(self, talk: Talk, leaf: Leaf) -> HmfError:
        if leaf.message == _TOOLS:
            return HmfError(
                f"the chat template leaves tools out ({leaf.path}); take a tokenizer whose template writes them"
            )
        role = talk.given[leaf.message]["role"]
        fix = {"thinking": "set thinking: strip, or ", "name": "put name into ignore_keys, or "}.get(leaf.what, "")
        if role not in ROLES:
            fix = f"write a role that it knows, such as {', '.join(ROLES)}, or "
        return HmfError(
            f"messages[{leaf.message}]: the chat template leaves its {leaf.what} out ({leaf.path}, of role {role!r}); "
            f"{fix}take a tokenizer whose template writes {leaf.what}"
        )


@functools.lru_cache(maxsize=8)
def _template(tokenizer: PreTrainedTokenizerBase, source: str) -> Template:
    return Template(tokenizer, source)


def _keep(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= _SHAPES:
        cache.clear()
    cache[key] = value


def _find(text: str, value: str | int | float, start: int) -> int | None:
    """Where a leaf ends that stands at `start` or later: as it is, or as JSON or Python write a string."""
    for written in _writings(value):
        if (place := text.find(written, start)) >= 0:
            return place + len(written)
    return None


def _writings(value: str | int | float) -> Iterator[str]:
    if not isinstance(value, str):
        yield from (json.dumps(value), str(value))
        return
    yield value.strip()
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield json.dumps(value)[1:-1]
    yield repr(value)[1:-1]
