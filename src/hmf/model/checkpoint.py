# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the published format: loading that accounts for every tensor, saving that is whole or not there."""

from __future__ import annotations

import difflib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.utils import logging

from hmf.errors import HmfError

from .families import FAMILIES, family_of
from .rope import check_rope, require_rope

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
_Base: Any = object  # a mixin: transformers' classes come after it

# Files beside the weights that belong to the tokenizer or to generation; they travel unchanged, byte for byte.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tekken.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


class StrictLoading(_Base):
    """`from_pretrained` that fails, with names, where transformers would warn and leave tensors at random.

    `_other_tensors`: beginnings of names that a checkpoint may have beside this model's.
    """

    _other_tensors: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        # transformers raises or warns over several lines; the loading info holds the same names for our one line.
        kwargs["ignore_mismatched_sizes"] = True
        if Path(source).is_dir():
            require_checkpoint(source)
            check_merged(Path(source), kwargs.get("config") or cls.config_class.from_pretrained(source))
        with _without_load_report():
            try:
                model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
            except SafetensorError as error:
                raise HmfError(f"{source}: damaged weights ({error}); copy the file again") from None
        others = {name for name in info["unexpected_keys"] if name.startswith(cls._other_tensors or "\0")}
        check_loading(str(source), {**info, "unexpected_keys": set(info["unexpected_keys"]) - others})
        return (model, info) if output_loading_info else model


@contextmanager
def _without_load_report() -> Iterator[None]:
    logger = logging.get_logger("transformers.modeling_utils")

    def is_no_report(record: Any) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)


def check_loading(source: str, info: dict[str, Any]) -> None:
    """HmfError naming the tensors that transformers' loading report lists as missing, unexpected or misshapen."""
    missing, extra = sorted(info.get("missing_keys") or ()), sorted(info.get("unexpected_keys") or ())
    if missing and extra and (nearest := difflib.get_close_matches(missing[0], extra, n=1)):
        raise HmfError(f"{source}: no tensor {missing[0]}, but there is {nearest[0]}; was it renamed?")
    for key, said, mend in (
        ("missing_keys", "missing", "copy the whole checkpoint again"),
        ("unexpected_keys", "not of this model", "take them out, or give the config that they belong to"),
        ("mismatched_keys", "of another shape", "weights and config.json are of different models"),
        ("error_msgs", "unreadable", "copy the whole checkpoint again"),
    ):
        if names := sorted(_tensor(entry) for entry in info.get(key) or ()):
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise HmfError(f"{source}: tensors {said}: {', '.join(names[:4])}{more}; {mend}")


def _tensor(entry: Any) -> str:
    """One entry of the loading report: a name, or (name, shape found, shape needed)."""
    if isinstance(entry, tuple) and len(entry) == 3:
        return f"{entry[0]} (found {list(entry[1])}, needs {list(entry[2])})"
    return str(entry)


def check_merged(folder: Path, config: Any) -> None:
    """HmfError for tensors that transformers merges at load, such as experts, and that are not as published.

    Merging forgets their names: a gap in the numbers would go unseen, and other faults be named by the merged tensor.
    """
    if not get_checkpoint_conversion_mapping(config.model_type):
        return
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    merged = model.state_dict()
    published = revert_weight_conversion(model, merged)
    homes = tuple(f"{name.rpartition('.')[0]}." for name in merged.keys() - published.keys())
    needed = {name: list(x.shape) for name, x in published.items() if name.startswith(homes)}
    found: dict[str, list[int]] = {}
    for file in _weight_files(folder):
        with safe_open(folder / file, "pt") as stored:
            found |= {key: stored.get_slice(key).get_shape() for key in list(stored.keys()) if key.startswith(homes)}
    misshapen = [(name, found[name], shape) for name, shape in needed.items() if found.get(name, shape) != shape]
    missing, extra = needed.keys() - found.keys(), found.keys() - needed.keys()
    check_loading(str(folder), {"missing_keys": missing, "unexpected_keys": extra, "mismatched_keys": misshapen})


def require_config(source: str | Path) -> Path:
    """`source` as a directory with a readable config, or HmfError naming what is not."""
    folder = Path(source)
    if not folder.is_dir():
        raise HmfError(f"{folder}: no such directory; give a local checkpoint directory")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise HmfError(f"{folder}: no config.json; this is not a checkpoint directory")
    _read_object(config_file)
    return folder


