# SPDX-License-Identifier: Apache-2.0
"""What commands of several modules share: how help looks, and options that mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Dtype = Literal["float32", "bfloat16"]
Out = Annotated[Path, typer.Option(help="New directory for the result.")]
RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe; see recipes/.", metavar="RECIPE.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="In place of what the recipe says; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Left out: cuda if there is one.")]
Mixer = Annotated[str, typer.Option(help="Layer type that replaces attention.")]
Ratio = Annotated[float | None, typer.Option(help="Share of layers to replace.")]
BatchedTokens = Annotated[int, typer.Option(min=1, help="vLLM's --max-num-batched-tokens.")]


def group(help: str, **options: Any) -> typer.Typer:
    """Commands under one name; without one of them it prints its help."""
    return typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help=help, **options)


def epilog(*examples: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"`{example}`" for example in examples)
