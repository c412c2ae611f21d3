# SPDX-License-Identifier: Apache-2.0
"""The one exception that users see, and the wording that unknown names share."""

import difflib
from collections.abc import Iterable


class HmfError(Exception):
    """Bad input, said in one line: the file, the key and the mend. The command line prints it and exits with 2."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that is not `known`, with the nearest valid one when there is any."""
    known = sorted(known)
    lower = {candidate.lower(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    mend = f"did you mean {lower[nearest[0]]!r}?" if nearest else f"valid: {', '.join(known)}"
    return f"unknown {what} {name!r}; {mend}"
