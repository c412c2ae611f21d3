# SPDX-License-Identifier: Apache-2.0
"""Every layer type, every option of it that changes tensors or states, every family and mixes of types in vLLM.

Each case is one engine: prompts that are prefilled in chunks beside others that decode, then the same from the prefix
cache, against Hugging Face.
"""

import copy
import sys
import types

import pytest
import torch

from hmf.config.layers import LAYER_KINDS
from hmf.errors import HmfError
from hmf.layers.bmojo import INNER_MIXERS
from hmf.layers.own import RECURRENT
from tests import numerics
from tests.hybrids import OPTIONS, Case, randomise, tiny_config
from tests.serving import engines
from tests.serving.quantised import quantise

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TOKENS = 12
LENGTHS = [1, 5, 70, 290]
GKA, M2, BMF = OPTIONS["GKA"], OPTIONS["M2"], OPTIONS["BMF"]
BARE = {"use_short_conv": False, "use_gate": False, "allow_neg_eigval": True, "norm_eps": 1e-3}
LOW_RANK = {"kv_proj_rank": 6, "conv_bias": True, "conv_size": 3}
DICTS = {"swa_config": {"window_size": 7}, "bmojo_config": {"window_size": 9, "ssm_mixer": "gdn"}}

CASES = {
    "GDN-bare": (Case("GDN", "bare", options=BARE), "X-*-X", {}),
    "GDN-low-rank": (Case("GDN", "low-rank", options=LOW_RANK), "X-*-X", {}),
    "GDN-learnable-residual": (Case("GDN", "mixing", options=OPTIONS["GDN"]["learnable-residual"]), "X-*-X", {}),
    "GDN-one-kv-head": (Case("GDN", "one-kv-head", base={"num_key_value_heads": 1}), "X-*-X", {}),
    "KDA": (Case("KDA", "default"), "X-*-GDN", {}),
    "KDA-variant": (Case("KDA", "variant", options=BARE | {"kv_proj_rank": 6, "use_short_conv": True}), "X-*-X", {}),
    "GKA": (Case("GKA", "default"), "X-*-X", {}),
    "GKA-plain": (Case("GKA", "plain", options=GKA["plain"]), "X-*-X", {}),
    "M2-rotary": (Case("M2", "rotary", options=M2["rotary"]), "X-*-X", {}),
    "BMF-gka-untied": (Case("BMF", "untied", options=BMF["gka"] | BMF["untied"]), "X-*-X", {}),
    "BMF-window-of-one": (Case("BMF", "one", options={"window_size": 1}), "X-*-X", {}),
    "SWA": (Case("SWA", "default"), "X-*-X", {}),
    "mixed": (Case("GDN", "mixed"), "GKA-*-GDN-SWA-M2-BMF", DICTS),
    "no-attention": (Case("GDN", "alone"), "X-X", {}),
}


def check(path, model, caching=True, **options):
    prompts = engines.random_prompts(LENGTHS, seed=4)
    answers = [engines.hugging_face(model, prompt, TOKENS) for prompt in prompts]
    with engines.engine(path, enable_prefix_caching=caching, max_num_batched_tokens=160, **options) as llm:
        cold = engines.greedy(llm, prompts, TOKENS)
        warm = engines.greedy(llm, prompts, TOKENS)
    engines.assert_same(cold, answers)
    engines.assert_same(warm, answers)
    assert (warm[-1].num_cached_tokens > 0) == caching


@pytest.mark.parametrize("name", CASES)
def test_layer_type(tmp_path, name):
    case, pattern, fields = CASES[name]
    check(tmp_path, engines.save_hybrid(tmp_path, case, pattern, **fields))


@engines.on_cpu  # a GPU refuses these widths (test_support.py)
def test_wide_convolutions(tmp_path):
    widths = {"gka_config": {"conv_size": 7, "num_iter": 6}, "kda_config": {"conv_size": 90}}
    case = Case("GDN", "narrow", options={"conv_size": 2})
    check(tmp_path, engines.save_hybrid(tmp_path, case, "X-*-GKA-KDA", **widths))


