# SPDX-License-Identifier: Apache-2.0
"""Messages to users: the exception class, notices, and the error text for unknown names."""

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path


class HmfError(Exception):
    """Bad input. The message is one line with file, key and fix; the command line prints it and exits with 2."""


def one_line(message: str) -> str:
    """The message with control characters escaped, so that text from a file cannot break it into several lines."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)


# Of the blocks that this thread executes, the innermost last.
_rewriters: ContextVar[tuple[Callable[[str], str], ...]] = ContextVar("rewriters", default=())


@contextmanager
def rewriting(rewrite: Callable[[str], str]) -> Iterator[None]:
    """In the block, notices and an HmfError have the text that `rewrite` gives."""
    outer = _rewriters.get()
    _rewriters.set((*outer, rewrite))
    try:
        yield
    except HmfError as error:
        error.args = (rewrite(str(error)),)
        raise
    finally:
        _rewriters.set(outer)


def standing_for(folder: str | Path, name: str | Path) -> AbstractContextManager[None]:
    """In the block, messages name `name` in place of the temporary `folder`, which the user never saw."""
    return rewriting(lambda line: line.replace(str(folder), str(name)))


def naming_config(source: str | Path | None, besides: Collection[str] = ()) -> AbstractContextManager[None]:
    """In the block, messages that begin with `config.json: KEY` name the file in `source`, the folder, if it is known.

    besides: keys whose values do not come from that file.
    """

    def rewrite(line: str) -> str:
        file, _, rest = line.partition(": ")
        from_file = file == "config.json" and re.split(r"\W", rest, maxsplit=1)[0] not in besides
        return f"{Path(source, file)}: {rest}" if source and from_file else line

    return rewriting(rewrite)


@functools.cache
def print_once(line: str) -> None:
    """Print a line on stderr, the first time that this process has it."""
    print(f"hmf: {one_line(line)}", file=sys.stderr, flush=True)


def notice(line: str) -> None:
    """Print a warning on stderr, once, and only in the process of rank 0."""
    for rewrite in reversed(_rewriters.get()):
        line = rewrite(line)
    if os.environ.get("RANK", "0") == "0":
        print_once(line)


def listed(names: Iterable[str], shown: int = 4, joint: str = ", ") -> str:
    """The first `shown` names in one text, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return joint.join(names[:shown]) + more


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 row, 2,000 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Error text for a name that is not among `known`: it suggests the closest valid name, or lists them."""
    known = sorted(known)
    lower = {candidate.lower(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    fix = f"did you mean {lower[nearest[0]]!r}?" if nearest else f"valid: {listed(known, 40)}"
    return f"unknown {what} {name!r}; {fix}"


def require_names(key: str, what: str, names: Sequence[str], known: Collection[str]) -> None:
    """HmfError, which begins with `key`, for a name that is not among `known` or is given twice."""
    for name in names:
        if name not in known:
            raise HmfError(f"{key}: {unknown_name(what, name, known)}")
        if names.count(name) > 1:
            raise HmfError(f"{key}: {name} is named twice; name each {what} once")
