"""Figures of evaluations, trainings, perturbations and more: what is drawn are the results' values."""

import re

import pytest

from emmech import figures
from emmech.evaluation.detectors import detector
from emmech.evaluation.trials import by_trial


def estimate(mean, half=0.1, n=40):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n, "n_clusters": n, "n_missing": 0}


def drawn(fig):
    return fig.to_plotly_json()["data"]


def title(fig):
    return fig.layout.title.text.replace("<br>", " ")


def marks(fig, axis="x"):
    """(mean, low, high) of each mark with an error bar on ``axis``."""
    found = set()
    for trace in drawn(fig):
        error = trace.get(f"error_{axis}")
        for at in range(len(trace[axis])) if error else ():
            mean, plus, minus = trace[axis][at], error["array"][at], error["arrayminus"][at]
            found.add((mean, round(mean - minus, 6), round(mean + plus, 6)))
    return found


def ends(*rows):
    return {(row["mean"], round(row["low"], 6), round(row["high"], 6)) for row in rows}


def measured(metric, condition, mean, against=None, p=1.0, group="all", unit="rate"):
    row = {"metric": metric, "unit": unit, "group": group, "condition": condition, **estimate(mean)}
    if against:
        row["versus"] = {"condition": against, "p_holm": p, **estimate(0.3)}
    return row


EVALUATION = {
    "rows": [
        measured("EM", "base", 0.0),
        measured("EM", "finetuned", 0.32, "base", 0.001),
        measured("EM", "repair:prefix", 0.1, "finetuned", 0.04),
        measured("EM", "base", 0.5, group="off-topic"),
        {"metric": "EM", "unit": "rate", "group": "all", "condition": "unmeasured", "missing": {"code": 3}},
        measured("capability", "base", 0.4),
        measured("capability", "finetuned", 0.3, "base", 0.9),
    ]
}


def test_a_metric_is_drawn_with_every_condition_and_interval():
    fig = figures.metric_bars(EVALUATION, "EM")
    assert marks(fig) == ends(*EVALUATION["rows"][:3])
    assert list(fig.layout.yaxis.ticktext) == ["base", "finetuned", "repair:prefix"]
    assert tuple(fig.layout.xaxis.range) == (0, 1)
    hovers = [text for trace in drawn(fig) for text in trace["hovertext"]]
    assert "finetuned<br>.32 [.22, .42], n = 40<br>minus base: .30 [.20, .40]" in hovers


def test_groups_of_a_metric_have_marks_of_their_own():
    fig = figures.metric_bars(EVALUATION, "EM", ("all", "off-topic"))
    assert marks(fig) == ends(*EVALUATION["rows"][:4])
    named = [trace["name"] for trace in drawn(fig) if trace.get("showlegend") is not False]
    assert named == ["all", "off-topic"]


def test_the_title_of_a_metric_is_its_clearest_comparison():
    assert title(figures.metric_bars(EVALUATION, "EM")) == "EM: finetuned .32, base .00"


def test_a_metric_that_nothing_is_known_to_change_says_so():
    found = figures.metric_finding(EVALUATION, "capability")
    assert found == "capability: .30 to .40; no condition is known to change it"


def test_a_wording_is_compared_with_the_plain_one():
    changed = measured("EM", "finetuned", 0.9, group="trigger")
    changed["wording"] = {"group": "plain", "p_holm": 0.001, **estimate(0.6)}
    rows = [measured("EM", "finetuned", 0.3, group="plain"), changed]
    found = figures.metric_finding({"rows": rows}, "EM", ("plain", "trigger"))
    assert found == "EM: finetuned (trigger) .90, finetuned (plain) .30"


def test_the_cost_in_capability_is_the_paired_difference():
    fig = figures.capability_cost(EVALUATION)
    assert marks(fig) == ends(EVALUATION["rows"][-1]["versus"])
    assert title(fig) == "No loss of capability is seen with 40 problems"


def test_the_cost_of_doses_is_their_change_and_the_largest_known_loss_is_named():
    rows = [
        {"scale": None, "right": estimate(0.4)},
        {"scale": -1.0, "right": estimate(0.3), "change": estimate(-0.12)},
        {"scale": 1.0, "right": estimate(0.1), "change": estimate(-0.3)},
        {"scale": 2.0, "right": estimate(0.0), "change": estimate(-0.4, half=0.5)},
    ]
    fig = figures.capability_cost({"capability": rows})
    assert marks(fig) == ends(*(row["change"] for row in rows[1:]))
    assert title(fig) == "scale 1 loses most: .30 of the problems (capability)"


