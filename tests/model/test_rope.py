# SPDX-License-Identifier: Apache-2.0
"""What becomes of a config's rotary positions, and values that cannot be computed."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmf.config.rope import ROPE_KEYS, RopeSettings
from hmf.errors import HmfError
from hmf.model.checkpoint import load_config
from hmf.model.families import FAMILIES, family_of
from hmf.model.rope import with_rope
from tests.hybrids import Case, tiny_config

THETA = {"rope_theta": 1e6}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = THETA | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MINISTRAL = YARN | {
    "type": "yarn",
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
    "max_position_embeddings": 256,
}
LINEAR = THETA | {"rope_type": "linear", "factor": 2.0}
DYNAMIC = THETA | {"rope_type": "dynamic", "factor": 2.0}
LONG = YARN | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
PLAIN = THETA | {"rope_type": "default"}
TO_YARN = {"rope_type": "yarn", "factor": 8.0}
TO_LLAMA3 = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config_of(family="qwen3", rope=PLAIN, length=256, **fields):
    fields |= {"rope_parameters": dict(rope), "max_position_embeddings": length}
    return tiny_config(Case("GDN", "rope"), "*-X", family, **fields)


def changed(config, **rope):
    return with_rope(config, RopeSettings(**rope))


def scaled(config, length=None, **scaling):
    return changed(config, max_position_embeddings=length, scaling=scaling)


def frequencies(config):
    return family_of(config.model_type).class_named("RotaryEmbedding")(config)


def test_phi3_extends_by_nothing_that_a_recipe_has():
    config = config_of("phi3", PLAIN, 64, original_max_position_embeddings=64)
    for scaling in (TO_YARN, {"rope_type": "linear", "factor": 2.0}):
        with pytest.raises(HmfError, match=r"^rope\.scaling: Phi3 does not support"):
            scaled(config, 512, **scaling)
    longer = changed(config, theta=5e6, max_position_embeddings=512)
    assert longer.rope_parameters == PLAIN | {"rope_theta": 5e6, "partial_rotary_factor": 1.0}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"phi3"}))
@given(factors=st.lists(st.integers(2, 16), min_size=2, max_size=4), length=st.integers(16, 4096))
def test_extensions_are_relative_to_the_length_before_any(family, factors, length):
    """However often a model is extended, the last extension is what it would be alone."""
    start = (
        PLAIN
        if family != "ministral3"
        else PLAIN | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": length}
    )
    local, by_type = PLAIN | {"rope_theta": 5e4}, FAMILIES[family].positions_by_layer_type()
    if by_type:
        start = {"full_attention": dict(start), "sliding_attention": dict(local)}
    base = config = config_of(family, start, length)
    for factor in factors:
        config = scaled(config, factor * length, rope_type="yarn", factor=factor)
    alone = scaled(base, factors[-1] * length, rope_type="yarn", factor=factors[-1])
    assert config.to_dict() == alone.to_dict()
    table = config.rope_parameters["full_attention"] if by_type else config.rope_parameters
    assert table["original_max_position_embeddings"] == length
    assert config.max_position_embeddings == factors[-1] * length
    if by_type:
        assert config.rope_parameters["sliding_attention"] == local


@pytest.mark.parametrize("where", ["table", "old name", "top level"])
@pytest.mark.parametrize("target", [TO_YARN, TO_LLAMA3], ids=lambda target: target["rope_type"])
def test_the_original_length_is_the_configs_own(where, target, tmp_path):
    """Of a base that was published with a scaling and a raised length, however it is written."""
    fields = json.loads(config_of(rope=YARN).to_json_string())
    if where != "table":
        table = fields.pop("rope_parameters")
        fields["rope_theta"] = table.pop("rope_theta")
        fields["rope_scaling"] = table
    if where == "top level":
        fields["original_max_position_embeddings"] = table.pop("original_max_position_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = load_config(tmp_path, weights=False)
    result = scaled(config, 512, **target)
    assert result.rope_parameters == target | THETA | {"original_max_position_embeddings": 64}
    result = scaled(config, 512, **target, original_max_position_embeddings=128)
    assert result.rope_parameters["original_max_position_embeddings"] == 128
    assert type(result)(**result.to_dict()).rope_parameters["original_max_position_embeddings"] == 128


def test_keys_that_the_recipe_does_not_change_stay():
    base = config_of("ministral3", MINISTRAL | {"of_tomorrow": [1, 2]})
    result = scaled(base, 512, **TO_YARN)
    wanted = base.rope_parameters | {"factor": 8.0, "max_position_embeddings": 512}
    assert result.rope_parameters == wanted
    theta = changed(base, theta=5e6)
    assert theta.rope_parameters == base.rope_parameters | {"rope_theta": 5e6}
    assert changed(base).to_dict() == base.to_dict()


@pytest.mark.parametrize(
    "target", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, TO_LLAMA3], ids=str
)
def test_another_scaling_replaces_the_old_ones_keys(target):
    """Queries keep growing from where they grew; a model of it runs."""
    base = config_of("ministral3", MINISTRAL | {"of_tomorrow": 1})
    result = scaled(base, 512, **target)
    kept = ("rope_theta", "llama_4_scaling_beta", "original_max_position_embeddings", "of_tomorrow")
    wanted = {key: base.rope_parameters[key] for key in kept} | target | {"type": target["rope_type"]}
    assert result.rope_parameters == wanted | {"max_position_embeddings": 512}
    attention = family_of("ministral3").class_named("Attention")(result, 0)
    x, positions = torch.randn(1, 9, result.hidden_size), torch.arange(9)[None]
    rotary = frequencies(result)(x, positions)
    assert attention(x, position_embeddings=rotary, attention_mask=None, position_ids=positions)[0].isfinite().all()


def test_the_attention_factor_follows_the_factor_unless_it_is_the_models_own():
    default = YARN | {"attention_factor": 0.1 * math.log(4) + 1}
    result = scaled(config_of(rope=default), 512, **TO_YARN)
    assert frequencies(result).attention_scaling == pytest.approx(0.1 * math.log(8) + 1)
    own = scaled(config_of(rope=YARN | {"attention_factor": 1.0}), 512, **TO_YARN)
    assert frequencies(own).attention_scaling == 1.0
    given = scaled(config_of(rope=default), 512, **TO_YARN, attention_factor=1.5)
    assert frequencies(given).attention_scaling == 1.5


def test_a_scaling_is_taken_away():
    base = config_of(rope=YARN)
    with pytest.raises(HmfError, match=r"rope.max_position_embeddings: .* 256 positions .*\(64 before scaling\)"):
        scaled(base, rope_type="default")
    result = scaled(base, 128, rope_type="default")
    assert (result.rope_parameters, result.max_position_embeddings) == (PLAIN, 128)
    assert scaled(result, 512, **TO_YARN | {"factor": 4.0}).rope_parameters["original_max_position_embeddings"] == 128


@pytest.mark.parametrize(
    ("rope", "settings", "line"),
    [
        (
            YARN,
            {"max_position_embeddings": 512},
            "4 times the 64 positions .* is less than .* 512 positions; .* factor of 8",
        ),
        (
            PLAIN,
            {"max_position_embeddings": 2048, "scaling": {"rope_type": "yarn", "factor": 2}},
            "a factor of 8",
        ),
        (YARN, {"max_position_embeddings": 64, "scaling": TO_YARN}, "64 is not above the 64 positions before scaling"),
        (LINEAR, {"max_position_embeddings": 512, "scaling": TO_YARN}, "rope.scaling.original_max_position_embeddings"),
        (DYNAMIC, {"theta": 5e6}, "rope_type 'dynamic', which a recipe cannot change"),
        (LONG, {"max_position_embeddings": 512}, "rope_type 'longrope', which a recipe cannot change"),
        (PLAIN, {"theta": 1, "max_position_embeddings": 2048, "scaling": TO_YARN}, "rope: rope_parameters: .* cannot"),
        (YARN, {"max_position_embeddings": 512, "scaling": TO_YARN | {"beta_slow": 40}}, "beta_slow: 40.0 is not"),
    ],
)
def test_what_a_recipe_cannot_do(rope, settings, line):
    with pytest.raises(HmfError, match=line) as caught:
        changed(config_of(rope=rope), **settings)
    assert "\n" not in str(caught.value)


def test_scalings_that_no_recipe_makes_are_kept():
    for rope in (DYNAMIC, LONG):
        assert changed(config_of(rope=rope)).rope_parameters == rope


IMPOSSIBLE = [
    ("rope_theta", 0),
    ("rope_theta", -1.0),
    ("rope_theta", math.nan),
    ("rope_theta", math.inf),
    ("rope_theta", None),
    ("rope_theta", "1e6"),
    ("rope_theta", True),
    ("factor", 0.5),
    ("factor", None),
    ("factor", "4"),
    ("factor", math.nan),
    ("beta_fast", 0.5),
    ("beta_slow", 32),
    ("attention_factor", 0.0),
    ("mscale", None),
    ("original_max_position_embeddings", 0),
    ("original_max_position_embeddings", None),
    ("original_max_position_embeddings", 2.5),
    ("rope_type", "su"),
    ("rope_type", None),
    ("type", "llama3"),
    ("truncate", "no"),
    ("full_attention", {"rope_theta": 1e4}),
    ("partial_rotary_factor", 0.5),
]


@pytest.mark.parametrize("model_type", ["qwen3", "hybrid_qwen3"])
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
def test_impossible_values_are_refused_by_file_and_key(model_type, name, key, value, tmp_path):
    fields = json.loads(config_of(rope=YARN).to_json_string()) | {"model_type": model_type}
    fields.pop("layer_types")
    if model_type == "qwen3":
        fields.pop("hybrid_override_pattern")
    table = fields.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(fields | {name: table}))
    load_config(tmp_path, weights=False)
    (tmp_path / "config.json").write_text(json.dumps(fields | {name: table | {key: value}}))
    with pytest.raises(HmfError) as caught:
        load_config(tmp_path, weights=False)
    line = str(caught.value)
    mentioned = {"beta_fast": "beta_slow"}.get(key, key)
    assert line.startswith(f"{tmp_path / 'config.json'}: ") and mentioned in line and "\n" not in line


@pytest.mark.parametrize(
    ("family", "fields", "line"),
    [
        ("qwen3", {"rope_parameters": None, "rope_theta": 0}, "rope_theta: "),
        ("qwen3", {"rope_parameters": None}, "rope_parameters: None is not a table"),
        ("qwen3", {"rope_parameters": {"rope_theta": math.nan}, "rope_theta": 1e4}, "rope_parameters.rope_theta: "),
        ("qwen3", {"per_layer_config": {"0": {"head_dim": 16}}}, "per_layer_config: "),
        ("qwen3", {"rope_parameters": "default"}, "rope_parameters: 'default' is not a table"),
        ("qwen3", {"max_position_embeddings": 0}, "max_position_embeddings: "),
        ("qwen3", {"rope_parameters": THETA | {"rope_type": "yarn"}}, "rope_parameters.factor: is missing"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4}}, "low_freq_factor: 4.0 is not below"),
        ("llama", {"rope_parameters": LONG | {"short_factor": [1.0] * 3}}, "cannot be computed|not finite"),
        ("llama", {"rope_parameters": LONG | {"long_factor": [0.0] * 4}}, "rope_parameters.long_factor.0: "),
        ("ministral3", {"rope_parameters": YARN}, "rope_parameters.llama_4_scaling_beta: is missing"),
        ("ministral3", {"rope_parameters": PLAIN | {"llama_4_scaling_beta": 0.1}}, "original_max_pos.* is missing"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 1}, "sliding_window: 0 masks"),
        ("qwen2", {"is_causal": False}, "is_causal: false"),
        ("qwen3_moe", {"num_local_experts": 4}, "num_experts_per_tok: 8 is more than num_experts, 4"),
        ("qwen3_next", {"num_experts": 4}, "num_experts_per_tok: 10 is more than num_experts, 4"),
        ("qwen2", {"return_dict": False}, "return_dict: false"),
    ],
)
def test_impossible_configs(family, fields, line, tmp_path):
    written = json.loads(config_of(family, MINISTRAL if family == "ministral3" else PLAIN).to_json_string())
    (tmp_path / "config.json").write_text(json.dumps(written | fields))
    with pytest.raises(HmfError, match=line) as caught:
        load_config(tmp_path, weights=False)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in str(caught.value)


@given(kind=st.sampled_from(sorted(ROPE_KEYS)), value=st.floats(max_value=0) | st.sampled_from([math.nan, math.inf]))
def test_impossible_values_in_a_recipe(kind, value):
    for key in ROPE_KEYS[kind][0]:
        values = {name: 2.0 + i for i, name in enumerate(ROPE_KEYS[kind][0])} | {key: value}
        with pytest.raises(ValueError, match=key):
            RopeSettings(scaling={"rope_type": kind} | values)
    with pytest.raises(ValueError, match="theta"):
        RopeSettings(theta=value)
