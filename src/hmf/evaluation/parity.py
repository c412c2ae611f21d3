# SPDX-License-Identifier: Apache-2.0
"""Compares a server with Hugging Face's model: KL divergence per token, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hmf.data.progress import Progress
from hmf.evaluation.local import Local
from hmf.evaluation.prompts import Prompt
from hmf.evaluation.server import Server

TOP_K = 20  # vLLM's default maximum
GENERATED = 32  # tokens that are generated after each prompt


def divergence(reference: torch.Tensor, candidates: dict[int, float]) -> float:
    """KL divergence KL(reference || server), with all tokens that are not candidates merged into one outcome.

    It is a lower bound of the divergence over the whole vocabulary.

    Args:
        reference: log-probabilities [vocabulary].
        candidates: the server's log-probabilities by token.
    """
    ours = reference[list(candidates)].double().tolist()
    theirs = list(candidates.values())
    for values in (ours, theirs):
        values.append(math.log(max(1e-9, 1 - sum(map(math.exp, values)))))
    return max(0.0, sum(math.exp(p) * (p - q) for p, q in zip(ours, theirs, strict=True)))


def parity(local: Local, server: Server, prompts: Sequence[Prompt], bound: float) -> dict[str, Any]:
    """Compare a local model and a server on prompts and on the tokens that the server generates greedily after them.

    The prompts test the server's prefill, and the generated tokens test its decode steps. Parity is passed if both mean
    divergences are at most `bound`. Returns the fields of `hmf.evaluation.results.ParityResult`.

    Raises:
        NotOffered: the server does not return log-probabilities.
    """
    kinds: dict[str, list[float]] = {"prompt": [], "generated": []}
    same = 0
    progress = Progress("parity", len(prompts), unit=" prompts")
    for prompt in prompts:
        before, generated, after = server.scored(prompt.ids, TOP_K, GENERATED)
        candidates = [*before, *after]
        place = 0
        for chunk in local.log_probabilities([*prompt.ids, *generated]):
            chunk = chunk.cpu()
            for row in chunk:
                served = candidates[place]
                kinds["prompt" if place < len(before) else "generated"].append(divergence(row, served))
                same += max(served, key=served.__getitem__) == int(row.argmax())
                place += 1
        progress.add(1, place)
    progress.close()
    means = {name: sum(values) / len(values) for name, values in kinds.items()}
    return {
        "passed": max(means.values()) <= bound,
        "bound": bound,
        "prompt_kl": means["prompt"],
        "generated_kl": means["generated"],
        "max_kl": max(max(values) for values in kinds.values()),
        "same_likeliest": same / sum(map(len, kinds.values())),
        "prompt_tokens": len(kinds["prompt"]),
        "generated_tokens": len(kinds["generated"]),
        "prompts": len(prompts),
        "top_k": TOP_K,
        "url": server.url,
        "dtype": str(local.model.dtype).removeprefix("torch."),
    }
