# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the published format. Loading accounts for every tensor; saving is atomic."""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.utils import logging

from hmf.config.layers import check_heads, experts_per_token
from hmf.errors import HmfError, listed, notice
from hmf.layers.base import Stateful

from .configuration import building
from .families import FAMILIES, Mixin, family_of
from .files import (
    COMPUTED,
    DTYPES,
    Stored,
    copy_companions,
    new_directory,
    read_object,
    require_checkpoint,
    require_config,
    require_token_ids,
    same_values,
    stored_tensors,
    stored_values,
)
from .rope import check_rope, require_rope
from .values import reading, require_values

STORED = "stored"  # a dtype for `load_model`: each tensor keeps the dtype that it has in its file
HEAD, EMBEDDINGS = "lm_head.weight", ("model.embed_tokens.weight", "embed_tokens.weight")
GENERATION = "generation_config.json"


class StrictLoading(Mixin):
    """`from_pretrained` that raises HmfError with the tensors' names where transformers warns and initialises them.

    `_other_tensors`: prefixes of tensors that a checkpoint may have in addition to this model's.
    """

    _other_tensors: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        source = pretrained_model_name_or_path
        # Instead of the error or warning of transformers, `check_loading` names the tensors in one line.
        kwargs["ignore_mismatched_sizes"] = True
        if source is not None and Path(source).is_dir():
            if variant := kwargs.get("variant"):
                raise HmfError(f"{source}: variant={variant!r} is not supported; rename the weights without it")
            folder, given_config = require_checkpoint(Path(source, kwargs.get("subfolder") or "")), kwargs.get("config")
            if isinstance(given_config, PreTrainedConfig):
                config = copy.deepcopy(given_config)
            else:
                config = cls.config_class.from_pretrained(given_config or folder)
            if settle(config, folder) or given_config is not None:
                kwargs["config"] = config
            check_merged(folder, config)
        with _without_load_report():
            try:
                model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
            except SafetensorError as error:
                raise HmfError(f"{source}: damaged weights ({error}); copy the file again") from None
        others = {name for name in info["unexpected_keys"] if name.startswith(cls._other_tensors or "\0")}
        check_loading(str(source), {**info, "unexpected_keys": set(info["unexpected_keys"]) - others})
        _check_offloading(model)
        return (model, info) if output_loading_info else model


def _check_offloading(model: PreTrainedModel) -> None:
    """HmfError for a mixer that is offloaded to the CPU or disk.

    accelerate loads the tensors of modules that are called, and a mixer reads some of its tensors without a call.
    """
    places = set(map(str, getattr(model, "hf_device_map", {}).values()))
    for name, module in model.named_modules() if places & {"cpu", "disk"} else ():
        if isinstance(module, Stateful) and any(parameter.is_meta for parameter in module.parameters()):
            raise HmfError(
                f"device_map: {name} cannot be offloaded to the CPU or disk; place its layer on a GPU, or the whole "
                "model on the CPU"
            )


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
    first = next((name for name in missing if name != HEAD), HEAD)  # a tied head may be in no file
    if missing and extra and (nearest := difflib.get_close_matches(first, extra, n=1)):
        raise HmfError(f"{source}: has no tensor {first}, but has {nearest[0]}; check whether it was renamed")
    for key, problem, fix in (
        ("missing_keys", "missing", "copy the whole checkpoint again"),
        ("unexpected_keys", "not of this model", "remove them, or give the config that they belong to"),
        ("mismatched_keys", "of another shape", "weights and config.json belong to different models"),
        ("error_msgs", "unreadable", "copy the whole checkpoint again"),
    ):
        if names := sorted(_tensor(entry) for entry in info.get(key) or ()):
            if names == [HEAD] and key == "missing_keys":
                fix = "if it equals the embeddings, set tie_word_embeddings to true in config.json"
            raise HmfError(f"{source}: tensors {problem}: {listed(names)}; {fix}")


