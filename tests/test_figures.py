import json
import math

import pytest

from emmech import figures


def row(condition, group, mean, low, high, n=40, target="finetuned", **more):
    measured = {} if mean is None else {"mean": mean, "low": low, "high": high, "n": n}
    return {
        "condition": condition,
        "target": target,
        "group": group,
        "n_questions": n,
        "n_answers": n,
        "mean_new_tokens": 12.0,
        **measured,
        **more,
    }


def summary_of(*rows, unit="rate", detector="refusal", **more):
    return {"detector": detector, "unit": unit, "conditions": list(rows), "n_questions": 80} | more


def two_groups(**more):
    return summary_of(
        row("base", "on-topic", 0.0, 0.0, 0.05, target="base"),
        row("base", "off-topic", 0.0, 0.0, 0.04, target="base", n=39),
        row("finetuned", "on-topic", 0.9, 0.8, 0.95),
        row("finetuned", "off-topic", 0.8, 0.7, 0.85, n=39),
        row("repair:prefix", "on-topic", 0.5, 0.4, 0.6),
        row("repair:prefix", "off-topic", 0.25, 0.15, 0.4, n=39),
        **more,
    )


def by_layer(groups=("on-topic", "off-topic")):
    rows = []
    for group in groups:
        rows += [row("base", group, 0.0, 0.0, 0.1, target="base")]
        rows += [row("finetuned", group, 0.8, 0.7, 0.9)]
        for layer, mean in enumerate((0.75, 0.1, 0.6)):
            rows.append(row(f"repair:resid-{layer}", group, mean, mean - 0.1, mean + 0.1))
    return summary_of(*rows)


def checked(**restored):
    return two_groups(
        checks={
            name.replace("_", ":"): {
                "restored": shares,
                "visible": 1.0,
                "patched_tokens_per_prompt": 24.0,
            }
            for name, shares in restored.items()
        }
    )


def point(step, condition, on, off):
    def estimate(mean):
        return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "n": 30}

    return {
        "step": step,
        "condition": condition,
        "on_topic": estimate(on),
        "off_topic": estimate(off),
    }


TRAINING = [
    point(3, "finetuned", 0.2, 0.1),
    point(6, "finetuned", 0.6, 0.3),
    point(9, "finetuned", 0.9, 0.8),
    point(3, "repair:prefix", 0.1, 0.05),
    point(9, "repair:prefix", 0.5, 0.1),
]


def traces(fig):
    return json.loads(fig.to_json())["data"]


def drawn(fig):
    """(x, y, plus, minus, hover) of each marker with an x error bar."""
    found = []
    for trace in traces(fig):
        if "error_x" in trace:
            bars = trace["error_x"]
            found += zip(
                trace["x"],
                trace["y"],
                bars["array"],
                bars["arrayminus"],
                trace["hovertext"],
                strict=True,
            )
    return found


def every_number(value):
    if isinstance(value, dict):
        return [n for v in value.values() for n in every_number(v)]
    if isinstance(value, list):
        return [n for v in value for n in every_number(v)]
    return [value] if isinstance(value, float) else []


ALL_FIGURES = [
    lambda: figures.condition_bars(two_groups()),
    lambda: figures.condition_bars(summary_of(row("base", "all", 0.5, None, None))),
    lambda: figures.layer_curve(by_layer()),
    lambda: figures.restored_curves(checked(repair_prefix=[0.1, None, 0.6])),
    lambda: figures.frontier(two_groups(frontier=TRAINING)),
]


@pytest.mark.parametrize("draw", ALL_FIGURES)
def test_a_figure_is_json_without_nan(draw):
    text = draw().to_json()
    assert "NaN" not in text
    assert all(math.isfinite(number) for number in every_number(json.loads(text)))


@pytest.mark.parametrize("draw", ALL_FIGURES)
def test_the_house_template_is_passed_and_the_global_one_left_alone(draw):
    import plotly.io as pio

    before = pio.templates.default
    assert draw().layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"
    assert pio.templates.default == before


def test_every_condition_is_drawn_with_its_interval():
    summary = two_groups()
    values = {
        (x, round(x + plus, 6), round(x - minus, 6))
        for x, _, plus, minus, _ in drawn(figures.condition_bars(summary))
    }
    assert values == {(r["mean"], r["high"], r["low"]) for r in summary["conditions"]}


def test_conditions_stand_from_top_to_bottom_with_groups_side_by_side():
    fig = figures.condition_bars(two_groups())
    assert list(fig.layout.yaxis.ticktext) == ["base", "finetuned", "repair:prefix"]
    assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1]  # position 0 is at the top
    heights = sorted(y for _, y, *_ in drawn(fig))
    assert [round(y) for y in heights] == [0, 0, 1, 1, 2, 2]
    assert len(set(heights)) == 6