def require_checkpoint(source: str | Path) -> Path:
    """`source` as a directory with a readable config and whole weight files, or HmfError naming what is not."""
    folder = require_config(source)
    for name in _weight_files(folder):
        if not (folder / name).is_file():
            raise HmfError(f"{folder / name}: missing, though the index names it")
        try:
            with safe_open(folder / name, "pt") as stored:
                dtypes = {key: stored.get_slice(key).get_dtype() for key in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise HmfError(f"{folder / name}: damaged ({error}); copy the file again") from None
        if wrong := sorted(key for key, dtype in dtypes.items() if dtype not in WEIGHT_DTYPES):
            raise HmfError(
                f"{folder / name}: tensor {wrong[0]} is {dtypes[wrong[0]]}, not one of {', '.join(WEIGHT_DTYPES)}; "
                "give the unquantised weights"
            )
    return folder


def _weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights, or HmfError."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if not index.is_file():
        raise HmfError(
            f"{folder}: no weights ({' or '.join(WEIGHT_FILES)}); a checkpoint needs both config and weights"
        )
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HmfError(f"{index}: weight_map: no table of tensor and file names; copy the file again")
    return sorted(set(weight_map.values()))


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, or HmfError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HmfError(f"{file}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise HmfError(f"{file}: holds no JSON object; copy the file again")
    return content


def load_config(source: str | Path, weights: bool = True) -> Any:
    """The config of a checkpoint directory, a base's or a Hybrid's; HmfError where it does not parse.

    weights: whether the weights must be there too.
    """
    folder = require_checkpoint(source) if weights else require_config(source)
    file = folder / "config.json"
    content = _read_object(file)
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        raise HmfError(f"{file}: model_type: {model_type!r} names no architecture; this is not a model's config")
    known = model_type.removeprefix("hybrid_") in FAMILIES
    if known or model_type.startswith("hybrid_"):
        check_rope(content, family_of(model_type, str(file)), str(file))
    try:
        config = AutoConfig.from_pretrained(folder)
    except HmfError as error:
        raise HmfError(str(error).replace("config.json", str(file), 1)) from None
    except (ValueError, TypeError, StrictDataclassError) as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        # transformers' validators put the field's own complaint on the second line
        raise HmfError(
            f"{file}: {said[1] if isinstance(error, StrictDataclassError) and said[1:] else said[0]}"
        ) from None
    if known:
        require_rope(config, str(file))
    return config


def load_model(
    source: str | Path, dtype: str | torch.dtype = "auto", config: Any = None, **kwargs: Any
) -> PreTrainedModel:
    """A causal language model, base or Hybrid, with every tensor accounted for. `dtype` "auto" is the stored one.

    config: takes the place of the stored one.
    """
    folder = require_checkpoint(source)
    config = load_config(folder) if config is None else config
    if not config.model_type.startswith("hybrid_"):  # a Hybrid's own from_pretrained does it
        check_merged(folder, config)
    with _without_load_report():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    check_loading(str(folder), info)
    return model


@contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """A fresh directory that appears as `target` only when the block ends well.

    HmfError when `target` exists and is not empty; on any failure nothing is left behind, and what a killed process
    left is removed by the next.
    """
    target = Path(target)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise HmfError(f"{target}: the output directory is in use; choose another or remove it first")
    made = [parent for parent in target.parents if not parent.exists()]  # nearest first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}")  # mkdtemp's names
        for left in target.parent.iterdir():
            if unfinished.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise HmfError(f"{target}: cannot be made ({error.strerror}: {error.filename}); choose another") from None
    try:
        yield work
        if target.is_dir():
            target.rmdir()
        work.chmod(0o755)
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # no longer empty: somebody else's by now
                parent.rmdir()
        raise


def copy_companions(source: str | Path, target: str | Path) -> None:
    """Copy tokenizer and generation files unchanged."""
    for name in COMPANIONS:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def save_checkpoint(
    model: PreTrainedModel, target: str | Path, companions: str | Path, weights: dict[str, Any] | None = None
) -> None:
    """Save `model` at `target` with the tokenizer and generation files of the directory `companions`.

    weights: its whole tensors by name, where it holds parts of them itself.
    """
    with new_directory(target) as folder:
        model.save_pretrained(folder, state_dict=weights)
        copy_companions(companions, folder)
