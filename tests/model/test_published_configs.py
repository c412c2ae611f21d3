# SPDX-License-Identifier: Apache-2.0
"""Configs with the keys of published checkpoints, shrunk: what they say about the computation holds in a Hybrid."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hmf.config.pattern import Pattern
from hmf.errors import HmfError
from hmf.model.checkpoint import load_config, load_model
from hmf.model.convert import drop_teacher, hybridise
from hmf.priming.stage0 import base_config, initialise
from tests.hybrids import random_ids, randomise

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
COMMON = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "transformers_version": "4.50.0"}
GEMMA = {
    "attention_bias": False,
    "cache_implementation": "hybrid",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 12,
    "rms_norm_eps": 1e-06,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
}
# Lengths are a thousandth or so of the published ones, and so are windows.
PUBLISHED = {
    "Mistral 7B 0.1": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4,
        "tie_word_embeddings": False,
    },
    "Mistral NeMo": {
        "model_type": "mistral",
        "head_dim": 12,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "SmolLM3": {
        "model_type": "smollm3",
        "attention_bias": False,
        "hidden_act": "silu",
        "layer_types": ["full_attention"] * 8,
        "max_position_embeddings": 64,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0],
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "OLMo 2": {
        "model_type": "olmo2",
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
    },
    "OLMo 3": {
        "model_type": "olmo3",
        "attention_bias": False,
        "hidden_act": "silu",
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 4,
        "tie_word_embeddings": False,
    },
    "Granite 3.3": {
        "model_type": "granite",
        "attention_bias": False,
        "attention_multiplier": 0.0625,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "logits_scaling": 16.0,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
    },
    "Phi-3 mini": {
        "model_type": "phi3",
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 5,
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
    "Phi-4 mini": {
        "model_type": "phi3",
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "full_attn_mod": 1,
        "hidden_act": "silu",
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "original_max_position_embeddings": 12,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [1, 1.5, 9.0], "short_factor": [1, 1.0, 1.1], "type": "longrope"},
        "rope_theta": 10000.0,
        "sliding_window": 256,
        "tie_word_embeddings": True,
    },
    "Gemma 2": GEMMA
    | {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
    "Gemma 3 1B": GEMMA
    | {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "eos_token_id": [1, 2],
        "final_logit_softcapping": None,
        "max_position_embeddings": 64,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window_pattern": 6,
    },
    "Gemma 3 12B, text": GEMMA
    | {
        "model_type": "gemma3_text",
        "max_position_embeddings": 128,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000.0,
        "sliding_window_pattern": 6,
    },
}


@pytest.fixture
def folder(request, tmp_path):
    """A checkpoint with the published keys and random weights."""
    fields = COMMON | SIZES | PUBLISHED[request.param]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    randomise(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields))  # as published again
    return tmp_path


@pytest.mark.parametrize("folder", PUBLISHED, indirect=True)
@torch.no_grad()
def test_a_published_config(folder, tmp_path, capfd):
    """transformers' own reading of it is the Hybrid's, before and after it is saved; and a Hybrid generates."""
    stock, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), random_ids(2, 17)
    assert base_config(folder).num_hidden_layers == 8
    own_code = "auto_map" in json.loads((folder / "config.json").read_text())
    assert ("auto_map: the code that it names is not run" in capfd.readouterr().err) == own_code
    same = drop_teacher(hybridise(load_model(folder), Pattern(("*",) * 8)))
    same.save_pretrained(tmp_path / "same")
    again = load_model(tmp_path / "same")
    assert not hasattr(again.config, "auto_map")
    assert torch.equal(again(ids).logits, stock(ids).logits)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert again.generate(ids, **settings).tolist() == stock.generate(ids, **settings).tolist()
    fused = hybridise(load_model(folder), Pattern(("*", "GDN", "*", "M2") * 2))
    initialise(fused)
    hybrid = drop_teacher(fused)
    assert hybrid.generate(ids, **settings).tolist() == hybrid.generate(ids, **settings, use_cache=False).tolist()


@pytest.mark.parametrize("folder", ["Phi-4 mini"], indirect=True)
@torch.no_grad()
def test_generation_across_the_length_before_scaling(folder):
    """Phi changes its positions there, and its cache is computed anew; so are a Hybrid's states."""
    stock, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), random_ids(1, 10)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    same = drop_teacher(hybridise(stock, Pattern(("*",) * 8)))
    assert same.generate(ids, **settings).tolist() == stock.generate(ids, **settings, use_cache=False).tolist()
    fused = hybridise(stock, Pattern(("*", "GDN", "SWA", "*") * 2), {"swa_config": {"window_size": 4}})
    initialise(fused)
    hybrid = drop_teacher(fused)
    assert hybrid.generate(ids, **settings).tolist() == hybrid.generate(ids, **settings, use_cache=False).tolist()


@pytest.mark.parametrize("folder", ["Phi-4 mini"], indirect=True)
@torch.no_grad()
def test_a_cache_does_not_cross_the_length_before_scaling(folder):
    """The positions in the cache would be others than in the whole text: steps up to it or beyond it, none across."""
    model, ids = drop_teacher(hybridise(load_model(folder), Pattern(("*", "GDN") * 4))), random_ids(1, 16)
    randomise(model)
    for past in (9, 11, 12, 13):
        for end in (past + 1, 12, 13, 16):
            cache = model(ids[:, :past], use_cache=True).past_key_values
            if past <= 12 < end:
                with pytest.raises(HmfError, match="longrope's positions for at most 12 tokens.*without a cache"):
                    model(ids[:, past:end], past_key_values=cache)
            elif past < end:
                found = model(ids[:, past:end], past_key_values=cache).logits
                torch.testing.assert_close(found, model(ids[:, :end]).logits[:, past:], atol=3e-5, rtol=1e-5)
    with pytest.raises(HmfError, match="longrope's positions"):
        model.generate(ids, prefill_chunk_size=5, max_new_tokens=2)


