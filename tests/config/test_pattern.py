# SPDX-License-Identifier: Apache-2.0
"""Patterns: parsed, printed, generated; what is wrong is said in one line."""

import inspect
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmf.cli.shared import PATTERN
from hmf.config.layers import LAYER_KINDS
from hmf.config.pattern import ATTENTION, Pattern, mixer_symbol, parse_layer_list
from hmf.config.runs import HybridSettings
from hmf.errors import HmfError

SYMBOLS = [ATTENTION, *LAYER_KINDS]
plain = st.lists(st.sampled_from(SYMBOLS), min_size=1, max_size=80).map(tuple)
patterns = st.builds(Pattern, plain, st.booleans()).flatmap(
    lambda pattern: st.sets(st.sampled_from(range(len(pattern)))).map(
        lambda chosen: replace(pattern, from_recurrent=frozenset(chosen) & frozenset(pattern.replaced))
    )
)


@given(patterns)
def test_printed_pattern_parses_back(pattern):
    assert Pattern.parse(str(pattern), len(pattern)) == pattern
    assert "-".join(pattern.as_list()) == str(pattern)


@given(patterns)
def test_fused_pattern_replaces_the_same_layers(pattern):
    fused, plain = pattern.with_fused(True), pattern.with_fused(False)
    assert fused.replaced == plain.replaced == tuple(i for i, symbol in enumerate(pattern.symbols) if symbol != "*")
    assert str(plain) == str(fused).replace("*DA", "@").replace("*", "").replace("@", "*").replace("GDN>", "")


def test_published_spellings():
    assert Pattern.parse("*-GDN-*-M2").symbols == ("*", "GDN", "*", "M2")
    assert Pattern.parse("GDN>GKA-*") == Pattern(("GKA", "*"), from_recurrent=frozenset({0}))
    assert Pattern.parse("*DA-GDN*-*DA-GKA*") == Pattern(("*", "GDN", "*", "GKA"), fused=True)
    assert str(Pattern(("*", "BMF", "SWA"), fused=True)) == "*DA-BMF*-SWA*"


@given(num_layers=st.integers(1, 100), ratio=st.floats(0, 1, exclude_min=True))
def test_ratio_gives_its_share_spread_evenly(num_layers, ratio):
    if round(ratio * num_layers) == 0:
        with pytest.raises(HmfError, match="replaces no layer"):
            Pattern.generate(num_layers, "gdn", ratio=ratio)
        return
    pattern = Pattern.generate(num_layers, "gdn", ratio=ratio)
    assert len(pattern) == num_layers
    assert len(pattern.replaced) == round(ratio * num_layers)
    assert set(pattern.symbols) <= {"*", "GDN"}
    gaps = [b - a for a, b in zip((-1, *pattern.replaced), pattern.replaced, strict=False)]
    assert max(gaps) - min(gaps) <= 1
    assert pattern.replaced[-1] == num_layers - 1


@pytest.mark.parametrize("num_layers", [1, 4, 28, 36, 48, 64, 80])
def test_ratio_that_the_error_names_gives_one_layer(num_layers):
    with pytest.raises(HmfError) as error:
        Pattern.generate(num_layers, "gdn", ratio=0.5 / num_layers)
    named = float(str(error.value).split("; ")[1].split()[0])
    assert len(Pattern.generate(num_layers, "gdn", ratio=named).replaced) == 1


def test_generated_by_list():
    assert str(Pattern.generate(4, "mamba2", layers=[3, 0, 3])) == "M2-*-*-M2"
    assert str(Pattern.generate(6, "GDN", layers=parse_layer_list(" 1, 3-4"))) == "*-GDN-*-GDN-GDN-*"


@pytest.mark.parametrize("kind", LAYER_KINDS.values(), ids=lambda kind: kind.symbol)
def test_mixer_goes_by_name_and_symbol(kind):
    assert {mixer_symbol(name) for name in (kind.name, kind.symbol, kind.name.upper(), kind.symbol.lower())} == {
        kind.symbol
    }


def test_every_layer_type_is_named_where_it_is_chosen():
    """In the help of `--pattern`, and in the comment of the recipe's key, which docs/recipe-keys.md prints."""
    (line,) = [line for line in inspect.getsource(HybridSettings).splitlines() if line.strip().startswith("mixer:")]
    for kind in LAYER_KINDS.values():
        assert re.search(rf"\b{kind.symbol}\b", PATTERN) and re.search(rf"\b{kind.name}\b", line.partition("#")[2])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("*-GDM", "layer 1: unknown layer symbol 'GDM'; did you mean 'GDN'"),
        ("gdn-*", "layer 0: unknown layer symbol 'gdn'; did you mean 'GDN'"),
        ("", "layer 0: unknown layer symbol ''"),
        ("*--*", "layer 1: unknown layer symbol ''"),
        ("*-**", "layer 1: unknown layer symbol|mixes fused"),
        ("*-GDN*", "mixes fused"),
        ("*DA-GDN", "mixes fused"),
        ("*-GKA>GDN", "layer 1: 'GKA>GDN': write for example GDN>GKA for GKA in place of a recurrent layer"),
        ("GDN>*-GDN", "layer 0: 'GDN>.': write for example GDN>GKA"),
        ("*-GDN>GDN>GKA", "layer 1: 'GDN>GDN>GKA': write for example GDN>GKA"),
        ("*-GDN>GKB", "layer 1: unknown layer symbol 'GKB'"),
        ("*-GDN>GKA*", "mixes fused"),
        ("*-GDN-*", "has 3 layers, but the model has 2"),
        (["*", "GDN"], "is not a string"),
    ],
)
def test_bad_pattern_is_one_line_with_its_source(text, said):
    with pytest.raises(HmfError, match=said) as error:
        Pattern.parse(text, 2, source="recipe.yaml: pattern")
    assert str(error.value).startswith("recipe.yaml: pattern: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), float("inf"), None])
def test_bad_ratio(ratio):
    with pytest.raises(HmfError, match=r"ratio: .* is not in \(0, 1\]"):
        Pattern.generate(4, "gdn", ratio=ratio)


def test_a_base_without_attention_has_no_share_of_it():
    with pytest.raises(HmfError, match="ratio: none of the base's 4 layers is attention; give another base"):
        Pattern.generate(4, "gdn", ratio=0.5, attention=[])


@pytest.mark.parametrize(
    ("layers", "said"), [([], "empty"), ([1, 4], r"\[4\] are not layers"), ([-1], r"\[-1\] are not layers")]
)
def test_bad_layers(layers, said):
    with pytest.raises(HmfError, match=f"layers: .*{said}"):
        Pattern.generate(4, "gdn", layers=layers)


@pytest.mark.parametrize("text", ["", "1,", "a", "1.5", "-1", "5-", "7-5", "1,7-5", "²", "1-2-3"])
def test_bad_layer_list(text):
    with pytest.raises(HmfError, match="layers: .* write for example"):
        parse_layer_list(text)


def test_unknown_mixer_names_the_nearest():
    with pytest.raises(HmfError, match="unknown mixer 'mamba'; did you mean 'mamba2'"):
        mixer_symbol("mamba")
