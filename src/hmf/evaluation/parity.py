# SPDX-License-Identifier: Apache-2.0
"""Whether a server computes what Hugging Face's model computes: KL divergence a token, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hmf.data.shards import Progress
from hmf.evaluation.local import Local
from hmf.evaluation.prompts import Prompt
from hmf.evaluation.server import Server

TOP_K = 20  # the most that vLLM gives by default
GENERATED = 32  # tokens of each prompt


def divergence(reference: torch.Tensor, candidates: dict[int, float]) -> float:
    """KL divergence of a reference from a server's probabilities, over the candidates and the rest as one outcome.

    It is at most that over the whole vocabulary. reference: log-probabilities [vocabulary]; candidates: the server's,
    by token.
    """
    ours = reference[list(candidates)].double().tolist()
    theirs = list(candidates.values())
    for values in (ours, theirs):
        values.append(math.log(max(1e-9, 1 - sum(map(math.exp, values)))))
    return max(0.0, sum(math.exp(p) * (p - q) for p, q in zip(ours, theirs, strict=True)))


def parity(local: Local, server: Server, prompts: Sequence[Prompt], bound: float) -> dict[str, Any]:
    """What `hmf.evaluation.results.ParityResult` reads: for the tokens of the prompts, and for those that the server
    generates greedily after each, so that both its prefill and its decode steps are compared.

    Passed where both mean divergences are at most `bound`. NotOffered where the server gives no log-probabilities.
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
                found = candidates[place]
                kinds["prompt" if place < len(before) else "generated"].append(divergence(row, found))
                same += max(found, key=found.__getitem__) == int(row.argmax())
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