TABLE = {"rope_type": "default", "rope_theta": 1e4}
REFUSED = [
    ("Gemma 3 1B", {"use_bidirectional_attention": True}, "use_bidirectional_attention: mixers are causal"),
    ("Gemma 3 1B", {"sliding_window": None}, "sliding_window: None is needed by sliding_attention layers"),
    ("Gemma 3 1B", {"layer_types": ["full_attention"] * 8}, "layer_types .* differs from"),
    ("Gemma 3 1B", {"hidden_activation": "gelu_tan"}, "unknown hidden_activation 'gelu_tan'"),
    ("Gemma 3 1B", {"query_pre_attn_scalar": -20}, "query_pre_attn_scalar: -20 is not a positive number"),
    ("Gemma 3 1B", {"rope_local_base_freq": 0}, "rope_local_base_freq"),
    ("Gemma 3 1B", {"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor: is missing"),
    (
        "Gemma 3 12B, text",
        {"rope_parameters": {"full_attention": TABLE, "sliding_attention": TABLE}},
        "rope_scaling: the config has rope_parameters too",
    ),
    (
        "Gemma 3 1B",
        {"rope_parameters": TABLE, "rope_theta": None},
        r"rope_parameters\.rope_theta: Gemma3 has positions for each type",
    ),
    (
        "Mistral NeMo",
        {"rope_parameters": TABLE, "rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": None},
        "rope_scaling: the config has rope_parameters too, and transformers would read nothing of it",
    ),
    (
        "Mistral NeMo",
        {"rope_parameters": TABLE},
        "rope_theta: 1000000.0 is not read, because rope_parameters has 10000.0",
    ),
    (
        "OLMo 3",
        {"rope_scaling": None, "rope_parameters": {"full_attention": None}},
        "full_attention: None is not a table",
    ),
    (
        "OLMo 3",
        {"rope_scaling": None, "rope_parameters": {"sliding_attention": TABLE | {"rope_theta": -1.0}}},
        r"rope_parameters\.sliding_attention\.rope_theta",
    ),
    ("OLMo 3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type: 'linear' is not read .*rename"),
    ("Gemma 3 12B, text", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type: 'yarn' is not read"),
    ("OLMo 3", {"layer_types": ["chunked_attention"] * 8}, "layer_types: 'chunked_attention' is not one of full_att"),
    ("Gemma 2", {"layer_types": ["full_attention", "chunked_attention"] * 4}, "layer_types: 'chunked_attention' is"),
    ("SmolLM3", {"layer_types": ["attention", "mamba"] * 4}, "layer_types: 'mamba' is not one of full_attention, sli"),
    ("Mistral NeMo", {"layer_types": ["full_attention"] * 8}, "layer_types: .* reads model_type 'mistral' as 'minist"),
    ("Granite 3.3", {"output_attentions": True}, "output_attentions: transformers saves no such model"),
    ("OLMo 2", {"torch_dtype": "torch.bfloat16"}, "torch_dtype: 'torch.bfloat16' is not one of float64, flo"),
    ("Phi-3 mini", {"dtype": "auto"}, "dtype: 'auto' is not one of float64, float32, float16, bfloat16; give"),
    ("Phi-3 mini", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype: 'float8_e4m3fn' is not one of float64"),
    ("Phi-3 mini", {"dtype": "float16"}, "dtype 'float16' and torch_dtype 'float32' disagree; remove one"),
    ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers: has 2 entries for 8 layers"),
    ("SmolLM3", {"layer_types": ["sliding_attention"] * 8, "sliding_window": 5}, "layer_types .* differs from"),
    ("Granite 3.3", {"attention_multiplier": math.nan}, "attention_multiplier: nan is not a positive number"),
    ("Granite 3.3", {"logits_scaling": 0}, "logits_scaling: 0 is not a positive number"),
    ("Mistral 7B 0.1", {"sliding_window": 0}, "sliding_window: 0 masks every token"),
    ("Mistral 7B 0.1", {"sliding_window": 1}, "sliding_window: 1 is not supported by the caches"),
    ("Mistral NeMo", {"head_dim": 7}, "head_dim: 7: rotary positions need an even number"),
    ("OLMo 2", {"head_dim": None}, "head_dim: null: transformers takes it for a size; remove the key"),
    ("Phi-4 mini", {"head_dim": None}, "head_dim: null"),
    ("OLMo 2", {"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads, 4"),
    ("OLMo 2", {"decoder_sparse_step": 0}, "decoder_sparse_step: 0 is not a whole number from 1"),
    ("Phi-4 mini", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "long_factor: is missing"),
    ("Phi-4 mini", {"partial_rotary_factor": 0.5}, "short_factor field must have length 2"),
    *(
        (
            "Phi-4 mini",
            {"rope_scaling": {"type": kind, "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}},
            f"rope_type: '{kind}' is a former name of longrope in Phi-3; write longrope",
        )
        for kind in ("su", "yarn")
    ),
]


@pytest.mark.parametrize(("folder", "change", "said"), REFUSED, indirect=["folder"], ids=str)
def test_keys_that_cannot_be_used_are_refused_by_name(folder, change, said):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(HmfError, match=said):
        hybridise(AutoModelForCausalLM.from_config(load_config(folder)), Pattern(("*", "GDN") * 4))
