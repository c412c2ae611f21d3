# SPDX-License-Identifier: Apache-2.0
"""Strict reading of JSON, YAML and recipes: an unknown key and a duplicate key are errors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from hmf.errors import HmfError


class Settings(BaseModel):
    """Base of every recipe section."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _home_and_no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        for place in _switches(value, annotation):
            raise ValueError(f"{place}a number is expected, not true or false, as YAML reads yes, no, on and off")
        if value == "" and Path in _kinds(annotation):
            raise ValueError("a path is expected, not an empty text")
        return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _switches(value: Any, annotation: Any) -> Iterator[str]:
    """The places, each followed by a colon unless it is `value` itself, of true or false where a number is expected."""
    if isinstance(value, bool) and _numbers_alone(annotation):
        yield ""
    for kind in _kinds(annotation):
        origin, arguments = get_origin(kind), get_args(kind)
        items: Iterable[Any] = ()
        if isinstance(value, dict) and origin is dict:
            items = value.items()
        elif isinstance(value, list) and origin is list:
            items = enumerate(value)
        for name, item in items:
            yield from (f"{name}: {place}" for place in _switches(item, arguments[-1]))


def _numbers_alone(annotation: Any) -> bool:
    """Whether a type has numbers as values and no true or false, which pydantic would take for 1 and 0."""
    kinds = _kinds(annotation)
    return bool(kinds & {int, float}) and bool not in kinds


def _kinds(annotation: Any) -> set[Any]:
    """The types of which a value may be: of X | None they are X and None."""
    match get_origin(annotation):
        case origin if origin is Annotated:
            return _kinds(get_args(annotation)[0])
        case origin if origin in (Union, UnionType):
            return set().union(*map(_kinds, get_args(annotation)))
    return {annotation}


def require_none(conflicts: Iterable[str]) -> None:
    """ValueError that names all `conflicts` between keys, unless there are none."""
    if messages := list(conflicts):
        raise ValueError("; ".join(messages))


def parse_tokens(value: Any) -> Any:
    """The number of tokens that a string such as "131072", "128K" (128 * 1024) or "1M" (1024 * 1024) stands for.

    Values that are not strings are returned unchanged. Any other string is a ValueError.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:_[0-9]+)*)\s*([kKmM]?)\s*", value)
    if match is None:
        raise ValueError(f"{value!r} is not a number of tokens; write for example 131072, 128K or 1M")
    return int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()]


TokenCount = Annotated[int, BeforeValidator(parse_tokens)]
# Bounds that turn a typing error into an error message instead of exhausted memory.
Tokens = Annotated[TokenCount, Field(ge=16, le=2**24)]  # in a row
Steps = Annotated[int, Field(ge=1, le=10**9)]
# Learning rates. A smaller one moves no weight of float32, and AdamW's numbers overflow with a much larger one.
Rate = Annotated[float, Field(ge=1e-12, le=10**6)]
SEAL = "seal"
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range that random number generators accept


LEVELS = 128  # largest depth of nested objects and lists
_TOO_DEEP = f"it is nested too deeply, in more than {LEVELS} levels"


def parse_json(text: str) -> Any:
    """The value of a JSON text, as `json.loads` returns it.

    Raises:
        ValueError: invalid JSON (a JSONDecodeError, which has a position), a duplicate key, or too deep nesting. The
            message has one line.
    """
    try:
        return _require_shallow(json.loads(text, object_pairs_hook=_require_unique_keys, parse_float=_number))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def scan_json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that starts at position `start`, and its end. Errors are those of `parse_json`."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    return _require_shallow(value), end


def seal_json(content: dict[str, Any]) -> str:
    """`content` as JSON text with a hash of itself under the key "seal", with which `parse_sealed` detects damage."""
    return json.dumps(content | {SEAL: _hash(content)}, indent=1) + "\n"


def parse_sealed(text: str, required: bool = True) -> dict[str, Any]:
    """The content that `seal_json` wrote. ValueError if the text has changed since, or lacks a required seal."""
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    seal = content.pop(SEAL, None)
    if (required or seal is not None) and seal != _hash(content):
        raise ValueError("it was changed after it was written")
    return content


def _hash(content: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(content))  # makes all keys strings, so that they can be sorted
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def parse_yaml(text: str) -> Any:
    """The value of a YAML document, as `yaml.safe_load` returns it.

    Raises:
        ValueError: invalid YAML, a duplicate key, or a value that Python cannot represent. The message has one line.
    """
    try:
        return _require_shallow(yaml.load(text, _UniqueKeys))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _require_shallow(value: Any) -> Any:
    """The value; ValueError if it is nested so deeply that recursive code would fail on it."""
    level = [value]
    for _ in range(LEVELS):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [item for container in containers for item in _items(container)]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


def _items(container: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _require_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return value


class Rounded(float):
    """A number whose JSON text has more digits than a float holds."""


def _number(text: str) -> float:
    value = float(text)
    if len(text) <= 17:
        return value
    digits = re.sub(r"[eE].*|[^0-9]", "", text).strip("0")
    return Rounded(value) if len(digits) > 17 and Decimal(text) != Decimal(value) else value


_DECODER = json.JSONDecoder(object_pairs_hook=_require_unique_keys, parse_float=_number)


class _UniqueKeys(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # At this point, merges (<<), which may repeat keys, have not been applied yet.
        node = super().compose_mapping_node(anchor)
        seen = set()
        switches = []
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                name = self.construct_object(key)
                if name in seen:
                    raise ValueError(f"the key {name!r} occurs twice, again in line {key.start_mark.line + 1}")
                seen.add(name)
                switches += [key] if isinstance(name, bool) else []
        for key in switches[:1]:
            raise ValueError(
                f"the key {key.value!r} in line {key.start_mark.line + 1} means true or false in YAML; quote it"
            )
        return node

    def construct_scalar(self, node: Any) -> Any:
        """The text of a scalar. ValueError for numbers that YAML 1.1 does not read as the decimal numbers they seem."""
        value = super().construct_scalar(node)
        if node.tag in _NUMBER_TAGS and _NOT_DECIMAL.match(value):
            raise ValueError(
                f"{value} in line {node.start_mark.line + 1} is a number in base {60 if ':' in value else 8} in YAML; "
                "quote it, or write the decimal number without a leading 0"
            )
        return value


_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_NOT_DECIMAL = re.compile(r"[-+]?(?:0[0-7_]*[0-7]$|[0-9_]+:)")


def require_text(value: Any, place: str) -> None:
    """HmfError if `value` has a string with a lone surrogate, a number that JSON or a float cannot represent, or a
    value of a type that JSON does not have, such as a date of a table."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                surrogate = f"\\u{ord(value[error.start]):04x}"
                raise HmfError(
                    f"{place}: a lone surrogate ({surrogate}) is not valid text; remove or replace it"
                ) from None
    elif isinstance(value, dict):
        for name, item in value.items():
            require_text(name, f"a key of {place}")
            require_text(item, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            require_text(item, f"{place}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise HmfError(f"{place}: {value} is not a valid JSON number; remove or replace it")
    elif isinstance(value, Rounded):
        raise HmfError(f"{place}: the number has more digits than are kept ({value!r}); round it, or write it as text")
    elif value is not None and not isinstance(value, int | float):
        raise HmfError(f"{place}: JSON has no values of type {type(value).__name__} ({value!r:.40}); write it as text")
