# SPDX-License-Identifier: Apache-2.0
"""Conversion of common record formats, such as ShareGPT and Alpaca, into messages with role and content."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from hmf.config.data import SourceSettings
from hmf.config.places import PairSettings, PlaceSettings
from hmf.config.strict import parse_json, require_text
from hmf.data.fields import EMPTY, VARIABLES, parsed, unread_fields
from hmf.errors import HmfError, unknown_name

Message = dict[str, Any]
Row = dict[str, Any]
# Roles by ShareGPT's `from`.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Conversation:
    """chat_template_kwargs: variables of the chat template. unread: names of the row's fields that are neither used nor
    in ignore_fields."""

    messages: list[Message]
    tools: list[Any] | None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """The messages before an answer, and two answers. The other attributes are those of `Conversation`."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: list[Any] | None
    chat_template_kwargs: dict[str, Any]
    unread: tuple[str, ...] = ()


def conversation(row: Row, settings: SourceSettings) -> Conversation:
    """The conversation of a row. HmfError for a field that is invalid or missing, or that would be ignored."""
    row = _without(row, settings.ignore_fields)
    prompt: list[Message] = []
    match settings.shape:
        case None:
            _require(row, settings.field, SHAPES)
            used, messages = {settings.field}, message_list(row[settings.field], settings.field)
        case "sharegpt":
            used = {settings.field, "system"}
            messages = [*_system(row), *_turns(_field(row, settings.field), settings.field)]
            _one_system(messages)
        case "alpaca":
            _require_of_shape(row, settings, "instruction", "output")
            used, messages = {*ALPACA, "output"}, [*_alpaca(row), _message("assistant", _text(row, "output"), "output")]
        case "prompt_completion":
            used = {"prompt", "completion"}
            _require_of_shape(row, settings, "prompt", "completion")
            prompt, messages = _messages(row, "prompt", "user"), _messages(row, "completion", "assistant")
    prompt, messages = ([_without(one, settings.ignore_keys) for one in part] for part in (prompt, messages))
    messages = [*_context(prompt), *messages]
    tools, unread = _tools(row, settings), unread_fields(row, used, settings, messages)
    require_text(messages, "messages")
    return Conversation(messages, tools, _variables(row, settings), tuple(unread))


def pair(row: Row, settings: PairSettings) -> Pair:
    """The pair of a row. HmfError for a field that is invalid or missing, or that would be ignored."""
    row = _without(row, settings.ignore_fields)
    names = settings.chosen_field, settings.rejected_field
    used = {*names}
    if settings.shape == "ultrafeedback":
        used |= {settings.prompt_field, "messages"}
        prompt, answers = _common(row, settings)
    else:
        match settings.shape:
            case None:
                used.add(settings.prompt_field)
                whole = {settings.chosen_field: "ultrafeedback"} if isinstance(row.get(names[0]), list) else {}
                _require(row, settings.prompt_field, {"conversations": "sharegpt", "instruction": "alpaca", **whole})
                prompt = _messages(row, settings.prompt_field, "user")
            case "sharegpt":
                used |= {"conversations", "system"}
                _require_of_shape(row, settings, "conversations")
                prompt = [*_system(row), *_turns(_field(row, "conversations"), "conversations")]
                _one_system(prompt)
            case "alpaca":
                used |= set(ALPACA)
                _require_of_shape(row, settings, "instruction")
                prompt = _alpaca(row)
        answers = [_answer(row, name, settings) for name in names]
    tools, unread = _tools(row, settings), unread_fields(row, used, settings)
    for place, messages in (
        ("prompt", prompt),
        *((name, [answer]) for name, answer in zip(names, answers, strict=True)),
    ):
        require_text([_without(message, settings.ignore_keys) for message in messages], place)
    return Pair(prompt, answers[0], answers[1], tools, _variables(row, settings), tuple(unread))


def message_list(value: Any, field: str) -> list[Message]:
    """The messages in a field, which may hold them as JSON text."""
    messages = decoded_field(value, field)
    if not isinstance(messages, list) or not messages:
        raise HmfError(f"field {field!r} holds {kind_of(value)} instead of a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            content = (
                f"it has {', '.join(map(repr, message))}" if isinstance(message, dict) else f"it is {message!r:.40}"
            )
            fix = "set shape: sharegpt" if isinstance(message, dict) and "from" in message else "write role and content"
            raise HmfError(f"{field}[{number}] has no role; {content}: {fix}")
    return messages


