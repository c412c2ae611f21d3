# SPDX-License-Identifier: Apache-2.0
"""What one does with a model: `hmf evaluate`, `chat`, `serve`, `convert`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hmf.cli.shared import MODEL, AsJson, Device, Dtype, NativeFormat, Out, epilog, group, tokens
from hmf.errors import HmfError
from hmf.folders import require_unused, resolve_base

app = group("")


@app.command(epilog=epilog(
    "hmf evaluate runs/quickstart/model teacher",
    "hmf evaluate teacher --tasks recall,arithmetic --samples 100 --length 512 --json",
))  # fmt: skip
def evaluate(
    models: Annotated[list[str], typer.Argument(help=f"Models side by side. {MODEL}", metavar="MODEL...")],
    tasks: Annotated[str, typer.Option(help="Generated tasks, joined by commas; empty for none.")] = "recall,needle",
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task.")] = 50,
    length: Annotated[int, tokens("Of the longest prompts and of the text window.", 96)] = 512,
    text_bytes: Annotated[int, typer.Option(min=0, help="Held-out library text to score.")] = 100_000,
    thinking: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = True,
    max_new_tokens: Annotated[int, tokens("Longest answer.")] = 160,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered together.")] = 16,
    baselines: Annotated[bool, typer.Option(help="Also score order-3 models of bytes and of tokens.")] = False,
    device: Device = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights; left out: as stored on a GPU, float32 on a CPU.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score models: held-out library text and generated tasks."""
    if len(set(models)) < len(models):
        raise HmfError("MODEL: one is named twice; name each once")
    folders = {model: resolve_base(model) for model in models}  # before imports that take seconds

    import json

    from hmf.config.runs import EvaluateSettings
    from hmf.data.tasks import TASKS
    from hmf.errors import unknown_name
    from hmf.evaluation.run import evaluate_checkpoint
    from hmf.report.table import print_scores

    chosen = [task for task in tasks.split(",") if task]
    for task in chosen:
        if task not in TASKS:
            raise HmfError(f"--tasks: {unknown_name('task', task, TASKS)}")
    settings = EvaluateSettings.model_validate({
        "tasks": chosen, "samples": samples, "length": length, "text_bytes": text_bytes, "thinking": thinking,
        "max_new_tokens": max_new_tokens, "batch_size": batch_size,
    })  # fmt: skip
    scores = {
        model: evaluate_checkpoint(folder, settings, device, dtype, baselines, name=model)
        for model, folder in folders.items()
    }
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
    else:
        print_scores(scores)


@app.command(epilog=epilog(
    "hmf chat runs/quickstart/model",
    "hmf chat teacher --no-thinking",
    "hmf chat runs/quickstart/model --url http://localhost:8000",
))  # fmt: skip
def chat(
    model: Annotated[str, typer.Argument(help=MODEL)],
    thinking: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = True,
    max_new_tokens: Annotated[int, tokens("Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    url: Annotated[str | None, typer.Option(help="Of a running server; left out: load the model here.")] = None,
) -> None:
    """Talk to a model in the terminal.

    It is loaded here, or a server at `--url` has it.
    """
    source = resolve_base(model)

    from hmf.serving.chat import LocalChat, ServerChat, run

    options: Any = {"thinking": thinking, "max_new_tokens": max_new_tokens, "temperature": temperature}
    run(LocalChat(source, **options) if url is None else ServerChat(source, url, **options), source)


@app.command(epilog=epilog(
    "hmf serve runs/quickstart/model",
    "hmf serve runs/quickstart/model -- --port 9000 --max-model-len 4096",
    "VLLM_API_KEY=a-long-secret hmf serve runs/quickstart/model -- --host 0.0.0.0",
))  # fmt: skip
def serve(
    model: Annotated[str, typer.Argument(help=MODEL)],
    extra: Annotated[list[str] | None, typer.Argument(help="After --: options of vLLM's own, before ours.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the command and start nothing.")] = False,
) -> None:
    """Serve by vLLM: an OpenAI-compatible API.

    vLLM starts with the right options for this checkpoint and machine; Ctrl-C stops it.
    """
    source = resolve_base(model)

    from hmf.serving import serve as server

    if not dry_run:
        server.require_vllm()
    launch = server.prepare(source, extra or ())
    typer.echo(launch.line)
    typer.echo(launch.access)
    if not dry_run:
        server.run(launch)
        typer.echo("The server has stopped.")


@app.command(epilog=epilog("hmf convert runs/quickstart/model --to qwen3_5 --out runs/quickstart/native"))
def convert(
    model: Annotated[str, typer.Argument(help=f"GDN Hybrid of a dense Qwen3. {MODEL}")],
    to: Annotated[NativeFormat, typer.Option(help="Stock architecture that says the same.")],
    out: Out,
) -> None:
    """Write a Hybrid as a stock model.

    For engines and tools that do not have this package. Its numbers stay the same. What the stock architecture cannot
    express is refused.
    """
    require_unused(out)
    source = resolve_base(model)

    from hmf.model.native import convert as run

    run(source, out)
    typer.echo(f"saved {out} as {to}; transformers and vLLM load it without hmf")
