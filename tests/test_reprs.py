"""What objects show of themselves in Jupyter."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.table import Table
from rich.text import Text

from emmech.frontier import FrontierResult
from emmech.gates.gate import Gates, GateShape
from emmech.piggyback.experiment import PatchingResult
from emmech.piggyback.minimal_set import MinimalSet
from emmech.piggyback.sweep_result import SweepResult
from emmech.reprs import MOST_ROWS, card, of_table
from emmech.scorecard import Evaluation
from emmech.steering.cross import CrossAblation
from emmech.steering.directions import Direction

HOSTILE = "<script>alert(1)</script>"


def cells(text):
    return re.findall(r"<td[^>]*>(.*?)</td>", text)


def estimate(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 40, "n_clusters": 40, "n_missing": 0}


def patching(group):
    row = {"condition": "finetuned", "target": "finetuned", "group": group, "n_questions": 40}
    row |= {"n_answers": 40, "mean_new_tokens": 9.0} | estimate(0.62)
    summary = {"kind": "patch-prefix", "detector": "refusal", "unit": "rate", "conditions": [row]}
    return PatchingResult(summary, [])


def evaluation(group):
    row = {"metric": group, "unit": "rate", "group": "all", "condition": "base", **estimate(0.62)}
    return Evaluation({"rows": [row], "conditions": ["base"]})


def frontier(name):
    method = {"method": name, "n_seeds": 2, "n_reached": 2, "on_there": 0.9, "difference": None}
    ends = {"mean": 0.62, "low": 0.5, "high": 0.7}
    method |= {"off_at_target": ends, "best_f1": ends, "best_step": 8}
    base = {"on-topic": {"mean": 0.0}, "off-topic": {"mean": 0.0}}
    counts = {"target": 0.9, "n_on_topic": 60, "n_off_topic": 60, "base": base}
    return FrontierResult({"detector": "short", "methods": [method], **counts})


def cross(name):
    rows = [{"effect": name, "ablated": None, "size": estimate(0.62)}]
    rows.append(
        {"effect": name, "ablated": "a", "size": estimate(0.5), "change": estimate(-0.12), "left": 0.8}
    )
    return CrossAblation({"rows": rows, "effects": [name], "directions": {"a": {}}})


def sweep(metric):
    where = [{"layer": 0, "position": 0, "token": metric}, {"layer": 1, "position": 0, "token": metric}]
    summary = {"metric": metric, "mode": "single"}
    scores = np.array([[0.0, 0.0], [0.62, 0.62]])
    return SweepResult(summary, where, np.zeros(2), np.ones(2), scores)


RESULTS = [patching, evaluation, frontier, cross, sweep]


@pytest.mark.parametrize("make", RESULTS)
def test_a_result_shows_its_numbers_without_script_or_widget(make):
    shown = make("mine")._repr_html_()
    assert any(re.fullmatch(r"\.62( .*)?", cell) for cell in cells(shown))
    assert "mine" in shown
    assert not re.search(r"<script|<iframe|<input|\son\w+=", shown)


@pytest.mark.parametrize("make", RESULTS)
def test_markup_in_a_result_is_shown_as_text(make):
    shown = make(HOSTILE)._repr_html_()
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown


def test_a_minimal_set_says_its_size_and_its_text():
    random = {"mean": 0.1, "low": 0.0, "high": 0.2, "n_sets": 10}
    summary = {"size": 3, "n_cells": 60, "metric": "kl", "share": 0.8, "n_questions": 8, "random": random}
    shown = MinimalSet(
        summary | {"effect": {"mean": 0.81, "low": 0.7, "high": 0.9}, "cells": []}
    )._repr_html_()
    assert cells(shown) == ["cells", "3", "of", "60", "metric", "kl"]
    assert "3 of 60 cells (5.0%) do 81%" in shown


def test_gates_show_their_shape_and_where_they_come_from():
    gates = Gates(GateShape((0, 1), 8, 2, 4))
    gates.provenance = {"base": {"name": "smollm2"}, "data": {"name": HOSTILE}}
    shown = gates._repr_html_()
    assert cells(shown)[:4] == ["shape", "2 layers, 8 -&gt; 2 heads of 4", "variant", "full"]
    assert gates.fingerprint() in shown
    assert "&lt;script&gt;" in shown


def test_a_direction_shows_its_blocks():
    direction = Direction(
        torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2), "resid_post", "last", "mean", 12,
        (0.25, 0.5), (0.0005, 0.5),
    )  # fmt: skip
    assert cells(direction._repr_html_()) == ["0", "5.00", ".25", "&lt;.001", "1", "1.00", ".50", "0.500"]


def test_a_pair_and_a_prompt_show_themselves(make_pair):
    pair = make_pair("llama")
    shown = pair._repr_html_()
    assert "one copy, the adapter off and on" in shown
    assert "float32" in cells(shown)
    prompt = pair.chat.render("Why <b>?")
    told = prompt._repr_html_()
    assert f"prefix ({prompt.n_prefix} tokens)" in told
    assert "<b>?" not in told
    assert "&lt;" in told
    assert pair.chat.template_hash in pair.chat._repr_html_()


def test_a_long_table_is_cut_and_says_so():
    table = Table("number", title="many")
    for number in range(MOST_ROWS + 7):
        table.add_row(str(number))
    shown = of_table(table)
    assert cells(shown) == [str(number) for number in range(MOST_ROWS)]
    assert "and 7 more rows" in shown


def test_markup_of_the_terminal_is_dropped_and_text_kept():
    table = Table("a")
    table.add_row("[bold]strong[/bold]")
    table.add_row(Text("[0.1, 0.2]"))
    assert cells(of_table(table)) == ["strong", "[0.1, 0.2]"]


def test_a_fact_that_is_unknown_is_left_out():
    assert cells(card("x", {"a": 1, "b": None})) == ["a", "1"]


def test_nothing_of_ipython_or_torch_is_needed_to_show_a_table():
    code = "import sys, emmech.reprs; print([name for name in ('IPython', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
