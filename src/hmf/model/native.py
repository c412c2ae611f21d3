# SPDX-License-Identifier: Apache-2.0
"""Converts a GDN Hybrid of Qwen3 or Qwen3-MoE to a stock `Qwen3_5ForCausalLM` or `Qwen3_5MoeForCausalLM`, which
load without this package.

Qwen3.5's text model is a hybrid of attention and Gated DeltaNet. The result computes the same function with other
tensors:

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

from hmf.config.layers import LAYER_KINDS, layer_options
from hmf.config.pattern import ATTENTION
from hmf.errors import HmfError, listed, notice

from .checkpoint import STORED, load_config, load_model, save_checkpoint
from .configuration import OPTION_KEYS
from .files import require_finite

FORMAT = "qwen3_5"
# Per model type of a Hybrid, the stock config and model.
CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "hybrid_qwen3": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "hybrid_qwen3_moe": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
}
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


def _expressed(option: Any, config: Any) -> str | None:
    return None


TRAIN = "make the Hybrid again without it (hmf init), or keep it in its own format, which hmf serve supports"
# For every option of GDN a function of its value and the config, which returns why it cannot be converted, or None.
OPTIONS: dict[str, Callable[[Any, Any], str | None]] = {
    **dict.fromkeys(("hidden_size", "head_dim", "num_q_heads", "num_k_heads", "num_v_heads"), _expressed),
    "use_gate": _must_be(True, f"the format always gates the output; {TRAIN}"),
    "conv_size": _expressed,  # a filter of width 1 gets a zero for the previous token
    "use_short_conv": _expressed,  # False becomes a filter that returns the current token
    "kv_proj_rank": lambda option, config: f"the format has no low-rank term; {TRAIN}" if option else None,
    "kv_learnable_residual": _expressed,  # without kv_proj_rank it has no effect
    "allow_neg_eigval": _must_be(False, f"the format's beta is at most 1; {TRAIN}"),
    "conv_bias": _must_be(False, f"the format's convolutions have no bias; {TRAIN}"),
    "norm_eps": _norm_eps,
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
    """Numbers of parameters before and after; tied embeddings are counted once."""

    before: int
    after: int

    def describe(self) -> str:
        """One line of text."""
        added = self.after - self.before
        return (
            f"{self.after:,} parameters: {added:,} ({added / self.before:.1%}) more than the Hybrid, for repeated "
            "heads, the gates of attention and, beside experts, shared ones that are zero"
        )


def convert(source: str | Path, out: str | Path) -> NativeReport:
    """`hmf convert`: write the Hybrid `source` as a stock Qwen3.5 to the new directory `out`, with its other files.

    Tensors keep their dtypes; norms become float32 if weight - 1 cannot be stored exactly. HmfError names the key that
    the format does not support.
    """
    native_config(load_config(source), f"{source}/config.json")  # checks before the weights are read
    model = load_model(source, dtype=STORED)
    require_finite(Path(source))
    return save_native(model, out, companions=source)


def save_native(model: PreTrainedModel, out: str | Path, companions: str | Path) -> NativeReport:
    """Save a GDN Hybrid in memory as a stock Qwen3.5, with the other files of the checkpoint `companions`."""
    config = native_config(model.config, f"{companions}/config.json")
    with torch.device("meta"):
        native = CLASSES[model.config.model_type][1](config)
    missing, unexpected = native.load_state_dict(native_tensors(model, str(companions)), strict=False, assign=True)
    if wrong := sorted({*missing, *unexpected}):
        raise HmfError(f"{companions}: tensors without a counterpart in {FORMAT}: {listed(wrong)}")
    native.tie_weights()
    native.generation_config = model.generation_config
    native.config.dtype = model.config.dtype or model.dtype
    save_checkpoint(native, out, companions)
    report = NativeReport(model.num_parameters(), native.num_parameters())
    notice(f"{out}: {report.describe()}")
    return report


def native_config(config: Any, source: str = "config.json") -> Any:
    """The Qwen3.5 config of a Hybrid's config; HmfError names the key that the format does not support."""

    def refuse(key: str, why: str) -> NoReturn:
        raise HmfError(f"{source}: {key}: {why}")

    name, pattern = config.model_type, getattr(config, "pattern", None)
    if pattern is None:
        refuse("model_type", f"{name!r} is not a Hybrid; make one with hmf init, or serve the model as it is")
    if pattern.fused:
        refuse("hybrid_override_pattern", f"the model still has its teacher; use hmf export --format {FORMAT}")
    if config.family.own_recurrence:
        refuse(
            "model_type",
            f"{name!r}: {FORMAT} has one shape for all of its GDN layers, here that of the base's own, which new "
            "layers do not have; use the Hybrid's own format",
        )
    if name not in CLASSES:
        refuse(
            "model_type",
            f"{name!r}: attention in {FORMAT} normalises queries and keys, which this family does not; only "
            "Hybrids of Qwen3 and Qwen3-MoE can be converted; use the Hybrid's own format",
        )
    config_class, model_class = CLASSES[name]
    with_experts = config_class is Qwen3_5MoeTextConfig
    for key, (only, cause) in EXPERTS.items() if with_experts else ():
        if getattr(config, key) != only:
            refuse(key, f"{getattr(config, key)!r}: {cause}; use the Hybrid's own format")
    if others := sorted(set(pattern.symbols) - {ATTENTION, SYMBOL}):
        refuse(
            "hybrid_override_pattern",
            f"{', '.join(others)}: {FORMAT} has only attention and GDN layers; use the Hybrid's own format",
        )
    if SYMBOL not in pattern.symbols or ATTENTION not in pattern.symbols:
        refuse("hybrid_override_pattern", f"{pattern}: {FORMAT} needs both attention and GDN layers")
    if config.attention_bias:
        refuse("attention_bias", "serving engines ignore biases in this format; use the Hybrid's own format")
    if config.hidden_act not in ("silu", "swish"):
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
    options = layer_options(config, SYMBOL)
    if unknown := type(options).model_fields.keys() ^ OPTIONS.keys():
        raise HmfError(f"{GDN.config_key}: {listed(sorted(unknown))}: the conversion to {FORMAT} does not know this")
    for key, reason in OPTIONS.items():
        value = getattr(options, key)
        if why := reason(value, config):
            refuse(f"{GDN.config_key}.{key}", f"{value!r}: {why}")

    attributes = {stored: name for name, stored in config.attribute_map.items()}  # num_local_experts: num_experts
    fields = {attributes.get(key, key): value for key, value in config.to_dict().items()}
    known = {field.name for field in dataclasses.fields(config_class)}
    kept = {key: value for key, value in fields.items() if key in known - REPLACED}
    checked = {*EXPERTS, "intermediate_size"} if with_experts else set()  # the last is of layers without experts
    if dropped := sorted(fields.keys() - kept.keys() - REPLACED - checked):
        notice(f"{source}: keys that the config of {FORMAT} does not have are left out: {listed(dropped, 8)}")
    # Without mrope_section, which divides positions by image axes: in text all axes have the same position.
    rope = {key: value for key, value in config.rope_parameters.items() if not key.startswith("mrope")}
    # The shared expert (all zeros) has the size of a routed expert, so that it can be split and quantised like one.
    shared = {"shared_expert_intermediate_size": config.moe_intermediate_size} if with_experts else {}
    return config_class(
        **kept
        | shared
        | {
            "architectures": [model_class.__name__],
            "layer_types": [
                "full_attention" if symbol == ATTENTION else "linear_attention" for symbol in pattern.symbols
            ],
            "rope_parameters": {**rope, "partial_rotary_factor": 1.0},
            "partial_rotary_factor": 1.0,  # otherwise the class writes its own default next to the table
            "linear_conv_kernel_dim": max(2, options.conv_size) if options.use_short_conv else 2,
            "linear_key_head_dim": options.head_dim,
            "linear_value_head_dim": options.head_dim,
            "linear_num_key_heads": options.num_heads,
            "linear_num_value_heads": options.num_heads,
            "mamba_ssm_dtype": config.state_dtype,  # vLLM's name for it
            # Used if tokenizer_config.json names no class. Qwen3.5's default class splits text in another way.
            "tokenizer_class": tokenization_auto.TOKENIZER_MAPPING_NAMES[config.family.model_type],
        }
    )


