# SPDX-License-Identifier: Apache-2.0
"""The supported base families, one row each: Hugging Face decoders whose layers call their attention `self_attn`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hmf.errors import HmfError

# The base class of mixins for transformers' classes. As Any, it lets type checkers accept their calls of super().
Mixin: Any = object


@dataclass(frozen=True)
class Family:
    """The names of a family in transformers, and of its Hybrid.

    `model_type` is also the name of the package under `transformers.models`, unless `package` names another. `prefix`
    begins the names of its classes (`Qwen3` -> `Qwen3Config`, `Qwen3Model`, `Qwen3DecoderLayer`, `Qwen3ForCausalLM`).
    `text` follows it in the names of the config and the decoder (`Gemma3TextConfig`, `Gemma3TextModel`).
    """

    model_type: str
    prefix: str
    lists_layer_types: bool = True  # whether the published config.json has the key `layer_types`
    package: str | None = None
    text: str = ""
    own_recurrence: str | None = None  # the class of recurrent layers that the base itself has, after the prefix
    published: bool = False  # the published software has Hybrids of it, whose B'MOJO-F has its own biases and scale

    @property
    def hybrid_model_type(self) -> str:
        return f"hybrid_{self.model_type}"

    @property
    def hybrid_prefix(self) -> str:
        return f"Hybrid{self.prefix}"

    def config_class(self) -> type:
        return getattr(self._module("configuration"), f"{self.prefix}{self.text}Config")

    def class_named(self, suffix: str) -> type:
        """`Qwen3` + suffix from the family's modeling module."""
        module = self._module("modeling")
        named = getattr(module, f"{self.prefix}{self.text}{suffix}", None)
        return named or getattr(module, f"{self.prefix}{suffix}")

    def output_class(self) -> type:
        """The class of the decoder's result; that of a mixture of experts has router logits too."""
        from transformers import modeling_outputs

        is_moe = hasattr(self._module("modeling"), "load_balancing_loss_func")
        return modeling_outputs.MoeModelOutputWithPast if is_moe else modeling_outputs.BaseModelOutputWithPast

    def returns_given_cache(self) -> bool:
        """Whether the decoder's result has a cache that was passed with use_cache=False. The families differ."""
        decoder: Any = self.class_named("Model")
        with suppress(OSError):  # an installation without source files
            return "past_key_values if use_cache" not in inspect.getsource(decoder.forward)
        return False

    def query_growth(self) -> Callable[..., Any] | None:
        """The function for the position-dependent factor of queries (Ministral 3), or None.

        (position_ids [B, T], beta, original length) -> [B, 1, T, 1]
        """
        return getattr(self._module("modeling"), "get_llama_4_attn_scale", None)

    def positions_by_layer_type(self) -> bool:
        """Whether layers with and without a window have rotary positions of their own (Gemma 3, OLMo 3)."""
        rotary: Any = self.class_named("RotaryEmbedding")
        return "layer_type" in inspect.signature(rotary.forward).parameters

    def position_axes(self) -> int:
        """How many equal rows of positions the rotary embedding expects: 3 where images have time, height and width."""
        return 3 if hasattr(self.class_named("RotaryEmbedding"), "recomposition_frequencies") else 1

    def _module(self, kind: str) -> Any:
        package = self.package or self.model_type
        return importlib.import_module(f"transformers.models.{package}.{kind}_{package}")


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("gemma2", "Gemma2"),
        Family("gemma3_text", "Gemma3", package="gemma3", text="Text"),
        Family("granite", "Granite"),
        Family("llama", "Llama", published=True),
        Family("ministral3", "Ministral3", lists_layer_types=False, published=True),
        Family("mistral", "Mistral"),
        Family("olmo2", "Olmo2"),
        Family("olmo3", "Olmo3"),
        Family("phi3", "Phi3"),
        Family("qwen2", "Qwen2", published=True),
        Family("qwen3", "Qwen3", published=True),
        Family("qwen3_5_text", "Qwen3_5", package="qwen3_5", text="Text", own_recurrence="GatedDeltaNet"),
        Family("qwen3_5_moe_text", "Qwen3_5Moe", package="qwen3_5_moe", text="Text", own_recurrence="GatedDeltaNet"),
        Family("qwen3_moe", "Qwen3Moe", published=True),
        Family("qwen3_next", "Qwen3Next", own_recurrence="GatedDeltaNet"),
        Family("smollm3", "SmolLM3"),
    )
}


# Models that a row would not make a base, by what their layers have. Others may fit; docs/families.md shows the check.
CANNOT_FIT = {
    "latent attention, without a projection for each of queries, keys and values": (
        *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "hy_v4"),
        *("kimi_linear", "longcat_flash", "minicpm3", "mistral4", "youtu"),
    ),
    "attention sinks": ("deepseek_v4", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"),
    "rotary positions that pair neighbouring dimensions": (
        *("cohere", "cohere2", "cohere_compass_text", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "helium"),
    ),
    "no rotary positions": (
        *("bart", "bert", "biogpt", "bloom", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "mpt", "openai-gpt", "opt"),
        *("roberta", "whisper", "xglm"),
    ),
    "modules of other names than self_attn, or no final norm of that name": (
        *("codegen", "dbrx", "falcon", "gpt_neox", "gptj", "jetmoe", "persimmon", "phi"),
    ),
    "keys and values that layers share": ("gemma3n_text", "gemma4_text"),
    "chunked attention": ("llama4_text",),
    "recurrences of their own": (
        *("bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "minimax", "nemotron_h"),
        *("olmo_hybrid", "recurrent_gemma", "zamba", "zamba2"),
        *("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"),
    ),
}


def family_of(model_type: str, source: str = "config.json") -> Family:
    """The family of a base or hybrid `model_type`; HmfError for an unsupported one."""
    try:
        return FAMILIES[model_type.removeprefix("hybrid_")]
    except KeyError:
        if why := next((why for why, types in CANNOT_FIT.items() if model_type in types), None):
            raise HmfError(
                f"{source}: model_type {model_type!r} cannot be a base, because its layers have {why}; give a base of "
                f"a supported family ({', '.join(sorted(FAMILIES))})"
            ) from None
        raise HmfError(
            f"{source}: model_type {model_type!r} is not among the supported families ({', '.join(sorted(FAMILIES))}); "
            "docs/families.md has the conditions under which a row of FAMILIES in hmf/model/families.py makes it one"
        ) from None
