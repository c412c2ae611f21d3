# SPDX-License-Identifier: Apache-2.0
"""Commands on a run with a finished model: `hmf card`, `report`, `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hmf import hub
from hmf.cli.shared import epilog, group, require_run
from hmf.gpus import parse_gpus

app = group("")
Run = Annotated[Path, typer.Argument(help="Run folder of prime or finetune with a finished model.", metavar="RUN")]
PlannedGpu = Annotated[str, typer.Option(help="GPUs that serving is planned for, for example h100 or h200x8.")]


@app.command(epilog=epilog("hmf card runs/quickstart", "hmf card runs/quickstart --gpu l4 --force"))
def card(
    run: Run,
    gpu: PlannedGpu = "h200",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a README.md that hmf did not write.")] = False,
) -> None:
    """Write the model card of a run.

    Writes RUN/model/README.md from the recipe, the config and the results files in the run folder. The card states
    which figures were not measured.
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

    RUN/report.html shows times, losses, layers, scores, memory, throughput and samples, and names the file that each is
    from. It states what was not measured. A browser shows it without a network.
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
    repo: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="Model repository on the Hub; created if it does not exist.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files that would be uploaded, and upload nothing.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is created.")] = False,
    gpu: PlannedGpu = "h200",
) -> None:
    """Upload a run's model and card to the Hub.

    Uploads the model folder, the model card with the repository's name in its commands, and the results files that it
    links to.
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
        typer.echo(f"would upload {what} to {repo}; nothing was uploaded")
    else:
        typer.echo(f"uploaded {what} to {hub.upload(repo, files, private)}")
