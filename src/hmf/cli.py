# SPDX-License-Identifier: Apache-2.0
"""The command line: parse, build the settings, make one call. Errors of the user's are one line and exit code 2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hmf.errors import HmfError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn a pre-trained Transformer into a Hybrid of attention and state-space layers; train, evaluate, serve it.",
)

Out = Annotated[Path, typer.Option(help="New directory for the result.")]
RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe; see recipes/.", metavar="RECIPE.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="In place of what the recipe says; repeatable.")
]


def epilog(*examples: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"`{example}`" for example in examples)


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
    mixer: Annotated[str, typer.Option(help="Layer type that replaces attention.")] = "gdn",
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
    from hmf.pipeline import claim
    from hmf.report.curves import draw_curves
    from hmf.training.checkpoints import by_one
    from hmf.training.distill import distill as run

    settings, text = read_recipe(recipe, DistillRecipe, overrides or ())
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
    from hmf.pipeline import claim
    from hmf.report.curves import draw_curves
    from hmf.training.checkpoints import by_one
    from hmf.training.finetune import check
    from hmf.training.finetune import finetune as run

    settings, text = read_recipe(recipe, FinetuneRecipe, overrides or ())
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
    from hmf.pipeline import prime as run
    from hmf.report.table import next_commands, print_scores

    settings, text = read_recipe(recipe, PrimeRecipe, overrides or ())
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
    ratio: Annotated[float | None, typer.Option(help="Share of layers to replace.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Or the Hybrid's pattern, one symbol a layer.")] = None,
    utilisation: Annotated[float, typer.Option(help="Share of GPU memory that vLLM may take.")] = 0.9,
    efficiency: Annotated[float, typer.Option(help="Share of the memory copy rate that decoding reaches.")] = 0.89,
    prefix_caching: Annotated[bool, typer.Option(help="Keep states at block boundaries for later prompts.")] = True,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="vLLM's option; left out: its default.")] = None,
    batched_tokens: Annotated[int, typer.Option(min=1, help="vLLM's --max-num-batched-tokens.")] = 8192,
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
    options = planner.Settings(utilisation, efficiency, prefix_caching, batched_tokens, max_num_seqs)
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
    if not dry_run:
        raise typer.Exit(server.run(launch))


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


data = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Prepare training data and look at it.")
app.add_typer(data, name="data")


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


bench = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Measure here.")
app.add_typer(bench, name="bench")


@bench.command(name="ops", epilog=epilog(
    "hmf bench ops",
    "hmf bench ops --ops gdn,ssd --tokens 8192 --heads 32 --head-dim 128 --dtype bfloat16 --versions chunked,fast",
))  # fmt: skip
def bench_ops(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one sequence.")] = 2048,
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Key and value dimensions of a head.")] = 64,
    ops: Annotated[str, typer.Option(help="Ops, joined by commas; empty for all.")] = "",
    versions: Annotated[str, typer.Option(help="Of reference, chunked, fast, by commas; empty for all here.")] = "",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; left out: cuda if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the reference is run once.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Times each op's versions, forward and backward. The sequential references take seconds to minutes."""
    import json

    import torch

    from hmf.bench import machine
    from hmf.bench import ops as timings
    from hmf.errors import unknown_name
    from hmf.ops.samples import Shape

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise HmfError(f"--dtype: {unknown_name('dtype', dtype, dtypes)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted, named = ([name for name in text.split(",") if name] for text in (ops, versions))
    shape = Shape(tokens=tokens, heads=heads, head_dim=head_dim)
    rows = timings.rows(timings.run(shape, dtypes[dtype], device, repeats, wanted, named))
    if as_json:
        typer.echo(json.dumps({"rows": rows, "hardware": machine.hardware(), "versions": machine.versions()}, indent=2))
    else:
        timings.print_rows(rows, f"{tokens:,} tokens, {heads} heads of {head_dim}, {dtype}, {device}; ms: min / median")


@bench.command(name="solver", epilog=epilog("hmf bench solver", "hmf bench solver --head-dim 64 --plot solver.png"))
def bench_solver(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one sequence.")] = 256,
    heads: Annotated[int, typer.Option(min=1, help="Heads, from short to long memory.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, help="Key and value dimensions of a head.")] = 128,
    ridge_strength: Annotated[float, typer.Option(help="The layer's option; smaller converges slower.")] = 0.02,
    plot: Annotated[Path | None, typer.Option(help="Picture to write (.png, .svg).")] = None,
) -> None:
    """How near GKA's iteration comes to the exact ridge solution, by num_iter: outputs and gradients."""
    from hmf.bench import solver
    from hmf.ops.samples import Shape

    found = solver.distances(Shape(tokens=tokens, heads=heads, head_dim=head_dim), ridge_strength)
    title = f"GKA, {tokens:,} tokens, {heads} heads of {head_dim}, ridge_strength {ridge_strength:g}"
    solver.print_distances(found, f"{title}: relative distance from the exact solution")
    if plot is not None:
        solver.plot(found, title, plot)
        typer.echo(f"saved {plot}")


@bench.command(name="distill", epilog=epilog(
    "hmf bench distill",
    "hmf bench distill recipes/configs/qwen3-0.6b --tokens 4096 --rows 2 --dtype bfloat16",
    "hmf bench distill --set num_hidden_layers=12 --set hidden_size=768 --set vocab_size=32000",
))  # fmt: skip
def bench_distill(
    model: Annotated[
        str, typer.Argument(help='Directory with a config.json (weights are random), or "teacher".')
    ] = "teacher",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="In place of what the config says; repeatable."),
    ] = None,
    mixer: Annotated[str, typer.Option(help="Layer type that replaces attention.")] = "gdn",
    ratio: Annotated[float | None, typer.Option(help="Share of layers to replace; left out: 0.5.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Or one symbol a layer, joined by '-'.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    kl: Annotated[float, typer.Option(min=0, help="Weight of the logits' KL beside the MSE before the head.")] = 1.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; left out: cuda if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16 (autocast over float32 weights).")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of a process.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Processes for each way, in turn.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Times Stage 1's step in one fused model against teacher and student as two models, and their peak memory."""
    import json

    import torch

    from hmf.bench import distill as steps
    from hmf.bench import machine
    from hmf.config.runs import HybridSettings
    from hmf.errors import unknown_name
    from hmf.model.checkpoint import load_config
    from hmf.pipeline import resolve_base

    if dtype not in ("float32", "bfloat16"):
        raise HmfError(f"--dtype: {unknown_name('dtype', dtype, ('float32', 'bfloat16'))}")
    config = steps.changed(load_config(resolve_base(model), weights=False), overrides or ())
    if ratio is not None and pattern is not None:
        raise HmfError("give at most one of --ratio and --pattern")
    settings = HybridSettings(mixer=mixer, ratio=None if pattern else ratio or 0.5, pattern=pattern)
    layers = str(settings.layer_pattern(config.num_hidden_layers))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    case = steps.Case(config, layers, rows, tokens, kl, device, dtype, repeats)
    table = steps.rows(case, steps.run(case, rounds))
    if as_json:
        facts = {"pattern": layers, "hardware": machine.hardware(), "versions": machine.versions()}
        typer.echo(json.dumps({"rows": table, **facts}, indent=2))
    else:
        shape = f"{config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size:,}"
        steps.print_rows(table, f"{layers}\n{shape}; {rows} rows of {tokens:,} tokens, kl {kl:g}, {dtype}, {device}")


@bench.command(name="states", epilog=epilog(
    "hmf bench states runs/quickstart/model", "hmf bench states MODEL --dtype float16 --tokens 4096 --device cuda",
))  # fmt: skip
def bench_states(
    model: Annotated[Path, typer.Argument(help="Hybrid checkpoint.")],
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16, for the states.")] = "bfloat16",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each stretch of text.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Stretches of held-out text.")] = 4,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Measures how far log-probabilities drift when recurrent states are stored in fewer bits."""
    import json
    from dataclasses import asdict

    from hmf.bench import machine, states
    from hmf.errors import unknown_name

    if dtype not in (known := ("bfloat16", "float16")):
        raise HmfError(f"--dtype: {unknown_name('dtype', dtype, known)}")
    found = states.measure(model, dtype, tokens, batch, device)
    if as_json:
        rows = [asdict(drift) for drift in found]
        report = {"rows": rows, "hardware": machine.hardware(), "versions": machine.versions()}
        typer.echo(json.dumps(report, indent=2))
    else:
        title = f"{model}: states in {dtype}, {batch} x {tokens:,} tokens of held-out text; nats, by position"
        states.print_drift(found, title)


@bench.command(name="serving", epilog=epilog(
    "hmf bench serving ./Qwen3-8B runs/prime/model --context 16384:20,32768:10",
    "hmf bench serving recipes/configs/qwen3-8b --mixer gdn --ratio 0.5 --context 16384:20 --json serving.json",
))  # fmt: skip
def bench_serving(
    models: Annotated[
        list[str],
        typer.Argument(
            help='Directories with a config.json (without weights: random ones), or "teacher".', metavar="MODEL"
        ),
    ],
    context: Annotated[
        str, typer.Option(help="Prompt tokens and how many sequences at once.", metavar="TOKENS:SEQUENCES,...")
    ],
    mixer: Annotated[
        str, typer.Option(help="With --ratio: measure also the Hybrid that the only MODEL would become.")
    ] = "gdn",
    ratio: Annotated[float | None, typer.Option(help="Share of layers to replace.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Or that Hybrid's pattern, one symbol a layer.")] = None,
    output: Annotated[int, typer.Option(min=1, help="Tokens that each sequence decodes while it is timed.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs, of which the fastest counts.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="Of weights; left out: bfloat16, or float32 where there is no GPU.")
    ] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of GPU memory that vLLM may take.")] = 0.9,
    batched_tokens: Annotated[int, typer.Option(min=1, help="vLLM's --max-num-batched-tokens.")] = 8192,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs for each model.")] = 1,
    enforce_eager: Annotated[bool, typer.Option(help="Neither torch.compile nor CUDA graphs.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the rows to, too.")] = None,
) -> None:
    """Prefill and decode throughput in vLLM of a Hybrid and its base, or of any models, with ratios to the first."""
    import json
    import tempfile

    import torch

    from hmf.bench import machine
    from hmf.config.runs import HybridSettings
    from hmf.model.checkpoint import load_config
    from hmf.model.convert import hybrid_config
    from hmf.pipeline import resolve_base
    from hmf.serving import throughput
    from hmf.serving.serve import require_vllm

    dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    run = throughput.Run(
        throughput.parse_loads(context), output, repeats, dtype, gpu_memory_utilization, batched_tokens,
        tensor_parallel_size, enforce_eager,
    )  # fmt: skip
    if json_file is not None and not json_file.parent.is_dir():
        raise HmfError(f"--json: {json_file.parent}: no such directory; name a file in one that exists")
    with tempfile.TemporaryDirectory(prefix="hmf-config-") as folder:
        named = [(model, resolve_base(model)) for model in models]
        if len(set(models)) < len(models):
            raise HmfError("MODEL: one is named twice; name each once")
        if ratio is not None or pattern is not None:
            if len(models) > 1 or (ratio is not None and pattern is not None):
                raise HmfError("give at most one of --ratio and --pattern, and then one MODEL")
            config = load_config(named[0][1], weights=False)
            layers = HybridSettings(mixer=mixer, ratio=ratio, pattern=pattern).layer_pattern(config.num_hidden_layers)
            hybrid_config(config, layers).save_pretrained(folder)
            named.append((f"{models[0]} as a Hybrid", Path(folder)))
        subjects = [throughput.subject(name, source, run) for name, source in named]
        require_vllm()
        measured: list[throughput.Measured] = []
        try:
            for found in throughput.run_all(subjects, run):
                measured.append(found)
        finally:
            if measured:
                table = throughput.rows(subjects, measured, run)
                title = f"{dtype}, {output} tokens decoded by each sequence, {batched_tokens:,} tokens a step"
                facts = {"dtype": dtype, "options": [one.arguments for one in subjects]}
                report = {"rows": table, **facts, "hardware": machine.hardware(), "versions": machine.versions()}
                if json_file is not None:
                    json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
                throughput.print_rows(table, title)


def main() -> None:
    """Entry point of the `hmf` script."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # its bars are for reading and writing files; long steps show their own
    try:
        app(standalone_mode=True)
    except HmfError as error:
        typer.echo(f"hmf: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
