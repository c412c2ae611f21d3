# SPDX-License-Identifier: Apache-2.0
"""`hmf plan` and `plan-training`, for any GPU; `hmf doctor`, for this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hmf.cli.shared import (
    CONFIG,
    DEFAULT_MIXER,
    PATTERN,
    AsJson,
    BatchedTokens,
    KVCacheDtype,
    Overrides,
    Ratio,
    StateCacheDtype,
    epilog,
    group,
    replacement,
    tokens,
)
from hmf.errors import notice
from hmf.folders import find_recipe, require_parent, resolve_base
from hmf.gpus import MFU, parse_gpus

app = group("")


@app.command(
    epilog=epilog(
        "hmf plan runs/quickstart/model --gpu l4 --context 2048",
        "hmf plan Qwen/Qwen3-8B --mixer gdn --ratio 0.5 --gpu h200x8 --context 128K --plot plan.png",
    )
)
def plan(
    model: Annotated[str, typer.Argument(help=CONFIG)],
    gpu: Annotated[str, typer.Option(help="GPUs to serve on, for example h100, l40s or h200x8.")],
    context: Annotated[int, tokens("Length of a sequence, for example 128K.")] = 32768,
    mixer: Annotated[
        str | None,
        typer.Option(
            help="With --ratio: type of the layers that replace attention in the planned Hybrid.",
            show_default=DEFAULT_MIXER,
        ),
    ] = None,
    ratio: Ratio = None,
    pattern: Annotated[str | None, typer.Option(help=f"Layer pattern of the planned Hybrid. {PATTERN}")] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="vLLM's option: share of GPU memory that it may use.")
    ] = 0.9,
    layer_overhead: Annotated[
        float,
        typer.Option(
            min=0, help="Microseconds per layer and decode step that are added to the time of memory traffic."
        ),
    ] = 85,
    prefix_caching: Annotated[bool, typer.Option(help="Cache states at block boundaries for later prompts.")] = True,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="vLLM's option. Default: vLLM's default.")] = None,
    batched_tokens: BatchedTokens = 8192,
    kv_cache_dtype: KVCacheDtype = "auto",
    mamba_ssm_cache_dtype: StateCacheDtype = "auto",
    plot: Annotated[Path | None, typer.Option(help="Plot over context lengths to write (.png, .svg).")] = None,
    as_json: AsJson = False,
) -> None:
    """Plan serving: memory, capacity, decode speed.

    Prints memory, concurrent sequences, cache blocks and decode speed on the given GPUs. Needs no GPU.
    """
    parse_gpus(gpu)  # before imports that take seconds, as are the checks of paths
    require_parent(plot, "--plot")
    settings = replacement(mixer, ratio, pattern)
    folder = resolve_base(model, weights=False)

    import json

    from hmf.model.checkpoint import load_config
    from hmf.model.convert import base_pattern, hybrid_config
    from hmf.model.text_only import language_config, require_language_model, text_family
    from hmf.planning import serving as planner

    config = load_config(folder, weights=False)
    if text_family(config) is not None:
        config = language_config(config, folder)
        notice(f"{folder}: planned without its modules for images and sound, as {config.model_type}")
    require_language_model(config)
    if settings is not None:
        config = hybrid_config(config, base_pattern(config, settings))
    if context > (longest := config.max_position_embeddings):
        notice(f"{model}: max_position_embeddings is {longest:,}; a server of --context {context:,} needs a larger one")
    options = planner.ServingSettings(
        gpu_memory_utilization,
        layer_overhead / 1e6,
        prefix_caching,
        batched_tokens,
        max_num_seqs,
        kv_cache_dtype,
        mamba_ssm_cache_dtype,
    )
    plans = planner.plans(config, gpu, options)
    if as_json:
        typer.echo(json.dumps({"rows": [planner.figures(plan, context) for plan in plans]}, indent=2))
    else:
        planner.print_plans(plans, context)
    if plot is not None:
        planner.plot(plans, context, plot, Path(model).name)
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
            parser=find_recipe, help='Recipes, or folders of recipes, such as "qwen3-8b".', metavar="RECIPE.yaml|DIR..."
        ),
    ],
    gpu: Annotated[
        str | None, typer.Option(help="GPUs to train on, for example h200x8. Default: those that each recipe names.")
    ] = None,
    mfu: Annotated[float, typer.Option(help="Assumed model FLOPs utilisation (MFU), a share of the GPUs' peak.")] = MFU,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check recipes; plan memory, tokens and GPU-hours.

    This is a dry run of each stage. It needs no GPU, weights or data.
    """
    if gpu is not None:
        parse_gpus(gpu)

    import json

    from hmf.planning import training

    plans = training.plans(recipes, partial(resolve_base, weights=False), gpu, mfu, overrides or ())
    if as_json:
        typer.echo(json.dumps({"rows": [training.figures(plan) for plan in plans]}, indent=2))
    else:
        training.print_plans(plans)


@app.command(epilog=epilog("hmf doctor", "hmf doctor --json", "HMF_OPS=reference hmf doctor"))
def doctor(
    as_json: AsJson = False,
) -> None:
    """Show which implementation of each op runs here, and why.

    Each implementation is compared with the reference. The exit code is 1 if one differs.
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
