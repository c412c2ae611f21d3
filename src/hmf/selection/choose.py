# SPDX-License-Identifier: Apache-2.0
"""Choices from scores: ranking, greedy and local search; stability of a choice, and agreement of rankings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
import torch

from .scores import Choice, cost

Score = Callable[[Sequence[Choice]], Sequence[float]]  # the cost of each choice; lower is better
RESAMPLES = 200


def by_rank(costs: Sequence[float], keep: int) -> Choice:
    """Replace all but `keep` layers: those with the lowest cost when replaced alone. Ties go to the earlier layer."""
    order = sorted(range(len(costs)), key=lambda layer: costs[layer])
    return frozenset(order[: len(costs) - keep])


def greedy(score: Score, layers: int, keep: int) -> Choice:
    """Start with mixers in all layers, and `keep` times restore the attention that lowers the cost most."""
    choice = frozenset(range(layers))
    for _ in range(keep):
        choice = _best(score, [choice - {layer} for layer in sorted(choice)])
    return choice


def search(score: Score, layers: int, keep: int, limit: int) -> Choice:
    """The choice with the lowest cost among all choices, if there are at most `limit`.

    Otherwise the greedy choice, improved by exchanges of two layers until no exchange helps or `limit` choices were
    scored in exchanges.
    """
    if math.comb(layers, keep) <= limit:
        return _best(score, [frozenset(c) for c in combinations(range(layers), layers - keep)])
    choice, scored = greedy(score, layers, keep), 0
    while scored < limit:
        kept = sorted(set(range(layers)) - choice)
        exchanged = [choice - {out} | {into} for out in sorted(choice) for into in kept][: limit - scored]
        scored += len(exchanged)
        if (better := _best(score, [choice, *exchanged])) == choice:
            break
        choice = better
    return choice


def _best(score: Score, choices: Sequence[Choice]) -> Choice:
    costs = score(choices)
    return choices[min(range(len(choices)), key=lambda place: costs[place])]


def stability(
    known: Mapping[Choice, torch.Tensor],
    choose: Callable[[Mapping[Choice, float]], Choice],
    measures: Sequence[str],
    layers: int,
    seed: int = 0,
) -> tuple[float, list[float], list[tuple[float, float]]]:
    """Bootstrap over rows: RESAMPLES times, `choose` decides by the costs on rows drawn with replacement.

    Returns:
        The share of draws with the same choice as on all rows; for each layer, the share of draws in which it keeps
        attention; for each layer, the 95% interval of the cost of replacing it alone (NaN if that was not scored).
    """
    names = list(known)
    sums = torch.stack([known[name] for name in names])  # [choices, rows, measures, 2]
    rows, rng = sums.shape[1], np.random.default_rng(seed)
    drawn = torch.from_numpy(rng.multinomial(rows, [1 / rows] * rows, size=RESAMPLES)).double()
    costs = cost(torch.einsum("br,crmx->bcmx", drawn, sums), measures)  # [draws, choices]
    chosen = choose(dict(zip(names, cost(sums.sum(1), measures).tolist(), strict=True)))
    drawn_choices = [choose(dict(zip(names, values, strict=True))) for values in costs.tolist()]
    intervals = []
    for layer in range(layers):
        alone = frozenset([layer])
        if alone in known:
            low, high = costs[:, names.index(alone)].quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        else:
            low = high = math.nan
        intervals.append((low, high))
    kept = [sum(layer not in choice for choice in drawn_choices) / RESAMPLES for layer in range(layers)]
    return sum(choice == chosen for choice in drawn_choices) / RESAMPLES, kept, intervals


def agreement(scores: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float | None]]:
    """Kendall's tau-b and Spearman's rho of each pair of rankings, by "a, b"; None if a ranking is constant."""
    return {
        f"{a}, {b}": {"kendall": kendall(scores[a], scores[b]), "spearman": spearman(scores[a], scores[b])}
        for a, b in combinations(scores, 2)
    }


def kendall(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b; None if all values of `a` or of `b` are equal."""
    pairs = np.triu_indices(len(a), 1)
    signs = [np.sign(np.subtract.outer(x, x)[pairs]) for x in (np.asarray(a), np.asarray(b))]
    size = math.sqrt(float((signs[0] ** 2).sum() * (signs[1] ** 2).sum()))
    return float((signs[0] * signs[1]).sum()) / size if size else None


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rho: Pearson's correlation of the ranks, where ties have their mean rank; None as in `kendall`."""
    ranks = []
    for x in (np.asarray(a), np.asarray(b)):
        ranks.append((x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2)
    centred = [x - x.mean() for x in ranks]
    size = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / size if size else None
