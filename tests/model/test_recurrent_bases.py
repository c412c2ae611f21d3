# SPDX-License-Identifier: Apache-2.0
"""Bases with recurrent layers of their own: those are replaced too, new layers have their shape, and a Hybrid whose new
layers are GDN is a stock model again."""

import json
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hmf.config.layers import GDNOptions
from hmf.config.pattern import Pattern
from hmf.config.runs import CalibrationSettings, HybridSettings
from hmf.errors import HmfError
from hmf.evaluation.chunks import Composition, Parts
from hmf.evaluation.compose import prefill
from hmf.layers import own
from hmf.layers.own import OWN_SIZES, RECURRENT, own_layers, own_state_shapes
from hmf.layers.registry import layer_states
from hmf.model.checkpoint import load_config, load_model
from hmf.model.convert import base_pattern, drop_teacher, footprint, hybrid_config, hybridise
from hmf.model.families import FAMILIES
from hmf.model.native import convert, native_config
from hmf.planning import serving as planner
from hmf.priming.calibrate import calibrate
from hmf.priming.export import export
from hmf.priming.objectives import LayerwiseObjective, Stage1Objective, train_only_mixers
from hmf.priming.stage0 import initialise, make_stage0
from tests.hybrids import random_ids, randomise
from tests.model.test_families import BASES, SIZES, assert_equal, saved, teacher_logits
from tests.numerics import assert_same, in_float64, widened
from tests.test_cli import run

# As in the published models: one head_dim, and as many channels of values as attention has.
FIT = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HEADS = {
    "two values a key": FIT,
    "key heads that end inside those of attention": FIT | {"num_attention_heads": 6, "linear_num_value_heads": 12},
    "more key heads than attention has heads": FIT | {"linear_num_key_heads": 8},
}
OWN = [name for name, row in FAMILIES.items() if row.own_recurrence]
FORMAT = dict.fromkeys(OWN, "qwen3_5") | {"qwen3_next": "qwen3_next"}
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
CASES = [(family, heads) for family in OWN for heads in HEADS if family == "qwen3_5_text" or HEADS[heads] is FIT]
every_base = pytest.mark.parametrize(("family", "heads"), CASES)


def stock_model(family="qwen3_5_text", **fields):
    """A random stock model of four layers, the first and third of them recurrent."""
    row, sizes = FAMILIES[family], dict(SIZES)
    if family == "qwen3_5_moe_text":
        del sizes["intermediate_size"]  # as published: every layer has experts
    model = row.class_named("ForCausalLM")(row.config_class()(**(sizes | BASES[family]["listed"] | FIT | fields)))
    randomise(model)
    return model.eval()


def hybrid_of(stock, pattern, **options):
    model = drop_teacher(hybridise(stock, Pattern.parse(pattern), options))
    randomise(model, seed=1)
    return model.eval()


@pytest.mark.parametrize("family", OWN)
@pytest.mark.usefixtures("in_float64")
@torch.no_grad()
def test_the_bases_own_layers_run_on_the_cpu_beside_gpu_kernels(family, monkeypatch):
    """As where fla is installed: transformers then calls its kernels for tensors on the CPU too, and they fail."""
    hybrid, ids = widened(hybrid_of(stock_model(family), "*-GDN-*-*")), random_ids(2, 20)
    expected = hybrid(ids).logits

    def kernel(*args, **kwargs):
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    stock = sys.modules[FAMILIES[family].class_named("ForCausalLM").__module__]
    for name in ("chunk", "recurrent"):
        monkeypatch.setattr(stock, f"torch_{name}_gated_delta_rule", kernel)
    with pytest.raises(ValueError, match="cpu tensor"):
        hybrid(ids)
    monkeypatch.setattr(own, "_stock_needs_gpu", lambda: True)
    assert_same(hybrid(ids).logits, expected)
    start = hybrid(ids[:, :19], use_cache=True)
    step = hybrid(ids[:, 19:], past_key_values=start.past_key_values, use_cache=True)
    assert_same(torch.cat([start.logits, step.logits], 1), expected)


# --- a recurrent layer of the base is replaced ---


