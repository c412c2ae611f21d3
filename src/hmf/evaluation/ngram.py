# SPDX-License-Identifier: Apache-2.0
"""Order-3 Markov models of bytes and of tokens, as baselines for language models."""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from hmf.errors import HmfError

Symbols = NDArray[np.int64]


class NgramModel:
    """Predicts a symbol from the `order` symbols before it, with interpolated Witten-Bell smoothing.

    p(w | h) = (c(h w) + t(h) p(w | h')) / (c(h) + t(h)), where c counts, t(h) is the number of different symbols seen
    after h, and h' is h without its oldest symbol; below the shortest history all symbols are equally likely
    (Witten and Bell, 1991; Chen and Goodman, 1998, section 2.4).

    Args:
        sequences: symbols from 0 to `alphabet` - 1 of each training document.
        alphabet: number of different symbols.
        order: length of the history.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], alphabet: int, order: int = 3):
        if (alphabet + 1) ** (order + 1) > np.iinfo(np.int64).max:
            raise HmfError(f"n-gram model: order {order} over {alphabet} symbols is too large; use a smaller order")
        self.alphabet, self.order = alphabet, order
        joined = self._joined(sequences)
        self._tables: list[_Table] = []
        for length in range(order + 1):
            grams, histories = self._keys(joined, length)
            self._tables.append(_Table(grams, histories, alphabet + 1))

    def bits(self, sequences: Sequence[Sequence[int]]) -> float:
        """Total code length of all symbols of all sequences, in bits."""
        joined = self._joined(sequences)
        probability = np.full(sum(map(len, sequences)), 1.0 / self.alphabet)
        for length, table in enumerate(self._tables):
            probability = table.interpolate(*self._keys(joined, length), probability)
        return float(-np.log2(probability).sum())

    def _joined(self, sequences: Sequence[Sequence[int]]) -> Symbols:
        # Each document starts after `order` boundary symbols, so no history reaches into the previous document.
        boundary = np.full(self.order, self.alphabet, dtype=np.int64)
        return np.concatenate([part for s in sequences for part in (boundary, np.asarray(s, dtype=np.int64))])

    def _keys(self, joined: Symbols, length: int) -> tuple[Symbols, Symbols]:
        """Integer keys of (history, symbol) and of the history alone, for every symbol that is not a boundary."""
        places = np.flatnonzero(joined != self.alphabet)
        histories = np.zeros(len(places), dtype=np.int64)
        for back in range(length, 0, -1):
            histories = histories * (self.alphabet + 1) + joined[places - back]
        return histories * (self.alphabet + 1) + joined[places], histories


class _Table:
    """Counts of one history length, as sorted arrays."""

    def __init__(self, grams: Symbols, histories: Symbols, base: int):
        self.grams, self.gram_counts = np.unique(grams, return_counts=True)
        self.histories, self.history_counts = np.unique(histories, return_counts=True)
        self.followers = np.unique(self.grams // base, return_counts=True)[1]  # same order as self.histories

    def interpolate(self, grams: Symbols, histories: Symbols, shorter: NDArray[np.float64]) -> NDArray[np.float64]:
        count = _lookup(self.grams, self.gram_counts, grams)
        total = _lookup(self.histories, self.history_counts, histories)
        followers = _lookup(self.histories, self.followers, histories)
        seen = total > 0
        mixed = (count + followers * shorter) / np.where(seen, total + followers, 1)
        return cast(NDArray[np.float64], np.where(seen, mixed, shorter))


def _lookup(keys: Symbols, values: Symbols, queries: Symbols) -> Symbols:
    """The value of each query, or 0 where it is not among the sorted `keys`."""
    places = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[places] == queries, values[places], 0)


def bits_per_byte(
    train: Sequence[Sequence[int]], heldout: Sequence[Sequence[int]], alphabet: int, heldout_bytes: int, order: int = 3
) -> float:
    """Bits per byte of held-out documents, which are sequences of symbols (bytes or tokens).

    heldout_bytes: length of the documents' text in bytes.
    """
    if heldout_bytes <= 0:
        raise HmfError("n-gram model: no held-out text to score; give at least one document that is not empty")
    bits = NgramModel(train, alphabet, order).bits(heldout)
    if not math.isfinite(bits):
        raise HmfError(f"n-gram model: a held-out symbol is outside the alphabet of {alphabet} symbols")
    return bits / heldout_bytes
