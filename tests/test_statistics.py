import json
import math

import numpy as np
import pytest
from scipy import stats

from emmech.errors import DataError
from emmech.evaluation.significance import (
    Comparison,
    holm,
    holm_corrected,
    minimum_detectable_effect,
    paired_comparison,
    sign_flip_p,
)
from emmech.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    bootstrap_means,
    clustered_mean,
    design_effect,
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


def test_bootstrap_resamples_whole_clusters_in_their_size():
    # Draws of a = (0, 0, 0) and b = (1): aa 0/6, ab and ba 1/4, bb 2/2, with chances 1/4, 1/2, 1/4.
    values, clusters = [0, 0, 0, 1], list("aaab")
    means = bootstrap_means(values, clusters, seed=0, n_resamples=4000)
    found, counts = np.unique(means, return_counts=True)
    assert found.tolist() == [0, 0.25, 1]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)  # 4 standard errors
    estimate = bootstrap_mean(values, clusters, seed=0)
    assert (estimate.mean, estimate.low, estimate.high) == (0.25, 0, 1)
    assert (estimate.n_clusters, estimate.n, estimate.n_missing) == (2, 4, 0)


def test_bootstrap_of_single_answers_is_scipys():
    x = np.random.default_rng(5).exponential(10, 80)
    ours = bootstrap_mean(x.tolist(), list(range(80)), seed=0)
    theirs = stats.bootstrap(
        (x,), np.mean, method="percentile", n_resamples=9999, random_state=1
    ).confidence_interval
    width = theirs.high - theirs.low
    # 10,000 resamples place each quantile to about 1.5% of the width, in both.
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.07 * width)


def test_bootstrap_leaves_out_missing_values_and_knows_nothing_from_one_cluster():
    estimate = bootstrap_mean([3, None, 5], ["a", "b", "a"], seed=0)
    assert (estimate.mean, estimate.n_clusters, estimate.n, estimate.n_missing) == (4, 1, 2, 1)
    assert math.isnan(estimate.low)
    with pytest.raises(DataError, match="all 1 are missing"):
        bootstrap_mean([None], ["a"], seed=0)


def test_scores_of_unequal_clusters_are_covered_by_both_intervals_and_not_by_a_naive_one():
    """60 questions of 2 to 6 answers; question and answer deviate by 10 each, so the correlation is 1/2."""
    rng, inside, n_runs = np.random.default_rng(7), np.zeros(3), 1000
    for run in range(n_runs):
        sizes = rng.integers(2, 7, size=60)
        clusters = np.repeat(np.arange(60), sizes)
        values = (40 + 10 * rng.normal(size=60)[clusters] + 10 * rng.normal(size=len(clusters))).tolist()
        estimates = (
            clustered_mean(values, clusters.tolist(), unit="score"),
            bootstrap_mean(values, clusters.tolist(), seed=run, n_resamples=1000),
            clustered_mean(values, list(range(len(values))), unit="score"),
        )
        inside += [e.low <= 40 <= e.high for e in estimates]
    clustered, bootstrap, naive = inside / n_runs  # each good to ± 0.014
    assert 0.92 <= clustered <= 0.98
    assert 0.92 <= bootstrap <= 0.98
    assert naive < 0.85  # √V is low by about √(1 + 3.2/2): ±1.96 are ±1.2 true errors, 78%


def test_correlation_and_effective_n_by_hand():
    # Means 2, 6 about 4: MSB = 2 (4 + 4) / 1 = 16, MSW = 4 · 1 / 2 = 2; (16 - 2) / (16 + 2) = 7/9.
    effect = design_effect([1, 3, 5, 7], list("aabb"))
    assert (effect.icc, effect.cluster_size) == pytest.approx((7 / 9, 2))
    assert (effect.factor, effect.n_effective) == pytest.approx((16 / 9, 9 / 4))


def test_correlation_of_unequal_clusters_by_hand():
    # Means 1, 4 about 2: MSB = 2 · 1 + 1 · 4 = 6, MSW = 2/1; m0 = 3 - 5/3 = 4/3.
    # (6 - 2) / (6 + 2/3) = 3/5; factor 1 + 1/3 · 3/5 = 6/5.
    effect = design_effect([0, 2, 4, None], list("aabb"))
    assert (effect.icc, effect.cluster_size) == pytest.approx((3 / 5, 4 / 3))
    assert (effect.factor, effect.n_effective) == pytest.approx((6 / 5, 5 / 2))
    assert (effect.n, effect.n_clusters) == (3, 2)


@pytest.mark.parametrize(
    ("values", "icc", "n_effective"),
    [
        ([1, 1, 3, 3], 1, 2),  # nothing varies within: two answers' worth
        ([0, 2, 2**0.5, 2 + 2**0.5], 0, 4),  # MSB = MSW = 2: as good as independent
        ([0, 2, 0, 2], -1, 4),  # means alike, -1/(m - 1): never above n
    ],
)
def test_limits_of_correlation(values, icc, n_effective):
    effect = design_effect(values, list("aabb"))
    assert (effect.icc, effect.n_effective) == pytest.approx((icc, n_effective), abs=1e-9)


