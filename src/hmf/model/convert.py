# SPDX-License-Identifier: Apache-2.0
"""Conversion of a base model to a fused model (teacher and student), and of a fused model to a plain Hybrid.

The new model shares the tensors of the old one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from hmf.config.layers import LAYER_KINDS, base_head_dim, needed_kinds
from hmf.config.pattern import ATTENTION, Pattern
from hmf.config.runs import HybridSettings
from hmf.errors import HmfError, naming_config
from hmf.layers.attention import separate
from hmf.layers.own import base_mixer, base_mixer_name, own_layers, own_state_shapes
from hmf.layers.registry import layer_states

from .configuration import STATE_DTYPES, building
from .families import FAMILIES, family_of
from .modeling import hybrid_classes
from .text_only import require_language_model


def attention_layers(config: Any) -> list[int]:
    """Indices of the layers of a base config that are attention and can be replaced."""
    own = own_layers(config)
    return [index for index in range(config.num_hidden_layers) if index not in own]


def base_pattern(config: Any, settings: HybridSettings) -> Pattern:
    """The pattern that `settings` give for a base with this config; a ratio is a share of its attention layers.

    HmfError if the base's layers cannot be replaced so, before any weights are read.
    """
    require_language_model(config)
    pattern = settings.layer_pattern(config.num_hidden_layers, attention_layers(config))
    try:
        hybrid = hybrid_config(config, pattern.with_fused(True), settings.options_by_key())
    except HmfError as error:  # the user wrote a pattern and options, and no config.json yet
        line = str(error).replace("config.json: hybrid_override_pattern", "pattern")
        for kind in LAYER_KINDS.values():
            line = line.replace(f"config.json: {kind.config_key}", f"hybrid.options.{kind.name}")
        raise HmfError(line) from None
    read = {kind.name for kind in needed_kinds(hybrid, pattern.symbols)}
    if unread := sorted(name for name, values in settings.options.items() if values and name not in read):
        raise HmfError(
            f"hybrid.options: {', '.join(unread)}: no layer of the pattern {pattern} has this type; leave it out"
        )
    return pattern


def hybrid_config(base: Any, pattern: Pattern, options: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
    """A Hybrid's config from a base or hybrid config; `options`, by config key (`gdn_config`), override defaults.

    The config of a plain Hybrid does not keep which of its layers replaced a recurrent one (`GDN>GKA` becomes GKA).
    """
    from_recurrent = {pattern.symbols[index] for index in pattern.from_recurrent}
    if not pattern.fused:
        pattern = pattern.with_fused(False)
    family = family_of(base.model_type)
    classes = hybrid_classes(family)
    fields = base.to_dict()
    options = dict(options or {})
    for kind in (LAYER_KINDS[symbol] for symbol in set(pattern.symbols) - {ATTENTION}):
        if kind.config_key in fields:
            continue
        if new := kind.options.new_values(base, family.query_growth() is not None, kind.symbol in from_recurrent):
            options[kind.config_key] = {**new, **options.get(kind.config_key, {})}
    # auto_map names code of the base's class, which would load a Hybrid without its new layers.
    for key in ("model_type", "architectures", "layer_types", "transformers_version", "auto_map", *options):
        fields.pop(key, None)
    kinds = getattr(base, "attention_types", None) or getattr(base, "layer_types", None)
    if family.own_recurrence:
        fields["base_layer_types"] = list(kinds or ())
        if fields.get("mamba_ssm_dtype") in STATE_DTYPES:  # vLLM's name, in published configs
            fields.setdefault("state_dtype", fields["mamba_ssm_dtype"])
    fields |= {
        "hybrid_override_pattern": str(pattern),
        "architectures": [classes.causal_lm.__name__],
        **options,
    }
    given = {"hybrid_override_pattern", *options}
    with naming_config(base.name_or_path, besides=given), building(None):
        config = classes.config(**fields)
    if kinds and list(kinds) != config.attention_types:
        raise HmfError(
            f"{Path(base.name_or_path or '', 'config.json')}: layer_types {list(kinds)} differs from "
            f"{config.attention_types}, which follows from the other keys, and a Hybrid's config cannot store it; use "
            "a base whose windows follow from its other keys"
        )
    return config


def hybridise(
    base: PreTrainedModel, pattern: Pattern, options: Mapping[str, Mapping[str, Any]] | None = None
) -> PreTrainedModel:
    """A fused model on the tensors of `base`. `hmf.priming.stage0` initialises its mixers."""
    config = hybrid_config(base.config, pattern.with_fused(True), options)
    model, missing = _rebuild(config, base)
    names = {name for _, name in mixer_names(model)}
    if lacking := sorted(name for name in missing if not names & set(name.split("."))):
        raise HmfError(f"{type(base).__name__}: the base has no tensor {', '.join(lacking)}")
    for name, mixer in mixers(model):
        _take_dtypes(mixer, base_mixer(model.get_submodule(name.rpartition(".")[0])))
    return model


def _take_dtypes(mixer: nn.Module, attention: nn.Module) -> None:
    """Give a mixer the dtypes of its attention, which may differ by tensor, so that copying loses no precision."""
    given = dict(separate(attention).named_parameters())
    mixer.to(functools.reduce(torch.promote_types, (x.dtype for x in given.values() if x.dim() > 1)))
    for name, x in mixer.named_parameters():
        if (source := given.get(".".join(name.split(".")[-2:]))) is not None:
            x.data = x.data.to(torch.promote_types(x.dtype, source.dtype))


def drop_teacher(fused: PreTrainedModel) -> PreTrainedModel:
    """The plain Hybrid of a fused model: every replaced layer without the base's own token mixer."""
    config = hybrid_config(fused.config, fused.config.pattern.with_fused(False))
    layers = {i: fused.model.layers[i] for i in fused.config.pattern.replaced}
    prefixes = tuple(f"model.layers.{i}.{base_mixer_name(layer)}." for i, layer in layers.items())
    model, missing = _rebuild(config, fused, dropped=prefixes)
    if missing:
        raise HmfError(f"{type(fused).__name__}: the model has no tensor {', '.join(sorted(missing))}")
    return model


