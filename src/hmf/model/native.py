# SPDX-License-Identifier: Apache-2.0
"""Converts a GDN Hybrid of Qwen3 or Qwen3-MoE to a stock `Qwen3_5ForCausalLM` or `Qwen3_5MoeForCausalLM`, and one of
Qwen3.5, Qwen3.5-MoE or Qwen3-Next to its base's class. They load without this package.

Qwen3.5's text model is a hybrid of attention and Gated DeltaNet. A Hybrid of Qwen3.5 itself becomes one with other
`layer_types`, in which new GDN layers have the base's names of tensors. A Hybrid of Qwen3 computes the same function
with other tensors:

- Its GDN layers have as many key as query heads, so keys, values and their convolutions are stored for all heads.
- Its attention has an output gate. Gate rows of zero give sigmoid(0) = 1/2, so the output projection is doubled.
- Its norms multiply by one plus the stored weight, except for the norm inside GDN.
- Besides the routed experts, each layer has a shared expert, whose weights are set to zero.

Legend: H heads, K head_dim, D hidden_size, W conv_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from transformers import (
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)
from transformers.models.auto import tokenization_auto

from hmf.config.layers import LAYER_KINDS, SILU, layer_options, own_shape_problem
from hmf.config.pattern import ATTENTION
from hmf.errors import HmfError, listed, notice
from hmf.layers.attention import stock_parameters
from hmf.layers.own import RECURRENT

from .checkpoint import STORED, load_config, load_model, save_checkpoint
from .configuration import OPTION_KEYS
from .files import require_finite

FORMAT = "qwen3_5"
# Per model type of a Hybrid, the stock config and model.
CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "hybrid_qwen3": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "hybrid_qwen3_moe": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
}
# Per model type of a base with recurrent layers of its own, the name of its format.
OWN = {"qwen3_5_text": FORMAT, "qwen3_5_moe_text": FORMAT, "qwen3_next": "qwen3_next"}
SYMBOL, GDN = "GDN", LAYER_KINDS["GDN"]
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")


def _must_be(value: Any, fix: str) -> Callable[[Any, Any], str | None]:
    return lambda option, config: None if option == value else fix


def _norm_eps(option: float, config: Any) -> str | None:
    eps = config.rms_norm_eps
    if option == eps:
        return None
    return (
        f"the format has one epsilon for all norms, rms_norm_eps, here {eps:g}, which is the default of a new Hybrid; "
        f"to convert this one, set it to {eps:g}, which changes the outputs slightly, and evaluate it again"
    )


def _own_shape(option: bool, config: Any) -> str | None:
    if option or not config.family.own_recurrence:
        return None
    why, shape = own_shape_problem(config), "the format has one shape for all GDN layers, that of the base's own"
    return f"{shape}, but {why}; use the Hybrid's own format" if why else f"{shape}; make the Hybrid again with it"


def _conv_size(option: int, config: Any) -> str | None:
    width = config.linear_conv_kernel_dim if config.family.own_recurrence else option
    return None if option <= width else f"the convolutions of the base's own layers have {width}; {TRAIN}"


def _expressed(option: Any, config: Any) -> str | None:
    return None


TRAIN = "make the Hybrid again without it (hmf init), or keep it in its own format, which hmf serve supports"
# For every option of GDN a function of its value and the config, which returns why it cannot be converted, or None.
OPTIONS: dict[str, Callable[[Any, Any], str | None]] = {
    **dict.fromkeys(("hidden_size", "head_dim", "num_q_heads", "num_k_heads", "num_v_heads"), _expressed),
    "use_gate": _must_be(True, f"the format always gates the output; {TRAIN}"),
    "conv_size": _conv_size,  # a narrower filter gets zeros for the tokens before
    "use_short_conv": _expressed,  # False becomes a filter that returns the current token
    "kv_proj_rank": lambda option, config: f"the format has no low-rank term; {TRAIN}" if option else None,
    "kv_learnable_residual": _expressed,  # without kv_proj_rank it has no effect
    "allow_neg_eigval": _must_be(False, f"the format's beta is at most 1; {TRAIN}"),
    "conv_bias": _must_be(False, f"the format's convolutions have no bias; {TRAIN}"),
    "norm_eps": _norm_eps,
    "own_shape": _own_shape,
}
# Of a base with experts, every key that the format lacks: the only value that it can express, and the reason.
EXPERTS: dict[str, tuple[Any, str]] = {
    "norm_topk_prob": (True, "the format always divides the weights of the chosen experts by their sum"),
    "mlp_only_layers": ([], "the format has experts in every layer"),
    "decoder_sparse_step": (1, "the format has experts in every layer"),
}
# Keys of a Qwen3 Hybrid's config for which the new config has other keys or values.
REPLACED = {
    *("model_type", "architectures", "transformers_version", "hybrid_override_pattern", "layer_types", "state_dtype"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "rope_parameters"),
    *("_name_or_path", "output_attentions"),  # no properties of a model
    *OPTION_KEYS,
}


@dataclass(frozen=True)
class NativeReport:
    """Numbers of parameters before and after, and what those are that were added; tied embeddings are counted once."""

    before: int
    after: int
    additions: str

    def describe(self) -> str:
        """One line of text."""
        added = self.after - self.before
        if not added:
            return f"{self.after:,} parameters, as many as the Hybrid"
        share = f"{added:,} ({added / self.before:.1%})"
        return f"{self.after:,} parameters: {share} more than the Hybrid, for {self.additions}"


def convert(source: str | Path, out: str | Path, to: str = FORMAT) -> NativeReport:
    """`hmf convert`: write the Hybrid `source` as a stock model to the new directory `out`, with its other files.

    Tensors keep their dtypes; norms become float32 if weight - 1 cannot be stored exactly. HmfError names the key that
    the format does not support.
    """
    native_config(load_config(source), f"{source}/config.json", to)  # checks before the weights are read
    model = load_model(source, dtype=STORED)
    require_finite(Path(source))
    return save_native(model, out, companions=source, to=to)


def save_native(model: PreTrainedModel, out: str | Path, companions: str | Path, to: str = FORMAT) -> NativeReport:
    """Save a GDN Hybrid in memory as a stock model, with the other files of the checkpoint `companions`."""
    config = native_config(model.config, f"{companions}/config.json", to)
    with torch.device("meta"):
        native = classes(model.config)[1](config)
    missing, unexpected = native.load_state_dict(native_tensors(model, str(companions)), strict=False, assign=True)
    if wrong := sorted({*missing, *unexpected}):
        raise HmfError(f"{companions}: tensors without a counterpart in {to}: {listed(wrong)}")
    native.tie_weights()
    native.generation_config = model.generation_config
    native.config.dtype = model.config.dtype or model.dtype
    save_checkpoint(native, out, companions)
    additions = "convolutions of one width"
    if not model.config.family.own_recurrence:
        experts = "shared experts of zeros, " * _has_experts(model.config)
        additions = f"repeated heads, {additions}, {experts}and the gates of attention"
    report = NativeReport(model.num_parameters(), native.num_parameters(), additions)
    notice(f"{out}: {report.describe()}")
    return report


def classes(config: Any) -> tuple[type[Any], type[Any]]:
    """The stock config and model that a Hybrid with this config becomes; those of the base, if it has recurrences."""
    if config.family.own_recurrence:
        return config.family.config_class(), config.family.class_named("ForCausalLM")
    return CLASSES[config.model_type]


def native_config(config: Any, source: str = "config.json", to: str = FORMAT) -> Any:
    """The config in the format `to` of a Hybrid's config; HmfError names the key that the format does not support."""
    _require_expressible(config, source, to)
    return _own_config(config) if config.family.model_type in OWN else _new_config(config, source)


