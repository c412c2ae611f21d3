# SPDX-License-Identifier: Apache-2.0
"""Rotary positions in a config: checking its values, and applying a recipe's `rope` section to it.

transformers only warns of invalid values, or fails when the model is built or first called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator
from transformers import ROPE_INIT_FUNCTIONS

from hmf.config.layers import base_head_dim
from hmf.config.rope import ROPE_KEYS, ROPE_SCALING_KEYS, AtLeastOne, NotNegative, Positive, RopeScaling, RopeSettings
from hmf.errors import HmfError

from .families import Family, family_of

TYPES = ("default", *ROPE_INIT_FUNCTIONS)
ORIGINAL, GROWTH = "original_max_position_embeddings", "llama_4_scaling_beta"
FULL, LOCAL = "full_attention", "rope_local_base_freq"
LAYER_TYPES = (FULL, "sliding_attention")
NEEDED = {kind: keys[0] for kind, keys in ROPE_KEYS.items()}
NEEDED |= {"dynamic": ("factor",), "longrope": ("short_factor", "long_factor")}
FROM_ORIGINAL = ("yarn", "llama3", "longrope")  # types that use the length before any scaling


class _Table(BaseModel):
    """The known keys of `rope_parameters`, and those that a config may have outside it. Unknown keys are allowed."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    rope_type: str = "default"
    rope_theta: Positive = 1.0
    max_position_embeddings: PositiveInt = 2**62
    original_max_position_embeddings: PositiveInt = 1
    factor: AtLeastOne = 1.0
    attention_factor: Positive = 1.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: NotNegative = 0.0
    mscale_all_dim: NotNegative = 0.0
    truncate: bool = True
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    short_factor: list[Positive] = []
    long_factor: list[Positive] = []
    partial_rotary_factor: Positive = 1.0
    llama_4_scaling_beta: NotNegative = 0.0

    @model_validator(mode="after")
    def _fit_together(self) -> _Table:
        if self.rope_type in ("su", "yarn") and self.short_factor:
            raise ValueError(f"rope_type: {self.rope_type!r} is a former name of longrope in Phi-3; write longrope")
        if self.rope_type not in TYPES:
            raise ValueError(f"rope_type: {self.rope_type!r} is not one of {', '.join(TYPES)}")
        if (legacy := (self.model_extra or {}).get("type", self.rope_type)) != self.rope_type:
            raise ValueError(f"type: {legacy!r} and rope_type {self.rope_type!r} disagree; remove one of them")
        if missing := [key for key in NEEDED.get(self.rope_type, ()) if key not in self.model_fields_set]:
            raise ValueError(f"{missing[0]}: is missing, but {self.rope_type} needs it")
        if self.rope_type == "yarn" and self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow: {self.beta_slow} is not below beta_fast, {self.beta_fast}")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor: {self.low_freq_factor} is not below high_freq_factor, {self.high_freq_factor}"
            )
        return self


def check_rope_names(fields: Mapping[str, Any], source: str) -> None:
    """HmfError for rotary positions under their new and their former names, of which transformers reads only one."""
    table, scaling, theta = (fields.get(name) for name in ("rope_parameters", "rope_scaling", "rope_theta"))
    if not isinstance(table, Mapping) or not table:
        return
    if isinstance(scaling, Mapping) and scaling and not table.items() <= {"rope_theta": theta, **scaling}.items():
        raise HmfError(
            f"{source}: rope_scaling: the config has rope_parameters too, and transformers would read nothing of it, "
            "not even rope_theta; write all of them into rope_parameters, and remove rope_scaling"
        )
    inner = table.get("rope_theta")
    if theta is not None and isinstance(inner, int | float) and math.isfinite(inner) and theta != inner:
        raise HmfError(
            f"{source}: rope_theta: {theta!r} is not read, because rope_parameters has {inner!r}; write "
            "the right one there, and remove the other"
        )


def check_rope(fields: Mapping[str, Any], family: Family, source: str) -> None:
    """HmfError for invalid rotary positions in the fields of a config.json, under their new or their former names."""
    check_rope_names(fields, source)
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"  # transformers' order of precedence
    table = fields.get(name)
    written_outside = table is None and "rope_theta" in fields
    if name in fields and not isinstance(table, Mapping) and not written_outside:
        raise HmfError(f"{source}: {name}: {table!r} is not a table; give the base model's rope_type and rope_theta")
    table = dict(table or {})
    if family.positions_by_layer_type():
        _check_by_layer_type(fields, name, table, family, source)
        return
    if nested := next((key for key, value in table.items() if isinstance(value, Mapping)), None):
        raise HmfError(
            f"{source}: {name}.{nested}: {family.prefix} has the same positions in every layer; give one table for "
            "all layers"
        )
    if table and family.query_growth() is not None:
        needed = (GROWTH,) if table.get("rope_type", table.get("type")) in FROM_ORIGINAL else (GROWTH, ORIGINAL)
        if missing := [key for key in needed if key not in table]:
            raise HmfError(
                f"{source}: {name}.{missing[0]}: is missing, but {family.prefix} scales its queries by it; "
                f"give the base model's value ({GROWTH}: 0 turns the scaling off)"
            )
    _check_table(table, fields, name, source)


