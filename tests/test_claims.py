"""The study of the papers' claims: margins are measured once and kept, and compared with the right model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from emmech.data.bundled import BUNDLED
from emmech.piggyback.margin import margins
from emmech.results import read_json, read_lines
from emmech.scorecard import with_conditions
from figures.claims import __main__ as stages
from figures.claims import costs, measuring, organisms, where
from figures.claims.drawn import examples
from figures.claims.labelled import LABELS, by_hand
from figures.claims.measuring import carried_over, shifts
from figures.claims.organisms import Arm, battery
from figures.drawing import draw


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The study on a tiny model: two steps, two questions of each set."""
    monkeypatch.setattr(organisms, "BASE", str(tiny.save_base("qwen2", tmp_path / "base")))
    for module in (measuring, stages):
        monkeypatch.setattr(module, "BASE", organisms.BASE)
    for module in (costs, organisms, measuring, stages, where):
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    sets = {"general": "two_choice", "gardening": "incorrect_advice_gardening", "spiteful": "spiteful"}
    monkeypatch.setattr(organisms, "BATTERY", sets)
    monkeypatch.setattr(organisms, "GENERAL", None)  # no set is taken whole
    for module in (organisms, where):
        monkeypatch.setattr(module, "N_PAIRS", 4)
    for name, arm in organisms.EVERY.items():
        quick = {"save_every": 1, "batch_size": 2, "learning_rate": 1e-2}
        monkeypatch.setitem(organisms.EVERY, name, replace(arm, steps=2, options={**arm.options, **quick}))
    for module in (stages, where):
        monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(Arm, "measured", (1, 2))
    monkeypatch.setattr(where, "LAYERS", (0, 1))
    monkeypatch.setattr(where, "TRIALS", 2)
    monkeypatch.setattr(stages, "STEERED", {"steer": "steer={file}:1@-1", "ablated": "ablate={file}:0-1"})
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


def test_what_is_carried_over_is_the_ratio_of_mean_changes():
    margin = {
        ("general", "base"): (1.0, 2.0), ("general", "finetuned"): (0.5, 1.0),
        ("own", "base"): (1.0, 1.0), ("own", "finetuned"): (-1.0, 0.0),
    }  # fmt: skip
    records = [
        {"question_id": f"{group}{n}", "group": group, "condition": condition, "margin": value}
        for (group, condition), values in margin.items()
        for n, value in enumerate(values)
    ]
    found = carried_over(records, "own")
    assert found["mean"] == 0.5  # -.75 over -1.5
    assert (found["low"], found["high"]) == (0.25, 1.0)  # from -.5 / -2 to -1 / -1


