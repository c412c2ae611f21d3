# SPDX-License-Identifier: Apache-2.0
"""`hmf data`: prepare and show training data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from hmf import processors
from hmf.cli.shared import (
    MODEL,
    Device,
    Dtype,
    Overrides,
    RecipeFile,
    command,
    count,
    epilog,
    group,
    require_data,
    tokens,
    typed,
)
from hmf.errors import HmfError, rewriting, unknown_name
from hmf.folders import find_recipe, require_writable, resolve_base

app = group("Prepare and show training data.")


def _settings(recipe: Path, overrides: list[str] | None) -> tuple[Any, Path]:
    """The recipe and the folder of its tokenizer. HmfError if a source does not exist. Imports nothing that takes
    seconds."""
    from hmf.config.data import DataRecipe
    from hmf.config.recipes import load_recipe, naming_recipe

    settings = load_recipe(recipe, DataRecipe, overrides or ())
    with naming_recipe(recipe, DataRecipe, overrides):
        tokenizer = _tokenizer(settings.tokenizer)
        require_data(settings)
    return settings, tokenizer


def _recipe_or_rows(name: str) -> Path:
    try:
        return find_recipe(name)
    except HmfError as error:
        raise HmfError(f"{error}; or the output folder of hmf data prepare") from None


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
    settings, tokenizer = _settings(recipe, overrides)

    from hmf.data.prepare import prepare
    from hmf.report.samples import print_counts

    try:
        index = prepare(settings, tokenizer, workers or processors.count())
    except KeyboardInterrupt:
        raise KeyboardInterrupt("before the end; the same command continues") from None
    print_counts(index)
    typer.echo(f"saved {settings.output}; show it: {typed('data', 'show', settings.output)}")
    typer.echo(f"to train on it, write into a recipe: data: {{prepared: {settings.output}}}")


@app.command(
    name="show",
    epilog=epilog("hmf data show recipes/data/recipe.yaml", "hmf data show runs/data/prepared --samples 5"),
)
def data_show(
    source: Annotated[
        Path,
        typer.Argument(
            parser=_recipe_or_rows,
            help="Recipe that is not prepared yet, or output folder of prepare.",
            metavar="RECIPE|DIR",
        ),
    ],
    samples: Annotated[
        int, typer.Option(min=0, help="Documents to print; with a recipe, this number from each source.")
    ] = 3,
    tokens: Annotated[int, tokens("Tokens to print of a document; the middle of longer ones is omitted.", 8)] = 400,
    records: Annotated[int, typer.Option(min=1, help="With a recipe: records of each source to read and count.")] = 200,
    overrides: Overrides = None,
) -> None:
    """Print documents as the model reads them, and counts.

    Supervised text, which the model learns to write, is marked.
    """
    if source.is_dir():
        from hmf.report.samples import show_prepared

        return show_prepared(source, _tokenizer, samples, tokens)

    settings, tokenizer = _settings(source, overrides)

    from hmf.report.samples import show_recipe

    show_recipe(settings, tokenizer, samples, tokens, records)


@app.command(
    name="answers",
    epilog=epilog(
        "hmf data answers teacher --out runs/answers.jsonl",
        "hmf data answers ./Qwen3-8B --tasks arithmetic=3,recall=1 --samples 5000 --length 2048 --out answers.jsonl",
    ),
)
def data_answers(
    model: Annotated[str, typer.Argument(help=f"Model that answers. {MODEL}")],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="File of conversations; must not exist.")],
    tasks: Annotated[
        str, typer.Option(help="Generated tasks, each with its weight.")
    ] = "recall_many=3,recall=1,needle=1,arithmetic=1,tool_call=1",
    samples: Annotated[int, count("Prompts, half of them with thinking.", 10**6)] = 1000,
    length: Annotated[int, tokens("Largest length of a generated conversation.", 96)] = 512,
    max_new_tokens: Annotated[int, tokens("Largest length of an answer; longer answers are left out.")] = 512,
    batch_size: Annotated[int, count("Prompts per batch.")] = 16,
    only_correct: Annotated[bool, typer.Option("--only-correct", help="Leave out answers that are wrong.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the prompts.")] = 0,
    device: Device = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the weights. Default: as stored on a GPU, float32 on a CPU.")
    ] = None,
) -> None:
    """Let a model answer generated tasks, as training data.

    Answers are decoded greedily, and their thinking is kept. The prompts differ from those of `hmf evaluate`.
    """
    if out.exists():
        raise HmfError(f"{out}: exists; choose another file or remove it")
    require_writable(out.parent, "--out")
    source = resolve_base(model)  # before imports that take seconds
    weights = _weights(tasks)

    from hmf.data.tasks import require_template
    from hmf.data.tokenizer import load_tokenizer
    from hmf.evaluation.conversations import described, prompts, write_answers
    from hmf.evaluation.run import load_for_evaluation

    tokenizer = load_tokenizer(source)
    with rewriting(lambda message: f"--{message}"):
        require_template(weights, tokenizer)
    loaded = load_for_evaluation(source, device, dtype)
    asked = prompts(tokenizer, weights, samples, length, seed)
    counts = write_answers(loaded.eval(), tokenizer, out, asked, batch_size, max_new_tokens, only_correct)
    typer.echo(f"written: {described(counts)}")
    typer.echo(f"saved {out}; in a recipe of {command()} data prepare: {{path: {out}, messages_field: messages}}")


def _weights(text: str) -> dict[str, float]:
    """ "recall=2,needle" -> {"recall": 2.0, "needle": 1.0}. HmfError names what is wrong."""
    from hmf.data.tasks import TASKS

    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        if name not in TASKS:
            raise HmfError(f"--tasks: {unknown_name('task', name, TASKS)}")
        if name in weights:
            raise HmfError(f"--tasks: {name} is named twice; name it once, with its weight")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise HmfError(f"--tasks: {part.strip()}: give a weight above 0, such as {name}=2")
    return weights


def _tokenizer(name: str) -> Path:
    try:
        return resolve_base(name, weights=False)
    except HmfError as error:
        raise HmfError(f"tokenizer: {error}") from None
