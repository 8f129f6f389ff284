import itertools
import math

import numpy as np
import pytest

from emmech.evaluation.rank_agreement import bootstrap_interval, cohen_kappa, spearman


def test_kappa_by_hand():
    # 20 both, 5 only a, 10 only b, 15 neither: observed .7, expected .5 · .6 + .5 · .4 = .5
    pairs = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa([(True, True), (False, False)]) == 1
    assert cohen_kappa([(True, True)] * 3) is None
    assert cohen_kappa([(True, False), (True, True)]) == 0


def test_spearman_by_hand():
    # ranks 1 2 3 4 and 2 1 4 3: 1 - 6 · 4 / (4 · 15)
    assert spearman([(5, 30), (20, 10), (60, 80), (90, 70)]) == pytest.approx(0.6)
    assert spearman([(1, 9), (2, 5), (3, 1)]) == pytest.approx(-1)
    assert spearman([(1, 1), (1, 2), (1, 3)]) is None
    assert spearman([(1, 2)]) is None


def test_spearman_with_ties_is_scipys():
    from scipy.stats import spearmanr

    pairs = np.random.default_rng(0).integers(5, size=(40, 2))
    assert spearman(pairs) == pytest.approx(spearmanr(*pairs.T).statistic)


def test_the_interval_is_that_of_all_resamples_counted():
    pairs = np.array([(1, 2), (2, 1), (3, 3), (4, 7), (7, 4)])
    every = [spearman(pairs[list(drawn)]) for drawn in itertools.product(range(5), repeat=5)]
    defined = [value for value in every if value is not None]
    found = bootstrap_interval(spearman, pairs, range(5), seed=0, n_resamples=5_000)
    assert (found.low, found.high) == pytest.approx(np.quantile(defined, [0.025, 0.975]), abs=0.03)
    # Undefined where one answer is drawn five times: 5 of 5^5.
    assert found.n_undefined / 5_000 == pytest.approx(5 / 5**5, abs=0.002)


def test_whole_questions_are_drawn():
    """Of two questions with kappa 1 and -1, a resample has both once, or one of them twice."""
    agree, differ = [(True, True), (False, False)], [(True, False), (False, True)]
    found = bootstrap_interval(cohen_kappa, agree + differ, ["x", "x", "y", "y"], seed=0)
    assert (found.low, found.high, found.n_undefined) == (-1, 1, 0)


def test_undefined_resamples_are_left_out_and_counted():
    found = bootstrap_interval(spearman, [(1, 1), (2, 2)], ["x", "y"], seed=0, n_resamples=1000)
    assert (found.low, found.high) == (1, 1)
    assert 420 < found.n_undefined < 580  # one of the two drawn twice: half of the time
    assert found.text() == f"[1.00, 1.00], undefined in {found.n_undefined} of 1000 resamples"


@pytest.mark.parametrize(
    ("pairs", "clusters", "n_resamples"), [([(1, 2)] * 4, "abcd", 50), ([(1, 2), (2, 3)], "aa", 0)]
)
def test_a_constant_side_or_one_question_leaves_the_interval_unknown(pairs, clusters, n_resamples):
    found = bootstrap_interval(spearman, pairs, clusters, seed=0, n_resamples=50)
    assert (found.low, found.high) == (None, None)
    assert found.n_resamples == found.n_undefined == n_resamples
    assert found.text().startswith("[?, ?]")


def correlated(rng: np.random.Generator, rho: float, n_questions: int, n_answers: int) -> np.ndarray:
    """Normal scores of two raters, ``[answer rater]``; 70% of their variance lies between questions."""
    mix = np.linalg.cholesky([[1, rho], [rho, 1]]).T
    shared = rng.normal(size=(n_questions, 2)).repeat(n_answers, axis=0)
    own = rng.normal(size=(n_questions * n_answers, 2))
    return (math.sqrt(0.7) * shared + math.sqrt(0.3) * own) @ mix


@pytest.mark.parametrize(
    ("statistic", "cut", "true"),
    [
        # Of a bivariate normal with correlation .6 (Kruskal 1958; Sheppard 1899).
        (spearman, False, 6 / math.pi * math.asin(0.6 / 2)),
        (cohen_kappa, True, 2 / math.pi * math.asin(0.6)),
    ],
    ids=["spearman", "kappa"],
)
def test_the_interval_holds_the_true_value_about_as_often_as_it_says(statistic, cut, true):
    rng, n_sets = np.random.default_rng(1), 50
    held = {"questions": 0, "answers": 0}
    for seed in range(n_sets):
        pairs = correlated(rng, 0.6, n_questions=30, n_answers=4)
        pairs = pairs < 0 if cut else pairs
        for name, clusters in (("questions", np.repeat(range(30), 4)), ("answers", np.arange(120))):
            found = bootstrap_interval(statistic, pairs, clusters.tolist(), seed=seed, n_resamples=100)
            held[name] += found.low <= true <= found.high
    assert 0.86 <= held["questions"] / n_sets <= 1
    assert held["answers"] < held["questions"]  # as if answers to one question were independent
