# SPDX-License-Identifier: Apache-2.0
"""The stages from a Transformer to a Hybrid: `hmf init`, `distill`, `export`, `finetune`; `prime` runs several."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from hmf.cli.shared import (
    DEFAULT_MIXER,
    HYBRID,
    MODEL,
    PATTERN,
    Dtype,
    Mixer,
    NativeFormat,
    Out,
    Overrides,
    RecipeFile,
    command,
    epilog,
    group,
    typed,
    with_checkpoint,
)
from hmf.errors import HmfError, unknown_name
from hmf.folders import find_recipe, require_unused, resolve_base

app = group("")


@app.command(
    epilog=epilog(
        "hmf init teacher --mixer gdn --ratio 0.5 --out runs/stage0",
        "hmf init ./Qwen3-8B --mixer gdn --layers 1,3,5-9 --out runs/stage0",
        'hmf init ./Qwen3-8B --pattern "*-GDN-*-GDN" --out runs/stage0',
        "hmf init ./Ministral-3-8B --text-only --ratio 0.5 --out runs/stage0",
    )
)
def init(
    base: Annotated[str, typer.Argument(help=f"Transformer. {MODEL}")],
    out: Out,
    mixer: Mixer = None,
    ratio: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of layers to replace, spread evenly, for example 0.5.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to replace, for example 1,3,5-7.")] = None,
    pattern: Annotated[str | None, typer.Option(help=PATTERN)] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the tensors that are initialised randomly.")
    ] = 0,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Use the language model of a Transformer that also reads images.")
    ] = False,
    start: Annotated[
        Literal["copied", "calibrated"],
        typer.Option(
            help="copied: tensors of the attention; calibrated: then fitted to the attention's output on --text."
        ),
    ] = "copied",
    text: Annotated[
        str, typer.Option(help="With --start calibrated: stdlib, or a folder or file of .py, .txt or .md text.")
    ] = "stdlib",
) -> None:
    """Stage 0: initialise mixers from attention.

    The result is a fused checkpoint, which holds the frozen teacher beside the mixers. In its pattern, `*DA` is an
    unchanged layer of the base, and `GDN*` is a layer with a mixer beside the attention that it learns from.
    `hmf export` drops that attention.
    """
    from hmf.config.pattern import parse_layer_list
    from hmf.config.runs import DataSettings, HybridSettings

    if start == "copied" and text != "stdlib":
        raise HmfError("--text is read with --start calibrated; give that, or leave --text out")
    if [ratio, layers, pattern].count(None) != 2:
        raise HmfError("give exactly one of --ratio, --layers and --pattern")
    if mixer is not None and pattern is not None:
        raise HmfError("--mixer: a pattern names the types itself; omit --mixer")
    chosen = list(parse_layer_list(layers)) if layers is not None else None
    settings = HybridSettings(
        mixer=DEFAULT_MIXER if mixer is None else mixer, ratio=ratio, layers=chosen, pattern=pattern, start=start
    )
    require_unused(out)
    source = resolve_base(base)

    from hmf.model.convert import base_pattern
    from hmf.priming.stage0 import base_config, make_stage0, text_of

    with text_of(source, out, typer.echo) if text_only else nullcontext(source) as language:
        layout = base_pattern(base_config(language), settings)
        data = DataSettings(text=text)
        report = make_stage0(language, layout, out, seed=seed, calibration=settings.calibrated, data=data)
    typer.echo(report.describe())
    typer.echo("*DA: an unchanged layer of the base; GDN* and so on: a mixer beside the layer that it learns from")
    model = f"model={out}"
    typer.echo(f"saved {out}; next: {typed('distill', 'RECIPE.yaml', '--set', model)}")


@app.command(
    epilog=epilog(
        "hmf select teacher --keep 3 --out runs/select",
        "hmf select teacher --ratio 0.5 --method kl --out runs/select-kl --set select.layerwise_steps=80",
        "hmf select ./Qwen3-8B --keep 18 --method scores --set select.scores=scores.csv --out runs/by-file",
    )
)
def select(
    base: Annotated[str, typer.Argument(help=f"Transformer. {MODEL}")],
    out: Annotated[Path, typer.Option(help="Output directory, to which the run is written.")],
    keep: Annotated[int | None, typer.Option(min=0, help="Number of layers that keep attention.")] = None,
    ratio: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of layers to replace, in place of --keep.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="How layers are chosen: supernet, greedy, kl, window, uniform or scores.")
    ] = None,
    mixer: Annotated[str | None, typer.Option(help="Layer type that replaces attention.")] = None,
    recipe: Annotated[
        str,
        typer.Option(
            metavar="RECIPE.yaml", help="Recipe of hmf prime, whose data, Stage 1 and section select are used."
        ),
    ] = "quickstart",
    overrides: Overrides = None,
) -> None:
    """Choose the layers that keep attention.

    Data, training and method are those of --recipe. An interrupted run continues. `hmf prime` does the same if its
    recipe has `hybrid.layers: auto`.
    """
    if (keep is None) == (ratio is None):
        raise HmfError("give exactly one of --keep and --ratio")
    source = resolve_base(base)

    from hmf.config.selection import Method

    if method is not None and method not in (methods := get_args(Method)):
        raise HmfError(f"--method: {unknown_name('method', method, methods)}")

    from hmf.config.pattern import Pattern
    from hmf.config.recipes import read_recipe
    from hmf.config.runs import PrimeRecipe
    from hmf.config.strict import parse_yaml
    from hmf.priming.stage0 import base_config
    from hmf.report.curves import draw_curves
    from hmf.report.selection import draw_selection, print_selection
    from hmf.selection.run import select as run
    from hmf.training.run import run_folder

    layers = base_config(source).num_hidden_layers
    if keep is None:
        keep = layers - len(Pattern.generate(layers, "gdn", ratio).replaced)
    if keep >= layers:
        raise HmfError(f"--keep: {keep} is not below {layers}, the model's layers")
    recipe_values = {
        "base": source,
        "output": out,
        "hybrid.pattern": "null",
        "hybrid.layers": "auto",
        "hybrid.ratio": (layers - keep) / layers,
        "hybrid.mixer": mixer,
        "select.method": method,
    }
    changes = [f"{key}={value}" for key, value in recipe_values.items() if value is not None]
    settings, text = read_recipe(find_recipe(recipe), PrimeRecipe, [*changes, *(overrides or ())])
    if (settings.hybrid.layers, settings.hybrid.ratio) != ("auto", recipe_values["hybrid.ratio"]):
        raise HmfError("--set: hybrid.layers and hybrid.ratio follow from --keep or --ratio; leave them out")
    settings = with_checkpoint(settings, "base")
    with run_folder(settings.output, text):
        selection = run(source, layers, keep, settings, settings.output, draw_selection, draw_curves)
    print_selection(selection)
    written = parse_yaml(find_recipe(recipe).read_text(encoding="utf-8")).get("hybrid") or {}
    values = {
        "base": base,
        "output": "runs/prime",
        "hybrid.mixer": selection["mixer"],
        "hybrid.layers": json.dumps(selection["replaced"], separators=(",", ":")),
        **{f"hybrid.{key}": "null" for key in ("ratio", "pattern") if written.get(key) is not None},
        **({} if method is None else {"select.method": method}),
    }
    given = [*(f"{key}={value}" for key, value in values.items()), *(overrides or ())]
    prime = typed("prime", recipe, *(word for change in given for word in ("--set", change)))
    typer.echo(f"saved {settings.output}/selection.json; next: {prime}")


@app.command(epilog=epilog("hmf distill recipes/distill/recipe.yaml"))
def distill(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Stage 1: train the mixers to reproduce attention.

    An interrupted run continues from its last checkpoint.
    """
    from hmf.config.recipes import naming_recipe, read_run
    from hmf.config.runs import DistillRecipe

    settings, text = read_run(recipe, DistillRecipe, overrides or ())
    with naming_recipe(recipe, DistillRecipe, overrides):
        settings = with_checkpoint(settings, "model")  # before imports that take seconds

    from hmf.report.curves import draw_curves
    from hmf.training.distill import distill as run
    from hmf.training.run import run_folder

    with naming_recipe(recipe, DistillRecipe, overrides), run_folder(settings.output, text) as first:
        saved = run(settings.model, settings.output, settings, settings.seed, draw=draw_curves)
    if first:
        typer.echo(f"saved {saved}; next: {typed('export', saved, '--out', settings.output / 'model')}")


