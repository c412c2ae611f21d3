# SPDX-License-Identifier: Apache-2.0
"""`hmf bench`: measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hmf.cli.shared import (
    CONFIG,
    DEFAULT_MIXER,
    HYBRID,
    PATTERN,
    AsJson,
    BatchedTokens,
    Device,
    Dtype,
    KVCacheDtype,
    Mixer,
    Ratio,
    count,
    epilog,
    group,
    replacement,
    tokens,
)
from hmf.errors import HmfError, notice, standing_for
from hmf.folders import require_parent, resolve_base
from hmf.gpus import available

app = group("Measure speed, memory and accuracy on this machine.")


@app.command(
    epilog=epilog(
        "hmf bench ops",
        "hmf bench ops --ops gdn,ssd --tokens 8192 --heads 32 --head-dim 128 --dtype bfloat16 --versions chunked,fast",
    )
)
def ops(
    tokens: Annotated[int, tokens("Length of the sequence.")] = 2048,
    heads: Annotated[int, count("Number of heads.")] = 8,
    head_dim: Annotated[int, count("Dimension of a head's keys and values.")] = 64,
    ops: Annotated[str, typer.Option(help="Ops, separated by commas. Default: all.")] = "",
    versions: Annotated[
        str, typer.Option(help="Some of reference,chunked,fast,triton. Default: all that run here.")
    ] = "",
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the tensors.")] = "float32",
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed runs of each version; no run starts after 10 seconds.")
    ] = 5,
    forward: Annotated[bool, typer.Option("--forward", help="Time the forward pass only, as in inference.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time the versions of each op, forward and backward.

    The sequential references take seconds to minutes. A version that cannot run on this machine is skipped, and the
    table gives the reason.
    """
    import json

    import torch

    from hmf.bench import machine
    from hmf.bench import ops as timings
    from hmf.ops.samples import Shape

    place = available(device)
    op_names, version_names = ([name.strip() for name in text.split(",")] if text else [] for text in (ops, versions))
    shape = Shape(tokens=tokens, heads=heads, head_dim=head_dim)
    measured = timings.run(shape, getattr(torch, dtype), place, repeats, op_names, version_names, not forward)
    rows = timings.rows(measured)
    if as_json:
        typer.echo(json.dumps({"rows": rows, "hardware": machine.hardware(), "versions": machine.versions()}, indent=2))
    else:
        timings.print_rows(rows, f"{tokens:,} tokens, {heads} heads of {head_dim}, {dtype}, {place}; ms: min / median")
    if failed := [f"{timing.op} {timing.version}: {timing.reason}" for timing in measured if timing.failed]:
        raise HmfError("; ".join(failed))