def mixer_names(model: PreTrainedModel) -> list[tuple[int, str]]:
    """(layer index, module name) of every mixer, in order."""
    return [(i, LAYER_KINDS[model.config.pattern.symbols[i]].module_name) for i in model.config.pattern.replaced]


def mixers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """(full name, module) of every mixer, in order."""
    names = [f"model.layers.{index}.{name}" for index, name in mixer_names(model)]
    return [(name, model.get_submodule(name)) for name in names]


def _rebuild(config: Any, source: PreTrainedModel, dropped: tuple[str, ...] = ()) -> tuple[PreTrainedModel, set[str]]:
    """A model of `config` on the tensors of `source`, and the names of tensors that `source` does not have.

    HmfError for a tensor of `source` that the model does not have.
    """
    state = {name: x for name, x in source.state_dict().items() if not (dropped and name.startswith(dropped))}
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=source.dtype)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected:
        raise HmfError(
            f"{type(source).__name__}: the Hybrid has no parameter for the tensors {', '.join(sorted(unexpected))}"
        )
    model.tie_weights()
    model.config.dtype = source.config.dtype or model.dtype
    model.generation_config = source.generation_config
    return model.train(source.training), set(missing)


def footprint(model: PreTrainedModel) -> dict[str, int]:
    """parameters; for one sequence kv_bytes_per_token, in the model's dtype, and state_bytes, as in computation.

    The last two are known of the supported families.
    """
    config = model.config
    if config.model_type.removeprefix("hybrid_") not in FAMILIES:
        return {"parameters": model.num_parameters()}
    pattern = getattr(config, "pattern", None)
    recurrent = config.recurrent_layers if pattern else own_layers(config)
    attention_layers = config.num_hidden_layers - len(recurrent)
    kv = attention_layers * 2 * config.num_key_value_heads * base_head_dim(config) * model.dtype.itemsize
    shapes = [layer_states(config, index) if pattern else own_state_shapes(config) for index in recurrent]
    state = sum(shape.bytes(model.dtype) for layer in shapes for shape in layer.values())
    return {"parameters": model.num_parameters(), "kv_bytes_per_token": kv, "state_bytes": state}
