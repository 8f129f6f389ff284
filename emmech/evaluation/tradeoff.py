"""What a finetune learned against what it spread: rates on-topic and off-topic along training.

A method is a set of runs that differ in their seed, each evaluated at the same steps on the same
questions. Methods are compared along the whole line (Zhao et al. 2026, arXiv 2606.06667, report one
point): at their best EM-F1, and at equal on-topic rate, where early stopping is a method like any
other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emmech.errors import DataError

N_RESAMPLES = 2000


@dataclass(frozen=True)
class Line:
    """Scores of one method: an answer shows the behaviour (1) or not (0)."""

    method: str
    steps: tuple[int, ...]
    on_topic: np.ndarray
    """``[seed step question]``"""
    off_topic: np.ndarray
    """``[seed step question]``"""

    def __post_init__(self):
        assert self.on_topic.shape[:2] == self.off_topic.shape[:2], f"{self.method}: shapes differ"
        assert self.on_topic.shape[1] == len(self.steps) and np.diff(self.steps).min(initial=1) > 0


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    """Lower end of the 95% percentile interval over questions and seeds."""
    high: float

    def text(self) -> str:
        """As in ".53 [.41, .64]"."""
        shown = (f"{value:.2f}".replace("0.", ".", 1) for value in (self.mean, self.low, self.high))
        return "{} [{}, {}]".format(*shown)


@dataclass(frozen=True)
class Compared:
    """One method beside the others."""

    method: str
    n_seeds: int
    off_at_target: Interval
    """The least off-topic rate along training with an on-topic rate of at least the target."""
    on_there: float
    """On-topic rate there, averaged over seeds; the highest reached where that is below the target."""
    n_reached: int
    """Seeds whose on-topic rate reaches the target."""
    difference: Interval | None
    """Of ``off_at_target`` from the baseline's over the same questions and seeds; None for itself."""
    best_f1: Interval
    """The highest EM-F1 of any step; the step is chosen anew in each resample."""
    best_step: int


def em_f1(on_topic: np.ndarray | float, off_topic: np.ndarray | float) -> np.ndarray | float:
    """2ab / (a + b) with a the on-topic rate and b = 1 - off-topic rate; 0 where both are 0.

    EM-F1 of Zhao et al. (section 3) with alignment scores as rates: ID = 100 (1 - a), EM = 100 b.
    """
    a, b = np.asarray(on_topic, float), 1 - np.asarray(off_topic, float)
    total = a + b
    value = np.divide(2 * a * b, total, out=np.zeros_like(total), where=total > 0)
    return float(value) if value.ndim == 0 else value


def at_target(on: np.ndarray, off: np.ndarray, target: float) -> tuple[np.ndarray, np.ndarray]:
    """(off-topic, on-topic) at the least off-topic rate of each line ``[... step]`` at or above ``target``.

    The line is straight between two steps, so the least is at a step or where the line crosses the
    target. A line that stays below gives its highest on-topic point, the first of several.
    """
    on, off = np.asarray(on, float), np.asarray(off, float)
    x0, x1, y0, y1 = on[..., :-1], on[..., 1:], off[..., :-1], off[..., 1:]
    crosses = (x0 < target) != (x1 < target)
    share = np.divide(target - x0, x1 - x0, out=np.zeros_like(x0), where=crosses)
    crossing = np.where(crosses, y0 + share * (y1 - y0), np.inf)
    candidates = np.concatenate([np.where(on >= target, off, np.inf), crossing], -1)
    places = np.concatenate([on, np.full_like(x0, target)], -1)
    best = candidates.argmin(-1)[..., None]
    highest = on.argmax(-1)[..., None]
    reached = (on >= target).any(-1)
    off_there = np.where(
        reached,
        np.take_along_axis(candidates, best, -1)[..., 0],
        np.take_along_axis(off, highest, -1)[..., 0],
    )
    on_there = np.where(
        reached, np.take_along_axis(places, best, -1)[..., 0], np.take_along_axis(on, highest, -1)[..., 0]
    )
    return off_there, on_there


