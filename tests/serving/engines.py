# SPDX-License-Identifier: Apache-2.0
"""Tiny Hybrids on disk, vLLM engines on them in this process, and what Hugging Face says about the same prompts."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hmf.bench.doctor import one_variant
from tests.hybrids import VOCABULARY, Case, randomise, tiny_config

# vLLM's attention on a CPU starts at head_dim 32.
DIMENSIONS = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 48, "max_position_embeddings": 4096}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CUDA = torch.cuda.is_available()
# Of log-probabilities in float32, which Hugging Face computes on the CPU in either case. On a GPU other kernels add up
# in another order, and where the first two tokens are as near as that, either may come first (`agreement`).
TOLERANCE = 1e-2 if CUDA else 1e-3
POOL = 2**30  # bytes for all caches
on_cpu = pytest.mark.skipif(CUDA, reason="about vLLM's CPU build")


def devices(count: int) -> pytest.MarkDecorator:
    """For a test with as many ranks, each on a GPU of its own if there are GPUs at all."""
    return pytest.mark.skipif(CUDA and torch.cuda.device_count() < count, reason=f"needs {count} GPUs")


def gpus(count: int) -> list[pytest.MarkDecorator]:
    """For one that a CPU cannot run."""
    return [pytest.mark.gpu, devices(count)]


# Of a server, so that several fit on a GPU beside each other.
SMALL = ["--kv-cache-memory-bytes", str(POOL), "--gpu-memory-utilization", "0.1", "--max-num-seqs", "16"] * CUDA
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TRITON_F32_DEFAULT": "ieee",  # else vLLM's attention on a GPU rounds float32 to TF32
    # Ranks add up without NVLink multicast, which virtual machines with several GPUs may lack.
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    # A process that has counted its GPUs cannot fork ranks, and vLLM forks unless CUDA is wholly up.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


def save_hybrid(path: Path, case: Case, pattern: str = "X-*-X-*", family: str = "qwen3", **fields: Any) -> Any:
    """Save a random float32 Hybrid at `path`; returns the Hugging Face model."""
    from hmf.model.families import family_of
    from hmf.model.modeling import hybrid_classes

    config = tiny_config(case, pattern, family, **(DIMENSIONS | case.base | fields))
    model = hybrid_classes(family_of(family)).causal_lm(config).eval()
    randomise(model)
    model.save_pretrained(path)
    return model


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@dataclass
class Answer:
    """Greedy tokens [N] and the log-probabilities [N, vocabulary] that they were chosen from."""

    tokens: list[int]
    logprobs: torch.Tensor


@torch.no_grad()
def hugging_face(model: Any, prompt: list[int], count: int) -> Answer:
    """Greedy decoding through the cache."""
    output = model(torch.tensor([prompt]), use_cache=True)
    tokens, rows = [], []
    for _ in range(count):
        rows.append(output.logits[0, -1].log_softmax(-1))
        tokens.append(int(rows[-1].argmax()))
        output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
    return Answer(tokens, torch.stack(rows))


@torch.no_grad()
def teacher_forced(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities [N] of the tokens of `answer` after `prompt`, in one full forward."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]


@contextlib.contextmanager
def engine(path: Path, **options: Any) -> Iterator[Any]:
    """A vLLM engine in this process: its pools can be looked at, and it starts in seconds."""
    before = dict(os.environ)
    os.environ |= ENVIRONMENT
    if CUDA and options.get("dtype", "float32") == "float32":
        os.environ["HMF_OPS"] = "chunked"  # the kernels of linear attention round float32 to TF32 in any case
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_logprobs": VOCABULARY} | options
    if CUDA:  # nothing to measure at the start, and room for other engines
        small = {"kv_cache_memory_bytes": POOL, "gpu_memory_utilization": 0.1}
        options = small | {"max_num_seqs": 64, "max_num_batched_tokens": 2048} | options
        if "distributed_executor_backend" in options:
            options["worker_extension_cls"] = "tests.serving.untuned.Untuned"
    llm = None
    try:
        with one_variant() if CUDA else contextlib.nullcontext():
            llm = LLM(str(path), skip_tokenizer_init=True, seed=0, disable_log_stats=False, **options)
            yield llm
    finally:
        if llm is not None:  # now, not when a failed test's traceback lets go of it
            llm.llm_engine.engine_core.shutdown()
            del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        os.environ.clear()
        os.environ |= before


def greedy(llm: Any, prompts: list[list[int]], count: int) -> list[Any]:
    """All prompts submitted together; vLLM's outputs with the log-probabilities of the whole vocabulary."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, logprobs=VOCABULARY, ignore_eos=True, detokenize=False)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def agreement(tokens: Sequence[int], answer: Answer) -> int:
    """How many positions of a greedy answer can be compared: all, and its tokens are the same.

    On a GPU: as many, or up to where a token came first that is as probable within the tolerance.
    """
    tokens = list(tokens)
    wanted = answer.tokens[: len(tokens)]
    if CUDA and tokens != wanted:
        at = next(i for i, pair in enumerate(zip(tokens, wanted, strict=True)) if len(set(pair)) > 1)
        row = answer.logprobs[at]
        if row.max() - row[tokens[at]] < 2 * TOLERANCE:
            return at + 1
    assert tokens == wanted
    return len(tokens)


def assert_same(outputs: list[Any], answers: list[Answer], tolerance: float = TOLERANCE) -> None:
    """The same tokens, and log-probabilities within `tolerance` over the whole vocabulary."""
    compared = 0
    for output, answer in zip(outputs, answers, strict=True):
        completion, length = output.outputs[0], len(output.prompt_token_ids)
        assert len(completion.token_ids) == len(answer.tokens)
        rows = torch.tensor([[row[token].logprob for token in range(VOCABULARY)] for row in completion.logprobs])
        off = (rows - answer.logprobs).abs().amax(1)
        count = agreement(completion.token_ids, answer)
        worst = off[:count].max().item()
        assert worst < tolerance, f"prompt of {length} tokens: log-probabilities off by {worst}"
        compared += count
    assert compared > sum(len(answer.tokens) for answer in answers) / 2


def first_rows(outputs: list[Any]) -> torch.Tensor:
    """Log-probabilities [requests, vocabulary] of each answer's first token."""
    firsts = [output.outputs[0].logprobs[0] for output in outputs]
    return torch.tensor([[row[token].logprob for token in range(VOCABULARY)] for row in firsts])


def runner(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def mixers(llm: Any) -> list[Any]:
    from hmf.serving.vllm.recurrent import RecurrentMixer

    return [module for module in runner(llm).model.modules() if isinstance(module, RecurrentMixer)]


def drain(llm: Any) -> None:
    """Step until nothing is under way; with asynchronous scheduling a step more than requests need."""
    while llm.llm_engine.has_unfinished_requests() or llm.llm_engine.engine_core.engine_core.batch_queue:
        llm.llm_engine.step()


def poison(llm: Any) -> None:
    """NaN into all states. On a GPU not into the null block: attention reads it behind a window, times zero."""
    for mixer in mixers(llm):
        for pool in mixer.kv_cache:
            pool[int(CUDA) :].fill_(torch.nan if pool.is_floating_point() else 10**9)


def free_blocks(llm: Any) -> int:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def groups(llm: Any) -> int:
    """Kinds of caches, each with blocks of its own."""
    return len(llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups)


def metric(llm: Any, name: str) -> int:
    return sum(found.value for found in llm.get_metrics() if found.name == name)
