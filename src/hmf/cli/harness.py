# SPDX-License-Identifier: Apache-2.0
"""`hmf harness`: benchmarks with lm-eval and NeMo Evaluator, and their results files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hmf.cli.shared import MODEL, Device, Dtype, count, epilog, group, tokens
from hmf.errors import HmfError
from hmf.folders import resolve_base

app = group("Run benchmarks with lm-eval and NeMo Evaluator.")

RunFolder = Annotated[Path, typer.Option("--run", help="Run folder that the scores are written to.")]
Name = Annotated[str, typer.Option(help="NAME in scores.NAME-SUITE.json: teacher for the base, primed for the Hybrid.")]
Lengths = Annotated[str, typer.Option(help="Lengths of RULER's prompts, separated by commas, for example 4K,32K,128K.")]


@app.command(
    "lm-eval",
    epilog=epilog(
        "hmf harness lm-eval runs/mine/model --tasks short --run runs/mine",
        "hmf harness lm-eval runs/mine/model --tasks long --lengths 4K,32K --run runs/mine",
        "hmf harness lm-eval runs/mine/model --tasks gsm8k,ifeval --url http://localhost:8000 --run runs/mine",
    ),
)
def lm_eval(
    model: Annotated[str, typer.Argument(help=MODEL)],
    tasks: Annotated[
        str, typer.Option(help="short, long, reasoning, or names of lm-eval's tasks, separated by commas.")
    ],
    run: RunFolder,
    name: Name = "primed",
    url: Annotated[str | None, typer.Option(help="URL of a server that runs the model. Default: load it here.")] = None,
    chat_template: Annotated[
        bool | None, typer.Option(help="Whether prompts use the chat template. Default: the suite's choice.")
    ] = None,
    thinking: Annotated[bool, typer.Option(help="With a chat template: let the model think before it answers.")] = True,
    max_new_tokens: Annotated[int | None, tokens("Longest answer. Default: that of the suite or the task.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Sampling temperature; 0 is greedy. Default: that of the suite or the task."),
    ] = None,
    lengths: Lengths = "",
    shots: Annotated[
        int | None, typer.Option(min=0, help="Few-shot examples in a prompt. Default: as many as the task has.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts of each task, from the first. Default: all.")
    ] = None,
    batch_size: Annotated[int, count("Prompts per batch.")] = 8,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests to the server.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of sampling and of the few-shot examples.")] = 0,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder of task files to use in place of those of lm-eval.")
    ] = None,
    device: Device = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the weights. Default: as stored on a GPU, float32 on a CPU.")
    ] = None,
) -> None:
    """Run tasks of lm-eval on a local model or a server.

    Writes the scores and lm-eval's own results file to the run folder, from which `hmf card` reads them.
    """
    from hmf.config.strict import parse_tokens

    source = resolve_base(model)
    _require_run(run)
    chosen = [task for task in tasks.split(",") if task]
    if not chosen:
        raise HmfError("--tasks: names none; give short, long, reasoning, or names of lm-eval's tasks")
    if task_folder is not None and not task_folder.is_dir():
        raise HmfError(f"--task-folder: {task_folder}: no such folder")
    try:
        asked = tuple(parse_tokens(length) for length in lengths.split(",") if length)
    except ValueError as error:
        raise HmfError(f"--lengths: {error}") from None

    from hmf.evaluation.lm_eval_run import evaluate
    from hmf.evaluation.lm_eval_suites import Options

    options = Options(
        url=url,
        chat=chat_template,
        thinking=thinking,
        batch_size=batch_size,
        concurrency=concurrency,
        limit=limit,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        lengths=asked,
        shots=shots,
        seed=seed,
        device=device,
        dtype=dtype,
        task_folder=task_folder,
    )
    _show(evaluate(source, chosen, run, name, options))


@app.command(epilog=epilog("hmf harness nemo runs/mine/model --url http://localhost:8000 --run runs/mine"))
def nemo(
    model: Annotated[str, typer.Argument(help="The model's name on the server.")],
    url: Annotated[str, typer.Option(help="URL at which NeMo Evaluator's containers reach the server.")],
    run: RunFolder,
) -> None:
    """Print the command that runs NeMo Evaluator.

    The command evaluates AIME24/25, GPQA, LiveCodeBench v5, BFCL v3/v4, IFBench and SciCode with answers of at most 64K
    tokens, as hmf's configuration nemo.yaml says. The launcher needs docker, and is installed separately.
    """
    _require_run(run)

    from hmf.evaluation.nemo import command

    typer.echo(command(model, url, run / "nemo"))


@app.command(
    epilog=epilog(
        "hmf harness read runs/mine/nemo/*/*/artifacts/results.yml --suite nemo --run runs/mine",
        "hmf harness read results_2026-01-01.json --suite lm-eval --run runs/mine --name teacher",
    )
)
def read(
    files: Annotated[list[Path], typer.Argument(help="Results files of lm-eval, NeMo Evaluator or NeMo-Skills.")],
    suite: Annotated[str, typer.Option(help="SUITE in scores.NAME-SUITE.json.")],
    run: RunFolder,
    name: Name = "primed",
) -> None:
    """Read results files into the scores of a run.

    Copies the files into the run folder; each score names the file that it is from. Metrics that are not
    known to be a share from 0 to 1 are kept beside the scores.
    """
    _require_run(run)
    for file in files:  # before imports that take seconds
        if not file.is_file():
            raise HmfError(f"{file}: no such file; give a results file of lm-eval, NeMo Evaluator or NeMo-Skills")

    from hmf.evaluation.harness import write_scores

    _show(write_scores(run, name, suite, files))


def _require_run(run: Path) -> None:
    if not run.is_dir():
        raise HmfError(f"--run: {run}: no such folder; give the output folder of a run")


def _show(file: Path) -> None:
    """Print the rows of a scores file."""
    from hmf.config.strict import parse_sealed
    from hmf.evaluation.results import Scores

    scores = Scores.model_validate(parse_sealed(file.read_text(encoding="utf-8")))
    width = max(map(len, scores.tasks), default=0)
    for key, row in scores.tasks.items():
        low, high = row.interval
        cut = "" if row.cut_off is None else f"; {row.cut_off} cut off"
        extra = row.model_extra or {}
        how = extra["metric"] if extra["filter"] == "none" else f"{extra['metric']}, {extra['filter']}"
        typer.echo(
            f"{key:<{width}}  {100 * row.accuracy:5.1f}  ({100 * low:.1f}-{100 * high:.1f}, n = {row.n:,}{cut})  {how}"
        )
    typer.echo(f"saved {file}")