@every_base
@pytest.mark.usefixtures("in_float64")
@torch.no_grad()
def test_a_new_gdn_computes_what_the_bases_own_did(family, heads, tmp_path):
    stock, ids = stock_model(family, **HEADS[heads]), random_ids(2, 70)
    report = make_stage0(saved(stock, tmp_path / "base"), Pattern.parse("GDN>GDN-*-*-*"), tmp_path / "fused")
    assert not report.starts["model.layers.0.gdn"].initialised
    fused, expected = widened(load_model(tmp_path / "fused")), widened(stock)(ids).logits
    assert_same(fused(ids).logits, expected)
    assert_same(teacher_logits(fused, ids), expected)
    export(tmp_path / "fused", tmp_path / "hybrid")
    assert_same(widened(load_model(tmp_path / "hybrid"))(ids).logits, expected)
    fused, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("fused", "hybrid"))
    assert fused["layer_types"] == ["GDN>GDN*", "*DA", "*DA", "*DA"] and plain["layer_types"] == ["GDN", "*", "*", "*"]
    assert not any("layers.0.linear_attn" in name for name in load_file(tmp_path / "hybrid/model.safetensors"))


@pytest.mark.parametrize(
    ("family", "objective"),
    [("qwen3_5_text", Stage1Objective("all")), ("qwen3_next", LayerwiseObjective())],
    ids=["all", "layerwise"],
)
def test_a_recurrent_layer_teaches_another(family, objective, tmp_path):
    """GKA and KDA in place of GDN, and GKA in place of attention, on packed documents."""
    stock, ids = stock_model(family), random_ids(2, 17)
    make_stage0(saved(stock, tmp_path / "base"), Pattern.parse("GDN>GKA-GKA-GDN>KDA-*"), tmp_path / "fused")
    fused, positions = load_model(tmp_path / "fused"), torch.cat([torch.arange(9), torch.arange(8)])[None].expand(2, -1)
    with torch.no_grad():
        assert_equal(family, teacher_logits(fused, ids), stock(ids).logits)
    names = train_only_mixers(fused)
    assert {name.split(".")[3] for name in names} == {"gka", "kda"}
    optimiser, losses = torch.optim.AdamW([p for p in fused.parameters() if p.requires_grad], lr=1e-3), []
    for _ in range(2):
        loss = fused(input_ids=ids, position_ids=positions, objective=objective)["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    export(saved(fused, tmp_path / "stage1"), tmp_path / "hybrid")
    hybrid = load_model(tmp_path / "hybrid")
    assert hybrid.config.recurrent_layers == [0, 1, 2] and str(hybrid.config.pattern) == "GKA-GKA-KDA-*"
    with torch.no_grad():
        assert_equal(family, hybrid(ids).logits, fused.eval()(ids).logits)
        assert hybrid.generate(ids, **GREEDY).tolist() == hybrid.generate(ids, **GREEDY, use_cache=False).tolist()


def test_a_start_in_place_of_a_recurrent_layer_can_be_calibrated():
    fused = hybridise(stock_model(), Pattern.parse("GDN>GKA-*-*-*"))
    starts = initialise(fused, conv_start="identity")
    given, new = fused.model.layers[0].linear_attn.conv1d.weight, fused.model.layers[0].gka
    assert torch.equal(torch.cat([new.q_conv1d.weight, new.k_conv1d.weight, new.v_conv1d.weight]), given)
    rows = [{"input_ids": ids, "position_ids": torch.arange(24)} for ids in random_ids(8, 24)]
    (errors,) = calibrate(fused, starts, rows, CalibrationSettings(rows=8, steps=4)).values()
    assert errors[1] < errors[0]


@torch.no_grad()
def test_channels_of_kda_start_with_the_decay_of_their_head():
    fused = hybridise(stock_model(), Pattern.parse("GDN>GDN-*-GDN>KDA-*"))
    fused.model.layers[2].linear_attn.load_state_dict(fused.model.layers[0].linear_attn.state_dict())
    initialise(fused)
    gdn, kda, x = fused.model.layers[0].gdn, fused.model.layers[2].kda, torch.randn(1, 5, 32)
    assert_same(kda.decay(x), gdn.decay(x)[..., None].expand(1, 5, 8, 8), tolerance=1e-5)


RECURRENT_LAYER = st.sampled_from(["*", "GDN>GDN", "GDN>GKA", "GDN>KDA", "GDN", "GDN>SWA"])
ATTENTION_LAYER = st.sampled_from(["*", "GDN", "SWA", "M2", "BMF", "GDN>GKA"])


@given(st.tuples(RECURRENT_LAYER, ATTENTION_LAYER, RECURRENT_LAYER, ATTENTION_LAYER).filter(lambda s: {*s} != {"*"}))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@torch.no_grad()
def test_any_pattern_is_right_or_refused_by_its_layer(symbols):
    base, pattern = stock_model(), "-".join(symbols)
    wrong = [index for index, symbol in enumerate(symbols) if symbol in (("GDN", "GDN>SWA"), ("GDN>GKA",))[index % 2]]
    small = {name: {"window_size": 4} for name, symbol in (("swa", "SWA"), ("bmojo", "BMF")) if symbol in symbols}
    recipe = HybridSettings(pattern=pattern, options=small)
    if wrong:
        with pytest.raises(HmfError, match=f"^pattern: layer {wrong[0]}: {symbols[wrong[0]]}: .*write "):
            base_pattern(base.config, recipe)
        return
    fused, ids = hybridise(base, base_pattern(base.config, recipe), recipe.options_by_key()), random_ids(1, 9)
    assert torch.equal(teacher_logits(fused, ids), base(ids).logits)
    initialise(fused)
    hybrid = drop_teacher(fused)
    assert torch.equal(hybrid(ids).logits, fused(ids).logits)
    assert hybrid.config.hybrid_override_pattern == pattern.replace("GDN>", "")
    states = [index for index, symbol in enumerate(symbols) if index % 2 == 0 or symbol != "*"]
    assert hybrid.config.recurrent_layers == states
    cached = hybrid(ids, use_cache=True).past_key_values
    assert footprint(hybrid)["state_bytes"] == sum(
        shape.bytes(torch.float32) for index in states for shape in layer_states(hybrid.config, index).values()
    )
    for index in states:
        found = {name: tuple(x.shape[1:]) for name, x in cached.layers[index].states.items() if name != "seen"}
        shapes = {name: shape.shape for name, shape in layer_states(hybrid.config, index).items() if name != "seen"}
        assert found == shapes


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("GKA-*-*-*", None),  # as an exported Hybrid has it
        ("GKA*-*DA-*DA-*DA", r"layer 0: GKA: this layer .* recurrent by itself; write \* to keep it, or GDN>GKA"),
        ("*DA-GDN>GKA*-*DA-*DA", "layer 1: GDN>GKA: this layer of the base has attention; write GKA"),
        ("GDN>GKA-*-*-*", "layer 0: GDN>GKA: a Hybrid without its teacher does not keep .*; write GKA"),
        ("GDN>BMF*-*DA-*DA-*DA", "layer 0: GDN>BMF: only GDN, GKA, KDA can start from a recurrent layer"),
    ],
)
def test_a_config_names_the_teacher_only_while_it_is_there(pattern, why, tmp_path):
    config = hybrid_config(stock_model().config, Pattern.parse("*-GDN-*-*"))
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    changed = json.loads(file.read_text()) | {"hybrid_override_pattern": pattern, "layer_types": pattern.split("-")}
    file.write_text(json.dumps(changed))
    if why is None:
        assert str(type(config).from_pretrained(tmp_path).pattern) == pattern
        return
    with pytest.raises(HmfError, match=f"^{re.escape(str(file))}: hybrid_override_pattern: {why}"):
        type(config).from_pretrained(tmp_path)