def _check_by_layer_type(
    fields: Mapping[str, Any], name: str, table: Mapping[str, Any], family: Family, source: str
) -> None:
    """`check_rope` for families whose layers with and without a window have tables of their own.

    Former configs have rope_theta and rope_scaling, which only layers without a window use, and for Gemma 3
    rope_local_base_freq. New ones have a table for each type in rope_parameters.
    """
    if name == "rope_scaling" or not table:
        if "rope_type" not in table and table.get("type", "default") != "default":
            raise HmfError(
                f"{source}: {name}.type: {table['type']!r} is not read by transformers in {family.prefix}; rename the "
                "key to rope_type"
            )
        local = {"rope_theta": fields[LOCAL]} if fields.get(LOCAL) is not None else {}
        tables = {name: table, LOCAL: local}
    elif unknown := sorted(key for key in table if key not in LAYER_TYPES):
        raise HmfError(
            f"{source}: {name}.{unknown[0]}: {family.prefix} has positions for each type of layer; give a table for "
            f"each of {', '.join(LAYER_TYPES)}"
        )
    else:
        tables = {f"{name}.{kind}": positions for kind, positions in table.items()}
    shared = {key: value for key, value in fields.items() if key not in ("rope_parameters", "rope_scaling")}
    for place, positions in tables.items():
        if not isinstance(positions, Mapping):
            raise HmfError(f"{source}: {place}: {positions!r} is not a table; give rope_type and rope_theta")
        _check_table(positions, shared, place, source)


def _check_table(table: Mapping[str, Any], fields: Mapping[str, Any], name: str, source: str) -> None:
    """HmfError for invalid values of one table, which is `name` in the file, or of the keys beside it in `fields`."""
    outside = {key: fields[key] for key in ("rope_theta", "max_position_embeddings", ORIGINAL) if key in fields}
    known = {"rope_type": table["type"]} if "type" in table else {}
    for above in ({}, outside):
        try:
            _Table(**{str(key): value for key, value in (known | dict(table) | above).items()})
        except ValidationError as error:
            problem = error.errors()[0]
            key, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
            if key:
                message = f"{key}: {message} (got {problem['input']!r})"
            raise HmfError(f"{source}: {message if key in above else f'{name}.{message}'}") from None


def require_rope(config: Any, source: str) -> None:
    """HmfError if transformers cannot compute a rotary table from a config whose values passed `check_rope`."""
    family = family_of(config.model_type)
    if family.positions_by_layer_type():
        types = getattr(config, "attention_types", config.layer_types)
        for kind in sorted(set(types)):
            _require_table(config, family, source, kind)
    else:
        _require_table(config, family, source)


def _require_table(config: Any, family: Family, source: str, kind: str | None = None) -> None:
    """`require_rope` for the layers of type `kind`; None: all."""
    rotary_class: Any = family.class_named("RotaryEmbedding")
    rope, of = (config.rope_parameters, {}) if kind is None else (config.rope_parameters[kind], {"layer_type": kind})
    try:
        with torch.device("cpu"):
            compute = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], rotary_class.compute_default_rope_parameters)
            frequencies, factor = compute(config, **of)
            whole = rotary_class.compute_default_rope_parameters(config, **of)[0]
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise HmfError(f"{source}: rope_parameters: {rope} cannot be computed ({reason})") from None
    if 2 * len(whole) > (size := base_head_dim(config)):
        raise HmfError(f"{source}: head_dim: {size}: rotary positions need an even number; correct it")
    if frequencies.shape != whole.shape:
        part = rope.get("partial_rotary_factor")
        raise HmfError(
            f"{source}: partial_rotary_factor: {part} with rope_type {rope['rope_type']} is not supported, because "
            "the family's attention rotates whole heads; remove it"
        )
    if not (frequencies.isfinite().all() and math.isfinite(factor)):
        raise HmfError(f"{source}: rope_parameters: {rope} gives frequencies that are not finite; correct them")


def check_length(config: Any, past: int, position_ids: torch.Tensor) -> None:
    """HmfError if new tokens pass the length at which longrope changes all positions, with others in the cache.

    past: tokens in the cache; position_ids [B or 1, T] of the new tokens. Phi-3's generate starts a new cache at that
    length, so that it comes here only with a prefill in chunks, or if every row is padded.
    """
    table = _without_window(config)
    if table.get("rope_type") != "longrope":
        return
    original = table[ORIGINAL]
    first, last = position_ids[:, 0].max(), position_ids.max()
    if bool((first <= original) & (original <= last)):  # one wait for the device, in every step of decoding
        raise HmfError(
            f"past_key_values: the cache holds {past} tokens with longrope's positions for at most {original} tokens, "
            "and the text is longer now; compute all of it anew, without a cache or in a single chunk"
        )


