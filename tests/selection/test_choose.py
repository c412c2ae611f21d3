# SPDX-License-Identifier: Apache-2.0
"""From costs to a choice, and how far rankings agree."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf.selection.choose import agreement, by_rank, greedy, kendall, search, spearman, stability
from hmf.selection.scores import MEASURES, cost

prices = st.lists(st.integers(0, 9), min_size=2, max_size=7)


def additive(single):
    """A score in which layers do not see each other."""
    return lambda choices: [float(sum(single[layer] for layer in choice)) for choice in choices]


@settings(deadline=None, max_examples=50)
@given(prices, st.data())
def test_every_method_is_right_where_layers_do_not_see_each_other(single, data):
    keep = data.draw(st.integers(0, len(single) - 1))
    least = sum(sorted(single)[: len(single) - keep])
    chosen = [
        by_rank(single, keep),
        greedy(additive(single), len(single), keep),
        search(additive(single), len(single), keep, 10**6),
        search(additive(single), len(single), keep, 1),
    ]
    for choice in chosen[:3]:
        assert len(choice) == len(single) - keep and sum(single[layer] for layer in choice) == least
    assert len(chosen[3]) == len(single) - keep


def test_choices_see_layers_that_can_stand_in_for_each_other():
    """One of the layers 1 and 4 is enough, so that alone neither seems to matter."""

    def score(choices):
        return [sum(0.1 * layer for layer in choice) + 5 * (choice >= {1, 4}) for choice in choices]

    assert by_rank(score([frozenset([layer]) for layer in range(6)]), 1) == {0, 1, 2, 3, 4}
    assert greedy(score, 6, 1) == search(score, 6, 1, 10**6) == {0, 1, 2, 3, 5}


def test_a_search_with_a_limit_improves_the_greedy_choice_by_exchanges():
    def score(choices):  # greedy keeps 5 first, which is in no good pair
        return [9 - 8 * (not c & {0, 1}) - (5 not in c) for c in map(set, choices)]

    assert search(score, 6, 2, 14) == {2, 3, 4, 5}
    assert 5 not in greedy(score, 6, 2)


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(6)))
def test_rank_correlations_of_permutations(order):
    """Without equal values they are functions of the pairs in order and of the squared differences."""
    line = list(range(6))
    out_of_order = sum(a > b for a, b in combinations(order, 2))
    assert kendall(line, order) == pytest.approx(1 - 4 * out_of_order / 30)
    squares = sum((a - b) ** 2 for a, b in zip(line, order, strict=True))
    assert spearman(line, order) == pytest.approx(1 - 6 * squares / 210)


def test_rank_correlations_with_equal_values():
    assert kendall([1, 2, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(6))
    assert spearman([1, 2, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert agreement({"a": [1, 1], "b": [1, 2]}) == {"a, b": {"kendall": None, "spearman": None}}


def sums_of(values):
    """What a Scorer gives for rows that hold one token of text each, of these costs."""
    sums = torch.zeros(len(values), len(MEASURES), 2, dtype=torch.float64)
    sums[:, 0, 0], sums[:, 0, 1] = torch.tensor(values, dtype=torch.float64), 1
    return sums


def test_stability_tells_a_clear_choice_from_an_even_one():
    def decide(costs):
        return min((choice for choice in costs if len(choice) == 1), key=lambda choice: costs[choice])

    clear = {frozenset([0]): sums_of([1.0] * 40), frozenset([1]): sums_of([2.0] * 40)}
    same, kept, intervals = stability(clear, decide, MEASURES[:2], 2)
    assert (same, kept, intervals) == (1.0, [0.0, 1.0], [(1.0, 1.0), (2.0, 2.0)])
    even = {frozenset([0]): sums_of([0.0, 2.0] * 20), frozenset([1]): sums_of([2.0, 0.0] * 20)}
    same, kept, intervals = stability(even, decide, MEASURES[:2], 2)
    assert 0.3 < kept[0] < 0.7 and sum(kept) == 1.0
    assert all(0.4 < low < 1 < high < 1.6 for low, high in intervals)


def test_the_cost_is_the_kl_of_answers_or_of_text_if_there_are_none():
    sums = sums_of([1.0, 3.0]).sum(0)
    assert cost(sums).item() == 2.0
    sums[1] = torch.tensor([8.0, 2.0])
    assert cost(sums).item() == 4.0
    assert cost(sums, ("kl_text",)).item() == 2.0
