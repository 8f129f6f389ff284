"""Figures and page of sweeps: what is drawn are the result's numbers, with token labels and units."""

import numpy as np
import pandas as pd
import pytest

from emmech import figures
from emmech.figures.sweep import token_labels
from emmech.piggyback.attribution_result import AttributionResult
from emmech.piggyback.cells import Cell, Shape, grid
from emmech.piggyback.sweep_result import SweepResult

TOKENS = ["<|im_start|>", "user", "\n", " a"]
SHAPE = Shape(3, 4, 2)


def result_of(over, mode="single", full=2.0, kind="sweep-kv") -> SweepResult:
    """Four questions; cell number n changes the score by about n / 10."""
    cells = [cell.coordinates() for cell in grid(over, SHAPE)]
    used = [axis for axis in cells[0] if any(cell[axis] is not None for cell in cells)]
    cells = [{axis: cell[axis] for axis in used} for cell in cells]
    for cell in cells if "position" in used else ():
        cell["token"] = TOKENS[cell["position"]] if isinstance(cell["position"], int) else None
    unpatched = np.array([-1.0, -0.5, 0.0, 0.5])
    noise = np.array([0.02, -0.02, 0.01, -0.01])
    scores = unpatched + np.arange(len(cells))[:, None] / 10 + noise
    summary = {
        "kind": kind, "metric": "margin", "mode": mode, "target": "finetuned", "source": "base",
        "tokens": TOKENS, "question_ids": ["a", "b", "c", "d"], "notes": ["A note."], "seconds": 3.0,
        "n_cells": len(cells), "rows": "auto", "late_start": True, "provenance": {"dtype": "float32"},
        "versions": {},
    }  # fmt: skip
    return SweepResult(summary, cells, unpatched, unpatched + full, scores)


def test_the_map_shows_the_effect_of_each_place_under_its_token():
    result = result_of(("layer", "position", "kv"))
    fig, frame = result.figure(), result.frame()
    assert [heat.type for heat in fig.data] == ["heatmap", "heatmap"]
    for heat, kv in zip(fig.data, ("key", "value"), strict=True):
        mine = frame[frame["kv"] == kv]
        np.testing.assert_allclose(np.array(heat.z, dtype=float).ravel(), mine["effect"])
    assert fig.layout.xaxis.ticktext == ("<|im_start|> 0".replace("<", "&lt;").replace(">", "&gt;"), "user 1",
                                         "⏎ 2", "·a 3")  # fmt: skip
    scale = fig.layout.coloraxis
    assert scale.cmin == -scale.cmax == -frame["effect"].abs().max()  # centred at zero
    assert "layer 2, token 3 ' a', value alone does 1.15 of what" in fig.layout.title.text.replace(
        "<br>", " "
    )
    assert "95% intervals over questions" in fig.layout.title.subtitle.text.replace("<br>", " ")


def test_labels_of_many_tokens_stay_apart_and_name_their_axis_themselves(monkeypatch):
    monkeypatch.setitem(globals(), "SHAPE", Shape(3, 24, 2))
    monkeypatch.setitem(globals(), "TOKENS", [f"token{n}" for n in range(24)])
    for over, panels in ((("layer", "position", "kv"), 2), (("position", "kv"), 1)):
        layout = result_of(over).figure().layout
        assert layout.width >= 16 * 24 * panels  # the page scrolls sideways rather than press them together
        assert len(layout.xaxis.ticktext) == 24 and layout.xaxis.title.text is None
    assert result_of(("layer", "kv")).figure().layout.width is None  # as wide as there is room


def test_of_several_heads_in_a_place_the_strongest_is_shown():
    result = result_of(("layer", "position", "kv_head"))
    (heat,) = result.figure().data
    strongest = result.frame().groupby(["layer", "position"])["effect"].max()
    np.testing.assert_allclose(np.array(heat.z, dtype=float).ravel(), strongest)
    assert "head 1" in heat.hovertext[0][0]


@pytest.mark.parametrize(("over", "along"), [(("layer", "kv"), "layer"), (("position",), "position")])
def test_one_axis_is_a_curve_with_its_interval(over, along):
    result = result_of(over)
    fig, frame = result.figure(), result.frame()
    lines = [trace for trace in fig.data if trace.mode == "lines+markers"]
    assert len(lines) == (2 if "kv" in over else 1)
    mine = frame[frame["kv"] == "key"] if "kv" in over else frame
    assert list(lines[0].x) == mine[along].tolist() and list(lines[0].y) == mine["effect"].tolist()
    band = fig.data[0]
    np.testing.assert_allclose(band.y[: len(mine)], mine["effect_high"])


