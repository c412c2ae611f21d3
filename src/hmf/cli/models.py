# SPDX-License-Identifier: Apache-2.0
"""Commands that use a model: `hmf evaluate`, `chat`, `serve`, `convert`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from hmf.cli.shared import (
    HYBRID,
    MODEL,
    AsJson,
    Command,
    Compose,
    ComposeChunk,
    Device,
    Dtype,
    NativeFormat,
    Out,
    composition,
    count,
    epilog,
    group,
    token_list,
    tokens,
)
from hmf.errors import HmfError
from hmf.folders import require_unused, resolve_base

app = group("")
Endpoint = Literal["completions", "chat"]
# What only a suite has, and what only the small tasks have.
OF_SUITES = (
    "lengths",
    "seed",
    "temperature",
    "top_p",
    "likelihood",
    "url",
    "endpoint",
    "concurrency",
    "parity_bound",
    "restart",
)
OF_TASKS = ("length", "text_bytes", "baselines", "compose", "compose_chunk")


@app.command(
    epilog=epilog(
        "hmf evaluate runs/quickstart/model teacher",
        "hmf evaluate teacher --tasks recall,arithmetic --samples 100 --length 512 --json",
        "hmf evaluate runs/quickstart/model teacher --suite retention --lengths 2K,4K",
        "hmf evaluate runs/sft/model --suite retention --lengths 4K,128K --url http://localhost:8000 --parity",
        "hmf evaluate runs/quickstart/model --length 4096 --text-bytes 0 --compose concatenated,fused",
    )
)
def evaluate(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help=f"Models to compare. {MODEL}", metavar="MODEL...")],
    tasks: Annotated[
        str | None,
        typer.Option(help="Generated tasks, separated by commas; '' for none.", show_default="recall,needle, or all"),
    ] = None,
    samples: Annotated[int, count("Prompts per task.", 10**6)] = 50,
    length: Annotated[int, tokens("Length of the longest prompts, and of the window for text.", 96)] = 512,
    text_bytes: Annotated[int, typer.Option(min=0, help="Bytes of held-out text to score.")] = 100_000,
    thinking: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = True,
    max_new_tokens: Annotated[
        int | None,
        tokens("Largest length of an answer. Default: 160; with a suite, 1024 more than the expected answer."),
    ] = None,
    batch_size: Annotated[int, count("Prompts per batch.")] = 16,
    baselines: Annotated[bool, typer.Option(help="Also score order-3 n-gram models of bytes and of tokens.")] = False,
    compose: Compose = None,
    compose_chunk: ComposeChunk = 768,
    device: Device = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the weights. Default: as stored on a GPU, float32 on a CPU.")
    ] = None,
    as_json: AsJson = False,
    suite: Annotated[
        str | None, typer.Option(help="Suite of tasks to run in place of the small tasks: retention.")
    ] = None,
    lengths: Annotated[
        Any, token_list("Prompt lengths of the suite, for example 4K,128K.", show_default="4K, or the context")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the suite's prompts and of sampling.")] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature of the suite; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Top-p (nucleus) sampling of the suite.")] = 1.0,
    likelihood: Annotated[
        bool, typer.Option(help="Also compute the likelihood of the suite's expected answers.")
    ] = True,
    url: Annotated[str | None, typer.Option(help="OpenAI-compatible server that answers the suite.")] = None,
    endpoint: Annotated[
        Endpoint, typer.Option(help="What the server receives. completions: the prompt's tokens; chat: messages.")
    ] = "completions",
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests to the server.")] = 16,
    parity: Annotated[
        bool, typer.Option("--parity", help="Also compare the server's probabilities with those of transformers.")
    ] = False,
    parity_bound: Annotated[
        float, typer.Option(min=0, help="Largest mean KL divergence per token that passes, in nats.")
    ] = 0.01,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results.", show_default="run folder of the first model in one"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the results: scores.NAME.json.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Remove the suite's answers and start again.")] = False,
) -> None:
    """Score models on held-out text and generated tasks.

    With `--suite`: tasks that Hybrids are likely to lose, by prompt length, for local models or for a server. A suite
    that was stopped continues where it stopped. The exit code is 1 if the parity check fails.
    """
    if len(set(models)) < len(models):
        raise HmfError("MODEL: a model is named twice; name each model once")
    explicit = {option for option in context.params if _is_given(context, option)}
    if suite is None and parity:
        suite, tasks = "retention", tasks or ""
    for option in OF_TASKS if suite else OF_SUITES:
        if option in explicit:
            named = f"--{option.replace('_', '-')}"
            raise HmfError(
                f"{named}: is not for a suite" if suite else f"{named}: is for a suite; add --suite retention"
            )
    # before imports that take seconds
    folders = {model: resolve_base(model, weights=url is None or parity) for model in models}

    if suite is None:
        settings = {
            "tasks": [task for task in ("recall,needle" if tasks is None else tasks).split(",") if task],
            "samples": samples,
            "length": length,
            "text_bytes": text_bytes,
            "thinking": thinking,
            "max_new_tokens": max_new_tokens or 160,
            "batch_size": batch_size,
        }
        how = {
            "device": device,
            "dtype": dtype,
            "with_baselines": baselines,
            "compose": composition(compose, compose_chunk),
        }
        _evaluate_tasks(folders, settings, how, as_json, out, name)
        return
    from hmf.evaluation.command import ALLOWANCE, Options
    from hmf.evaluation.command import evaluate as run

    options = Options(
        suite=suite,
        tasks=tasks,
        lengths=lengths or (),
        samples=samples,
        seed=seed,
        thinking=thinking,
        max_new_tokens=max_new_tokens or ALLOWANCE,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        likelihood=likelihood,
        device=device,
        dtype=dtype,
        url=url,
        endpoint=endpoint,
        concurrency=concurrency,
        parity=parity_bound if parity else None,
        out=out,
        name=name,
        restart=restart,
    )
    stores = run(folders, options)
    _show_suites(stores, as_json)
    for model, store in stores.items():
        if parity and not store.scores["parity"]["passed"]:
            line = f"hmf: {model}: parity with {url} is not passed; check that it serves this model, and both dtypes"
            typer.echo(line, err=True)
            raise typer.Exit(1)


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _show_suites(stores: Any, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from hmf.evaluation.command import pairs
    from hmf.evaluation.results import Scores
    from hmf.report.suites import print_suites

    compared = pairs(stores)
    if as_json:
        first = next(iter(stores))
        content = {model: store.scores for model, store in stores.items()}
        for other, paired in compared.items():
            content[other] = {
                **content[other],
                "paired": {"with": first, "tasks": {task: pair and asdict(pair) for task, pair in paired.items()}},
            }
        typer.echo(json.dumps(content, indent=2))
    else:
        print_suites({model: Scores.model_validate(store.scores) for model, store in stores.items()}, compared)
    for store in stores.values():
        if store.file is not None:
            typer.echo(f"saved {store.file}, and the answers in {store.home}", err=True)


def _evaluate_tasks(
    folders: dict[str, Path],
    fields: dict[str, Any],
    how: dict[str, Any],
    as_json: bool,
    out: Path | None,
    name: str | None,
) -> None:
    """Score models on text and the small tasks.

    fields: the fields of `EvaluateSettings`. how: arguments of `evaluate_checkpoint`.
    """
    import json

    from hmf.config.runs import EvaluateSettings
    from hmf.data.tasks import TASKS, require_template
    from hmf.data.tokenizer import load_tokenizer
    from hmf.errors import require_names, rewriting
    from hmf.evaluation.command import save_tasks, task_files
    from hmf.evaluation.run import evaluate_checkpoint
    from hmf.report.table import print_scores

    require_names("--tasks", "task", fields["tasks"], TASKS)
    settings = EvaluateSettings.model_validate(fields)
    files = task_files(folders, out, name, how["compose"])
    for model, folder in folders.items() if settings.tasks else ():
        tokenizer = load_tokenizer(folder)
        with rewriting(partial("{}: --{}".format, model)):
            require_template(settings.tasks, tokenizer)
    scores = {model: evaluate_checkpoint(folder, settings, name=model, **how) for model, folder in folders.items()}
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
    else:
        print_scores(scores)
    save_tasks(scores, files, how["compose"])
    for file in files.values():
        typer.echo(f"saved {file}", err=True)


@app.command(
    epilog=epilog(
        "hmf chat runs/quickstart/model",
        "hmf chat teacher --no-thinking",
        "hmf chat runs/quickstart/model --url http://localhost:8000",
        "hmf chat runs/quickstart/model --compose concatenated,fused --compose-chunk 512",
    )
)
def chat(
    model: Annotated[str, typer.Argument(help=MODEL)],
    thinking: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = True,
    max_new_tokens: Annotated[int, tokens("Largest length of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Temperature of sampling; 0 is greedy.")] = 0.0,
    url: Annotated[str | None, typer.Option(help="Server that runs the model. Default: load it here.")] = None,
    compose: Compose = None,
    compose_chunk: ComposeChunk = 768,
) -> None:
    """Chat with a model in the terminal.

    The model is loaded in this process, or runs on a server at `--url`.
    """
    if compose is not None and url is not None:
        raise HmfError("--compose: a server processes prompts as a whole; leave --compose or --url out")
    source = resolve_base(model)

    from hmf.serving.chat import LocalChat, ServerChat, run

    options: Any = {"thinking": thinking, "max_new_tokens": max_new_tokens, "temperature": temperature}
    if url is None:
        run(LocalChat(source, **options, compose=composition(compose, compose_chunk)), model)
    else:
        run(ServerChat(source, url, **options), model)


class _Serve(Command):
    """Names the place of vLLM's options where one is given as an option of hmf."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:
            if (name := getattr(error, "option_name", None)) is None:
                raise
            raise HmfError(f"{name}: is not an option of hmf serve; those of vLLM follow --: -- {name} ...") from None