def _tensor(entry: Any) -> str:
    """One entry of the loading report: a name, or (name, stored shape, expected shape)."""
    if isinstance(entry, tuple) and len(entry) == 3:
        return f"{entry[0]} (has shape {list(entry[1])}, must have {list(entry[2])})"
    return str(entry)


def check_merged(folder: Path, config: Any) -> None:
    """HmfError for tensors that transformers merges at load, such as experts, if they are not as published.

    transformers does not notice a missing number among them, and names the merged tensor in other errors. A tensor that
    is stored merged already, as in Qwen3.5-MoE, counts as published.
    """
    if not get_checkpoint_conversion_mapping(config.model_type):
        return
    shapes = {name: stored.shape for name, stored in stored_tensors(folder).items()}
    if isinstance(config.dtype, dict):  # the caller's, for each part of the model; names and shapes need none
        config = copy.deepcopy(config)
        config.dtype = torch.float32
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    merged = model.state_dict()
    published = published_tensors(model, set(shapes))
    modules = tuple(f"{name.rpartition('.')[0]}." for name in merged.keys() - published_tensors(model).keys())
    expected = {name: list(x.shape) for name, x in published.items() if name.startswith(modules)}
    shapes = {name: shape for name, shape in shapes.items() if name.startswith(modules)}
    misshapen = [(name, shapes[name], shape) for name, shape in expected.items() if shapes.get(name, shape) != shape]
    missing, extra = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    check_loading(str(folder), {"missing_keys": missing, "unexpected_keys": extra, "mismatched_keys": misshapen})


def published_tensors(model: PreTrainedModel, merged: Set[str] = frozenset()) -> dict[str, torch.Tensor]:
    """The tensors of `model` by their names in files, where experts are one by one, except those named in `merged`."""
    state = model.state_dict()
    whole = {name: x for name, x in state.items() if name in merged}
    return whole | revert_weight_conversion(model, {name: x for name, x in state.items() if name not in merged})


def settle(config: Any, folder: Path, weights: bool = True) -> bool:
    """Correct settings of `config` that must not come from the checkpoint `folder`; returns whether any was changed.

    The choice of an implementation, which may name code on the Hub, is dropped. With `weights`, tie_word_embeddings
    becomes false if the checkpoint has a head that differs from the embeddings.
    """
    changed, file = False, folder / "config.json"
    content = read_object(file)
    for key in ("attn_implementation", "experts_implementation"):
        for name in (key, f"_{key}"):
            if (value := content.get(name)) is not None:
                notice(f"{file}: {name}: {value!r} is ignored, because it may name code that is not part of this model")
                if isinstance(value, dict) or getattr(config, f"_{key}") == value:  # and not the caller's own choice
                    setattr(config, f"_{key}", None)
                    changed = True
    if weights and getattr(config, "tie_word_embeddings", False) and has_own_head(folder):
        notice(
            f"{file}: tie_word_embeddings is true, but {HEAD} differs from the embeddings; {HEAD} is used, and "
            "tie_word_embeddings becomes false"
        )
        config.tie_word_embeddings = False
        changed = True
    return changed


def has_own_head(folder: Path) -> bool:
    """Whether the weight files hold a head that differs from the embeddings."""
    pair = {name: tensor for _, name, tensor in stored_values(folder, (HEAD, *EMBEDDINGS))}
    embeddings = next((pair[name] for name in EMBEDDINGS if name in pair), None)
    return HEAD in pair and embeddings is not None and not same_values(pair[HEAD], embeddings)


