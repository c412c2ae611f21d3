# SPDX-License-Identifier: Apache-2.0
"""What commands of several modules share: how help looks, and options that mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hmf.folders import find_recipe, resolve_base

Dtype = Literal["float32", "bfloat16"]
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


def found(settings: Any, key: str) -> Any:
    """A recipe with the checkpoint that `key` names as a directory; HmfError, with the key, where there is none."""
    from hmf.errors import HmfError

    name = getattr(settings, key)
    try:
        return settings.model_copy(update={key: type(name)(resolve_base(str(name)))})
    except HmfError as error:
        raise HmfError(f"{key}: {error}") from None


def group(help: str, **options: Any) -> typer.Typer:
    """Commands under one name; without one of them it prints its help."""
    return typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=help, **options)


def epilog(*examples: str) -> str:
    return "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples)])
