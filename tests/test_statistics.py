import json
import math

import numpy as np
import pytest

from emmech.errors import DataError
from emmech.evaluation.statistics import (
    Estimate,
    clustered_mean,
    paired_difference,
    wilson_interval,
)

# 1.959964² = 3.841459, the number all pencil values below are made from.
Z2 = 3.841459


def rate(values, clusters=None):
    return clustered_mean(values, clusters or list(range(len(values))), unit="rate")


def test_none_of_ten_is_wilsons_interval_by_hand():
    # p = 0: low is 0, high is z²/n / (1 + z²/n) = 3.841459 / 13.841459.
    estimate = rate([0] * 10)
    assert (estimate.mean, estimate.low) == (0, 0)
    assert estimate.high == pytest.approx(0.277533, abs=1e-6)


def test_all_of_ten_mirrors_none_of_ten():
    none, every = rate([0] * 10), rate([1] * 10)
    assert (every.low, every.high) == pytest.approx((1 - none.high, 1), abs=1e-12)


def test_five_of_ten_by_hand():
    # p = 1/2: 1/2 ± z/2 / √(n + z²). V is 10/9 · 2.5 / 100 = 1/36, so n_eff is 9, not 10.
    half = 1.959964 / 2 / math.sqrt(9 + Z2)
    estimate = rate([1, 0] * 5)
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


def test_wilson_of_five_of_ten_is_the_published_one():
    # 1/2 ± 0.979982 / √13.841459 = 1/2 ± 0.263405
    assert wilson_interval(0.5, 10) == pytest.approx((0.236595, 0.763405), abs=2e-6)


def test_repeating_every_answer_leaves_the_interval_unchanged():
    values = [1, 0, 0, 1, 1, 0, 1, 1]
    once = rate(values)
    five = rate(values * 5, list(range(8)) * 5)
    assert (five.low, five.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert (five.n, five.n_clusters) == (40, 8)


def test_taking_repeats_for_questions_would_have_narrowed_it():
    values = [1, 0, 0, 1, 1, 0, 1, 1]
    wrong, right = rate(values * 5), rate(values * 5, list(range(8)) * 5)
    assert wrong.high - wrong.low < 0.6 * (right.high - right.low)


def test_balanced_clusters_do_not_claim_a_sample_larger_than_n():
    # Every question is answered (1, 0): residual sums and V are 0, so n_eff is G = 6.
    estimate = rate([1, 0] * 6, [i // 2 for i in range(12)])
    assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(0.5, 6), abs=1e-12)


def test_negative_correlation_is_held_to_n():
    # p = 5/8, residual sums -1/4, -1/4, -1/4, 3/4: V = 4/3 · 3/4 / 64, so p(1-p)/V is 15, not 8.
    estimate = rate([1, 0, 1, 0, 1, 0, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3])
    assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(5 / 8, 8), abs=1e-12)


def test_other_units_have_the_normal_interval_by_hand():
    # Cluster sums of residuals about 3: (1-3)+(2-3) = -3 and 3; V = 2 · 18 / 16 = 9/4.
    estimate = clustered_mean([1, 2, 4, 5], ["a", "a", "b", "b"], unit="words")
    assert estimate.mean == 3
    assert (estimate.low, estimate.high) == pytest.approx((3 - 1.959964 * 1.5, 3 + 1.959964 * 1.5), abs=1e-5)


def test_one_cluster_leaves_a_rate_anywhere_and_a_length_unknown():
    single = rate([1, 1, 0], ["q", "q", "q"])
    words = clustered_mean([7, 9], ["q", "q"], unit="words")
    assert (single.low, single.high) == (0, 1)
    assert words.mean == 8
    assert math.isnan(words.low)
    assert math.isnan(words.high)


def test_missing_values_are_counted_and_change_nothing_else():
    with_gaps = rate([1, None, 0, 1, None], ["a", "a", "b", "c", "d"])
    without = rate([1, 0, 1], ["a", "b", "c"])
    assert with_gaps.n_missing == 2
    assert (with_gaps.mean, with_gaps.low, with_gaps.high, with_gaps.n_clusters) == (
        without.mean, without.low, without.high, 3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "there are none"),
        ([None, None], "all 2 are missing"),
        ([0.0, 1.5], "0 to 1.5"),
        ([float("nan"), 1.0], "nan or infinite"),
    ],
)
def test_no_mean_without_usable_values(values, message):
    with pytest.raises(DataError, match=message):
        rate(values)