@pytest.mark.parametrize(
    ("values", "clusters", "n_effective"),
    [([1, 2, 5], "abc", 3), ([1, 2, 5], "aaa", 1), ([0.1] * 6, "aabbcc", 3)],
)
def test_unknown_correlation_takes_questions_for_the_sample(values, clusters, n_effective):
    effect = design_effect(values, list(clusters))
    assert math.isnan(effect.icc)
    assert effect.n_effective == n_effective


def test_correlation_agrees_with_scipys_analysis_of_variance():
    # Balanced: icc = (F - 1) / (F - 1 + m).
    groups = np.random.default_rng(4).normal(size=(9, 5)) + np.arange(9)[:, None] / 4
    f = stats.f_oneway(*groups).statistic
    effect = design_effect(groups.ravel().tolist(), np.repeat(np.arange(9), 5).tolist())
    assert effect.icc == pytest.approx((f - 1) / (f + 4))


def test_simulated_correlation_of_one_half_is_found():
    rng = np.random.default_rng(6)
    values = rng.normal(size=(2000, 1)) + rng.normal(size=(2000, 3))
    effect = design_effect(values.ravel().tolist(), np.repeat(np.arange(2000), 3).tolist())
    assert effect.icc == pytest.approx(0.5, abs=0.05)  # standard error about .015
    assert effect.n_effective == pytest.approx(3000, rel=0.05)  # 6000 / (1 + 2 · 1/2)
    assert effect.text().startswith("6000 answers to 2000 questions count as ")


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3], 2 / 8),  # +++ and ---
        ([1, 2, -3], 1),  # a sum of 0 is always reached
        ([3, 1, -1, 2], 6 / 16),  # sum 5: flipped of (3, 1, 1, 2) may be none or a single 1; both signs
        ([0.1, 0.2, 0.3, -0.1], 6 / 16),  # sum .5 of .7: again none or a single .1, despite rounding
        ([0, 0, 0, 5], 1),  # a zero has no sign: every flip gives ±5
        ([0.0, 0.0, 0.0], 1),
        ([4], 1),
        ([1] * 6, 2 / 64),  # the fewest questions that can be below .05
    ],
)
def test_sign_flip_p_by_enumeration(differences, p):
    assert sign_flip_p(differences) == p


@pytest.mark.parametrize("n", [5, 9, 12])
def test_sign_flip_p_is_scipys_exact_paired_permutation_test(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.6, 1, n), rng.normal(0, 1, n)
    theirs = stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=np.inf,
    )  # fmt: skip
    assert sign_flip_p((a - b).tolist()) == pytest.approx(theirs.pvalue)


def test_drawn_sign_flips_come_close_to_the_exact_p_value():
    d = np.random.default_rng(11).normal(0.4, 1, 16)
    signs = 1 - 2 * (np.arange(2**16)[:, None] >> np.arange(16) & 1)
    exact = float((np.abs(signs @ d) >= abs(d.sum()) - 1e-9).mean())
    assert sign_flip_p(d.tolist(), seed=1) == pytest.approx(exact, abs=0.015)  # standard error < .005
    assert sign_flip_p(d.tolist(), seed=1) == sign_flip_p(d.tolist(), seed=1)


def test_drawn_sign_flips_never_give_zero():
    # 2 / 2^40 of all flips reach the sum; none of 999 does.
    assert sign_flip_p([1.0] * 40, n_resamples=999) == 1 / 1000


def test_p_values_need_finite_differences():
    with pytest.raises(DataError, match="there are none"):
        sign_flip_p([])
    with pytest.raises(DataError, match="nan or infinite"):
        sign_flip_p([1.0, math.nan])


def test_holm_by_hand():
    # .005 · 4, .01 · 3, .03 · 2, then .04 · 1, lifted to the .06 before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([0.2]) == [0.2]


def test_holm_keeps_the_order_and_lies_between_no_correction_and_bonferronis():
    p = np.random.default_rng(8).random(30) ** 3
    corrected = np.array(holm(p.tolist()))
    assert (np.diff(corrected[np.argsort(p)]) >= 0).all()
    assert (corrected >= p).all()
    assert (corrected <= np.minimum(30 * p, 1)).all()


@pytest.mark.parametrize("p_values", [[], [0.1, 1.2], [math.nan]])
def test_holm_refuses_what_is_no_p_value(p_values):
    with pytest.raises(DataError, match=r"p values in \[0, 1\]"):
        holm(p_values)


