# SPDX-License-Identifier: Apache-2.0
"""Every base family, from a checkpoint that stock transformers wrote to a Hybrid that generates."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from hmf.config.layers import base_activation, experts_per_token
from hmf.config.pattern import Pattern
from hmf.data.tokenizer import train_tokenizer
from hmf.errors import HmfError
from hmf.layers.attention import separate
from hmf.layers.own import RECURRENT
from hmf.layers.registry import MIXERS
from hmf.model.checkpoint import load_config, load_model, published_tensors
from hmf.model.convert import attention_layers, drop_teacher, footprint, hybrid_config, hybridise
from hmf.model.families import CANNOT_FIT, FAMILIES, family_of
from hmf.model.modeling import TEACHER, hybrid_classes, logits_of
from hmf.model.register import register
from hmf.model.text_only import require_language_model
from hmf.priming.export import export
from hmf.priming.objectives import Stage1Objective, train_only_mixers
from hmf.priming.stage0 import initialise, make_stage0
from hmf.report.table import print_scores
from hmf.training.losses import CrossEntropy
from tests.hybrids import random_ids, randomise
from tests.numerics import assert_golden, assert_same, widened

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "llama_4_scaling_beta": 0.1,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5}
# Qwen3.5: layers of Gated DeltaNet of its own, with fewer key than value heads.
OWN = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
}
SHARED_EXPERT = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
}
GRANITE = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
}
TWO_TABLES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}


def longrope(pairs: int) -> dict[str, Any]:
    """Phi's rotary positions; pairs: rotated dims of a head, divided by two."""
    short, long = [1.0, 1.1, 1.2, 1.3], [1.0, 2.0, 4.0, 8.0]
    return {"type": "longrope", "short_factor": short[:pairs], "long_factor": long[:pairs]}