def decoded_field(value: Any, field: str) -> Any:
    """The value of a field. Strings are parsed as JSON, since tables often hold nested values as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise HmfError(f"field {field!r} is text but not valid JSON ({error})") from None


def _without(message: Message, keys: Iterable[str]) -> Message:
    return {key: value for key, value in message.items() if key not in keys}


def kind_of(value: Any) -> str:
    return "nothing" if value is None else "an empty list" if value == [] else type(value).__name__


def missing(row: Row, field: str, fix: str) -> HmfError:
    return HmfError(f"no field {field!r}; the row has {', '.join(map(repr, row)) or 'none with a value'}: {fix}")


def _tools(row: Row, settings: PlaceSettings) -> list[Any] | None:
    """The tools of a row. HmfError for invalid text in them."""
    field = settings.tools_field
    tools = decoded_field(row.get(field) or None, field) or None
    if tools is not None and not isinstance(tools, list):
        raise HmfError(f"field {field!r} holds {kind_of(tools)} instead of a list of tools")
    tools = tools and [decoded_field(tool, f"{field}[{number}]") for number, tool in enumerate(tools)]
    require_text(tools, field)
    return tools


def _variables(row: Row, settings: PlaceSettings) -> dict[str, Any]:
    """The variables of the chat template that have a value: those of the row, then those of the recipe."""
    given = decoded_field(row.get(VARIABLES) or None, VARIABLES)
    if not isinstance(given or {}, dict):
        raise HmfError(f"field {VARIABLES!r} holds {kind_of(given)} instead of an object")
    require_text(given, VARIABLES)
    own = {name: value for name, value in (given or {}).items() if value not in EMPTY}
    return settings.chat_template_kwargs | own


# The shape of rows that have a field of this name.
SHAPES = {"conversations": "sharegpt", "instruction": "alpaca", "completion": "prompt_completion"}


def _require(row: Row, field: str, shapes: dict[str, str]) -> None:
    """HmfError without the field, which suggests one of `shapes` by the fields that the row has."""
    if field not in row:
        shape = next((f", or shape: {shape}" for name, shape in shapes.items() if name in row and name != field), "")
        raise missing(row, field, f"add it, or set the recipe's key for its name{shape}")


def _require_of_shape(row: Row, settings: SourceSettings | PairSettings, *fields: str) -> None:
    """HmfError without a field whose name belongs to the shape, so that no key of the recipe can give another."""
    for name in fields:
        if name not in row:
            raise missing(row, name, f"shape {settings.shape} needs it; add it, or give the shape of these rows")


def _field(row: Row, field: str) -> Any:
    _require(row, field, {})
    return row[field]


def _text(row: Row, field: str) -> str:
    value = _field(row, field)
    if not isinstance(value, str):
        raise HmfError(f"field {field!r} holds {kind_of(value)} instead of text")
    return value


def _message(role: str, content: str, place: str) -> Message:
    if not content.strip():
        raise HmfError(f"{place}: is empty; remove the row or write the text")
    return {"role": role, "content": content}


def _messages(row: Row, field: str, role: str) -> list[Message]:
    """The messages in a field, which holds a list of messages, one message, or the content of a message of `role`."""
    value = _field(row, field)
    if isinstance(value, str):
        if _holds_messages(value):  # as tables may hold them; but it may also be the text that is meant
            raise HmfError(
                f"{field}: is text that holds messages as JSON; store the list of messages itself, or a list of one "
                f"message of role {role} with this text as its content"
            )
        return [_message(role, value, field)]
    return message_list([value] if isinstance(value, dict) else value, field)


def _context(messages: list[Message]) -> list[Message]:
    """The messages, where the assistant's are not supervised unless they have a weight."""
    return [
        message | {"weight": 0} if message["role"] == "assistant" and message.get("weight") is None else message
        for message in messages
    ]


def _holds_messages(text: str) -> bool:
    value = parsed(text)
    messages = [value] if isinstance(value, dict) else value
    return bool(messages) and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in messages)


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []


