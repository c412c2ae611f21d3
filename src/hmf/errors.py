# SPDX-License-Identifier: Apache-2.0
"""What users read from the library: the one exception, notices, and the wording that unknown names share."""

import difflib
import functools
import os
import sys
from collections.abc import Iterable


class HmfError(Exception):
    """Bad input, in one line: the file, the key and the fix. The command line prints it and exits with 2."""


def one_line(message: str) -> str:
    """A message in which nothing of a file or its name can look like another line."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)


@functools.cache
def notice(line: str) -> None:
    """Print what a user must know and no error is, on stderr: each line once, and by one of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"hmf: {one_line(line)}", file=sys.stderr, flush=True)


def listed(names: Iterable[str], shown: int = 4, joint: str = ", ") -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return joint.join(names[:shown]) + more


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that is not `known`, with the nearest valid one when there is any."""
    known = sorted(known)
    lower = {candidate.lower(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    fix = f"did you mean {lower[nearest[0]]!r}?" if nearest else f"valid: {', '.join(known)}"
    return f"unknown {what} {name!r}; {fix}"
