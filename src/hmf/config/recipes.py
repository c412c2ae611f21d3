# SPDX-License-Identifier: Apache-2.0
"""Reading recipes: YAML files that describe runs. An unknown key is an error that suggests the closest valid key."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from hmf.errors import HmfError, listed, notice, rewriting, unknown_name
from hmf.folders import HOLDER, RECIPE

from .data import DataRecipe
from .runs import DistillRecipe, FinetuneRecipe, PrimeRecipe
from .strict import Settings, parse_yaml
from .training import ALTERNATIVES, RENAMED

Recipe = TypeVar("Recipe", bound=Settings)
COMMANDS: dict[str, type[Settings]] = {
    "hmf prime": PrimeRecipe,
    "hmf distill": DistillRecipe,
    "hmf finetune": FinetuneRecipe,
    "hmf data prepare": DataRecipe,
}
# Messages of pydantic that name its classes.
_PLAIN = {
    "model_type": "a section of keys is expected",
    "path_type": "a path is expected; quote it",
    "invalid_key": "a key must be text; quote it",
    "invalid-json-value": "a value of JSON is expected; quote it, as YAML reads 2024-07-26 as a date",
}
SHOWN = 20  # largest number of errors of a recipe in one message


def load_recipe(path: str | Path, kind: type[Recipe], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a YAML recipe; HmfError names the file, the key and the fix."""
    return read_recipe(path, kind, overrides)[0]


def read_recipe(path: str | Path, kind: type[Recipe], overrides: Sequence[str] = ()) -> tuple[Recipe, str]:
    """Read and check a YAML recipe.

    Args:
        overrides: "KEY=VALUE" for keys such as hybrid.mixer, with values in YAML; they replace values of the file.
    Returns:
        The recipe, and its text: that of the file or, with overrides, the YAML text that includes them.
    Raises:
        HmfError: names the file, the key and the fix.
    """
    path = Path(path)
    if path.is_dir():
        names = listed(sorted(file.name for file in path.glob("*.yaml")), SHOWN)
        raise HmfError(f"{path}: is a folder; give {f'one of its recipes: {names}' if names else 'a recipe'}")
    if not path.is_file():
        raise HmfError(f"{path}: no such recipe file; correct the path")
    try:
        text = path.read_text(encoding="utf-8")
        content = parse_yaml(text)
    except OSError as error:
        raise HmfError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise HmfError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise HmfError(f"{path}: a recipe must be a YAML mapping with the keys {', '.join(kind.model_fields)}")
    if not content.keys() <= kind.model_fields.keys():
        fitting = [command for command, other in COMMANDS.items() if content.keys() <= other.model_fields.keys()]
        if len(fitting) > 1:
            fitting = [command for command in fitting if _required(COMMANDS[command]) <= content.keys()]
        if len(fitting) == 1:
            raise HmfError(f"{path}: is a recipe of `{fitting[0]}`; give it to that command")
    for override in overrides:
        _override(content, override)
    if overrides:
        text = yaml.safe_dump(content, sort_keys=False)
    try:
        return kind.model_validate(content, context={"file": path}), text
    except ValidationError as error:
        raise HmfError(f"{_named(path, overrides)}: {_problems(error, kind)}") from None


def read_run(path: str | Path, kind: type[Recipe], overrides: Sequence[str] = ()) -> tuple[Recipe, str]:
    """`read_recipe` for a run. The recipe in a run's folder continues that run, also if the folder was moved or the
    command is started in another directory, where a relative `output` would be another folder."""
    recipe, text = read_recipe(path, kind, overrides)
    path, output = Path(path), recipe.output  # type: ignore[attr-defined]  # every run has one
    # Only what nobody else writes beside a recipe: the log of a training, and what a killed process leaves.
    begun = path.name == RECIPE and any(any(path.parent.glob(name)) for name in ("*.log.json", HOLDER))
    named = any(override.startswith("output=") for override in overrides)
    if not begun or named or output.resolve() == path.parent.resolve():
        return recipe, text
    notice(f"{path}: continues the run in its folder, not in output, {output}; --set output=DIR starts another run")
    return recipe.model_copy(update={"output": path.parent}), text


def _required(kind: type[Settings]) -> set[str]:
    return {name for name, field in kind.model_fields.items() if field.is_required()}


def _named(path: str | Path, overrides: Sequence[str]) -> str:
    return f"{path} with {' '.join(overrides):.200}" if overrides else str(path)


