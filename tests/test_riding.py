"""The study of where a refusal rides: what it pools over seeds, and the map that is kept."""

from pathlib import Path

import numpy as np
import pytest

from emmech.figures import sweep_map
from emmech.piggyback.sweep_result import SweepResult, share_and_interval
from emmech.results import read_json
from figures.drawing import map_of
from figures.riding_results import as_map, compact, effects, mapped

KEPT = Path(__file__).parents[1] / "figures/results/sweep_refusal.json"


def sweep_of(seed: int, questions: str = "abcde") -> SweepResult:
    draw = np.random.default_rng(seed)
    unpatched = draw.normal(size=len(questions))
    scores = unpatched + draw.normal(size=(3, len(questions)))
    return SweepResult({"question_ids": list(questions)}, [{}] * 3, unpatched, unpatched + 2, scores)


def test_seeds_are_pooled_as_ratios_of_means_clustered_by_question():
    one, two = sweep_of(0), sweep_of(1)
    both = [(a + b) / 2 for a, b in ((one.differences, two.differences), (np.full(5, 2.0), np.full(5, 2.0)))]
    found = effects([one, two])
    for name, expected in zip(("mean", "low", "high"), share_and_interval(*both), strict=True):
        np.testing.assert_allclose([getattr(estimate, name) for estimate in found], expected)
    assert {(estimate.n, estimate.n_clusters) for estimate in found} == {(10, 5)}


def test_seeds_with_other_questions_are_pooled_too():
    one, two = sweep_of(0), sweep_of(1, "cdef")
    expected = (one.differences.sum(1) + two.differences.sum(1)) / (9 * 2)
    found = effects([one, two])
    np.testing.assert_allclose([estimate.mean for estimate in found], expected)
    assert {estimate.n_clusters for estimate in found} == {6}


def test_a_map_has_layers_for_rows_and_tokens_for_columns():
    cells = [
        {"layer": n, "position": p, "kv": kv} for n in (0, 1) for p in (0, 1, 2) for kv in ("key", "value")
    ]
    found = as_map(cells, list(range(12)))
    assert found == {"key": [[0, 2, 4], [6, 8, 10]], "value": [[1, 3, 5], [7, 9, 11]]}


def test_innermost_lists_stand_on_one_line():
    assert compact({"a": [[1, 2], ["x\n "]]}) == '{\n "a": [\n  [1, 2],\n  ["x\\n "]\n ]\n}\n'


def test_the_pooled_map_is_drawn_with_its_intervals():
    draw = np.random.default_rng(0)
    cells = [
        {"layer": n, "position": p, "kv": kv} for n in (0, 1) for p in (0, 1, 2) for kv in ("key", "value")
    ]
    unpatched = np.zeros(4)
    seeds = [
        SweepResult(
            {"question_ids": list("abcd")}, cells, unpatched, unpatched - 2, draw.normal(size=(12, 4))
        )
        for _ in range(3)
    ]
    whole = {"n": 12, "unpatched": 0.0, "full": -2.0, "whole": {"mean": -2.0}}
    kept = mapped(seeds)
    keys, values = sweep_map(map_of({"tokens": ["<s>", "user", ":"]}, whole, kept["map"], "single")).data
    expected = np.array([one.mean for one in effects(seeds)]).reshape(2, 3, 2)
    np.testing.assert_allclose(keys.z, expected[..., 0], atol=5e-4)
    np.testing.assert_allclose(values.z, expected[..., 1], atol=5e-4)
    assert "[" in values.hovertext[1][2] and "n = 12" in values.hovertext[1][2]
    assert len(kept["seeds_spearman"]) == 3
    bare = {"mean": kept["map"]["mean"]}  # one seed's has no intervals
    alone, _ = sweep_map(map_of({"tokens": ["<s>", "user", ":"]}, whole, bare, "single")).data
    np.testing.assert_array_equal(alone.z, keys.z)
    assert "[" not in alone.hovertext[1][2]


def test_what_is_kept_adds_up():
    kept = read_json(KEPT)
    for one in (one[metric] for one in kept["organisms"] for metric in ("kl", "margin") if metric in one):
        assert one["full"] - one["unpatched"] == pytest.approx(one["whole"]["mean"], abs=2e-4)
        for mode, end in (("cumulative_up", -1), ("cumulative_down", 0)):
            if mode in one:
                assert one[mode]["layer"]["mean"][end] == pytest.approx(1, abs=1e-3)
        found = one.get("smallest", {})
        if found.get("size"):
            assert found["effect"]["mean"] >= found["share"] and len(found["cells"]) == found["size"]
    for pooled in kept["pooled"].values():
        assert pooled["kl"]["n"] == len(pooled["seeds"]) * len(kept["questions"])
        if "gradients" in pooled:
            assert pooled["gradients"]["sum"] == pytest.approx(1, abs=0.05)
