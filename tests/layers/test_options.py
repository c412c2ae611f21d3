# SPDX-License-Identifier: Apache-2.0
"""Every option of every layer type changes what a layer is or computes, or its class lists it as format only."""

from types import NoneType
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from hmf.config.layers import LAYER_KINDS
from hmf.errors import HmfError
from hmf.model.modeling import hybrid_classes
from tests.hybrids import SMALL, Case, random_ids, randomise, tiny_config
from tests.layers.test_windows import GROWING

CHOSEN = [
    (symbol, name)
    for symbol, kind in LAYER_KINDS.items()
    for name in sorted(kind.options.model_fields.keys() - kind.options.derived)
]
# What an option needs beside it, as these change other options' work.
BESIDE: dict[str, dict[str, Any]] = {"kv_learnable_residual": {"kv_proj_rank": 6}}
# The bases of options that are for some bases only.
BASES = {
    "own_shape": {"family": "qwen3_5_text", "linear_value_head_dim": 8},
    "scale_queries": {"family": "ministral3", "rope_parameters": GROWING},
}


def config_of(symbol: str, options: dict[str, Any], name: str) -> Any:
    return tiny_config(Case(symbol, name, options=BESIDE.get(name, {}) | options), "X-*", **BASES.get(name, {}))


def results(symbol: str, options: dict[str, Any], name: str) -> dict[str, torch.Tensor]:
    """Tensors, outputs and gradients of a tiny model with these options, by name."""
    config = config_of(symbol, options, name)
    model = hybrid_classes(config.family).causal_lm(config).double()
    randomise(model)
    found = dict(model.state_dict())
    found["logits"] = model(random_ids(2, 24)).logits
    found["logits"].square().mean().backward()
    return found | {f"gradient of {key}": x.grad for key, x in model.named_parameters() if x.grad is not None}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        x.shape == second[name].shape and torch.equal(x, second[name]) for name, x in first.items()
    )


def other_values(symbol: str, name: str) -> list[Any]:
    """Values that the option takes, and that are not the one of the other tests' models."""
    field = LAYER_KINDS[symbol].options.model_fields[name]
    usual = SMALL.get(symbol, {}).get(name, field.default)
    tried = [not usual] if isinstance(usual, bool) else [0.5, 5, 6, *get_args(field.annotation)]
    found = []
    for value in tried:
        try:
            TypeAdapter(field.annotation).validate_python(value, strict=True)
        except ValidationError:
            continue
        if value != usual:
            found.append(value)
    return found


@pytest.mark.parametrize(("symbol", "name"), CHOSEN)
def test_an_option_has_an_effect_or_is_for_the_format_only(symbol, name):
    options = LAYER_KINDS[symbol].options
    values = other_values(symbol, name)
    if not values:  # one value: any other is refused
        with pytest.raises(HmfError, match=name):
            config_of(symbol, {name: "another"}, name)
        return
    before, after = results(symbol, {}, name), results(symbol, {name: values[0]}, name)
    assert same(before, results(symbol, {}, name))  # so that a difference is the option's
    assert same(before, after) == (name in options.format_only)


@pytest.mark.parametrize(("symbol", "name"), [(s, n) for s, n in CHOSEN if n in LAYER_KINDS[s].options.format_only])
def test_what_is_for_the_format_only_is_kept(symbol, name, tmp_path):
    config = config_of(symbol, {name: 128}, name)
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert getattr(again, LAYER_KINDS[symbol].config_key)[name] == 128


def default(symbol: str, name: str) -> Any:
    return LAYER_KINDS[symbol].options.model_fields[name].default


@pytest.mark.parametrize(
    ("symbol", "name"), [(s, n) for s, n in CHOSEN if type(default(s, n)) in (int, float, NoneType)]
)
def test_a_number_out_of_all_proportion_is_named(symbol, name):
    with pytest.raises(HmfError, match=rf"{name}: Input should be less than or equal to .* \(got 10{{12}}\)"):
        config_of(symbol, {name: 10**12}, name)
