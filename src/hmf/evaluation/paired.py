# SPDX-License-Identifier: Apache-2.0
"""The difference between two models' scores on the same prompts, and its significance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from hmf.evaluation.results import Answered

RESAMPLES = 10_000


@dataclass(frozen=True)
class Pair:
    """Counts, over `n` prompts, of those that only the first or only the second model answers correctly.

    Attributes:
        interval: 95% interval of the difference, by the paired bootstrap.
        p: two-sided p-value of McNemar's exact test.
    """

    n: int
    first_only: int
    second_only: int
    interval: tuple[float, float]
    p: float

    @property
    def difference(self) -> float:
        """Accuracy of the first model minus that of the second."""
        return (self.first_only - self.second_only) / self.n


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p-value of the exact test (McNemar 1947, Psychometrika 12:153-157).

    Null hypothesis: of the prompts on which the models differ, each model answers one correctly with probability 1/2.
    """
    n, least = first_only + second_only, min(first_only, second_only)
    return min(1.0, 2 * sum(comb(n, k) for k in range(least + 1)) / 2**n)


def compare(first: Sequence[Answered], second: Sequence[Answered]) -> Pair | None:
    """Compare the answers to the prompts that both models have answered; None if there are no such prompts.

    Two prompts are the same if their index and their text are equal.
    """
    other = {(one.index, one.prompt_sha256): one.correct for one in second}
    pairs = [(one.correct, other[key]) for one in first if (key := (one.index, one.prompt_sha256)) in other]
    if not pairs:
        return None
    differences = np.array([int(a) - int(b) for a, b in pairs])
    n, first_only, second_only = len(pairs), int((differences > 0).sum()), int((differences < 0).sum())
    # Resampling the prompts is equivalent to drawing the count of each kind.
    kinds = np.array([first_only, second_only, n - first_only - second_only]) / n
    drawn = np.random.default_rng(0).multinomial(n, kinds, RESAMPLES)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5])
    return Pair(n, first_only, second_only, (float(low), float(high)), mcnemar(first_only, second_only))


def compare_all(
    first: Mapping[str, Sequence[Answered]], second: Mapping[str, Sequence[Answered]]
) -> dict[str, Pair | None]:
    """`compare` for each task that both models have."""
    return {task: compare(answers, second[task]) for task, answers in first.items() if task in second}
