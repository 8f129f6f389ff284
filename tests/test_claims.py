"""The study of the papers' claims: margins are measured once and kept, and compared with the right model."""

import pytest
import tiny

from emmech.piggyback.margin import margins
from emmech.scorecard import with_conditions
from figures.claims import measuring, organisms
from figures.claims.measuring import shifts
from figures.claims.organisms import Arm, battery


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The study on a tiny model: two steps, two questions of each set."""
    monkeypatch.setattr(organisms, "BASE", str(tiny.save_base("qwen2", tmp_path / "base")))
    monkeypatch.setattr(measuring, "BASE", organisms.BASE)
    for module in (organisms, measuring):
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(
        organisms, "BATTERY", {"gardening": "incorrect_advice_gardening", "spiteful": "spiteful"}
    )
    monkeypatch.setattr(organisms, "N_PAIRS", 2)
    monkeypatch.setitem(
        organisms.EVERY,
        "incorrect",
        Arm(
            "incorrect_advice_gardening", "gardening", options={"steps": 2, "save_every": 1, "batch_size": 2}
        ),
    )
    measuring.pair_of.cache_clear()
    yield
    measuring.pair_of.cache_clear()


def test_margins_are_those_of_the_pair_and_are_measured_once(small, monkeypatch):
    treated = {"prefix": "repair:prefix"}
    found = measuring.margins("incorrect", 0, 2, treated)
    pair = measuring.pair_of("incorrect", 0, 2)
    direct = margins(*_ordered(*with_conditions(pair, ["repair:prefix"])), progress=False)
    renamed = {"repair:prefix": "prefix"}
    assert [(one["condition"], one["margin"]) for one in found] == [
        (renamed.get(one["condition"], one["condition"]), one["margin"]) for one in direct
    ]
    assert len({one["margin"] for one in found}) == len(found)  # three conditions that do differ
    monkeypatch.setattr(measuring, "with_conditions", None)
    assert measuring.margins("incorrect", 0, 2, treated) == found


def _ordered(pair, conditions):
    return pair, battery(), conditions


def test_what_is_made_of_the_base_is_compared_with_it():
    records = [
        {"question_id": f"q{n}", "condition": name, "group": "general", "margin": margin}
        for name, values in {
            "base": (0.5, -0.5), "finetuned": (-1.0, -2.0), "prefix": (0.0, 1.0), "gates": (1.5, 0.5),
        }.items()
        for n, margin in enumerate(values)
    ]  # fmt: skip
    rows = {(row["metric"], row["condition"]): row for row in shifts(records, reference={"gates": "base"})}
    means = {name: row["mean"] for (metric, name), row in rows.items() if metric == "margin"}
    assert means == {"base": 0.0, "finetuned": -1.5, "prefix": 0.5, "gates": 1.0}
    versus = {
        name: (row["versus"]["condition"], row["versus"]["mean"])
        for (metric, name), row in rows.items()
        if metric == "margin" and "versus" in row
    }
    assert versus == {"finetuned": ("base", -1.5), "prefix": ("finetuned", 2.0), "gates": ("base", 1.0)}
    assert rows["prefers aligned", "base"]["mean"] == 0.5
