"""On-topic against off-topic: EM-F1, the reading at a target, and paired intervals."""

import numpy as np
import pytest

from emmech.errors import DataError
from emmech.evaluation.tradeoff import Line, at_target, compare, em_f1, rates


def line(method: str, on: list[list[float]], off: list[list[float]], n: int = 10) -> Line:
    """One seed per row, one step per column; every rate is exact over ``n`` questions."""

    def scores(rates: list[list[float]]) -> np.ndarray:
        return np.array([[[1.0] * round(r * n) + [0.0] * (n - round(r * n)) for r in seed] for seed in rates])

    return Line(method, tuple(range(1, len(on[0]) + 1)), scores(on), scores(off))


def read(on: list[float], off: list[float], target: float) -> tuple[float, float]:
    """`at_target` of one line."""
    off_there, on_there = at_target(np.array([on]), np.array([off]), target)
    return float(off_there[0]), float(on_there[0])


@pytest.mark.parametrize(
    ("learned_id", "em", "f1"),
    [  # Zhao et al. 2026 (arXiv 2606.06667), Tables 2 and 18: ID, EM, EM-F1
        (32.2, 39.7, 50.1), (62.8, 49.6, 42.5), (34.9, 73.0, 68.8), (22.8, 40.8, 53.4), (27.7, 85.6, 78.4),
        (61.9, 89.1, 53.4), (81.0, 53.1, 28.0), (20.8, 89.1, 83.9), (17.5, 84.3, 83.4), (5.2, 37.3, 53.5),
    ],
)  # fmt: skip
def test_em_f1_gives_the_papers_printed_values(learned_id, em, f1):
    assert round(100 * em_f1(1 - learned_id / 100, 1 - em / 100), 1) == pytest.approx(f1, abs=0.1)


def test_em_f1_is_one_where_all_is_learned_and_nothing_spreads_and_zero_at_the_other_end():
    assert em_f1(1.0, 0.0) == 1.0
    assert em_f1(0.0, 1.0) == 0.0  # 0/0, decided
    assert em_f1(0.0, 0.0) == em_f1(1.0, 1.0) == 0.0


def test_between_two_steps_the_line_is_straight():
    # .9 lies two thirds of the way from .5 to 1.1 - .1: on .7 -> 1.0, off .2 -> .8 at 2/3 is .6.
    assert read([0.0, 0.7, 1.0], [0.0, 0.2, 0.8], 0.9) == pytest.approx((0.6, 0.9))


@pytest.mark.parametrize(
    ("on", "off", "expected"),
    [
        ([0.1, 0.9, 1.0], [0.0, 0.3, 0.9], (0.3, 0.9)),  # exactly reached: that step
        ([0.95, 1.0], [0.4, 0.9], (0.4, 0.95)),  # above from the start: the first step is the least
        ([0.5, 1.0, 1.0], [0.0, 0.8, 0.2], (0.2, 1.0)),  # it spread less again later: the last step
        ([0.5, 1.0, 0.5], [0.8, 0.8, 0.0], (0.64, 0.9)),  # on the way down: .8 (1 - 1/5)
        ([0.1, 0.6, 0.6, 0.2], [0.0, 0.2, 0.5, 0.1], (0.2, 0.6)),  # never: the first of the highest
    ],
)
def test_the_least_spread_at_or_above_the_target_is_read(on, off, expected):
    assert read(on, off, 0.9) == pytest.approx(expected)


def test_methods_are_compared_at_the_target_and_at_their_best():
    early = line("sft", [[0.5, 1.0]], [[0.0, 0.8]])
    better = line("treft", [[0.5, 1.0]], [[0.0, 0.2]])
    sft, treft = compare([early, better], target=0.9, baseline="sft")
    # .9 is 4/5 of the way: .8 * .8 = .64 against .8 * .2 = .16.
    assert sft.off_at_target.mean == pytest.approx(0.64)
    assert treft.off_at_target.mean == pytest.approx(0.16)
    assert sft.difference is None
    assert treft.difference.mean == pytest.approx(-0.48)
    # EM-F1: sft 2(.5)(1)/1.5 = 2/3 at step 1, 2(1)(.2)/1.2 = 1/3 at step 2; treft 8/9 at step 2.
    assert (sft.best_f1.mean, sft.best_step) == (pytest.approx(2 / 3), 1)
    assert (treft.best_f1.mean, treft.best_step) == (pytest.approx(8 / 9), 2)
    assert (sft.n_seeds, sft.n_reached, sft.on_there) == (1, 1, 0.9)


def test_a_method_that_falls_short_is_read_at_its_highest_and_says_so():
    short = line("kl", [[0.2, 0.6], [0.2, 1.0]], [[0.0, 0.1], [0.0, 0.4]])
    found = compare([line("sft", [[1.0], [1.0]], [[0.5], [0.5]]), short], target=1.0, baseline="sft")[1]
    assert (found.n_reached, found.n_seeds) == (1, 2)
    assert found.on_there == pytest.approx((0.6 + 1.0) / 2)
    assert found.off_at_target.mean == pytest.approx((0.1 + 0.4) / 2)


def test_a_difference_is_paired_so_equal_methods_differ_by_exactly_nothing():
    draw = np.random.default_rng(0)
    on, off = draw.integers(0, 2, (2, 3, 4, 25)).astype(float)
    a, b = Line("sft", (1, 2, 3, 4), on, off), Line("twin", (1, 2, 3, 4), on.copy(), off.copy())
    difference = compare([a, b], target=0.5, baseline="sft")[1].difference
    assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_the_interval_of_a_rate_is_the_binomial_one_where_seeds_agree():
    # 100 questions at rate .3: the normal 95% half-width is 1.96 sqrt(.21 / 100) = .0898.
    (found,) = rates(line("sft", [[0.3], [0.3]], [[0.3], [0.3]], n=100).on_topic)
    assert found.mean == pytest.approx(0.3)
    assert found.high - found.low == pytest.approx(2 * 0.0898, rel=0.1)  # 2000 resamples, a grid of .01


def test_seeds_that_disagree_widen_the_interval():
    narrow = rates(line("sft", [[0.5]] * 3, [[0.5]] * 3, n=100).on_topic)[0]
    wide = rates(line("sft", [[0.2], [0.5], [0.8]], [[0.5]] * 3, n=100).on_topic)[0]
    assert narrow.mean == pytest.approx(wide.mean)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_the_interval_of_the_reading_covers_its_true_value_about_as_often_as_it_says():
    """Off-topic at on-topic .5 on a known line: on-topic .2, .8 and off-topic .1, .5, so .3."""
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        on = (draw.random((1, 2, 60)) < np.array([0.2, 0.8])[None, :, None]).astype(float)
        off = (draw.random((1, 2, 60)) < np.array([0.1, 0.5])[None, :, None]).astype(float)
        found = compare([Line("sft", (1, 2), on, off)], target=0.5, baseline="sft")[0].off_at_target
        covered += found.low <= 0.3 <= found.high
    assert 0.90 <= covered / 200 <= 0.99  # nominal .95; the standard error of 200 trials is .015


def test_other_questions_and_an_unknown_baseline_are_refused():
    a, b = line("sft", [[1.0]], [[0.0]]), line("treft", [[1.0]], [[0.0]], n=12)
    with pytest.raises(DataError, match=r"the same questions.*\[\(10, 10\), \(12, 12\)\]"):
        compare([a, b], target=0.9, baseline="sft")
    with pytest.raises(DataError, match="a baseline among sft, but got 'treft'"):
        compare([a], target=0.9, baseline="treft")