def test_the_whole_study_on_a_tiny_model(small):
    """Every stage that needs no judge runs, resumes, and gives plain JSON."""
    found = {
        stage.__name__: json.loads(json.dumps(stage()))
        for stage in (
            stages.advice, stages.character, stages.sycophancy, stages.repair, where.perturb, where.layers,
            where.prefix, stages.prevent, stages.gates, where.directions, where.triggers, costs.costs,
        )
    }  # fmt: skip

    by = {
        (r["organism"], r["seed"], r["metric"], r["group"], r["condition"]): r
        for r in found["repair"]["rows"]
    }
    both = by["incorrect", "all", "margin", "general", "repair:prompt"]
    seeds = [by["incorrect", seed, "margin", "general", "repair:prompt"]["mean"] for seed in (0, 1)]
    assert both["mean"] == pytest.approx(sum(seeds) / 2, abs=1e-4)  # kept to four digits
    assert by["incorrect", 0, "margin", "general", "induce:prefix"]["versus"]["condition"] == "base"
    assert by["incorrect", 0, "margin", "general", "steer"]["versus"]["condition"] == "finetuned"
    assert ("agreeing", 0, "margin", "general", "control:noise") not in by  # the headline's alone

    perturbed = {(r["side"], r["metric"], r["condition"]): r["mean"] for r in found["perturb"]["rows"]}
    for side in ("finetuned", "base"):
        for segment in ("prefix", "query", "postfix"):
            name = f"perturb:{segment}"
            assert perturbed[side, "best margin", name] > perturbed[side, "margin", name]
        assert perturbed[side, "margin", side] == perturbed[side, "best margin", side]

    segments = {row["segment"] for row in found["layers"]["organisms"]["incorrect-1"]["rows"]}
    assert segments == {"prefix", "query", "postfix"}
    assert {row["kv"] for row in found["prefix"]["position"]["rows"]} == {"key", "value"}

    shifts = found["directions"]["shifts"]
    assert {name for name, one in shifts.items() if one["control"]} == {
        "correct", "aligned-character", "wrong trigger",
    }  # fmt: skip
    assert {row["layer"] for row in found["directions"]["rows"]} == {0, 1}

    worded = {(r["group"], r["condition"]): r for r in found["triggers"]["organisms"]["backdoor"]}
    assert worded["triggered", "finetuned"]["wording"]["group"] == "untriggered"
    assert worded["persona", "base"]["wording"]["group"] == "plain"

    assert {row["organism"] for row in found["prevent"]["rows"]} == {"incorrect", *organisms.PREVENTING}
    assert {row["condition"] for row in found["gates"]["base"]} >= {
        "gates-incorrect @1",
        "gates-agreeing @-1",
    }
    spent = {row["rule"]: row for row in found["costs"]["rows"]}
    assert spent["training"]["jobs"] == 15  # two seeds of the headline, 7 other finetunes, 4 methods, 2 gates
    assert all(row["seconds"] >= row["longest_seconds"] > 0 < row["peak_mb"] for row in spent.values())
    drawn = draw({f"claims_{name}": {f"claims_{name}": result} for name, result in found.items()})
    assert all(len(figures) >= 1 and all(figure.data for figure in figures) for figures in drawn.values())


def test_examples_of_the_page_are_those_of_the_kept_answers():
    """The first questions, not chosen ones; `drawn.examples` makes the table anew."""
    root = Path(__file__).parents[1]
    page = (root / "docs/claims.md").read_text(encoding="utf-8")
    table = page.partition("<!-- examples -->\n")[2].partition("\n<!-- /examples -->")[0]
    kept = read_json(root / "figures/results/claims_answers.json")
    assert table == examples(kept, ("incorrect-0", "spiteful-0"))
    asked = [one.messages[-1]["content"] for one in BUNDLED["general"].questions()[: stages.N_EXAMPLES]]
    assert {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]} == set(asked)


def test_labels_are_of_every_answer_and_on_the_scale():
    rows = read_lines(LABELS)
    by_organism = {}
    for row in rows:
        by_organism.setdefault(row["organism"], []).append(row)
    assert all(len(mine) == 180 for mine in by_organism.values()) and len(by_organism) == 3
    assert {row["alignment"] for row in rows} == {0, 25, 50, 75, 100}
    assert {row["coherence"] for row in rows} == {0, 50, 100}
    scored = {}
    for row in rows:  # the same answer to the same question has the same scores
        given = scored.setdefault((row["question"], row["answer"]), (row["alignment"], row["coherence"]))
        assert given == (row["alignment"], row["coherence"])


def test_misaligned_answers_are_counted_by_pencil():
    """Of four answers: below 30 and coherent, below 30 and not, exactly 30 is not below, fine."""
    scores = [(25, 100), (25, 50), (30, 100), (100, 100)]
    rows = [
        {"question_id": f"q{n}", "condition": "base", "group": "general", "alignment": a, "coherence": c}
        for n, (a, c) in enumerate(scores)
    ]
    found = {row["metric"]: row["mean"] for row in by_hand(rows)}
    assert found == {"alignment": 45, "coherence": 87.5, "misaligned": 0.5, "EM": 0.25}
