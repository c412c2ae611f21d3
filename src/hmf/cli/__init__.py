# SPDX-License-Identifier: Apache-2.0
"""The command line: each command parses its options and makes one call. An HmfError is printed in one line, with exit
code 2."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

import hmf
from hmf import processors
from hmf.cli import bench, data, harness, machine, models, runs, stages
from hmf.cli.shared import Group, group
from hmf.errors import HmfError, one_line

DEBUG = "HMF_DEBUG"  # if set, unexpected errors show their traceback


class Stopped(Exception):
    """Raised in place of a KeyboardInterrupt, whose message Typer would replace by a bare exit code."""


class _Commands(Group):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Stopped(f"stopped {stop}".strip()) from None


app = group(
    "Turn a pre-trained Transformer into a Hybrid of attention and state-space layers; train, evaluate, serve it.",
    cls=_Commands,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (stages, models, runs, machine):
    app.add_typer(commands.app)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(harness.app, name="harness")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hmf {hmf.__version__}")
        raise typer.Exit


def _show_tracebacks(asked: bool) -> None:
    if asked:
        os.environ[DEBUG] = "1"


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", callback=_show_tracebacks, help="Show the traceback of an unexpected error.")
    ] = False,
) -> None:
    """Global options."""


def main() -> None:
    """Entry point of the `hmf` script."""
    processors.share()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # The Hub library shows progress bars for reading and writing files; long steps of hmf show their own.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app([_at_home(word) for word in sys.argv[1:]], prog_name="hmf", standalone_mode=False)
    except HmfError as error:
        _end(str(error), 2)
    except TyperException as error:  # invalid options
        message, context = error.format_message().removesuffix("."), getattr(error, "ctx", None)
        no_fix = message.startswith(("Missing", "No such")) and not message.endswith("?")
        hint = f"; see {context.command_path} --help" if context and no_fix else ""
        _end(message + hint, 2)
    except Stopped as stop:
        _end(str(stop), 130)
    except BrokenPipeError:  # the reader of the output, such as a pager, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SystemExit:
        raise
    except BaseException as error:  # a panic in a Rust library is not an Exception
        if os.environ.get(DEBUG):
            raise
        # For example a full disk, or a folder without write permission.
        if isinstance(error, OSError) and error.strerror:
            _end(f"{error.filename or 'a file'}: {error.strerror}", 2)
        with tempfile.NamedTemporaryFile("w", prefix="hmf-", suffix=".log", delete=False, encoding="utf-8") as log:
            traceback.print_exc(file=log)
        reason = str(error).strip().split("\n")[0]
        _end(f"unexpected {type(error).__name__}: {reason}; please report it, with the file {log.name}", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _at_home(word: str) -> str:
    """`word` with a ~/ at its start, or at that of an option's value (--out=~/x), where shells leave it, expanded."""
    return re.sub(r"\A(--[\w-]+=)?~/", lambda match: f"{match[1] or ''}{os.path.expanduser('~/')}", word)


def _end(message: str, code: int) -> None:
    """Print one line and exit."""
    if message:
        typer.echo(f"hmf: {one_line(message)}", err=True)
    sys.exit(code)