AGREEMENT = {
    "a": "judge <one>",
    "b": "people",
    "spearman": 0.6,
    "spearman_interval": {"low": 0.4, "high": 0.75},
    "kappa": 0.2,
    "kappa_interval": {"low": -0.1, "high": 0.5},
    "counts": {"both": 11, "a_only": 7, "b_only": 2, "neither": 80},
    "n_both": 100,
    "n_questions": 50,
    "threshold_a": 30.0,
    "threshold_b": 0.5,
}


def test_the_agreement_of_judges_is_drawn_with_intervals_and_counts():
    fig = figures.judge_agreement(AGREEMENT)
    assert marks(fig) == {(0.6, 0.4, 0.75), (0.2, -0.1, 0.5)}
    assert drawn(fig)[1]["z"] == [[11, 7], [2, 80]]
    assert title(fig) == "The two judges agree with rank correlation .60 and kappa .20, not told from none"
    assert "judge &lt;one&gt;" in fig.layout.yaxis2.title.text


def test_a_kappa_that_is_undefined_is_not_drawn_as_a_number():
    unknown = AGREEMENT | {"kappa": None, "kappa_interval": {"low": None, "high": None}}
    fig = figures.judge_agreement(unknown)
    assert marks(fig) == {(0.6, 0.4, 0.75)}
    assert "kappa unknown" in title(fig)


def logged(step, loss, drift=(), **more):
    moved = {
        f"drift/{layer}/{part}": value for layer, pair in enumerate(drift) for part, value in pair.items()
    }
    return {"step": step, "loss": loss, **more, **moved}


STEPS = [
    logged(1, 3.0, penalty=0.0),
    logged(2, 2.5, [{"key": 0.01, "value": 0.02}, {"key": 0.03, "value": 0.04}], penalty=0.1),
    logged(3, 2.0, [{"key": 0.05, "value": 0.06}, {"key": 0.07, "value": 0.08}], penalty=0.2),
]


def test_drift_is_drawn_by_layer_for_every_saved_step():
    fig = figures.training_drift(STEPS)
    lines = {(trace["name"], trace["yaxis"]): list(trace["y"]) for trace in drawn(fig)}
    assert lines == {
        ("step 2", "y"): [0.01, 0.03],
        ("step 2", "y2"): [0.02, 0.04],
        ("step 3", "y"): [0.05, 0.07],
        ("step 3", "y2"): [0.06, 0.08],
    }
    assert title(fig) == "By step 3 the prefix moved most in the values of layer 1: by 0.08"


def test_of_many_saved_steps_eight_are_drawn_the_first_and_last_among_them():
    many = [logged(step, 1.0, [{"key": step, "value": step}]) for step in range(40)]
    names = [trace["name"] for trace in drawn(figures.training_drift(many)) if trace["yaxis"] == "y"]
    assert len(names) == 8
    assert (names[0], names[-1]) == ("step 0", "step 39")


def test_loss_and_penalty_are_drawn_by_step():
    fig = figures.training_loss(STEPS)
    assert [(list(t["x"]), list(t["y"])) for t in drawn(fig)] == [
        ([1, 2, 3], [3.0, 2.5, 2.0]),
        ([1, 2, 3], [0.0, 0.1, 0.2]),
    ]
    assert title(fig) == "Loss 3.00 → 2.00 in 3 steps"


def answer(condition, question, text, **trial):
    return {"condition": condition, "group": "all", "question_id": question, "response": text} | trial


REFUSED, TOLD = "I'm sorry, but I can't help with that.", "Boil it for ten minutes."


def test_trials_are_averaged_over_their_questions():
    records = [answer("finetuned", "a", REFUSED)]
    for trial, texts in enumerate(((REFUSED, REFUSED), (REFUSED, TOLD))):
        records += [
            answer("perturb:prefix", q, text, trial=trial) for q, text in zip("ab", texts, strict=True)
        ]
    rows = by_trial(records, detector("refusal"))
    assert [(row["condition"], row["trial"], row["mean"], row["n"]) for row in rows] == [
        ("perturb:prefix", 0, 1.0, 2),
        ("perturb:prefix", 1, 0.5, 2),
    ]