def _one_system(messages: list[Message]) -> None:
    if [message["role"] for message in messages[:2]] == ["system", "system"]:
        raise HmfError("field 'system' and the conversation both have a system turn; remove one of them")


def _turns(value: Any, field: str) -> list[Message]:
    turns = decoded_field(value, field)
    if not isinstance(turns, list) or not turns:
        raise HmfError(f"field {field!r} holds {kind_of(value)} instead of a list of turns")
    return [_turn(turn, f"{field}[{number}]") for number, turn in enumerate(turns)]


def _turn(turn: Any, place: str) -> Message:
    """The message of a ShareGPT turn {"from": ..., "value": ...}. Its other keys become keys of the message."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        content = f"it has {', '.join(map(repr, turn))}" if isinstance(turn, dict) else f"it is {turn!r:.40}"
        fix = "leave shape out and set messages_field" if isinstance(turn, dict) and "role" in turn else "write them"
        raise HmfError(f"{place}: a turn needs from and value, but {content}: {fix}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if both := sorted(rest.keys() & {"role", "content", "tool_calls"}):
        raise HmfError(f"{place}.{both[0]}: a turn has from and value instead; remove one of the two")
    speaker, value = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise HmfError(f"{place}.from: {unknown_name('speaker', str(speaker), SPEAKERS)}")
    if not isinstance(value, str):
        raise HmfError(f"{place}.value: holds {kind_of(value)} instead of text")
    if speaker != "function_call":
        return {"role": SPEAKERS[speaker], "content": value} | rest
    calls = decoded_field(value, f"{place}.value")
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            raise HmfError(f"{place}.value: a function call must have name and arguments, not {call!r:.60}")
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]} | rest


ALPACA = ("instruction", "input", "system", "history")


def _alpaca(row: Row) -> list[Message]:
    """The messages before the answer. `input` is appended to `instruction` on a new line."""
    messages = _system(row)
    history = decoded_field(row.get("history") or [], "history")
    for number, turn in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(turn, list | tuple) or [type(part) for part in turn] != [str, str]:
            raise HmfError(f"history[{number}]: a list of two texts, question and answer, is expected")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    context = _text(row, "input") if row.get("input") else ""
    question = "\n".join(part for part in (_text(row, "instruction"), context) if part)
    return [*messages, _message("user", question, "instruction")]


def _answer(row: Row, field: str, settings: PairSettings) -> Message:
    value = _field(row, field)
    if settings.shape == "sharegpt" and not isinstance(value, str):
        messages = _turns([value] if isinstance(value, dict) else value, field)
    else:
        messages = _messages(row, field, "assistant")
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        fix = ", or set shape: ultrafeedback" if settings.shape is None else ""
        raise HmfError(
            f"{field}: must hold only the assistant's answer; move the messages before it into the prompt{fix}"
        )
    return messages[0]


def _common(row: Row, settings: PairSettings) -> tuple[list[Message], list[Message]]:
    """The shared messages and both answers of two whole conversations, which differ only in their last message."""

    def messages(value: Any, field: str) -> list[Message]:
        return [_without(message, settings.ignore_keys) for message in message_list(value, field)]

    chosen, rejected = (messages(_field(row, name), name) for name in (settings.chosen_field, settings.rejected_field))
    prompt = chosen[:-1]
    if not prompt or prompt != rejected[:-1] or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise HmfError(
            f"{settings.chosen_field} and {settings.rejected_field}: must be two conversations that differ only in "
            "their last message, which is the assistant's"
        )
    same: dict[str, Callable[[Any], bool]] = {
        settings.prompt_field: lambda value: (
            messages(value, settings.prompt_field) == prompt
            if isinstance(value, list)
            else value in (x.get("content") for x in prompt if x["role"] == "user")
        ),
        "messages": lambda value: messages(value, "messages") == chosen,
    }
    for name, is_same in same.items():
        if row.get(name) and not is_same(row[name]):
            raise HmfError(
                f"field {name!r} differs from {settings.chosen_field}; correct it, or add it to "
                f"{settings.key}.ignore_fields"
            )
    return prompt, [chosen[-1], rejected[-1]]
