# SPDX-License-Identifier: Apache-2.0
"""The forms in which a conversation is passed to a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hmf.data.conversation import REASONING_FIELDS, Message

SPELLED = "\ue002\ue003"  # in place of null, true or false: as the value of an argument, and inside one
PART = "part"  # of a content, with thinking, as Ministral 3 has it
NUMBER = 9174_000_000_000  # in place of null, true or false as the value of an argument


@dataclass(frozen=True)
class Form:
    """How a conversation is passed to a template, in points where the OpenAI format allows several ways."""

    contents: str = "unchanged"  # or "joined": all as text; "parts": all as lists of parts
    no_content: str | None = ""  # content of messages with calls but without content
    arguments: type = dict  # dict, or str for JSON text
    literals: bool = (
        False  # arguments that are null, true or false: as JSON text, for templates that write values as text
    )
    reasoning: str | None = None  # name of the reasoning field; None: unchanged; PART: as a part of the content
    developer: str = "system"  # role of the developer's messages

    def apply(self, messages: Iterable[Message]) -> list[Message]:
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Message:
        made = {key: value for key, value in message.items() if key != "weight"}
        content = made["content"]
        if self.contents == "joined" and isinstance(content, list):
            made["content"] = "\n".join(part["text"] for part in content)  # as in vLLM
        elif self.contents == "parts" and isinstance(content, str) and content:
            made["content"] = [{"type": "text", "text": content}]
        if calls := made.get("tool_calls"):
            made["content"] = made["content"] or self.no_content
            if self.literals:
                made["tool_calls"] = [_with_arguments(call, _literal_text) for call in calls]
            elif self.arguments is str:
                made["tool_calls"] = [_with_arguments(call, partial(json.dumps, ensure_ascii=False)) for call in calls]
        if self.reasoning:
            for name in REASONING_FIELDS:
                if name in made:
                    made[self.reasoning] = made.pop(name)
        if PART in made:
            content = made["content"] or []
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            made["content"] = [{"type": "thinking", "thinking": made.pop(PART)}, *parts]
        if made["role"] == "developer":
            made["role"] = self.developer
        return made


def spelled(message: Message, value: str | int = SPELLED[0]) -> Message:
    """The message, in whose calls `value` stands in place of each argument that is null, true or false, and the second
    character of `SPELLED` in place of those inside of arguments."""
    if not (calls := message.get("tool_calls")):
        return message
    return message | {
        "tool_calls": [_with_arguments(call, partial(_spelled, values=(value, SPELLED[1]))) for call in calls]
    }


def _spelled(value: Any, level: int = -1, values: Sequence[str | int] = SPELLED) -> Any:
    match value:
        case dict():
            return {name: _spelled(item, level + 1, values) for name, item in value.items()}
        case list():
            return [_spelled(item, level + 1, values) for item in value]
    return values[min(level, 1)] if value is None or isinstance(value, bool) else value


def _literal_text(arguments: Message) -> Message:
    return {name: value if _spelled(value, 0) == value else json.dumps(value) for name, value in arguments.items()}


def _with_arguments(call: Message, change: Callable[[Any], Any]) -> Message:
    function = call["function"]
    return call | {"function": function | {"arguments": change(function["arguments"])}}
