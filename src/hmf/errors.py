# SPDX-License-Identifier: Apache-2.0
"""Messages to users: the exception class, notices, and the error text for unknown names."""

import difflib
import functools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class HmfError(Exception):
    """Bad input. The message is one line with file, key and fix; the command line prints it and exits with 2."""


def one_line(message: str) -> str:
    """The message with control characters escaped, so that text from a file cannot break it into several lines."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)


_temporary: dict[str, str] = {}  # temporary folders, and what the user knows each of them as


@contextmanager
def standing_for(folder: str | Path, name: str | Path) -> Iterator[None]:
    """In the block, notices and an HmfError name `name` in place of the temporary `folder`, which the user never saw."""
    _temporary[str(folder)] = str(name)
    try:
        yield
    except HmfError as error:
        if (line := _for_the_user(str(error))) == str(error):
            raise
        raise HmfError(line) from error.__cause__
    finally:
        del _temporary[str(folder)]


def _for_the_user(line: str) -> str:
    for folder, name in _temporary.items():
        line = line.replace(folder, name)
    return line


@functools.cache
def notice(line: str) -> None:
    """Print a warning on stderr. Each line is printed once per process, and only by the process of rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"hmf: {one_line(_for_the_user(line))}", file=sys.stderr, flush=True)


def listed(names: Iterable[str], shown: int = 4, joint: str = ", ") -> str:
    """The first `shown` names in one text, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return joint.join(names[:shown]) + more


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Error text for a name that is not among `known`: it suggests the closest valid name, or lists all of them."""
    known = sorted(known)
    lower = {candidate.lower(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    fix = f"did you mean {lower[nearest[0]]!r}?" if nearest else f"valid: {', '.join(known)}"
    return f"unknown {what} {name!r}; {fix}"
