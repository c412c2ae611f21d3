# SPDX-License-Identifier: Apache-2.0
"""Sliding-window and B'MOJO-F layers against the attention that they start from, in every family."""

import copy

import pytest
import torch

from hmf.layers.attention import separate
from hmf.layers.registry import MIXERS
from hmf.model.families import FAMILIES, family_of
from tests.hybrids import Case, random_ids, randomise, tiny_config, tiny_hybrid
from tests.numerics import assert_same

TOKENS = 20

pytestmark = pytest.mark.usefixtures("in_float64")

# What the attentions of a family have in addition to their defaults.
FIELDS = {
    "gemma2": {"attn_logit_softcapping": None, "query_pre_attn_scalar": 20},
    "gemma3_text": {"query_pre_attn_scalar": 20},
    "granite": {"attention_multiplier": 0.3},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "smollm3": {"no_rope_layers": [0]},
}

every_family = pytest.mark.parametrize("family", FAMILIES)


def mixer_and_attention(symbol, options, family, growth=None, **fields):
    """A mixer started from a random attention of the base, both float64, and a call that gives both outputs.

    growth: of the attention's queries with their position, in place of what the config says.
    """
    fields = FIELDS.get(family, {}) | fields
    config = tiny_config(Case(symbol, "case", options=options), "X", family, **fields)
    config._attn_implementation = "eager"
    attention = family_of(family).class_named("Attention")(config, 0).double()
    randomise(attention)
    mixer = MIXERS[symbol](config, 0).double()
    mixer.init_from_attention(separate(attention), torch.Generator().manual_seed(1), 0.3)
    with config.as_base():
        rotary = family_of(family).class_named("RotaryEmbedding")(config)
    if growth is not None:  # the attention reads it whenever it is called, a mixer when it is made
        config.rope_parameters["llama_4_scaling_beta"] = growth

    def outputs(visible):
        """mixer's output, and the attention's where query i sees the keys that visible(i - j) allows."""
        x = torch.randn(1, TOKENS, config.hidden_size, dtype=torch.float64)
        positions = torch.arange(TOKENS)[None]
        kind = (config.attention_types[0],) * family_of(family).positions_by_layer_type()
        rows = (
            positions.expand(axes, *positions.shape) if (axes := family_of(family).position_axes()) > 1 else positions
        )
        common = {"position_embeddings": rotary(x, rows, *kind), "position_ids": positions}
        distance = positions.T - positions
        mask = torch.where((distance >= 0) & visible(distance), 0.0, float("-inf")).double()
        return mixer(x, **common)[0], attention(x, attention_mask=mask[None, None], **common)[0]

    return mixer, outputs


@every_family
@pytest.mark.parametrize("window", [1, 5, TOKENS, 3 * TOKENS])
@torch.no_grad()
def test_sliding_window_is_the_bases_attention_under_a_window(family, window):
    _, outputs = mixer_and_attention("SWA", {"window_size": window}, family)
    assert_same(*outputs(lambda distance: distance < window))


GROWING = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "llama_4_scaling_beta": 0.7,
    "original_max_position_embeddings": 4,
}


@torch.no_grad()
def test_sliding_window_scales_queries_by_position_where_the_base_does():
    _, outputs = mixer_and_attention("SWA", {"window_size": 9}, "ministral3", rope_parameters=dict(GROWING))
    assert_same(*outputs(lambda distance: distance < 9))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaled", [True, False, None])
@torch.no_grad()
def test_bmojo_scales_queries_by_position_if_its_config_says_so(tied, scaled):
    """In both windows: the recurrent layer hands on its input, so that together they are one of twice the size.

    Without the key, as in published checkpoints, they do not grow: the attention's must not either.
    """
    options = {"window_size": 4, "ssm_mixer": "gdn", "tie_attn_weights": tied}
    options |= {} if scaled is None else {"scale_queries": scaled}
    growth = None if scaled else 0.0
    rope = {"rope_parameters": dict(GROWING)}
    mixer, outputs = mixer_and_attention("BMF", options, "ministral3", growth, **rope)
    mixer.inner.mix = lambda hidden_states, *rest: (hidden_states, {})
    assert_same(*outputs(lambda distance: distance < 8))