@torch.no_grad()
def native_tensors(model: PreTrainedModel, source: str = "") -> dict[str, torch.Tensor]:
    """The tensors of `native_config(model.config)` by name, from those of a Hybrid; unchanged tensors are shared."""
    tensors, converted = dict(model.state_dict()), {}
    rounded: list[str] = []

    def minus_one(name: str) -> torch.Tensor:
        weight = tensors.pop(name)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32)) - 1
        stored = wide.to(weight.dtype)
        if torch.equal(wide, stored.to(wide.dtype)):
            return stored
        rounded.append(name)
        return wide

    for index, symbol in enumerate(model.config.pattern.symbols):
        layer = f"model.layers.{index}."
        if symbol == ATTENTION:
            attention, heads = f"{layer}self_attn.", model.config.num_attention_heads
            query = tensors.pop(f"{attention}q_proj.weight").unflatten(0, (heads, -1))  # [H, K, D]
            converted[f"{attention}q_proj.weight"] = torch.cat([query, torch.zeros_like(query)], 1).flatten(0, 1)
            converted[f"{attention}o_proj.weight"] = tensors.pop(f"{attention}o_proj.weight") * 2
            for name in ("q_norm.weight", "k_norm.weight"):
                converted[attention + name] = minus_one(attention + name)
        else:
            mixer = model.get_submodule(layer + GDN.module_name)
            own = {name: tensors.pop(f"{layer}{GDN.module_name}.{name}") for name in mixer.state_dict()}
            converted |= {f"{layer}linear_attn.{name}": x for name, x in _gdn_tensors(mixer.options, own).items()}
        if (router := tensors.get(f"{layer}mlp.gate.weight")) is not None:
            converted |= {f"{layer}mlp.{name}.weight": x for name, x in _shared_expert(model.config, router).items()}
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


