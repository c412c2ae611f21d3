# SPDX-License-Identifier: Apache-2.0
"""Filter for repetitive texts: the measures of Gopher, computed by datatrove."""

from __future__ import annotations

import re

from hmf.config.data import RepetitionSettings

_WORD = re.compile(r"\w+|[^\w\s]")


def repetition(text: str, limits: RepetitionSettings) -> str | None:
    """Name of the first measure of `text` that exceeds its limit; None if there is none.

    Words are runs of letters and digits. Every other character except white space is a word of its own.
    """
    from datatrove.pipeline.filters import gopher_repetition_filter as gopher

    characters = max(1, len(text))
    for name, parts in (("paragraph", re.split(r"\n{2,}", text.strip())), ("line", re.split(r"\n+", text.strip()))):
        repeats, repeated_characters = gopher.find_duplicates(parts)
        if repeats / len(parts) > getattr(limits, f"duplicate_{name}s"):
            return f"duplicate_{name}s"
        if repeated_characters / characters > getattr(limits, f"duplicate_{name}_characters"):
            return f"duplicate_{name}_characters"
    words = _WORD.findall(text)
    for n, limit in limits.top_ngram.items():
        ngrams = gopher.get_n_grams(words, n)
        # In a short text, even an n-gram that occurs once has a large share.
        if len(set(ngrams)) < len(ngrams) and gopher.find_top_duplicate(ngrams) / characters > limit:
            return f"top_{n}gram"
    for n, limit in limits.duplicate_ngrams.items():
        if gopher.find_all_duplicate(words, n) / characters > limit:
            return f"duplicate_{n}grams"
    return None
