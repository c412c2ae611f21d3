# SPDX-License-Identifier: Apache-2.0
"""The stages from a Transformer to a Hybrid: `hmf init`, `distill`, `export`, `finetune`, all of it by `prime`."""

from __future__ import annotations

from typing import Annotated

import typer

from hmf.cli.shared import MODEL, PATTERN, Dtype, Mixer, NativeFormat, Out, Overrides, RecipeFile, epilog, found, group
from hmf.errors import HmfError
from hmf.folders import find_recipe, require_unused, resolve_base

app = group("")


@app.command(
    epilog=epilog(
        "hmf init teacher --mixer gdn --ratio 0.5 --out runs/stage0",
        "hmf init ./Qwen3-8B --mixer gdn --layers 1,3,5-9 --out runs/stage0",
        'hmf init ./Qwen3-8B --pattern "*-GDN-*-GDN" --out runs/stage0',
    )
)
def init(
    base: Annotated[str, typer.Argument(help=f"Transformer. {MODEL}")],
    out: Out,
    mixer: Mixer = "gdn",
    ratio: Annotated[float | None, typer.Option(help="Share of layers to replace, spread evenly.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to replace, for example 1,3,5-7.")] = None,
    pattern: Annotated[str | None, typer.Option(help=PATTERN)] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the tensors that start at random.")] = 0,
) -> None:
    """Stage 0: start mixers from attention.

    The result is a fused checkpoint, in which the frozen teacher stays beside the mixers. So its pattern marks every
    symbol: `*DA` is a layer that keeps its attention, and `GDN*` one whose mixer learns beside its attention, which
    `hmf export` drops.
    """
    from pydantic import ValidationError

    from hmf.config.pattern import parse_layer_list
    from hmf.config.runs import HybridSettings

    chosen = list(parse_layer_list(layers)) if layers is not None else None
    try:
        settings = HybridSettings(mixer=mixer, ratio=ratio, layers=chosen, pattern=pattern)
    except ValidationError:
        raise HmfError("give exactly one of --ratio, --layers and --pattern") from None
    require_unused(out)
    source = resolve_base(base)

    from hmf.priming.stage0 import base_layers, make_stage0

    report = make_stage0(source, settings.layer_pattern(base_layers(source)), out, seed=seed)
    typer.echo(report.describe())
    typer.echo("*DA: a layer that keeps attention; GDN* and so on: a mixer beside the attention that it learns from")
    typer.echo(f"saved {out}; next: hmf distill RECIPE.yaml with model: {out}")


@app.command(
    epilog=epilog(
        "hmf select teacher --keep 3 --out runs/select",
        "hmf select teacher --ratio 0.5 --method kl --out runs/select-kl --set select.layerwise_steps=80",
        "hmf select ./Qwen3-8B --keep 18 --method scores --set select.scores=scores.csv --out runs/by-file",
    )
)
def select(
    base: Annotated[str, typer.Argument(help=f"Transformer. {MODEL}")],
    out: Out,
    keep: Annotated[int | None, typer.Option(min=0, help="Layers that keep attention.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of layers to replace, in place of --keep.")] = None,
    method: Annotated[str | None, typer.Option(help="supernet, greedy, kl, window, uniform or scores.")] = None,
    mixer: Annotated[str | None, typer.Option(help="Layer type that replaces attention.")] = None,
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE.yaml", help="Of hmf prime: its data, Stage 1 and section select are used.")
    ] = "quickstart",
    overrides: Overrides = None,
) -> None:
    """Choose the layers that keep attention.

    Data, training and method are those of a prime RECIPE. Continues where it stopped. `hybrid.layers: auto` in a recipe
    does the same inside `hmf prime`.
    """
    if (keep is None) == (ratio is None):
        raise HmfError("give exactly one of --keep and --ratio")
    source = resolve_base(base)

    from hmf.config.pattern import Pattern
    from hmf.config.runs import PrimeRecipe, read_recipe
    from hmf.priming.stage0 import base_layers
    from hmf.report.curves import draw_curves
    from hmf.report.selection import draw_selection, print_selection
    from hmf.selection.run import select as run
    from hmf.training.run import run_folder

    layers = base_layers(source)
    if keep is None:
        keep = layers - len(Pattern.generate(layers, "gdn", ratio).replaced)
    if keep >= layers:
        raise HmfError(f"--keep: {keep} is not below {layers}, the model's layers")
    given = {
        "base": source,
        "output": out,
        "hybrid.pattern": "null",
        "hybrid.layers": "auto",
        "hybrid.ratio": (layers - keep) / layers,
        "hybrid.mixer": mixer,
        "select.method": method,
    }
    changes = [f"{key}={value}" for key, value in given.items() if value is not None]
    settings, text = read_recipe(find_recipe(recipe), PrimeRecipe, [*changes, *(overrides or ())])
    settings = found(settings, "base")
    with run_folder(settings.output, text):
        selection = run(source, layers, keep, settings, settings.output, draw_selection, draw_curves)
    print_selection(selection)
    replaced = ",".join(map(str, selection["replaced"]))
    typer.echo(
        f"saved {settings.output}/selection.json; next: hmf init {base} --mixer {selection['mixer']} "
        f"--layers {replaced} --out runs/stage0"
    )


