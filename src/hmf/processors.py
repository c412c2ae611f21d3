# SPDX-License-Identifier: Apache-2.0
"""The processors of this machine that are ours, shared with whatever else runs here."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

# Threads of OpenMP wait for each other without a pause. Where other programs run, a thread then spins through the time
# of the one that it waits for, and a step takes tens of times as long. With these they sleep while they wait.
_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
_GROUPS = Path("/sys/fs/cgroup")


def share() -> None:
    """Set how threads of this process and of those that it starts wait, and their number where a container has a limit.

    What the user has set stays. To be called before PyTorch is loaded, which counts the cores that it may use.
    """
    for name, value in _SLEEP.items():
        os.environ.setdefault(name, value)
    if (limit := whole_processors()) < _allowed():
        os.environ.setdefault("OMP_NUM_THREADS", str(limit))


def count() -> int:
    """How many processors this process may keep busy."""
    return min(_allowed(), whole_processors())


def _allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def whole_processors(groups: Path = _GROUPS) -> int:
    """Whole processors in the time that this process's control group has, or more than there are."""
    shares = [float("inf")]
    with suppress(OSError, ValueError, ZeroDivisionError):  # version 2: "max 100000" or "150000 100000"
        quota, period = (groups / "cpu.max").read_text().split()
        shares.append(float(quota if quota != "max" else "inf") / float(period))
    with suppress(OSError, ValueError, ZeroDivisionError):  # version 1: -1 for none
        quota, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        shares += [float(quota) / float(period)] * (float(quota) > 0)
    return max(1, int(min(min(shares), 2**31)))