# --- the shape of new layers ---


@pytest.mark.parametrize("heads", HEADS)
@torch.no_grad()
def test_new_layers_have_the_shape_of_the_bases_own_and_its_attentions_rows(heads):
    stock = stock_model(**HEADS[heads])
    fused = hybridise(stock, Pattern.parse("*-GDN-*-*"))
    initialise(fused)
    own = {name: shape.shape for name, shape in own_state_shapes(fused.config).items()}
    new = {name: shape.shape for name, shape in layer_states(fused.config, 1).items()}
    assert new["recurrent"] == own["recurrent"]
    assert sum(new[f"conv_{name}"][0] for name in "qkv") == own["conv"][0]
    config, layer = stock.config, fused.model.layers[1]
    size, per_key = config.head_dim, layer.gdn.options.num_v_heads // layer.gdn.options.num_k_heads
    query = layer.self_attn.q_proj.weight.unflatten(0, (-1, 2, size))[:, 0]  # each head has rows of its gate, too
    group = config.num_attention_heads // config.num_key_value_heads
    for channel in range(config.num_attention_heads * size):
        head, row = divmod(channel, size)
        values = layer.self_attn.v_proj.weight[head // group * size + row]
        assert torch.equal(layer.gdn.v_proj.weight[channel], values)
        key_head, of_head = divmod(channel, per_key * 8)
        if of_head < 8:  # of the first value head of this key head
            at = key_head * 8 + of_head
            assert torch.equal(layer.gdn.q_proj.weight[at], query[head, row])
            assert torch.equal(layer.gdn.k_proj.weight[at], layer.self_attn.k_proj.weight[head // group * size + row])
    assert torch.equal(layer.gdn.o_proj.weight, layer.self_attn.o_proj.weight)


def test_a_checkpoint_keeps_the_shape_that_its_config_says():
    """Those made before have no such option, and it can be switched off."""
    base = stock_model().config
    new = hybrid_config(base, Pattern.parse("*-GDN-*-*"))
    assert new.gdn_config["own_shape"] is True and new.gdn_config["num_v_heads"] == 8
    for symbol, key in (("GKA", "gka_config"), ("KDA", "kda_config")):  # only where some replace a recurrent layer
        (beside, alone) = (Pattern.parse(f"{first}-{symbol}-*-*") for first in (f"GDN>{symbol}", "*"))
        assert getattr(hybrid_config(base, beside), key)["own_shape"] is True
        assert "own_shape" not in getattr(hybrid_config(base, alone), key)
    off = hybrid_config(base, Pattern.parse("*-GDN-*-*"), {"gdn_config": {"own_shape": False}})
    assert "own_shape" not in off.gdn_config and off.gdn_config["head_dim"] == base.head_dim
    again = type(off)(**{key: value for key, value in off.to_dict().items() if key != "model_type"})
    assert again.gdn_config == off.gdn_config
    with pytest.raises(HmfError, match="pattern: layer 0: GDN>GKA: .*own_shape of its options is false; write"):
        base_pattern(base, HybridSettings(pattern="GDN>GKA-*-*-*", options={"gka": {"own_shape": False}}))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"linear_value_head_dim": 16}, "linear_key_head_dim, 8, differs from linear_value_head_dim, 16"),
        ({"linear_num_value_heads": 4}, "have 4 x 8 channels of values, and its attention 64"),
    ],
)
def test_where_the_shape_does_not_fit_new_layers_have_that_of_attention(fields, why):
    base = stock_model(**fields).config
    config = hybrid_config(base, Pattern.parse("*-GDN-*-*"))
    assert config.gdn_config["head_dim"] == base.head_dim
    with pytest.raises(HmfError, match=f"config.json: gdn_config: own_shape: true, but .*{why}; correct that, or"):
        hybrid_config(base, Pattern.parse("*-GDN-*-*"), {"gdn_config": {"own_shape": True}})
    with pytest.raises(HmfError, match=f"^pattern: layer 0: GDN>GKA: .*{why}; write"):
        base_pattern(base, HybridSettings(pattern="GDN>GKA-*-*-*"))
    with pytest.raises(HmfError, match=f"gdn_config.own_shape: False: .*{why}; use the Hybrid's own format"):
        native_config(config)


