# SPDX-License-Identifier: Apache-2.0
"""What the studies share: runs in a pool of processes, their file of results, and intervals over seeds."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Lines = list[dict[str, Any]]
# 97.5% quantile of Student's t by degrees of freedom, from 1; the normal one above.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def carry_out(options: Any, plan: list[Job], key: Callable[[Job], str], work: Callable[[Any, Job], Iterable]) -> bool:
    """Do the runs of `plan` that OUT/results.jsonl does not have, `options.jobs` at a time; whether one failed.

    `work(options, job)` gives a run's lines, of which the last one has "seconds" and "finished". It is called in a
    process of the pool and must be a function of a module. None is called later than `options.minutes`.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    options.work = options.work or options.out / "work"
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    done = finished(results)
    left = [job for job in plan if key(job) not in done]
    print(f"{len(left)} of {len(plan)} runs to do, {options.jobs} at a time", flush=True)
    deadline = float("inf") if options.minutes is None else time.time() + 60 * options.minutes
    failed = False
    # Processes are spawned, because CUDA cannot be used after a fork. Each does one run after another.
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), log_to, (options.work,)) as pool:
        futures = {pool.submit(run, work, options, job, deadline): key(job) for job in left}
        for future in as_completed(futures):
            outcome, lines = outcome_of(future)
            append(results, lines)
            failed |= outcome.startswith("failed")
            print(f"{futures[future]}: {outcome}", flush=True)
    return failed


def set_environment(device: str) -> None:
    """For this process, before torch is imported, and for the processes that it starts."""
    os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    os.environ |= {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    # Kernels that are compiled and tuned in every process would take longer than these runs.
    os.environ.setdefault("HMF_OPS", "chunked")


def log_to(folder: Path) -> None:
    """What this process prints goes to a file of its own in `folder`."""
    with (folder / f"process-{os.getpid()}.log").open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)


def run(work: Callable[[Any, Job], Iterable], options: Any, job: Job, deadline: float) -> tuple[str, Lines]:
    """Do one run in this process: how it ended, and its results."""
    if time.time() > deadline:
        return "not started", []
    import gc

    import torch

    try:
        lines = list(work(options, job))
    except Exception as error:
        traceback.print_exc()
        return f"failed ({type(error).__name__}: {error})", []
    finally:
        gc.collect()  # a Trainer and its model refer to each other
        torch.cuda.empty_cache()
    return f"done in {lines[-1]['seconds']:.0f} s", lines


def outcome_of(future: Future) -> tuple[str, Lines]:
    try:
        return future.result()
    except Exception as error:  # the process was killed
        return f"failed ({type(error).__name__}: {error})", []


def finished(results: Path) -> set[str]:
    """Keys of the finished runs. An incomplete line, from an interrupted write, is ignored."""
    return {line["key"] for line in read_lines(results) if line.get("finished")}


def read_lines(results: Path) -> Lines:
    lines = []
    for line in results.read_text().splitlines() if results.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def append(results: Path, lines: Lines) -> None:
    """The lines of a run at once, by one process at a time; a line that a kill cut off is ended first."""
    with results.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval, NaN for one value."""
    count, mean = len(values), sum(values) / len(values)
    if count == 1:
        return mean, math.nan
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (count - 1))
    return mean, (T[count - 2] if count - 2 < len(T) else 1.96) * deviation / math.sqrt(count)