def _require_expressible(config: Any, source: str, to: str) -> None:
    """HmfError that names the first key of a Hybrid's config which the format `to` does not support."""

    def refuse(key: str, why: str) -> NoReturn:
        raise HmfError(f"{source}: {key}: {why}")

    name, pattern = config.model_type, getattr(config, "pattern", None)
    if pattern is None:
        refuse("model_type", f"{name!r} is not a Hybrid; make one with hmf init, or serve the model as it is")
    if pattern.fused:
        refuse("hybrid_override_pattern", f"the model still has its teacher; use hmf export --format {to}")
    own = OWN.get(config.family.model_type)
    if own is None and name not in CLASSES:
        refuse("model_type", f"{name!r}: {_why_not(config)}; use the Hybrid's own format")
    if (able := own or FORMAT) != to:
        refuse("model_type", f"{name!r} can be converted to {able}, not to {to}; give {able}")
    if others := sorted(set(pattern.symbols) - {ATTENTION, SYMBOL}):
        refuse(
            "hybrid_override_pattern",
            f"{', '.join(others)}: {to} has only attention and GDN layers; use the Hybrid's own format",
        )
    if config.layer_types.count(RECURRENT) in (0, len(pattern)):
        refuse(
            "hybrid_override_pattern",
            f"{pattern}: {to} needs both attention and GDN layers; use the Hybrid's own format",
        )
    if SYMBOL in pattern.symbols:
        _check_options(config, to, refuse)
    if own:
        return
    if _has_experts(config) and not config.num_experts:
        refuse("num_experts", "0: the format has experts in every layer; use the Hybrid's own format")
    for key, (only, cause) in EXPERTS.items() if _has_experts(config) else ():
        if getattr(config, key) != only:
            refuse(key, f"{getattr(config, key)!r}: {cause}; use the Hybrid's own format")
    if config.attention_bias:
        refuse("attention_bias", "serving engines ignore biases in this format; use the Hybrid's own format")
    if config.hidden_act not in SILU:
        refuse(
            "hidden_act",
            f"{config.hidden_act!r} would also become the activation of the convolutions, which is silu; use the "
            "Hybrid's own format",
        )
    kept_windows = [
        w for w, symbol in zip(config.attention_windows, pattern.symbols, strict=True) if symbol == ATTENTION
    ]
    if any(kept_windows):
        refuse("sliding_window", "the format has only full attention; use the Hybrid's own format")


