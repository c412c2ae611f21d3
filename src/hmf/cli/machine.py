# SPDX-License-Identifier: Apache-2.0
"""What a machine can do: `hmf plan` and `plan-training` for any, `hmf doctor` for this one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hmf.cli.shared import CONFIG, PATTERN, AsJson, BatchedTokens, Overrides, Ratio, epilog, group, tokens
from hmf.errors import HmfError
from hmf.folders import find_recipe, require_parent, resolve_base
from hmf.gpus import parse_gpus

app = group("")


@app.command(
    epilog=epilog(
        "hmf plan runs/quickstart/model --gpu l4 --context 2048",
        "hmf plan Qwen/Qwen3-8B --mixer gdn --ratio 0.5 --gpu h200x8 --context 128K --plot plan.png",
    )
)
def plan(
    model: Annotated[str, typer.Argument(help=CONFIG)],
    gpu: Annotated[str, typer.Option(help="What to serve on, for example h100, l40s or h200x8.")],
    context: Annotated[int, tokens("Of a sequence, for example 128K.")] = 32768,
    mixer: Annotated[
        str, typer.Option(help="With --ratio: plan the Hybrid that this Transformer would become.")
    ] = "gdn",
    ratio: Ratio = None,
    pattern: Annotated[str | None, typer.Option(help=f"Or the Hybrid's pattern. {PATTERN}")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of GPU memory that vLLM may take.")] = 0.9,
    layer_overhead: Annotated[
        float, typer.Option(min=0, help="Microseconds of a decode step in each layer, beside moving bytes.")
    ] = 85,
    prefix_caching: Annotated[bool, typer.Option(help="Keep states at block boundaries for later prompts.")] = True,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="vLLM's option; left out: its default.")] = None,
    batched_tokens: BatchedTokens = 8192,
    plot: Annotated[Path | None, typer.Option(help="Picture to write, over context lengths (.png, .svg).")] = None,
    as_json: AsJson = False,
) -> None:
    """What serving takes and gives on some GPUs.

    Memory, sequences, cache blocks, decode speed. Needs no GPU.
    """
    parse_gpus(gpu)  # this and the paths before imports that take seconds
    require_parent(plot, "--plot")
    folder = resolve_base(model, weights=False)

    import json

    from hmf.config.runs import HybridSettings
    from hmf.model.checkpoint import load_config
    from hmf.model.convert import hybrid_config
    from hmf.planning import serving as planner

    config = load_config(folder, weights=False)
    if ratio is not None or pattern is not None:
        if ratio is not None and pattern is not None:
            raise HmfError("give at most one of --ratio and --pattern")
        settings = HybridSettings(mixer=mixer, ratio=ratio, pattern=pattern)
        config = hybrid_config(config, settings.layer_pattern(config.num_hidden_layers))
    options = planner.ServingSettings(
        gpu_memory_utilization, layer_overhead / 1e6, prefix_caching, batched_tokens, max_num_seqs
    )
    found = planner.plans(config, gpu, options)
    if as_json:
        typer.echo(json.dumps({"rows": [planner.figures(plan, context) for plan in found]}, indent=2))
    else:
        planner.print_plans(found, context)
    if plot is not None:
        planner.plot(found, context, plot, Path(model).name)
        typer.echo(f"saved {plot}", err=as_json)


@app.command(
    name="plan-training",
    epilog=epilog(
        "hmf plan-training qwen3-8b",
        "hmf plan-training recipes/qwen3-8b/gdn-1-prime.yaml --gpu h100x8 --set distill.training.strategy=fsdp2",
    ),
)
def plan_training(
    recipes: Annotated[
        list[Path],
        typer.Argument(
            parser=find_recipe, help='Recipes, or folders of them, as "qwen3-8b".', metavar="RECIPE.yaml|DIR..."
        ),
    ],
    gpu: Annotated[str | None, typer.Option(help="For example h200x8; left out: what each recipe names.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the GPUs' peak that training is assumed to reach.")] = 0.35,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check recipes; plan memory, tokens and GPU-hours.

    A dry run of each stage, without GPU, weights or data.
    """
    if gpu is not None:
        parse_gpus(gpu)

    import json

    from hmf.planning import training

    found = training.plans(recipes, partial(resolve_base, weights=False), gpu, mfu, overrides or ())
    if as_json:
        typer.echo(json.dumps({"rows": [training.figures(plan) for plan in found]}, indent=2))
    else:
        training.print_plans(found)


@app.command(epilog=epilog("hmf doctor", "hmf doctor --json", "HMF_OPS=reference hmf doctor"))
def doctor(
    as_json: AsJson = False,
) -> None:
    """Which implementation of each op runs here, and why.

    Each is compared with the reference; exits 1 if one differs.
    """
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