def test_options_given_at_the_start(tmp_path):
    """`--hf-overrides` with a layer type's overrides, merged over its options in the checkpoint."""
    case = Case("GKA", "overridden", options={"num_iter": 6, "ridge_strength": 0.3})
    model = engines.save_hybrid(tmp_path, case)
    overrides = {"gka_overrides": {"num_iter": 1}}
    other = type(model)(type(model.config).from_pretrained(tmp_path, **overrides)).eval()
    other.load_state_dict(model.state_dict())
    (prompt,) = engines.random_prompts([40], seed=4)
    answers = [engines.hugging_face(each, prompt, 3) for each in (other, model)]
    assert (answers[0].logprobs[0] - answers[1].logprobs[0]).abs().max() > 10 * answers[0].bound
    with engines.engine(tmp_path, hf_overrides=overrides) as llm:
        engines.assert_same(engines.greedy(llm, [prompt], 3), answers[:1])


def every_type(path, pattern="GKA-*-X-KDA-SWA-M2-BMF", kv_heads=2):
    """Every layer type. Llama's B'MOJO-F has biases, and a scale that does not follow from a rank's heads."""
    case = Case("GDN", f"ranks-{kv_heads}", base={"num_key_value_heads": kv_heads}, options={"conv_bias": True})
    fields = {"attention_bias": True, "swa_config": {"window_size": 7}}
    bmojo = {"window_size": 9, "ssm_mixer": "mamba2", "tie_attn_weights": False}
    return engines.save_hybrid(path, case, pattern, "llama", bmojo_config=bmojo, **fields)


FOUR = engines.gpus(4)


@pytest.mark.parametrize(
    ("ranks", "kv_heads"),
    [
        pytest.param(2, 2, marks=engines.devices(2)),
        pytest.param(2, 1, marks=engines.devices(2)),
        pytest.param(4, 4, marks=FOUR),
        pytest.param(4, 2, marks=FOUR),
        pytest.param(4, 1, marks=FOUR),
    ],
)
def test_tensor_parallel(tmp_path, ranks, kv_heads):
    """Ranks that split the key/value heads, or of which several hold the same one."""
    model = every_type(tmp_path, kv_heads=kv_heads)
    check(tmp_path, model, tensor_parallel_size=ranks, distributed_executor_backend="mp")


@pytest.mark.parametrize(
    ("pattern", "ranks", "caching"),
    [
        pytest.param("GKA-*-X-SWA-M2-BMF", 1, True, marks=engines.gpus(2)),
        pytest.param("GKA-*-X-SWA-M2-BMF-*-X", 1, True, marks=engines.gpus(2)),
        pytest.param("SWA-X-GKA-*-*-*", 1, False, marks=engines.gpus(2)),  # a stage without recurrent layers
        pytest.param("GKA-*-X-SWA-M2-BMF-*-X", 2, True, marks=FOUR),
    ],
)
def test_pipeline_parallel(tmp_path, pattern, ranks, caching):
    """Two stages, of one rank or of more."""
    model = every_type(tmp_path, pattern)
    parallel = {"pipeline_parallel_size": 2, "tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
    check(tmp_path, model, caching, **parallel)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=engines.gpus(2)), pytest.param(4, marks=FOUR)])
def test_expert_parallel(tmp_path, ranks):
    model = engines.save_hybrid(tmp_path, Case("GDN", "experts"), "X-*-GKA", "qwen3_moe", **engines.EXPERTS)
    check(tmp_path, model, tensor_parallel_size=ranks, enable_expert_parallel=True, distributed_executor_backend="mp")


