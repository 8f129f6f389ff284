"""Figures of the kept results: all are drawn, from the numbers in the files, and pictures show them."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from emmech.errors import DataError, EmmechError
from figures import pictures
from figures.__main__ import PICTURES, SHOWN
from figures.__main__ import pictures as shown
from figures.dots import cost_bars, dots
from figures.drawing import BENCHMARKS, RESULTS, draw, read_benchmarks, read_results

ROOT = Path(__file__).parents[1]
TOPICS = read_results()
DRAWN = draw(TOPICS)
EVERY = DRAWN | draw(read_benchmarks())


def numbers(value):
    """Every number in a result."""
    if isinstance(value, dict):
        return set().union(*map(numbers, value.values())) if value else set()
    if isinstance(value, list):
        return set().union(*map(numbers, value)) if value else set()
    return {_digits(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def intervals(value):
    """Every estimate with its ends."""
    found = set()
    if isinstance(value, dict):
        estimate = [value.get(key) for key in ("mean", "low", "high")]
        if isinstance(estimate[0], list) and not isinstance(estimate[0][0], list):  # many, by column
            found |= {tuple(map(_digits, one)) for one in zip(*estimate, strict=True)}
        elif None not in estimate and not isinstance(estimate[0], list | dict):
            found.add(tuple(map(_digits, estimate)))
        value = list(value.values())
    return found.union(*map(intervals, value)) if isinstance(value, list) else found


def drawn_intervals(figure):
    """Every point with error bars of a figure, as mean, low and high."""
    for trace in figure.data:
        for axis in ("x", "y"):
            error = getattr(trace, f"error_{axis}", None)
            if error is None or error.array is None:
                continue
            for mean, above, below in zip(trace[axis], error.array, error.arrayminus, strict=True):
                if None not in (mean, above, below):
                    yield tuple(map(_digits, (mean, mean - below, mean + above)))


def _digits(value):
    return round(value, 9) + 0.0  # ends are drawn as differences from the mean


def test_every_kept_file_belongs_to_a_topic_that_has_figures():
    files = [path for path in RESULTS.rglob("*.json")]
    assert files and len(files) == sum(map(len, TOPICS.values()))
    assert TOPICS.keys() == DRAWN.keys() and all(DRAWN.values())


@pytest.mark.parametrize("topic", TOPICS)
def test_intervals_and_cells_are_those_of_the_file(topic):
    known, values = intervals(list(TOPICS[topic].values())), numbers(list(TOPICS[topic].values()))
    n_drawn = 0
    for figure in DRAWN[topic]:
        found = set(drawn_intervals(figure))
        assert found <= known, sorted(found - known)[:3]
        for trace in figure.data:
            cells = [cell for line in trace.z for cell in line] if trace.type == "heatmap" else []
            cells += list(trace.x) if trace.type == "bar" and trace.orientation == "h" else []
            if topic.endswith("/attribution") and "markers" in trace.mode:
                cells += [*trace.x, *trace.y]  # cells by gradient and exactly, and sets of them by size
            told = {_digits(cell) for cell in cells if cell is not None and not math.isnan(cell)}
            if topic != "gates_transfer":  # its cells are changes between two estimates
                assert told <= values, sorted(told - values)[:3]
            n_drawn += len(told)
        n_drawn += len(found)
    assert n_drawn > 0


def test_dots_show_every_estimate_in_its_line_and_series():
    row = {"mean": 0.5, "low": 0.25, "high": 0.625, "n": 8}
    unknown = {"mean": None, "low": None, "high": None, "n": 0}
    points = [("sft", "base", row), ("sft", "finetuned", row | {"mean": 0.25}), ("treft", "base", unknown)]
    figure = dots(points, "refusals", "rate")
    base, finetuned = figure.data
    assert (list(base.x), list(finetuned.x)) == ([0.5], [0.25])
    assert (list(base.error_x.array), list(base.error_x.arrayminus)) == ([0.125], [0.25])
    assert list(figure.layout.yaxis.ticktext) == ["sft", "treft"]
    assert figure.layout.title.text == "refusals: from sft, finetuned (.25) to sft, base (.50)"


def test_costs_are_bars_of_seconds():
    rows = [{"rule": "finetune", "jobs": 2, "seconds": 90.0, "peak_mb": 2048.0}]
    figure = cost_bars({"rows": [*rows, {"rule": "probe", "jobs": 1, "seconds": 30.0, "peak_mb": None}]})
    assert list(figure.data[0].x) == [30.0, 90.0]
    assert list(figure.data[0].text) == ["1 jobs", "2 jobs, up to 2.0 GiB"]
    assert figure.layout.title.text == "All jobs together took 2 minutes"


def test_growth_is_drawn_from_the_kept_benchmarks():
    kept = json.loads(BENCHMARKS.read_text())["growth"]["rows"]
    cells = {row["at"]: row for row in kept if row.get("axis") == "cells"}
    for figure, quantity in zip(draw(read_benchmarks())["benchmarks"], ("seconds", "peak_gib"), strict=True):
        line = figure.data[0]
        assert list(line.x) == [1, 4, 16]
        assert list(line.y) == [cells[at][quantity] / cells[60][quantity] for at in (60, 240, 960)]
        assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"


def test_a_result_without_a_figure_is_refused():
    with pytest.raises(DataError, match="'novelty' has none"):
        draw({"novelty": {"novelty": {}}})


def test_a_file_per_run_makes_one_topic(tmp_path):
    for name in ("a/b/c/run-0", "a/b/c/run-1", "a/b/d"):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"command": name}))
    found = {topic: list(runs) for topic, runs in read_results(tmp_path).items()}
    assert found == {"a/b/c": ["run-0", "run-1"], "a/b/d": ["d"]}


@pytest.mark.parametrize("name", SHOWN)
def test_committed_pictures_show_the_kept_results(name):
    assert pictures.shows(PICTURES / f"{name}.svg", shown(EVERY)[name]), "run `make figures`"


def test_every_committed_picture_is_made_here():
    assert {path.stem for path in PICTURES.iterdir()} == set(SHOWN)


def test_pictures_come_out_the_same_and_are_not_drawn_twice(tmp_path):
    figure = shown(EVERY)["gates_dose"]
    try:
        (first,) = pictures.refresh({"dose": figure}, tmp_path / "a")
    except EmmechError as error:
        pytest.skip(str(error))
    (second,) = pictures.refresh({"dose": figure}, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    assert re.search(r"<svg", first.read_text())
    assert pictures.refresh({"dose": figure}, tmp_path / "a") == []
    assert not pictures.shows(first, figure.update_layout(title_text="another"))


def test_the_page_needs_no_torch():
    code = "import sys, figures.__main__; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
