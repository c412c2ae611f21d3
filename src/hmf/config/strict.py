# SPDX-License-Identifier: Apache-2.0
"""What people write is read strictly: an unknown key, or the same key twice, is an error and never passed over."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from hmf.errors import HmfError


class Settings(BaseModel):
    """Base of every recipe section."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def require_none(conflicts: Iterable[str]) -> None:
    """ValueError that names all of the `conflicts` between keys, if there is one."""
    if found := list(conflicts):
        raise ValueError("; ".join(found))


def parse_tokens(value: Any) -> Any:
    """A number of tokens from "128K" (128 * 1024) or "1M" (1024 * 1024); what is no text stays as it is.

    ValueError for any other text.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:_[0-9]+)*)\s*([kKmM]?)\s*", value)
    if match is None:
        raise ValueError(f"{value!r} is no number of tokens; write for example 131072, 128K or 1M")
    return int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()]


TokenCount = Annotated[int, BeforeValidator(parse_tokens)]
# Bounds by which a slip of the pen ends in an error and not in a machine without memory.
Tokens = Annotated[TokenCount, Field(ge=16, le=2**24)]  # of a row
Steps = Annotated[int, Field(ge=1, le=10**9)]
SEAL = "seal"
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what random number generators take


LEVELS = 128  # of objects and lists in each other
_DEEP = f"it is nested too deeply, in more than {LEVELS} levels"


def parse_json(text: str) -> Any:
    """The value of a JSON text, as `json.loads` gives it.

    Raises:
        ValueError: with a message of one line (JSONDecodeError where it has a position); also for an object that has
            the same key twice, and for what is nested too deeply to be read.
    """
    try:
        return _shallow(json.loads(text, object_pairs_hook=_unique))
    except RecursionError:
        raise ValueError(_DEEP) from None


def scan_json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends; errors as of `parse_json`."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError(_DEEP) from None
    return _shallow(value), end


def seal_json(content: dict[str, Any]) -> str:
    """`content` as JSON text with its own hash under the key "seal", by which `parse_sealed` knows damage."""
    return json.dumps(content | {SEAL: _hash(content)}, indent=1) + "\n"


def parse_sealed(text: str, required: bool = True) -> dict[str, Any]:
    """The content that `seal_json` was given; ValueError where the text has changed, or lacks a required seal."""
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("it is no object")
    seal = content.pop(SEAL, None)
    if (required or seal is not None) and seal != _hash(content):
        raise ValueError("it is not as it was written")
    return content


def _hash(content: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(content))  # keys are text, and sorted as such
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def parse_yaml(text: str) -> Any:
    """The value of a YAML document, as `yaml.safe_load` gives it.

    Raises:
        ValueError: with a message of one line; also for a mapping that has the same key twice, and for values that YAML
            knows and Python does not.
    """
    try:
        return _shallow(yaml.load(text, _UniqueKeys))
    except RecursionError:
        raise ValueError(_DEEP) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _shallow(value: Any) -> Any:
    """The value; ValueError for one that code which calls itself for each level could not go through."""
    level = [value]
    for _ in range(LEVELS):
        lists = [item for item in level if isinstance(item, dict | list)]
        level = [item for one in lists for item in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return value
    raise ValueError(_DEEP)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


class _UniqueKeys(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here keys are as they were written: merges (<<), which may repeat keys, come later.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                name = self.construct_object(key)
                if name in seen:
                    raise ValueError(f"the key {name!r} is there twice, again in line {key.start_mark.line + 1}")
                seen.add(name)
        return node


def require_text(value: Any, place: str) -> None:
    """HmfError for a string in `value` that holds half of a character, and for a number that JSON does not have."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(value[error.start]):04x}"
                raise HmfError(f"{place}: a lone surrogate ({half}) is no text; remove or replace it") from None
    elif isinstance(value, dict):
        for name, item in value.items():
            require_text(name, f"a key of {place}")
            require_text(item, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            require_text(item, f"{place}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise HmfError(f"{place}: {value} is no number that JSON has; remove or replace it")
