# SPDX-License-Identifier: Apache-2.0
"""The processes of a server: vLLM is started, watched and ended, and none of its processes is left behind.

This module imports neither torch nor transformers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hmf.errors import HmfError

# Environment variable: a file to which a process of the server writes why it cannot continue. `hmf serve` prints it.
REASON_FILE = "HMF_SERVE_REASON_FILE"
GRACE = 6.0  # seconds that vLLM has to stop before it is killed


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run `vllm serve ARGUMENTS` until Ctrl-C, SIGTERM or SIGHUP stops it, which takes at most about 10 seconds.

    None of its processes is left behind, even if this process is killed. Raises HmfError if the server ends by itself,
    with the reason if one of its processes reported one.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    stops: list[float] = []  # times of the signals
    with tempfile.TemporaryDirectory(prefix="hmf-serve-") as folder, _handled(lambda: stops.append(time.monotonic())):
        reason = Path(folder) / "reason"
        environment = os.environ | environment | {REASON_FILE: str(reason)}
        # The server has its own process group: Ctrl-C reaches only this process, which can then end the whole group.
        server = subprocess.Popen(command, env=environment, process_group=0)
        with _ended_with_us(server.pid):
            try:
                signalled = False
                while (code := _wait(server, 0.2)) is None:
                    if stops and not signalled:
                        server.send_signal(signal.SIGTERM)
                        signalled = True
                    if len(stops) > 1 or (stops and time.monotonic() - stops[0] > GRACE):
                        break
            finally:
                end_group(server)
        if not stops:
            why = reason.read_text(encoding="utf-8").strip() if reason.is_file() else ""
            raise HmfError(why or f"the server ended by itself ({_ending(code)}); read its last messages above")


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


@contextmanager
def _handled(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` on Ctrl-C, SIGTERM and SIGHUP.

    The handlers are installed before the server starts. Otherwise the server would inherit ignored signals, as shells
    set them for background jobs in scripts.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop()) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Waits until the other end of the pipe is closed, which also happens when that process is killed.
_WATCH = 'read line || { kill -TERM "-$1"; sleep 3; kill -KILL "-$1"; } 2>/dev/null'


@contextmanager
def _ended_with_us(group: int) -> Iterator[None]:
    """End the process group if this process ends during the block, also by `kill -9`."""
    watch = subprocess.Popen(
        ["/bin/sh", "-c", _WATCH, "sh", str(group)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0
    )
    try:
        yield
    finally:
        watch.communicate(b"\n")


def _wait(server: subprocess.Popen, seconds: float) -> int | None:
    try:
        return server.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def end_group(server: subprocess.Popen) -> None:
    """Stop the process group that `server` leads; kill the processes that are left after three seconds."""
    with suppress(ProcessLookupError):  # no process is left
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        for _ in range(30):
            server.poll()
            os.killpg(server.pid, 0)
            time.sleep(0.1)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