def with_rope(config: Any, rope: RopeSettings) -> Any:
    """A copy of a config with other rotary positions. The model must be built from the copy.

    Where layers with a window have positions of their own, these stay as they are.

    Keys that `rope` does not set are kept, also those that transformers does not know. A scaling is always relative to
    the length before any scaling. A scaling of another type replaces the keys of the old one.

    Raises:
        HmfError: for invalid values, or if the length before any scaling is not known.
    """
    fields, family = config.to_dict(), family_of(config.model_type)
    fields.pop("transformers_version", None)
    table = dict(_without_window(config))
    kind = table["rope_type"]
    if rope == RopeSettings():
        return type(config)(**fields)
    if kind not in ROPE_KEYS:
        raise HmfError(f"rope: the model has rope_type {kind!r}, which a recipe cannot change; leave rope out")
    fields["max_position_embeddings"] = length = rope.max_position_embeddings or config.max_position_embeddings
    if rope.scaling is not None:
        table = _rescaled(config, family, rope.scaling, rope.max_position_embeddings)
        if ORIGINAL in fields:  # a copy outside the table, which takes precedence in transformers
            if ORIGINAL in table:
                fields[ORIGINAL] = table[ORIGINAL]
            else:
                del fields[ORIGINAL]
    if "max_position_embeddings" in table:  # Ministral 3 repeats it in the table
        table["max_position_embeddings"] = length
    if rope.theta is not None:
        table["rope_theta"] = rope.theta
    by_type = family.positions_by_layer_type()
    fields["rope_parameters"] = {**config.rope_parameters, FULL: table} if by_type else table
    check_rope(fields, family, "rope")
    if table["rope_type"] == "yarn" and (rope.scaling or rope.max_position_embeddings):
        factor, original = table["factor"], table[ORIGINAL]
        if factor * original + 1 <= length:
            raise HmfError(
                f"rope.scaling.factor: {factor:g} times the {original} positions before scaling is less than the "
                f"model's {length} positions; give yarn a factor of {length / original:g}"
            )
    try:
        changed = type(config)(**fields)
        changed.validate()
    except (HmfError, KeyError, StrictDataclassError) as error:  # Phi-3 has longrope only
        why = " ".join(str(error).split())
        raise HmfError(f"rope.scaling: {family.prefix} does not support {table['rope_type']} ({why})") from None
    require_rope(changed, "rope")
    return changed


def _without_window(config: Any) -> dict[str, Any]:
    """The rotary positions of layers without a window, which a longer context changes."""
    rope = config.rope_parameters
    return rope[FULL] if family_of(config.model_type).positions_by_layer_type() else rope


def _rescaled(config: Any, family: Family, scaling: RopeScaling, length: int | None) -> dict[str, Any]:
    """The table of a config with another scaling; length: max_position_embeddings of the recipe, or None."""
    old, new = dict(_without_window(config)), scaling.model_dump(exclude_none=True)
    kind, before = old["rope_type"], config.max_position_embeddings
    original = old.get(ORIGINAL, getattr(config, ORIGINAL, before if kind == "default" else None))
    if scaling.rope_type in FROM_ORIGINAL:
        if new.setdefault(ORIGINAL, original) is None:
            raise HmfError(
                f"rope.scaling.{ORIGINAL}: the model's positions are scaled already ({kind}), and its config does not "
                "have the length before scaling; give it"
            )
        if new[ORIGINAL] >= (reached := length or before):
            raise HmfError(
                f"rope.max_position_embeddings: {reached} is not above the {new[ORIGINAL]} positions before scaling; "
                "give the length of the longer context"
            )
    elif scaling.rope_type == "default" and kind != "default" and original not in (None, before) and length is None:
        raise HmfError(
            f"rope.max_position_embeddings: without its scaling the model no longer has {before} positions "
            f"({original} before scaling); give the new number of positions"
        )
    needed, optional = ROPE_KEYS[scaling.rope_type]
    stays = {*needed, *optional}
    if family.query_growth() is not None:
        stays.add(ORIGINAL)  # the query scaling needs it with any rope_type
    replaced = ROPE_SCALING_KEYS - stays
    # An attention factor that equals YaRN's default for the old factor is not kept: it depends on the factor.
    old_value, yarn_default = old.get("attention_factor", 0.0), 0.1 * math.log(old.get("factor", 1.0)) + 1
    if math.isclose(old_value, yarn_default, rel_tol=1e-3):
        replaced |= {"attention_factor"}
    if "type" in old:  # the former name of rope_type
        new["type"] = scaling.rope_type
    return {key: value for key, value in old.items() if key not in replaced} | new
