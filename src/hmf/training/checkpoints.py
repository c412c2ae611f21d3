# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints. An incomplete checkpoint is never used.

The Trainer writes into a folder with another name. When every process has written its part, one of them lists all files
with sizes and hashes in a manifest and renames the folder to checkpoint-<step>. A run that is interrupted earlier
leaves no folder with the name of a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerState, TrainingArguments

from hmf.config.strict import parse_json
from hmf.errors import HmfError, one_line
from hmf.model.files import follow_umask

MANIFEST = "manifest.json"
UNPUBLISHED = "unpublished"
PROCESS_TIMEOUT = timedelta(hours=1)  # limit of waiting for the main process and in collectives
SLACK = 1 << 20  # bytes of a checkpoint in addition to weights and optimiser
_NAME = re.compile(r"checkpoint-(\d+)")

# If several processes train on CPUs, the Trainer loads to the device "cpu:<n>", which torch.load does not support.
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, device: storage if device.startswith("cpu:") else None
)


def say(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


def replace_text(path: Path, text: str) -> None:
    """Write a small file atomically: readers see either its old or its new content."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def require_room(folder: Path, needed: int) -> None:
    """Raise HmfError if the disk of `folder` has less than `needed` bytes free."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise HmfError(
            f"{folder}: needs about {needed / 1e9:.3g} GB of disk space, and {free / 1e9:.3g} GB are free; "
            "free some space, or choose another output"
        )


