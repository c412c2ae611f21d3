# SPDX-License-Identifier: Apache-2.0
"""Checks of a config's values, which transformers uses before it checks them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.configuration_utils import remap_legacy_layer_types

from hmf.errors import HmfError, unknown_name
from hmf.layers.own import RECURRENT

from .families import FAMILIES
from .files import DTYPES
from .rope import LAYER_TYPES

# Upper bounds of a model's sizes. Without them a typo would make transformers build layers for hours.
SIZES = {
    "num_hidden_layers": 10_000,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 2**16),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), 2**16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2**16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"), 2**16),
    **dict.fromkeys(("full_attention_interval", "decoder_sparse_step"), 10_000),
    "hidden_size": 2**20,
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 2**24),
    "vocab_size": 2**26,
    "num_labels": 2**20,
    "max_position_embeddings": 2**40,
}


# Numbers by which a model multiplies or divides.
FACTORS = (
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logits_scaling",
    "no_rope_layer_interval",
    "query_pre_attn_scalar",
    "residual_multiplier",
)
# Ranges of other numbers: smallest and largest value.
RANGES = {"rms_norm_eps": (0, 1), "attention_dropout": (0, 1), "initializer_range": (0, math.inf)}

# Where transformers looks for the config of a language model inside another config.
NESTED = ("text_config", "decoder", "generator", "text_encoder")


def require_values(content: Mapping[str, Any], file: str | Path) -> None:
    """HmfError for values of a config.json that transformers uses before it checks them.

    For families that are not supported, only the upper bounds of sizes are checked.
    """
    known = str(content.get("model_type")).removeprefix("hybrid_") in FAMILIES
    for name, most in SIZES.items():
        value, least = content.get(name), 0 if "experts" in name or not known else 1
        is_size = type(value) is int and least <= value <= most
        if value is not None and not is_size and (known or type(value) is int):
            raise HmfError(f"{file}: {name}: {value!r} is not a whole number from {least} to {most:,}; correct it")
    if not known:
        return
    for name, (lowest, highest) in RANGES.items():
        value = content.get(name)
        if isinstance(value, int | float) and not (lowest <= value <= highest and math.isfinite(value)):
            raise HmfError(f"{file}: {name}: {value!r} is not a number from {lowest} to {highest}; correct it")
    keys = vars(FAMILIES[str(content["model_type"]).removeprefix("hybrid_")].config_class())["__dataclass_fields__"]
    if "head_dim" not in keys and content.get("head_dim", 0) is None:
        raise HmfError(f"{file}: head_dim: null: transformers takes it for a size; remove the key")
    if content.get("num_experts") == 0 and "num_experts" in keys and "intermediate_size" not in keys:
        raise HmfError(f"{file}: num_experts: 0: this family has experts in every layer; give the base model's number")
    dtypes = {name: content[name] for name in ("dtype", "torch_dtype") if content.get(name) is not None}
    for name, value in dtypes.items():
        if getattr(torch, str(value), None) not in DTYPES.values():
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
            raise HmfError(f"{file}: {name}: {value!r} is not one of {allowed}; give the one to compute in")
    if len({getattr(torch, value) for value in dtypes.values()}) > 1:
        both = " and ".join(f"{name} {value!r}" for name, value in dtypes.items())
        raise HmfError(f"{file}: {both} disagree; remove one of them")
    for name in ("hidden_act", "hidden_activation"):
        activation = content.get(name)
        if activation is not None and not (isinstance(activation, str) and activation in ACT2FN):
            raise HmfError(f"{file}: {unknown_name(name, str(activation), ACT2FN)}")
    if content.get("return_dict") is False:
        raise HmfError(f"{file}: return_dict: false: transformers runs no such model; remove the key")
    if content.get("output_attentions"):
        raise HmfError(
            f"{file}: output_attentions: transformers saves no such model, because its default attention returns none; "
            "remove the key and give output_attentions=True to forward"
        )
    for name in FACTORS:
        value = content.get(name)
        if isinstance(value, int | float) and not 0 < value < math.inf:  # transformers checks the type
            raise HmfError(f"{file}: {name}: {value!r} is not a positive number; give the base model's")
    rotated, layers = content.get("no_rope_layers"), content.get("num_hidden_layers")
    if isinstance(rotated, list) and isinstance(layers, int) and len(rotated) < layers:
        raise HmfError(f"{file}: no_rope_layers: has {len(rotated)} entries for {layers} layers; give one for each")
    base, given = content["model_type"], content.get("layer_types")
    if not base.startswith("hybrid_") and isinstance(given, list) and all(isinstance(kind, str) for kind in given):
        kinds = (*LAYER_TYPES, *([RECURRENT] if FAMILIES[base].own_recurrence else []))
        if unknown := [kind for kind in given if remap_legacy_layer_types([kind])[0] not in kinds]:
            raise HmfError(f"{file}: layer_types: {unknown[0]!r} is not one of {', '.join(kinds)}; correct it")
    if content.get("hybrid_override_pattern") is not None and not base.startswith("hybrid_"):
        raise HmfError(
            f"{file}: hybrid_override_pattern: model_type {base!r} is not a Hybrid; remove the key, or set model_type "
            f"to hybrid_{base}"
        )
    if nested := [name for name in NESTED if content.get(name) is not None]:
        raise HmfError(f"{file}: {nested[0]}: a {base} config contains no other config; remove the key")


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn an error of a config class in the block into an HmfError that names `source`, the file or the option."""
    try:
        yield
    except HmfError as error:
        raise HmfError(re.sub("^config.json", lambda _: source, str(error))) from None
    except Exception as error:  # any kind, because transformers uses a config's values before it checks them
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if isinstance(error, StrictDataclassError) and lines[1:]:  # its second line names the field and the reason
            lines = [lines[1].removeprefix("TypeError: ").removeprefix("ValueError: ")]
        raise HmfError(f"{source}: {lines[0]}") from None


def changed(config: Any, values: Mapping[str, Any], option: str) -> Any:
    """A copy of `config` with other `values`; HmfError that names `option`, the command-line option that gives them."""
    fields = config.to_dict() | values
    fields.pop("layer_types", None)  # follows from the number of layers
    require_values(fields, option)
    with reading(option):
        return type(config).from_dict(fields)