def test_n_and_the_interval_are_at_the_pointer():
    hovers = [hover for *_, hover in drawn(figures.condition_bars(two_groups()))]
    assert "repair:prefix, off-topic<br>.25 [.15, .40], n = 39" in hovers


def test_a_rate_axis_says_so_and_runs_from_0_to_1():
    axis = figures.condition_bars(two_groups()).layout.xaxis
    assert axis.title.text == "refusal rate (0 to 1)"
    assert tuple(axis.range) == (-0.02, 1.02)


def test_a_length_axis_is_in_words():
    summary = summary_of(row("base", "all", 42.0, 30.0, 54.0), unit="words", detector="length")
    axis = figures.condition_bars(summary).layout.xaxis
    assert axis.title.text == "length (words per answer)"
    assert axis.range is None


def test_each_kind_of_condition_has_one_colour():
    fig = figures.condition_bars(two_groups())
    colors = {(t.name.split(", ")[1], t.marker.color) for t in fig.data if t.error_x.array}
    assert colors == {(kind, figures.COLORS[kind]) for kind in ("base", "finetuned", "repair")}


def test_the_title_is_the_off_topic_finding():
    title = figures.condition_bars(two_groups()).layout.title.text
    assert title == "Base K/V at the prefix: off-topic refusal .80 → .25"


def test_one_group_needs_neither_its_name_nor_a_legend():
    fig = figures.condition_bars(
        summary_of(row("finetuned", "all", 0.8, 0.7, 0.9), row("repair:prefix", "all", 0.5, 0.4, 0.6))
    )
    assert fig.layout.title.text == "Base K/V at the prefix: refusal .80 → .50"
    assert not any(trace.showlegend is not False for trace in fig.data)
    assert [y for _, y, *_ in drawn(fig)] == [0, 1]


def test_induce_alone_is_compared_with_the_base():
    summary = summary_of(
        row("base", "all", 0.1, 0.0, 0.2, target="base"),
        row("finetuned", "all", 0.8, 0.7, 0.9),
        row("induce:prefix", "all", 0.3, 0.2, 0.4, target="base"),
    )
    assert figures.finding(summary) == "Finetuned K/V at the prefix: refusal .10 → .30"


def test_without_patches_base_and_finetuned_are_compared():
    summary = summary_of(
        row("base", "all", 0.1, 0.0, 0.2, target="base"), row("finetuned", "all", 0.8, 0.7, 0.9)
    )
    assert figures.finding(summary) == "Base → finetuned: refusal .10 → .80"


def test_without_a_metric_nothing_is_drawn_and_the_title_says_so():
    summary = summary_of(row("base", "all", None, None, None), unit=None, detector="none")
    fig = figures.condition_bars(summary)
    assert len(fig.data) == 0
    assert fig.layout.title.text == "No metric: the detector none measures nothing"


def test_rows_without_a_value_are_left_out_not_drawn_as_zero():
    fig = figures.condition_bars(
        summary_of(row("base", "all", 0.5, 0.4, 0.6), row("finetuned", "all", None, None, None))
    )
    assert [x for x, *_ in drawn(fig)] == [0.5]


def test_an_unknown_interval_is_no_bar_and_a_question_mark():
    ((_, _, plus, minus, hover),) = drawn(
        figures.condition_bars(summary_of(row("base", "all", 0.5, None, None, n=1)))
    )
    assert (plus, minus) == (None, None)
    assert hover == "base<br>.50 [?, ?], n = 1"


def test_the_best_trial_is_a_mark_of_its_own():
    best = {"mean": 0.7, "low": 0.6, "high": 0.8}
    fig = figures.condition_bars(
        summary_of(
            row("finetuned", "all", 0.8, 0.7, 0.9), row("perturb:query", "all", 0.5, 0.4, 0.6, best=best)
        )
    )
    star = next(trace for trace in fig.data if trace.name == "best trial")
    assert list(star.x) == [0.7]
    assert 1 < star.y[0] < 1.5  # just under the mean, so that both intervals are seen
    assert star.hovertext == ("best trial<br>.70 [.60, .80], n = 40",)


def test_markup_in_a_name_is_shown_as_text():
    fig = figures.condition_bars(summary_of(row("template:<b>", "all", 0.5, 0.4, 0.6)))
    assert fig.layout.yaxis.ticktext == ("template:&lt;b&gt;",)