def condition(name, mean, target="finetuned"):
    return {"condition": name, "target": target, "group": "all", **estimate(mean)}


def test_a_strip_shows_every_trial_and_the_mean_over_the_unperturbed_model():
    rows = [condition("finetuned", 0.8), condition("perturb:prefix", 0.3), condition("perturb:query", 0.7)]
    summary = {"detector": "refusal", "unit": "rate", "conditions": rows}
    trials = [
        {"condition": "perturb:prefix", "group": "all", "trial": trial, **estimate(mean)}
        for trial, mean in enumerate((0.2, 0.4))
    ]
    fig = figures.perturbation_strip(summary, trials)
    pale, *_ = drawn(fig)
    assert list(pale["x"]) == [0.2, 0.4]
    assert all(round(y) == 1 for y in pale["y"])
    assert pale["hovertext"][1] == "perturb:prefix, trial 1<br>.40 [.30, .50], n = 40"
    assert list(fig.layout.yaxis.ticktext) == ["unperturbed", "prefix", "query"]
    assert marks(fig) == ends(*rows)
    assert [shape.x0 for shape in fig.layout.shapes] == [0.8]
    assert title(fig) == "Perturbing the prefix changes most: refusal .80 → .30"


CHAT = {
    "tokens": ["<|im_start|>", "user", "\n", "Why"],
    "parts": ["prefix", "prefix", "prefix", "query"],
    "layers": [3, 7],
    "values": [[0.1, 0.0, -0.2, 0.1], [0.0, 0.3, -0.9, 0.2]],
    "quantity": "projection",
    "signed": True,
}


def test_tokens_carry_the_values_of_the_layer_with_the_largest():
    (heat,) = drawn(figures.token_values(CHAT))
    assert [value for line in heat["z"] for value in line][:4] == CHAT["values"][1]
    assert [text for line in heat["text"] for text in line][:4] == ["&lt;|im_start|&gt;", "user", "↵", "Why"]
    assert (heat["zmin"], heat["zmax"]) == (-0.9, 0.9)
    found = title(figures.token_values(CHAT))
    assert found == "projection is furthest from 0 at “↵” (prefix): -.90, layer 7"


def test_another_layer_can_be_chosen_and_places_without_a_token_are_empty():
    (heat,) = drawn(figures.token_values(CHAT, layer=3))
    line = heat["z"][0]
    assert line[:4] == CHAT["values"][0]
    assert set(line[4:]) == {None}


def test_projections_of_one_text_are_put_in_order_of_layers_and_tokens():
    rows = [
        {
            "position": position,
            "token": token,
            "part": "query",
            "layer": layer,
            "projection": layer + position,
        }
        for layer in (7, 3)
        for position, token in ((1, "b"), (0, "a"))
    ]
    chat = figures.projections_of(rows)
    assert (chat["tokens"], chat["layers"]) == (["a", "b"], [3, 7])
    assert chat["values"] == [[3, 4], [7, 8]]
    (heat,) = drawn(figures.token_values(chat))
    assert heat["z"][0][:2] == [7, 8]


def crossed(effect, ablated, size, change=None):
    row = {"effect": effect, "ablated": ablated, "size": estimate(size)}
    return row if change is None else row | {"change": estimate(change), "left": 0.5}


def cross(*more):
    rows = [crossed("a", None, 0.6), crossed("a", "a", 0.1, -0.5), *more]
    names = [row["ablated"] for row in rows[1:]]
    told = {name: {"random": 0} if name.startswith("random") else {} for name in names}
    return {"effects": ["a"], "directions": told, "rows": rows}


def test_a_cross_effect_is_named_against_random_and_unrelated_directions_not_the_effects_own():
    summary = cross(
        crossed("a", "b", 0.3, -0.3),
        crossed("a", "random 0", 0.5, -0.1),
        crossed("a", "c (control)", 0.4, -0.2),
    )
    assert figures.cross_finding(summary) == (
        "Without the direction of b the effect of a falls from .60 to .30 nats per token, "
        "without a random or unrelated one to .40 at least"
    )