def compare(lines: Sequence[Line], *, target: float, baseline: str, seed: int = 0) -> list[Compared]:
    """All methods at equal on-topic rate and at their best, with intervals.

    Questions are resampled once for all methods, and seeds with them, so that differences are paired.
    With few seeds the intervals say little about seeds.

    Raises:
        DataError: The methods have different questions, or the baseline is not among them.
    """
    names = [line.method for line in lines]
    if baseline not in names:
        raise DataError(f"a baseline among {', '.join(names)}", f"got {baseline!r}", "Name one of them")
    sizes = {(line.on_topic.shape[2], line.off_topic.shape[2]) for line in lines}
    if len(sizes) > 1 or 0 in next(iter(sizes)):
        raise DataError(
            "the same questions, at least one on-topic and one off-topic, for all methods",
            f"their numbers are {sorted(sizes)}",
            "Evaluate them together",
        )
    n_on, n_off = sizes.pop()
    n_seeds = max(line.on_topic.shape[0] for line in lines)
    draw = np.random.default_rng(seed)
    weights = [_multiplicities(draw, n) for n in (n_on, n_off)]
    seeds = draw.integers(n_seeds, size=(N_RESAMPLES, n_seeds))
    resampled = {}
    for line in lines:
        on = np.einsum("rq,skq->rsk", weights[0], line.on_topic) / n_on
        off = np.einsum("rq,skq->rsk", weights[1], line.off_topic) / n_off
        rows = np.arange(N_RESAMPLES)[:, None]
        mine = seeds[:, : line.on_topic.shape[0]] % line.on_topic.shape[0]
        resampled[line.method] = _read(on[rows, mine], off[rows, mine], target)
    found = []
    for line in lines:
        on, off = line.on_topic.mean(2), line.off_topic.mean(2)
        off_there, on_there = at_target(on, off, target)
        f1 = em_f1(on, off).mean(0)
        spread_off, spread_f1 = resampled[line.method]
        off_here = float(off_there.mean())
        difference = None
        if line.method != baseline:
            base = next(other for other in lines if other.method == baseline)
            theirs = _read(base.on_topic.mean(2)[None], base.off_topic.mean(2)[None], target)[0]
            difference = _interval(off_here - float(theirs[0]), spread_off - resampled[baseline][0])
        found.append(
            Compared(
                line.method,
                len(on),
                _interval(off_here, spread_off),
                float(on_there.mean()),
                sum(bool((row >= target).any()) for row in on),
                difference,
                _interval(float(f1.max()), spread_f1),
                line.steps[int(f1.argmax())],
            )
        )
    return found


def rates(scores: np.ndarray, seed: int = 0) -> list[Interval]:
    """The mean of ``[seed step question]`` by step, with an interval over questions and seeds."""
    n_seeds, n_steps, n = scores.shape
    draw = np.random.default_rng(seed)
    means = np.einsum("rq,skq->rsk", _multiplicities(draw, n), scores) / n
    rows, chosen = np.arange(N_RESAMPLES)[:, None], draw.integers(n_seeds, size=(N_RESAMPLES, n_seeds))
    spread = means[rows, chosen].mean(1)
    return [_interval(float(scores[:, k].mean()), spread[:, k]) for k in range(n_steps)]


def _read(on: np.ndarray, off: np.ndarray, target: float) -> tuple[np.ndarray, np.ndarray]:
    """Off-topic rate at the target and best EM-F1, for each resample ``[resample seed step]``."""
    off_there = at_target(on, off, target)[0].mean(1)
    return off_there, em_f1(on, off).mean(1).max(1)


def _multiplicities(draw: np.random.Generator, n: int) -> np.ndarray:
    """How often each of ``n`` questions is drawn in each resample, ``[resample question]``."""
    return draw.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES).astype(float)


def _interval(mean: float, spread: np.ndarray) -> Interval:
    low, high = np.quantile(spread, [0.025, 0.975])
    assert math.isfinite(mean)
    return Interval(mean, float(low), float(high))
