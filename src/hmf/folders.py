# SPDX-License-Identifier: Apache-2.0
"""Folders of commands: finding a checkpoint or recipe by its name, and locking an output folder."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path

from hmf import hub
from hmf.errors import HmfError

EMBEDDED_TEACHER = "teacher"
ASSETS = Path(str(resources.files("hmf") / "assets"))
RECIPE, BASE, STAGE0, HOLDER = "recipe.yaml", "base", "stage0", ".running"
PART = f"{RECIPE}.part"
LOCAL_FOLDERS = ("runs", "models", "recipes")  # used by the recipes that come with hmf, so not owners on the Hub


def resolve_base(base: str, weights: bool = True) -> Path:
    """The directory of a checkpoint. Does not import torch.

    Args:
        base: a path, "teacher" for the checkpoint that comes with the package, or a model of the Hub ("Qwen/Qwen3-8B",
            "Qwen/Qwen3-8B@revision"), which is downloaded into the Hub's cache.
        weights: whether the weights are needed.
    Raises:
        HmfError: there is no such checkpoint.
    """
    folder = Path(base)
    if folder.is_dir():
        return folder
    if base == EMBEDDED_TEACHER:
        return ASSETS / "teacher"
    if folder.exists():
        raise HmfError(f"{base}: is a file; give the checkpoint's directory")
    if (model := hub.parse_model(base)) is not None and (model.explicit or not is_place(base)):
        return hub.model_folder(model, weights)
    place = folder.parts[0] if folder.parts else ""
    if place == "runs":
        fix = "first run the command or the recipe that writes it"
    elif place == "models":
        fix = f"download the model: hf download OWNER/{folder.name} --local-dir {base}"
    elif model is not None:
        fix = f"correct the name, or write hf://{base} for a model of the Hub"
    else:
        fix = "give a checkpoint directory, or a model of the Hub such as Qwen/Qwen3-8B"
    raise HmfError(f"{base}: no such directory; {fix}")


def shown(folder: Path) -> str:
    """The name of a checkpoint directory in results and notices: its path, or "teacher" for the embedded teacher."""
    return EMBEDDED_TEACHER if folder == ASSETS / "teacher" else str(folder)


def is_place(name: str) -> bool:
    """Whether OWNER/NAME is meant as a local path, perhaps mistyped or not created yet, and not as a Hub name."""
    owner = Path(name).parts[0]
    return owner in LOCAL_FOLDERS or Path(owner).is_dir()


def find_recipe(name: str) -> Path:
    """The path of a recipe or of a folder of recipes.

    Args:
        name: a path, or the name of a recipe that comes with the package: "quickstart", "quickstart/sft", "qwen3-8b".
    Raises:
        HmfError: there is no such recipe.
    """
    if (path := Path(name)).exists():
        return path
    packaged = ASSETS / "recipes"
    for candidate in (packaged / name / "recipe.yaml", packaged / f"{name}.yaml", packaged / name):
        if candidate.exists() and candidate.is_relative_to(packaged):
            return candidate
    names = sorted(folder.name for folder in packaged.iterdir() if any(folder.glob("*.yaml")))
    raise HmfError(
        f"{name}: no such recipe; give a YAML file, or the name of a recipe that comes with hmf: {', '.join(names)}"
    )


def require_downloaded(file: Path) -> None:
    """HmfError if `file` is what Git LFS leaves in place of a file that it has not downloaded."""
    with file.open("rb") as content:
        start = content.read(1024)
    if len(start) < 1024 and start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise HmfError(f"{file}: is a pointer of Git LFS, not the file; run `git lfs pull` in its repository")


def require_parent(file: Path | None, option: str) -> None:
    """HmfError when the output `file` of the command-line option `option` is a folder, or in a missing folder."""
    if file is None:
        return
    if file.is_dir():
        raise HmfError(f"{option}: {file}: is a directory; give the name of a file in it")
    if not file.parent.is_dir():
        raise HmfError(f"{option}: {file.parent}: no such directory; create it or choose another")


def require_writable(folder: Path, option: str) -> None:
    """HmfError when `folder`, or the folder in which it would be created, cannot be written to."""
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
    if not place.is_dir():
        raise HmfError(f"{option}: {place}: is a file; choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise HmfError(f"{option}: {place}: cannot be written to: no permission; choose another folder")


def reason(error: OSError) -> str:
    """Why a file cannot be read or written, in one line."""
    return "no permission" if isinstance(error, PermissionError) else error.strerror or " ".join(str(error).split())


def unfinished(output: Path) -> re.Pattern[str]:
    """The names of temporary folders in which `output` is written (mkdtemp's names)."""
    return re.compile(rf"\.{re.escape(Path(os.path.realpath(output)).name)}\.[a-z0-9_]{{8}}")


def require_unused(output: str | Path, allowed: Callable[[str], bool] = lambda name: False) -> None:
    """HmfError when `output` is a file, or a folder that holds anything but `allowed` names and what a killed process
    left there."""
    output = Path(output)
    left = unfinished(output)
    try:
        used = output.exists() and (
            not output.is_dir() or not all(allowed(item.name) or left.fullmatch(item.name) for item in output.iterdir())
        )
    except OSError as error:
        raise HmfError(f"{error.filename or output}: cannot be read: {reason(error)}") from None
    if used:
        what = "holds other files" if output.is_dir() else "is a file"
        raise HmfError(f"{output}: {what}; choose another output or remove it first")


_locks: set[int] = set()  # descriptors of the locked folders of this process


def _leave_locks() -> None:
    """Close the locks of the parent process, which would outlive it as long as a data-loading process does."""
    for folder in _locks:
        os.close(folder)
    _locks.clear()


os.register_at_fork(after_in_child=_leave_locks)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Create the folder `output`, and lock it against other processes during the block.

    The lock is an flock on the folder, so the operating system releases it when the process ends.

    Raises:
        HmfError: another process holds the lock, and the message names it; or the folder cannot be created or written.
    """
    import fcntl

    holder = output / HOLDER
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = os.open(output, os.O_RDONLY)
    except FileExistsError:
        raise HmfError(f"{output}: is a file; choose another output or remove it first") from None
    except OSError as error:
        raise HmfError(
            f"{output}: cannot be created ({error.strerror}: {error.filename}); choose another output"
        ) from None
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "another process"
            raise HmfError(
                f"{output}: {who} is using this folder; wait until it ends, or choose another output"
            ) from None
        try:
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        except OSError as error:
            raise HmfError(f"{output}: cannot be written to ({error.strerror}); choose another output") from None
        _locks.add(folder)
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)
            with suppress(OSError):  # it is not empty
                output.rmdir()
    finally:
        _locks.discard(folder)
        os.close(folder)


def _results(output: Path) -> set[str]:
    """Names of a run's files and non-empty folders in its output folder, without temporary ones."""
    names = {item.name for item in output.iterdir() if item.is_file() or any(item.iterdir())}
    return {name for name in names - {HOLDER, PART} if not name.startswith((f".{STAGE0}.", f".{BASE}."))}


@contextmanager
def claimed(output: Path, recipe: str) -> Iterator[None]:
    """Use `output` as the run folder of a recipe during the block.

    The folder belongs to the first recipe that has trained in it. A recipe that has not trained yet can be replaced by
    a corrected one; the base's language model and the Stage-0 checkpoint that it may have written are then removed.

    Args:
        recipe: the recipe's text.
    Raises:
        HmfError: the folder holds other files or another recipe's results, or another process is using it.
    """
    stored_recipe = output / RECIPE
    if not stored_recipe.is_file():
        require_unused(output, lambda name: name in (HOLDER, PART))
    with locked(output):
        if stored_recipe.is_file() and stored_recipe.read_bytes() != recipe.encode():
            if _results(output) - {RECIPE, BASE, STAGE0}:
                raise HmfError(
                    f"{output}: was started with another recipe; continue it with {stored_recipe}, choose another "
                    "output, or remove the folder first"
                )
            for name in (BASE, STAGE0):
                shutil.rmtree(output / name, ignore_errors=True)
        fresh = not stored_recipe.is_file()
        (output / PART).write_bytes(recipe.encode())
        os.replace(output / PART, stored_recipe)
        try:
            yield
        except BaseException:
            if fresh and _results(output) == {RECIPE}:
                stored_recipe.unlink()
                for folder in filter(Path.is_dir, output.iterdir()):
                    with suppress(OSError):  # not empty: it holds an unfinished result
                        folder.rmdir()
            raise
