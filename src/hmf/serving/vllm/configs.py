# SPDX-License-Identifier: Apache-2.0
"""Values of a checkpoint's config.json with which vLLM's layers differ from those of transformers, or do not work.

Each function of a start returns the reason why it is refused, or None. `of_stock_classes` is about bases, which are
served.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hmf.config.layers import SILU, base_activation, base_head_dim, layer_options, needed_kinds
from hmf.config.pattern import ATTENTION
from hmf.config.rope import ROPE_KEYS, ROPE_SCALING_KEYS
from hmf.errors import HmfError
from hmf.layers.own import own_layers
from hmf.model.configuration import OPTION_KEYS
from hmf.model.values import reading

from .start import Start

ELSEWHERE = "generate with Hugging Face instead"

# Of bases with recurrent layers of their own, which vLLM's Qwen3-Next serves.
OWN_RECURRENCE = ("dual_chunk_attention_config", "layer_scale", "output_gate_type", "qkv_bias")
# The families with a class in models.py, and the keys that vLLM's stock layers for them read and transformers' do not.
# With such a key the two would compute different functions.
READ_BY_VLLM = {
    "llama": ("bias", "qkv_bias", "target_layer_count"),
    "ministral3": (
        "ada_rms_norm_t_cond",
        "attention_bias",
        "bias",
        "mlp_bias",
        "qkv_bias",
        "target_layer_count",
    ),
    "mistral": (
        "ada_rms_norm_t_cond",
        "attention_bias",
        "bias",
        "llama_4_scaling",
        "mlp_bias",
        "qkv_bias",
        "target_layer_count",
    ),
    "phi3": ("attention_bias", "bias", "mlp_bias", "qkv_bias", "target_layer_count"),
    "qwen2": ("dual_chunk_attention_config", "qk_norm"),
    "qwen3": ("dual_chunk_attention_config",),
    "qwen3_5_moe_text": OWN_RECURRENCE,
    "qwen3_5_text": OWN_RECURRENCE,
    "qwen3_moe": ("dual_chunk_attention_config", "shared_expert_intermediate_size"),
    "qwen3_next": OWN_RECURRENCE,
    "smollm3": ("bias", "qkv_bias", "target_layer_count"),
}
# Keys that vLLM reads in every model.
READ_BY_VLLM_ALWAYS = (
    *("mrope_section", "rotary_emb_base", "rotary_emb_fraction", "rotary_pct", "xdrope_section"),
    *("attention_chunk_size", "canvas_length", "head_dtype", "n_head_kv", "num_kv_heads", "rswa_window"),
)


def unsettled(start: Start) -> str | None:
    """A config with values that do not follow from each other. vLLM sets those of --hf-overrides one by one."""
    before: dict[str, Any] = start.config.to_dict()
    try:
        with reading(option := "--hf-overrides"):
            after = type(start.config).from_dict(copy.deepcopy(before)).to_dict()
    except HmfError as error:
        return str(error)
    for key, value in before.items():
        settled = after.get(key)
        if isinstance(value, dict) and isinstance(settled, dict) and (missing := sorted(settled.keys() - value.keys())):
            return f"{option}: {key}.{missing[0]}: is missing; the table replaces that of config.json, so give all keys"
        if value != settled and key not in OPTION_KEYS:  # gdn_overrides changes what gdn_config becomes
            return f"{option}: {key}: {value!r} contradicts other keys, from which {settled!r} follows; correct them"
    return None


def family(start: Start) -> str | None:
    """No decoder for the family."""
    name = start.config.family.model_type
    if name in READ_BY_VLLM:
        return None
    return (
        f"vLLM's decoder for {name} does not take the layers of a Hybrid; use hmf chat, or generate with Hugging Face"
    )


def unlike_transformers(start: Start) -> str | None:
    """A key that only vLLM's layers read."""
    config = start.config
    names = READ_BY_VLLM[config.family.model_type]
    unsupported = [name for name in names if getattr(config, name, None)]
    unsupported += [name for name in READ_BY_VLLM_ALWAYS if getattr(config, name, None) is not None]
    if "qkv_bias" in names and hasattr(config, "qkv_bias"):  # also false, because it overrides `attention_bias`
        unsupported.append("qkv_bias")
    if not unsupported:
        return None
    return f"{unsupported[0]} in config.json: vLLM's layers read it and transformers' do not; remove it"


def activation(start: Start) -> str | None:
    """An activation that vLLM's MLPs lack."""
    name = base_activation(start.config)
    if name == "silu":
        return None
    fix = "write silu, which is the same" if name in SILU else ELSEWHERE
    return f"hidden_act {name!r}: vLLM's MLPs support only silu; {fix}"


def whole_width(start: Start) -> str | None:
    """A head_dim that vLLM's Qwen2 does not read."""
    config = start.config
    width = base_head_dim(config) * config.num_attention_heads
    if config.family.model_type != "qwen2" or width == config.hidden_size:
        return None
    return (
        f"head_dim {config.head_dim}: vLLM's Qwen2 assumes hidden_size / num_attention_heads, "
        f"{config.hidden_size // config.num_attention_heads}; {ELSEWHERE}"
    )


