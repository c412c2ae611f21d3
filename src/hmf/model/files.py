# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint: reading and checking them, copying the other files of a folder, and creating folders."""

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
from hmf.errors import HmfError, listed, notice, standing_for
from hmf.folders import reason, require_downloaded, require_unused, shown, unfinished

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model(\.safetensors)?-\d+-of-\d+\.safetensors")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Tensors that old checkpoints store although they follow from the config. All loaders ignore them.
COMPUTED = re.compile(r"(?:^|\.)rotary_emb\.inv_freq$")

QUANTISED = ("quantization_config", "compression_config")  # keys of a config.json that describe quantised weights

# Other files of a checkpoint are copied to a new one, except for these: files that are written anew, weights in other
# formats, training state, code, and the model card, which describes the old model.
ADAPTERS = re.compile(r"adapter_config\.json|adapter_model\..*")
WRITTEN = re.compile(rf"config\.json|model\.safetensors(\.index\.json)?|{SHARD.pattern}")
LEFT_BEHIND = re.compile(
    r"\..*|.*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|ggml|onnx|onnx_data|npz|pkl|tflite|py)"
    r"|.*\.index\.json|params\.json|(hf_)?quant(ize)?_config\.json|trainer_state\.json|training\.json|manifest\.json"
    r"|README.*",
    re.IGNORECASE,
)
TEMPLATES = ("additional_chat_templates", "chat_templates")  # folders of chat templates that transformers reads


@dataclass(frozen=True)
class Stored:
    """A tensor in a weight file."""

    file: str
    dtype: str  # safetensors' name, such as "BF16"
    shape: list[int]


@contextmanager
def reading(what: Path) -> Iterator[None]:
    """Turn an error of reading the file or folder `what` in the block into an HmfError with the reason."""
    try:
        yield
    except SafetensorError as error:
        raise HmfError(f"{what}: damaged ({error}); copy the file again") from None
    except OSError as error:
        raise HmfError(f"{error.filename or what}: cannot be read: {reason(error)}") from None


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """An open safetensors file; HmfError with the reason if it cannot be read."""
    with reading(file):
        require_downloaded(file)  # also because safetensors reports every failure as a missing file
        with safe_open(file, "pt") as weights:
            yield weights


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; HmfError if it cannot be read or is not a JSON object."""
    try:
        with reading(file):
            require_downloaded(file)
            content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HmfError(f"{file}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise HmfError(f"{file}: is not a JSON object; copy the file again")
    return content


def require_folder(source: str | Path) -> Path:
    """`source` as a directory; HmfError if it is none or has symbolic links to files outside.

    The files of a snapshot in the Hub's cache may be links to the blobs of the same repository.
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
                raise HmfError(f"{item}: is a symbolic link out of the checkpoint; replace it by the file itself")
            if not item.exists():
                raise HmfError(f"{item}: is a broken symbolic link; copy the file again")
    return folder


def meant(folder: Path) -> str:
    """What to give instead if `folder` is a run folder with a result; else an empty text."""
    result = folder / "model"
    return f"this is a run folder; did you mean {result}?" if (result / "config.json").is_file() else ""


def require_config(source: str | Path) -> Path:
    """`source` as a directory with a config.json that can be read; HmfError otherwise, also for an adapter."""
    folder, config_file = require_folder(source), Path(source) / "config.json"
    content = read_object(config_file) if config_file.exists() else None
    if adapters := sorted(item.name for item in folder.iterdir() if ADAPTERS.fullmatch(item.name)):
        if content and content.get("has_lora_adapter"):  # Granite Speech
            raise HmfError(
                f"{folder / adapters[0]}: {content.get('model_type')} uses this adapter for sound only, so its "
                f"language model is complete without it; copy the checkpoint without {', '.join(adapters)} and give "
                "--text-only (text_only: true in a recipe of hmf prime)"
            )
        raise HmfError(
            f"{folder / adapters[0]}: adapters are not supported; merge it first (peft's merge_and_unload, then "
            "save_pretrained), or remove its files to use the model without it"
        )
    if content is None:
        raise HmfError(f"{folder}: no config.json; {meant(folder) or 'this is not a checkpoint directory'}")
    if "transformers_weights" in content:
        raise HmfError(f"{config_file}: transformers_weights: only {WEIGHTS} and {INDEX} are read; delete the key")
    return folder


