# SPDX-License-Identifier: Apache-2.0
"""Folders that commands read from and write to: where a base is, and whose an output folder is."""

from __future__ import annotations

import os
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
RECIPE, STAGE0, HOLDER = "recipe.yaml", "stage0", ".running"
PART = f"{RECIPE}.part"
WRITTEN = ("runs", "models", "recipes")  # folders of our recipes: nobody on the Hub is meant


def resolve_base(base: str, weights: bool = True) -> Path:
    """The directory of a checkpoint: a path, the name "teacher" for the one that comes with the package, or a model of
    the Hub ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B@revision"), which is fetched into the Hub's cache.

    weights: whether they are needed. HmfError where there is none; imports no torch.
    """
    folder = Path(base)
    if folder.is_dir():
        return folder
    if base == EMBEDDED_TEACHER:
        return ASSETS / "teacher"
    if folder.exists():
        raise HmfError(f"{base}: is a file; give the checkpoint's directory")
    if (model := hub.parse_model(base)) is None:
        raise HmfError(
            f"{base}: no such directory; give a checkpoint directory, or a model of the Hub as Qwen/Qwen3-8B"
        )
    if not model.explicit and is_place(base):
        raise HmfError(
            f"{base}: no such directory in {folder.parts[0]}; if a model of the Hub is meant, write hf://{base}"
        )
    return hub.model_folder(model, weights)


def is_place(name: str) -> bool:
    """Whether OWNER/NAME is a folder's path, perhaps one that is mistyped or not made yet, and no name of the Hub."""
    owner = Path(name).parts[0]
    return owner in WRITTEN or Path(owner).is_dir()


def find_recipe(name: str) -> Path:
    """A recipe's file or a folder of recipes: a path, or the name of one that comes with the package: "quickstart",
    "quickstart/sft", "qwen3-8b". HmfError where there is none."""
    if (path := Path(name)).exists():
        return path
    brought = ASSETS / "recipes"
    for found in (brought / name / "recipe.yaml", brought / f"{name}.yaml", brought / name):
        if found.exists() and found.is_relative_to(brought):
            return found
    names = sorted(folder.name for folder in brought.iterdir() if any(folder.glob("*.yaml")))
    raise HmfError(f"{name}: no such recipe; give a YAML file, or one that comes with hmf: {', '.join(names)}")


def require_parent(file: Path | None, option: str) -> None:
    """HmfError where the folder of a `file` to write, given by `option`, does not exist."""
    if file is not None and not file.parent.is_dir():
        raise HmfError(f"{option}: {file.parent}: no such directory; name a file in one that exists")


def reason(error: OSError) -> str:
    """Why a file cannot be read or written, in one line."""
    return "no permission" if isinstance(error, PermissionError) else error.strerror or " ".join(str(error).split())


def require_unused(output: str | Path, allowed: Callable[[str], bool] = lambda name: False) -> None:
    """HmfError when there is a file at `output`, or a folder that holds something beside names that are `allowed`."""
    output = Path(output)
    try:
        used = output.exists() and (not output.is_dir() or not all(allowed(item.name) for item in output.iterdir()))
    except OSError as error:
        raise HmfError(f"{error.filename or output}: cannot be read: {reason(error)}") from None
    if used:
        raise HmfError(f"{output}: the output directory is in use; choose another or remove it first")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Make the folder `output`, and let no other process work in it during the block.

    The lock is one of the operating system's on the folder itself, so it ends with the process. HmfError names the
    process that holds it.
    """
    import fcntl

    holder = output / HOLDER
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = os.open(output, os.O_RDONLY)
    except FileExistsError:
        raise HmfError(f"{output}: is a file; choose another output or remove it first") from None
    except OSError as error:
        raise HmfError(f"{output}: cannot be made ({error.strerror}: {error.filename}); choose another") from None
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "another process"
            raise HmfError(f"{output}: {who} works in it now; wait for it, or choose another output") from None
        try:
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        except OSError as error:
            raise HmfError(f"{output}: cannot be written to ({error.strerror}); choose another output") from None
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)
            with suppress(OSError):  # unless something is in it
                output.rmdir()
    finally:
        os.close(folder)


def _made(output: Path) -> set[str]:
    """Names of what a run has left in its folder: files, and folders that hold something."""
    names = {item.name for item in output.iterdir() if item.is_file() or any(item.iterdir())}
    return {name for name in names - {HOLDER, PART} if not name.startswith(f".{STAGE0}.")}


@contextmanager
def claimed(output: Path, recipe: str) -> Iterator[None]:
    """Hold `output` as the run folder of the recipe text `recipe` during the block.

    The folder belongs to the first recipe that has trained in it: until then, a recipe that turned out to be wrong is
    replaced, with the Stage-0 checkpoint that it may have made. HmfError when the folder is something else's,
    or when another process works in it.
    """
    kept = output / RECIPE
    if not kept.is_file():
        require_unused(output, lambda name: name in (HOLDER, PART))
    with locked(output):
        if kept.is_file() and kept.read_bytes() != recipe.encode():
            if _made(output) - {RECIPE, STAGE0}:
                raise HmfError(
                    f"{output}: was started with another recipe ({kept}); choose another output or remove it first"
                )
            shutil.rmtree(output / STAGE0, ignore_errors=True)
        fresh = not kept.is_file()
        (output / PART).write_bytes(recipe.encode())
        os.replace(output / PART, kept)
        try:
            yield
        except BaseException:
            if fresh and _made(output) == {RECIPE}:
                kept.unlink()
                for folder in filter(Path.is_dir, output.iterdir()):
                    with suppress(OSError):  # not empty: something that was cut off
                        folder.rmdir()
            raise
