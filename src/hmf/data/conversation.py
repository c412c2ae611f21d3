# SPDX-License-Identifier: Apache-2.0
"""Checks of conversations in the OpenAI format, and their normal form, which chat templates read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from hmf.config.strict import parse_json, require_text
from hmf.errors import HmfError, unknown_name

Message = dict[str, Any]
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
ROLES = ("system", "developer", "user", "assistant", "tool")
RESULT_ROLES = ("tool", "ipython")
KEYS = ("role", "content", *REASONING_FIELDS, "tool_calls", "tool_call_id", "name", "weight")
CALL_KEYS, FUNCTION_KEYS = ("id", "type", "function", "index"), ("name", "arguments")
# Types of parts of a content in the formats of OpenAI, Anthropic and transformers.
PARTS = {"text", "input_text", "output_text", "image", "image_url", "input_image", "video", "audio", "input_audio"} | {
    "thinking",
    "redacted_thinking",
    "tool_use",
    "tool_result",
    "refusal",
}
THINK_BLOCK = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_ELSEWHERE = {
    "function_call": "belongs to OpenAI's older format; write tool_calls, and the result as a message of role tool",
    **dict.fromkeys(
        ("train", "trainable", "loss", "mask"),
        "unknown key; write weight, 0 for a turn that is not supervised, or add it to ignore_keys",
    ),
    "functions": "belongs to OpenAI's older format; write tools beside the messages",
    "tools": "unknown key; write tools beside the messages",
}
SCHEMAS = ("parameters", "input_schema", "inputSchema")  # names of the schema of a tool in common formats


def normalise(
    messages: Any, tools: Any = None, ignore_keys: Iterable[str] = ()
) -> tuple[list[Message], list[Message] | None]:
    """Bring a conversation into the normal form that chat templates read. The function is idempotent.

    `arguments` and schemas of tools in JSON text become objects. Calls without `function` get one. A tool's result that
    is an object, a list or a number becomes JSON text. Results are sorted in the order of their calls. Keys without a
    value (null or empty) and those in `ignore_keys` are left out.

    Raises:
        HmfError: names the message and the key of an unknown key, content that is not text, arguments that are not a
            JSON object, a result without its call, or a lone surrogate.
    """
    ignored = frozenset(ignore_keys)
    if not isinstance(messages, list) or not messages:
        raise HmfError(f"messages: a list of messages is expected, not {_kind(messages)}")
    if tools is not None and not isinstance(tools, list):
        raise HmfError(f"tools: a list of tools is expected, not {_kind(tools)}")
    tools = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools or ())]
    return _linked([_message(message, f"messages[{i}]", ignored) for i, message in enumerate(messages)]), tools or None


def text_of(content: Any) -> str:
    """The text of a message's content, which is a string, a list of parts, or None."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return "".join(part.get("text") or "" for part in parts if isinstance(part, dict))


def thinking_of(message: Message) -> str:
    """The thinking of an assistant's message, from a field of its own or the start of its content, without tags."""
    if message["role"] != "assistant":
        return ""
    for name in REASONING_FIELDS:
        if message.get(name):
            return untagged(text_of(message[name]))
    block = THINK_BLOCK.match(text_of(message.get("content")))
    return untagged(block[0].strip()) if block else ""


def untagged(thinking: str) -> str:
    """The thinking without the tags around it."""
    return thinking.removeprefix("<think>").removesuffix("</think>").strip()


def without_thinking(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    kept = {name: value for name, value in message.items() if name not in REASONING_FIELDS}
    content = text_of(kept.get("content"))
    if block := THINK_BLOCK.match(content):
        kept["content"] = content[block.end() :]
    return kept


def supervised(message: Message) -> bool:
    """Whether a message is an assistant's and its weight is not 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def messages_after(messages: list[Message]) -> int:
    """Number of messages after the last supervised turn. They are not used."""
    return next((number for number, message in enumerate(reversed(messages)) if supervised(message)), len(messages))


def strings_of(value: Any) -> Iterator[str]:
    """All strings in a value, including the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)


