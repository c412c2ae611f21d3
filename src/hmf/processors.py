# SPDX-License-Identifier: Apache-2.0
"""How many processors this process may use, and how its threads wait, on a machine that is shared with others."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

# By default, OpenMP threads spin while they wait for each other. On a busy machine, a spinning thread occupies the
# processor that the awaited thread needs, and a step takes tens of times as long. With these settings, waiting threads
# sleep.
_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
_GROUPS = Path("/sys/fs/cgroup")


def share() -> None:
    """Make waiting threads sleep, and limit their number where a container limits the processors.

    The settings are environment variables, so that child processes inherit them. Variables that the user has set are
    kept. Call this before PyTorch is imported, because PyTorch reads them at import.
    """
    for name, value in _SLEEP.items():
        os.environ.setdefault(name, value)
    if (limit := whole_processors()) < _allowed():
        os.environ.setdefault("OMP_NUM_THREADS", str(limit))


def count() -> int:
    """Number of processors that this process may use."""
    return min(_allowed(), whole_processors())


def _allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def whole_processors(groups: Path = _GROUPS) -> int:
    """The control group's CPU quota, rounded down to whole processors; a very large number if there is no quota."""
    shares = [float("inf")]
    with suppress(OSError, ValueError, ZeroDivisionError):  # version 2: "max 100000" or "150000 100000"
        quota, period = (groups / "cpu.max").read_text().split()
        shares.append(float(quota if quota != "max" else "inf") / float(period))
    with suppress(OSError, ValueError, ZeroDivisionError):  # version 1: -1 for none
        quota, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        shares += [float(quota) / float(period)] * (float(quota) > 0)
    return max(1, int(min(min(shares), 2**31)))