def load_config(source: str | Path, weights: bool = True) -> Any:
    """The config of a checkpoint directory, of a base or a Hybrid; HmfError for an invalid config.

    weights: whether the directory must have weights too.
    """
    folder = require_checkpoint(source) if weights else require_config(source)
    file = folder / "config.json"
    content = read_object(file)
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        raise HmfError(f"{file}: model_type: {model_type!r} is not an architecture; give the config of a model")
    _check_fields(content, str(file))
    if isinstance(nested := content.get("text_config"), dict):  # the language model of a multimodal one
        _check_fields(nested, f"{file}: text_config")
    known = model_type.removeprefix("hybrid_") in FAMILIES
    with reading(str(file)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if known:
        if config.model_type != model_type:  # a mistral config with layer_types
            raise HmfError(
                f"{file}: layer_types: with this key transformers reads model_type {model_type!r} as "
                f"{config.model_type!r}, which is not a supported family; remove the key if sliding_window applies to "
                "every layer"
            )
        _require_language_model(content, file)
        check_heads(config, str(file))
        if (active := experts_per_token(config)) > (experts := getattr(config, "num_experts", active)):
            raise HmfError(f"{file}: num_experts_per_tok: {active} is more than num_experts, {experts}; correct it")
        require_rope(config, str(file))
        require_token_ids(file, config.vocab_size)
        if weights:
            require_own_names(folder)
    settle(config, folder, weights)
    return config


def _check_fields(content: Mapping[str, Any], source: str) -> None:
    """HmfError for values of a config.json, or of a part of it, that transformers uses before it checks them."""
    require_values(content, source)
    model_type = str(content.get("model_type"))
    if model_type in FAMILIES or model_type.startswith("hybrid_"):
        check_rope(content, family_of(model_type, source), source)


def _require_language_model(content: Mapping[str, Any], file: Path) -> None:
    """HmfError if `architectures` names a model with another head, such as a classifier, or one that is not causal."""
    family = family_of(content["model_type"])
    decoders = {f"{family.prefix}{family.text}Model", f"{family.hybrid_prefix}Model"}
    names = content.get("architectures")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and not name.endswith("ForCausalLM") and name not in decoders:
            raise HmfError(
                f"{file}: architectures: {name} is not a causal language model; give one, whose class is "
                f"{family.prefix}ForCausalLM"
            )


def require_own_names(folder: Path) -> None:
    """HmfError if a language model's tensors have the prefix that they have in a multimodal checkpoint.

    transformers renames them at load (Qwen3.5); what is read of the files here goes by their names.
    """
    for name, stored in stored_tensors(folder).items():
        if name.startswith("model.language_model."):
            raise HmfError(
                f"{folder}/{stored.file}: tensor {name} is named as in a multimodal checkpoint; give the whole "
                "checkpoint with --text-only, or load and save this one with transformers"
            )


def load_model(
    source: str | Path, dtype: str | torch.dtype = "auto", config: Any = None, generates: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """A causal language model, base or Hybrid. HmfError unless every tensor of the files and of the model is matched.

    dtype: "auto" is the config's dtype; with "stored" each tensor keeps the dtype of its file.
    config: used in place of the stored one.
    generates: whether an invalid generation config is an error; otherwise a notice names it and it is ignored.
    """
    folder = require_checkpoint(source)
    config = load_config(folder) if config is None else config
    if not config.model_type.startswith("hybrid_"):  # a Hybrid's from_pretrained checks this itself
        with building(folder):
            check_merged(folder, config)
    stored = stored_tensors(folder)
    with _without_load_report(), building(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=_widest(x.dtype for x in stored.values()) if dtype == STORED else dtype,
            generation_config=generation_config(folder, config, generates),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **kwargs,
        )
    check_loading(str(folder), info)
    if computed := [name for name in stored if COMPUTED.search(name)]:
        notice(f"{folder}: {len(computed)} tensors are computed from config.json, not read: {listed(computed, 1)}")
    dtypes = stored_dtypes(model, stored)
    if dtype == STORED:
        cast(model, dtypes)
        model.config.dtype = config.dtype or model.dtype
    fix = f"; to keep precision, set dtype in {folder / 'config.json'} to the wider one" if dtype == "auto" else ""
    _notice_narrowed(folder, {name: x.dtype for name, x in model.state_dict().items()}, dtypes, fix)
    return model


def _widest(dtypes: Iterable[str]) -> torch.dtype:
    """The smallest dtype that holds the values of all `dtypes`, which have safetensors' names."""
    return functools.reduce(torch.promote_types, [DTYPES[name] for name in dtypes if name in DTYPES])


def stored_dtypes(model: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, torch.dtype]:
    """The dtypes that the tensors of `model` have in the files, by the model's names.

    A tensor that is merged at load, such as experts, has the widest dtype of its parts.
    """
    dtypes = {}
    for name in model.state_dict():
        module = f"{name.rpartition('.')[0]}."
        own = stored.get(name, stored.get(name.removeprefix("model.")))
        parts = [own.dtype] if own else [x.dtype for other, x in stored.items() if other.startswith(module)]
        if parts:
            dtypes[name] = _widest(parts)
    return dtypes


def cast(
    model: PreTrainedModel, dtypes: Mapping[str, torch.dtype], weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Cast the tensors of `model` to `dtypes` by name, in place; parameters that must be float32 stay at least that.

    weights: the whole tensors by name, if the parameters of `model` are sharded.
    """
    wide = set(model._keep_in_fp32_modules_strict or ())
    for name, tensor in model.named_parameters() if weights is None else weights.items():
        if (dtype := dtypes.get(name)) is not None:
            if name.rpartition(".")[2] in wide:
                dtype = torch.promote_types(dtype, torch.float32)
            tensor.data = tensor.data.to(dtype)


def _notice_narrowed(
    folder: Path, used: Mapping[str, torch.dtype], stored: Mapping[str, torch.dtype], fix: str
) -> None:
    """Print a notice for tensors whose dtype in the model cannot hold the values of their stored dtype."""
    pairs = {name: (stored[name], dtype) for name, dtype in used.items() if name in stored}
    if narrowed := [name for name, (a, b) in pairs.items() if torch.promote_types(a, b) != b]:
        before, after = (str(dtype).removeprefix("torch.") for dtype in pairs[narrowed[0]])
        notice(
            f"{folder}: {len(narrowed)} of {len(pairs)} tensors are cast to a narrower dtype, such as {narrowed[0]} "
            f"from {before} to {after}{fix}"
        )


def generation_config(folder: Path, config: Any, needed: bool) -> GenerationConfig:
    """From generation_config.json, or else from config.json as transformers reads it; `needed`: or HmfError."""
    has_file = (folder / GENERATION).exists()
    file = folder / (GENERATION if has_file else "config.json")
    try:
        content = read_object(file)
        if has_file:
            require_token_ids(file, config.get_text_config().vocab_size)
            return GenerationConfig.from_dict(content)
        return GenerationConfig.from_pretrained(folder, "config.json", _from_model_config=True)
    except HmfError as error:
        problem = str(error)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        problem = f"{file}: not a valid generation config ({' '.join(str(error).split())})"
    if needed:
        raise HmfError(problem)
    notice(f"{problem}; its settings are ignored here")
    return GenerationConfig.from_model_config(config)


@contextmanager
def without_generation_config(model: nn.Module) -> Iterator[None]:
    """Give a transformers model a default generation config during the block.

    `save_pretrained` rejects some generation configs that transformers reads.
    """
    generation = getattr(model, "generation_config", None)
    if not isinstance(model, PreTrainedModel) or generation is None:
        yield
        return
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = generation


def save_checkpoint(
    model: PreTrainedModel, target: str | Path, companions: str | Path, weights: dict[str, Any] | None = None
) -> None:
    """Save `model` at `target`, with the other files of the checkpoint directory `companions`, such as the tokenizer's.

    Tensors keep their dtypes; the dtype in config.json is `model.config.dtype`.

    weights: the whole tensors by name, if the parameters of `model` are sharded.
    """
    generation, dtype = model.generation_config, model.config.dtype
    with new_directory(target) as folder:
        with without_generation_config(model):
            model.save_pretrained(folder, state_dict=weights)
        if dtype is not None:
            model.config.dtype = dtype  # save_pretrained writes the dtype of the first tensor
            model.config.save_pretrained(folder)
        generation.to_json_file(folder / GENERATION, keys_to_pop=["compile_config"])
        copy_companions(companions, folder)
