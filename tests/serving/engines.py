# SPDX-License-Identifier: Apache-2.0
"""Tiny Hybrids on disk, vLLM engines on them in this process, and what Hugging Face says about the same prompts."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hmf.bench.doctor import one_variant
from tests import numerics
from tests.hybrids import VOCABULARY, Case, randomise, tiny_config

# vLLM's attention on a CPU starts at head_dim 32.
DIMENSIONS = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 48, "max_position_embeddings": 4096}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CUDA = torch.cuda.is_available()
# Of the float32 model's own error on the CPU. A GPU's exponentials and products are less exact than a CPU's.
FACTOR = 10 * numerics.FACTOR if CUDA else numerics.FACTOR
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
    """Greedy tokens [N] and the log-probabilities [N, vocabulary] that they were chosen from, in float64.

    bound: for vLLM's, from how far float32 models are off on the same tokens.
    """

    tokens: list[int]
    logprobs: torch.Tensor
    bound: float


@torch.no_grad()
def hugging_face(model: Any, prompt: list[int], count: int) -> Answer:
    """Greedy decoding through the cache, in float64."""
    wide, tokens, rows = numerics.widened(model), [], []
    with numerics.in_float64():
        output = wide(torch.tensor([prompt]), use_cache=True)
        for _ in range(count):
            rows.append(output.logits[0, -1].log_softmax(-1))
            tokens.append(int(rows[-1].argmax()))
            output = wide(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
    logprobs = torch.stack(rows)
    return Answer(tokens, logprobs, bound(model, lambda model: all_forced(model, prompt, tokens), logprobs))


def bound(model: Any, run: Callable[[Any], torch.Tensor], exact: torch.Tensor) -> float:
    """A multiple of the largest error of the float32 model and of some with its weights rounded otherwise."""
    error = max(numerics.off(run(plain), exact) for plain in (model, *numerics.nudged(model)))
    return numerics.bound(exact, error, FACTOR)


@torch.no_grad()
def all_forced(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities [N, vocabulary] at the tokens of `answer` after `prompt`, in one full forward."""
    return model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


@torch.no_grad()
def teacher_forced(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities [N] of the tokens of `answer` after `prompt`, in one full forward."""
    return all_forced(model, prompt, answer)[torch.arange(len(answer)), torch.tensor(answer)]


def assert_forced(given: torch.Tensor, model: Any, prompt: list[int], answer: list[int]) -> None:
    """Log-probabilities [N] of the tokens of a sampled `answer`, against float64 as in `assert_same`."""
    with numerics.in_float64():
        exact = teacher_forced(numerics.widened(model), prompt, answer)
    allowed = bound(model, lambda model: teacher_forced(model, prompt, answer), exact)
    numerics.check(numerics.off(given, exact), allowed, "log-probabilities of a sample")


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
    """How many positions of a greedy answer can be compared: all, and its tokens are the same; or as many as there are
    up to where a token came first that is as probable within the bound."""
    tokens = list(tokens)
    wanted = answer.tokens[: len(tokens)]
    if tokens != wanted:
        at = next(i for i, pair in enumerate(zip(tokens, wanted, strict=True)) if len(set(pair)) > 1)
        row = answer.logprobs[at]
        if row.max() - row[tokens[at]] < 2 * answer.bound:
            return at + 1
    assert tokens == wanted
    return len(tokens)


def assert_same(outputs: list[Any], answers: list[Answer]) -> None:
    """The same tokens, and log-probabilities within each answer's bound over the whole vocabulary."""
    compared = 0
    for output, answer in zip(outputs, answers, strict=True):
        completion, length = output.outputs[0], len(output.prompt_token_ids)
        assert len(completion.token_ids) == len(answer.tokens)
        rows = torch.tensor([[row[token].logprob for token in range(VOCABULARY)] for row in completion.logprobs])
        count = agreement(completion.token_ids, answer)
        error = numerics.off(rows[:count], answer.logprobs[:count])
        numerics.check(error, answer.bound, f"log-probabilities after a prompt of {length} tokens")
        compared += count
    assert compared > sum(len(answer.tokens) for answer in answers) / 2


def first_rows(outputs: list[Any]) -> torch.Tensor:
    """Log-probabilities [requests, vocabulary] of each answer's first token."""
    firsts = [output.outputs[0].logprobs[0] for output in outputs]
    return torch.tensor([[row[token].logprob for token in range(VOCABULARY)] for row in firsts])


@torch.no_grad()
def first_logprobs(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """The same of a Hugging Face model, in its own dtype."""
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts])


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
