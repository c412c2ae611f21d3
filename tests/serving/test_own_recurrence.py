# SPDX-License-Identifier: Apache-2.0
"""Hybrids of bases that have recurrent layers of their own: Qwen3.5, with and without experts, and Qwen3-Next."""

import pytest
import torch

from tests import numerics
from tests.hybrids import Case, randomise, tiny_config
from tests.serving import engines
from tests.serving.test_layer_types import check

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TYPES = ["linear_attention", "full_attention"] * 2 + ["full_attention"] * 4
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
IMAGES = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
EXPERTS = engines.EXPERTS | {"shared_expert_intermediate_size": 48}
# What the configs of each family can hold and vLLM's stock layers might not heed.
FIELDS = {
    "qwen3_5_text": {"rope_parameters": ROPE | IMAGES, "attention_bias": True, "tie_word_embeddings": True},
    "qwen3_5_moe_text": EXPERTS | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4}},
    "qwen3_next": EXPERTS | {"mlp_only_layers": [1], "decoder_sparse_step": 2, "norm_topk_prob": True},
}


def save(path, family, pattern="*-GDN-*-GKA-SWA-M2-KDA-*", **fields):
    own = {"base_layer_types": TYPES, "swa_config": {"window_size": 7}} | FIELDS[family]
    return engines.save_hybrid(path, Case("GDN", family), pattern, family, **own | fields)


@pytest.mark.parametrize("family", FIELDS)
def test_family(tmp_path, family):
    """Every layer type that these bases can have, beside attention and the recurrent layers of the base."""
    check(tmp_path, save(tmp_path, family))


def save_like_own(path, family):
    """New layers in the shape of the base's own, also in their place; B'MOJO-F has the base's output gate."""
    shape = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}  # 4 heads of values, as attention of queries
    options = {f"{name}_config": {"own_shape": True} for name in ("gdn", "kda", "gka")}
    bmojo = {"bmojo_config": {"window_size": 9, "ssm_mixer": "gdn", "tie_attn_weights": False}}
    return save(path, family, "GDN-KDA-*-GKA-BMF-GDN-GKA-*", **shape, **options, **bmojo)


@pytest.mark.parametrize("family", FIELDS)
def test_layers_like_the_bases_own(tmp_path, family):
    check(tmp_path, save_like_own(tmp_path, family))


@engines.devices(2)
def test_tensor_parallel(tmp_path):
    model = save_like_own(tmp_path, "qwen3_5_moe_text")
    check(tmp_path, model, tensor_parallel_size=2, distributed_executor_backend="mp")


@torch.no_grad()
@pytest.mark.parametrize("family", FIELDS)
def test_two_ranks_add_up(family):
    """The shares of a recurrent layer of the base, each run alone, give outputs that add up to the whole layer's."""
    from hmf.serving.vllm.hosted import rank_config, share
    from hmf.serving.vllm.own import OwnRecurrence

    config = tiny_config(Case("GDN", "shares"), "*-X", family, **(EXPERTS if "num_experts" in FIELDS[family] else {}))
    cls = OwnRecurrence.class_of("", config)
    whole, hidden_states, total = cls(config, 0).double(), torch.randn(2, 9, config.hidden_size).double(), 0
    randomise(whole)
    for rank in range(2):
        part = cls(rank_config(config, 2), 0).double()
        for name, tensor in whole.named_parameters():
            mine = part.get_parameter(name)
            mine.copy_(share(tensor, mine.shape, whole.sections(name), part.sections(name), rank, 2))
        with numerics.in_float64():
            output, states = part.mix(hidden_states, None, None, None)
        assert {name: tuple(x.shape[1:]) for name, x in states.items()} == {
            name: state.shape for name, state in part.state_shapes(config, 2).items()
        }
        total = total + output
    with numerics.in_float64():
        numerics.assert_same(total, whole.mix(hidden_states, None, None, None)[0])


@pytest.mark.parametrize("family", FIELDS)
def test_vllms_own_module(tmp_path, monkeypatch, family):
    """It runs these layers on a GPU. Its CPU kernels need states of convolutions in bfloat16 and heads of 64."""
    from hmf.serving.vllm import own

    heads = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "base_layer_types": TYPES[:4]}
    model = save(tmp_path, family, "*-GDN-*-SWA", **heads)
    prompts = engines.random_prompts([1, 5, 70, 600], seed=4)  # the last is longer than a block
    exact = torch.stack([engines.hugging_face(model, prompt, 1).logprobs[0] for prompt in prompts])
    options = {"dtype": "bfloat16", "enable_prefix_caching": True, "max_num_batched_tokens": 160}
    if not engines.CUDA:
        monkeypatch.setattr(own, "has_kernels", lambda vllm_config: True)
        options["mamba_cache_dtype"] = "bfloat16"
    with engines.engine(tmp_path, **options) as llm:
        layers = {name for name, _ in engines.runner(llm).model.named_parameters() if "in_proj_qkvz" in name}
        assert layers == {f"model.layers.{layer}.linear_attn.in_proj_qkvz.weight" for layer in (0, 2)}
        cold = engines.greedy(llm, prompts, 4)
        # Alone, because in a used slot the CPU kernel multiplies what a new request finds by zero, and NaN stays NaN.
        (warm,) = engines.greedy(llm, prompts[-1:], 1)
        assert warm.num_cached_tokens > 0
    rounded = engines.first_logprobs(model.bfloat16(), prompts)
    for served in (cold, [*cold[:-1], warm]):
        rows = engines.first_rows(served)
        # The CPU kernel also reads memory that nothing was written to, which may hold NaN.
        sound = ~rows.isnan().any(-1) if not engines.CUDA else torch.ones(len(rows), dtype=torch.bool)
        if not sound.any():
            pytest.skip("vLLM's CPU kernel gave NaN for every prompt")
        numerics.assert_mean_near(rows[sound], exact[sound], rounded[sound])
