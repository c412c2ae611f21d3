# SPDX-License-Identifier: Apache-2.0
"""What one does with a model: `hmf evaluate`, `chat`, `serve`, `convert`, `card`, `report`, `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hmf import hub
from hmf.cli.shared import MODEL, AsJson, Device, Dtype, NativeFormat, Out, epilog, group, tokens
from hmf.errors import HmfError
from hmf.folders import require_unused, resolve_base
from hmf.gpus import parse_gpus

app = group("")


@app.command(
    epilog=epilog(
        "hmf evaluate runs/quickstart/model teacher",
        "hmf evaluate teacher --tasks recall,arithmetic --samples 100 --length 512 --json",
    )
)
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
    settings = EvaluateSettings.model_validate(
        {
            "tasks": chosen,
            "samples": samples,
            "length": length,
            "text_bytes": text_bytes,
            "thinking": thinking,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
        }
    )
    scores = {
        model: evaluate_checkpoint(folder, settings, device, dtype, baselines, name=model)
        for model, folder in folders.items()
    }
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
    else:
        print_scores(scores)


@app.command(
    epilog=epilog(
        "hmf chat runs/quickstart/model",
        "hmf chat teacher --no-thinking",
        "hmf chat runs/quickstart/model --url http://localhost:8000",
    )
)
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


@app.command(
    epilog=epilog(
        "hmf serve runs/quickstart/model",
        "hmf serve runs/quickstart/model -- --port 9000 --max-model-len 4096",
        "VLLM_API_KEY=a-long-secret hmf serve runs/quickstart/model -- --host 0.0.0.0",
    )
)
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


Run = Annotated[Path, typer.Argument(help="Run folder with a finished model, of prime or finetune.", metavar="RUN")]
PlannedGpu = Annotated[str, typer.Option(help="What serving is planned for, for example h100 or h200x8.")]


@app.command(epilog=epilog("hmf card runs/quickstart", "hmf card runs/quickstart --gpu l4 --force"))
def card(
    run: Run,
    gpu: PlannedGpu = "h200",
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that hmf did not write.")] = False,
) -> None:
    """Write the model card of a run.

    RUN/model/README.md, from the recipe, the config and the results files in the run folder. What was not measured is
    named as such.
    """
    parse_gpus(gpu)
    require_run(run)

    from hmf.report.card import write_card

    typer.echo(f"saved {write_card(run, gpu=gpu, force=force)}")


@app.command(epilog=epilog("hmf report runs/quickstart", "hmf report runs/quickstart --gpu l4"))
def report(
    run: Run,
    gpu: PlannedGpu = "h200",
    force: Annotated[bool, typer.Option("--force", help="Replace a report.html that hmf did not write.")] = False,
) -> None:
    """Write the report of a run, one HTML page.

    RUN/report.html: times, losses, layers, scores, memory and throughput, samples, and the files that each is from. It
    needs no network. What was not measured is named as such.
    """
    parse_gpus(gpu)
    require_run(run)

    from hmf.report.page import write_report

    typer.echo(f"saved {write_report(run, gpu=gpu, force=force)}")


@app.command(
    epilog=epilog(
        "hmf push runs/quickstart --repo my-name/my-hybrid --dry-run",
        "HF_TOKEN=hf_... hmf push runs/quickstart --repo my-name/my-hybrid --private",
    )
)
def push(
    run: Run,
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Model repository of the Hub; made if missing.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent; nothing is.")] = False,
    private: Annotated[bool, typer.Option("--private", help="If the repository is made: for its owner only.")] = False,
    gpu: PlannedGpu = "h200",
) -> None:
    """Upload a run's model with its card.

    To the Hugging Face Hub: the model folder, the card with that name in its commands, and the results it links to.
    """
    parse_gpus(gpu)
    require_run(run)
    hub.require_repository(repo)

    from hmf.report.push import push_files

    files = push_files(run, repo, gpu)
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    for name, size in sizes.items():
        typer.echo(f"{size:>15,} bytes  {name}")
    what = f"{len(sizes)} files, {sum(sizes.values()):,} bytes"
    if dry_run:
        typer.echo(f"would send {what} to {repo}; nothing was sent")
    else:
        typer.echo(f"sent {what} to {hub.upload(repo, files, private)}")


def require_run(run: Path) -> None:
    """HmfError for a run folder that is not there, before imports that take seconds."""
    if not run.is_dir():
        raise HmfError(f"{run}: no such run folder; give the output folder of hmf prime or hmf finetune")
