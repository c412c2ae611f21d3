# SPDX-License-Identifier: Apache-2.0
"""The command line: parse, build the settings, make one call. Errors of the user's are one line and exit code 2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hmf.cli import bench
from hmf.cli.shared import BatchedTokens, Mixer, Ratio, epilog, group
from hmf.errors import HmfError

app = group(
    "Turn a pre-trained Transformer into a Hybrid of attention and state-space layers; train, evaluate, serve it.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option(help="New directory for the result.")]
RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe; see recipes/.", metavar="RECIPE.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="In place of what the recipe says; repeatable.")
]


@app.command(epilog=epilog(
    "hmf init teacher --mixer gdn --ratio 0.5 --out runs/stage0",
    "hmf init ./Qwen3-8B --mixer gdn --layers 1,3,5-9 --out runs/stage0",
    'hmf init ./Qwen3-8B --pattern "*-GDN-*-GDN" --out runs/stage0',
))  # fmt: skip
def init(
    base: Annotated[
        str, typer.Argument(help='Checkpoint directory of a Transformer, or "teacher" for the embedded one.')
    ],
    out: Out,
    mixer: Mixer = "gdn",
    ratio: Annotated[float | None, typer.Option(help="Share of layers to replace, spread evenly.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to replace, for example 1,3,5-7.")] = None,
    pattern: Annotated[str | None, typer.Option(help="One symbol a layer, joined by '-'.")] = None,
    seed: Annotated[int, typer.Option(help="Of the tensors that start at random.")] = 0,
) -> None:
    """Stage 0: make a fused checkpoint, mixers started from attention beside the frozen teacher."""
    from pydantic import ValidationError

    from hmf.config.pattern import parse_layer_list
    from hmf.config.runs import HybridSettings
    from hmf.pipeline import describe, resolve_base
    from hmf.priming.stage0 import base_layers, make_stage0

    chosen = list(parse_layer_list(layers)) if layers is not None else None
    try:
        settings = HybridSettings(mixer=mixer, ratio=ratio, layers=chosen, pattern=pattern)
    except ValidationError:
        raise HmfError("give exactly one of --ratio, --layers and --pattern") from None
    source = resolve_base(base)
    report = make_stage0(source, settings.layer_pattern(base_layers(source)), out, seed=seed)
    typer.echo(describe(report))
    typer.echo(f"saved {out}; next: hmf distill RECIPE.yaml with model: {out}")


@app.command(epilog=epilog("hmf distill recipes/distill/recipe.yaml"))
def distill(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Stage 1: train the mixers of a fused checkpoint to do what its attention does. Continues where it stopped."""
    from hmf.config.runs import DistillRecipe, read_recipe

    settings, text = read_recipe(recipe, DistillRecipe, overrides or ())  # before imports that take seconds

    from hmf.pipeline import claim
    from hmf.report.curves import draw_curves
    from hmf.training.checkpoints import by_one
    from hmf.training.distill import distill as run

    first = by_one(lambda: claim(settings.output, text))
    saved = run(settings.model, settings.output, settings, settings.seed, draw=draw_curves)
    if first:
        typer.echo(f"saved {saved}; next: hmf export {saved} --out {settings.output}/model")


@app.command(epilog=epilog("hmf export runs/distill/stage1 --out runs/distill/model --dtype bfloat16"))
def export(
    fused: Annotated[Path, typer.Argument(help="Fused checkpoint: the result of init or distill.")],
    out: Out,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; left out: as stored.")] = None,
) -> None:
    """Drop the teacher: write a plain Hybrid in the published format."""
    import torch

    from hmf.errors import unknown_name
    from hmf.priming.export import export as run

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype is not None and dtype not in dtypes:
        raise HmfError(f"--dtype: {unknown_name('dtype', dtype, dtypes)}")
    run(fused, out, dtypes[dtype] if dtype else None)
    typer.echo(f"saved {out}; load it with AutoModelForCausalLM after `import hmf`")