@engines.on_cpu
@torch.inference_mode()
def test_two_pipeline_stages(tmp_path, monkeypatch):
    """Each stage holds and accounts for its own tensors, and hands on what the next one needs.

    vLLM's CPU build runs no pipeline, so the stages run here after each other, as in a trial run: without requests,
    recurrent layers give zeros.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.model_loader import get_model

    engines.save_hybrid(tmp_path, Case("GDN", "stages"), "X-GKA-M2-BMF", **DICTS)
    ids = torch.tensor(engines.random_prompts([40], seed=4)[0])
    positions, stages, outputs = torch.arange(40), [(0, 1), (0, 2), (1, 2)], {}
    with engines.engine(tmp_path) as llm:
        whole = dict(engines.runner(llm).model.named_parameters())
        held = []
        for rank, size in stages:
            config = copy.deepcopy(llm.llm_engine.vllm_config)
            config.compilation_config.static_forward_context = {}
            group = types.SimpleNamespace(
                rank_in_group=rank, world_size=size, is_first_rank=rank == 0, is_last_rank=rank == size - 1
            )
            monkeypatch.setattr(parallel_state, "_PP", group)
            with set_current_vllm_config(config), set_forward_context(None, config, num_tokens=40):
                model = get_model(vllm_config=config)
                outputs[rank, size] = model(ids, positions, outputs.get((rank - 1, size)))
            mine = dict(model.named_parameters())
            assert all(torch.equal(tensor, whole[name]) for name, tensor in mine.items())
            held.append(set(mine))
        monkeypatch.undo()
    assert held[0] == set(whole) == held[1] | held[2] and not held[1] & held[2]
    numerics.assert_near(outputs[1, 2], outputs[0, 1], outputs[0, 1])


def test_int8_checkpoint(tmp_path):
    """Attention, MLPs and GDN's wide projections in int8; what is small, and GKA, as it was."""
    model = engines.save_hybrid(tmp_path, Case("GDN", "int8"), "X-*-SWA-GKA", intermediate_size=64, **DICTS)
    prompts = engines.random_prompts([1, 5, 70], seed=4)
    exact = [engines.hugging_face(model, prompt, 1).logprobs[0] for prompt in prompts]
    names = {f"{kind}.{name}_proj" for kind in ("gdn", "swa", "self_attn") for name in "qkvo"} | {"gdn.g_proj"}
    quantise(tmp_path, model, lambda name: ".mlp." in name or ".".join(name.split(".")[-2:]) in names)
    rounded = [engines.hugging_face(model, prompt, 1).logprobs[0] for prompt in prompts]
    # vLLM's int8 products on a GPU, or on a CPU with AMX, take no float32.
    rounds = engines.CUDA or torch.cpu.get_capabilities().get("amx_tile", False)
    with engines.engine(tmp_path, enable_prefix_caching=True, dtype="bfloat16" if rounds else "float32") as llm:
        loaded = dict(engines.runner(llm).model.named_parameters())
        quantised = {".".join(name.split(".")[2:-1]) for name in loaded if name.endswith(".weight_scale")}
        assert quantised == {
            *("0.self_attn.qkv_proj", "0.self_attn.g_proj", "0.self_attn.o_proj"),
            *(f"{layer}.self_attn.{name}" for layer in (1, 2) for name in ("qkv_proj", "o_proj")),
            *(f"{layer}.mlp.{name}" for layer in range(4) for name in ("gate_up_proj", "down_proj")),
        }
        served = engines.first_rows(engines.greedy(llm, prompts, 1))
    if rounds:
        numerics.assert_mean_near(served, torch.stack(exact), engines.first_logprobs(model.bfloat16(), prompts))
    else:
        check_rounded(served, rounded, exact)


WIDE = (".q_proj", ".k_proj", ".v_proj", ".g_proj", ".o_proj")


def check_rounded(served, rounded, exact):
    """Nearer to the rounded model than that is to the exact one, in the mean: sums in another order tip the rounding of
    an input now and then, and that moves all logits behind it."""
    rounded, exact = torch.stack(rounded), torch.stack(exact)
    numerics.check((served - rounded).abs().mean().item(), (rounded - exact).abs().mean().item(), "mean")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["float8", "fp8"])
