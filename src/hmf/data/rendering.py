# SPDX-License-Identifier: Apache-2.0
"""Chat templates are programs that come with a checkpoint: they run in a process of their own, with limits.

The process runs this file by its path and so without the rest of the package, whose imports take seconds.
"""

from __future__ import annotations

import atexit
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

SECONDS = 5  # of a processor's time, for one conversation
GIB = 2  # of memory
LIMIT = 256 << 20  # characters of a text; as of one record that is read
SHOWN = 500  # characters of a template's own message

_lock = threading.Lock()
_running: tuple[subprocess.Popen[bytes], Connection] | None = None


class RenderError(Exception):
    """A template fails; `refused`: in its own words, by `raise_exception`."""

    def __init__(self, reason: str, refused: bool = False):
        super().__init__(" ".join(reason.split()))
        self.refused = refused


class RenderLimit(RenderError):
    """A template reaches a limit."""


def render(**request: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the parts of it that {% generation %} marks if these are asked for.

    Args:
        request: arguments of transformers' `render_jinja_template`, but one conversation in `messages`.
    Raises:
        RenderError: the template fails.
        RenderLimit: it takes more than SECONDS of a processor or GIB of memory, or writes more than LIMIT characters.
    """
    with _lock:
        process, link = _running or _start()
        try:
            link.send(request)
            text, marks, error = link.recv()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS)  # its code says why
            _stop()
            if process.returncode == -signal.SIGXCPU:
                raise RenderLimit(f"it runs for more than {SECONDS} s") from None
            raise RenderLimit(f"the process that runs it ended with code {process.returncode}") from None
        except BaseException:  # such as Ctrl-C: an answer that comes now would be taken for the next one's
            _stop()
            raise
    if error is not None:
        kind, *details = error
        raise {"limit": RenderLimit, "error": RenderError}[kind](*details)
    return text, marks


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    global _running
    ours, theirs = socket.socketpair()
    with theirs:
        # A group of its own: Ctrl-C is for the process that asks. -P: this folder holds no modules of that process.
        command = [sys.executable, "-P", __file__, str(theirs.fileno())]
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            process_group=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    _running = process, Connection(ours.detach())
    return _running


def _stop() -> None:
    global _running
    if _running is not None:
        process, link = _running
        _running = None
        link.close()
        process.kill()
        process.wait()


def _forget() -> None:
    """In a forked process: the one that runs templates is its parent's."""
    global _running, _lock
    if _running is not None:
        _running[1].close()
    _running, _lock = None, threading.Lock()


def _serve(link: Connection) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    with suppress(ValueError, OSError):  # a system that has no such limit, or a lower one
        resource.setrlimit(resource.RLIMIT_AS, (GIB << 30, GIB << 30))
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    while True:
        request = link.recv()
        used = resource.getrusage(resource.RUSAGE_SELF)
        with suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + SECONDS, most))
        link.send(_rendered(render_jinja_template, **request))


def _rendered(
    function: Any, messages: list[Any], **request: Any
) -> tuple[str, list[tuple[int, int]], tuple[Any, ...] | None]:
    """Text, marks, and the error if there is one: its kind and what it is made of."""
    try:
        [text], marks = function(conversations=[messages], **request)
    except MemoryError:
        return "", [], ("limit", f"it needs more than {GIB} GiB of memory")
    except Exception as error:  # a template may fail in any way that Python code can
        from jinja2 import TemplateError

        return "", [], ("error", str(error)[:SHOWN] or type(error).__name__, type(error) is TemplateError)
    if len(text) > LIMIT:
        return "", [], ("limit", f"it writes more than {LIMIT:,} characters")
    return text, marks[0] if marks else [], None


if __name__ == "__main__":
    with suppress(EOFError, OSError):  # the process that asks has ended
        _serve(Connection(int(sys.argv[1])))
else:
    atexit.register(_stop)
    os.register_at_fork(after_in_child=_forget)
