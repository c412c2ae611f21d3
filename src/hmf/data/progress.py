# SPDX-License-Identifier: Apache-2.0
"""Progress of a long step over data, on a terminal or in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from hmf.errors import one_line

PLAIN_INTERVAL = 15.0  # seconds between lines if stderr is not a terminal


class Progress:
    """A progress bar on a terminal; elsewhere a line every `PLAIN_INTERVAL` seconds.

    Args:
        total: the size of the whole work, in `unit`; None if it is unknown, and then no remaining time is shown.
    """

    def __init__(self, title: str, total: int | None, unit: str = "B"):
        self.title, self.total = title, total
        self.done, self.size_of_this_run, self.tokens = 0, 0, 0
        self.started = self.printed = time.perf_counter()
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total, desc=title, unit=unit, unit_scale=unit in ("B", " tokens"))

    def skip(self, size: int) -> None:
        """Count work that an earlier run has done."""
        self.done += size
        if self.bar is not None:
            self.bar.update(size)

    def add(self, size: int, tokens: int) -> None:
        """Count work that this run has done, and the tokens in it."""
        self.skip(size)
        self.size_of_this_run += size
        self.tokens += tokens
        now = time.perf_counter()
        rate = f"{self.tokens:,} tokens, {self.tokens / (now - self.started):,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(rate, refresh=False)
        elif now - self.printed > PLAIN_INTERVAL:
            self.printed = now
            remaining = ""
            if self.total and self.size_of_this_run:
                remaining = (
                    f", ETA {max(0, self.total - self.done) * (now - self.started) / self.size_of_this_run:.0f} s"
                )
            print(f"{one_line(self.title)}: {rate}{remaining}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