def _message(message: Any, place: str, ignored: frozenset[str]) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise HmfError(f"{place} has no role; write role and content")
    calls = message.get("tool_calls")
    if isinstance(calls, str) and calls and "tool_calls" not in ignored:  # as in tables
        message = message | {"tool_calls": _parsed(calls, f"{place}.tool_calls", "a list of calls")}
    role, kept = message["role"], _present(message, KEYS, place, ignored)
    if role not in ROLES and role.strip().lower() in ROLES:
        raise HmfError(f"{place}.role: {unknown_name('role', role, ROLES)}")
    content = None if "content" in ignored else _content(message.get("content"), role, f"{place}.content", ignored)
    if content is None and role != "assistant" and role not in RESULT_ROLES:
        raise HmfError(f"{place}.content: a message of role {role!r} needs content; write it or remove the message")
    made = {"role": role, "content": content or ""} | {key: kept[key] for key in kept if key not in ("role", "content")}
    require_text(made, place)
    if "tool_calls" in made:
        if role != "assistant":
            raise HmfError(
                f"{place}.tool_calls: only the assistant can call tools, but this is role {role!r}; move or remove the "
                "calls"
            )
        made["tool_calls"] = _calls(made["tool_calls"], f"{place}.tool_calls", ignored)
    for name in REASONING_FIELDS:
        if isinstance(made.get(name), str) and not made[name].strip():
            del made[name]
    thoughts = [name for name in REASONING_FIELDS if name in made]
    for name in (*thoughts, *(name for name in ("name", "tool_call_id") if name in made)):
        if not isinstance(made[name], str):
            raise HmfError(f"{place}.{name}: text is expected, not {_kind(made[name])}")
    if thoughts and role != "assistant":
        raise HmfError(f"{place}.{thoughts[0]}: only the assistant can think, but this is role {role!r}; remove it")
    for name in thoughts[1:]:
        if made.pop(name) != made[thoughts[0]]:
            raise HmfError(f"{place}.{name}: differs from {thoughts[0]}; keep one of the two")
    if thoughts and (block := THINK_BLOCK.match(text_of(content))) and untagged(block[0].strip()):
        raise HmfError(f"{place}.content: starts with thinking, but there is also {thoughts[0]}; keep one of the two")
    if "tool_call_id" in made and role not in RESULT_ROLES:
        raise HmfError(f"{place}.tool_call_id: belongs to a tool's result, but this is role {role!r}; remove it")
    if "weight" in made and (made["weight"] not in (0, 1) or (role != "assistant" and made["weight"])):
        raise HmfError(
            f"{place}.weight: is {made['weight']!r} for role {role!r}; write 0 (not supervised) or, for the assistant, "
            "1 (supervised)"
        )
    return made


def _present(holder: Message, known: tuple[str, ...], place: str, ignored: frozenset[str]) -> Message:
    """The keys that have a value and are not ignored. HmfError for an unknown key."""
    kept = {key: value for key, value in holder.items() if key not in ignored and value not in (None, "", [], {})}
    if unknown := [key for key in kept if key not in known]:
        names = ", ".join(key for key in unknown if key not in _ELSEWHERE)
        key = unknown[0]
        problem = _ELSEWHERE.get(key) or f"{unknown_name('key', key, known)} (or add to ignore_keys: {names})"
        raise HmfError(f"{place}.{key}: {problem}")
    return kept


def _content(value: Any, role: str, place: str, ignored: frozenset[str]) -> str | list[Message] | None:
    """The content as text or text parts; a tool's result may become JSON text."""
    result = role in RESULT_ROLES
    if isinstance(value, str) and not result and _holds_parts(value):
        raise HmfError(
            f"{place}: is text that holds parts as JSON; write the list of parts itself, or a list of one part "
            "{type: text, text: ...} with this text"
        )
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and (not value or any(isinstance(part, dict) and "type" in part for part in value)):
        if not value and result:
            raise HmfError(f"{place}: an empty list is ambiguous (no text, or the result []); write the text")
        parts = [_part(part, f"{place}[{number}]", ignored) for number, part in enumerate(value)]
        # Without any text, what a template writes cannot be checked: some would write the list in Python's notation.
        if not any(part["text"].strip() for part in parts):
            return "".join(part["text"] for part in parts) if parts else None
        return parts
    if not result:
        raise HmfError(f"{place}: {_kind(value)} is not text; write text, or parts {{type: text, text: ...}}")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise HmfError(f"{place}: cannot be represented in JSON; write the result as text") from None


def _holds_parts(text: str) -> bool:
    """Whether a text is the JSON of a list of parts, as tables may hold them."""
    if not re.match(r"\s*\[\s*\{", text) or '"type"' not in text:
        return False
    with suppress(ValueError):
        parts = parse_json(text)
        kinds = [part.get("type") for part in parts if isinstance(part, dict)]
        return len(kinds) == len(parts) and all(isinstance(kind, str) and kind in PARTS for kind in kinds)
    return False


def _part(part: Any, place: str, ignored: frozenset[str]) -> Message:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = repr(part.get("type")) if isinstance(part, dict) else _kind(part)
        raise HmfError(
            f"{place}: a part of type {kind} is not supported; write parts {{type: text, text: ...}}, calls in "
            "tool_calls, results in messages of role tool, thinking in reasoning_content"
        )
    text = _present(part, ("type", "text"), place, ignored).get("text", "")
    if not isinstance(text, str):
        raise HmfError(f"{place}.text: text is expected, not {_kind(text)}")
    return {"type": "text", "text": text}


def _tool(tool: Any, place: str) -> Message:
    """The tool, with an object in place of a schema that is JSON text."""
    function = tool.get("function") or tool if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise HmfError(f"{place}: is not a function with a name; write {{type: function, function: {{name: ...}}}}")
    require_text(tool, place)
    path = place if function is tool else f"{place}.function"
    made = function | {name: _schema(function[name], f"{path}.{name}") for name in SCHEMAS if function.get(name)}
    return made if function is tool else tool | {"function": made}