# family -> variant -> config fields. The first of each goes through the whole job.
BASES: dict[str, dict[str, dict[str, Any]]] = {
    "gemma2": {
        "no-score-cap": GEMMA | {"attn_logit_softcapping": None, "tie_word_embeddings": True},
        "score-cap": GEMMA | {"final_logit_softcapping": None, "attention_bias": True},
    },
    "gemma3_text": {
        "two-positions": GEMMA | {"rope_parameters": TWO_TABLES, "sliding_window_pattern": 2},
        "former-keys": GEMMA
        | {"rope_theta": 1e6, "rope_local_base_freq": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
        | {"sliding_window_pattern": 3, "num_key_value_heads": 1, "attention_bias": True},
        "capped-logits": GEMMA | {"final_logit_softcapping": 2.0, "tie_word_embeddings": False},
    },
    "granite": {
        "multipliers": GRANITE | {"tie_word_embeddings": True},
        "biases": GRANITE | {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "logits_scaling": 1.0},
    },
    "llama": {
        "llama3-rope": {"rope_parameters": LLAMA3},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "odd-head-dim-tied": {"head_dim": 12, "tie_word_embeddings": True},
        "one-kv-head": {"num_key_value_heads": 1},
        "mha": {"num_key_value_heads": 4},
    },
    "ministral3": {
        "window": {"head_dim": 12, "rope_parameters": YARN, "sliding_window": 5},
        "no-window": {"head_dim": 8, "rope_parameters": YARN, "tie_word_embeddings": True},
    },
    "mistral": {
        "window": {"head_dim": 12, "sliding_window": 5},
        "no-window": {"sliding_window": None, "num_key_value_heads": 1, "tie_word_embeddings": True},
    },
    "olmo2": {
        "gqa": {},
        "biases-mha": {"attention_bias": True, "num_key_value_heads": 4, "head_dim": 12},
    },
    "olmo3": {
        "two-positions": {"rope_parameters": TWO_TABLES, "sliding_window": 5},
        "former-keys": {"rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}, "sliding_window": 5},
    },
    "phi3": {
        "partial": {"partial_rotary_factor": 0.75, "rope_scaling": longrope(3), "original_max_position_embeddings": 64},
        "window": {"sliding_window": 5, "tie_word_embeddings": True},
        "long": {"rope_scaling": longrope(4), "original_max_position_embeddings": 16},
    },
    "qwen2": {
        "windows-above": WINDOW | {"max_window_layers": 2, "tie_word_embeddings": True},
        "one-kv-head": {"num_key_value_heads": 1},
        "mha": {"num_key_value_heads": 4},
    },
    "qwen3": {
        "odd-head-dim": {"head_dim": 12},
        "biases-tied": {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
        "windows-above": WINDOW | {"head_dim": 8, "max_window_layers": 1},
    },
    "qwen3_5_text": {
        "listed": OWN | {"layer_types": ["linear_attention", "full_attention"] * 2},
        "three-to-one-tied": OWN | {"tie_word_embeddings": True},
    },
    "qwen3_5_moe_text": {
        "listed": OWN | SHARED_EXPERT | {"layer_types": ["linear_attention", "full_attention"] * 2},
        "three-to-one": OWN | SHARED_EXPERT,
    },
    "qwen3_moe": {
        "odd-head-dim": EXPERTS | {"head_dim": 12},
        "dense-layers": EXPERTS | {"head_dim": 8, "mlp_only_layers": [1], "attention_bias": True},
        "window": EXPERTS | WINDOW | {"head_dim": 8, "tie_word_embeddings": True},
    },
    "qwen3_next": {
        "listed": OWN
        | SHARED_EXPERT
        | {"layer_types": ["linear_attention", "full_attention"] * 2, "rope_parameters": None, "norm_topk_prob": True},
        "dense-layers": OWN | SHARED_EXPERT | {"mlp_only_layers": [1], "rope_theta": 1e6, "rope_parameters": None},
    },
    "smollm3": {
        "no-positions": {"no_rope_layers": [1, 0] * 4},
        "windows": WINDOW | {"no_rope_layer_interval": 2, "tie_word_embeddings": False, "attention_bias": True},
    },
}
CASES = [(family, variant) for family, variants in BASES.items() for variant in variants]
every_base = pytest.mark.parametrize(("family", "variant"), CASES, ids=["-".join(case) for case in CASES])
every_family = pytest.mark.parametrize(
    ("family", "variant"), [(family, next(iter(variants))) for family, variants in BASES.items()], ids=list(BASES)
)
PATTERN = Pattern.parse("*-GDN-*-GDN")
# Stage 1's loss at the first and the sixth step of `test_the_whole_job`.
GOLDEN_LOSSES = {
    "gemma2": (28.774315, 13.237188),
    "gemma3_text": (30.207842, 14.504164),
    "granite": (0.222321, 0.102268),
    "llama": (3.769546, 1.642005),
    "ministral3": (3.986702, 2.194591),
    "mistral": (4.207959, 1.991053),
    "olmo2": (24.084812, 11.862277),
    "olmo3": (24.771041, 12.703251),
    "phi3": (2.486979, 1.304078),
    "qwen2": (3.041615, 1.438540),
    "qwen3": (3.206824, 1.382357),
    "qwen3_5_text": (13.148182, 5.317542),
    "qwen3_5_moe_text": (18.826698, 7.585496),
    "qwen3_moe": (3.721280, 1.544717),
    "qwen3_next": (21.253546, 10.537250),
    "smollm3": (3.487389, 1.493445),
}


def stock_model(family: str, variant: str, **fields: Any) -> Any:
    """A random model of the family's stock class; norms and biases are random too."""
    row = FAMILIES[family]
    model = row.class_named("ForCausalLM")(row.config_class()(**(SIZES | BASES[family][variant] | fields)))
    randomise(model)
    return model.eval()


def assert_equal(family: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, except for families with recurrent layers of their own: padding goes through our ops there, and on
    some processors the rounding of these models depends on where their tensors lie in memory."""
    if FAMILIES[family].own_recurrence:
        assert_same(found, expected, tolerance=1e-5)
    else:
        assert torch.equal(found, expected)


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def teacher_logits(fused: Any, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    inputs = fused.model.prepare(input_ids=ids, use_cache=False, **given)
    hidden = fused.model.run_layers(inputs.hidden_states, inputs, range(4), TEACHER)
    projected = fused.lm_head(fused.model.norm(hidden))
    return logits_of(fused, projected.flatten(0, 1)).view_as(projected)


def test_every_family_has_its_bases():
    assert BASES.keys() == FAMILIES.keys()


@every_base
@torch.no_grad()
def test_hybrid_of_attention_only_is_the_stock_model(family, variant, tmp_path):
    stock = stock_model(family, variant)
    fused = hybridise(load_model(saved(stock, tmp_path / "base")), Pattern.parse("*-*-*-*"))
    saved(drop_teacher(fused), tmp_path / "hybrid")
    hybrid = load_model(tmp_path / "hybrid")
    ids, mask = random_ids(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[1, :6] = 0
    assert_equal(family, hybrid(ids).logits, stock(ids).logits)
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    padded, expected = hybrid(ids, **given).logits, stock(ids, **given).logits
    assert_equal(family, padded[mask.bool()], expected[mask.bool()])
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    assert hybrid.generate(ids, **settings).tolist() == stock.generate(ids, **settings).tolist()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "hybrid"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def expected_tensors(base: dict[str, torch.Tensor], config: Any) -> dict[str, list[int]]:
    """Names and shapes of the plain Hybrid's tensors, as the format's table has them."""
    size, heads, kv_heads, width = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, 4
    inner, kv = heads * config.head_dim, kv_heads * config.head_dim
    mixer = {
        "q_proj.weight": [inner, size],
        "k_proj.weight": [kv, size],
        "v_proj.weight": [kv, size],
        "o_proj.weight": [size, inner],
        "g_proj.weight": [inner, size],
        "o_norm.weight": [config.head_dim],
        "q_conv1d.weight": [inner, 1, width],
        "k_conv1d.weight": [kv, 1, width],
        "v_conv1d.weight": [kv, 1, width],
        "b_proj.weight": [heads, size],
        "gk_proj.weight": [heads, size],
        "A_log": [heads],
        "dt_bias": [heads],
    }
    replaced = tuple(f"model.layers.{i}.self_attn." for i in PATTERN.replaced)
    kept = {name: list(x.shape) for name, x in base.items() if not name.startswith(replaced)}
    return kept | {f"model.layers.{i}.gdn.{name}": shape for i in PATTERN.replaced for name, shape in mixer.items()}


@every_family
def test_the_whole_job(family, variant, tmp_path):
    stock = stock_model(family, variant)
    make_stage0(saved(stock, tmp_path / "base"), PATTERN, tmp_path / "fused")
    fused, ids = load_model(tmp_path / "fused"), random_ids(2, 17)
    for layer in (fused.model.layers[i] for i in PATTERN.replaced):
        attention = dict(separate(layer.self_attn).named_parameters())
        for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"):
            assert torch.equal(layer.gdn.get_parameter(name), attention[name])
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[1, 13:] = 0
    with torch.no_grad():
        assert_equal(family, teacher_logits(fused, ids), stock(ids).logits)
        padded, expected = teacher_logits(fused, ids, attention_mask=mask), stock(ids, attention_mask=mask).logits
        assert_equal(family, padded[mask.bool()], expected[mask.bool()])

    train_only_mixers(fused)
    fused.train()
    optimiser = torch.optim.AdamW([p for p in fused.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(6):
        loss = fused(input_ids=ids, objective=Stage1Objective("all"))["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert_golden([losses[0], losses[-1]], GOLDEN_LOSSES[family])

    fused.eval()
    saved(fused, tmp_path / "stage1")
    export(tmp_path / "stage1", tmp_path / "hybrid")
    hybrid = load_model(tmp_path / "hybrid")
    base, tensors = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "hybrid"))
    assert {name: list(x.shape) for name, x in tensors.items()} == expected_tensors(base, hybrid.config)
    assert all(torch.equal(base[name], tensors[name]) for name in base.keys() & tensors.keys())
    with torch.no_grad():
        assert_equal(family, hybrid(ids).logits, fused(ids).logits)
        whole = hybrid.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        again = hybrid.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False)
    assert whole.shape == (2, 23)
    assert whole.tolist() == again.tolist()


@every_base
@pytest.mark.usefixtures("in_float64")
@torch.no_grad()
def test_a_window_as_wide_as_the_base_sees_is_the_base(family, variant):
    """A sliding-window layer takes over the base's biases, norms and rotary positions, whatever they are."""
    stock, ids = widened(stock_model(family, variant)), random_ids(1, 40)
    if getattr(stock.config, "attn_logit_softcapping", None) is not None:
        stock.config.name_or_path = "models/gemma"
        why = "models/gemma/config.json: attn_logit_softcapping: 50.0: SWA and B'MOJO-F layers cannot cap"
        for symbol in ("SWA", "BMF"):
            with pytest.raises(HmfError, match=f"^{why}"):
                hybridise(stock, Pattern(("*", symbol, "*", "*")))
        return
    kinds = hybridise(stock, Pattern.parse("*-*-*-*")).config.attention_types
    for kind in set(kinds) - {RECURRENT}:
        pattern = Pattern(("*", *("SWA" if each == kind else "*" for each in kinds[1:])))
        fused = hybridise(stock, pattern, {"swa_config": {"window_size": 5 if kind == "sliding_attention" else 64}})
        initialise(fused)
        hybrid = drop_teacher(fused)
        assert_same(hybrid(ids).logits, stock(ids).logits)
        prompt = hybrid(ids[:, :30], use_cache=True)
        pieces = [prompt.logits]
        for token in ids[:, 30:].split(1, 1):
            pieces.append(hybrid(token, past_key_values=prompt.past_key_values, use_cache=True).logits)
        assert_same(torch.cat(pieces, 1), stock(ids).logits)


@every_family
@pytest.mark.usefixtures("in_float64")
@torch.no_grad()
def test_documents_of_one_row_are_as_alone(family, variant):
    """Packed by positions that restart; a row that is padded on the left is as alone too."""
    small = {"swa_config": {"window_size": 5}}
    stock = widened(stock_model(family, variant))
    places = iter(("GDN", "M2") if FAMILIES[family].own_recurrence else ("GDN", "SWA", "M2"))
    replaced = attention_layers(stock.config)[-3:]
    fused = hybridise(stock, Pattern(tuple(next(places) if i in replaced else "*" for i in range(4))), small)
    initialise(fused)
    hybrid, ids = drop_teacher(fused), random_ids(1, 17)
    first, second = hybrid(ids[:, :6]).logits, hybrid(ids[:, 6:]).logits
    positions = torch.cat([torch.arange(6), torch.arange(11)])[None]
    assert_same(hybrid(ids, position_ids=positions, use_cache=False).logits, torch.cat([first, second], 1))
    padded, mask = torch.zeros(2, 11, dtype=torch.long), torch.ones(2, 11, dtype=torch.long)
    padded[0, 5:], padded[1], mask[0, :5] = ids[0, :6], ids[0, 6:], 0
    both = hybrid(padded, attention_mask=mask).logits
    assert_same((both[:1, 5:], both[1:]), (first, second))


@every_base
@torch.no_grad()
def test_losses_are_those_of_the_family(family, variant):
    """Losses in chunks scale and cap logits as the family's own forward does."""
    stock, ids = stock_model(family, variant), random_ids(2, 9)
    fused = hybridise(stock, Pattern.generate(4, "gdn", layers=attention_layers(stock.config)[-2:]))
    hybrid = drop_teacher(fused)
    randomise(hybrid)
    for model in (stock, hybrid):
        loss = CrossEntropy(chunk_size=4)(model, labels=ids, input_ids=ids)["loss"]
        torch.testing.assert_close(loss, model(ids, labels=ids).loss, atol=1e-5, rtol=1e-5)
    initialise(fused)
    found = fused(input_ids=ids, objective=Stage1Objective("none", kl=1.0, pre_lm_head=0.0))["loss"]
    ours, theirs = drop_teacher(fused)(ids).logits.log_softmax(-1), stock(ids).logits.log_softmax(-1)
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@every_family
@torch.no_grad()
def test_a_head_of_its_own_and_every_bit_are_kept(family, variant, tmp_path):
    """A config that says tied, and bfloat16, of files with another head in float32."""
    stock = stock_model(family, variant)
    saved(stock, tmp_path / "base")
    file = tmp_path / "base/config.json"
    config = json.loads(file.read_text()) | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    config.pop("dtype")
    file.write_text(json.dumps(config))
    weights = tmp_path / "base/model.safetensors"
    tensors = load_file(weights) | {"lm_head.weight": torch.randn(61, 32)}
    save_file(tensors, weights, {"format": "pt"})
    make_stage0(tmp_path / "base", PATTERN, tmp_path / "fused")
    export(tmp_path / "fused", tmp_path / "hybrid")
    replaced = tuple(f"model.layers.{index}.self_attn." for index in PATTERN.replaced)
    for folder, dropped in (("fused", ()), ("hybrid", replaced)):
        kept = load_file(tmp_path / folder / "model.safetensors")
        assert json.loads((tmp_path / folder / "config.json").read_text()).get("tie_word_embeddings") is not True
        for name in (name for name in tensors if not dropped or not name.startswith(dropped)):
            assert kept[name].dtype == torch.float32 and torch.equal(kept[name], tensors[name])


@pytest.mark.parametrize(
    ("family", "fields"),
    [(name, {}) for name in ("granite", "gemma3_text", "olmo2", "phi3")] + [("olmo2", {"num_key_value_heads": 1})],
)
@torch.no_grad()
def test_mamba2_starts_from_what_the_attention_computes(family, fields):
    """Its B and C are the base's keys and queries, with its norms and scale, up to a norm per head."""
    stock = stock_model(
        family, {"granite": "multipliers", "olmo2": "biases-mha"}.get(family, next(iter(BASES[family]))), **fields
    )
    for layer in stock.model.layers:
        for name, bias in layer.self_attn.named_parameters():
            if name.endswith("bias"):
                bias.zero_()
    fused = hybridise(stock, Pattern.parse("*-M2-*-M2"))
    initialise(fused)
    layer, x = fused.model.layers[1], torch.randn(1, 5, 32)
    _, conv, _ = layer.mamba.project(x, None)
    _, keys, queries = layer.mamba.streams(conv)
    given = dict(separate(layer.self_attn).named_parameters())
    head_dim, found = layer.self_attn.head_dim, []
    for name in "qk":
        y, norm = x @ given[f"{name}_proj.weight"].T, getattr(layer.self_attn, f"{name}_norm", None)
        if norm is not None and norm.weight.numel() != head_dim:  # over all heads
            y, norm = y * norm.weight, torch.nn.RMSNorm(head_dim, eps=1e-6)
        y = y.unflatten(-1, (-1, head_dim))
        found.append(y if norm is None else norm(y))
    q, k = found
    torch.testing.assert_close(keys, k, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(queries, q * layer.self_attn.scaling * head_dim**0.5, atol=1e-5, rtol=1e-5)


@every_family
def test_every_layer_type_at_once(family, variant, tmp_path):
    row = FAMILIES[family]
    fields = SIZES | BASES[family][variant] | {"num_hidden_layers": len(MIXERS) + 1}
    pattern = Pattern(("*", *MIXERS))
    if row.own_recurrence:
        fields["layer_types"] = ["linear_attention"] + ["full_attention"] * len(MIXERS)
    stock = row.class_named("ForCausalLM")(row.config_class()(**fields))
    randomise(stock)
    small = {"swa_config": {"window_size": 5}, "bmojo_config": {"window_size": 5, "ssm_mixer": "gdn"}}
    make_stage0(saved(stock, tmp_path / "base"), pattern, tmp_path / "fused", small)
    hybrid = export(tmp_path / "fused", tmp_path / "hybrid").eval()
    reloaded, ids = load_model(tmp_path / "hybrid"), random_ids(2, 11)
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, hybrid(ids).logits)
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        whole = reloaded.generate(ids, **settings)
        assert whole.tolist() == reloaded.generate(ids, **settings, use_cache=False).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_published_config(family, tmp_path):
    variant = next(iter(BASES[family]))
    model = drop_teacher(hybridise(stock_model(family, variant), PATTERN))
    written = json.loads((saved(model, tmp_path) / "config.json").read_text())
    assert written["model_type"] == f"hybrid_{family}"
    assert written["architectures"] == [f"Hybrid{FAMILIES[family].prefix}ForCausalLM"]
    assert written["hybrid_override_pattern"] == "*-GDN-*-GDN"
    assert written.get("layer_types") == (None if family == "ministral3" else ["*", "GDN", "*", "GDN"])
    assert written["gdn_config"]["head_dim"] == written["head_dim"] == model.config.head_dim
    if family == "qwen3_moe":
        assert written["num_local_experts"] == 4
        assert "num_experts" not in written


def test_windows_of_replaced_layers_are_the_base_ones():
    fused = hybridise(stock_model("qwen2", "windows-above"), PATTERN)
    assert fused.config.attention_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert [layer.self_attn.sliding_window for layer in fused.model.layers] == [None, None, 5, 5]


def test_windows_without_a_rule_are_refused():
    row = FAMILIES["qwen2"]
    kinds = ["sliding_attention", "full_attention"] * 2
    config = row.config_class()(**SIZES, **WINDOW, max_window_layers=4, layer_types=kinds)
    with pytest.raises(HmfError, match="layer_types .* differs from .*, which follows from the other keys"):
        hybridise(row.class_named("ForCausalLM")(config), PATTERN)


@pytest.mark.parametrize("legacy", [False, True], ids=["rope_parameters", "rope_scaling"])
@torch.no_grad()
def test_llama3_rope_scaling(legacy, tmp_path):
    """Both spellings of the scaling in a base's config.json reach the Hybrid, and they matter."""
    stock = stock_model("llama", "llama3-rope")
    saved(stock, tmp_path / "base")
    file = tmp_path / "base/config.json"
    if legacy:
        config = json.loads(file.read_text())
        scaling = config.pop("rope_parameters")
        file.write_text(json.dumps(config | {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}))
    saved(drop_teacher(hybridise(load_model(tmp_path / "base"), PATTERN)), tmp_path / "hybrid")
    hybrid = load_model(tmp_path / "hybrid")
    assert hybrid.config.rope_parameters == LLAMA3
    assert torch.equal(hybrid.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)
    assert not torch.equal(hybrid.model.rotary_emb.inv_freq, stock_model("llama", "mha").model.rotary_emb.inv_freq)


@torch.no_grad()
def test_bmojo_scales_queries_only_where_its_config_says_so(tmp_path):
    """New layers on a base that scales them do, and write the key; published checkpoints do not have it."""
    stock, options = stock_model("ministral3", "no-window"), {"bmojo_config": {"window_size": 4, "ssm_mixer": "gdn"}}
    stock.config.rope_parameters["original_max_position_embeddings"] = 4
    fused = hybridise(stock, Pattern.parse("*-BMF-*-GDN"), options)
    initialise(fused)
    saved(drop_teacher(fused), tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "published")
    file = tmp_path / "published/config.json"
    config = json.loads(file.read_text())
    assert config["bmojo_config"].pop("scale_queries") is True
    file.write_text(json.dumps(config))
    new, published = load_model(tmp_path / "new"), load_model(tmp_path / "published")
    ids = random_ids(1, 30)
    assert torch.equal(new(ids[:, :4]).logits, published(ids[:, :4]).logits)
    assert (new(ids).logits - published(ids).logits).abs().max() > 1e-3
    new.model.layers[1].bmojo_f.growth = None  # and nothing else differs
    assert torch.equal(new(ids).logits, published(ids).logits)
    saved(published, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["bmojo_config"] == config["bmojo_config"]
    refused = {"bmojo_config": options["bmojo_config"] | {"scale_queries": False}}
    assert not hybridise(stock, Pattern.parse("*-BMF-*-GDN"), refused).model.layers[1].bmojo_f.options.scale_queries
    plain = hybridise(stock_model("qwen3", "odd-head-dim"), Pattern.parse("*-BMF-*-GDN"), options)
    assert "scale_queries" not in plain.config.to_dict()["bmojo_config"]


def test_queries_grow_in_no_other_family():
    """Whatever keys a config holds: the family's own attention decides."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 1.0}
    rope["original_max_position_embeddings"] = 2
    row = FAMILIES["llama"]
    torch.manual_seed(0)
    stock = row.class_named("ForCausalLM")(row.config_class()(**SIZES, rope_parameters=rope)).eval()
    fused = hybridise(stock, Pattern.parse("*-SWA-*-SWA"), {"swa_config": {"window_size": 64}})
    initialise(fused)
    ids = random_ids(1, 30)
    torch.testing.assert_close(drop_teacher(fused)(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)


def test_windows_that_the_family_does_not_know_are_none():
    """Llama's attention reads no `sliding_window`, so a Hybrid's does not either."""
    row = FAMILIES["llama"]
    stock = row.class_named("ForCausalLM")(row.config_class()(**SIZES, sliding_window=3)).eval()
    same = drop_teacher(hybridise(stock, Pattern.parse("*-*-*-*")))
    ids = random_ids(1, 30)
    assert torch.equal(same(ids).logits, stock(ids).logits)


@pytest.mark.parametrize(
    ("family", "before", "after"), [("phi3", None, 3), ("mistral", 5, None), ("ministral3", 5, 2), ("qwen2", 5, 3)]
)
@torch.no_grad()
def test_a_window_that_is_given_at_the_load_is_the_bases(family, before, after, tmp_path):
    """And one that is set later, when the types of layers are known, is refused if they would be others."""
    stock, ids = stock_model(family, next(iter(BASES[family])), sliding_window=before), random_ids(1, 17)
    saved(stock, tmp_path / "base")
    saved(drop_teacher(hybridise(stock, Pattern.parse("*-*-*-*"))), tmp_path / "hybrid")
    base, hybrid = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, sliding_window=after) for name in ("base", "hybrid")
    )
    assert torch.equal(hybrid(ids).logits, base(ids).logits)
    assert not torch.equal(hybrid(ids).logits, stock(ids).logits)
    assert (
        hybrid.generate(ids, max_new_tokens=4).tolist()
        == hybrid.generate(ids, max_new_tokens=4, use_cache=False).tolist()
    )
    config = CONFIG_MAPPING[f"hybrid_{family}"].from_pretrained(tmp_path / "hybrid")
    config.sliding_window = after
    if None in (before, after):
        with pytest.raises(HmfError, match=f"sliding_window: {after}: was set on a finished config"):
            AutoModelForCausalLM.from_config(config)
    else:
        later = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", config=config)
        assert torch.equal(later(ids).logits, base(ids).logits)


def test_no_experts_where_every_layer_has_them(tmp_path):
    saved(stock_model("qwen3_5_moe_text", "listed"), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"num_experts": 0}))
    with pytest.raises(HmfError, match=r"config.json: num_experts: 0: this family has experts in every layer"):
        load_config(tmp_path)


def test_keys_of_other_families_have_no_effect(tmp_path):
    """Each by itself: they make no experts, and no recurrent layers, of a base that has none."""
    others = {name: value for row in FAMILIES.values() for name, value in row.config_class()().to_dict().items()}
    shared = {*PreTrainedConfig().to_dict(), "partial_rotary_factor"}  # transformers reads them in every family
    others = {name: value for name, value in others.items() if name not in shared}
    saved(stock_model("qwen3", "odd-head-dim"), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    expected = hybrid_config(load_config(tmp_path), PATTERN).to_dict()
    assert {"num_experts", "linear_num_value_heads", "no_rope_layers"} <= (new := others.keys() - content.keys())
    for name in sorted(new):
        given = {name: 2 if type(others[name]) is int else others[name]}
        (tmp_path / "config.json").write_text(json.dumps(content | given))
        config = hybrid_config(load_config(tmp_path), PATTERN)
        assert config.to_dict() | given == expected | given, name
        assert experts_per_token(config) == 0 and base_activation(config) == "silu", name


@torch.no_grad()
def test_router_outputs_and_balance_loss():
    stock, ids = stock_model("qwen3_moe", "odd-head-dim"), random_ids(2, 9)
    attention = drop_teacher(hybridise(stock, Pattern.parse("*-*-*-*")))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    given = {"labels": labels, "attention_mask": mask, "output_router_logits": True}
    ours, theirs = attention(ids, **given), stock(ids, **given)
    assert torch.equal(ours.aux_loss, theirs.aux_loss)
    assert torch.equal(ours.loss, theirs.loss)
    real = mask.flatten().bool()
    assert all(torch.equal(a[real], b[real]) for a, b in zip(ours.router_logits, theirs.router_logits, strict=True))
    hybrid = drop_teacher(hybridise(stock, PATTERN))
    randomise(hybrid)
    with torch.enable_grad():
        output = hybrid(ids, labels=ids, output_router_logits=True)
        output.aux_loss.backward()
    assert [x.shape for x in output.router_logits] == [(18, 4)] * 4
    assert hybrid.model.layers[1].gdn.v_proj.weight.grad.abs().max() > 0  # the next layers' routers depend on it


def test_experts_run_as_in_the_stock_model(monkeypatch):
    """transformers' fast path for experts, whatever was loaded before; its plain loop where that knows no float64."""
    config = hybridise(stock_model("qwen3_moe", "odd-head-dim"), PATTERN).config
    hybrid_class = hybrid_classes(FAMILIES["qwen3_moe"]).causal_lm
    for cls in hybrid_class.__mro__:  # what loading a stock model leaves behind
        if "_can_set_experts_implementation_cached_value" in vars(cls):
            monkeypatch.delattr(cls, "_can_set_experts_implementation_cached_value")
    assert hybrid_class._from_config(config).config._experts_implementation == "grouped_mm"
    wide = hybrid_class._from_config(config, dtype=torch.float64)
    assert wide.config._experts_implementation == "eager"
    assert wide(random_ids(1, 3)).logits.dtype == torch.float64


EXPERT = "model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


def damaged(change: str, tensors: dict[str, torch.Tensor]) -> str:
    """Make one change in place; returns the line that must come out of it."""
    one = EXPERT.format(layer=1, expert=2, part="gate")
    whole = [EXPERT.format(layer=1, expert=2, part=part) for part in ("gate", "up", "down")]
    if change == "missing":
        del tensors[one]
        return f"tensors missing: {one}"
    if change == "renamed":
        tensors[one.replace("gate_proj", "gate_prj")] = tensors.pop(one)
        return f"has no tensor {one}, but has {one.replace('gate_proj', 'gate_prj')}; check whether it was renamed"
    if change == "renumbered":  # four experts still, in another order
        for name in whole:
            tensors[name.replace("experts.2", "experts.9")] = tensors.pop(name)
        return f"has no tensor {whole[2]}, but has {whole[2].replace('experts.2', 'experts.9')}; check whether"
    if change == "extra":
        tensors |= {name.replace("experts.2", "experts.4"): tensors[name].clone() for name in whole}
        return f"tensors not of this model: {whole[2].replace('experts.2', 'experts.4')}"
    if change == "misshapen":
        tensors[one] = tensors[one][1:].contiguous()
        return f"tensors of another shape: {one} (has shape [7, 32], must have [8, 32])"
    raise AssertionError(change)


@pytest.mark.parametrize("kind", ["base", "hybrid"])
@pytest.mark.parametrize("change", ["missing", "renamed", "renumbered", "extra", "misshapen"])
def test_every_expert_tensor_is_accounted_for_by_its_published_name(kind, change, tmp_path):
    model = stock_model("qwen3_moe", "odd-head-dim")
    saved(drop_teacher(hybridise(model, PATTERN)) if kind == "hybrid" else model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert EXPERT.format(layer=0, expert=3, part="down") in tensors
    said = damaged(change, tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(HmfError, match=re.escape(f"{tmp_path}: {said}")):
        load_model(tmp_path)
    if kind == "hybrid":
        with pytest.raises(HmfError, match=re.escape(said)):
            AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [None, "missing", "both", "misshapen"])
def test_experts_may_be_stored_merged(change, tmp_path):
    """As published for Qwen3.5-MoE. A Hybrid is written with one tensor an expert."""
    stock, ids = stock_model("qwen3_5_moe_text", "listed"), random_ids(1, 9)
    saved(stock, tmp_path / "base")
    tensors = published_tensors(stock, set(stock.state_dict()))
    one, merged = (EXPERT.format(layer=1, expert=2, part="gate"), "model.layers.1.mlp.experts.gate_up_proj")
    if change == "missing":
        del tensors[merged]
    elif change == "both":
        tensors[one] = tensors[merged][2, :8].clone()
    elif change == "misshapen":
        tensors[merged] = tensors[merged][:3].contiguous()
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    if change is not None:
        said = {
            "missing": "tensors missing: model.layers.1.mlp.experts.0.gate_proj.weight",
            "both": f"tensors not of this model: {one}",
            "misshapen": f"tensors of another shape: {merged} (has shape [3, 16, 32], must have [4, 16, 32])",
        }[change]
        with pytest.raises(HmfError, match=re.escape(said)):
            load_model(tmp_path / "base")
        return
    make_stage0(tmp_path / "base", Pattern.parse("*-GDN-*-*"), tmp_path / "fused")
    with torch.no_grad():
        assert torch.equal(teacher_logits(load_model(tmp_path / "fused"), ids), stock(ids).logits)
    assert one in load_file(tmp_path / "fused/model.safetensors")


@every_family
@pytest.mark.parametrize("change", ["missing", "extra"])
def test_every_tensor_is_accounted_for(family, variant, change, tmp_path):
    saved(drop_teacher(hybridise(stock_model(family, variant), PATTERN)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        name = next(name for name in reversed(tensors) if name.startswith("model.layers.0.") and "norm" not in name)
        del tensors[name]
        said = f"tensors missing: {name}"
    else:
        tensors["model.layers.1.gdn.q_proj.bias"] = torch.zeros(32)
        said = "tensors not of this model: model.layers.1.gdn.q_proj.bias"
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(HmfError, match=re.escape(f"{tmp_path}: {said}")):
        load_model(tmp_path)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["It's the year 2024, isn't it?\n"] * 4, 280, "", 64).save_pretrained(path)
    return path


@pytest.mark.parametrize("named", [None, "TokenizersBackend", "LlamaTokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_is_the_base_ones(family, named, tokenizer_dir, tmp_path):
    """Whatever class the files name, or none: a Hybrid reads them as its base does."""
    row, read = FAMILIES[family], []
    for name, config_class in (("base", row.config_class()), ("hybrid", hybrid_classes(row).config)):
        folder = tmp_path / name
        shutil.copytree(tokenizer_dir, folder)
        config_class().save_pretrained(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("tokenizer_class")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config | ({"tokenizer_class": named} if named else {}))
        )
        read.append(AutoTokenizer.from_pretrained(folder))
    assert type(read[0]) is type(read[1])
    base, hybrid = (_encoded(tokenizer, "It's 2024:\n\n  isn't  it?") for tokenizer in read)
    assert base == hybrid


def _encoded(tokenizer: Any, text: str) -> list[int] | str:
    """Its tokens; or the error of Gemma's default class, for which these files lack <unk>."""
    try:
        return tokenizer(text)["input_ids"]
    except Exception as error:
        return str(error)


def test_another_family_is_refused(tmp_path):
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    saved(Starcoder2ForCausalLM(Starcoder2Config(**SIZES)), tmp_path / "base")
    with pytest.raises(HmfError, match=r"model_type 'starcoder2' is not among .*docs/families\.md has the conditions"):
        make_stage0(tmp_path / "base", Pattern.parse("GDN"), tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_the_footprint_of_another_model_is_its_parameters(capsys):
    """Of layers that are not known here, neither the cache's size nor the states' can be told."""
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=8, num_hidden_layers=1))
    assert footprint(model) == {"parameters": model.num_parameters()}
    print_scores({"mamba": {"tasks": {}, "footprint": footprint(model)}})
    assert re.search(r"mamba +│ +[\d,]+ │ +- │ +- │", capsys.readouterr().out)


def test_a_wrapper_without_a_language_model_is_refused_by_its_own_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma4_assistant", "text_config": None}))
    with pytest.raises(HmfError, match="model_type 'gemma4_assistant' is not among the supported families"):
        require_language_model(load_config(tmp_path, weights=False))


@pytest.mark.parametrize("name", [name for names in CANNOT_FIT.values() for name in names])
def test_a_model_whose_layers_do_not_fit_is_refused_with_the_reason(name):
    assert name in CONFIG_MAPPING and name not in FAMILIES
    (why,) = [why for why, names in CANNOT_FIT.items() if name in names]
    with pytest.raises(
        HmfError, match=f"base/config.json: model_type '{name}' cannot be a base, because .* have {why}"
    ):
        family_of(name, "base/config.json")


def test_the_example_of_adding_a_family(tmp_path):
    """The block of docs/families.md as it stands there, and then a Hybrid of that family."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/families.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) < 30
    added: dict[str, Any] = {}
    before = set(FAMILIES)
    try:
        exec(compile(code, "docs/families.md", "exec"), added)
        (name,) = set(FAMILIES) - before
        make_stage0(saved(added["stock"], tmp_path / "base"), PATTERN, tmp_path / "fused")
        hybrid, ids = export(tmp_path / "fused", tmp_path / "hybrid"), random_ids(2, 9)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
        assert torch.equal(reloaded(ids).logits, hybrid(ids).logits)
        assert reloaded.generate(ids, max_new_tokens=3).shape[1] > 9
        assert reloaded.config.model_type == f"hybrid_{name}"
    finally:
        for name in set(FAMILIES) - before:
            del FAMILIES[name]
        register()


own_recurrences = pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.own_recurrence])


@own_recurrences
@torch.no_grad()
def test_recurrences_of_the_base_are_cast_loaded_and_pickled_as_mixers_are(family, tmp_path):
    """Their decays stay in float32."""
    hybrid, ids = drop_teacher(hybridise(stock_model(family, "listed"), PATTERN)), random_ids(1, 9)
    randomise(hybrid)
    assert torch.equal(pickle.loads(pickle.dumps(hybrid))(ids).logits, hybrid(ids).logits)
    loaded = AutoModelForCausalLM.from_pretrained(saved(hybrid, tmp_path), dtype=torch.bfloat16)
    decays = [f"model.layers.{index}.linear_attn.{name}" for index in (0, 2) for name in ("A_log", "dt_bias")]
    kept = [hybrid.get_parameter(name).clone() for name in decays]
    cast = hybrid.bfloat16()
    for model in (loaded, cast):
        assert all(torch.equal(model.get_parameter(name), x) for name, x in zip(decays, kept, strict=True))
    assert loaded.get_parameter("model.layers.0.linear_attn.out_proj.weight").dtype == torch.bfloat16


REFUSED_CONFIGS = {
    "short": ({"base_layer_types": [RECURRENT, "full_attention"]}, "base_layer_types: .* each of the 4 layers"),
    "unknown": (
        {"base_layer_types": [RECURRENT] * 3 + ["sliding_attention"]},
        "base_layer_types: .* or full_attention",
    ),
    "no list": ({"base_layer_types": RECURRENT}, "base_layer_types: linear_attention: must be a list"),
    "no key heads": ({"linear_num_key_heads": 0}, "linear_num_key_heads: 0 is not"),
    "no filter": ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim: 0 is not"),
    "no interval": ({"full_attention_interval": 0}, "full_attention_interval: 0 is not"),
    "no gate": ({"attn_output_gate": False}, "attn_output_gate: False: must be true"),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_layers_that_a_base_with_recurrences_cannot_have_are_refused(case, tmp_path):
    change, why = REFUSED_CONFIGS[case]
    file = saved(drop_teacher(hybridise(stock_model("qwen3_5_text", "listed"), PATTERN)), tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(HmfError, match=f"^{file}: {why}"):
        load_model(tmp_path)


def test_a_base_without_recurrences_lists_none(tmp_path):
    file = saved(drop_teacher(hybridise(stock_model("qwen3", "odd-head-dim"), PATTERN)), tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_layer_types": ["full_attention"] * 4}))
    with pytest.raises(HmfError, match=f"^{file}: base_layer_types: all layers of Qwen3 are attention; remove the key"):
        load_model(tmp_path)


def test_tensors_of_multi_token_prediction_are_named(tmp_path, capfd):
    """transformers passes over them without a word."""
    saved(stock_model("qwen3_5_text", "listed"), tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.zeros(2)}, tmp_path / "base/model.safetensors", {"format": "pt"})
    report = make_stage0(tmp_path / "base", PATTERN, tmp_path / "fused")
    assert report.kept == len(tensors)
    assert f"{tmp_path}/base: not read, and not in the Hybrid: mtp.fc.weight" in capfd.readouterr().err