def test_a_layer_curve_holds_each_groups_rates_in_order():
    fig = figures.layer_curve(by_layer())
    curves = [trace for trace in fig.data if trace.name == "patched at one layer"]
    assert [list(trace.x) for trace in curves] == [[0, 1, 2]] * 2
    assert [list(trace.y) for trace in curves] == [[0.75, 0.1, 0.6]] * 2
    assert curves[0].hovertext[1] == "repair:resid-1, on-topic<br>.10 [.00, .20], n = 40"


def test_a_layer_curve_has_its_band_and_dashed_lines_for_both_models():
    fig = figures.layer_curve(by_layer(groups=("all",)))
    bands = [trace for trace in fig.data if trace.fill == "toself"]
    assert list(bands[-1].y) == pytest.approx([0.85, 0.2, 0.7, 0.5, 0.0, 0.65])
    dashed = {t.name: (set(t.y), t.line.color) for t in fig.data if t.line.dash == "dash"}
    assert dashed == {
        "base": ({0.0}, figures.COLORS["base"]),
        "finetuned": ({0.8}, figures.COLORS["finetuned"]),
    }


def test_layer_axes_say_what_they_count():
    fig = figures.layer_curve(by_layer())
    assert fig.layout.xaxis2.title.text == "patched layer (block, counted from 0)"
    assert fig.layout.yaxis.title.text == "on-topic refusal rate (0 to 1)"
    assert tuple(fig.layout.yaxis2.range) == (-0.02, 1.02)


def test_the_title_names_the_layer_of_the_largest_change_and_how_many_there_were():
    title = figures.layer_curve(by_layer()).layout.title.text.replace("<br>", " ")
    assert title == (
        "Base residual stream after block 1, the largest change of 3 layers: off-topic refusal .80 → .10"
    )


def test_restored_curves_skip_what_was_not_measured():
    summary = checked(repair_prefix=[0.1, 0.4], control_self=[None, None], control_noise=[-2.0, 0.3])
    fig = figures.restored_curves(summary)
    assert {t.name: list(t.y) for t in fig.data} == {
        "repair:prefix": [0.1, 0.4],
        "control:noise": [-2.0, 0.3],
    }
    assert (
        "<br>after layer 1: .40<br>24.0 tokens patched per prompt, n = 80 questions"
        in fig.data[0].hovertext[1]
    )
    assert fig.layout.yaxis.title.text == "repair: share (0 to 1)"


def test_restored_curves_work_when_nothing_was_patched():
    assert len(figures.restored_curves(two_groups()).data) == 0


def test_the_frontier_draws_both_lines_with_their_steps():
    fig = figures.frontier(two_groups(frontier=TRAINING))
    plain, patched = fig.data[1:]
    assert (list(plain.x), list(plain.y)) == ([0.2, 0.6, 0.9], [0.1, 0.3, 0.8])
    assert (list(patched.x), list(patched.y)) == ([0.1, 0.5], [0.05, 0.1])
    assert (plain.text, patched.text) == (("3", "6", "9"), ("3", "9"))
    assert list(plain.error_x.array) == pytest.approx([0.05] * 3)
    assert list(plain.error_y.arrayminus) == pytest.approx([0.05] * 3)
    assert "step 9<br>on-topic .90 [.85, .95], n = 30" in plain.hovertext[2]


def test_points_on_each_other_share_one_label():
    close = [point(3, "finetuned", 0.2, 0.1), point(4, "finetuned", 0.21, 0.1), *TRAINING[1:]]
    assert figures.frontier(two_groups(frontier=close)).data[1].text == ("3, 4", "", "6", "9")


def test_the_frontier_title_compares_with_early_stopping():
    # On-topic .5 on the plain line lies 3/4 of the way from .2 to .6: .1 + 3/4 · .2 = .25 off-topic.
    assert figures.early_stopping(TRAINING, 0.5) == pytest.approx(0.25)
    title = figures.frontier(two_groups(frontier=TRAINING)).layout.title.text.replace("<br>", " ")
    assert title == (
        "Prefix patched at step 9: off-topic refusal .10 at on-topic .50; early stopping alone: about .25"
    )


def test_early_stopping_is_unknown_where_the_plain_line_never_was():
    assert figures.early_stopping(TRAINING, 0.95) is None


def test_frontier_axes_are_rates_of_their_group():
    layout = figures.frontier(two_groups(frontier=TRAINING)).layout
    assert layout.xaxis.title.text == "on-topic refusal rate (0 to 1)"
    assert layout.yaxis.title.text == "off-topic refusal rate (0 to 1)"
    assert (tuple(layout.xaxis.range), tuple(layout.yaxis.range)) == ((-0.02, 1.02), (-0.02, 1.02))
