# SPDX-License-Identifier: Apache-2.0
"""Fields of a row that a format does not read. Those that are not only facts about the row are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from hmf.config.data import SourceSettings
from hmf.config.places import PlaceSettings
from hmf.config.strict import parse_json
from hmf.errors import HmfError

VARIABLES = "chat_template_kwargs"  # name of the field with variables of the chat template
EMPTY: tuple[Any, ...] = (None, "", [], {})  # values of a field that count as no value
# Fields, however their words are capitalised and joined, that belong to the conversation in one of the common formats.
# Other fields (id, source, score ...) are facts about the row; their names are counted.
_CONVERSATION = (
    "system",
    "system_prompt",
    "sys_prompt",
    "system_message",
    "system_msg",
    "system_instruction",
    "system_instructions",
    "developer",
    "context",
    "contexts",
    "instruction",
    "instructions",
    "input",
    "history",
    "messages",
    "tools",
    "functions",
    "function_call",
    "tool_choice",
    "tool_calls",
    "parallel_tool_calls",
    "documents",
    "attachments",
    "images",
    "image",
    "image_url",
    "image_urls",
    "image_path",
    "videos",
    "video",
    "audios",
    "audio",
    "reasoning",
    "reasoning_content",
    "thinking",
    "chat_template_kwargs",
    "enable_thinking",
)
# Fields that may hold the answer to the last message, if that is not the assistant's.
_ANSWERS = ("answer", "answers", "chosen", "completion", "output", "reply", "response", "responses", "target")
_WANTED = ("label", "kto_tag")  # fields with which KTO marks an unwanted answer, if they are false
# A field may say whether, or how much, a row or its messages are supervised, if its name has one of the first words and
# otherwise only these.
_SUPERVISION = {"mask", "masks", "train", "trainable", "weight", "weights"}
_OF = "answer assistant do example for is label labels loss message messages on row sample token tokens turn turns"
_SUPERVISED = {*_SUPERVISION, *_OF.split()}


def unread_fields(
    row: dict[str, Any], used: Iterable[str], settings: PlaceSettings, messages: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The fields with a value that are not used.

    Args:
        messages: those of a conversation; none for pairs and texts.
    Raises:
        HmfError: a field is not only a fact about the row.
    """
    passed = {*used} if _of_text(settings) else {*used, settings.tools_field, VARIABLES}
    unread = {name: value for name, value in row.items() if name not in passed and value not in EMPTY}
    for name, value in unread.items():
        if problem := _problem(name, value, messages, settings):
            raise HmfError(f"field {name!r} {problem}, or add it to {settings.key}.ignore_fields")
    return unread


def _problem(name: str, value: Any, messages: Sequence[dict[str, Any]], settings: PlaceSettings) -> str | None:
    words = _words(name)
    has_tools = _holds_tools(value, named=not {"tools", "functions"}.isdisjoint(words))
    if _of_text(settings) and (has_tools or "".join(words) in _JOINED):
        return "belongs to a conversation but is not read; set messages_field or shape, move it into the text"
    if has_tools:
        return f"belongs to the conversation but is not read; set tools_field: {name}"
    if name in ("documents", "enable_thinking"):
        return f"belongs to the conversation but is not read; move it into {VARIABLES}"
    if "".join(words) in _JOINED:
        return "belongs to the conversation but is not read; move it into the messages"
    if messages and _is_unwanted(name, value, settings):
        return f"is {str(value).casefold()}, as KTO marks an unwanted answer; remove the row"
    if _is_mask(value, messages):
        return "has 0 or 1 for each message but is not read; write weight into the assistant's messages"
    if _is_supervision(words, value):
        fix = "" if _of_text(settings) else ", or write weight into its messages"
        return f"is {value!r:.40}, but rows have no weights; remove the row{fix}"
    if messages and name.casefold() in _ANSWERS and (role := messages[-1]["role"]) != "assistant":
        return f"may hold the answer to the last message, which is of role {role!r}; append it to the messages"
    return None


def _of_text(settings: PlaceSettings) -> bool:
    return isinstance(settings, SourceSettings) and not settings.chat


def parsed(value: Any) -> Any:
    """A list or an object from its JSON text; any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with suppress(ValueError):
            return parse_json(value)
    return value


def _holds_tools(value: Any, named: bool) -> bool:
    """Whether a field holds a list of tools, also as JSON text. named: its name says so."""
    value = parsed(value)
    return isinstance(value, list) and bool(value) and all(_is_tool(item, named) for item in value)


def _is_tool(value: Any, named: bool) -> bool:
    value = parsed(value)
    function = value.get("function", value) if isinstance(value, dict) else None
    keys = {"parameters", "input_schema", "inputSchema"} | ({"description"} if named else set())
    return isinstance(function, dict) and isinstance(function.get("name"), str) and bool(keys & function.keys())


def _is_unwanted(name: str, value: Any, settings: PlaceSettings) -> bool:
    """Whether a field may mark an unwanted answer. A number in `label` does so only in the shape of KTO data; in other
    rows it is the number of a class."""
    of_kto = isinstance(settings, SourceSettings) and settings.shape == "prompt_completion"
    numbers = {"0", "0.0"} if name == "kto_tag" or of_kto else set()
    return name in _WANTED and str(value).casefold() in {"false", *numbers}


def _is_mask(value: Any, messages: Sequence[dict[str, Any]]) -> bool:
    """Whether a field may say which messages, or which of the assistant's, are supervised."""
    answers = sum(message["role"] == "assistant" for message in messages)
    value = parsed(value)
    if not messages or not isinstance(value, list) or not all(item in (0, 1) for item in value):
        return False
    return len(value) == len(messages) or (len(value) == answers and 0 in value)


def _is_supervision(words: list[str], value: Any) -> bool:
    """Whether a field may say that the row, or a part of it, is not fully supervised."""
    value = parsed(value)
    if _SUPERVISION.isdisjoint(words) or not _SUPERVISED.issuperset(words):
        return False
    if isinstance(value, str):  # as in tables; other texts, such as the name of a split, say nothing about it
        if value.casefold() in ("false", "no"):
            return True
        with suppress(ValueError):
            return float(value) != 1
        return False
    return value != 1


def _words(name: str) -> list[str]:
    """The words of a field's name, which may be joined as in `loss_mask` or in `lossMask`, without capitals."""
    return re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())


_JOINED = {"".join(_words(name)) for name in _CONVERSATION}
