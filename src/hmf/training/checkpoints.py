# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints that are whole or do not count.

The Trainer writes into a folder of another name. When every process has written its part, one of them lists all files
with sizes and hashes in a manifest and renames the folder to checkpoint-<step>. Whatever is cut off before that leaves
nothing that a later start would take for a checkpoint.
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
PROCESS_TIMEOUT = timedelta(hours=1)  # how long processes wait for one that works alone, and for each other in training
SLACK = 1 << 20  # bytes of a checkpoint beside weights and optimiser
_NAME = re.compile(r"checkpoint-(\d+)")

# Where several processes train on CPUs the Trainer loads to "cpu:<n>", a place torch.load does not know by itself.
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


def say(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that at any moment either its old or its new content is there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def require_room(folder: Path, needed: int) -> None:
    """HmfError when the disk that holds `folder` has less than `needed` bytes free."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise HmfError(
            f"{folder}: needs about {needed / 1e9:.3g} GB of disk, {free / 1e9:.3g} GB are free; "
            "make room, or choose another output"
        )


def publish(staged: Path, target: Path, processes: int) -> None:
    """Give the finished folder `staged` its manifest and, last of all, the name `target`."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    names = [path.relative_to(staged).as_posix() for path in files]
    with ThreadPoolExecutor(max_workers=4) as pool:
        facts = dict(zip(names, pool.map(_facts, files), strict=True))
    (staged / MANIFEST).write_text(_manifest(processes, facts), encoding="utf-8")
    follow_umask(staged)
    for path in (*files, staged / MANIFEST, staged):
        _sync(path)
    if target.exists():  # one that was found damaged, or this run would not have come here again
        shutil.rmtree(target)
    staged.rename(target)
    _sync(target.parent)  # a new name is on the disk when its folder is


def problem(checkpoint: Path, processes: int | None = None) -> str | None:
    """Why `checkpoint` does not count, in a few words; None if every byte is as it was written.

    Raises:
        HmfError: it is whole but was written by another number of `processes`.
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
            f"start {stated['processes']}, or choose another output"
        )
    return None


def newest_valid(folder: Path, processes: int | None = None, tell: Callable[[str], None] = say) -> Path | None:
    """The last checkpoint under `folder` that counts; each damaged one after it is named in one line."""
    for path in reversed(published(folder)):
        why = problem(path, processes)
        if why is None:
            return path
        tell(f"{path}: {why}; skipped")
    return None


def published(folder: Path) -> list[Path]:
    """Folders named checkpoint-<step>, by step."""
    steps = {int(match[1]): path for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def rotate(folder: Path, newest: Path, limit: int) -> None:
    """Keep `newest`, just published, and the `limit` - 1 before it.

    Later ones can only be damaged ones that were skipped when the run was started.
    """
    others = published(folder)
    place = others.index(newest)
    kept = others[max(0, place + 1 - limit) : place + 1]
    for path in others:
        if path not in kept:
            shutil.rmtree(path)


def checkpoint_bytes(model: nn.Module, optimiser: torch.optim.Optimizer | None) -> int:
    """Bytes of a checkpoint: the weights, and two moments for each trained one where no optimiser state exists yet."""
    # Not from state_dict(): under FSDP2 that frees gathered parameters, and here one process asks without the others.
    weights = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    states = optimiser.state.values() if optimiser else ()
    moments = sum(x.numel() * x.element_size() for state in states for x in state.values() if torch.is_tensor(x))
    trained = sum(x.numel() * x.element_size() for x in model.parameters() if x.requires_grad)
    return weights + (moments or 2 * trained) + SLACK


@contextmanager
def shared_errors(prefix: str = "") -> Iterator[None]:
    """A failure to write in one process is raised in all, in one line: the others would wait for it without end."""
    error: Exception | None = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, HmfError) as caught:
        error = caught
    if lines := [line for line in gather_object([_line(error)]) if line]:
        raise HmfError(f"{prefix}{lines[0]}") from error


def on_main_process(work: Callable[[], object]) -> bool:
    """Do `work` in one process of several; all go on when it is done, or raise its error. True in that process."""
    first = PartialState(cpu=not torch.accelerator.is_available(), timeout=PROCESS_TIMEOUT).is_main_process
    with shared_errors():
        if first:
            work()
    return first


def _line(error: Exception | None) -> str:
    return "" if error is None else str(error).strip().split("\n")[0] or type(error).__name__


class PublishedCheckpoints:
    """Those of a Trainer, whose `output_dir` holds nothing else; all processes must see the same folder.

    A Trainer that is started from `start_from` ends bit for bit like a run that was never cut off, given the same
    number of processes.
    """

    def __init__(self, args: TrainingArguments):
        self.args, self.folder = args, Path(args.output_dir)
        self.first_step = 0  # steps that an earlier process has done
        self.staging: str | None = None  # where the Trainer is to write a checkpoint, while it does

    def start_from(self, model: nn.Module, optimiser: torch.optim.Optimizer | None) -> str | None:
        """Remove what a cut-off run left, and choose the checkpoint to go on from; the same in all processes."""
        chosen = [""]
        with shared_errors():
            if self.args.process_index == 0:
                shutil.rmtree(self.folder / UNPUBLISHED, ignore_errors=True)
                if newest := newest_valid(self.folder, self.args.world_size):
                    say(f"{newest}: going on from here")
                    chosen[0] = str(newest)
                else:  # one more than the limit exists while the newest is written
                    kept = 1 + min(self.args.save_total_limit or 1, -(-self.args.max_steps // self.args.save_steps))
                    require_room(self.folder, kept * checkpoint_bytes(model, optimiser))
        broadcast_object_list(chosen)
        self.first_step = int(chosen[0].rpartition("-")[2]) if chosen[0] else 0
        return chosen[0] or None

    @contextmanager
    def written(self, step: int, model: nn.Module, optimiser: torch.optim.Optimizer | None) -> Iterator[None]:
        """In the block the Trainer writes its checkpoint into `staging`; after it the checkpoint is published."""
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
            raise HmfError(f"{wrote} of {processes} processes wrote here; choose an output that all of them see")
        publish(staged, target, processes)
        if self.args.save_total_limit:
            rotate(target.parent, target, self.args.save_total_limit)

    def summary(self, logs: dict[str, float], state: TrainerState) -> dict[str, float]:
        """What a Trainer's summary `logs` should say: it takes the time and the losses since a resume for those of the
        whole run."""
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
    """A view of the checkpoint without its config.json, which the Trainer would read, only to compare versions, as a
    class that refuses a Hybrid's layer types."""
    with tempfile.TemporaryDirectory() as view:
        for item in Path(checkpoint).resolve().iterdir():
            if item.name != "config.json":
                (Path(view) / item.name).symlink_to(item)
        yield view


def _manifest(processes: int, files: dict[str, dict[str, Any]]) -> str:
    """The manifest's text; it ends with its own hash, and no other text has the same content."""
    content = {"processes": processes, "files": files}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=1, sort_keys=True) + "\n"


def _facts(path: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _sync(path: Path) -> None:
    """Return when `path`, a file or a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