def test_fp8_checkpoint(tmp_path, form):
    """Of compressed-tensors and of the method called fp8: nearer to the rounded model than that is to the exact one."""
    model = engines.save_hybrid(tmp_path, Case("GDN", form), "X-*-GKA", intermediate_size=64)
    prompts = engines.random_prompts(LENGTHS, seed=4)
    exact = [engines.hugging_face(model, prompt, 1).logprobs[0] for prompt in prompts]
    quantise(tmp_path, model, lambda name: ".mlp." in name or (".gka." not in name and name.endswith(WIDE)), form)
    rounded = [engines.hugging_face(model, prompt, 1).logprobs[0] for prompt in prompts]
    with engines.engine(tmp_path, dtype="bfloat16") as llm:
        loaded = dict(engines.runner(llm).model.named_parameters())
        for name in ("0.self_attn.qkv_proj", "1.self_attn.o_proj", "2.mlp.down_proj"):
            assert loaded[f"model.layers.{name}.weight"].dtype == torch.float8_e4m3fn
        assert loaded["model.layers.2.self_attn.mixer.q_proj.weight"].dtype == torch.bfloat16
        served = engines.first_rows(engines.greedy(llm, prompts, 1))
    check_rounded(served, rounded, exact)


def test_fp8_on_the_fly(tmp_path):
    """Weights and inputs rounded to eight bits: near the model, not the same; hosted layers stay as they are."""
    model = engines.save_hybrid(tmp_path, Case("GDN", "fp8"), "X-*-GKA", intermediate_size=64)
    prompts = engines.random_prompts(LENGTHS, seed=4)
    with engines.engine(tmp_path, quantization="fp8_per_channel", dtype="bfloat16") as llm:
        loaded = dict(engines.runner(llm).model.named_parameters())
        assert loaded["model.layers.0.self_attn.qkv_proj.weight"].dtype == torch.float8_e4m3fn
        assert loaded["model.layers.2.self_attn.mixer.q_proj.weight"].dtype == torch.bfloat16
        outputs = engines.greedy(llm, prompts, 1)
    exact = torch.stack([engines.hugging_face(model, prompt, 1).logprobs[0] for prompt in prompts])
    quantise(tmp_path, model, lambda name: ".mlp." in name or (".gka." not in name and name.endswith(WIDE)), "float8")
    rounded = engines.first_logprobs(model.bfloat16(), prompts)
    numerics.assert_mean_near(engines.first_rows(outputs), exact, rounded)


@torch.no_grad()
@pytest.mark.parametrize(("symbol", "kv_heads"), [("GKA", 2), ("GKA", 1), ("M2", 2), ("M2", 1), ("M2", 4)])
def test_four_ranks_add_up(symbol, kv_heads):
    """The shares of four ranks, each run alone, give outputs that add up to the whole mixer's."""
    from hmf.layers.registry import mixer_class
    from hmf.serving.vllm.hosted import rank_config, share

    config = tiny_config(Case(symbol, "shares", base={"num_key_value_heads": kv_heads}))
    whole = mixer_class(symbol)(config, 0).double()
    randomise(whole)
    hidden_states = torch.randn(2, 9, config.hidden_size, dtype=torch.float64)
    total = 0
    for rank in range(4):
        part = mixer_class(symbol)(rank_config(config, 4), 0).double()
        for name, tensor in whole.named_parameters():
            mine = part.get_parameter(name)
            mine.copy_(share(tensor, mine.shape, whole.sections(name), part.sections(name), rank, 4))
        output, states = part.mix(hidden_states, None, None, None)
        assert {name: tuple(x.shape[1:]) for name, x in states.items()} == {
            name: state.shape for name, state in part.state_shapes(config, 4).items()
        }
        total = total + output
    numerics.assert_same(total, whole.mix(hidden_states, None, None, None)[0])


WINDOWS = {"use_sliding_window": True, "sliding_window": 16}
# Queries grow past `original_max_position_embeddings`.
MINISTRAL = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.2,
    "mscale_all_dim": 0.7,
    "llama_4_scaling_beta": 0.1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8,
    "original_max_position_embeddings": 128,
    "attention_factor": 1.3,
    "beta_fast": 20,
    "beta_slow": 2,
    "truncate": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 128,
}
SCALED = {"bmojo_config": DICTS["bmojo_config"] | {"scale_queries": True}}
# What the configs of each family can hold and vLLM's stock layers might not heed: windows of some attention layers or
# of all, biases, scaled positions, layers without experts.
BASES = {
    # vLLM takes Qwen2's head_dim to be hidden_size / heads
    "qwen2": WINDOWS | {"max_window_layers": 3, "hidden_size": 128, "tie_word_embeddings": True},
    "qwen3": WINDOWS | {"max_window_layers": 1, "attention_bias": True, "rope_parameters": YARN},
    "qwen3_moe": engines.EXPERTS
    | WINDOWS
    | {
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "attention_bias": True,
    },
    "llama": {"attention_bias": True, "mlp_bias": True, "sliding_window": 16, "rope_parameters": LLAMA3},
    "ministral3": {"sliding_window": 16, "rope_parameters": MINISTRAL} | SCALED,
    "ministral3 as published": {"rope_parameters": MINISTRAL, "hidden_act": "silu", "rms_norm_eps": 1e-3},
    "phi3": {
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "smollm3": WINDOWS | {"no_rope_layers": [1, 0, 0, 0, 1], "attention_bias": True},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4}},
}