def publish(staged: Path, target: Path, processes: int) -> None:
    """Write the manifest of the finished folder `staged`, then rename the folder to `target`."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    names = [path.relative_to(staged).as_posix() for path in files]
    with ThreadPoolExecutor(max_workers=4) as pool:
        facts = dict(zip(names, pool.map(_facts, files), strict=True))
    (staged / MANIFEST).write_text(_manifest(processes, facts), encoding="utf-8")
    follow_umask(staged)
    for path in (*files, staged / MANIFEST, staged):
        _sync(path)
    if target.exists():  # it is damaged, otherwise this run would have resumed from it
        shutil.rmtree(target)
    staged.rename(target)
    _sync(target.parent)  # a rename is durable once the parent folder is flushed


def problem(checkpoint: Path, processes: int | None = None) -> str | None:
    """Why `checkpoint` cannot be used, in a few words; None if all files have the hashes of the manifest.

    Raises:
        HmfError: the checkpoint is complete, but was written by another number of `processes`.
    """
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        stated = parse_json(text)
        if text != _manifest(stated["processes"], stated["files"]):
            return f"{MANIFEST} is damaged"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, facts in stated["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != facts["bytes"]:
            return f"{name} has {size:,} bytes instead of {facts['bytes']:,}"
    with ThreadPoolExecutor(max_workers=4) as pool:
        current = pool.map(lambda name: _facts(checkpoint / name), stated["files"])
        for (name, facts), now in zip(stated["files"].items(), current, strict=True):
            if now != facts:
                return f"{name} is damaged (its hash is not the one in {MANIFEST})"
    if processes is not None and stated["processes"] != processes:
        raise HmfError(
            f"{checkpoint}: was written by {stated['processes']} processes and this run has {processes}; "
            f"start {stated['processes']} processes, or choose another output"
        )
    return None


def newest_valid(folder: Path, processes: int | None = None, report: Callable[[str], None] = say) -> Path | None:
    """The last checkpoint under `folder` without a `problem`. `report` is called for each later, damaged one."""
    for path in reversed(published(folder)):
        why = problem(path, processes)
        if why is None:
            return path
        report(f"{path}: {why}; skipped")
    return None


def published(folder: Path) -> list[Path]:
    """The folders named checkpoint-<step>, in the order of their steps."""
    steps = {int(match[1]): path for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def rotate(folder: Path, newest: Path, limit: int) -> None:
    """Keep `newest`, which was just published, and the `limit` - 1 checkpoints before it; remove all others.

    Checkpoints of later steps are damaged ones that were skipped when the run was resumed.
    """
    others = published(folder)
    place = others.index(newest)
    kept = others[max(0, place + 1 - limit) : place + 1]
    for path in others:
        if path not in kept:
            shutil.rmtree(path)


def checkpoint_bytes(model: nn.Module, optimiser: torch.optim.Optimizer | None) -> int:
    """Bytes of a checkpoint: weights and optimiser state; before the first step, two moments per trained weight."""
    # Without state_dict(), which under FSDP2 frees gathered parameters; only one process calls this function.
    weights = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    states = optimiser.state.values() if optimiser else ()
    moments = sum(x.numel() * x.element_size() for state in states for x in state.values() if torch.is_tensor(x))
    trained = sum(x.numel() * x.element_size() for x in model.parameters() if x.requires_grad)
    return weights + (moments or 2 * trained) + SLACK


@contextmanager
def shared_errors(prefix: str = "") -> Iterator[None]:
    """Raise an error of one process in all processes, in one line, so that the others do not wait for it."""
    error: Exception | None = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, HmfError) as caught:
        error = caught
    if lines := [line for line in gather_object([_line(error)]) if line]:
        raise HmfError(f"{prefix}{lines[0]}") from error


def on_main_process(work: Callable[[], object]) -> bool:
    """Run `work` in the main process while the others wait. All raise its error. Returns True in the main process."""
    first = PartialState(cpu=not torch.accelerator.is_available(), timeout=PROCESS_TIMEOUT).is_main_process
    with shared_errors():
        if first:
            work()
    return first


def _line(error: Exception | None) -> str:
    return "" if error is None else str(error).strip().split("\n")[0] or type(error).__name__


class PublishedCheckpoints:
    """The checkpoints of a Trainer in its `output_dir`, which holds nothing else. All processes must share this folder.

    With the same number of processes, a Trainer that resumes from `start_from` ends with the same bits as a run that
    was never interrupted.
    """

    def __init__(self, args: TrainingArguments):
        self.args, self.folder = args, Path(args.output_dir)
        self.first_step = 0  # step of the checkpoint from which the run resumed
        self.staging: str | None = None  # the folder for a checkpoint while it is written

    def start_from(self, model: nn.Module, optimiser: torch.optim.Optimizer | None) -> str | None:
        """Remove the unfinished files of an interrupted run, and choose the checkpoint to resume from, or None.

        The result is the same in all processes.
        """
        chosen = [""]
        with shared_errors():
            if self.args.process_index == 0:
                shutil.rmtree(self.folder / UNPUBLISHED, ignore_errors=True)
                if newest := newest_valid(self.folder, self.args.world_size):
                    say(f"{newest}: resuming from this checkpoint")
                    chosen[0] = str(newest)
                else:  # during a save there is one checkpoint more than the limit
                    kept = 1 + min(self.args.save_total_limit or 1, -(-self.args.max_steps // self.args.save_steps))
                    require_room(self.folder, kept * checkpoint_bytes(model, optimiser))
        broadcast_object_list(chosen)
        self.first_step = int(chosen[0].rpartition("-")[2]) if chosen[0] else 0
        return chosen[0] or None

    @contextmanager
    def written(self, step: int, model: nn.Module, optimiser: torch.optim.Optimizer | None) -> Iterator[None]:
        """During the block the Trainer writes its checkpoint into `staging`. Then the checkpoint is published."""
        first, target = self.args.process_index == 0, self.folder / f"checkpoint-{step}"
        staged = self.folder / UNPUBLISHED / target.name
        self.staging = str(staged.parent)
        try:
            with shared_errors(f"{target}: not written: "):
                if first:
                    require_room(self.folder, checkpoint_bytes(model, optimiser))
            with shared_errors(f"{target}: not written: "):
                yield
            with shared_errors(f"{target}: not written: "):
                if first:
                    self._publish(staged, target)
        finally:
            self.staging = None
            if first:
                shutil.rmtree(staged.parent, ignore_errors=True)

    def _publish(self, staged: Path, target: Path) -> None:
        wrote, processes = len(list(staged.glob("rng_state*"))), self.args.world_size
        if wrote != processes:
            raise HmfError(f"{wrote} of {processes} processes wrote here; choose an output that all processes share")
        publish(staged, target, processes)
        if self.args.save_total_limit:
            rotate(target.parent, target, self.args.save_total_limit)

    def summary(self, logs: dict[str, float], state: TrainerState) -> dict[str, float]:
        """Corrected entries of a Trainer's final summary `logs`. After a resume, the Trainer relates the time and the
        losses since then to the whole run."""
        entries = [entry for entry in state.log_history if "loss" in entry]
        steps = [entry["step"] for entry in entries]
        pairs = zip(entries, [0, *steps], steps, strict=False)
        share = 1 - self.first_step / state.max_steps
        rates = ("train_samples_per_second", "train_steps_per_second")
        return {
            "train_loss": sum(entry["loss"] * (step - last) for entry, last, step in pairs) / max(1, steps[-1]),
            **{rate: round(logs[rate] * share, 3) for rate in rates},
        }


@contextmanager
def without_config(checkpoint: str) -> Iterator[str]:
    """A folder of links to the checkpoint's files without config.json.

    The Trainer would read config.json to compare versions, with a class that rejects a Hybrid's layer types.
    """
    with tempfile.TemporaryDirectory() as view:
        for item in Path(checkpoint).resolve().iterdir():
            if item.name != "config.json":
                (Path(view) / item.name).symlink_to(item)
        yield view


def _manifest(processes: int, files: dict[str, dict[str, Any]]) -> str:
    """The manifest's text, with the hash of its content. The text is a function of the content."""
    content = {"processes": processes, "files": files}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=1, sort_keys=True) + "\n"


def _facts(path: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _sync(path: Path) -> None:
    """Flush `path`, a file or a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
