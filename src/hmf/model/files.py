# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as files: what is read of a folder, what travels with it unchanged, what is refused, and new folders."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hmf.config.strict import parse_json
from hmf.errors import HmfError, listed, notice
from hmf.folders import reason, require_unused

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Computed from the config; old checkpoints carry it and every loader drops it.
COMPUTED = re.compile(r"(?:^|\.)rotary_emb\.inv_freq$")

# What stands beside the weights travels, except for these: what is written anew, weights in other formats, the state
# of a training, code, and the card, which describes the model that the checkpoint no longer is.
ADAPTERS = re.compile(r"adapter_config\.json|adapter_model\..*")
WRITTEN = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
LEFT_BEHIND = re.compile(
    r"\..*|.*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|ggml|onnx|onnx_data|npz|pkl|tflite|py)"
    r"|.*\.index\.json|params\.json|trainer_state\.json|training\.json|manifest\.json|README.*",
    re.IGNORECASE,
)
TEMPLATES = ("additional_chat_templates", "chat_templates")  # folders that transformers reads


@dataclass(frozen=True)
class Stored:
    """A tensor as its file has it."""

    file: str
    dtype: str  # of safetensors, such as "BF16"
    shape: list[int]


@contextmanager
def reading(what: Path) -> Iterator[None]:
    """HmfError, with the reason, where the file or folder `what` cannot be read."""
    try:
        yield
    except SafetensorError as error:
        raise HmfError(f"{what}: damaged ({error}); copy the file again") from None
    except OSError as error:
        raise HmfError(f"{error.filename or what}: cannot be read: {reason(error)}") from None


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file; HmfError, with the reason, where it cannot be read."""
    with reading(file):
        file.open("rb").close()  # safetensors takes every failure for a missing file
        with safe_open(file, "pt") as weights:
            yield weights


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, or HmfError."""
    try:
        with reading(file):
            content = parse_json(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise HmfError(f"{file}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise HmfError(f"{file}: holds no JSON object; copy the file again")
    return content


def require_folder(source: str | Path) -> Path:
    """`source` as a directory without links that lead out of it, or HmfError.

    The hub's cache is links throughout: a snapshot there may point to the blobs of its own repository.
    """
    folder = Path(source)
    with reading(folder):
        if not folder.is_dir():
            raise HmfError(f"{folder}: no such directory; give a local checkpoint directory")
        home = Path(os.path.realpath(folder))
        inside = [home]
        if home.parent.name == "snapshots":
            inside.append(Path(os.path.realpath(home.parent.parent / "blobs")))
        templates = [item for name in TEMPLATES for item in (folder / name).rglob("*")]
        for item in sorted([*folder.iterdir(), *templates]):
            if not item.is_symlink():
                continue
            if not any(Path(os.path.realpath(item)).is_relative_to(place) for place in inside):
                raise HmfError(f"{item}: is a symbolic link out of the checkpoint; put the file itself in its place")
            if not item.exists():
                raise HmfError(f"{item}: is a symbolic link to nothing; copy the file again")
    return folder


def require_config(source: str | Path) -> Path:
    """`source` as a directory with a readable config, or HmfError naming what is not."""
    folder = require_folder(source)
    if adapters := sorted(item.name for item in folder.iterdir() if ADAPTERS.fullmatch(item.name)):
        raise HmfError(
            f"{folder / adapters[0]}: an adapter is no checkpoint, nor applied to one; merge it first (peft's "
            "merge_and_unload, then save_pretrained), or take its files away to have the model without it"
        )
    config_file = folder / "config.json"
    if not config_file.exists():
        raise HmfError(f"{folder}: no config.json; this is not a checkpoint directory")
    if "transformers_weights" in read_object(config_file):
        raise HmfError(f"{config_file}: transformers_weights: only {WEIGHTS} or {INDEX} are read; delete the key")
    return folder


def require_checkpoint(source: str | Path) -> Path:
    """`source` as a directory with a readable config and whole weight files, or HmfError naming what is not."""
    folder = require_config(source)
    if not (stored := stored_tensors(folder)):
        raise HmfError(f"{folder / weight_files(folder)[0]}: holds no tensor; copy the file again")
    for name, tensor in stored.items():
        if f"model.{name}" in stored:  # both are names of one parameter
            raise HmfError(
                f"{folder / tensor.file}: tensor {name} is there as model.{name} too; keep the one of this model"
            )
        if tensor.dtype not in DTYPES and not COMPUTED.search(name):
            raise HmfError(
                f"{folder / tensor.file}: tensor {name} is {tensor.dtype}, not one of {', '.join(DTYPES)}; "
                "give the unquantised weights"
            )
    return folder


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights, all in `folder` itself; HmfError where it is not clear which do."""
    index, single = folder / INDEX, (folder / WEIGHTS).exists()
    shards = {item.name for item in folder.iterdir() if SHARD.fullmatch(item.name)}
    names = [WEIGHTS] if single else []
    if index.exists():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise HmfError(f"{index}: weight_map: no table of tensor and file names; copy the file again")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
                raise HmfError(f"{index}: weight_map: {tensor}: {name!r} is not the name of a file in this folder")
        names = sorted(set(weight_map.values()))
        if single and names != [WEIGHTS]:
            raise HmfError(f"{folder}: has both {WEIGHTS} and {INDEX}; remove the one that is not of this model")
    if not names:
        others = sorted(item.name for item in folder.iterdir() if re.search(r"\.(bin|pth?|gguf)$", item.name))
        raise HmfError(
            f"{folder}: no weights ({WEIGHTS} or {INDEX}"
            f"{f'; {listed(others)} cannot be read' if others else ''}); a checkpoint needs both config and weights"
        )
    if stray := sorted(shards - set(names)):
        used = INDEX if index.exists() else WEIGHTS
        raise HmfError(f"{folder / stray[0]}: not used by {used}; remove the file, or copy the whole checkpoint again")
    for name in names:
        if not (folder / name).exists():
            raise HmfError(f"{folder / name}: missing, though the index names it")
    return names


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor in the weight files; HmfError for a damaged file and for a name that two files have."""
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        with opened(folder / file) as weights:
            for name in list(weights.keys()):
                if name in found:
                    raise HmfError(
                        f"{folder / file}: tensor {name} is in {found[name].file} too; keep the one of this model"
                    )
                piece = weights.get_slice(name)
                found[name] = Stored(file, piece.get_dtype(), piece.get_shape())
    return found


def stored_values(folder: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(file, name, tensor) of the weight files, one after the other; `names`: of these alone."""
    wanted = None if names is None else set(names)
    for file in weight_files(folder):
        with opened(folder / file) as weights:
            for name in list(weights.keys()):
                if wanted is None or name in wanted:
                    yield file, name, weights.get_tensor(name)


def not_finite(tensor: torch.Tensor) -> int:
    """How many numbers of a tensor are NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    if tensor.itemsize == 1:  # float8 has few functions
        tensor = tensor.float()
    if all(bound.isfinite() for bound in tensor.aminmax()):  # one pass, no copy; NaN comes through
        return 0
    return int((~tensor.isfinite()).sum())


def same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal, in whatever dtypes they are stored."""
    wide = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.to(wide), second.to(wide))


def require_finite(folder: Path) -> None:
    """Read all weights; HmfError that names the first tensor with NaN or infinite numbers."""
    for file, name, tensor in stored_values(folder):
        if count := not_finite(tensor):
            raise HmfError(
                f"{folder / file}: tensor {name}: {count} of {tensor.numel()} numbers are NaN or infinite; "
                "copy the file again, or give an earlier checkpoint"
            )


# --- writing ---


def follow_umask(path: Path) -> None:
    """Give a file, or a folder and all in it, the mode of newly made ones; safetensors makes its files 0600."""
    os.umask(mask := os.umask(0))
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if not item.is_symlink():
            item.chmod((0o777 if item.is_dir() else 0o666) & ~mask)


@contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """A fresh directory that appears as `target` only when the block ends well.

    HmfError when `target` exists and is not empty, and where it cannot be written; on any failure nothing is left
    behind, and what a killed process left is removed by the next.
    """
    target = Path(target)
    made: list[Path] = []
    try:
        require_unused(target)
        made = [parent for parent in target.parents if not parent.exists()]  # nearest first
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}")  # mkdtemp's names
        for left in target.parent.iterdir():
            if unfinished.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise HmfError(f"{target}: cannot be made ({reason(error)}: {error.filename}); choose another") from None
    try:
        yield work
        follow_umask(work)
        if target.is_dir():
            target.rmdir()
        work.rename(target)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # no longer empty: somebody else's by now
                parent.rmdir()
        if isinstance(error, OSError | SafetensorError):
            why = reason(error) if isinstance(error, OSError) else error
            raise HmfError(f"{target}: not written: {why}") from None
        raise


def copy_companions(source: str | Path, target: str | Path) -> None:
    """Copy what stands beside the weights of `source`, byte for byte, and name what stays behind.

    Files that describe tokens, templates or generation are not told from others by their names: all plain files travel
    except for `WRITTEN` and `LEFT_BEHIND`. Of folders, those with chat templates do.
    """
    source, target, left = Path(source), Path(target), []
    for item in sorted(require_folder(source).iterdir()):
        if item.is_dir() and item.name in TEMPLATES:
            shutil.copytree(item, target / item.name, copy_function=shutil.copyfile)
        elif WRITTEN.fullmatch(item.name):
            continue
        elif LEFT_BEHIND.fullmatch(item.name) or not item.is_file():
            left.append(item.name + "/" * item.is_dir())
        else:
            with reading(item):
                content = item.open("rb")
            with content, (target / item.name).open("wb") as copy:
                shutil.copyfileobj(content, copy)
    if left:
        notice(f"{source}: not copied to the result: {listed(left, 8)}")


# --- what a checkpoint's files say about its text ---


def require_token_ids(file: Path, size: int) -> None:
    """HmfError when a special token of a config or generation config is none of `size` embeddings."""
    content = read_object(file)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = content.get(key)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (type(number) is not int or not 0 <= number < size):
                raise HmfError(
                    f"{file}: {key}: {number!r} is not the number of one of the model's {size} embeddings; "
                    "set it to the tokenizer's, or to null"
                )
