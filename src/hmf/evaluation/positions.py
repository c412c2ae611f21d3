# SPDX-License-Identifier: Apache-2.0
"""Perplexity by position: how well a token is predicted, by the number of tokens before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from hmf.data.tasks import library_lines
from hmf.data.tokenizer import document_separator, encode_texts
from hmf.evaluation.results import perplexity_of

PERPLEXITY = "perplexity"  # the name of this measurement among the tasks
WINDOWS = 8  # number of texts, each of the full length
FIRST = 256  # tokens in the first range; each later range is as long as all earlier ones together


class Scorer(Protocol):
    """Returns the log-probability of each token of `ids` except the first."""

    def token_log_probabilities(self, ids: Sequence[int]) -> list[float]: ...


def window(tokenizer: PreTrainedTokenizerBase, seed: int, index: int, length: int) -> list[int]:
    """`length` tokens: the document separator and held-out library source."""
    lines = library_lines(Random(f"{seed}:{PERPLEXITY}:{index}"), "heldout", characters=6 * length)
    return [document_separator(tokenizer), *encode_texts(tokenizer, ["\n".join(lines)])[0]][:length]


def ranges(length: int) -> Iterator[tuple[int, int]]:
    """Ranges (start, end) that cover 0 to `length`; each end is twice its start."""
    start, end = 0, min(FIRST, length)
    while start < length:
        yield start, end
        start, end = end, min(2 * end, length)


def nats_by_range(scorer: Scorer, ids: Sequence[int]) -> list[dict[str, Any]]:
    """The summed negative log-likelihood of a window's tokens in each range of positions."""
    values = scorer.token_log_probabilities(ids)
    return [
        {"start": start, "end": end, "nats": -sum(part), "tokens": len(part)}
        for start, end in ranges(len(ids))
        if (part := values[max(0, start - 1) : end - 1])
    ]


def by_position(windows: Sequence[Sequence[dict[str, Any]]], title: str = PERPLEXITY) -> list[dict[str, Any]]:
    """The perplexity in each range over several windows of one length, as fields of
    `hmf.evaluation.results.PositionResult`. HmfError, which begins with `title`, if one is not finite."""
    results = []
    for parts in zip(*windows, strict=True):
        nats, tokens = sum(part["nats"] for part in parts), sum(part["tokens"] for part in parts)
        place = {"start": parts[0]["start"], "end": parts[0]["end"]}
        results.append({**place, "perplexity": perplexity_of(nats, tokens, title), "tokens": tokens})
    return results
