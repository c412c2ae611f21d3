# SPDX-License-Identifier: Apache-2.0
"""Rendering conversations with a tokenizer's chat template, and checking that it writes all of them.

A template can silently omit anything: a role that it does not know, a key, a part of a content. Every conversation is
therefore also rendered with a marker in place of each of its texts. The markers show which texts are written, how often
and in which order, even if texts are short or equal. This depends only on the structure of a conversation, and is
cached. The rendered text itself must then contain the texts in the same order.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from hmf.data import rendering
from hmf.data.conversation import REASONING_FIELDS, RESULT_ROLES, ROLES, SCHEMAS, Message, strings_of
from hmf.data.forms import NUMBER, PART, SPELLED, Form, spelled
from hmf.data.marked import TOOLS, Leaf, MarkedConversation
from hmf.errors import HmfError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A list of parts in the notation of Python or JSON, and an object that was encoded as JSON twice.
_NOTATION = re.compile(r"""['"](?:text|thinking)['"]: ?['"]\ue000|\\": ?(?:9173\d{9}|\\"\ue000)""")
_PYTHON = "(?:'\ue000|9173\\d{9}|None|True|False|\\[)"  # follows the name of an argument in Python's notation
_BRACES = re.compile(r"\{\s*\{")  # an object as text, in braces of the template
_LITERALS, _PYTHON_LITERALS = re.compile(r"\b(?:null|true|false)\b"), re.compile(r"\b(?:None|True|False)\b")
_NOT_JSON = (
    "the chat template writes contents or arguments in Python's notation, or encodes them as JSON twice; use another "
    "template"
)
_CODE = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
# Names that are set from the conversation, or have another meaning in a template or in transformers.
_NOT_VARIABLES = frozenset(
    ("messages", "conversations", "tools", "chat_template", "add_generation_prompt")
    + ("continue_final_message", "return_assistant_tokens_mask", "self")
)
_ID = "m4rk3dId9"  # of a length that Mistral's templates accept
_TAG = re.compile(r"\s*(<[^<>\s]+>)")
_TAGGED = re.compile(r"\s*(<([^<>/\s]+)>)\s*(.*?)\s*</\2>\s*", re.DOTALL)
_CACHE_SIZE = 1024  # structures of conversations that are cached for each template


class _Failure(HmfError):
    """A template fails on a conversation, other than by `raise_exception`."""


class _Limit(HmfError):
    """A template needs too much time or memory. No other form is tried."""


class Template:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str):
        self.tokenizer = tokenizer
        # vLLM's rule: messages of the developer become system messages if the template does not know the role.
        self.developers = ("developer", "system") if "developer" in source else ("system",)
        self.place = _place(tokenizer)
        self.forms: dict[Any, Form] = {}
        self.orders: dict[Any, tuple[int, ...]] = {}
        self.turns: dict[Any, list[set[int]]] = {}  # of hmf.data.marks

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> Template:
        """HmfError for a tokenizer without a chat template."""
        if not (source := tokenizer.chat_template):
            raise HmfError(
                f"{_place(tokenizer)}the tokenizer has no chat template; use the tokenizer of an instruction model, or "
                "add a template"
            )
        return _template(tokenizer, source if isinstance(source, str) else json.dumps(source))

    def marks_turns(self, tools: list[Any] | None) -> bool:
        """Whether the template marks the assistant's turns with {% generation %}."""
        return bool(_GENERATION.search(self._source(tools)))

    def _source(self, tools: list[Any] | None) -> str:
        try:
            return self.tokenizer.get_chat_template(tools=tools)
        except ValueError:
            names = ", ".join(map(repr, self.tokenizer.chat_template))
            raise HmfError(
                f"{self.place}the tokenizer has several chat templates ({names}), none of them named 'default'; "
                "name one of them default"
            ) from None

    def render(self, messages: list[Message], tools: list[Any] | None = None, **options: Any) -> str:
        """The rendered text; `options` are variables of the template.

        Raises:
            HmfError: the template fails, or writes an empty prompt.
        """
        text, _ = self._run(messages, tools, options)
        if not text and options.get("add_generation_prompt"):
            raise HmfError(f"{self.place}the chat template writes nothing; use one that writes the messages")
        return text

    def render_marked(
        self, messages: list[Message], tools: list[Any] | None = None, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and the (start, end) of the parts that {% generation %} marks."""
        return self._run(messages, tools, options | {"return_assistant_tokens_mask": True})

    def _run(self, messages: list[Message], tools: list[Any] | None, options: Any) -> tuple[str, list[tuple[int, int]]]:
        source = self._source(tools)
        variables = {**self.tokenizer.special_tokens_map, **options}
        try:
            return rendering.render(messages=messages, tools=tools, chat_template=source, **variables)
        except rendering.RenderLimit as error:
            raise _Limit(f"{self.place}the chat template exceeds a limit: {error}; fix the template") from None
        except rendering.RenderError as error:
            if error.refused:
                raise HmfError(f"the chat template fails: {error}") from None
            raise _Failure(f"{self.place}the chat template fails: {error}") from None

    def read(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        answers: dict[int, bool],
        variables: dict[str, Any],
    ) -> MarkedConversation:
        """The conversation in the first form of which the template writes everything.

        Args:
            answers: by index of the turns that must be written in full, whether thinking is enabled for them.
            variables: further variables of the template.
        Raises:
            HmfError: there is no such form. The message names what the template omits, of the first form on which it
                does not fail.
        """
        try:
            return self._read(messages, tools, answers, variables)
        except HmfError as error:
            if isinstance(error, _Limit) or not tools or all("function" in tool for tool in tools):
                raise
            # Tools without the key `function`, as some data sets have them, for a template that reads this key.
            wrapped = [tool if "function" in tool else _wrapped(tool) for tool in tools]
            with suppress(HmfError):
                return self._read(messages, wrapped, answers, variables)
            raise

    def _read(
        self, messages: list[Message], tools: list[Any] | None, answers: dict[int, bool], variables: dict[str, Any]
    ) -> MarkedConversation:
        conversation = MarkedConversation(messages, tools, variables)
        key = (conversation.structure, *answers.items())
        refusals: list[HmfError] = []
        for form in [self.forms[key]] if key in self.forms else self._candidates(messages):
            conversation.use(form)
            try:
                for index, thinking in answers.items():
                    self.order(conversation, index, thinking)
            except _Limit:
                raise
            except HmfError as error:
                refusals.append(error)
                continue
            keep(self.forms, key, form)
            inside = self._untagged(conversation, max(answers), answers[max(answers)])
            return conversation if inside == messages else self._read(inside, tools, answers, variables)
        raise next((error for error in refusals if not isinstance(error, _Failure)), refusals[0])

    def require_variables(self, variables: dict[str, Any], tools: list[Any] | None) -> None:
        """HmfError for a variable that the template does not read, or that is not one."""
        code = " ".join(_CODE.findall(self._source(tools))) if variables else ""
        for name, value in variables.items():
            if name in _NOT_VARIABLES:
                raise HmfError(f"chat_template_kwargs.{name}: is not a variable to set; remove it")
            if name == "enable_thinking" and not isinstance(value, bool):
                raise HmfError(f"chat_template_kwargs.{name}: is {value!r}; write true or false")
            if not re.search(rf"\b{re.escape(name)}\b", code):
                raise HmfError(
                    f"chat_template_kwargs.{name}: the chat template does not read it; remove it (ignore_fields: "
                    "[chat_template_kwargs] leaves those of the rows out), or use a tokenizer whose template reads it"
                )

    def _marked_text(self, conversation: MarkedConversation, messages: list[Message], last: int, thinking: bool) -> str:
        """The rendered text of a marked copy of the messages up to `last`."""
        variables = conversation.variables
        return self.render(messages[: last + 1], conversation.marked_tools, enable_thinking=thinking, **variables)

    def _untagged(self, conversation: MarkedConversation, last: int, thinking: bool) -> list[Message]:
        """The messages, where results in tags that the template itself writes around results are without them."""
        tagged = {
            index: match
            for index, message in enumerate(conversation.original)
            if message["role"] in RESULT_ROLES
            and isinstance(content := message["content"], str)
            and (match := _TAGGED.fullmatch(content))
        }
        if not tagged:
            return conversation.original
        text = self._marked_text(conversation, conversation.marked, last, thinking)
        written = ((place, conversation.leaves[number]) for place, number in conversation.written(text))
        starts = {leaf.message: place for place, leaf in written if leaf.what == "content"}
        made = list(conversation.original)
        for index, match in tagged.items():
            if index in starts and text[: starts[index]].rstrip().endswith(match[1]):
                made[index] = made[index] | {"content": match[3]}
        return made

    def _candidates(self, messages: list[Message]) -> Iterator[Form]:
        """The default form, then those that differ from it for these messages."""
        lists = any(isinstance(message["content"], list) for message in messages)
        calls = any("tool_calls" in message for message in messages)
        literals = any(spelled(message) != message for message in messages)
        thoughts = any(name in message for message in messages for name in REASONING_FIELDS)
        choices: list[tuple[Any, ...]] = [
            ("unchanged", "joined", "parts") if lists else ("unchanged", "parts"),
            ("", None) if calls else ("",),
            (dict, str) if calls else (dict,),
            (False, True) if literals else (False,),
            (None, *REASONING_FIELDS, PART) if thoughts else (None,),
            self.developers if any(message["role"] == "developer" for message in messages) else ("system",),
        ]
        return itertools.starmap(Form, itertools.product(*choices))

    def order(self, conversation: MarkedConversation, last: int, thinking: bool) -> tuple[int, ...]:
        """Numbers of the leaves of the messages up to `last`, in the order in which the template writes them.

        Raises:
            HmfError: a leaf is omitted (except thinking before the last message, which many templates remove); the
                content of an answer is written twice; or messages are written in another order.
        """
        key = ("".join(conversation.structures[: last + 1]), conversation.context, thinking)
        if key in self.orders:
            return self.orders[key]
        text = self._marked_text(conversation, conversation.marked, last, thinking)
        names = [re.escape(repr(leaf.value)) for leaf in conversation.names if 0 <= leaf.message <= last]
        in_braces = conversation.form.arguments is str and _BRACES.search(text)
        if in_braces or _NOTATION.search(text) or (names and re.search(f"(?:{'|'.join(names)}): {_PYTHON}", text)):
            raise HmfError(_NOT_JSON)
        numbers = Counter(number for _, number in conversation.written(text))
        for number, leaf in enumerate(conversation.leaves):
            if leaf.message > last:
                break
            if number not in numbers and (leaf.what != "thinking" or leaf.message == last):
                raise self._lost(conversation, leaf)
            answer = leaf.message >= 0 and conversation.original[leaf.message]["role"] == "assistant"
            if answer and leaf.what == "content" and numbers[number] > 1:
                raise HmfError(
                    f"messages[{leaf.message}].{leaf.path}: the chat template writes it more than once; use another "
                    "template"
                )
        for marker, leaf in conversation.properties.items():
            if marker not in text:
                raise self._lost(conversation, leaf)
        self._require_ids(conversation, last, thinking, text)
        if any(message <= last for message in conversation.literals):
            self._require_literals(conversation, last, thinking, text)
        # A template may move the system's message, for example to the turn before the answer.
        written = [
            conversation.leaves[number].message for number in numbers if conversation.leaves[number].what == "content"
        ]
        turns = [index for index in written if conversation.original[index]["role"] not in ("system", "developer")]
        for before, after in itertools.pairwise(turns):
            if after < before:
                raise HmfError(
                    f"messages[{after}]: the chat template writes it after messages[{before}]; use another template"
                )
        keep(self.orders, key, tuple(numbers))
        return self.orders[key]

    def _require_ids(self, conversation: MarkedConversation, last: int, thinking: bool, text: str) -> None:
        """HmfError if the template writes the id of a call or result that has none, and so an empty one, in `text`."""
        messages = conversation.marked[: last + 1]
        identified = [_identified(message) for message in messages]
        if identified == messages:
            return
        try:
            written = self._marked_text(conversation, identified, last, thinking)
        except HmfError:
            return
        if _ID in written and written.replace(_ID, "") == text:
            number = next(n for n, message in enumerate(messages) if message != identified[n])
            raise HmfError(
                f"messages[{number}]: a call or result has no id, but the chat template writes it; add id to "
                "tool_calls, and tool_call_id to their results"
            )

    def _require_literals(self, conversation: MarkedConversation, last: int, thinking: bool, text: str) -> None:
        """HmfError unless `text`, rendered from the marked messages, has null, true and false in arguments as JSON."""
        without = self._marked_text(conversation, conversation.spelled, last, thinking)
        # All else is the same in both texts.
        json_, python = (
            len(words.findall(text)) - len(words.findall(without)) for words in (_LITERALS, _PYTHON_LITERALS)
        )
        if conversation.form.literals and not python:
            # JSON's literals may be passed as text only if the template writes a text as it writes a number: unquoted.
            numbers = self._marked_text(conversation, conversation.numbered, last, thinking)
            python = int(numbers.replace(str(NUMBER), SPELLED[0]) != without)
        if python:
            raise HmfError(_NOT_JSON)
        expected = sum(map(without.count, SPELLED))
        if json_ != expected or expected < sum(message <= last for message in conversation.literals):
            message = conversation.literals[0]
            raise self._lost(conversation, Leaf(message, "tool calls", "an argument that is null, true or false", ""))

    def check(self, conversation: MarkedConversation, last: int, thinking: bool, text: str, turn: int = 0) -> None:
        """HmfError if `text`, rendered from the messages up to `last`, omits any of their contents.

        Args:
            turn: position where the text of the last message starts; 0 if it is not known.
        """
        place, reached_last = 0, False
        for number in self.order(conversation, last, thinking):
            leaf = conversation.leaves[number]
            if leaf.message == last and not reached_last:
                place, reached_last = max(place, turn), True
            if (found := _find(text, leaf.value, place)) is not None:
                start, end = found
                if leaf.what == "content" and (tag := _opening(leaf.value, text[place:start])):
                    raise HmfError(
                        f"messages[{leaf.message}].{leaf.path}: begins with {tag}, which the chat template writes "
                        "before it; remove the tags around the text"
                    )
                place = end
            elif leaf.what != "thinking" or leaf.message == last:
                raise self._lost(conversation, leaf)
        for value in strings_of(conversation.variables):
            if len(value.split()) > 1 and _find(text, value, 0) is None:  # one word may choose a branch of the template
                raise HmfError(
                    f"chat_template_kwargs: the chat template leaves {value[:40]!r} out; remove it, or use a tokenizer "
                    "whose template writes it"
                )
        for leaf in conversation.names:
            if leaf.message <= last and _find(text, leaf.value, 0) is None:
                raise self._lost(conversation, leaf)

    def stripped(self, conversation: MarkedConversation, last: int, thinking: bool, answers: list[int]) -> list[int]:
        """Those of `answers` before `last` whose thinking the template leaves out, once there is a later turn."""
        written = {*self.order(conversation, last, thinking)}
        lost = {leaf.message for number, leaf in enumerate(conversation.leaves) if number not in written}
        return [index for index in answers if index in lost and index != last]

    def _lost(self, conversation: MarkedConversation, leaf: Leaf) -> HmfError:
        if leaf.message == TOOLS:
            return HmfError(
                f"the chat template leaves tools out ({leaf.path}); use a tokenizer whose template writes them"
            )
        role = conversation.original[leaf.message]["role"]
        fix = {"thinking": "set thinking: strip, or ", "name": "add name to ignore_keys, or "}.get(leaf.what, "")
        if role not in ROLES:
            fix = f"write a role that it knows, such as {', '.join(ROLES)}, or "
        return HmfError(
            f"messages[{leaf.message}]: the chat template leaves its {leaf.what} out ({leaf.path}, of role {role!r}); "
            f"{fix}use a tokenizer whose template writes {leaf.what}"
        )


def _identified(message: Message) -> Message:
    """The message with an id for its calls, or of its call, if it has none."""
    if calls := message.get("tool_calls"):
        return message | {"tool_calls": [{"id": _ID} | call for call in calls]}
    return {"tool_call_id": _ID} | message if message["role"] in RESULT_ROLES else message


def _wrapped(tool: Message) -> Message:
    function = {"parameters" if key in SCHEMAS else key: tool[key] for key in tool if key != "type"}
    return {"type": "function", "function": function}


@functools.lru_cache(maxsize=8)
def _template(tokenizer: PreTrainedTokenizerBase, source: str) -> Template:
    return Template(tokenizer, source)


def _place(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{tokenizer.name_or_path}: " if tokenizer.name_or_path else ""


def keep(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= _CACHE_SIZE:
        cache.clear()
    cache[key] = value


def _find(text: str, value: str | int | float, start: int) -> tuple[int, int] | None:
    """Start and end of the first occurrence of a leaf from `start` on, as plain text or in JSON's or Python's
    notation."""
    for notation in _notations(value):
        if (place := text.find(notation, start)) >= 0:
            return place, place + len(notation)
    return None


def _opening(value: str | int | float, before: str) -> str | None:
    """The tag, such as <tool_response>, with which a text begins and the template's own text before it ends."""
    match = _TAG.match(value) if isinstance(value, str) else None
    return match[1] if match and before.rstrip().endswith(match[1]) else None


def _notations(value: str | int | float) -> Iterator[str]:
    if not isinstance(value, str):
        yield from (json.dumps(value), str(value))
        return
    yield value.strip()
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield json.dumps(value)[1:-1]
    yield repr(value)[1:-1]