@app.command(epilog=epilog("hmf distill recipes/distill/recipe.yaml"))
def distill(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Stage 1: train the mixers to do what attention does.

    Continues where it stopped.
    """
    from hmf.config.runs import DistillRecipe, read_recipe

    settings, text = read_recipe(recipe, DistillRecipe, overrides or ())
    settings = found(settings, "model")  # before imports that take seconds

    from hmf.report.curves import draw_curves
    from hmf.training.distill import distill as run
    from hmf.training.run import run_folder

    with run_folder(settings.output, text) as first:
        saved = run(settings.model, settings.output, settings, settings.seed, draw=draw_curves)
    if first:
        typer.echo(f"saved {saved}; next: hmf export {saved} --out {settings.output}/model")


@app.command(
    epilog=epilog(
        "hmf export runs/distill/stage1 --out runs/distill/model --dtype bfloat16",
        "hmf export runs/distill/stage1 --out runs/distill/native --format qwen3_5",
    )
)
def export(
    fused: Annotated[str, typer.Argument(help=f"Fused: the result of init or distill. {MODEL}")],
    out: Out,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; left out: as stored.")] = None,
    format: Annotated[NativeFormat | None, typer.Option(help="Stock architecture; left out: a Hybrid.")] = None,
) -> None:
    """Drop the teacher: write a plain Hybrid.

    With `--format`, the same model in a stock architecture; see `hmf convert`.
    """
    require_unused(out)
    source = resolve_base(fused)

    import torch

    from hmf.model.checkpoint import save_checkpoint
    from hmf.model.native import save_native
    from hmf.priming.export import export as run

    run(source, out, getattr(torch, dtype) if dtype else None, save_native if format else save_checkpoint)
    typer.echo(f"saved {out}; load it with AutoModelForCausalLM{'' if format else ' after `import hmf`'}")


@app.command(
    epilog=epilog(
        "hmf finetune recipes/quickstart/cpt.yaml",
        "hmf finetune recipes/quickstart/sft.yaml --set training.max_steps=20 --set output=runs/try",
    )
)
def finetune(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Stage 2: train a plain Hybrid on.

    More pretraining, conversations or preferences. Continues where it stopped.
    """
    from hmf.config.runs import FinetuneRecipe, read_recipe

    settings, text = read_recipe(recipe, FinetuneRecipe, overrides or ())
    settings = found(settings, "model")

    from hmf.report.curves import draw_curves
    from hmf.training.finetune import check
    from hmf.training.finetune import finetune as run
    from hmf.training.run import run_folder

    check(settings)  # before the output folder becomes this recipe's
    with run_folder(settings.output, text) as first:
        saved = run(settings, draw=draw_curves)
    if first:
        typer.echo(f"saved {saved}; next: hmf evaluate {saved}, hmf chat {saved}")


@app.command(
    epilog=epilog(
        "hmf prime quickstart",
        "hmf prime recipes/quickstart/recipe.yaml --set hybrid.mixer=gka --set output=runs/gka",
    )
)
def prime(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """The whole job: init, distil, export, evaluate.

    All under one run folder; steps already done are not done again.
    """
    from hmf.config.runs import PrimeRecipe, read_recipe

    settings, text = read_recipe(recipe, PrimeRecipe, overrides or ())
    settings = found(settings, "base")

    from hmf.pipeline import prime as run
    from hmf.report.table import next_commands, print_scores

    scores = run(settings, text, say=typer.echo)
    if scores:  # none in the processes that only train along
        print_scores(scores)
        typer.echo(next_commands(settings.output))


@app.command(epilog=epilog("hmf pretrain recipes/teacher/recipe.yaml"))
def pretrain(recipe: RecipeFile) -> None:
    """Train a tiny teacher and its tokenizer from scratch.

    So the embedded one was made.
    """
    from hmf.training.pretrain import main as run

    run(str(recipe))
