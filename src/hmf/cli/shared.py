# SPDX-License-Identifier: Apache-2.0
"""What commands of several modules share: how help looks, and options that mean the same everywhere."""

from __future__ import annotations

from glob import has_magic
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hmf import hub
from hmf.errors import HmfError
from hmf.folders import find_recipe, resolve_base

Dtype = Literal["float32", "bfloat16"]
NativeFormat = Literal["qwen3_5"]
Out = Annotated[Path, typer.Option(help="New directory for the result.")]
RecipeFile = Annotated[
    Path,
    typer.Argument(parser=find_recipe, help='YAML recipe, or one by name, as "quickstart".', metavar="RECIPE.yaml"),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="In place of what the recipe says; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Left out: cuda if there is one.")]
Mixer = Annotated[str, typer.Option(help="Layer type that replaces attention.")]
Ratio = Annotated[float | None, typer.Option(help="Share of layers to replace.")]
MODEL = 'Checkpoint directory, model of the Hub (Qwen/Qwen3-8B@revision), or "teacher".'
CONFIG = f"{MODEL} Its config.json is enough."
PATTERN = "One symbol a layer, joined by '-': * keeps attention; GDN, GKA, M2, BMF and SWA replace it."


def tokens(help: str, least: int = 1) -> Any:
    """An option for a number of tokens, which may be written as 128K or 1M."""

    def parse(value: str | int) -> int:
        from hmf.config.strict import parse_tokens

        try:
            number = parse_tokens(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        if number < least:
            raise typer.BadParameter(f"{number} is less than {least}")
        return number

    return typer.Option(parser=parse, metavar="TOKENS", help=help)


BatchedTokens = Annotated[int, tokens("vLLM's --max-num-batched-tokens.")]
Compose = Annotated[
    str | None,
    typer.Option(metavar="KEYS,STATES", help='Process chunks of long prompts apart, as in "concatenated,fused".'),
]
ComposeChunk = Annotated[
    int, tokens("Of a chunk, with --compose: prefix, chunk and answer fit the trained length.", 16)
]


def composition(compose: str | None, chunk: int) -> Any:
    """The `Composition` that the options --compose and --compose-chunk give; None without the first."""
    if compose is None:
        return None
    from hmf.evaluation.chunks import Composition

    return Composition.parse(compose, chunk=chunk)


def found(settings: Any, key: str) -> Any:
    """A recipe with the checkpoint that `key` names as a directory; imports nothing that takes seconds.

    HmfError, with the key, where there is none, and for data that is not there.
    """
    name = getattr(settings, key)
    require_data(settings)
    try:
        return settings.model_copy(update={key: type(name)(resolve_base(str(name)))})
    except HmfError as error:
        raise HmfError(f"{key}: {error}") from None


def group(help: str, **options: Any) -> typer.Typer:
    """Commands under one name; without one of them it prints its help."""
    return typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=help, **options)


def epilog(*examples: str) -> str:
    return "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples)])


def require_data(settings: Any, prefix: str = "") -> None:
    """HmfError where a recipe reads a file or folder that is not there; what is in it is looked at later."""
    from hmf.config.places import PlaceSettings
    from hmf.config.runs import DataSettings
    from hmf.config.strict import Settings

    for name in type(settings).model_fields:
        value, key = getattr(settings, name), f"{prefix}{name}"
        is_place = isinstance(settings, PlaceSettings) and name == "path"
        if is_place or (isinstance(settings, DataSettings) and name in ("prepared", "text")):
            text = str(value or "stdlib")
            if text != "stdlib" and not has_magic(text) and not hub.is_data(text) and not Path(text).exists():
                raise HmfError(f"{key}: {text}: no such file or folder")
        for index, section in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(section, Settings):
                require_data(section, f"{key}." if index is None else f"{key}.{getattr(section, 'title', index)}.")
