"""Means over answers with 95% intervals that know which answers share a question.

Several answers to one question are not independent, so the spread is taken between questions
(Miller 2024, arXiv 2411.00640, on clustered standard errors). Nothing here tests a hypothesis or
corrects for looking at many layers.

Usage:
    clustered_mean([1, 0, 1, 1], ["q1", "q1", "q2", "q2"], unit="rate").text()
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

from emmech.errors import DataError

Number = float | int
Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    mean: float
    low: float
    """Lower end of the 95% interval; nan where one cluster leaves it unknown."""
    high: float
    n_clusters: int
    n: int
    """Values that entered the mean."""
    n_missing: int = 0
    """Values that were None and did not."""

    def to_json(self) -> dict[str, float | int | None]:
        """The fields, with None for nan, which JSON does not have."""
        return {k: None if math.isnan(v) else v for k, v in asdict(self).items()}

    def text(self) -> str:
        """As in ".53 [.41, .64]"; "1.00" and "-.07" keep what matters, "?" is unknown."""
        low, high = _short(self.low), _short(self.high)
        return f"{_short(self.mean)} [{low}, {high}]"


def clustered_mean(
    values: Sequence[Number | None], clusters: Sequence[Hashable], *, unit: str | None
) -> Estimate:
    """The mean over all values, with an interval that treats clusters, not values, as the sample.

    The squared standard error is V = G/(G - 1) · Σ_g (Σ_{i in g} (x_i - mean))² / n², for G
    clusters (Miller 2024, arXiv 2411.00640, on clustered errors). Unlike the paper, G/(G - 1)
    corrects for few clusters.

    For `unit="rate"` (values in [0, 1]) the interval is Wilson's (1927), which stays in [0, 1] and
    has a width at 0 and 1, at the effective sample size p(1 - p) / V: that many independent
    answers would have the same V. Never above n; G where V is 0 (a rate of 0 or 1 among them). One
    cluster says nothing about others, so its interval is (0, 1).

    In simulation (60 questions of 3 answers, correlation 1/2) it held the true rate 95% of the
    time for rates of .1 to .5, and 92% at .05.

    For other units it is mean ± 1.96 √V, and nan with one cluster.

    Raises:
        DataError: no values, a rate outside [0, 1], or lists of different lengths.
    """
    assert len(values) == len(clusters), f"{len(values)=} {len(clusters)=}"
    kept = [(v, c) for v, c in zip(values, clusters, strict=True) if v is not None]
    if not kept:
        got = f"all {len(values)} are missing" if values else "there are none"
        raise DataError("values to take the mean of", got, "Check the answers and the detector")
    x = np.array([value for value, _ in kept], dtype=float)
    if not np.isfinite(x).all():
        raise DataError("finite values", "some are nan or infinite", "Pass None for missing ones")
    if unit == "rate" and (x.min() < 0 or x.max() > 1):
        raise DataError("rates in [0, 1]", f"{x.min():g} to {x.max():g}", "Pass another unit")
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(c for _, c in kept))}
    sums = np.zeros(len(number))
    np.add.at(sums, [number[c] for _, c in kept], x - x.mean())
    n, g, mean = len(x), len(number), float(x.mean())
    variance = g / (g - 1) * float(sums @ sums) / n**2 if g > 1 else math.nan
    if unit == "rate":
        low, high = _rate_interval(mean, variance, n, g) if g > 1 else (0.0, 1.0)
    else:
        low, high = mean - Z95 * math.sqrt(variance), mean + Z95 * math.sqrt(variance)
    return Estimate(mean, low, high, g, n, len(values) - n)


def _rate_interval(p: float, variance: float, n: int, g: int) -> tuple[float, float]:
    spread = p * (1 - p)
    # Below rounding error the residual sums are zero: balanced clusters, or all answers alike.
    n_effective = min(spread / variance, n) if variance > 1e-18 and spread > 0 else g
    return wilson_interval(p, n_effective)


def wilson_interval(p: Number, n: Number) -> tuple[float, float]:
    """The rates whose normal 95% range at sample size n just holds p (Wilson 1927, JASA 22)."""
    center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
    low = 0.0 if p == 0 else max(0.0, center - half)  # exact, free of rounding
    return low, 1.0 if p == 1 else min(1.0, center + half)


def paired_difference(
    values_a: Sequence[Number | None],
    values_b: Sequence[Number | None],
    keys: Sequence[Hashable],
    *,
    seed: int = 0,
    n_resamples: int = 10_000,
) -> Estimate:
    """The mean over questions of a - b, with a percentile bootstrap interval over questions.

    Rows with one key are answers to one question and are averaged first, so each question counts
    once. A row with None on either side is left out and counted in `n_missing`. The interval is
    nan with one question, and too narrow with fewer than about ten.

    Raises:
        DataError: no row has both values.
    """
    assert len(values_a) == len(values_b) == len(keys), f"{len(values_a)=} {len(values_b)=}"
    by_key: dict[Hashable, list[Number]] = {}
    for a, b, key in zip(values_a, values_b, keys, strict=True):
        if a is not None and b is not None:
            by_key.setdefault(key, []).append(a - b)
    if not by_key:
        got = f"none of {len(keys)} rows has both"
        raise DataError("values from both sides", got, "Check that both runs answered")
    differences = np.array([np.mean(d) for d in by_key.values()])
    n, g = sum(map(len, by_key.values())), len(by_key)
    low = high = math.nan
    if g > 1:
        means = _bootstrap_means(differences, n_resamples, np.random.default_rng(seed))
        low, high = map(float, np.quantile(means, [0.025, 0.975]))
    return Estimate(float(differences.mean()), low, high, g, n, len(keys) - n)


def _bootstrap_means(x: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of resamples with replacement, in blocks that hold memory to a few MB."""
    block = max(1, 1_000_000 // len(x))
    sizes = [min(block, n_resamples - i) for i in range(0, n_resamples, block)]
    return np.concatenate([x[rng.integers(len(x), size=(s, len(x)))].mean(axis=1) for s in sizes])


def _short(value: float) -> str:
    if math.isnan(value):
        return "?"
    text = f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    if float(text) == 0:
        return ".00"
    return text.replace("0.", ".", 1) if abs(float(text)) < 1 else text
