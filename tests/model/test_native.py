# SPDX-License-Identifier: Apache-2.0
"""A GDN Hybrid of Qwen3 as a stock Qwen3.5: the same numbers without this package, or a refusal by name."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from hmf.config.layers import GDNOptions
from hmf.config.pattern import Pattern
from hmf.errors import HmfError
from hmf.folders import resolve_base
from hmf.model import native
from hmf.model.checkpoint import load_model, save_checkpoint
from hmf.model.convert import hybrid_config, hybridise
from hmf.model.families import FAMILIES
from hmf.model.modeling import hybrid_classes
from hmf.priming.export import export
from hmf.priming.stage0 import initialise, make_stage0
from hmf.training.finetune import finetune
from tests import numerics
from tests.hybrids import Case, random_ids, randomise, tiny_config
from tests.model.test_families import EXPERTS, YARN
from tests.test_cli import run
from tests.training.cutting import finetune_recipe, make_tiny_hybrid, make_tiny_stage0

PATTERN = "*-GDN-GDN-*"
EPS = {"norm_eps": 1e-6}
TOLERANCE = 2e-5  # of the largest logit: two float32 programs that add in different orders


def save_hybrid(path, options=EPS, base=None, pattern=PATTERN, dtype=torch.float32, seed=0, family="qwen3"):
    """A random Hybrid of `family` in `dtype`, saved at `path`, and its config."""
    config = tiny_config(Case("GDN", "native", base or {}, options), pattern, family)
    model = hybrid_classes(FAMILIES[family]).causal_lm(config)
    randomise(model, seed)
    model.to(dtype).save_pretrained(path)
    return config


def require_same(hybrid, stock):
    """Logits of whole texts and of padded ones, and greedy tokens."""
    assert type(stock) is native.CLASSES[hybrid.config.model_type][1]
    ids = random_ids(2, 70)  # more than one chunk of 64
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        for given_mask in (None, mask):
            expected, found = (model(ids, attention_mask=given_mask).logits for model in (hybrid, stock))
            with numerics.in_float64():
                exact = numerics.widened(hybrid)(ids, attention_mask=given_mask).logits
            if given_mask is not None:
                expected, found, exact = (logits[mask.bool()] for logits in (expected, found, exact))
            own = numerics.FACTOR * float((expected - exact).abs().max())  # some random models amplify errors
            assert_close(found, expected, rtol=0, atol=max(own, TOLERANCE * float(expected.abs().max())))
        tokens = [model.generate(ids[:, :9], max_new_tokens=12, do_sample=False) for model in (hybrid, stock)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize(
    ("options", "base"),
    [
        (EPS, {}),
        (EPS, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        (EPS, {"num_key_value_heads": 4, "head_dim": 12}),
        (EPS | {"conv_size": 1}, {}),
        (EPS | {"conv_size": 3, "kv_proj_rank": 0, "kv_learnable_residual": True}, {}),
        (EPS | {"use_short_conv": False}, {"hidden_act": "swish"}),
        ({"norm_eps": 1e-3}, {"rms_norm_eps": 1e-3}),
        (EPS, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}}),
        (EPS, {"rope_parameters": {"rope_type": "proportional", "rope_theta": 5e5, "partial_rotary_factor": 0.5}}),
        (EPS, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        (EPS, {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
        (
            EPS,
            {"rope_parameters": {key: YARN[key] for key in YARN if key != "llama_4_scaling_beta"}},
        ),
    ],
    ids=[
        "gqa",
        "tied",
        "mha",
        "conv-1",
        "conv-3",
        "no-conv",
        "eps",
        "default-rope",
        "proportional",
        "linear",
        "dynamic",
        "yarn",
    ],
)
def test_the_stock_model_gives_the_same_numbers(tmp_path, options, base):
    save_hybrid(tmp_path / "hybrid", options, base)
    report = native.convert(tmp_path / "hybrid", tmp_path / "stock")
    hybrid, stock = (
        load_model(tmp_path / "hybrid").eval(),
        AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval(),
    )
    require_same(hybrid, stock)
    assert (report.before, report.after) == (hybrid.num_parameters(), stock.num_parameters())
    assert f"{report.after - report.before:,} ({report.after / report.before - 1:.1%}) more" in report.describe()
    assert "experts" not in report.describe()


@pytest.mark.parametrize(
    "base",
    [EXPERTS, EXPERTS | {"num_experts_per_tok": 1, "num_key_value_heads": 1, "tie_word_embeddings": True}],
    ids=["two-experts", "one-expert"],
)
def test_experts_give_the_same_numbers_beside_a_shared_one_that_is_zero(tmp_path, base, capsys):
    save_hybrid(tmp_path / "hybrid", EPS, {"head_dim": 8} | base, family="qwen3_moe")
    report = native.convert(tmp_path / "hybrid", tmp_path / "stock")
    hybrid, stock = (
        load_model(tmp_path / "hybrid").eval(),
        AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval(),
    )
    require_same(hybrid, stock)
    assert report.after == stock.num_parameters()
    shared = [p for name, p in stock.named_parameters() if "shared_expert" in name]
    assert len(shared) == 4 * 4 and not any(p.any() for p in shared) and "shared experts of zeros" in report.describe()
    assert "left out" not in capsys.readouterr().err


@given(
    pattern=st.lists(st.sampled_from(["*", "GDN"]), min_size=2, max_size=5),
    family=st.sampled_from(["qwen3", "qwen3_moe"]),
    seed=st.integers(0, 99),
)
@example(pattern=["*", "GDN", "GDN", "GDN", "GDN"], family="qwen3", seed=89)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_pattern_with_both_layers(tmp_path_factory, pattern, family, seed):
    folder = tmp_path_factory.mktemp("any")
    base = {"head_dim": 8} | (EXPERTS if family == "qwen3_moe" else {})
    config = save_hybrid(folder / "hybrid", base=base, pattern="-".join(pattern), seed=seed, family=family)
    if len(set(pattern)) == 1:
        with pytest.raises(HmfError, match="needs both .*; use the Hybrid's own format"):
            native.native_config(config)
        return
    native.convert(folder / "hybrid", folder / "stock")
    require_same(load_model(folder / "hybrid").eval(), AutoModelForCausalLM.from_pretrained(folder / "stock").eval())


# --- refused, by name ---

WRONG = {
    "use_gate": False,
    "kv_proj_rank": 4,
    "allow_neg_eigval": True,
    "conv_bias": True,
    "norm_eps": 1e-5,
}


@pytest.mark.parametrize("key", WRONG)
def test_an_option_that_cannot_be_expressed_is_refused(tmp_path, key):
    save_hybrid(tmp_path / "hybrid", EPS | {key: WRONG[key]})
    with pytest.raises(HmfError, match=rf"hybrid/config.json: gdn_config.{key}: {WRONG[key]}: .+") as error:
        native.convert(tmp_path / "hybrid", tmp_path / "stock")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "stock").exists()


def test_an_override_of_an_option_counts():
    config = tiny_config(Case("GDN", "x", options=EPS), PATTERN, gdn_overrides={"allow_neg_eigval": True})
    with pytest.raises(HmfError, match="allow_neg_eigval"):
        native.native_config(config)


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("hybrid_override_pattern: KDA", lambda: tiny_config(Case("GDN", "x", options=EPS), "*-GDN-KDA")),
        ("hybrid_override_pattern: SWA", lambda: tiny_config(Case("GDN", "x", options=EPS), "*-GDN-SWA")),
        (
            ".*the model still has its teacher",
            lambda: tiny_config(Case("GDN", "x", options=EPS), "*DA-GDN*"),
        ),
        ("attention_bias", lambda: tiny_config(Case("GDN", "x", options=EPS), PATTERN, attention_bias=True)),
        ("hidden_act: 'gelu'", lambda: tiny_config(Case("GDN", "x", options=EPS), PATTERN, hidden_act="gelu")),
        (
            "sliding_window",
            lambda: tiny_config(
                Case("GDN", "x", options=EPS), PATTERN, use_sliding_window=True, sliding_window=8, max_window_layers=1
            ),
        ),
        ("model_type: 'qwen3' is not a Hybrid", lambda: Qwen3Config()),
        *(
            (
                f"model_type: 'hybrid_{family}': {why}",
                lambda family=family: tiny_config(Case("GDN", "x"), PATTERN, family, attn_logit_softcapping=None),
            )
            for family, why in {
                "qwen2": "attention in qwen3_5 normalises queries and keys, which this family does not",
                "gemma2": "attention in qwen3_5 normalises queries and keys, which this family does not",
                "gemma3_text": "layers in qwen3_5 have a norm before .*, and this family's have .* pre_feedforward",
                "olmo3": "layers in qwen3_5 have a norm before .*, and this family's have post_attention",
            }.items()
        ),
        *(
            (
                f"{key}: ",
                lambda key=key, value=value: tiny_config(
                    Case("GDN", "x", options=EPS), PATTERN, "qwen3_moe", **EXPERTS | {key: value}
                ),
            )
            for key, value in (
                ("norm_topk_prob", False),
                ("mlp_only_layers", [1]),
                ("decoder_sparse_step", 2),
                ("num_experts", 0),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_cannot_be_expressed_is_refused(key, config):
    with pytest.raises(HmfError, match=f"config.json: {key}"):
        native.native_config(config())


def test_windows_of_replaced_layers_do_not_count():
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    config = tiny_config(Case("GDN", "x", options=EPS), "*-GDN-GDN", **windows)
    assert native.native_config(config).layer_types == ["full_attention", "linear_attention", "linear_attention"]


def test_no_option_and_no_key_of_the_config_is_passed_over(capsys):
    assert native.OPTIONS.keys() == GDNOptions.model_fields.keys()
    checked = {"hybrid_qwen3": set(), "hybrid_qwen3_moe": {*native.EXPERTS, "intermediate_size"}}
    for name, (config_class, _) in native.CLASSES.items():
        base = CONFIG_MAPPING[name.removeprefix("hybrid_")]
        known = {field.name for field in dataclasses.fields(base)}
        kept = {field.name for field in dataclasses.fields(config_class)}
        assert known <= native.REPLACED | checked[name] | kept
    config = tiny_config(Case("GDN", "x", options=EPS), PATTERN, attn_output_gate=False)  # a key of other software
    assert not hasattr(native.native_config(config), "attn_output_gate")
    assert "left out: attn_output_gate" in capsys.readouterr().err


# --- the epsilon of new layers ---


def test_new_layers_start_with_the_bases_epsilon_and_old_ones_keep_theirs():
    base = Qwen3Config(num_hidden_layers=2, rms_norm_eps=1e-4)
    pattern = Pattern.parse("*-GDN")
    new = hybrid_config(base, pattern)
    assert new.gdn_config["norm_eps"] == 1e-4
    assert hybrid_config(base, pattern, {"gdn_config": {"norm_eps": 0.5}}).gdn_config["norm_eps"] == 0.5
    stored = tiny_config(Case("GDN", "x"), "*-GDN", rms_norm_eps=1e-4)
    assert stored.gdn_config["norm_eps"] == GDNOptions.model_fields["norm_eps"].default
    assert hybrid_config(stored, pattern).gdn_config["norm_eps"] == stored.gdn_config["norm_eps"]


# --- dtypes, files, commands ---


def test_norms_are_float32_where_rounding_would_change_them(tmp_path, capsys):
    save_hybrid(tmp_path / "hybrid", dtype=torch.bfloat16)
    model = load_model(tmp_path / "hybrid", dtype="stored")
    for name, parameter in model.named_parameters():
        if name.endswith("input_layernorm.weight"):
            parameter.data.fill_(0.01 if "layers.0" in name else 0.75)
    save_checkpoint(model, tmp_path / "small", tmp_path / "hybrid")
    native.convert(tmp_path / "small", tmp_path / "stock")
    tensors = load_file(tmp_path / "stock" / "model.safetensors")
    small, plain = (tensors[f"model.layers.{index}.input_layernorm.weight"] for index in (0, 1))
    assert small.dtype == torch.float32 and plain.dtype == torch.bfloat16
    assert torch.equal((small + 1).to(torch.bfloat16), torch.full_like(small, 0.01, dtype=torch.bfloat16))
    assert torch.equal(plain + 1, torch.full_like(plain, 0.75))
    assert tensors["model.layers.1.linear_attn.A_log"].dtype == torch.float32
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert "stored in float32" in capsys.readouterr().err
    wide = [
        load(tmp_path / name, dtype=torch.float32).eval()
        for load, name in ((load_model, "small"), (AutoModelForCausalLM.from_pretrained, "stock"))
    ]
    require_same(*wide)


@torch.no_grad()
def test_rounding_the_norms_costs_less_than_computing_in_bfloat16(tmp_path):
    """The figures of docs/formats.md, in nats per token: the quickstart's teacher at Stage 0 on a text of 1,024 tokens.

    pytest -s prints them.
    """
    teacher = resolve_base("teacher")
    make_stage0(teacher, Pattern.parse("*-GDN-*-GDN-GDN-*"), tmp_path / "fused")
    export(tmp_path / "fused", tmp_path / "hybrid", torch.bfloat16)
    native.convert(tmp_path / "hybrid", tmp_path / "stock")
    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(teacher)(text, return_tensors="pt").input_ids[:, :1024]
    wide, narrow = (load_model(tmp_path / "hybrid", dtype).eval() for dtype in (torch.float32, torch.bfloat16))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32).eval()
    expected = wide(ids).logits.double().log_softmax(-1)

    def divergence(model):
        return float((expected.exp() * (expected - model(ids).logits.double().log_softmax(-1))).sum(-1).mean())

    as_stored, of_bfloat16 = divergence(stock), divergence(narrow)
    for name, parameter in stock.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data = parameter.to(torch.bfloat16).float()
    rounded = divergence(stock)
    print(f"norms as stored {as_stored:.1e}, rounded {rounded:.1e}; the Hybrid in bfloat16 {of_bfloat16:.1e}")
    assert as_stored < rounded < of_bfloat16


CLEAN = """
import json, sys
sys.modules["hmf"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
print(json.dumps([type(model).__name__, tokens[0].tolist(), model(ids).logits[0, -1].tolist()]))
"""
TEXT = "one 1 two 2 \u0915\u093f e\u0301"


def test_a_process_without_this_package_loads_and_generates(tmp_path, monkeypatch, capsys):
    """From a fused checkpoint by the command line, and the same from the finished Hybrid."""
    fused = make_tiny_stage0(tmp_path, tied=True)
    assert run(monkeypatch, capsys, "export", fused, "--out", tmp_path / "hybrid")[0] == 0
    code, _, err = run(monkeypatch, capsys, "export", fused, "--out", tmp_path / "a", "--format", "qwen3_5")
    assert code == 0, err
    code, out, err = run(
        monkeypatch, capsys, "convert", tmp_path / "hybrid", "--to", "qwen3_5", "--out", tmp_path / "b"
    )
    assert code == 0, err
    assert "more than the Hybrid" in err
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for file in (tmp_path / "hybrid").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()

    clean = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN, tmp_path / "b", TEXT], capture_output=True, text=True, check=True
    )
    name, tokens, logits = json.loads(clean.stdout)
    assert name == "Qwen3_5ForCausalLM"
    hybrid = load_model(tmp_path / "hybrid", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "hybrid")(TEXT, return_tensors="pt").input_ids
    assert hybrid.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist() == tokens
    expected = hybrid(ids).logits[0, -1].detach()
    assert_close(torch.tensor(logits), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def test_text_is_split_as_before_where_the_files_name_no_class(tmp_path):
    fused = make_tiny_stage0(tmp_path)
    file = tmp_path / "base" / "tokenizer_config.json"
    named = json.loads(file.read_text())
    assert named.pop("tokenizer_class")
    (fused / file.name).write_text(json.dumps(named))
    export(fused, tmp_path / "hybrid")
    native.convert(tmp_path / "hybrid", tmp_path / "stock")
    hybrid, stock = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hybrid", "stock"))
    assert type(hybrid) is type(stock)
    assert hybrid(TEXT).input_ids == stock(TEXT).input_ids


def test_a_fused_model_in_memory_is_refused(tiny_qwen3, tmp_path):
    fused = hybridise(tiny_qwen3, Pattern.parse("*-GDN-*-GDN"))
    initialise(fused)
    with pytest.raises(HmfError, match="hmf export --format qwen3_5"):
        native.save_native(fused, tmp_path / "stock", tmp_path)


# --- and back ---


@pytest.mark.parametrize(
    ("family", "base"), [("qwen3", {"num_key_value_heads": 1}), ("qwen3_moe", EXPERTS)], ids=["dense", "experts"]
)
def test_a_stock_model_is_imported_as_a_hybrid_that_converts_to_the_same_files(tmp_path, family, base):
    """With GDN>GDN for each recurrent layer, as docs/formats.md shows: nothing is initialised or lost."""
    save_hybrid(tmp_path / "hybrid", base={"head_dim": 8, "state_dtype": "bfloat16"} | base, family=family)
    native.convert(tmp_path / "hybrid", tmp_path / "stock")
    report = make_stage0(tmp_path / "stock", Pattern.parse("*-GDN>GDN-GDN>GDN-*"), tmp_path / "fused")
    assert not any(start.initialised or start.unused for start in report.starts.values())
    imported = export(tmp_path / "fused", tmp_path / "imported")
    assert str(imported.config.pattern) == PATTERN and imported.config.state_dtype == "bfloat16"
    assert not any("linear_attn" in name for name in load_file(tmp_path / "imported/model.safetensors"))
    native.convert(tmp_path / "imported", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "stock/config.json").read_text()) == json.loads(
        (tmp_path / "again/config.json").read_text()
    )


# --- adapters ---


def test_an_adapter_of_a_hybrid_is_merged_and_then_converted(tmp_path):
    """As docs/formats.md shows."""
    peft = pytest.importorskip("peft")
    hybrid = make_tiny_hybrid(tmp_path)
    model = peft.get_peft_model(load_model(hybrid).eval(), peft.LoraConfig(target_modules="all-linear"))
    ids = random_ids(2, 70)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        expected, plain = model(ids).logits, load_model(hybrid).eval()(ids).logits
    assert float((expected - plain).abs().max()) > 0.1
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(HmfError, match="merge it first"):
        native.convert(tmp_path / "adapter", tmp_path / "stock")

    base = AutoModelForCausalLM.from_pretrained(hybrid)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(hybrid).save_pretrained(tmp_path / "merged")
    native.convert(tmp_path / "merged", tmp_path / "stock")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()(ids).logits
    assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def test_the_adapters_of_hmf_finetune_are_in_the_weights_already(tmp_path):
    pytest.importorskip("peft")
    hybrid = make_tiny_hybrid(tmp_path)
    adapters = {"groups": ["attention", "mlp"], "rank": 4, "learning_rate": 1e-2}
    finetune(finetune_recipe(hybrid, tmp_path / "run", lora=adapters))
    native.convert(tmp_path / "run" / "model", tmp_path / "stock")
    tuned, stock = (
        load_model(tmp_path / "run" / "model").eval(),
        AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval(),
    )
    require_same(tuned, stock)
    old, new = (load_model(folder).state_dict() for folder in (hybrid, tmp_path / "run" / "model"))
    assert not torch.equal(old["model.layers.0.mlp.up_proj.weight"], new["model.layers.0.mlp.up_proj.weight"])