@app.command(
    epilog=epilog(
        "hmf export runs/distill/stage1 --out runs/distill/model --dtype bfloat16",
        "hmf export runs/distill/stage1 --out runs/distill/native --format qwen3_5",
    )
)
def export(
    fused: Annotated[str, typer.Argument(help=f"Fused checkpoint, from init or distill. {HYBRID}")],
    out: Out,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights. Default: as stored.")] = None,
    format: Annotated[NativeFormat | None, typer.Option(help="Stock architecture to write. Default: a Hybrid.")] = None,
) -> None:
    """Drop the teacher and write a plain Hybrid.

    `--format` writes the same model in a stock architecture; see `hmf convert`.
    """
    require_unused(out)
    source = resolve_base(fused)

    import torch

    from hmf.model.checkpoint import save_checkpoint
    from hmf.model.native import save_native
    from hmf.priming.export import export as run

    save = partial(save_native, to=format) if format else save_checkpoint
    run(source, out, getattr(torch, dtype) if dtype else None, save)
    typer.echo(f"saved {out}; load it with AutoModelForCausalLM{'' if format else ' after `import hmf`'}")


@app.command(
    epilog=epilog(
        "hmf finetune recipes/quickstart/cpt.yaml",
        "hmf finetune recipes/quickstart/sft.yaml --set training.max_steps=20 --set output=runs/try",
    )
)
def finetune(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Stage 2: fine-tune a plain Hybrid.

    The methods are continued pretraining, supervised fine-tuning and preference optimisation (DPO). An interrupted run
    continues from its last checkpoint.
    """
    from hmf.config.recipes import naming_recipe, read_run
    from hmf.config.runs import FinetuneRecipe

    settings, text = read_run(recipe, FinetuneRecipe, overrides or ())
    with naming_recipe(recipe, FinetuneRecipe, overrides):
        settings = with_checkpoint(settings, "model")

    from hmf.pipeline import check_tasks, finetuned_scores
    from hmf.report.curves import draw_curves
    from hmf.report.table import print_scores
    from hmf.training.finetune import check
    from hmf.training.finetune import finetune as run
    from hmf.training.run import run_folder

    with naming_recipe(recipe, FinetuneRecipe, overrides):
        check(settings)  # before the output folder is claimed for this recipe
        check_tasks(settings.evaluate, settings.model)
        scores = {}
        with run_folder(settings.output, text) as first:
            saved = run(settings, draw=draw_curves)
            if first:
                scores = finetuned_scores(settings)
    if scores:
        print_scores(scores)
    if first:
        typer.echo(f"saved {saved}; next: {typed('evaluate', saved)}, {typed('chat', saved)}")


@app.command(
    epilog=epilog(
        "hmf prime quickstart",
        "hmf prime recipes/quickstart/recipe.yaml --set hybrid.mixer=gka --set output=runs/gka",
    )
)
def prime(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run init, distill, export and evaluate.

    One recipe describes all steps, and everything is written to one run folder. Finished steps are not repeated.
    """
    from hmf.config.recipes import naming_recipe, read_run
    from hmf.config.runs import PrimeRecipe

    settings, text = read_run(recipe, PrimeRecipe, overrides or ())
    with naming_recipe(recipe, PrimeRecipe, overrides):
        settings = with_checkpoint(settings, "base")

    from hmf.pipeline import prime as run
    from hmf.report.table import next_commands, print_scores

    with naming_recipe(recipe, PrimeRecipe, overrides):
        scores = run(settings, text, say=typer.echo)
    if scores:  # empty in processes that only take part in training
        print_scores(scores)
        typer.echo(next_commands(settings.output, command()))


@app.command(
    epilog=epilog(
        "hmf pretrain recipes/teacher/recipe.yaml", "hmf pretrain recipes/teacher/recipe.yaml --set training.workers=4"
    )
)
def pretrain(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train a tiny teacher and its tokenizer from scratch.

    The teacher that comes with hmf was made in this way. An interrupted run continues from its last checkpoint.
    """
    from hmf.training.pretrain import main as run

    if (saved := run(str(recipe), overrides or ())) is not None:
        typer.echo(f"saved {saved}; next: {typed('evaluate', saved)}")
