# SPDX-License-Identifier: Apache-2.0
"""Config classes of the Hybrids: a family's own config plus the pattern and a dict of options for each layer type."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hmf.config.layers import LAYER_KINDS, base_head_dim, layer_options, needed_kinds, own_shape_problem
from hmf.config.pattern import ATTENTION, FROM_RECURRENT, Pattern
from hmf.errors import HmfError, naming_config, unknown_name
from hmf.layers.own import RECURRENT, check_own_layers, own_layers
from hmf.layers.registry import MIXERS

from .families import FAMILIES, Family, Mixin
from .rope import check_rope, check_rope_names

STATE_DTYPES = ("float32", "bfloat16", "float16")

# Optional dicts of a Hybrid's config.json.
OVERRIDES = tuple(kind.overrides_key for kind in LAYER_KINDS.values())
OPTION_KEYS = (*(kind.config_key for kind in LAYER_KINDS.values()), *OVERRIDES)


@contextmanager
def building(source: str | Path | None) -> Iterator[None]:
    """Turn an error of transformers in the block into an HmfError that names the config.json of `source`, if known."""
    with naming_config(source):
        try:
            yield
        except (HmfError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # any kind, because transformers uses values before it checks them
            reason = " ".join(str(error).split()) or type(error).__name__
            raise HmfError(f"config.json: no model can be built from it ({type(error).__name__}: {reason})") from error


class HybridConfigMixin(Mixin):
    """The first base class of a Hybrid's config; the second is the family's config class.

    In memory `layer_types` has transformers' names ("full_attention", "linear_attention" for every mixer), which caches
    and serving engines read. On disk it has the pattern's symbols, as published.
    """

    family: Family
    hybrid_override_pattern: Any
    layer_types: Any
    base_layer_types: Any  # of a base with recurrent layers of its own, because layer_types is written as symbols
    attention_types: list[str]  # the type of each layer's attention in the base model, also for replaced layers

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        source = pretrained_model_name_or_path
        return super().from_pretrained(source, **{"name_or_path": str(source)} | kwargs)  # as AutoConfig does

    def __post_init__(self, **kwargs: Any) -> None:
        with naming_config(kwargs.get("name_or_path")):
            self._complete(**kwargs)

    def _complete(self, **kwargs: Any) -> None:
        listed = self.layer_types
        # The list may come from a file and have the pattern's symbols, or from memory and have transformers' names.
        has_symbols = any(
            symbol[:1] == ATTENTION or symbol.removeprefix(FROM_RECURRENT).rstrip("*") in LAYER_KINDS
            for symbol in listed or ()
        )
        if self.base_layer_types is not None:
            self._check_base_layer_types()
        self.layer_types = self.base_layer_types
        if kwargs.get("per_layer_config") is not None:
            raise HmfError("config.json: per_layer_config: layers of different shapes are not supported; remove it")
        check_rope_names({"rope_parameters": self.rope_parameters} | kwargs, "config.json")
        super().__post_init__(**kwargs)
        check_rope(vars(self), self.family, "config.json")
        self._check_causal()
        if self.return_dict is False:
            raise HmfError("config.json: return_dict: false: transformers runs no such model; remove the key")
        self.head_dim = base_head_dim(self)  # published for every family, also where the base leaves it out
        count = self.num_hidden_layers
        if self.hybrid_override_pattern is None:
            self.hybrid_override_pattern = "-".join(listed if has_symbols else [ATTENTION] * count)
        pattern = self.pattern
        if has_symbols and list(listed) != pattern.as_list():
            raise HmfError(
                f"config.json: layer_types {listed} and hybrid_override_pattern {str(pattern)!r} disagree; "
                "delete layer_types, which follows from the pattern"
            )
        if self.state_dtype not in STATE_DTYPES:
            raise HmfError(f"config.json: state_dtype {self.state_dtype!r} is not one of {', '.join(STATE_DTYPES)}")
        if self.layer_types is None:
            self.layer_types = [self._type_of_all()] * count
        self.attention_types = self.layer_types
        self.check_windows()
        if own := own_layers(self):
            check_own_layers(self)
            self.base_layer_types = list(self.attention_types)
        self._check_from_recurrent(pattern, own)
        self.layer_types = self.mixed_types()
        if listed and not has_symbols and list(listed) not in (self.layer_types, self.attention_types):
            raise HmfError(
                f"config.json: layer_types {list(listed)} differs from {self.layer_types}, which follows from the "
                "pattern and the other keys; delete layer_types"
            )
        needed = needed_kinds(self, pattern.symbols)
        for key in (name for name in vars(self) if name.endswith("_overrides")):
            if key not in OVERRIDES:
                raise HmfError(f"config.json: {unknown_name('key', key, OVERRIDES)}")
            if getattr(self, key) and key not in (kind.overrides_key for kind in needed):
                raise HmfError(f"config.json: {key}: no layer of the pattern {pattern} has this type; remove the key")
        for kind in needed:
            setattr(self, kind.config_key, layer_options(self, kind.symbol).model_dump())
        for index in sorted(pattern.from_recurrent):
            if not getattr(self, LAYER_KINDS[pattern.symbols[index]].config_key).get("own_shape"):
                symbol, why = pattern.symbols[index], own_shape_problem(self) or "own_shape of its options is false"
                raise HmfError(
                    f"config.json: hybrid_override_pattern: layer {index}: {FROM_RECURRENT}{symbol}: {symbol} cannot "
                    f"have the heads of the base's recurrent layers: {why}; write * there"
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Keywords replace fields before others follow from them; transformers sets them on the finished config."""
        known = {field.name for field in dataclasses.fields(cls)} - {"dtype"}  # transformers knows "auto" for this one
        known |= {"rope_scaling", "rope_theta"}  # former names, refused beside rope_parameters
        given = {name: kwargs.pop(name) for name in known & kwargs.keys()}
        if "hybrid_override_pattern" in given:
            config_dict = {name: value for name, value in config_dict.items() if name != "layer_types"}
        return super().from_dict(config_dict | given, **kwargs)

    def _type_of_all(self) -> str:
        """The type of all layers in families that do not list types: Llama, Ministral 3, Qwen3-MoE and others."""
        # Llama's attention has no windows, even if its config.json has a sliding_window.
        window = self.sliding_window if hasattr(self.family.config_class(), "sliding_window") else None
        return "full_attention" if window is None else "sliding_attention"

    def mixed_types(self) -> list[str]:
        """`layer_types` by the pattern."""
        types = zip(self.attention_types, self.pattern.symbols, strict=True)
        return [kind if symbol == ATTENTION else RECURRENT for kind, symbol in types]

    def _check_causal(self) -> None:
        if not getattr(self, "is_causal", True):
            raise HmfError("config.json: is_causal: false: mixers are causal; give a causal base model")
        if getattr(self, "use_bidirectional_attention", False):
            raise HmfError("config.json: use_bidirectional_attention: mixers are causal; give a causal base model")

    def check_finished(self) -> None:
        """HmfError for a field that was set on a finished config, where other fields follow from its former value."""
        self._check_causal()
        self.check_windows()
        if self.layer_types != self.mixed_types():
            raise HmfError(
                f"config.json: hybrid_override_pattern {self.hybrid_override_pattern} and layer_types "
                f"{self.layer_types} differ, as one was set on a finished config; give the pattern to from_pretrained, "
                "or make the config anew: type(config).from_dict(config.to_dict())"
            )

    def check_windows(self) -> None:
        """HmfError for a `sliding_window` that the layers cannot have, or that was set after their types were."""
        window = getattr(self, "sliding_window", None)
        lists_types = any(field.name == "layer_types" for field in dataclasses.fields(self.family.config_class()))
        if not lists_types and {self._type_of_all()} != set(self.attention_types):
            raise HmfError(
                f"config.json: sliding_window: {window}: was set on a finished config; give it to from_pretrained"
            )
        if "sliding_attention" in self.attention_types and (window is None or window < 2):
            why = "masks every token"
            if window is None:
                why = "is needed by sliding_attention layers"
            elif window == 1:
                why = "is not supported by the caches of transformers, which keep every token then"
            raise HmfError(f"config.json: sliding_window: {window} {why}; give 2 or more")

    def _check_from_recurrent(self, pattern: Pattern, own: list[int]) -> None:
        """HmfError unless the pattern of a fused model names the teacher of each layer, and that of a Hybrid none."""

        def refuse(index: int, why: str) -> None:
            written = pattern.as_list()[index].removesuffix("*")
            raise HmfError(f"config.json: hybrid_override_pattern: layer {index}: {written}: {why}")

        for index in pattern.replaced:
            symbol, named = pattern.symbols[index], index in pattern.from_recurrent
            if named and index not in own:
                refuse(index, f"this layer of the base has attention; write {symbol}")
            if named and not pattern.fused:
                refuse(index, f"a Hybrid without its teacher does not keep what the layer was; write {symbol}")
            if pattern.fused and index in own and not named:
                refuse(
                    index,
                    f"this layer of the base is recurrent by itself; write * to keep it, or {FROM_RECURRENT}{symbol} "
                    f"to replace it. Layers {self.attention_layers} are attention",
                )
            if named and not MIXERS[symbol].starts_from_recurrence:
                able = ", ".join(name for name, mixer in MIXERS.items() if mixer.starts_from_recurrence)
                refuse(index, f"only {able} can start from a recurrent layer of the base; write * there")

    def _check_base_layer_types(self) -> None:
        given, count = self.base_layer_types, self.num_hidden_layers
        if not self.family.own_recurrence:
            raise HmfError(
                f"config.json: base_layer_types: all layers of {self.family.prefix} are attention; remove the key"
            )
        kinds = (RECURRENT, "full_attention")
        if not isinstance(given, list) or len(given) != count or not all(kind in kinds for kind in given):
            raise HmfError(
                f"config.json: base_layer_types: {given}: must be a list of {' or '.join(kinds)} for each of the "
                f"{count} layers of the base"
            )

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """During the block `layer_types` is the base model's list, from which its attentions read their window."""
        mixed, self.layer_types = self.layer_types, getattr(self, "attention_types", self.layer_types)
        try:
            yield
        finally:
            self.layer_types = mixed

    # transformers reads rotary positions by layer type (Gemma 3, OLMo 3) for the types in `layer_types`.

    def standardize_rope_params(self) -> None:
        with self.as_base():
            super().standardize_rope_params()

    def validate(self) -> None:
        with self.as_base():
            super().validate()

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers that are attention in the base model, also of replaced ones."""
        return [index for index, kind in enumerate(self.attention_types) if kind != RECURRENT]

    @property
    def recurrent_layers(self) -> list[int]:
        """Indices of the layers that keep states: the replaced ones, and those that the base has of its own."""
        return sorted({*self.pattern.replaced, *own_layers(self)})

    @property
    def attention_windows(self) -> list[int | None]:
        """The window of each layer's attention in the base model, in positions; None is full attention."""
        return [self.sliding_window if kind == "sliding_attention" else None for kind in self.attention_types]

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(
            self.hybrid_override_pattern, self.num_hidden_layers, source="config.json: hybrid_override_pattern"
        )

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        del output["attention_types"]
        if self.family.lists_layer_types:
            output["layer_types"] = self.pattern.as_list()
        else:
            output.pop("layer_types", None)
        for key in (*OPTION_KEYS, "base_layer_types"):
            if output.get(key, ...) is None:
                del output[key]
        return output


@functools.cache
def hybrid_config_class(family: Family) -> type:
    """`Hybrid<Family>Config`."""
    annotations: dict[str, Any] = {"hybrid_override_pattern": str | None, "state_dtype": str}
    annotations |= dict.fromkeys(OPTION_KEYS, dict | None)
    annotations |= {"layer_types": list[str] | None, "base_layer_types": list[str] | None}
    namespace: dict[str, Any] = {
        "__annotations__": annotations,
        "__module__": __name__,
        "__doc__": f"A {family.prefix} config with a layer pattern; see `HybridConfigMixin`.",
        "model_type": family.hybrid_model_type,
        "family": family,
        "hybrid_override_pattern": None,
        "state_dtype": "float32",
        "layer_types": None,
        "base_layer_types": None,
        **dict.fromkeys(OPTION_KEYS),
    }
    return type(f"{family.hybrid_prefix}Config", (HybridConfigMixin, family.config_class()), namespace)


def __getattr__(name: str) -> type:
    """`Hybrid<Family>Config` as an attribute of this module, for imports and pickle."""
    for family in FAMILIES.values():
        if name == f"{family.hybrid_prefix}Config":
            return hybrid_config_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
