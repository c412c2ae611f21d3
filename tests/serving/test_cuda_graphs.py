# SPDX-License-Identifier: Apache-2.0
"""As a server runs on a GPU: torch.compile, CUDA graphs of prefills in pieces and of decode steps in one."""

import pytest
import torch

from hmf.config.layers import LAYER_KINDS
from tests.hybrids import Case
from tests.serving import engines

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

TOKENS = 24
# A decode graph for each size up to `max_num_seqs`; the last one is for prefills.
GRAPHS = {"max_num_seqs": 8, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 96]}}


@pytest.mark.parametrize("symbol", LAYER_KINDS)
def test_graphs_compute_what_the_model_does(tmp_path, symbol):
    """Batches smaller than their graph, in a pool full of NaN; the padding's slot stays as it is."""
    model = engines.save_hybrid(tmp_path, Case(symbol, "graphs"), "X-*-X")
    prompts = engines.random_prompts([1, 5, 70, 2, 40, 30, 3], seed=6)
    answers = [engines.hugging_face(model, prompt, TOKENS) for prompt in prompts]
    with engines.engine(tmp_path, enforce_eager=False, enable_prefix_caching=True, max_model_len=256, **GRAPHS) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name == "FULL_AND_PIECEWISE"
        manager, replayed = engines.runner(llm).cudagraph_manager, set()
        replay = manager.run_fullgraph

        def counted(graph):
            replayed.add(graph.num_reqs)
            return replay(graph)

        manager.run_fullgraph = counted
        engines.poison(llm)
        pools = [pool for mixer in engines.mixers(llm) for pool in mixer.kv_cache]
        null = [pool[0].clone() for pool in pools]
        for count in (3, 1, 7):
            engines.assert_same(engines.greedy(llm, prompts[:count], TOKENS), answers[:count])
        assert {1, 4, 8} <= replayed
        assert all(pool[0].equal(before) for pool, before in zip(pools, null, strict=True))


@pytest.mark.parametrize("backend", ["flashinfer", "triton", "hmf"])
def test_prefill_of_gdn(tmp_path, backend):
    if backend == "flashinfer":
        pytest.importorskip("flashinfer.gdn_prefill", reason="needs nvidia-cutlass-dsl", exc_type=ImportError)
    check_bfloat16(tmp_path, "GDN", 128, additional_config={"gdn_prefill_backend": backend})


@pytest.mark.parametrize(("symbol", "head_dim"), [("GDN", 32), ("KDA", 64), ("M2", 64), ("GKA", 64), ("BMF", 64)])
def test_kernels_of_bfloat16(tmp_path, symbol, head_dim):
    check_bfloat16(tmp_path, symbol, head_dim)


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({"tensor_parallel_size": 2}, marks=engines.devices(2)),
        pytest.param({"tensor_parallel_size": 4}, marks=engines.devices(4)),
        pytest.param({"pipeline_parallel_size": 2}, marks=engines.devices(2)),
    ],
    ids=["two-ranks", "four-ranks", "two-stages"],
)
def test_several_gpus(tmp_path, parallel):
    """torch.compile, the kernels of bfloat16 and CUDA graphs, on ranks and in stages with every layer type."""
    passes = {"pass_config": {"fuse_allreduce_rms": False}}  # of FlashInfer, perhaps by NVLink multicast
    options = {"compilation_config": GRAPHS["compilation_config"] | passes, "distributed_executor_backend": "mp"}
    fields = {"swa_config": {"window_size": 7}, "bmojo_config": {"window_size": 9, "ssm_mixer": "gdn"}}
    check_bfloat16(tmp_path, "GDN", 64, "GKA-*-X-KDA-SWA-M2-BMF-*-X", fields, **parallel, **options)


def check_bfloat16(tmp_path, symbol, head_dim, pattern="X-*-X", fields=None, **options):
    """Prefills in chunks beside requests that decode: as near to float32 as Hugging Face is in bfloat16."""
    model = engines.save_hybrid(tmp_path, Case(symbol, "bfloat16"), pattern, head_dim=head_dim, **fields or {})
    rounded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    prompts = engines.random_prompts([1, 5, 70, 290, 300], seed=7)
    options = GRAPHS | {"dtype": "bfloat16", "max_num_batched_tokens": 160, "max_model_len": 512} | options
    with engines.engine(tmp_path, enforce_eager=False, **options) as llm:
        if "additional_config" in options:
            shares = options["additional_config"]["gdn_prefill_backend"] != "triton"
            assert all(mixer.shares_heads == shares for mixer in engines.mixers(llm))
        outputs = engines.greedy(llm, prompts, TOKENS)
    served, others = [], []
    for output, prompt in zip(outputs, prompts, strict=True):
        tokens = list(output.outputs[0].token_ids)
        found = [row[token].logprob for row, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        exact = engines.teacher_forced(model, prompt, tokens)
        served.append((torch.tensor(found) - exact).abs())
        others.append((engines.teacher_forced(rounded, prompt, tokens).float() - exact).abs())
    assert torch.cat(served).mean() <= 2 * torch.cat(others).mean() + 1e-3
