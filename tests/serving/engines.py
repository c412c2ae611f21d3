# SPDX-License-Identifier: Apache-2.0
"""Tiny Hybrids on disk, vLLM engines on them in this process, and what Hugging Face says about the same prompts."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.hybrids import VOCABULARY, Case, randomise, tiny_config

# vLLM's attention on a CPU starts at head_dim 32.
DIMENSIONS = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 48, "max_position_embeddings": 4096}
TOLERANCE = 1e-3


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
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_logprobs": VOCABULARY} | options
    llm = None
    try:
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


def assert_same(outputs: list[Any], answers: list[Answer], tolerance: float = TOLERANCE) -> None:
    """The same tokens, and log-probabilities within `tolerance` over the whole vocabulary."""
    for output, answer in zip(outputs, answers, strict=True):
        completion = output.outputs[0]
        length = len(output.prompt_token_ids)
        assert list(completion.token_ids) == answer.tokens, f"prompt of {length} tokens"
        rows = torch.tensor([[row[token].logprob for token in range(VOCABULARY)] for row in completion.logprobs])
        worst = (rows - answer.logprobs).abs().max().item()
        assert worst < tolerance, f"prompt of {length} tokens: log-probabilities off by {worst}"


def runner(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def mixers(llm: Any) -> list[Any]:
    from hmf.serving.vllm.recurrent import RecurrentMixer

    return [module for module in runner(llm).model.modules() if isinstance(module, RecurrentMixer)]


def free_blocks(llm: Any) -> int:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def groups(llm: Any) -> int:
    """Kinds of caches, each with blocks of its own."""
    return len(llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups)


def metric(llm: Any, name: str) -> int:
    return sum(found.value for found in llm.get_metrics() if found.name == name)
