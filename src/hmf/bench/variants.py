# SPDX-License-Identifier: Apache-2.0
"""The models that `hmf bench serving` measures: those of the command, and variants with other config values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hmf.config.layers import LAYER_KINDS, needed_kinds
from hmf.errors import HmfError, unknown_name
from hmf.model.checkpoint import load_config
from hmf.model.values import changed
from hmf.planning.memory import layer_caches
from hmf.planning.serving import ServingSettings, as_hybrid
from hmf.serving.vllm.start import PREFILL, PREFILLS

from .throughput import CACHE_OPTIONS, Run, Subject, subject


def subjects(
    named: Sequence[tuple[str, Path]], run: Run, hf_overrides: str | None = None, variants: Sequence[str] = ()
) -> list[Subject]:
    """The models to measure: all of `named`; then for each of `variants` those of `named` whose config has its keys.

    `hf_overrides` and `variants` are JSON. Raises HmfError for an override without an effect on any model.
    """
    configs = {name: as_hybrid(load_config(folder, weights=False)) for name, folder in named}
    shared = {} if hf_overrides is None else parse_overrides("--hf-overrides", hf_overrides)
    for key in shared:
        if not any(takes(config, key) for config in configs.values()):
            raise HmfError(f"--hf-overrides: {key}: no MODEL has this key or layers of this type; omit it")
    plain = {name: {key: x for key, x in shared.items() if takes(config, key)} for name, config in configs.items()}
    _require_valid(configs, plain, "--hf-overrides")
    measured = [(name, folder, plain[name]) for name, folder in named]
    for text in variants:
        extra = parse_overrides("--variant", text)
        taking = [(name, folder) for name, folder in named if all(takes(configs[name], key) for key in extra)]
        if not taking:
            raise HmfError(f"--variant: {text}: no MODEL has these keys or layers of this type; omit it")
        _require_valid(configs, {name: plain[name] | extra for name, _ in taking}, "--variant")
        label = ", ".join(_values(extra))
        measured += [(f"{name}, {label}", folder, plain[name] | extra) for name, folder in taking]
    result: list[Subject] = []
    for name, folder, overrides in measured:
        result.append(subject(name, folder, run, overrides, result[0] if result else None))
    return result


def _require_valid(configs: Mapping[str, Any], overrides: Mapping[str, dict[str, Any]], option: str) -> None:
    """HmfError that names `option` for a value that a model's config, or vLLM's option, does not take."""
    for name, values in overrides.items():
        changed(configs[name], {key: x for key, x in values.items() if key not in (*CACHE_OPTIONS, PREFILL)}, option)
        try:
            ServingSettings(**{key: x for key, x in values.items() if key in CACHE_OPTIONS})
        except HmfError as error:
            raise HmfError(f"{option}: {error}") from None
        if PREFILL in values and values[PREFILL] not in PREFILLS:
            raise HmfError(f"{option}: {PREFILL}: {unknown_name('backend', str(values[PREFILL]), PREFILLS)}")


def _values(overrides: dict[str, Any]) -> Iterator[str]:
    for key, value in overrides.items():
        yield from _values(value) if isinstance(value, dict) else [f"{key}={value}"]


def takes(config: Any, key: str) -> bool:
    """Whether an override of `key` affects a model: it is a key of its config, has options of one of its layers, is the
    dtype of a cache that it has, or chooses the prefill kernels of GDN layers that it has."""
    if key in CACHE_OPTIONS:
        caches = layer_caches(config, torch.float32)
        return any(cache.token_bytes if key == "kv_cache_dtype" else cache.state_bytes for cache in caches)
    for kind in LAYER_KINDS.values():
        if key in (kind.config_key, kind.overrides_key) or (key == PREFILL and kind is LAYER_KINDS["GDN"]):
            return hasattr(config, "pattern") and kind in needed_kinds(config, config.pattern.symbols)
    return hasattr(config, key)


def parse_overrides(option: str, text: str) -> dict[str, Any]:
    """The JSON object of vLLM's --hf-overrides. Raises HmfError with the name `option`."""
    try:
        overrides = json.loads(text)
    except json.JSONDecodeError:
        overrides = None
    if not isinstance(overrides, dict) or not overrides:
        raise HmfError(
            f'{option}: {text} is not a JSON object; write for example {{"gka_overrides": {{"num_iter": 10}}}}'
        )
    return overrides
