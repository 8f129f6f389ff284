"""How far two raters of the same answers agree, as numbers with bootstrap intervals.

Usage:
    spearman([(10, 20), (40, 30), (90, 95)])
    bootstrap_interval(cohen_kappa, below, questions, seed=0).text()
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Number = float | int
Pairs = Sequence[tuple[Number, Number]] | np.ndarray
"""One answer's values by either rater, ``[answer rater]``."""
RESAMPLES = 2_000


@dataclass(frozen=True)
class Interval:
    """A 95% percentile bootstrap interval."""

    low: float | None
    """None where one question, or a statistic undefined in every resample, leaves it unknown."""
    high: float | None
    n_resamples: int
    n_undefined: int
    """Resamples left out because the statistic was undefined in them, as where one side is constant."""

    def text(self) -> str:
        """As in "[0.41, 0.64], undefined in 12 of 2000 resamples"; "?" is unknown."""
        low, high = ("?" if end is None else f"{end:.2f}" for end in (self.low, self.high))
        left_out = f", undefined in {self.n_undefined} of {self.n_resamples} resamples"
        return f"[{low}, {high}]" + (left_out if self.n_undefined else "")


def spearman(pairs: Pairs) -> float | None:
    """Rank correlation, -1 to 1, ties sharing their mean rank; None for one pair or a constant side."""
    x, y = map(_centred_ranks, np.asarray(pairs, dtype=float).T)
    spread = float(x @ x) * float(y @ y)
    return float(x @ y) / math.sqrt(spread) if spread > 0 else None


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks less their mean; all 0 where the values are alike."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place] - (len(place) + 1) / 2


def cohen_kappa(pairs: Pairs) -> float | None:
    """(p_o - p_e) / (1 - p_e), where p_e is the agreement of two independent raters; None for p_e = 1.

    Args:
        pairs: Whether either rater says yes.
    """
    yes = np.asarray(pairs, dtype=bool)
    n, n_a, n_b = len(yes), *(int(count) for count in yes.sum(axis=0))
    by_chance = n_a * n_b + (n - n_a) * (n - n_b)  # whole numbers, so that p_e = 1 is seen exactly
    if by_chance == n * n:
        return None
    observed = int((yes[:, 0] == yes[:, 1]).sum())
    return (observed * n - by_chance) / (n * n - by_chance)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float | None],
    pairs: Pairs,
    clusters: Sequence[Hashable],
    *,
    seed: int,
    n_resamples: int = RESAMPLES,
) -> Interval:
    """The percentile interval of a statistic, resampling whole clusters of answers.

    Each resample draws G of the G clusters with replacement, with all their answers, as in
    ``bootstrap_mean``. The interval is from the 2.5% to the 97.5% quantile of those resamples in which
    the statistic is defined; where many are not, it tells little. Like every percentile interval it is
    too narrow for few clusters, and has no width where two raters agree on everything.

    In simulation (40 questions of 4 answers, correlation .6, 70% of the variance between questions) it
    held the true Spearman 94% and kappa 93% of the time; with each answer a cluster, 80% and 88%.

    Args:
        statistic: ``spearman``, ``cohen_kappa`` or the like; None where it is undefined.
        pairs: What it is of.
        clusters: What each answer shares with others, as its question.
        seed: Of the resamples.
        n_resamples: How many.
    """
    table = np.asarray(pairs)
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.array([number[cluster] for cluster in clusters])
    members = [np.flatnonzero(index == i) for i in range(len(number))]
    if len(members) < 2:
        return Interval(None, None, 0, 0)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n_resamples):
        drawn = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        found.append(statistic(table[drawn]))
    defined = [value for value in found if value is not None]
    low, high = map(float, np.quantile(defined, [0.025, 0.975])) if defined else (None, None)
    return Interval(low, high, n_resamples, n_resamples - len(defined))