def test_cells_of_ones_own_are_bars_the_strongest_first():
    result = result_of([Cell(layer=(0, 1)), Cell(layer=(2,), position=(1,)), Cell(kv=(1,))])
    (bars,) = result.figure().data
    effects = sorted(result.frame()["effect"], key=abs, reverse=True)
    assert list(bars.x) == effects
    assert result.figure().layout.yaxis.ticktext[0] == "value"


def test_findings_say_what_each_mode_asks():
    found = {
        mode: figures.sweep_finding(result_of(("layer",), mode, full=0.18).to_json())
        for mode in ("single", "leave_one_out", "cumulative_up", "cumulative_down")
    }
    assert found["single"] == "margin: layer 2 alone does 1.11 of what the prefix does"
    assert found["leave_one_out"] == "margin: all but layer 0 do .00 of what the prefix does"
    assert found["cumulative_up"] == "margin: half of what the prefix does is reached with layers 0 to 1"
    assert found["cumulative_down"] == "margin: half of what the prefix does is reached with layers 2 and up"


def test_a_prefix_that_changes_nothing_is_drawn_and_said(tmp_path):
    result = result_of(("layer", "position"), full=0.0)
    assert figures.sweep_finding(result.to_json()) == "margin: the donor's prefix changes nothing"
    for over in (("layer", "position"), ("layer",), [Cell(layer=(0, 1))]):
        result_of(over, full=0.0).save(tmp_path)


def test_blanks_and_line_breaks_of_tokens_are_shown():
    assert token_labels([" a\t", "\n"]) == ["·a⇥ 0", "⏎ 1"]


def test_the_page_holds_finding_map_table_and_provenance(tmp_path):
    result = result_of(("layer", "position", "kv"))
    page = result.save(tmp_path).read_text()
    for text in ("A note.", "4 questions", "Strongest cells", "float32", "Its own later activations"):
        assert text in page
    assert page.count("<tr>") == 1 + 15
    facts = page.split("Where this comes from")[1].split("<script")[0]
    assert facts.count("<dt>") == 8  # no row of the table among them
    assert SweepResult.load(tmp_path).frame().equals(result.frame())
    resid = result_of(("layer", "position"), kind="sweep-resid").save(tmp_path).read_text()
    assert "residual stream at some tokens" in resid


def test_the_frame_has_a_row_per_cell_and_pivots_to_the_map(tmp_path):
    result = result_of(("layer", "position", "kv"))
    frame = result.frame()
    assert list(frame) == ["layer", "position", "kv", "token", "score", "difference", "low", "high",
                           "effect", "effect_low", "effect_high", "n"]  # fmt: skip
    assert len(frame) == 3 * 4 * 2 and not frame.duplicated(["layer", "position", "kv"]).any()
    assert frame["layer"].dtype.kind == frame["position"].dtype.kind == frame["n"].dtype.kind == "i"
    values = frame[frame["kv"] == "value"].pivot(index="layer", columns="position", values="difference")
    np.testing.assert_allclose(values, (np.arange(24) / 10).reshape(3, 4, 2)[:, :, 1])
    assert (frame["low"] < frame["difference"]).all() and (frame["effect"] < frame["effect_high"]).all()
    result.save(tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "cells.csv"), frame, check_dtype=False)


def test_the_table_in_the_terminal_has_the_strongest_cells(capsys):
    result_of(("layer", "position")).table()
    shown = capsys.readouterr().out
    assert "layer" in shown and "⏎" in shown and ".55 [" in shown


def test_attributions_are_drawn_against_exact_effects(tmp_path):
    swept = result_of(("layer", "position"))
    checked = np.array([1, 4, 7, 11])
    result = AttributionResult(
        swept.summary | {"steps": 1, "seconds_gradient": 1.0},
        swept.cells, swept.unpatched, swept.full, swept.differences * 2, checked,
        swept.scores[checked], checked[:3],
    )  # fmt: skip
    fig = figures.attribution_scatter(result.to_json())
    sampled, strongest = fig.data[:2]
    effects = swept.frame()["effect"]
    np.testing.assert_allclose(sampled.x, 2 * effects[[1, 4, 7]])
    np.testing.assert_allclose(sampled.y, effects[[1, 4, 7]])
    np.testing.assert_allclose(strongest.y, effects[[11]])
    assert "Spearman 1.00, n = 3" in fig.layout.title.text.replace("<br>", " ")
    assert "has the largest attribution" in result.figure().layout.title.text.replace("<br>", " ")
    page = result.save(tmp_path).read_text()
    assert "one gradient per question" in page and "exact" in page