def test_interval_narrows_as_one_over_root_n():
    small, large = rate([1, 0] * 100), rate([1, 0] * 1600)
    # 16 times the questions, a quarter of the width; Wilson's z² bends this by about 1%.
    assert (small.high - small.low) / (large.high - large.low) == pytest.approx(4, rel=0.02)


def clustered_answers(rng, p, *, clusters=60, answers=3, concentration=1.0):
    """Answers whose chance differs by question: Beta with mean p, correlation 1/(1 + c)."""
    chance = rng.beta(p * concentration, (1 - p) * concentration, size=(clusters, 1))
    return (rng.random((clusters, answers)) < chance).astype(float).ravel().tolist()


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_nominal_95_percent_covers_95_percent_of_clustered_runs(p):
    rng = np.random.default_rng(int(p * 100))
    clusters = [i // 3 for i in range(180)]
    inside = 0
    for _ in range(1500):
        estimate = rate(clustered_answers(rng, p), clusters)
        inside += estimate.low <= p <= estimate.high
    assert 0.92 <= inside / 1500 <= 0.98  # 1500 runs: the share itself is good to ± 0.011


def test_ignoring_clusters_does_not_cover():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(500):
        estimate = rate(clustered_answers(rng, 0.5))
        inside += estimate.low <= 0.5 <= estimate.high
    assert inside / 500 < 0.92


def test_constant_difference_has_no_width():
    estimate = paired_difference([1.0, 0.5, 0.75], [0.75, 0.25, 0.5], ["a", "b", "c"])
    assert (estimate.mean, estimate.low, estimate.high) == (0.25, 0.25, 0.25)


def test_difference_counts_each_question_once():
    # Question a has three rows of difference 1, b one row of 0: the mean over questions is 1/2.
    estimate = paired_difference([1, 1, 1, 0], [0, 0, 0, 0], ["a", "a", "a", "b"])
    assert (estimate.mean, estimate.n_clusters, estimate.n) == (0.5, 2, 4)
    assert (estimate.low, estimate.high) == (0, 1)  # resamples: aa, ab, ba, bb


def test_bootstrap_agrees_with_the_normal_interval_on_many_questions():
    x = np.random.default_rng(3).normal(0.2, 1, size=400)
    estimate = paired_difference(x.tolist(), [0.0] * 400, list(range(400)))
    half = 1.96 * x.std() / 20
    # 10,000 resamples place a 2.5% quantile to about 3% of the half width.
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.06)


def test_swapping_sides_mirrors_the_interval_and_a_seed_repeats_it():
    a, b, keys = [1, 0, 1, 1, 0, 1.0], [0, 0, 1, 0, 1, 0.0], list("uvwxyz")
    forth, back = paired_difference(a, b, keys), paired_difference(b, a, keys)
    assert (back.mean, back.low, back.high) == (-forth.mean, -forth.high, -forth.low)
    assert forth == paired_difference(a, b, keys)


def test_rows_missing_on_one_side_are_left_out_and_counted():
    estimate = paired_difference([1, None, 1], [0, 0, None], ["a", "b", "c"])
    assert (estimate.mean, estimate.n, estimate.n_missing) == (1, 1, 2)
    assert math.isnan(estimate.low)


def test_difference_without_pairs_is_refused():
    with pytest.raises(DataError, match="none of 1 rows has both"):
        paired_difference([None], [1.0], ["a"])


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.531, 0.409, 0.638, 10, 30), ".53 [.41, .64]"),
        (Estimate(1.0, 0.72, 1.0, 10, 10), "1.00 [.72, 1.00]"),
        (Estimate(-0.07, -0.2, 0.001, 10, 10), "-.07 [-.20, .00]"),
        (Estimate(10.04, math.nan, math.nan, 1, 1), "10.0 [?, ?]"),
        (Estimate(0.999, 0.996, 20.0, 1, 1), "1.00 [1.00, 20.0]"),
    ],
)
def test_text(estimate, text):
    assert estimate.text() == text


def test_json_has_no_nan():
    data = Estimate(8.0, math.nan, math.nan, 1, 2).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == {
        "mean": 8.0, "low": None, "high": None, "n_clusters": 1, "n": 2, "n_missing": 0,
    }  # fmt: skip