@app.command(epilog=epilog(
    "hmf finetune recipes/quickstart/cpt.yaml",
    "hmf finetune recipes/quickstart/sft.yaml --set training.steps=20 --set output=runs/try",
))  # fmt: skip
def finetune(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Stage 2: train a plain Hybrid on: more pretraining, conversations or preferences. Continues where it stopped."""
    from hmf.config.runs import FinetuneRecipe, read_recipe

    settings, text = read_recipe(recipe, FinetuneRecipe, overrides or ())

    from hmf.pipeline import claim
    from hmf.report.curves import draw_curves
    from hmf.training.checkpoints import by_one
    from hmf.training.finetune import check
    from hmf.training.finetune import finetune as run

    check(settings)  # before the output folder becomes this recipe's
    first = by_one(lambda: claim(settings.output, text))
    saved = run(settings, draw=draw_curves)
    if first:
        typer.echo(f"saved {saved}; next: hmf evaluate {saved}, hmf chat {saved}")


@app.command(epilog=epilog(
    "hmf prime recipes/quickstart/recipe.yaml",
    "hmf prime recipes/quickstart/recipe.yaml --set hybrid.mixer=gka --set output=runs/gka",
))  # fmt: skip
def prime(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """The whole job: init, distil, export, evaluate, under one run folder. Steps already done are not done again."""
    from hmf.config.runs import PrimeRecipe, read_recipe

    settings, text = read_recipe(recipe, PrimeRecipe, overrides or ())

    from hmf.pipeline import prime as run
    from hmf.report.table import next_commands, print_scores

    scores = run(settings, text, say=typer.echo)
    if scores:  # none in the processes that only train along
        print_scores(scores)
        typer.echo(next_commands(settings.output))


@app.command(epilog=epilog(
    "hmf evaluate runs/quickstart/model",
    "hmf evaluate teacher --tasks recall,arithmetic --samples 100 --length 512",
))  # fmt: skip
def evaluate(
    model: Annotated[str, typer.Argument(help='Checkpoint directory, or "teacher".')],
    tasks: Annotated[str, typer.Option(help="Generated tasks, joined by commas; empty for none.")] = "recall,needle",
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task.")] = 50,
    length: Annotated[int, typer.Option(min=96, help="Tokens of the longest prompts and of the text window.")] = 512,
    text_bytes: Annotated[int, typer.Option(min=0, help="Held-out library text to score.")] = 100_000,
) -> None:
    """Score a checkpoint: held-out library text and generated tasks."""
    from hmf.config.runs import EvaluateSettings
    from hmf.data.tasks import TASKS
    from hmf.errors import unknown_name
    from hmf.pipeline import evaluate_checkpoint, resolve_base
    from hmf.report.table import print_scores

    chosen = [task for task in tasks.split(",") if task]
    for task in chosen:
        if task not in TASKS:
            raise HmfError(f"--tasks: {unknown_name('task', task, TASKS)}")
    settings = EvaluateSettings.model_validate(
        {"tasks": chosen, "samples": samples, "length": length, "text_bytes": text_bytes}
    )
    print_scores({Path(model).name: evaluate_checkpoint(resolve_base(model), settings)})


@app.command(epilog=epilog("hmf pretrain recipes/teacher/recipe.yaml"))
def pretrain(recipe: RecipeFile) -> None:
    """Train a tiny teacher and its tokenizer from scratch (how the embedded one was made)."""
    from hmf.training.pretrain import main as run

    run(str(recipe))


@app.command(epilog=epilog(
    "hmf plan runs/quickstart/model --gpu l4 --context 2048",
    "hmf plan ./Qwen3-8B --mixer gdn --ratio 0.5 --gpu h200x8 --context 131072 --plot plan.png",
))  # fmt: skip
def plan(
    model: Annotated[str, typer.Argument(help='Directory with a config.json (no weights needed), or "teacher".')],
    gpu: Annotated[str, typer.Option(help="What to serve on, for example h100, l40s or h200x8.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 32768,
    mixer: Annotated[
        str, typer.Option(help="With --ratio: plan the Hybrid that this Transformer would become.")
    ] = "gdn",
    ratio: Ratio = None,
    pattern: Annotated[str | None, typer.Option(help="Or the Hybrid's pattern, one symbol a layer.")] = None,
    utilisation: Annotated[float, typer.Option(help="Share of GPU memory that vLLM may take.")] = 0.9,
    layer_overhead: Annotated[
        float, typer.Option(min=0, help="Microseconds of a decode step in each layer, beside moving bytes.")
    ] = 85,
    prefix_caching: Annotated[bool, typer.Option(help="Keep states at block boundaries for later prompts.")] = True,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="vLLM's option; left out: its default.")] = None,
    batched_tokens: BatchedTokens = 8192,
    plot: Annotated[Path | None, typer.Option(help="Picture to write, over context lengths (.png, .svg).")] = None,
) -> None:
    """What serving takes and gives on some GPUs: memory, sequences, cache blocks, decode speed. Needs no GPU."""
    from hmf.bench import plan as planner
    from hmf.config.runs import HybridSettings
    from hmf.model.checkpoint import load_config
    from hmf.model.convert import hybrid_config
    from hmf.pipeline import resolve_base

    config = load_config(resolve_base(model), weights=False)
    if ratio is not None or pattern is not None:
        if ratio is not None and pattern is not None:
            raise HmfError("give at most one of --ratio and --pattern")
        settings = HybridSettings(mixer=mixer, ratio=ratio, pattern=pattern)
        config = hybrid_config(config, settings.layer_pattern(config.num_hidden_layers))
    options = planner.Settings(utilisation, layer_overhead / 1e6, prefix_caching, batched_tokens, max_num_seqs)
    found = planner.plans(config, gpu, options)
    planner.print_plans(found, context)
    if plot is not None:
        planner.plot(found, context, plot)
        typer.echo(f"saved {plot}")


@app.command(name="plan-training", epilog=epilog(
    "hmf plan-training recipes/qwen3-8b",
    "hmf plan-training recipes/qwen3-8b/gdn-1-prime.yaml --gpu h100x8 --set distill.training.strategy=fsdp2",
))  # fmt: skip
def plan_training(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes, or folders of them.", metavar="RECIPE.yaml|DIR...")],
    gpu: Annotated[str | None, typer.Option(help="For example h200x8; left out: what each recipe names.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the GPUs' peak that training is assumed to reach.")] = 0.35,
    overrides: Overrides = None,
) -> None:
    """Dry run: check recipes and plan memory, tokens and GPU-hours of each stage. Needs no GPU, weights or data."""
    from hmf.bench import training
    from hmf.pipeline import resolve_base

    training.print_plans(training.plans(recipes, resolve_base, gpu, mfu, overrides or ()))


@app.command(epilog=epilog(
    "hmf serve runs/quickstart/model",
    "hmf serve runs/quickstart/model -- --port 9000 --max-model-len 4096",
    "VLLM_API_KEY=a-long-secret hmf serve runs/quickstart/model -- --host 0.0.0.0",
))  # fmt: skip
def serve(
    model: Annotated[str, typer.Argument(help='Checkpoint directory, or "teacher".')],
    extra: Annotated[list[str] | None, typer.Argument(help="After --: options of vLLM's own, before ours.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the command and start nothing.")] = False,
) -> None:
    """Start vLLM's OpenAI-compatible server with the right options for this checkpoint and machine; Ctrl-C stops it."""
    from hmf.pipeline import resolve_base
    from hmf.serving import serve as server

    if not dry_run:
        server.require_vllm()
    launch = server.prepare(resolve_base(model), extra or ())
    typer.echo(launch.line)
    typer.echo(launch.access)
    if not dry_run:
        server.run(launch)
        typer.echo("The server has stopped.")


@app.command(epilog=epilog(
    "hmf chat runs/quickstart/model",
    "hmf chat teacher --no-thinking",
    "hmf chat runs/quickstart/model --url http://localhost:8000",
))  # fmt: skip
def chat(
    model: Annotated[str, typer.Argument(help='Checkpoint directory, or "teacher".')],
    thinking: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    url: Annotated[str | None, typer.Option(help="Of a running server; left out: load the model here.")] = None,
) -> None:
    """Talk to a checkpoint in the terminal, without a server or through one."""
    from hmf.pipeline import resolve_base
    from hmf.serving.chat import LocalChat, ServerChat, run

    source = resolve_base(model)
    options: Any = {"thinking": thinking, "max_new_tokens": max_new_tokens, "temperature": temperature}
    run(LocalChat(source, **options) if url is None else ServerChat(source, url, **options), source)


@app.command(epilog=epilog("hmf doctor", "hmf doctor --json", "HMF_OPS=reference hmf doctor"))
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Which implementation of each op runs here, why, and whether it equals the reference. Exits 1 if one does not."""
    from hmf.bench import workers

    workers.head_start()

    import json

    from rich.console import Console

    from hmf.bench import doctor as checks

    with Console(stderr=True).status("checking") as status:
        report = checks.examine(lambda line: status.update(f"checking {line}"))
    if as_json:
        typer.echo(json.dumps(report.json(), indent=2))
    else:
        checks.print_report(report)
    if not report.passed:
        raise typer.Exit(1)


data = group("Prepare training data and look at it.")
app.add_typer(data, name="data")
app.add_typer(bench.app, name="bench")


@data.command(name="prepare", epilog=epilog(
    "hmf data prepare recipes/data/recipe.yaml",
    "hmf data prepare recipe.yaml --workers 16 --set sequence_length=32768 --set output=runs/data-32k",
))  # fmt: skip
def data_prepare(
    recipe: RecipeFile,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; the result is the same for any number. Left out: all cores.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Tokenise, mix and pack documents and conversations into rows for training. Continues where it stopped."""
    from hmf.config.data import DataRecipe
    from hmf.config.runs import load_recipe
    from hmf.data.prepare import prepare
    from hmf.pipeline import resolve_base
    from hmf.report.samples import print_counts

    settings = load_recipe(recipe, DataRecipe, overrides or ())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print_counts(prepare(settings, resolve_base(settings.tokenizer), workers or cores))
    typer.echo(f"saved {settings.output}; look at it: hmf data show {settings.output}")
    typer.echo(f"train on it: data: {{prepared: {settings.output}}} in a recipe")


@data.command(
    name="show", epilog=epilog("hmf data show recipes/data/recipe.yaml", "hmf data show runs/data --samples 5")
)
def data_show(
    source: Annotated[
        Path, typer.Argument(help="A recipe, before the work, or a prepared folder.", metavar="RECIPE|DIR")
    ],
    samples: Annotated[int, typer.Option(min=0, help="Documents to print; of a recipe: of each source.")] = 3,
    tokens: Annotated[int, typer.Option(min=8, help="Longest print of a document; the middle is left out.")] = 400,
    records: Annotated[int, typer.Option(min=1, help="Of a recipe: records of each source to read and count.")] = 200,
    overrides: Overrides = None,
) -> None:
    """Print documents as the model will see them, what it learns marked, and the counts."""
    from hmf.config.data import DataRecipe
    from hmf.config.runs import load_recipe
    from hmf.pipeline import resolve_base
    from hmf.report.samples import show_prepared, show_recipe

    if source.is_dir():
        show_prepared(source, resolve_base, samples, tokens)
    else:
        settings = load_recipe(source, DataRecipe, overrides or ())
        show_recipe(settings, resolve_base(settings.tokenizer), samples, tokens, records)


def main() -> None:
    """Entry point of the `hmf` script."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Its bars are for reading and writing files; long steps show their own.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(standalone_mode=True)
    except HmfError as error:
        typer.echo(f"hmf: {error}", err=True)
        sys.exit(2)