@pytest.mark.parametrize("name", BASES)
def test_family(tmp_path, name):
    family = name.split()[0]
    check(tmp_path, engines.save_hybrid(tmp_path, Case("GDN", name), "X-*-SWA-BMF-*", family, **DICTS | BASES[name]))


@pytest.mark.parametrize("family", ["qwen3", "ministral3"])
def test_windows_in_all_layers(tmp_path, family):
    """Of attention and sliding-window layers, without a recurrent one: for vLLM, no hybrid in its sense."""
    fields = {"qwen3": WINDOWS | {"max_window_layers": 1}, "ministral3": {"sliding_window": 16}}[family]
    check(tmp_path, engines.save_hybrid(tmp_path, Case("SWA", "windows"), "*-X-*", family, **fields))


def test_a_bias_without_a_place_stops(tmp_path, monkeypatch):
    """vLLM's loaders pass over biases that its layers do not have."""
    from hmf.serving.vllm import models

    engines.save_hybrid(tmp_path, Case("GDN", "bias"), "X-*", attention_bias=True)
    monkeypatch.setattr(models, "_complete", lambda *_: None)  # as vLLM's Qwen3 is
    line = r"model\.layers\.1\.self_attn\.o_proj\.bias: vLLM's layer has no bias"
    with pytest.raises(HmfError, match=line), engines.engine(tmp_path):
        pass


def test_every_layer_type_is_served():
    from hmf.serving.vllm.support import SERVED_BY

    assert SERVED_BY.keys() == LAYER_KINDS.keys() | {RECURRENT}


def test_a_layer_that_holds_another_one_asks_for_its_metadata_too():
    from hmf.serving.vllm import backends
    from hmf.serving.vllm.support import mixer_module

    for symbol in INNER_MIXERS:
        backend = getattr(backends, symbol)
        assert backend.get_builder_cls() is mixer_module(symbol).BUILDER
        assert issubclass(backends.BMF.get_builder_cls(), backend.get_builder_cls())


@pytest.mark.parametrize("why", [None, "No module named 'missing_cutlass'"])
def test_flashinfer_that_cannot_be_imported_is_reported_and_not_used(tmp_path, monkeypatch, why):
    from vllm.platforms.interface import Platform, PlatformEnum

    from hmf.serving.vllm import gdn, own

    package = tmp_path / "flashinfer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "gdn_prefill.py").write_text("import missing_cutlass" if why else "")
    for name in [name for name in sys.modules if name.split(".")[0] == "flashinfer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    warnings = []
    monkeypatch.setattr(gdn.logger, "warning_once", lambda text, *values: warnings.append(text % values))
    assert gdn.has_flashinfer() == (why is None)
    assert [why in text for text in warnings] == ([True] if why else [])

    class Hopper(Platform):
        _enum = PlatformEnum.CUDA
        is_device_capability = classmethod(lambda cls, capability, device_id=0: capability == 90)

    shape = types.SimpleNamespace(linear_key_head_dim=128, linear_value_head_dim=128)
    model_config = types.SimpleNamespace(hf_text_config=shape)
    vllm_config = types.SimpleNamespace(additional_config={"kept": 1}, model_config=model_config)
    monkeypatch.setitem(own._resolve_gdn_prefill_backend.__globals__, "current_platform", Hopper())
    own.choose_prefill(vllm_config)
    chosen = {"gdn_prefill_backend": "triton"} if why else {}
    assert vllm_config.additional_config == {"kept": 1} | chosen