def naming_recipe(
    path: str | Path, kind: type[Settings], overrides: Sequence[str] | None = None
) -> AbstractContextManager[None]:
    """In the block, messages that begin with a key of the recipe, or of one of its sections, name the file and the
    whole key: `pattern: ...` becomes `recipe.yaml: hybrid.pattern: ...`."""

    def rewrite(line: str) -> str:
        key = re.match(r"\w+(\.[\w-]+)*(?=: )", line)
        section = key and next((place for place in _sections(kind) if _has_key(place[1], key[0].split("."))), None)
        return f"{_named(path, overrides or ())}: {section[0]}{line}" if section else line

    return rewriting(rewrite)


def _sections(kind: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The recipe and its sections, outer ones first, each with what precedes its keys, such as "distill.data."."""
    found = [("", kind)]
    for prefix, section in found:
        yield prefix, section
        fields = section.model_fields.items()
        found += [(f"{prefix}{name}.", inner) for name, field in fields if (inner := _model(field.annotation))]


def _has_key(kind: type[BaseModel] | None, path: Sequence[str]) -> bool:
    """Whether a section has the key at `path`; of a key without keys of its own, such as a mapping, any part fits, and
    so does the name of an item of a list."""
    if kind is None or not path:
        return True
    if path[0] not in kind.model_fields:
        return False
    annotation = kind.model_fields[path[0]].annotation
    return _has_key(_model(annotation), path[2 if get_origin(annotation) is list else 1 :])


def _model(annotation: Any) -> type[BaseModel] | None:
    """The section that a field with this type holds: of X | None it is X."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((inner for part in get_args(annotation) if (inner := _model(part))), None)


def _override(content: dict[str, Any], override: str) -> None:
    """Set the value of "a.b=value" in `content`."""
    name, equals, value = override.partition("=")
    *sections, key = name.split(".")
    if not (equals and key and all(sections)):
        raise HmfError(
            f"--set {override:.200}: write KEY=VALUE with the full path of the key, for example hybrid.mixer=gka"
        )
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise HmfError(f"--set {override:.200}: {section!r} is a value in this recipe and has no keys")
    try:
        content[key] = parse_yaml(value)
    except ValueError as error:
        raise HmfError(f"--set {override:.200}: the value is not valid YAML ({error}); quote it") from None
    if sections[-1:] == ["training"]:  # a value replaces the file's under its other name too
        present = RENAMED.get(key, key)
        for name in list(content):
            if name != key and RENAMED.get(name, name) in (present, ALTERNATIVES.get(present)):
                del content[name]


def _problems(error: ValidationError, kind: type[BaseModel]) -> str:
    """All errors in one line. Several errors are numbered."""
    # Unknown keys come first: a missing key is often a misspelt one.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    lines = list(dict.fromkeys(_problem(problem, kind) for problem in problems))
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} errors: " + listed((f"({n}) {line}" for n, line in enumerate(lines, 1)), SHOWN, "; ")


def _problem(problem: Any, kind: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in problem["loc"] if part != "[key]")  # pydantic's mark of a mapping's key
    if problem["type"] == "extra_forbidden":
        section = _section(kind, problem["loc"][:-1])
        prefix = ".".join(str(part) for part in problem["loc"][:-1])
        name = str(problem["loc"][-1])
        if (present := RENAMED.get(name)) in section.model_fields:
            return f"{prefix}: {name} is the former name of {present}; give only {present}"
        inner = [f"{key}.{name}" for key in section.model_fields if name in _fields(_section(section, [key]))]
        unknown = unknown_name("key", name, section.model_fields)
        if inner and "did you mean" not in unknown:
            unknown = f"unknown key {name!r}; did you mean {inner[0]!r}?"
        return f"{prefix + ': ' if prefix else ''}{unknown}"
    if problem["type"] == "missing":
        return f"{where}: is missing"
    message = _PLAIN.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    shown = f" (got {value!r:.200})" if isinstance(value, str | int | float | bool | type(None)) else ""
    return f"{where + ': ' if where else ''}{message}{shown}"


def _section(kind: type[Any], location: Sequence[int | str]) -> type[Any]:
    for name in location:
        if isinstance(name, str):  # an item of a list has the class of the list's items
            annotation: Any = kind.model_fields[name].annotation
            while get_args(annotation):  # X | None, list[X]
                annotation = get_args(annotation)[0]
            kind = annotation
    return kind


def _fields(kind: Any) -> Collection[str]:
    """Names of the keys of a section; none if `kind` is the type of a value."""
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else ()
