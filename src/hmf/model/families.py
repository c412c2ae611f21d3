# SPDX-License-Identifier: Apache-2.0
"""The supported base families, one row each: Hugging Face decoders whose layers call their token mixer `self_attn`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hmf.errors import HmfError

# The base class of mixins for transformers' classes. As Any, it lets type checkers accept their calls of super().
Mixin: Any = object


@dataclass(frozen=True)
class Family:
    """The names of a family in transformers, and of its Hybrid.

    `model_type` is also the name of the package under `transformers.models`. `prefix` begins the names of its classes
    (`Qwen3` -> `Qwen3Config`, `Qwen3Model`, `Qwen3DecoderLayer`, `Qwen3ForCausalLM`).
    """

    model_type: str
    prefix: str
    lists_layer_types: bool = True  # whether the published config.json has the key `layer_types`

    @property
    def hybrid_model_type(self) -> str:
        return f"hybrid_{self.model_type}"

    @property
    def hybrid_prefix(self) -> str:
        return f"Hybrid{self.prefix}"

    def config_class(self) -> type:
        return getattr(self._module("configuration"), f"{self.prefix}Config")

    def class_named(self, suffix: str) -> type:
        """`Qwen3` + suffix from the family's modeling module."""
        return getattr(self._module("modeling"), f"{self.prefix}{suffix}")

    def output_class(self) -> type:
        """The class of the decoder's result; that of a mixture of experts has router logits too."""
        from transformers import modeling_outputs

        is_moe = hasattr(self._module("modeling"), "load_balancing_loss_func")
        return modeling_outputs.MoeModelOutputWithPast if is_moe else modeling_outputs.BaseModelOutputWithPast

    def query_growth(self) -> Callable[..., Any] | None:
        """The function for the position-dependent factor of queries (Ministral 3), or None.

        (position_ids [B, T], beta, original length) -> [B, 1, T, 1]
        """
        return getattr(self._module("modeling"), "get_llama_4_attn_scale", None)

    def _module(self, kind: str) -> Any:
        return importlib.import_module(f"transformers.models.{self.model_type}.{kind}_{self.model_type}")


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("ministral3", "Ministral3", lists_layer_types=False),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3"),
        Family("qwen3_moe", "Qwen3Moe"),
    )
}


def family_of(model_type: str, source: str = "config.json") -> Family:
    """The family of a base or hybrid `model_type`; HmfError for an unsupported one."""
    try:
        return FAMILIES[model_type.removeprefix("hybrid_")]
    except KeyError:
        raise HmfError(
            f"{source}: model_type {model_type!r} is not among the supported families ({', '.join(sorted(FAMILIES))}); "
            "add a row to FAMILIES in hmf/model/families.py as docs/families.md shows"
        ) from None