def _gdn_tensors(options: Any, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Qwen3.5's tensors of one GDN layer from the layer's `own` tensors; those that need no change keep their names."""

    def all_heads(name: str) -> torch.Tensor:
        """Rows for all heads [H K, ...] from the rows of query, key or value heads [Hk K, ...]."""
        heads = own.pop(name).unflatten(0, (-1, options.head_dim))
        return heads.repeat_interleave(options.num_heads // heads.shape[0], 0).flatten(0, 1)

    projections = torch.cat([all_heads(f"{name}_proj.weight") for name in "qkv"])  # [3 H K, D]
    if options.use_short_conv:
        filters = torch.cat([all_heads(f"{name}_conv1d.weight") for name in "qkv"])  # [3 H K, 1, W]
        filters = F.pad(filters, (max(0, 2 - options.conv_size), 0))
    else:
        filters = projections.new_tensor([0.0, 1.0]).repeat(len(projections), 1, 1)
    renamed = {
        "in_proj_z.weight": "g_proj.weight",
        "in_proj_b.weight": "b_proj.weight",
        "in_proj_a.weight": "gk_proj.weight",
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "norm.weight": "o_norm.weight",
        "out_proj.weight": "o_proj.weight",
    }
    converted = {name: own.pop(source) for name, source in renamed.items()}
    return converted | {"in_proj_qkv.weight": projections, "conv1d.weight": filters} | own
