# SPDX-License-Identifier: Apache-2.0
"""`hmf data`: prepare and show training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hmf import processors
from hmf.cli.shared import Overrides, RecipeFile, command, epilog, group, require_data, tokens
from hmf.errors import HmfError
from hmf.folders import find_recipe, resolve_base

app = group("Prepare and show training data.")


@app.command(
    name="prepare",
    epilog=epilog(
        "hmf data prepare recipes/data/recipe.yaml",
        "hmf data prepare recipe.yaml --workers 16 --set sequence_length=32768 --set output=runs/data-32k",
    ),
)
def data_prepare(
    recipe: RecipeFile,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes, which does not change the result. Default: all cores."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Tokenise, mix and pack documents into rows for training.

    Documents are texts and conversations. An interrupted run continues.
    """
    from hmf.config.data import DataRecipe
    from hmf.config.runs import load_recipe

    settings = load_recipe(recipe, DataRecipe, overrides or ())
    tokenizer = _tokenizer(settings.tokenizer)  # before imports that take seconds
    require_data(settings)

    from hmf.data.prepare import prepare
    from hmf.report.samples import print_counts

    print_counts(prepare(settings, tokenizer, workers or processors.count()))
    typer.echo(f"saved {settings.output}; show it: {command()} data show {settings.output}")
    typer.echo(f"to train on it, write into a recipe: data: {{prepared: {settings.output}}}")


@app.command(
    name="show", epilog=epilog("hmf data show recipes/data/recipe.yaml", "hmf data show runs/data --samples 5")
)
def data_show(
    source: Annotated[
        Path,
        typer.Argument(
            parser=find_recipe,
            help="Recipe that is not prepared yet, or output folder of prepare.",
            metavar="RECIPE|DIR",
        ),
    ],
    samples: Annotated[int, typer.Option(min=0, help="Documents to print; for a recipe, of each source.")] = 3,
    tokens: Annotated[int, tokens("Tokens to print of a document; the middle of longer ones is omitted.", 8)] = 400,
    records: Annotated[int, typer.Option(min=1, help="For a recipe: records of each source to read and count.")] = 200,
    overrides: Overrides = None,
) -> None:
    """Print documents as the model reads them, and counts.

    Supervised text, which the model learns to write, is marked.
    """
    if source.is_dir():
        from hmf.report.samples import show_prepared

        return show_prepared(source, _tokenizer, samples, tokens)

    from hmf.config.data import DataRecipe
    from hmf.config.runs import load_recipe

    settings = load_recipe(source, DataRecipe, overrides or ())
    tokenizer = _tokenizer(settings.tokenizer)
    require_data(settings)

    from hmf.report.samples import show_recipe

    show_recipe(settings, tokenizer, samples, tokens, records)


def _tokenizer(name: str) -> Path:
    try:
        return resolve_base(name, weights=False)
    except HmfError as error:
        raise HmfError(f"tokenizer: {error}") from None
