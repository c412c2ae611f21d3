# SPDX-License-Identifier: Apache-2.0
"""Kimi Delta Attention as a layer: GDN's where the decays of a head's channels are equal, and its own start."""

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from hmf.layers.gdn import GatedDeltaNet
from hmf.layers.kda import KimiDeltaAttention
from tests.hybrids import Case, randomise, tiny_config
from tests.numerics import assert_same


def config(symbol: str, **options):
    return tiny_config(Case(symbol, "equal", options=options), "X")


@pytest.mark.parametrize(
    "options", [{}, {"allow_neg_eigval": True, "kv_proj_rank": 6}, {"use_short_conv": False}], ids=str
)
def test_equal_decays_are_gdn(options):
    """A KDA whose decay projection repeats GDN's one value for each channel: outputs, states and common gradients."""
    options |= {"use_gate": False}  # their gates differ: a sigmoid, and SiLU
    gdn, kda = GatedDeltaNet(config("GDN", **options), 0), KimiDeltaAttention(config("KDA", **options), 0)
    gdn, kda = gdn.double(), kda.double()
    randomise(gdn)
    heads, head_dim = kda.options.num_heads, kda.options.head_dim
    common = {name: x for name, x in gdn.state_dict().items() if name not in ("gk_proj.weight", "dt_bias")}
    missing, unexpected = kda.load_state_dict(common, strict=False)
    assert set(missing) == {"f_a_proj.weight", "f_b_proj.weight", "dt_bias"} and not unexpected
    with torch.no_grad():
        kda.f_a_proj.weight.zero_()[:heads].copy_(gdn.gk_proj.weight)
        kda.f_b_proj.weight.copy_(torch.eye(heads, head_dim).repeat_interleave(head_dim, 0))
        kda.dt_bias.copy_(gdn.dt_bias.repeat_interleave(head_dim))
    hidden_states = torch.randn(1, 90, 32, dtype=torch.float64)
    bounds, results = torch.tensor([0, 70, 90]), []
    for mixer in (kda, gdn):
        x = hidden_states.clone().requires_grad_()
        output, states = mixer.mix(x, None, bounds, None)
        after, states = mixer.mix(x[:, :2], states, torch.tensor([0, 1, 2]), None)
        (output.square().sum() + after.sum()).backward()
        gradients = {name: mixer.get_parameter(name).grad for name in common}
        of_bias = mixer.dt_bias.grad.view(heads, -1).sum(1)
        results.append([output, after, *states.values(), x.grad, of_bias, *gradients.values()])
    assert_same(*results)


def test_start_from_attention():
    """q, k, v and o are the attention's; the decays differ between channels, and every gate is about one half."""
    base = config("KDA")
    torch.manual_seed(0)
    attention, mixer = Qwen3Attention(base, 0), KimiDeltaAttention(base, 0)
    start = mixer.init_from_attention(attention, torch.Generator().manual_seed(1), 0.02)
    start.check(mixer, attention)
    assert start.copied == {f"{name}_proj.weight": f"{name}_proj.weight" for name in "qkvo"} and not start.derived
    for name in "qkvo":
        name = f"{name}_proj.weight"
        assert torch.equal(mixer.get_parameter(name), attention.get_parameter(name))
    hidden_states = torch.randn(3, 50, 32)
    gate, decay = mixer.gate(hidden_states, torch.float32), mixer.decay(hidden_states)
    assert gate.shape == (3, 50, 32) and (gate - 0.5).abs().max() < 0.05
    assert decay.shape == (3, 50, 4, 8) and (decay < 0).all()
    assert (decay.amax(-1) / decay.amin(-1)).max() < 0.9  # nearest zero over furthest from it
