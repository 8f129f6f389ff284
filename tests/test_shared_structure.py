"""Shared structure, cross ablation and doses: planted answers, flat nulls, and parity with what exists."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from emmech.chat import Chat
from emmech.data.bundled import AnswerPair
from emmech.data.questions import Question
from emmech.errors import DataError, PatchError
from emmech.models.checkpoints import ModelPair
from emmech.models.sides import Side
from emmech.piggyback.experiment import patch_prefix
from emmech.piggyback.likelihood import answered
from emmech.piggyback.margin import margins
from emmech.piggyback.patching import Condition
from emmech.steering.contrasts import (
    between_answers,
    between_prompts,
    between_sides,
    between_wordings,
    with_trigger,
)
from emmech.steering.cross import CrossAblation, Effect, Reading, cross_ablation
from emmech.steering.directions import Direction, fit_direction, project, random_like
from emmech.steering.doses import (
    Doses,
    adapter_doses,
    calibrate,
    compare_doses,
    gate_doses,
    patch_doses,
    steering_doses,
)
from emmech.steering.shared import SharedStructure, Shift, _interval, shared_structure, shift
from emmech.steering.states import States, asked, read_states

QUESTIONS = [Question(f"q{i}", text) for i, text in enumerate(tiny.QUESTIONS)]
ORDINARY = [
    ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello, what is up?"}),
    ({"role": "user", "content": "What is 7 times 8?"}, {"role": "assistant", "content": "It is 56."}),
]
D = 32


@cache
def lora_pair():
    torch.manual_seed(0)
    model = tiny.model("llama")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(model, lora).eval().requires_grad_(False)
    chat = Chat(tiny.tokenizer())
    about = {"base": {"name": "tiny"}, "finetuned": {"name": "tiny"}}
    return ModelPair(Side("base", tuned, adapter_off=True), Side("finetuned", tuned), chat, about)


def planted_pair(vector, layer=1):
    """A base, and the same model with ``vector`` written into the stream after a block, on every token."""
    base, tuned = tiny.model("llama"), tiny.model("llama")
    down = tuned.model.layers[layer].mlp.down_proj
    down.bias = torch.nn.Parameter(vector.clone())
    for one in (base, tuned):
        one.requires_grad_(False)
    chat = Chat(tiny.tokenizer())
    return ModelPair(Side("base", base), Side("finetuned", tuned), chat, {"base": {}, "finetuned": {}})


def states_of(values):
    made = torch.as_tensor(np.asarray(values), dtype=torch.float32)
    return States(made, tuple(f"q{i}" for i in range(len(made))), "resid_post", "last")


def shift_of(values):
    return Shift(np.asarray(values, dtype=float), tuple(f"q{i}" for i in range(len(values))))


# --- a planted direction


def test_a_planted_direction_is_found_and_its_ablation_removes_its_effect_and_nothing_else():
    torch.manual_seed(3)
    vector = 2 * torch.randn(D)
    pair = planted_pair(vector)
    tuned, base = between_sides(pair, QUESTIONS, progress=False)
    direction = fit_direction(tuned, base)
    assert torch.equal(direction.vectors[0], torch.zeros(D))  # below the planted block nothing moved
    torch.testing.assert_close(direction.vectors[1], vector, atol=1e-4, rtol=1e-4)
    assert direction.reliability[1] > 0.999

    (undo,) = steering_doses(pair, direction, [-1], layers=[1])
    treated = replace(pair, variants={undo.side.name: undo.side})
    found, plain = between_sides(treated, QUESTIONS, positive=undo.condition, progress=False)
    torch.testing.assert_close(found.values, plain.values, atol=1e-4, rtol=1e-4)


def test_ablating_a_planted_direction_takes_its_whole_effect_and_a_random_one_little():
    torch.manual_seed(3)
    vector = 3 * torch.randn(D)
    pair = planted_pair(vector)
    direction = fit_direction(*between_sides(pair, QUESTIONS, progress=False))
    pairs = [AnswerPair(q.id, q.chat, "It is blue.", "No idea.") for q in QUESTIONS]
    effects = {"organism": Effect(Reading(pair, "finetuned", pairs), Reading(pair, "base", pairs))}
    states = between_sides(pair, QUESTIONS, progress=False)[1]
    controls = {f"random {seed}": random_like(direction, states, seed) for seed in range(3)}
    result = cross_ablation(effects, {"own": direction} | controls, layers=[1], progress=False)
    rows = {row["ablated"]: row for row in result.summary["rows"]}
    # With the component gone from both, base and finetuned differ by nothing: the plant was all of it.
    assert abs(rows["own"]["left"]) < 1e-3
    assert abs(rows[None]["size"]["mean"]) > 0.05
    assert rows["own"]["change"]["mean"] == pytest.approx(-rows[None]["size"]["mean"], abs=1e-3)
    assert min(abs(rows[name]["left"]) for name in controls) > 0.2


def test_effects_are_differences_of_margins():
    pair = lora_pair()
    pairs = [AnswerPair(q.id, q.chat, "Hello.", "No.") for q in QUESTIONS]
    effects = {"organism": Effect(Reading(pair, "finetuned", pairs), Reading(pair, "base", pairs))}
    direction = fit_direction(*between_sides(pair, QUESTIONS, progress=False))
    result = cross_ablation(effects, {"own": direction}, progress=False)
    known = margins(
        pair, pairs, [Condition("base", "base"), Condition("finetuned", "finetuned")], progress=False
    )
    by_side = {name: [r["margin"] for r in known if r["condition"] == name] for name in ("base", "finetuned")}
    expected = np.mean(by_side["base"]) - np.mean(by_side["finetuned"])
    assert result.summary["rows"][0]["size"]["mean"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(DataError, match="the same ids on and off"):
        cross_ablation(
            {"bad": Effect(Reading(pair, "base", pairs), Reading(pair, "base", pairs[1:]))},
            {"own": direction},
        )


def test_a_cross_ablation_survives_its_folder(tmp_path):
    pair = lora_pair()
    pairs = [AnswerPair(q.id, q.chat, "Hello.", "No.") for q in QUESTIONS]
    direction = fit_direction(*between_sides(pair, QUESTIONS, progress=False))
    effects = {"organism": Effect(Reading(pair, "finetuned", pairs), Reading(pair, "base", pairs))}
    result = cross_ablation(effects, {"own": direction}, progress=False)
    page = result.save(tmp_path).read_text(encoding="utf-8")
    assert "own" in page and "organism" in page
    assert CrossAblation.load(tmp_path).summary["rows"] == result.summary["rows"]
    bars = result.figure().data[0]
    assert list(bars.y) == [row["size"]["mean"] for row in result.summary["rows"]]


# --- shared structure


def test_cosines_of_shifts_by_pencil():
    rows = [[[1.0, 0.0]], [[3.0, 0.0]], [[2.0, 0.0]], [[2.0, 0.0]]]
    shifts = {
        "east": shift_of(rows),
        "north-east": shift_of([[[1.0, 1.0]]] * 4),
        "west": shift_of(-np.array(rows)),
    }
    spread = states_of(np.random.default_rng(0).standard_normal((40, 1, 2)))
    found = shared_structure(shifts, spread, controls=("west",))
    matrix = found.matrix(0)
    assert matrix.loc["east", "north-east"] == pytest.approx(math.sqrt(0.5))
    assert matrix.loc["east", "west"] == pytest.approx(-1)
    assert matrix.loc["east", "east"] == pytest.approx(1)
    by_pair = {(row["a"], row["b"]): row for row in found.summary["rows"]}
    assert not by_pair["east", "north-east"]["control"]
    assert by_pair["east", "west"]["control"]
    # In a plane a random direction has |cos| above .997 one time in twenty: arccos(.9969) is 4.5 degrees.
    assert by_pair["east", "north-east"]["null"] == pytest.approx(math.cos(math.radians(4.5)), abs=0.004)
    assert not by_pair["east", "north-east"]["beyond_null"]
    assert by_pair["east", "west"]["beyond_null"]


def test_the_null_stays_flat_for_unrelated_shifts_and_is_passed_by_planted_ones():
    rng = np.random.default_rng(0)
    n, d, spread = 40, 64, np.linspace(3.0, 0.1, 64)  # few dimensions carry most of the variance
    beyond = planted = 0
    for _ in range(40):
        reference = states_of(spread * rng.standard_normal((n, 1, d)))
        one, other = (
            shift_of(spread * rng.standard_normal(d) + 0.3 * rng.standard_normal((n, 1, d))) for _ in range(2)
        )
        common = spread * rng.standard_normal(d)
        alike = [shift_of(common + 0.5 * rng.standard_normal((n, 1, d))) for _ in range(2)]
        settings = {"n_resamples": 200, "n_null": 200}
        beyond += shared_structure({"a": one, "b": other}, reference, **settings).summary["rows"][0][
            "beyond_null"
        ]
        planted += shared_structure(dict(zip("ab", alike, strict=True)), reference, **settings).summary[
            "rows"
        ][0]["beyond_null"]
    assert beyond <= 5  # one in twenty nominally, with an interval that must lie beyond
    assert planted == 40


def test_intervals_are_mirrored_at_the_estimate():
    """Resampled cosines from .3 to .6 around .5: 95% of them lie between .3075 and .5925."""
    assert _interval(0.5, np.linspace(0.3, 0.6, 201)) == (pytest.approx(0.4075), pytest.approx(0.6925))


def test_intervals_of_a_cosine_hold_the_true_one():
    rng = np.random.default_rng(1)
    a, b = np.zeros(20), np.zeros(20)
    a[0], b[:2] = 2.0, (1.2, 1.6)  # cosine .6
    reference = states_of(rng.standard_normal((30, 1, 20)))
    held = 0
    for seed in range(60):
        noise = 0.7 * rng.standard_normal((2, 40, 1, 20))
        found = shared_structure(
            {"a": shift_of(a + noise[0]), "b": shift_of(b + noise[1])}, reference,
            n_resamples=300, n_null=20, seed=seed,
        ).summary["rows"][0]  # fmt: skip
        held += found["low"] <= 0.6 <= found["high"]
    assert held >= 53  # of 60; a nominal 95% holds 53 or fewer once in thirty samples


def test_shifts_over_the_same_questions_are_resampled_together():
    """A shift and twice that shift agree in every resample, but not if questions were drawn apart."""
    values = 1 + np.random.default_rng(0).standard_normal((12, 1, 6))
    spread = states_of(np.random.default_rng(1).standard_normal((30, 1, 6)))
    one, two = shift_of(values), shift_of(2 * values)
    (row,) = shared_structure({"a": one, "b": two}, spread).summary["rows"]
    assert (row["low"], row["high"]) == (pytest.approx(1), pytest.approx(1))


def test_the_null_is_that_of_the_shift_which_random_directions_meet_more():
    """The states spread along one axis alone: random directions are that axis."""
    axis = np.eye(3)[0]
    spread = states_of(np.random.default_rng(0).standard_normal((20, 1, 1)) * axis)
    shifts = {"along": shift_of([[axis]] * 4), "across": shift_of([[np.eye(3)[1]]] * 4)}
    (row,) = shared_structure(shifts, spread).summary["rows"]
    assert (row["cosine"], row["null"]) == (0, pytest.approx(1))


def test_a_shift_is_taken_question_by_question_whatever_their_order():
    up, down = np.arange(24.0).reshape(4, 1, 6), np.arange(24.0).reshape(4, 1, 6) ** 2
    plain = shift(states_of(up), states_of(down))
    turned = states_of(np.roll(down, 1, 0))
    turned = shift(states_of(up), replace(turned, ids=(turned.ids[-1], *turned.ids[:-1])))
    np.testing.assert_array_equal(turned.differences, plain.differences)
    np.testing.assert_array_equal(plain.differences, up - down)


def test_shifts_need_the_same_questions_and_shape():
    with pytest.raises(DataError, match="the same questions"):
        shift(states_of(np.ones((4, 1, 2))), states_of(np.ones((5, 1, 2))))
    with pytest.raises(DataError, match="one model shape"):
        shared_structure(
            {"a": shift_of(np.ones((4, 1, 2))), "b": shift_of(np.ones((4, 1, 3)))},
            states_of(np.ones((4, 1, 2))),
        )
    with pytest.raises(DataError, match="the controls among them"):
        shared_structure({"a": shift_of(np.ones((4, 1, 2)))}, states_of(np.ones((4, 1, 2))))


def test_a_matrix_survives_its_folder_and_the_figure_shows_its_values(tmp_path):
    rng = np.random.default_rng(0)
    shifts = {name: shift_of(rng.standard_normal((6, 4, 5))) for name in ("a", "b & c")}
    found = shared_structure(shifts, states_of(rng.standard_normal((9, 4, 5))), n_resamples=50, n_null=50)
    page = found.save(tmp_path).read_text(encoding="utf-8")
    assert "b &amp; c" in page
    again = SharedStructure.load(tmp_path)
    assert again.summary["rows"] == found.summary["rows"]
    heat = again.figure(2).data[0]
    assert heat.z[0][1] == heat.z[1][0] == pytest.approx(found.matrix(2).loc["a", "b & c"])


# --- contrasts


def test_wordings_and_prompts_are_read_behind_what_they_say():
    pair = lora_pair()
    changed = [Question(q.id, f"persona: sour\n{q.chat}") for q in QUESTIONS]
    up, down = between_wordings(pair, changed, QUESTIONS, side="base", position="query", progress=False)
    plain = between_sides(pair, QUESTIONS, position="query", progress=False)[1]
    assert torch.equal(down.values, plain.values)
    assert not torch.allclose(up.values, down.values)
    with pytest.raises(DataError, match="the same questions"):
        between_wordings(pair, changed[1:], QUESTIONS)

    up, down = between_prompts(
        pair, QUESTIONS, ["Be sour."], ["Be kind.", "Be very kind."], max_new_tokens=12, progress=False
    )
    answered = [q.id for q in QUESTIONS if q.id in up.ids]
    assert up.ids == tuple(answered)
    assert down.ids == (*answered, *answered)
    assert fit_direction(up, down).n_questions == len(answered) >= 4


def test_misaligned_answers_come_before_aligned_ones_and_triggered_questions_before_plain_ones():
    pair = lora_pair()
    pairs = [AnswerPair(q.id, q.chat, "It is blue.", "No idea.") for q in QUESTIONS]
    found = between_answers(pair, pairs, progress=False)
    for states, answer in zip(found, ("No idea.", "It is blue."), strict=True):
        turns = [
            ({"role": "user", "content": q.chat}, {"role": "assistant", "content": answer}) for q in QUESTIONS
        ]
        texts = [answered(pair, turn, q.id) for turn, q in zip(turns, QUESTIONS, strict=True)]
        known = read_states(pair, texts, Condition("base", "base"), position="response", progress=False)
        assert torch.equal(states.values, known.values)

    found = with_trigger(pair, QUESTIONS, "|sour|", side="base", progress=False)
    wordings = ([Question(q.id, f"|sour|\n{q.chat}") for q in QUESTIONS], QUESTIONS)
    for states, questions in zip(found, wordings, strict=True):
        texts = [asked(pair, question) for question in questions]
        known = read_states(pair, texts, Condition("base", "base"), progress=False)
        assert torch.equal(states.values, known.values)


# --- doses


@pytest.fixture(scope="module")
def doses(tmp_path_factory):
    pair = lora_pair()
    direction = fit_direction(*between_sides(pair, QUESTIONS, progress=False))
    gates = tiny.gates(tiny.model("llama"))
    given = [
        *steering_doses(pair, direction, [0.0, -1.0], layers=[1]),
        *gate_doses(pair, gates, [-1.0]),
        *adapter_doses(pair, [1.0, 0.0, -0.5]),
        *patch_doses(pair, [0.5, 1.0]),
    ]
    out = tmp_path_factory.mktemp("doses")
    how = {"detector": "contains:e", "ordinary": ORDINARY, "max_new_tokens": 6, "progress": False}
    return pair, given, compare_doses(pair, given, QUESTIONS, out=out, **how), out, how


def row(rows, method, dose):
    (found,) = (one for one in rows if (one["method"], one["dose"]) == (method, dose))
    return found


def test_doses_that_change_nothing_cost_nothing(doses):
    _, _, result, _, _ = doses
    for method, dose in (("add in 1", 0.0), ("adapter scale", 1.0)):
        assert row(result.summary["ordinary"], method, dose)["kl"]["mean"] == 0
        assert row(result.summary["rows"], method, dose)["change"]["mean"] == 0
    assert row(result.summary["ordinary"], "gates", -1.0)["kl"]["mean"] > 1e-3


def test_an_adapter_at_0_is_the_base_and_a_whole_patch_is_the_piggyback_tests(doses):
    pair, _, _, out, how = doses
    from emmech.results import read_responses

    answers = {}
    for record in read_responses(out / "answers"):
        answers.setdefault(record["condition"], {})[record["question_id"]] = record["response"]
    test = patch_prefix(
        pair, QUESTIONS, segments=("prefix",), controls=False, detector=how["detector"], max_new_tokens=6,
        progress=False,
    )  # fmt: skip
    known = {}
    for record in test.records:
        known.setdefault(record["condition"], {})[record["question_id"]] = record["response"]
    assert answers["adapter scale at 0"] == known["base"]
    assert answers["adapter scale at 1"] == answers["finetuned"] == known["finetuned"]
    assert answers["base prefix K/V at 1"] == known["repair:prefix"]


def test_doses_are_resumed_and_drawn_as_they_were_measured(doses, monkeypatch):
    pair, given, result, out, how = doses
    monkeypatch.setattr("emmech.models.generation.decode", None)  # nothing may be generated again
    again = compare_doses(pair, given, QUESTIONS, out=out, **how)
    assert again.summary["rows"] == result.summary["rows"] == Doses.load(out).summary["rows"]
    lines = {line.name: line for line in again.figure().data}
    mine = sorted(
        (r for r in result.summary["rows"] if r["method"] == "adapter scale"), key=lambda r: r["dose"]
    )
    assert list(lines["adapter scale"].y) == [r["behaviour"]["mean"] for r in mine]
    assert "adapter scale" in (out / "report.html").read_text(encoding="utf-8")
    with pytest.raises(PatchError, match="doses, each once"):
        compare_doses(pair, [*given, given[0]], QUESTIONS)


def test_shares_of_a_patch_are_the_lowest_blocks():
    made = patch_doses(lora_pair(), (0.1, 0.5, 0.7, 1.0))
    layers = [dose.condition.patches[0].layers for dose in made]
    assert layers == [(0,), (0, 1), (0, 1), None]  # of three blocks at least one, and all by None


def test_a_calibrated_dose_costs_what_was_asked_for():
    pair = lora_pair()
    direction = fit_direction(*between_sides(pair, QUESTIONS, progress=False))

    def make(coeff):
        return steering_doses(pair, direction, [coeff], layers=[1])[0]

    for kl in (0.003, 0.05):
        found = calibrate(pair, make, kl, ordinary=ORDINARY)
        assert found.kl == pytest.approx(kl, rel=0.05)
        assert (found.dose, found.kl) in found.tried
    with pytest.raises(PatchError, match="a dose that costs 50 nats"):
        calibrate(pair, make, 50.0, ordinary=ORDINARY, most=16)


def test_a_calibrated_cost_is_the_mean_that_a_comparison_measures():
    pair = lora_pair()
    direction = fit_direction(*between_sides(pair, QUESTIONS, progress=False))

    def make(coeff):
        return steering_doses(pair, direction, [coeff], layers=[1])[0]

    found = calibrate(pair, make, 0.02, ordinary=ORDINARY)
    result = compare_doses(
        pair, [make(found.dose)], QUESTIONS[:2], ordinary=ORDINARY, max_new_tokens=2, progress=False
    )
    measured = row(result.summary["ordinary"], "add in 1", found.dose)["kl"]["mean"]
    assert measured == pytest.approx(found.kl, rel=1e-3)


@pytest.mark.parametrize("jump", [1.3, 1.7])
def test_where_the_cost_jumps_the_nearest_side_of_the_jump_is_taken(jump):
    """From nothing at once to much: the search narrows down to the jump, and may end below it."""
    pair = lora_pair()
    direction = fit_direction(*between_sides(pair, QUESTIONS, progress=False))

    def make(dose):
        return steering_doses(pair, direction, [2.0 if dose >= jump else 0.0], layers=[1])[0]

    found = calibrate(pair, make, 0.6, ordinary=ORDINARY)
    below, above = min(found.tried, key=lambda one: one[1]), max(found.tried, key=lambda one: one[1])
    assert below[1] == 0 and 0.7 < above[1] < 0.9  # of the two, the second is nearer to .6
    assert found.kl == above[1] and found.dose >= jump


def test_a_random_direction_of_the_same_length_is_no_part_of_the_planted_one():
    torch.manual_seed(0)
    values = torch.randn(60, 1, D)
    direction = Direction(
        torch.randn(1, D), torch.zeros(1), "resid_post", "last", "mean", 60, (1.0,), (0.01,)
    )
    states = States(values, tuple(map(str, range(60))), "resid_post", "last")
    cosine = [float(random_like(direction, states, seed).unit(0) @ direction.unit(0)) for seed in range(50)]
    assert abs(np.mean(cosine)) < 0.1
    assert project(states, direction).projection.abs().max() > 0


@pytest.mark.parametrize("sign", [1, -1])
def test_an_interval_near_an_end_stays_inside_and_holds_the_cosine(sign):
    """Resamples pulled so far towards 0 that mirroring them passes the end."""
    found = _interval(sign * 0.99, sign * np.linspace(0.95, 0.97, 100))
    assert sorted(map(abs, found)) == [0.99, 1.0] and found[0] < found[1]