@pytest.mark.parametrize("key", OWN_SIZES)
def test_sizes_of_the_bases_own_layers_are_checked(key):
    """In a base and in the config of a Hybrid."""
    base = stock_model().config
    made = hybrid_config(base, Pattern.parse("*-GDN-*-*"))
    setattr(base, key, 0)
    fields = made.to_dict() | {key: 0}
    for build in (lambda: hybrid_config(base, Pattern.parse("*-GDN-*-*")), lambda: type(made).from_dict(fields)):
        with pytest.raises(HmfError, match=f"config.json: {key}: 0: give 1 or more"):
            build()


# --- a stock model again ---


@pytest.mark.parametrize(
    ("family", "heads", "options"),
    [
        *((*case, {}) for case in CASES),
        *(("qwen3_next", "two values a key", options) for options in ({"conv_size": 2}, {"use_short_conv": False})),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_gdn_hybrid_becomes_the_bases_own_class(family, heads, options, tmp_path, capfd):
    """Only layer_types and the tensors of new layers change; it loads without this package and is a base again."""
    stock, ids = stock_model(family, **HEADS[heads], full_attention_interval=2), random_ids(2, 70)
    hybrid = hybrid_of(stock, "*-GDN-GDN>GDN-*", gdn_config=options)
    saved(stock, tmp_path / "base")
    convert(saved(hybrid, tmp_path / "hybrid"), tmp_path / "native", FORMAT[family])
    said = "more than the Hybrid, for convolutions of one width" if options else "as many as the Hybrid"
    assert f"{said}\n" in capfd.readouterr().err
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert type(native) is type(stock)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "native"))
    assert after.pop("layer_types") == [RECURRENT] * 3 + ["full_attention"]
    assert after.pop("mamba_ssm_dtype") == "float32"
    del before["layer_types"], before["full_attention_interval"]  # of the base's layers
    assert after == before
    with in_float64():
        assert_same(widened(native)(ids).logits, widened(hybrid)(ids).logits)
    assert native.generate(ids, **GREEDY).tolist() == hybrid.generate(ids, **GREEDY).tolist()
    assert own_layers(native.config) == [0, 1, 2]
    tensors, written = (load_file(tmp_path / name / "model.safetensors") for name in ("hybrid", "native"))
    assert all(torch.equal(written[name], x) for name, x in tensors.items() if ".gdn." not in name)
    make_stage0(tmp_path / "native", Pattern.parse("*-GDN>GKA-*-*"), tmp_path / "again")
    assert torch.equal(teacher_logits(load_model(tmp_path / "again"), ids), native(ids).logits)