def _has_experts(config: Any) -> bool:
    return classes(config)[0] is Qwen3_5MoeTextConfig


def _new_config(config: Any, source: str) -> Any:
    """The config in the format of a Hybrid whose base has no recurrent layers of its own."""
    config_class, model_class = classes(config)
    with_experts, options = _has_experts(config), layer_options(config, SYMBOL)
    attributes = {stored: name for name, stored in config.attribute_map.items()}  # num_local_experts: num_experts
    fields = {attributes.get(key, key): value for key, value in config.to_dict().items()}
    known = {field.name for field in dataclasses.fields(config_class)}
    kept = {key: value for key, value in fields.items() if key in known - REPLACED}
    checked = {*EXPERTS, "intermediate_size"} if with_experts else set()  # the last is of layers without experts
    if dropped := sorted(fields.keys() - kept.keys() - REPLACED - checked):
        notice(f"{source}: keys that the config of {FORMAT} does not have are left out: {listed(dropped, 8)}")
    # Without mrope_section, which divides positions by image axes: in text all axes have the same position.
    rope = {key: value for key, value in config.rope_parameters.items() if not key.startswith("mrope")}
    # Qwen3 reads the key with this type of positions alone, and otherwise rotates whole heads.
    rotated = rope.get("partial_rotary_factor", 1.0) if rope["rope_type"] == "proportional" else 1.0
    # The shared expert (all zeros) has the size of a routed expert, so that it can be split and quantised like one.
    shared = {"shared_expert_intermediate_size": config.moe_intermediate_size} if with_experts else {}
    return config_class(
        **kept
        | shared
        | {
            "architectures": [model_class.__name__],
            "hidden_act": "silu",  # also where the base calls it swish, a name that vLLM does not know
            "layer_types": [
                "full_attention" if symbol == ATTENTION else "linear_attention" for symbol in config.pattern.symbols
            ],
            "rope_parameters": {**rope, "partial_rotary_factor": rotated},
            "partial_rotary_factor": rotated,  # otherwise the class writes its own default next to the table
            "linear_conv_kernel_dim": _conv_width(config),
            "linear_key_head_dim": options.head_dim,
            "linear_value_head_dim": options.head_dim,
            "linear_num_key_heads": options.num_heads,
            "linear_num_value_heads": options.num_heads,
            "mamba_ssm_dtype": config.state_dtype,  # vLLM's name for it
            # Used if tokenizer_config.json names no class. Qwen3.5's default class splits text in another way.
            "tokenizer_class": tokenization_auto.TOKENIZER_MAPPING_NAMES[config.family.model_type],
        }
    )


