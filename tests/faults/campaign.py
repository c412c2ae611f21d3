# SPDX-License-Identifier: Apache-2.0
"""Runs of the command line in this process, each one held to what docs/reliability.md promises.

`SIZE` (the environment variable HMF_FAULTS) multiplies how much is tried. 1, as in `make test`, is derandomised.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, Phase, settings

from hmf.cli import main
from hmf.model.checkpoint import load_config

SIZE = int(os.environ.get("HMF_FAULTS") or 1)
MEMORY = 4 * 2**30  # bytes of address space that a run may take beside what this process has
SECONDS = 20  # of the processor, for a run on models of some ten thousand parameters
TRAINING = 4  # as many for a run that may train for long: then comes Ctrl-C
TRAINS = ("prime", "distill", "finetune")
WRITES = (*TRAINS, "init", "export", "data prepare")


def examples(count: int) -> settings:
    """Hypothesis's settings for a test of `count` examples, times SIZE."""
    return settings(
        max_examples=count * SIZE,
        derandomize=SIZE == 1,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # what fails is named, and small already
    )


def digest(*places: Path) -> dict[str, str]:
    """What lies in folders: every file by the hash of its bytes, every link by where it leads."""
    found = {}
    for item in sorted(item for place in places for item in (place, *place.rglob("*"))):
        if item.is_symlink():
            found[str(item)] = f"-> {item.readlink()}"
        elif item.is_file():
            found[str(item)] = hashlib.sha256(item.read_bytes()).hexdigest()
    return found


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Bounded memory, and Ctrl-C after `seconds` of the processor: a busy machine does not change the outcome."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds, 5)  # again, as a library may swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def call(*arguments: object, seconds: float = SECONDS) -> Outcome:
    """`hmf ARGUMENTS` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["hmf", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.StringIO("one\n\n")),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        limited(seconds),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return Outcome(code, out.getvalue(), err.getvalue())


@dataclass
class Campaign:
    """Counts runs, and raises AssertionError at the first that does other than is promised."""

    figures: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.figures[what] = self.figures.get(what, 0) + 1

    def run(self, *arguments: object, inputs: Path, output: Path | None = None, damage: str = "") -> Outcome:
        """Run a command on the files under `inputs`, and look at all it leaves.

        output: the folder that it writes if it writes one, whose parent holds nothing else; None: not looked at.
        damage: what is wrong.
        """
        command = " ".join(str(part) for part in arguments[: 2 if arguments[0] == "data" else 1])
        before = digest(inputs)
        try:
            ended = call(*arguments, seconds=TRAINING if command in TRAINS else SECONDS)
            require_promised(ended, trains=command in TRAINS)
            assert digest(inputs) == before, "the inputs have changed"
            if output is not None:
                self._require_whole(ended, output, command)
        except Exception as error:
            raise AssertionError(f"hmf {' '.join(map(str, arguments))} with {damage}: {error}") from error
        self.count(f"{command}: {({0: 'successes', 2: 'refusals'}).get(ended.code, 'stopped while they trained')}")
        return ended

    def _require_whole(self, ended: Outcome, output: Path, command: str) -> None:
        left = sorted(item.name for item in output.parent.iterdir())
        assert left == [output.name] if ended.code == 0 and command in WRITES else left in ([], [output.name]), left
        if command in ("init", "export") or command not in WRITES:
            assert bool(left) == (ended.code == 0 and command in WRITES), f"exit code {ended.code}, and there is {left}"
        else:  # they go on where they stopped
            assert not (output / ".running").exists()
        if command == "data prepare":
            assert (output / "index.json").exists() == (ended.code == 0)
        for model in (output, output / "stage0", output / "stage1", output / "model"):
            if (model / "config.json").exists():
                load_config(model)


def require_promised(ended: Outcome, trains: bool = False) -> None:
    """AssertionError unless a command succeeded, or ended in one line with exit code 2."""
    lines = ended.err.splitlines()
    assert "Traceback" not in ended.err, ended.err
    if not ended.code:
        return
    last = lines[-1] if lines else ""
    if "; please report it, with the file " in last:
        log = Path(last.rpartition(" ")[2])
        text = log.read_text()
        log.unlink()
        raise AssertionError(f"{last}\n{text[-6000:]}")
    if trains and ended.code == 130:
        assert last.startswith("hmf: stopped"), ended.err
        return
    assert ended.code == 2, f"exit code {ended.code}: {ended.err}"
    assert last.startswith("hmf: ") and len(last) > len("hmf: "), ended.err
    if not trains:  # progress of a training stands on stderr too
        assert all(line.startswith("hmf: ") for line in lines), ended.err