def require_checkpoint(source: str | Path) -> Path:
    """`source` as a directory with a config.json and complete weight files; HmfError names what is missing or wrong."""
    folder = require_config(source)
    content = read_object(folder / "config.json")
    if not (stored := stored_tensors(folder)):
        raise HmfError(f"{folder / weight_files(folder)[0]}: has no tensors; copy the file again")
    listed_in_index = read_object(folder / INDEX)["weight_map"] if (folder / INDEX).exists() else ()
    if absent := [name for name in listed_in_index if name not in stored and not COMPUTED.search(name)]:
        raise HmfError(
            f"{folder / INDEX}: weight_map: {listed(absent)}: in none of the weight files; copy the whole checkpoint "
            "again, or remove what the model does not have from the index"
        )
    for name, tensor in stored.items():
        if f"model.{name}" in stored:  # both are names of one parameter
            raise HmfError(
                f"{folder / tensor.file}: tensor {name} is stored as model.{name} too; keep the one of this model"
            )
        # A model of images or sound also stores counters and positions; `take_text` checks what it takes.
        if not (tensor.dtype in ("I64", "BOOL") and isinstance(content.get("text_config"), dict)):
            require_dtype(folder, name, tensor)
    if key := next((key for key in QUANTISED if content.get(key) is not None), None):
        raise HmfError(
            f"{folder / 'config.json'}: {key}: none of the weights are quantised; delete the key to use them unchanged"
        )
    return folder


def require_dtype(folder: Path, name: str, tensor: Stored) -> None:
    """HmfError if a tensor that is read has another dtype than those of unquantised weights."""
    if tensor.dtype not in DTYPES and not COMPUTED.search(name):
        raise HmfError(
            f"{folder / tensor.file}: tensor {name} has dtype {tensor.dtype}, not one of {', '.join(DTYPES)}; "
            "give the unquantised weights"
        )


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files, all directly in `folder`; HmfError if they are missing or ambiguous."""
    index, single = folder / INDEX, (folder / WEIGHTS).exists()
    shards = {item.name for item in folder.iterdir() if SHARD.fullmatch(item.name)}
    names = [WEIGHTS] if single else []
    if index.exists():
        weight_map = (content := read_object(index)).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise HmfError(f"{index}: weight_map: must map tensor names to file names; copy the file again")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
                raise HmfError(
                    f"{index}: weight_map: {tensor}: {name!r} is not the name of a file in this folder; copy it again"
                )
        names = sorted(set(weight_map.values()))
        if single and names != [WEIGHTS]:
            raise HmfError(f"{folder}: has both {WEIGHTS} and {INDEX}; remove the one that is not this model's")
    if not names:
        if shards:
            raise HmfError(
                f"{folder}: {listed(sorted(shards), 2)}: not listed by {INDEX}, which is missing; copy it too"
            )
        others = sorted(
            item.name
            for item in folder.iterdir()
            if re.search(r"\.(safetensors|bin|pth?|gguf)$", item.name, re.IGNORECASE)
        )
        raise HmfError(
            f"{folder}: no weights ({WEIGHTS} or {INDEX}"
            f"{f'; {listed(others)} cannot be read' if others else ''}); "
            + ("save the model with save_pretrained" if others else "a checkpoint needs both config and weights")
        )
    if stray := sorted(shards - set(names)):
        used = INDEX if index.exists() else WEIGHTS
        raise HmfError(f"{folder / stray[0]}: not used by {used}; remove the file, or copy the whole checkpoint again")
    for name in names:
        if not (folder / name).exists():
            raise HmfError(f"{folder / name}: missing, though the index names it; copy it too")
    if index.exists() and not isinstance(content.get("metadata"), dict):  # transformers reads it
        raise HmfError(f'{index}: metadata: must be an object; add "metadata": {{}} to the index')
    return names


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor in the weight files; HmfError for a damaged file and for a tensor that is in two files."""
    tensors: dict[str, Stored] = {}
    for file in weight_files(folder):
        with opened(folder / file) as weights:
            for name in list(weights.keys()):
                if name in tensors:
                    raise HmfError(
                        f"{folder / file}: tensor {name} is in {tensors[name].file} too; keep the one of this model"
                    )
                header = weights.get_slice(name)
                tensors[name] = Stored(file, header.get_dtype(), header.get_shape())
    return tensors