ROPE = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}
# The keys of published configs, with their numbers of heads and their head_dims.
HEADS_OF_4B = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "linear_conv_kernel_dim": 4}
HEADS_OF_4B |= {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
HEADS_OF_4B |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
PUBLISHED = {
    "qwen3_5_text": HEADS_OF_4B
    | {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "dtype": "bfloat16"}
    | {"layer_types": ([RECURRENT] * 3 + ["full_attention"]) * 2, "full_attention_interval": 4}
    | {"rope_parameters": ROPE | {"mrope_interleaved": True, "mrope_section": [11, 11, 10]}, "hidden_act": "silu"},
    "qwen3_next": HEADS_OF_4B
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "full_attention_interval": 4}
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    | {"rope_parameters": ROPE, "use_sliding_window": False, "torch_dtype": "bfloat16", "hidden_act": "silu"},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_three_to_one_becomes_seven_to_one(family, tmp_path):
    """By a ratio of one half, with the keys of published configs; nothing else of the stock config changes."""
    fields = {"model_type": family, "num_hidden_layers": 8, "hidden_size": 32, "vocab_size": 61} | PUBLISHED[family]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    base = load_config(tmp_path, weights=False)
    pattern = base_pattern(base, HybridSettings(mixer="gdn", ratio=0.5))
    hybrid = hybrid_config(base, pattern.with_fused(False))
    assert str(hybrid.pattern) == "*-*-*-*-*-*-*-GDN" and hybrid.gdn_config["own_shape"]
    before, after = base.to_dict(), native_config(hybrid, to=FORMAT[family]).to_dict()
    assert after.pop("layer_types") == [RECURRENT] * 3 + ["full_attention"] + [RECURRENT] * 4
    assert after.pop("mamba_ssm_dtype") == "float32"
    for key in ("layer_types", "mamba_ssm_dtype", "full_attention_interval", "architectures", "transformers_version"):
        before.pop(key, None), after.pop(key, None)
    assert {key: value for key, value in after.items() if value != before.get(key, ...)} == {}
    assert before.keys() == after.keys()


@pytest.mark.parametrize("family", OWN)
@torch.no_grad()
def test_an_activation_has_several_names(family):
    """transformers calls silu swish too; vLLM does not, so a stock model is written with the former name."""
    stock, ids = stock_model(family, hidden_act="swish"), random_ids(1, 9)
    assert torch.equal(stock(ids).logits, stock_model(family)(ids).logits)
    assert native_config(hybrid_of(stock, "*-GDN-*-*").config, to=FORMAT[family]).hidden_act == "silu"
    with pytest.raises(HmfError, match="hidden_act: 'gelu': the convolutions of GDN layers need silu"):
        hybrid_of(stock_model(family, hidden_act="gelu"), "*-GDN-*-*")


CLEAN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokens = model.generate(torch.tensor([json.loads(sys.argv[2])]), max_new_tokens=8, do_sample=False)
print(json.dumps([type(model).__name__, "hmf" in sys.modules, tokens[0].tolist()]))
"""


def test_export_writes_it_from_stage_1_for_a_process_without_this_package(tmp_path, monkeypatch, capsys):
    make_stage0(saved(stock_model(), tmp_path / "base"), Pattern.parse("*-GDN-*-*"), tmp_path / "fused")
    command = ["export", tmp_path / "fused", "--out", tmp_path / "native", "--format"]
    code, _, err = run(monkeypatch, capsys, *command, "qwen3_next")
    assert code == 2 and "'hybrid_qwen3_5_text' can be converted to qwen3_5, not to qwen3_next; give qwen3_5" in err
    code, _, err = run(monkeypatch, capsys, *command, "qwen3_5")
    assert code == 0, err
    ids = random_ids(1, 9)
    command = [sys.executable, "-I", "-c", CLEAN, tmp_path / "native", json.dumps(ids[0].tolist())]
    clean = subprocess.run(command, capture_output=True, text=True, check=True)
    hybrid = export(tmp_path / "fused", tmp_path / "hybrid")
    expected = hybrid.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    assert json.loads(clean.stdout) == ["Qwen3_5ForCausalLM", False, expected]


@pytest.mark.parametrize(
    ("pattern", "options", "why"),
    [
        ("GDN>GKA-GDN-*-*", {}, "hybrid_override_pattern: GKA: qwen3_5 has only attention and GDN layers"),
        ("*-GDN-*-GDN", {}, "hybrid_override_pattern: .* needs both attention and GDN layers"),
        ("*-GDN-*-*", {"conv_size": 5}, "gdn_config.conv_size: 5: the convolutions of the base's own layers have 4"),
        ("*-GDN-*-*", {"norm_eps": 1e-5}, "gdn_config.norm_eps: 1e-05"),
        ("*-GDN-*-*", {"allow_neg_eigval": True}, "gdn_config.allow_neg_eigval: True"),
        ("*-GDN-*-*", {"kv_proj_rank": 2}, "gdn_config.kv_proj_rank: 2"),
        ("*-GDN-*-*", {"own_shape": False}, "gdn_config.own_shape: False: .*make the Hybrid again with it"),
    ],
)
def test_what_cannot_be_converted_is_named(pattern, options, why):
    config = hybrid_of(stock_model(), pattern, gdn_config=options).config
    with pytest.raises(HmfError, match=f"^config.json: {why}"):
        native_config(config)


# --- what counts layers ---


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_plans_say_that_the_base_is_a_hybrid(family):
    base = stock_model(family).config
    (plan,) = planner.plans(base, "h100")
    assert planner.title(plan) == "Hybrid base, 2 + 2"
    hybrid, before = planner.plans(hybrid_config(base, Pattern.parse("GDN>GKA-M2-*-*")), "h100")
    assert [planner.title(x) for x in (hybrid, before)] == ["Hybrid, 1 + 3", "Hybrid base, 2 + 2"]
    assert [cache.kind for cache in hybrid.caches] == ["GKA", "M2", RECURRENT, "full_attention"]


def test_layers_that_are_recurrent_are_not_taken_for_attention(tmp_path):
    base = stock_model().config
    with pytest.raises(HmfError, match=r"^layers: \[0\] are recurrent in the base; its attention layers are \[1, 3\]"):
        base_pattern(base, HybridSettings(layers=[0, 1]))


def test_composition_of_caches_is_refused():
    hybrid, tokens = hybrid_of(stock_model(), "*-GDN-*-*"), random_ids(1, 8)[0].tolist()
    with pytest.raises(HmfError, match=r"compose: layer 0 \(linear_attention\): only full attention"):
        prefill(hybrid, [Parts([], [tokens], tokens[:1])], Composition())


def test_own_shape_is_true_or_false():
    with pytest.raises(HmfError, match="own_shape"):
        GDNOptions.from_base(stock_model().config, {"own_shape": "true"})