@app.command(
    cls=_Serve,
    epilog=epilog(
        "hmf serve runs/quickstart/model",
        "hmf serve runs/quickstart/model -- --port 9000 --max-model-len 4096",
        "VLLM_API_KEY=a-long-secret hmf serve runs/quickstart/model -- --host 0.0.0.0",
    ),
)
def serve(
    model: Annotated[str, typer.Argument(help=MODEL)],
    extra: Annotated[
        list[str] | None, typer.Argument(help="Options for vLLM, after --. They override those that hmf chooses.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the command and start nothing.")] = False,
) -> None:
    """Serve an OpenAI-compatible API with vLLM.

    vLLM is started with options that fit this checkpoint and machine. Ctrl-C stops it.
    """
    source = resolve_base(model)

    from hmf.serving import serve as server
    from hmf.serving.process import run

    if not dry_run:
        server.require_vllm()
    launch = server.prepare(source, extra or ())
    if not dry_run:
        launch.require_port()
    typer.echo(launch.line)
    typer.echo(launch.access)
    if not dry_run:
        run(launch.arguments, launch.environment)
        typer.echo("The server has stopped.")


@app.command(epilog=epilog("hmf convert runs/quickstart/model --to qwen3_5 --out runs/quickstart/native"))
def convert(
    model: Annotated[str, typer.Argument(help=f"GDN Hybrid of Qwen3, Qwen3.5 or Qwen3-Next. {HYBRID}")],
    to: Annotated[NativeFormat, typer.Option(help="Stock architecture to convert to.")],
    out: Out,
) -> None:
    """Convert a Hybrid to a stock architecture.

    The result can be used by engines and tools without this package, and computes the same outputs. A Hybrid that the
    stock architecture cannot represent is refused.
    """
    require_unused(out)
    source = resolve_base(model)

    from hmf.model.native import convert as run

    run(source, out, to)
    typer.echo(f"saved {out} as {to}; transformers and vLLM load it without hmf")