def stored_values(folder: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(file, name, tensor) for each tensor of the weight files, or only for those in `names`."""
    selected = None if names is None else set(names)
    for file in weight_files(folder):
        with opened(folder / file) as weights:
            for name in list(weights.keys()):
                if selected is None or name in selected:
                    yield file, name, weights.get_tensor(name)


def not_finite(tensor: torch.Tensor) -> int:
    """The number of values of a tensor that are NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    if tensor.itemsize == 1:  # float8 has no aminmax
        tensor = tensor.float()
    if all(bound.isfinite() for bound in tensor.aminmax()):  # one pass without a copy; aminmax propagates NaN
        return 0
    return int((~tensor.isfinite()).sum())


def same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have equal values, also in different dtypes."""
    wide = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.to(wide), second.to(wide))


def require_finite(folder: Path) -> None:
    """Read all weights; HmfError names the first tensor that has NaN or infinite values."""
    for file, name, tensor in stored_values(folder):
        if count := not_finite(tensor):
            raise HmfError(
                f"{folder / file}: tensor {name}: {count} of {tensor.numel()} values are NaN or infinite; "
                "copy the file again, or give an earlier checkpoint"
            )


# --- writing ---


def follow_umask(path: Path) -> None:
    """Give a file, or a folder and its content, the mode that the umask gives; safetensors creates files as 0600."""
    os.umask(mask := os.umask(0))
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if not item.is_symlink():
            item.chmod((0o777 if item.is_dir() else 0o666) & ~mask)


@contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block succeeds.

    A new `target` appears by one rename. An empty folder may be a mount, a link or the current folder, and cannot be
    replaced: the files are written inside it and moved up at the end, config.json last.

    HmfError if `target` exists and is not empty, or cannot be written. After a failure nothing is left behind; the
    directory of a killed process is removed by the next call.
    """
    target = Path(target)
    place = Path(os.path.realpath(target))
    made: list[Path] = []
    moved: list[Path] = []
    try:
        require_unused(target)
        made = [parent for parent in place.parents if not parent.exists()]  # nearest first
        place.parent.mkdir(parents=True, exist_ok=True)
        home = place if place.is_dir() else place.parent
        for item in home.iterdir():
            if unfinished(place).fullmatch(item.name):
                shutil.rmtree(item, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=home))
    except OSError as error:
        raise HmfError(f"{target}: cannot be created ({reason(error)}: {error.filename}); choose another") from None
    try:
        with standing_for(work, target):
            yield work
        follow_umask(work)
        if home == place:
            for item in sorted(work.iterdir(), key=lambda item: item.name == "config.json"):
                moved.append(item.rename(place / item.name))
            work.rmdir()
        else:
            work.rename(place)
    except BaseException as error:
        for item in (work, *moved):
            if item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
            else:
                item.unlink(missing_ok=True)
        for parent in made:
            with suppress(OSError):  # not empty: another process uses it
                parent.rmdir()
        if isinstance(error, OSError | SafetensorError):
            why = reason(error) if isinstance(error, OSError) else error
            raise HmfError(f"{target}: not written: {why}") from None
        raise


def copy_companions(source: str | Path, target: str | Path, leave: re.Pattern[str] | None = None) -> None:
    """Copy the other files of the checkpoint `source`, byte for byte, and print a notice of those that are not copied.

    There is no list of files for tokenizers, templates or generation: all plain files are copied except for `WRITTEN`
    and `LEFT_BEHIND`, and those whose names match `leave`. Of folders, only those with chat templates are copied.
    """
    source, target, not_copied = Path(source), Path(target), []
    index = source / INDEX
    shards = set(weight_files(source)) if index.exists() else set()  # of any names
    within = Path(os.path.realpath(target))
    for item in sorted(require_folder(source).iterdir()):
        if item.is_dir() and item.name in TEMPLATES:
            shutil.copytree(item, target / item.name, copy_function=shutil.copyfile)
        elif WRITTEN.fullmatch(item.name) or item.name in shards or within.is_relative_to(os.path.realpath(item)):
            continue
        elif LEFT_BEHIND.fullmatch(item.name) or not item.is_file() or (leave and leave.fullmatch(item.name)):
            not_copied.append(item.name + "/" * item.is_dir())
        else:
            with reading(item):
                content = item.open("rb")
            with content, (target / item.name).open("wb") as copy:
                shutil.copyfileobj(content, copy)
    if not_copied:
        notice(f"{shown(source)}: not copied to the result: {listed(not_copied, 8)}")


# --- special tokens ---


def require_token_ids(file: Path, size: int) -> None:
    """HmfError if the id of a special token in a config or generation config is not below `size`, the vocabulary.

    The ids of a multimodal model's language model are those of the whole config, or else of its `text_config`.
    """
    content = read_object(file)
    nested = content.get("text_config")
    nested = nested if isinstance(nested, dict) else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        name, value = (key, content[key]) if key in content else (f"text_config.{key}", nested.get(key))
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (type(number) is not int or not 0 <= number < size):
                raise HmfError(
                    f"{file}: {name}: {number!r} is not a token id below the model's vocab_size, {size}; "
                    "set it to the tokenizer's id, or to null"
                )
