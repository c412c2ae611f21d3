# SPDX-License-Identifier: Apache-2.0
"""The command line: parse, build the settings, make one call. Errors of the user's are one line and exit code 2."""

from __future__ import annotations

import os
import sys

import typer

from hmf.cli import bench, data, machine, models, stages
from hmf.cli.shared import group
from hmf.errors import HmfError

app = group(
    "Turn a pre-trained Transformer into a Hybrid of attention and state-space layers; train, evaluate, serve it.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for commands in (stages, models, machine):
    app.add_typer(commands.app)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")


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
