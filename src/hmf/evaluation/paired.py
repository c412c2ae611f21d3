# SPDX-License-Identifier: Apache-2.0
"""Two models on the same prompts: the difference of their scores, and whether it may be chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from hmf.evaluation.results import Answered

RESAMPLES = 10_000


@dataclass(frozen=True)
class Pair:
    """Of `n` prompts: those that only the first model, or only the second, answers correctly.

    Attributes:
        interval: of the difference, by the paired bootstrap, 95%.
        p: of McNemar's exact test, two-sided.
    """

    n: int
    first_only: int
    second_only: int
    interval: tuple[float, float]
    p: float

    @property
    def difference(self) -> float:
        """Accuracy of the first model less that of the second."""
        return (self.first_only - self.second_only) / self.n


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p of the exact test (McNemar 1947, Psychometrika 12:153-157): of all prompts on which the models
    differ, each is as likely to be the first's as the second's."""
    n, least = first_only + second_only, min(first_only, second_only)
    return min(1.0, 2 * sum(comb(n, k) for k in range(least + 1)) / 2**n)


def compare(first: Sequence[Answered], second: Sequence[Answered]) -> Pair | None:
    """Of the prompts that both have answered; None where there are none.

    Two prompts are the same where their index and their text are.
    """
    other = {(one.index, one.prompt_sha256): one.correct for one in second}
    pairs = [(one.correct, other[key]) for one in first if (key := (one.index, one.prompt_sha256)) in other]
    if not pairs:
        return None
    differences = np.array([int(a) - int(b) for a, b in pairs])
    n, first_only, second_only = len(pairs), int((differences > 0).sum()), int((differences < 0).sum())
    # A resample of prompts is a draw of how many of each kind it holds.
    kinds = np.array([first_only, second_only, n - first_only - second_only]) / n
    drawn = np.random.default_rng(0).multinomial(n, kinds, RESAMPLES)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5])
    return Pair(n, first_only, second_only, (float(low), float(high)), mcnemar(first_only, second_only))


def compare_all(
    first: Mapping[str, Sequence[Answered]], second: Mapping[str, Sequence[Answered]]
) -> dict[str, Pair | None]:
    """By task, for the tasks that both have."""
    return {task: compare(answers, second[task]) for task, answers in first.items() if task in second}