@app.command(epilog=epilog("hmf bench solver", "hmf bench solver --head-dim 64 --plot solver.png"))
def solver(
    tokens: Annotated[int, tokens("Length of the sequence.")] = 256,
    heads: Annotated[int, count("Number of heads, whose decay ranges from fast to slow.")] = 4,
    head_dim: Annotated[int, count("Dimension of a head's keys and values.")] = 128,
    ridge_strength: Annotated[
        float, typer.Option(min=0, help="Option of the GKA layer. The solver converges more slowly at a smaller value.")
    ] = 0.02,
    plot: Annotated[Path | None, typer.Option(help="Plot to write (.png, .svg).")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the error of GKA's iterative solver.

    Prints the distance of outputs and gradients from those of the exact ridge solution, by num_iter.
    """
    require_parent(plot, "--plot")

    import json
    from dataclasses import asdict

    from hmf.bench import machine, solver
    from hmf.ops.samples import Shape

    distances = solver.distances(Shape(tokens=tokens, heads=heads, head_dim=head_dim), ridge_strength)
    title = f"GKA, {tokens:,} tokens, {heads} heads of {head_dim}, ridge_strength {ridge_strength:g}"
    if as_json:
        rows = [asdict(distance) for distance in distances]
        report = {"rows": rows, "hardware": machine.hardware(), "versions": machine.versions()}
        typer.echo(json.dumps(report, indent=2))
    else:
        solver.print_distances(distances, f"{title}: relative distance from the exact solution")
    if plot is not None:
        solver.plot(distances, title, plot)
        typer.echo(f"saved {plot}", err=as_json)


@app.command(
    epilog=epilog(
        "hmf bench distill",
        "hmf bench distill recipes/configs/qwen3-0.6b --tokens 4096 --rows 2 --dtype bfloat16",
        "hmf bench distill --set num_hidden_layers=12 --set hidden_size=768 --set vocab_size=32000",
    )
)
def distill(
    model: Annotated[str, typer.Argument(help=f"{CONFIG} The weights are random.")] = "teacher",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the config; repeatable."),
    ] = None,
    mixer: Mixer = None,
    ratio: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of layers to replace.", show_default="0.5")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help=f"Layer pattern. {PATTERN}")] = None,
    rows: Annotated[int, count("Rows in the batch.")] = 2,
    tokens: Annotated[int, tokens("Length of a row.", 2)] = 512,
    kl: Annotated[
        float,
        typer.Option(
            min=0, help="Weight of the KL divergence of the logits, which is added to the MSE before the LM head."
        ),
    ] = 1.0,
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="bfloat16: autocast; the weights stay float32.")] = "float32",
    torch_compile: Annotated[
        bool, typer.Option("--torch-compile", help="Compile the decoder layers, as training.torch_compile does.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps per process.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Processes for each variant; the variants run in turn.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Measure time and peak memory of a step of Stage 1.

    Compares one fused model with teacher and student as two models.
    """
    settings = replacement(mixer, 0.5 if ratio is None and pattern is None else ratio, pattern)
    folder = resolve_base(model, weights=False)

    import json

    from hmf.bench import distill as steps
    from hmf.bench import machine
    from hmf.model.convert import base_pattern
    from hmf.priming.stage0 import base_config

    config = steps.with_overrides(base_config(folder, weights=False), overrides or ())
    layers = str(base_pattern(config, settings))
    place = available(device)
    case = steps.Case(config, layers, rows, tokens, kl, place, dtype, repeats, torch_compile)
    table = steps.rows(case, steps.run(case, rounds))
    if as_json:
        facts = {"pattern": layers, "hardware": machine.hardware(), "versions": machine.versions()}
        typer.echo(json.dumps({"rows": table, **facts}, indent=2))
    else:
        shape = f"{config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size:,}"
        measured = f"kl {kl:g}, {dtype}, {place}" + (", compiled layers" if torch_compile else "")
        steps.print_rows(table, f"{layers}\n{shape}; {rows} rows of {tokens:,} tokens, {measured}")


@app.command(
    epilog=epilog(
        "hmf bench states runs/quickstart/model",
        "hmf bench states MODEL --dtype float16 --tokens 4096 --device cpu",
    )
)
def states(
    model: Annotated[str, typer.Argument(help=f"Hybrid. {HYBRID}")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Dtype of the states; float32: unchanged.")
    ] = "bfloat16",
    rounding: Annotated[
        Literal["nearest", "stochastic"], typer.Option(help="How states are rounded; vLLM rounds to the nearest.")
    ] = "nearest",
    kv_cache_dtype: KVCacheDtype = "auto",
    tokens: Annotated[int, tokens("Length of each excerpt.", 2)] = 1024,
    batch: Annotated[int, count("Number of excerpts of held-out text.")] = 4,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the effect of caches in a smaller dtype.

    Prints how far the log-probabilities move when recurrent states, and keys and values, are stored in the given
    dtypes.
    """
    folder = resolve_base(model)

    import json
    from dataclasses import asdict

    import torch

    from hmf.bench import machine, states
    from hmf.planning.serving import KV_DTYPES

    narrowed = None if dtype == "float32" else getattr(torch, dtype)
    stored = states.Stored(narrowed, rounding == "stochastic", KV_DTYPES[kv_cache_dtype])
    drifts = states.measure(folder, stored, tokens, batch, available(device))
    if as_json:
        rows = [asdict(drift) for drift in drifts]
        report = {"rows": rows, "hardware": machine.hardware(), "versions": machine.versions()}
        typer.echo(json.dumps(report, indent=2))
    else:
        kept = f"states in {dtype}" + (", rounded at random" if stored.stochastic else "")
        kept += "" if stored.kv_dtype is None else f", keys and values in {kv_cache_dtype}"
        title = f"{model}: {kept}, {batch} x {tokens:,} tokens of held-out text; nats, by position"
        states.print_drift(drifts, title)


@app.command(
    epilog=epilog(
        "hmf bench serving ./Qwen3-8B runs/prime/model --context 16K:20,16K:max",
        "hmf bench serving recipes/configs/qwen3-8b --mixer gdn --ratio 0.5 --context 16K:20 --json-file serving.json",
        "hmf bench serving recipes/configs/qwen3-8b --ratio 0.5 --mixer gdn,gka --context 16K:max --format card",
        """hmf bench serving runs/prime/model --context 16K:20 --variant '{"gka_overrides": {"num_iter": 10}}'""",
    )
)
def serving(
    models: Annotated[
        list[str],
        typer.Argument(help=f"Models to compare. {CONFIG} Without weights, they are random.", metavar="MODEL..."),
    ],
    context: Annotated[
        str,
        typer.Option(
            help='Prompt tokens and concurrent sequences; "max" for as many as the cache of each model holds.',
            metavar="TOKENS:SEQUENCES,...",
        ),
    ],
    mixer: Annotated[
        str | None,
        typer.Option(
            help="With --ratio and one MODEL: mixers of the Hybrids to measure beside it, separated by commas.",
            show_default=DEFAULT_MIXER,
        ),
    ] = None,
    ratio: Ratio = None,
    pattern: Annotated[str | None, typer.Option(help=f"Layer pattern of such a Hybrid. {PATTERN}")] = None,
    hf_overrides: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="vLLM's --hf-overrides, for every model whose config has these keys."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JSON",
            help="Measure the models once more with these overrides, or with another kv_cache_dtype, "
            "mamba_ssm_cache_dtype or gdn_prefill_backend; repeatable.",
        ),
    ] = None,
    output: Annotated[int, tokens("Tokens that each sequence decodes in the timed run.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the fastest one is reported.")] = 1,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the weights. Default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="vLLM's option: share of GPU memory that it may use.")
    ] = 0.9,
    batched_tokens: BatchedTokens = 8192,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="vLLM's option: GPUs per model.")] = 1,
    enforce_eager: Annotated[bool, typer.Option(help="vLLM's option: disable torch.compile and CUDA graphs.")] = False,
    form: Annotated[
        Literal["table", "card"], typer.Option("--format", help="card: two tables for a model card, in Markdown.")
    ] = "table",
    as_json: AsJson = False,
    json_file: Annotated[
        Path | None, typer.Option(help="File to write the rows to as JSON, after each model.", metavar="FILE")
    ] = None,
) -> None:
    """Measure prefill and decode throughput in vLLM.

    Compares a Hybrid with its base, or any models, with ratios to the first one. If a model fails, the others are still
    measured.
    """
    if as_json and form == "card":
        raise HmfError(
            "--json and --format card exclude each other; --json-file FILE writes the rows in addition to the card"
        )
    if as_json and json_file is None and (old := [name for name in models if name.endswith(".json")]):
        notice(f"--json no longer takes a file; until the next release, {old[0]} is used as the value of --json-file")
        json_file, as_json = Path(old[0]), False
        models = [name for name in models if name != old[0]]
    require_parent(json_file, "--json-file")
    if len(set(models)) < len(models):
        raise HmfError("MODEL: a model is named twice; name each model once")
    mixers: list[str | None] = [None] if mixer is None else [name.strip() for name in mixer.split(",")]
    hybrids = [made for name in dict.fromkeys(mixers) if (made := replacement(name, ratio, pattern)) is not None]
    if hybrids and len(models) > 1:
        raise HmfError(f"--{'ratio' if pattern is None else 'pattern'}: makes Hybrids of one MODEL; give only one")
    named = [(model, resolve_base(model)) for model in models]  # before imports that take seconds

    import json
    import tempfile
    from contextlib import ExitStack

    import torch

    from hmf.bench import engine, machine, tables, throughput, variants
    from hmf.model.checkpoint import load_config
    from hmf.model.convert import base_pattern, hybrid_config
    from hmf.serving.serve import require_vllm

    dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    run = throughput.Run(
        throughput.parse_loads(context),
        output,
        repeats,
        dtype,
        gpu_memory_utilization,
        batched_tokens,
        tensor_parallel_size,
        enforce_eager,
    )
    with tempfile.TemporaryDirectory(prefix="hmf-config-") as folder, ExitStack() as named_by_user:
        for settings in hybrids:
            config = load_config(named[0][1], weights=False)
            place = Path(folder) / str(len(named))
            named_by_user.enter_context(standing_for(place, models[0]))
            hybrid_config(config, base_pattern(config, settings)).save_pretrained(place)
            named.append((f"{models[0]} with {settings.mixer if pattern is None else 'a pattern'}", place))
        if tensor_parallel_size > max(1, gpus := torch.cuda.device_count()):
            raise HmfError(f"--tensor-parallel-size: {tensor_parallel_size} is more than this machine's {gpus} GPUs")
        subjects = variants.subjects(named, run, hf_overrides, variant or ())
        require_vllm()
        measured: list[engine.Measured | None] = []
        errors: list[HmfError] = []
        table: list[dict] = []
        report: dict = {}
        try:
            for outcome in throughput.run_all(subjects, run):
                if isinstance(outcome, HmfError):
                    errors.append(outcome)
                measured.append(None if isinstance(outcome, HmfError) else outcome)
                table = tables.rows(subjects, measured, run)
                facts = {"dtype": dtype, "options": [one.arguments for one in subjects]}
                report = {"rows": table, **facts, "hardware": machine.hardware(), "versions": machine.versions()}
                if json_file is not None:
                    json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        finally:
            if as_json:
                typer.echo(json.dumps(report, indent=2))
            elif table and form == "card":
                typer.echo(tables.card(table, subjects[0].name, run.ranks))
            elif table:
                title = f"{dtype}, {output} tokens decoded per sequence, {batched_tokens:,} tokens per step"
                tables.print_rows(table, title, subjects[0].name)
        if errors:
            raise HmfError("; ".join(map(str, errors)))