def test_conditions_of_unequal_answers_are_compared_by_question():
    # q1: 1/2 - 0, q2: 1 - 0; q3 and q4 have no partner, and one answer is missing.
    found = paired_comparison(
        [1, 0, 1, 1, 1], ["q1", "q1", "q2", "q3", "q3"], [0, 0, 0, 1, None], ["q1", "q2", "q2", "q4", "q1"]
    )
    estimate = found.difference
    assert (estimate.mean, estimate.low, estimate.high) == (0.75, 0.5, 1)
    assert (estimate.n_clusters, estimate.n, estimate.n_missing) == (2, 6, 1)
    assert (found.p, found.n_unpaired) == (2 / 4, 2)
    assert found.spread == pytest.approx(8**-0.5)  # both 1/4 from the mean: √(2/16)
    assert found.text() == (
        ".75 [.50, 1.00], p = .500, 2 questions (2 in one condition only); too few questions for any p < 0.05"
    )


def test_a_comparison_has_the_interval_of_paired_difference():
    rng, keys = np.random.default_rng(9), list(range(20))
    a, b = rng.random(20).tolist(), rng.random(20).tolist()
    assert paired_comparison(a, keys, b, keys, seed=3).difference == (
        Estimate(**{**vars(paired_difference(a, b, keys, seed=3)), "n": 40})
    )


def test_comparison_without_shared_questions_is_refused():
    with pytest.raises(DataError, match="of 1 in one and 2 in the other none is in both"):
        paired_comparison([1], ["a"], [0, 1], ["b", "c"])


def compared(differences):
    keys = list(range(len(differences)))
    return paired_comparison(differences, keys, [0] * len(keys), keys)


def test_a_null_result_says_what_would_have_been_found():
    # Spread √(16/15); t tables for 15 degrees of freedom: (2.131 + .866) / √15 = .774.
    found = compared([1, -1] * 8)
    assert found.detectable == pytest.approx((2.131 + 0.866) / math.sqrt(15), rel=1e-3)
    assert found.text().endswith(", p = 1.000, 16 questions; 80% power for a difference of .77")
    assert "power" not in compared([1.0, 2.0] * 8).text()
    assert "unknown, as all questions differ alike" in compared([0] * 8).text()


def test_few_questions_are_held_to_the_p_values_they_can_give():
    # Of 8 questions p is a multiple of 2/256, so p < .05 is p <= 6 · 2/256.
    effect = minimum_detectable_effect(1.0, 8, alpha=0.05, power=0.8)
    t = stats.t(7)
    assert effect == pytest.approx((t.ppf(1 - 6 / 256) + t.ppf(0.8)) / math.sqrt(8))
    # Of 6 the one p value below .05 is 2/64, and below .03 there is none.
    assert math.isnan(minimum_detectable_effect(1.0, 6, alpha=0.03, power=0.8))


def test_a_family_is_corrected_and_its_power_is_that_of_the_strictest_step():
    found = holm_corrected({"layers": compared([1, -1] * 8), "prefix": compared([1.0, 2.0] * 4)})
    assert (found["layers"].p_holm, found["prefix"].p_holm) == (1, 4 / 256)
    # Level .025: the t table has 2.490 for .9875 and 15 degrees of freedom.
    assert found["layers"].detectable == pytest.approx((2.490 + 0.866) / math.sqrt(15), rel=1e-3)
    assert found["prefix"].text().endswith("p = .016 (Holm, 2 tests), 8 questions")
    assert compared([1.0, 2.0] * 4).p_holm is None


def test_small_p_values_are_shown_as_bounds():
    assert ", p < .001, " in Comparison(Estimate(1.0, 1.0, 1.0, 20, 40), 1e-4, 1.0).text()


@pytest.mark.parametrize(("spread", "n"), [(0.0, 20), (math.nan, 1), (1.0, 5)])
def test_no_effect_is_called_detectable_where_nothing_is_known_or_can_be_found(spread, n):
    assert math.isnan(minimum_detectable_effect(spread, n, alpha=0.05, power=0.8))


def test_detectable_effect_on_many_questions_is_the_normal_one():
    # (1.959964 + .841621) / √10,000, t and normal agreeing to 2e-4 there.
    effect = minimum_detectable_effect(1.0, 10_000, alpha=0.05, power=0.8)
    assert effect == pytest.approx(0.02801585, rel=3e-4)


@pytest.mark.parametrize("n", [8, 40])
def test_the_detectable_effect_is_found_four_times_out_of_five(n):
    rng, n_runs = np.random.default_rng(n), 800
    effect = minimum_detectable_effect(2.0, n, alpha=0.05, power=0.8)
    noise = 2 * rng.normal(size=(n_runs, n))
    found, false = (
        np.mean([sign_flip_p(d, seed=i, n_resamples=999) < 0.05 for i, d in enumerate((noise + e).tolist())])
        for e in (effect, 0.0)
    )
    assert found == pytest.approx(0.8, abs=0.05)  # standard error .014
    assert false == pytest.approx(0.05, abs=0.025)  # standard error .008
    t_test = stats.ttest_1samp(2 * rng.normal(size=(5000, n)) + effect, 0, axis=1).pvalue < 0.05
    assert t_test.mean() == pytest.approx(0.8, abs=0.02)  # standard error .006
