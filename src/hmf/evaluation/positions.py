# SPDX-License-Identifier: Apache-2.0
"""Perplexity by position: how well a token is predicted when so many tokens are before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from hmf.data.tasks import library_lines
from hmf.data.tokenizer import document_separator, encode_texts

PERPLEXITY = "perplexity"  # its name among the tasks
WINDOWS = 8  # texts of the whole length
FIRST = 256  # tokens of the first range; each further one is as long as all before it


class Scorer(Protocol):
    """Something that gives the log-probability of each token of `ids` but the first."""

    def token_log_probabilities(self, ids: Sequence[int]) -> list[float]: ...


def window(tokenizer: PreTrainedTokenizerBase, seed: int, index: int, length: int) -> list[int]:
    """`length` tokens of held-out library source, after the separator of documents."""
    lines = library_lines(Random(f"{seed}:{PERPLEXITY}:{index}"), "heldout", characters=6 * length)
    return [document_separator(tokenizer), *encode_texts(tokenizer, ["\n".join(lines)])[0]][:length]


def ranges(length: int) -> Iterator[tuple[int, int]]:
    """From 0 to `length`, by doubling."""
    start, end = 0, min(FIRST, length)
    while start < length:
        yield start, end
        start, end = end, min(2 * end, length)


def nats_by_range(scorer: Scorer, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Of a window: what its tokens cost together, by how many tokens are before them."""
    values = scorer.token_log_probabilities(ids)
    return [
        {"start": start, "end": end, "nats": -sum(part), "tokens": len(part)}
        for start, end in ranges(len(ids))
        if (part := values[max(0, start - 1) : end - 1])
    ]


def by_position(windows: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of several windows of one length: what `hmf.evaluation.results.PositionResult` reads."""
    found = []
    for parts in zip(*windows, strict=True):
        nats, tokens = sum(part["nats"] for part in parts), sum(part["tokens"] for part in parts)
        place = {"start": parts[0]["start"], "end": parts[0]["end"]}
        found.append({**place, "perplexity": math.exp(nats / tokens), "tokens": tokens})
    return found
