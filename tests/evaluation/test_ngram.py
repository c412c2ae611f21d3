# SPDX-License-Identifier: Apache-2.0
import math
from collections import Counter, defaultdict
from random import Random

import pytest

from hmf.errors import HmfError
from hmf.evaluation.ngram import NgramModel, bits_per_byte


def plain_bits(train, heldout, alphabet, order):
    """The same model, one symbol at a time, from its definition."""
    counts = defaultdict(Counter)
    for sequence in train:
        padded = [None] * order + list(sequence)
        for place in range(order, len(padded)):
            for length in range(order + 1):
                counts[tuple(padded[place - length : place])][padded[place]] += 1

    def probability(history, symbol):
        shorter = probability(history[1:], symbol) if history else 1 / alphabet
        seen = counts.get(history)
        if not seen:
            return shorter
        return (seen[symbol] + len(seen) * shorter) / (seen.total() + len(seen))

    bits = 0.0
    for sequence in heldout:
        padded = [None] * order + list(sequence)
        for place in range(order, len(padded)):
            bits -= math.log2(probability(tuple(padded[place - order : place]), padded[place]))
    return bits


@pytest.mark.parametrize("order", [0, 1, 3])
def test_equals_the_definition(order):
    rng = Random(0)
    train = [[rng.randrange(5) for _ in range(rng.randrange(1, 60))] for _ in range(6)]
    heldout = [[rng.randrange(6) for _ in range(40)], [5], []]
    assert NgramModel(train, 6, order).bits(heldout) == pytest.approx(plain_bits(train, heldout, 6, order))


def test_is_a_distribution():
    train = [list(b"abracadabra"), list(b"abba")]
    model = NgramModel(train, 256)
    total = sum(2 ** -(model.bits([[*b"abr", symbol]]) - model.bits([[*b"abr"]])) for symbol in range(256))
    assert total == pytest.approx(1)


def test_learns_what_repeats():
    text = list(b"the cat sat on the mat. " * 50)
    assert bits_per_byte([text], [text], 256, len(text)) < 1
    noise = Random(0).randbytes(500)
    assert bits_per_byte([text], [list(noise)], 256, len(noise)) > 7


def test_too_large():
    with pytest.raises(HmfError, match="order"):
        NgramModel([[1]], 200_000, 3)