def _why_not(config: Any) -> str:
    """The reason why a Hybrid of this family cannot be written as a Qwen3.5."""
    if "q_norm.weight" not in stock_parameters(config, 0):
        return f"attention in {FORMAT} normalises queries and keys, which this family does not"
    with torch.device("meta"), config.as_base():
        layer = config.family.class_named("DecoderLayer")(config, 0)
    norms = [name for name, _ in layer.named_children() if "norm" in name]
    if {*norms} != {"input_layernorm", "post_attention_layernorm"}:
        return (
            f"layers in {FORMAT} have a norm before the attention and one before the MLP, and this family's have "
            f"{', '.join(norms)}"
        )
    return "only Hybrids of Qwen3, Qwen3-MoE and bases with Gated DeltaNet layers can be converted"


def _check_options(config: Any, to: str, refuse: Callable[[str, str], NoReturn]) -> None:
    """`refuse` the first option of GDN that the format does not have."""
    options = layer_options(config, SYMBOL)
    if unknown := type(options).model_fields.keys() ^ OPTIONS.keys():
        raise HmfError(f"{GDN.config_key}: {listed(sorted(unknown))}: the conversion to {to} does not know this")
    for key, reason in OPTIONS.items():
        value = getattr(options, key)
        if why := reason(value, config):
            refuse(f"{GDN.config_key}.{key}", f"{value!r}: {why}")


def _own_config(config: Any) -> Any:
    """The config of the base itself, with the Hybrid's kinds of layers."""
    hybrid = {"model_type", "transformers_version", "hybrid_override_pattern", "base_layer_types", "state_dtype"}
    if config.layer_types != config.base_layer_types:
        hybrid.add("full_attention_interval")  # of the base's layers; `layer_types` lists them
    fields = {key: value for key, value in config.to_dict().items() if key not in {*hybrid, *OPTION_KEYS}}
    config_class, model_class = classes(config)
    changed = {
        "architectures": [model_class.__name__],
        "hidden_act": "silu",  # also where the base calls it swish, a name that vLLM does not know
        "layer_types": config.layer_types,
        "mamba_ssm_dtype": config.state_dtype,
    }
    return config_class(**fields | changed)


def _conv_width(config: Any) -> int:
    """The width of the convolutions of all GDN layers in the format."""
    if config.family.own_recurrence:
        return config.linear_conv_kernel_dim
    options = layer_options(config, SYMBOL)
    return max(2, options.conv_size) if options.use_short_conv else 2


