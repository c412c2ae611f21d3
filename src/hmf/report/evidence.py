# SPDX-License-Identifier: Apache-2.0
"""The contents of a run folder that a model card is based on: scores, measured serving figures and recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from huggingface_hub import try_to_load_from_cache
from pydantic import Field, ValidationError

from hmf import hub
from hmf.config.recipes import read_recipe
from hmf.config.runs import DistillRecipe, FinetuneRecipe, PrimeRecipe
from hmf.config.strict import parse_sealed, parse_yaml
from hmf.errors import HmfError
from hmf.evaluation.results import Answered, Result, Scores, TaskResult, answers_of
from hmf.folders import ASSETS, EMBEDDED_TEACHER, RECIPE, is_place, reason

MODEL = "model"
TEACHER, PRIMED, STAGE0, BEFORE = "teacher", "primed", "stage0", "before"  # NAME of scores.NAME.json
Stage = PrimeRecipe | DistillRecipe | FinetuneRecipe


class ServingRow(Result):
    """The keys of a row of `hmf bench serving --json-file` that the card shows."""

    model: str
    context: Annotated[int, Field(ge=1)]
    sequences: Annotated[int, Field(ge=1)]
    filled: bool
    decode_tokens_per_second: Annotated[float, Field(gt=0)]
    mean_ttft: Annotated[float, Field(ge=0)]
    decode_ratio: float | None
    ttft_ratio: float | None


class Serving(Result):
    """A file serving*.json, written by `hmf bench serving --json-file`."""

    rows: Annotated[list[ServingRow], Field(min_length=1)]
    hardware: dict[str, str]
    options: list[list[str]]

    @property
    def ranks(self) -> int:
        """Number of GPUs per model."""
        arguments = self.options[0] if self.options else []
        name = "--tensor-parallel-size"
        return int(arguments[arguments.index(name) + 1]) if name in arguments[:-1] else 1


Content = TypeVar("Content", Scores, Serving)


@dataclass(frozen=True)
class Evidence:
    """A run folder and its checkpoint.

    Attributes:
        recipe: the run's recipe, if it is known already; otherwise it is read from the folder.
    """

    run: Path
    model: Path
    recipe: Stage | None = None

    @classmethod
    def of(cls, place: Path, recipe: Stage | None = None) -> Evidence:
        """The evidence in a run folder. `place` is that folder or the model's folder in it. Raises HmfError if there is
        no model."""
        if not place.is_dir():
            raise HmfError(f"{place}: no such run folder; give the output folder of hmf prime or hmf finetune")
        if (place / MODEL / "config.json").is_file():
            return cls(place, place / MODEL, recipe)
        if place.name == MODEL and (place / "config.json").is_file():
            return cls(place.parent, place, recipe)
        raise HmfError(f"{place}: has no {MODEL}/config.json; finish the run, or export its Stage 1 into this folder")

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """The scores by NAME of scores.NAME.json. Raises HmfError for a file that is invalid or was changed."""
        files = sorted(self.run.glob("scores.*.json"))
        return {file.name.removeprefix("scores.").removesuffix(".json"): _read(file, Scores) for file in files}

    @cached_property
    def answers(self) -> dict[str, dict[str, list[Answered]]]:
        """The stored answers, by NAME of scores.NAME.json and by task."""
        return {name: answers_of(self.run, name) for name in self.scores}

    @cached_property
    def serving(self) -> dict[str, Serving]:
        """The files serving*.json by name."""
        return {file.name: _read(file, Serving) for file in sorted(self.run.glob("serving*.json"))}

    @cached_property
    def stages(self) -> list[Stage]:
        """The recipes that led to the model, from first to last, without those whose run folder is missing."""
        recipes = [self.recipe or _recipe(self.run)]
        seen = {self.run.resolve()}
        while isinstance(first := recipes[0], FinetuneRecipe):
            previous_run = Path(first.model).parent
            if previous_run.resolve() in seen:
                break
            seen.add(previous_run.resolve())
            recipes.insert(0, _recipe(previous_run))
        return [stage for stage in recipes if stage is not None]

    @cached_property
    def base(self) -> str | None:
        """The Transformer that the model was made from, as the recipe names it; None if no recipe names it."""
        first = self.stages[0] if self.stages else None
        return first.base if isinstance(first, PrimeRecipe) else None

    @cached_property
    def hub_name(self) -> str | None:
        """Name of the base's repository on the Hub; None if the base is a folder or is unknown."""
        if self.base is None:
            return None
        cached = next((part for part in Path(self.base).parts if part.startswith("models--")), None)
        if cached:
            return cached.removeprefix("models--").replace("--", "/")
        model = hub.parse_model(self.base)
        if model is None or (not model.explicit and is_place(self.base)):
            return None
        return model.name

    @cached_property
    def base_folder(self) -> Path | None:
        """The folder of the base's files on this disk, if there is one."""
        if self.base is None or Path(self.base).is_dir():
            return Path(self.base) if self.base else None
        if self.base == EMBEDDED_TEACHER:
            return ASSETS / EMBEDDED_TEACHER
        file = try_to_load_from_cache(self.hub_name, "config.json") if self.hub_name else None
        return Path(file).parent if isinstance(file, str) else None

    @property
    def base_name(self) -> str:
        """Name of the base in the card's text."""
        return self.hub_name or (Path(self.base).name if self.base else "a Transformer that is not stated")

    def source(self, row: TaskResult) -> str | None:
        """Name of the harness's results file in the run folder from which a score comes, or None."""
        name = (row.model_extra or {}).get("source")
        known = isinstance(name, str) and name == Path(name).name and (self.run / name).is_file()
        return name if known else None

    @property
    def files(self) -> list[Path]:
        """The files that the card links to: results and recipe."""
        results = {*self.run.glob("scores.*.json"), *self.run.glob("serving*.json"), self.run / RECIPE}
        rows = [row for scores in self.scores.values() for row in scores.tasks.values()]
        results |= {self.run / name for row in rows if (name := self.source(row))}
        return sorted(file for file in results if file.is_file())


def _recipe(run: Path) -> Stage | None:
    file = run / RECIPE
    if not file.is_file():
        return None
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise HmfError(f"{file}: cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise HmfError(f"{file}: not valid YAML ({error})") from None
    keys = content if isinstance(content, dict) else {}
    if "base" in keys:
        return read_recipe(file, PrimeRecipe)[0]
    return read_recipe(file, FinetuneRecipe)[0] if "method" in keys else read_recipe(file, DistillRecipe)[0]


def _read(file: Path, kind: type[Content]) -> Content:
    what = "scores" if kind is Scores else "rows of hmf bench serving"
    fix = "remove it and create it again"
    try:
        content: Mapping[str, Any] = parse_sealed(file.read_text(encoding="utf-8"), required=False)
    except OSError as error:
        raise HmfError(f"{file}: cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise HmfError(f"{file}: has no valid {what}: {error}; {fix}") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise HmfError(f"{file}: {where}: {problem['msg']}; it has no valid {what}; {fix}") from None