def _schema(value: Any, place: str) -> Any:
    value = _parsed(value, place)
    if isinstance(value, dict) and isinstance(properties := value.get("properties"), str):
        value = value | {"properties": _parsed(properties, f"{place}.properties")}
    return value


def _parsed(value: Any, place: str, expected: str = "an object") -> Any:
    """The value of JSON text; any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        value = parse_json(value)
    except ValueError as error:
        raise HmfError(f"{place}: is text but not valid JSON ({error}); write {expected}") from None
    require_text(value, place)
    return value


def _calls(calls: Any, place: str, ignored: frozenset[str]) -> list[Message]:
    if not isinstance(calls, list):
        raise HmfError(f"{place}: a list of calls is expected, not {_kind(calls)}")
    made = []
    for number, call in enumerate(calls):
        where = f"{place}[{number}]"
        if not isinstance(call, dict):
            raise HmfError(f"{where}: an object with a function's name and arguments is expected, not {_kind(call)}")
        stated, of = (call["function"], ".function") if "function" in call else (call, "")
        if isinstance(stated, dict) and stated.get("arguments") == []:
            raise HmfError(f"{where}{of}.arguments: an object is expected, not a list; without arguments, write {{}}")
        if "function" in call:
            kept = _present(call, CALL_KEYS, where, ignored)
            function, inside = kept.get("function"), f"{where}.function"
        else:
            kept = _present(call, (*CALL_KEYS, *FUNCTION_KEYS), where, ignored)
            function, inside = {key: kept[key] for key in FUNCTION_KEYS if key in kept}, where
        if kept.get("type", "function") != "function":
            raise HmfError(f"{where}.type: is {kept['type']!r}; only the type function is supported")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise HmfError(f"{inside}.name: the call needs the name of a function")
        function = _present(function, FUNCTION_KEYS, inside, ignored)
        arguments = _arguments(function.get("arguments"), f"{inside}.arguments")
        rest = {key: kept[key] for key in ("id", "type") if key in kept}
        made.append(rest | {"function": {"name": function["name"], "arguments": arguments}})
    return made


def _arguments(value: Any, place: str) -> dict[str, Any]:
    """A call's arguments as an object. In the OpenAI format, they are JSON text."""
    if value is None:
        return {}
    if not isinstance(value := _parsed(value, place), dict):
        raise HmfError(f"{place}: an object is expected, not {_kind(value)}")
    return value


def _linked(messages: list[Message]) -> list[Message]:
    """The messages, with results in the order of their calls. Most templates write no ids, so the order matters.

    Raises:
        HmfError: a result that refers to no call in the turn before it or to another function, a result too many, or
            a call without a result before one with a result.
    """
    made: list[Message] = []
    start = 0
    while start < len(messages):
        stop = start
        while stop < len(messages) and messages[stop]["role"] in RESULT_ROLES:
            stop += 1
        if stop == start:
            made.append(messages[start])
            start += 1
            continue
        calls = made[-1].get("tool_calls", []) if made else []
        places = [_call_of(messages[i], i - start, calls, f"messages[{i}]") for i in range(start, stop)]
        if calls and sorted(places) != list(range(len(places))):
            number = next(n for n in range(len(places)) if n not in places or places.count(n) > 1)
            problem = "has two results" if places.count(number) > 1 else "has no result, but a later call has one"
            raise HmfError(f"messages[{len(made) - 1}].tool_calls[{number}]: {problem}; write one result for each call")
        results = [messages[start + places.index(n)] for n in range(len(places))] if calls else messages[start:stop]
        # Some templates write the ids of results, too.
        ids = [call.get("id") for call in calls]
        made += [
            {"tool_call_id": ids[n]} | result
            if calls and isinstance(ids[n], str) and ids.count(ids[n]) == 1
            else result
            for n, result in enumerate(results)
        ]
        start = stop
    return made


def _call_of(result: Message, position: int, calls: list[Message], place: str) -> int:
    """Index of the call that a result belongs to: by its id if it has one, else by its position."""
    if (identity := result.get("tool_call_id")) is not None:
        ids = [call.get("id") for call in calls]
        if ids.count(identity) != 1:
            problem = "no call" if identity not in ids else "more than one call"
            raise HmfError(
                f"{place}.tool_call_id: {identity!r} is the id of {problem} in the turn before it; correct it"
            )
        position = ids.index(identity)
    elif calls and position >= len(calls):
        raise HmfError(f"{place}: the turn before it has fewer calls than results; remove this result or add its call")
    if calls and (name := result.get("name")) and name != (called := calls[position]["function"]["name"]):
        raise HmfError(f"{place}.name: is {name!r}, but the call is of {called!r}; correct it")
    return position


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