@torch.no_grad()
def native_tensors(model: PreTrainedModel, source: str = "") -> dict[str, torch.Tensor]:
    """The tensors of `native_config(model.config)` by name, from those of a Hybrid; unchanged tensors are shared."""
    config, tensors = model.config, dict(model.state_dict())
    converted: dict[str, torch.Tensor] = {}
    for index in config.pattern.replaced:
        layer, mixer = f"model.layers.{index}.", f"model.layers.{index}.{GDN.module_name}"
        own = {name: tensors.pop(f"{mixer}.{name}") for name in model.get_submodule(mixer).state_dict()}
        converted |= {f"{layer}linear_attn.{name}": x for name, x in _gdn_tensors(config, own).items()}
    if config.family.own_recurrence:
        return converted | tensors
    rounded: list[str] = []

    def minus_one(name: str) -> torch.Tensor:
        weight = tensors.pop(name)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32)) - 1
        stored = wide.to(weight.dtype)
        if torch.equal(wide, stored.to(wide.dtype)):
            return stored
        rounded.append(name)
        return wide

    for index, symbol in enumerate(config.pattern.symbols):
        layer = f"model.layers.{index}."
        if symbol == ATTENTION:
            attention, heads = f"{layer}self_attn.", config.num_attention_heads
            query = tensors.pop(f"{attention}q_proj.weight").unflatten(0, (heads, -1))  # [H, K, D]
            converted[f"{attention}q_proj.weight"] = torch.cat([query, torch.zeros_like(query)], 1).flatten(0, 1)
            converted[f"{attention}o_proj.weight"] = tensors.pop(f"{attention}o_proj.weight") * 2
            for name in ("q_norm.weight", "k_norm.weight"):
                converted[attention + name] = minus_one(attention + name)
        if (router := tensors.get(f"{layer}mlp.gate.weight")) is not None:
            converted |= {f"{layer}mlp.{name}.weight": x for name, x in _shared_expert(config, router).items()}
    for name in [name for name in tensors if name.endswith(NORMS)]:
        converted[name] = minus_one(name)
    if rounded:
        notice(
            f"{source}: {len(rounded)} norms are stored in float32, because their dtype cannot hold weight - 1: "
            f"{listed(rounded, 2)}; an engine that computes in bfloat16 rounds them"
        )
    return converted | tensors


def _shared_expert(config: Any, router: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights of a shared expert that adds zero, in the dtype of the `router`'s weight."""
    size, width = config.moe_intermediate_size, config.hidden_size
    return {
        "shared_expert.gate_proj": router.new_zeros(size, width),
        "shared_expert.up_proj": router.new_zeros(size, width),
        "shared_expert.down_proj": router.new_zeros(width, size),
        "shared_expert_gate": router.new_zeros(1, width),
    }


def _gdn_tensors(config: Any, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The format's tensors of one GDN layer from the layer's `own` tensors; those that need no change keep their names.

    A base with recurrent layers of its own has its heads; in other Hybrids, rows are repeated for all heads.
    """
    options, width = layer_options(config, SYMBOL), _conv_width(config)

    def rows(kind: str) -> list[torch.Tensor]:
        given = [own.pop(f"{name}_{kind}.weight") for name in "qkv"]  # each [Hk K, ...]
        if options.own_shape:
            return given
        heads = [x.unflatten(0, (-1, options.head_dim)) for x in given]
        return [x.repeat_interleave(options.num_heads // len(x), 0).flatten(0, 1) for x in heads]

    projections = rows("proj")
    filters = torch.cat(rows("conv1d") if options.use_short_conv else [x.new_ones(len(x), 1, 1) for x in projections])
    parts = {
        "qkv": projections,
        "z": [own.pop("g_proj.weight")],
        "b": [own.pop("b_proj.weight")],
        "a": [own.pop("gk_proj.weight")],
    }
    if OWN.get(config.family.model_type) == "qwen3_next":  # rows of each key head together
        merged = {"qkvz": parts["qkv"] + parts["z"], "ba": parts["b"] + parts["a"]}
        by_head = {name: [x.unflatten(0, (options.num_k_heads, -1)) for x in xs] for name, xs in merged.items()}
        parts = {name: [torch.cat(xs, 1).flatten(0, 1)] for name, xs in by_head.items()}
    return {
        **{f"in_proj_{name}.weight": torch.cat(xs) for name, xs in parts.items()},
        "conv1d.weight": F.pad(filters, (width - filters.shape[-1], 0)),
        "norm.weight": own.pop("o_norm.weight"),
        "out_proj.weight": own.pop("o_proj.weight"),
        **own,
    }