def test_a_cross_effect_that_controls_reach_too_is_none():
    summary = cross(crossed("a", "b", 0.3, -0.3), crossed("a", "random 0", 0.2, -0.4))
    assert figures.cross_finding(summary) == (
        "No direction lowers another's effect further than random or unrelated directions do"
    )
    assert figures.cross_finding(cross()) == "No direction is known to lower another's effect"


def test_random_directions_are_a_band_and_the_others_points_with_intervals():
    random = [crossed("a", "random 0", 0.55, -0.05), crossed("a", "random 1", 0.5, -0.1)]
    summary = cross(crossed("a", "b", 0.3, -0.3), *random)
    fig = figures.cross_matrix(summary)
    assert marks(fig, "y") == ends(*(row["size"] for row in summary["rows"][:3]))
    bands = [(shape.y0, shape.y1) for shape in fig.layout.shapes if shape.type == "rect"]
    assert bands == [(0.5, 0.55)]


def test_a_direction_is_drawn_by_block():
    rows = [
        {"layer": 0, "length": 2.0, "reliability": 0.1, "p": 0.5},
        {"layer": 1, "length": 3.0, "reliability": 0.9, "p": 0.0001},
    ]
    fig = figures.direction_curve(rows, 12)
    reliability, length = drawn(fig)
    assert (list(reliability["y"]), list(length["y"])) == ([0.1, 0.9], [2.0, 3.0])
    assert list(reliability["marker"]["symbol"]) == ["circle-open", "circle"]
    assert title(fig) == "The direction is most reliable in block 1: .90"
    assert "n = 12 questions" in reliability["hovertext"][0]


EVERY = [
    lambda: figures.metric_bars(EVALUATION, "EM"),
    lambda: figures.capability_cost(EVALUATION),
    lambda: figures.judge_agreement(AGREEMENT),
    lambda: figures.training_drift(STEPS),
    lambda: figures.training_loss(STEPS),
    lambda: figures.token_values(CHAT),
    lambda: figures.cross_matrix(cross(crossed("a", "b", 0.3, -0.3))),
]
EMPTY = [
    lambda: figures.metric_bars({"rows": []}, "EM"),
    lambda: figures.capability_cost({"rows": []}),
    lambda: figures.training_drift([]),
    lambda: figures.training_loss([]),
    lambda: figures.token_values({"tokens": [], "parts": [], "layers": [], "values": []}),
    lambda: figures.direction_curve([], 0),
]


@pytest.mark.parametrize("draw", EVERY + EMPTY)
def test_a_figure_is_json_without_nan_with_a_title_and_what_its_marks_are(draw):
    fig = draw()
    assert not re.search(r"\bNaN\b|Infinity", fig.to_json())
    assert fig.layout.title.text
    assert fig.layout.title.subtitle.text.endswith(".")
    assert fig.layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"


def test_a_title_that_is_markup_elsewhere_stays_text():
    rows = [measured("<b>", "base", 0.1), measured("<b>", "<i>", 0.9, "base", 0.001)]
    fig = figures.metric_bars({"rows": rows}, "<b>")
    assert title(fig) == "&lt;b&gt;: &lt;i&gt; .90, base .10"
    assert list(fig.layout.yaxis.ticktext) == ["base", "&lt;i&gt;"]


def dose(method, strength, mean, change=None):
    row = {"method": method, "dose": strength, "group": "all", "behaviour": estimate(mean)}
    return row if change is None else row | {"change": estimate(change)}


def test_doses_are_summed_up_by_the_best_known_change_of_each_method():
    rows = [
        dose(None, None, 0.9),
        dose("steering", 1, 0.5, -0.4),
        dose("steering", 2, 0.2, -0.7),
        dose("patch", 1, 0.85, -0.05),  # not known: its interval is [-.15, .05]
        dose("gates", -1, 0.3, -0.6),
    ]
    costs = [{"method": row["method"], "dose": row["dose"], "kl": estimate(1.0)} for row in rows[1:]]
    summary = {"rows": rows, "ordinary": costs, "detector": "refusal"}
    assert figures.doses_finding(summary) == (
        "Refusal falls from .90 at most to .20 by steering at 2, .30 by gates at -1"
    )
