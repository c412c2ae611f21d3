# SPDX-License-Identifier: Apache-2.0
"""A conversation with markers in place of its texts and numbers, which show what a chat template writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hmf.data.conversation import REASONING_FIELDS, RESULT_ROLES, THINK_BLOCK, Message, untagged
from hmf.data.forms import NUMBER, Form, spelled

# In place of a text, or of a number; and of a text in Python's notation, in which some templates write tools.
_MARKER = re.compile("\ue000(\\d+)\ue001|9173(\\d{9})|(?<!\\\\)\\\\ue000(\\d+)\\\\ue001")
TOOLS = -1  # stands for tools in place of the index of a message


@dataclass(frozen=True)
class Leaf:
    """A text or number of a conversation that the template must write, and its place."""

    message: int
    what: str
    path: str
    value: str | int | float


class MarkedConversation:
    """A conversation, and a copy with markers in place of its leaves.

    Attributes:
        original: the conversation before a form is applied.
        variables: variables of the template, the same for the copy.
        messages, marked: the conversation and its copy, in the form that `Template.read` chose.
        leaves: the texts and numbers that the markers stand for, by the markers' numbers.
        names: names of arguments and of tools' properties. Those of arguments are not marked, since templates may look
            them up.
        properties: the names of tools' properties by their markers, which have no order: templates may sort them.
        literals: the index of the message of each argument that is null, true or false.
        spelled, numbered: the marked copy, in the form that `Template.read` chose, with texts or numbers in place of
            these literals.
        structure: the marked copy as a string: equal for conversations that differ only in their leaves.
        context: the part of it that is not in the messages.
    """

    def __init__(self, messages: list[Message], tools: list[Any] | None, variables: dict[str, Any]):
        self.original, self.tools, self.variables = messages, tools, variables
        self.leaves: list[Leaf] = []
        self.names: list[Leaf] = []
        self.properties: dict[str, Leaf] = {}
        self.literals: list[int] = []
        self.marked_tools = [self._tool(tool) for tool in tools] if tools else None
        self._marked = [self._message(message, number) for number, message in enumerate(messages)]
        self.context = repr((self.marked_tools, variables))
        self.structure = repr(self._marked) + self.context

    def use(self, form: Form) -> None:
        """Bring the conversation and its marked copy into a form."""
        self.form = form
        self.messages, self.marked = form.apply(self.original), form.apply(self._marked)
        self.spelled = form.apply(spelled(message) for message in self._marked)
        self.numbered = form.apply(spelled(message, NUMBER) for message in self._marked)
        self.structures = [repr(message) for message in self.marked]

    def written(self, text: str) -> list[tuple[int, int]]:
        """(position, number of the leaf) of every marker in a text."""
        found = ((match, int(match[1] or match[2] or match[3])) for match in _MARKER.finditer(text))
        return [
            (match.start(), number)
            for match, number in found
            if match[3] is None or self.leaves[number].message == TOOLS
        ]

    def _mark(self, value: Any, message: int, what: str, path: str) -> Any:
        """The value with markers in place of its texts and numbers."""
        match value:
            case dict():
                self.names += [Leaf(message, what, path, name) for name in value]
                return {name: self._mark(item, message, what, f"{path}.{name}") for name, item in value.items()}
            case list():
                return [self._mark(item, message, what, f"{path}[{number}]") for number, item in enumerate(value)]
            case bool() | None:
                self.literals.append(message)
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
        # The name of a result need not be written if it is that of its call.
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
        thought = THINK_BLOCK.match(text) if first and self.original[index]["role"] == "assistant" else None
        if thought is None:
            return self._mark(text, index, "content", path)
        return self._thought(thought[0], index, path) + self._mark(text[thought.end() :], index, "content", path)

    def _thought(self, text: str, index: int, path: str) -> str:
        """The marked thinking, with its tags unchanged, since templates look for them."""
        inside = untagged(text.strip())
        return text.replace(inside, self._mark(inside, index, "thinking", path), 1) if inside else text

    def _is_called(self, name: str, before: int) -> bool:
        calls = (call for message in self.original[:before] for call in message.get("tool_calls", ()))
        return any(call["function"]["name"] == name for call in calls)

    def _tool(self, tool: Message) -> Message:
        """A tool with its name, its description and the names of its parameters marked. The rest of its schema is not:
        templates write it in many ways."""
        function = tool.get("function") or tool
        # A schema may be under any key: parameters, or input_schema, which templates may not read.
        made = {key: self._schema(value, function["name"]) for key, value in function.items()}
        for key in ("name", "description"):
            if isinstance(function.get(key), str):
                made[key] = self._mark(function[key], TOOLS, "tools", function["name"])
        return tool | {"function": made} if tool.get("function") else made

    def _schema(self, value: Any, tool: str) -> Any:
        """A schema with the names of its properties marked, also in objects inside of it. Some data sets have the
        properties alone."""
        if not isinstance(value, dict):
            return value
        if value and all(isinstance(item, dict) and isinstance(item.get("type"), str) for item in value.values()):
            return {self._property(name, tool): self._schema(item, tool) for name, item in value.items()}
        if not isinstance(value.get("properties"), dict):
            return value | ({"items": self._schema(value["items"], tool)} if "items" in value else {})
        names = {name: self._property(name, tool) for name in value["properties"]}
        made = {names[name]: self._schema(item, tool) for name, item in value["properties"].items()}
        required = value.get("required")
        if isinstance(required, list):
            required = [names.get(name, name) if isinstance(name, str) else name for name in required]
        return value | {"properties": made} | ({"required": required} if "required" in value else {})

    def _property(self, name: str, tool: str) -> str:
        self.names.append(leaf := Leaf(TOOLS, "tools", f"{tool}.{name}", name))
        marker = f"marked_property_{len(self.properties)}_"
        self.properties[marker] = leaf
        return marker