@every_family
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_bmojo_within_its_window_is_the_bases_attention(family, tied):
    options = {"window_size": TOKENS, "ssm_mixer": "gdn", "tie_attn_weights": tied}
    _, outputs = mixer_and_attention("BMF", options, family)
    assert_same(*outputs(lambda distance: distance >= 0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "divisor"), [("llama", 32 // 4), ("qwen3", 12)])
@torch.no_grad()
def test_bmojo_divides_scores_by_the_published_root(family, divisor, tied):
    """Of hidden_size / heads where q and k have no norm, whatever the head_dim; else of the head_dim, as attention."""
    options = {"window_size": TOKENS, "ssm_mixer": "gdn", "tie_attn_weights": tied}
    mixer, outputs = mixer_and_attention("BMF", options, family, head_dim=12)
    mixer.bmojo_attn.q_proj.weight.mul_((divisor / 12) ** 0.5)
    if mixer.bmojo_attn.q_proj.bias is not None:
        mixer.bmojo_attn.q_proj.bias.mul_((divisor / 12) ** 0.5)
    assert_same(*outputs(lambda distance: distance >= 0))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_bmojo_without_memory_of_its_own_is_a_double_window(tied):
    """Where the recurrent layer hands on its input, the two windows together are one of twice the size."""
    options = {"window_size": 4, "ssm_mixer": "gdn", "tie_attn_weights": tied}
    mixer, outputs = mixer_and_attention("BMF", options, "qwen3")
    mixer.inner.mix = lambda hidden_states, *rest: (hidden_states, {})
    assert_same(*outputs(lambda distance: distance < 8))


@torch.no_grad()
def test_bmojo_untied_uses_the_fading_projections_for_the_fading_window_only():
    options = {"window_size": 4, "ssm_mixer": "gdn", "tie_attn_weights": False}
    mixer, _ = mixer_and_attention("BMF", options, "qwen3")
    config = tiny_config(Case("BMF", "case", options=options), "X")
    x = torch.randn(1, TOKENS, config.hidden_size, dtype=torch.float64)
    rotary = family_of("qwen3").class_named("RotaryEmbedding")(config)
    common = {"position_embeddings": rotary(x, torch.arange(TOKENS)[None])}
    before = mixer(x, **common)[0]
    for name in ("q_proj_", "k_proj_", "v_proj_", "q_norm_", "k_norm_"):
        changed = copy.deepcopy(mixer)
        weight = changed.bmojo_attn.get_submodule(name).weight
        weight.copy_(torch.randn_like(weight))
        after = changed(x, **common)[0]
        assert torch.equal(after[:, :4], before[:, :4]), name  # no token is old enough to fade
        # the first fading token alone weighs 1 in a softmax with others: every later output moves
        assert ((after - before)[:, 4:].abs().amax(-1) > 1e-6).all(), name


@pytest.mark.parametrize("symbol", ["SWA", "BMF"])
@torch.no_grad()
def test_states_stop_growing_at_the_window(symbol):
    mixer, _ = mixer_and_attention(symbol, {"window_size": 4}, "qwen3")
    cos = torch.ones(1, 3, 8, dtype=torch.float64)
    states, widths = None, []
    for _ in range(4):
        _, states = mixer.mix(torch.randn(1, 3, 32, dtype=torch.float64), states, None, (cos, 0 * cos))
        widths.append({name: x.shape[1] for name, x in states.items() if name in ("k", "v", "fading_k", "fading_v")})
    assert {name: [width[name] for width in widths] for name in widths[0]} == {
        "SWA": {"k": [3, 3, 3, 3], "v": [3, 3, 3, 3]},
        "BMF": {"k": [3] * 4, "v": [3] * 4, "fading_k": [3, 6, 7, 7], "fading_v": [3, 6, 7, 7]},
    }[symbol]
    assert states["seen"].tolist() == [12]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("symbol", ["SWA", "BMF", "GDN"])
@torch.no_grad()
def test_windows_have_the_bases_dropout_in_training(symbol, dropout):
    """Recurrent layers have no weights of attention, and none."""
    model = tiny_hybrid(Case(symbol, "gqa", base={"attention_dropout": dropout}), "X-X")
    ids = random_ids(1, 12)
    whole = model(ids).logits
    assert torch.equal(model(ids).logits, whole)
    assert torch.equal(model.train()(ids).logits, whole) == (symbol == "GDN" or not dropout)