# The widest short convolution of vLLM's GPU kernels. That of prefills gives wrong numbers for wider ones.
WIDEST_ON_GPU = 4


def convolutions(start: Start) -> str | None:
    """A short convolution whose state vLLM cannot keep, or that its GPU kernels do not have."""
    config, widths = start.config, {}
    for kind in needed_kinds(config, config.pattern.symbols):
        options = layer_options(config, kind.symbol)
        if getattr(options, "use_short_conv", True):
            widths[f"{kind.config_key}.conv_size"] = getattr(options, "conv_size", None)
    if any(config.pattern.symbols[index] == ATTENTION for index in own_layers(config)):
        widths["linear_conv_kernel_dim"] = config.linear_conv_kernel_dim
    for key, width in widths.items():
        if width == 1:
            return f"{key} 1: vLLM cannot keep the state of such a convolution, which is empty; {ELSEWHERE}"
        if width is not None and width > WIDEST_ON_GPU and not start.on_cpu:
            return f"{key} {width}: vLLM's kernels for GPUs have convolutions of at most {WIDEST_ON_GPU}; {ELSEWHERE}"
    return None


# Keys of `rope_parameters` that vLLM and transformers use in the same way.
ROPE = ROPE_SCALING_KEYS | {"rope_type", "type", "rope_theta", "llama_4_scaling_beta", "max_position_embeddings"}
IMAGE_AXES = {"mrope_section", "mrope_interleaved"}  # in text, positions on all axes of an image are the same
# Families in which transformers rotates a part of each head, if the config says so.
PARTIAL = ("phi3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")


def positions(start: Start) -> str | None:
    """Rotary positions of another kind, or that end before the longest sequence."""
    config, rope = start.config, start.config.rope_parameters
    kind = rope["rope_type"]
    if kind not in ROPE_KEYS:
        return f"rope_type {kind!r}: vLLM computes other positions than transformers; {ELSEWHERE}"
    if rope.get("partial_rotary_factor", 1) != 1 and config.family.model_type not in PARTIAL:
        return "partial_rotary_factor: transformers rotates whole heads in this family; remove it"
    if int(base_head_dim(config) * rope.get("partial_rotary_factor", 1)) % 2:
        return "partial_rotary_factor: it rotates an odd number of channels, where vLLM needs pairs; " + ELSEWHERE
    of_images = IMAGE_AXES if config.family.position_axes() > 1 else set()
    if unknown := sorted(rope.keys() - ROPE - {"partial_rotary_factor"} - of_images):
        return f"rope_parameters.{unknown[0]}: transformers does not read it, and vLLM may; remove it"
    return beyond_table(start)


def beyond_table(start: Start) -> str | None:
    """Sequences longer than vLLM's table of rotary positions, whose end vLLM does not check."""
    for rope in rope_tables(start.config):
        kind, end = rope["rope_type"], start.config.max_position_embeddings
        if kind == "yarn":
            end = rope["original_max_position_embeddings"] * rope["factor"]
        elif kind == "linear":
            end *= rope["factor"]
        if start.longest > end:
            why = ", where transformers begins to scale them" if kind == "dynamic" else ""
            return (
                f"vLLM's table of rotary positions ({kind}) ends at {int(end)}{why}, before the {start.longest} of the "
                f"longest sequence; use --max-model-len {int(end)}"
            )
    return None


def rope_tables(config: Any) -> list[Any]:
    """The rotary positions of a config: one table, or those of layers with and without a window."""
    rope = config.rope_parameters
    return [rope] if "rope_type" in rope else list(rope.values())


def of_stock_classes(start: Start) -> Iterator[str]:
    """How the rotary positions of vLLM's own class for a base differ from those of transformers."""
    config, length = start.config, start.config.max_position_embeddings
    for rope in rope_tables(config):
        kind, name = rope["rope_type"], "rope_parameters"
        read = ROPE | {"partial_rotary_factor"} | (IMAGE_AXES if config.family.position_axes() > 1 else set())
        if kind == "longrope":
            read |= {"short_factor", "long_factor"}
            original = rope["original_max_position_embeddings"]
            if start.longest > original:
                yield (
                    f"rope_type 'longrope': with --max-model-len above {original}, vLLM uses long_factor for every "
                    f"sequence, and transformers for those of more than {original} tokens alone"
                )
            if rope.get("attention_factor") is not None or rope.get("factor") not in (None, length / original):
                yield f"{name}.attention_factor and factor of longrope: transformers reads them, and vLLM does not"
        if kind == "proportional" and rope.get("factor", 1) != 1:
            yield f"{name}.factor of proportional: transformers reads it, and vLLM does not"
        if kind == "default" and rope.get("partial_rotary_factor", 1) != 1 and config.family.model_type not in PARTIAL:
            yield f"{name}.partial_rotary_factor: vLLM rotates a part of each head, and transformers whole heads"
        for key in sorted(rope.keys() - read):
            yield f"{name}.{key}: transformers does not read it, and vLLM may"
