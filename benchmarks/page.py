"""One page: how a sweep grows, on log axes, and the tables of all ratios."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks.growth import AXES, QUANTITIES, Size, exponent
from benchmarks.measure import Row, cells
from emmech.figures.house import COLORS, GRID, SYMBOLS, finished
from emmech.report_page import PageTable, write_page

_COLORS = dict(zip(AXES, ("finetuned", "base", "repair", "induce"), strict=True))
_UNITS = {"seconds": "s", "peak_gib": "GiB resident"}
_NAMES = {"cells": "cells", "questions": "questions", "prefix": "prefix tokens", "rows": "rows of a batch"}


def write(folder: Path, results: Mapping[str, Row]) -> Path:
    """Write ``report.html`` into ``folder``; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    content: list[PageTable | go.Figure] = []
    if "growth" in results:
        points = [row for row in results["growth"]["rows"] if "axis" in row]
        content = [growth(points, quantity) for quantity in QUANTITIES]
    headings = ("", "ratio", "range", "cpu", "aim", "")
    for name, found in results.items():
        rows = [(row["name"], *cells(row)) for row in found["rows"] if "axis" not in row]
        content.append(PageTable(headings, rows, title=name))
    meanings = {
        "ratio": "The median time of what stands left of the stroke over that of what stands right of it; "
        "they were run in turn.",
        "range": "The least and the largest ratio within one turn; of training steps the quartiles.",
        "cpu": "The same ratio in seconds of all processor cores, which other programs change less.",
        "exponent": "b of y = a x^b, fitted on log axes: 1 is linear, 0 is flat.",
    }
    facts = {name: found["machine"] | found["code"] | found["setting"] for name, found in results.items()}
    return write_page(folder, "Benchmarks", content, meanings=meanings, provenance=shared(facts))


def shared(facts: Mapping[str, Row]) -> Row:
    """Facts that all benchmarks have in common, then by benchmark those that differ."""
    first, *others = facts.values()
    same = {key: value for key, value in first.items() if all(one.get(key) == value for one in others)}
    rest = {name: {k: v for k, v in one.items() if k not in same} for name, one in facts.items()}
    return same | {name: one for name, one in rest.items() if one}


def growth(points: Sequence[Row], quantity: str) -> go.Figure:
    """Each axis as a line, both relative to its smallest size."""
    fig = make_subplots(1, 1)
    for number, axis in enumerate(AXES):
        mine = [point for point in points if point["axis"] == axis]
        first = mine[0]
        fig.add_scatter(
            x=[point["at"] / first["at"] for point in mine],
            y=[point[quantity] / first[quantity] for point in mine],
            mode="lines+markers",
            line={"color": COLORS[_COLORS[axis]], "width": 2},
            marker={"symbol": SYMBOLS[number], "size": 9},
            name=f"{_NAMES[axis]}, from {first['at']}",
            hovertext=[f"{p['at']} {_NAMES[axis]}: {p[quantity]:.2f} {_UNITS[quantity]}" for p in mine],
            hoverinfo="text",
        )  # fmt: skip
    most = max(point["at"] / min(AXES[point["axis"]]) for point in points)
    fig.add_scatter(
        x=[1, most], y=[1, most], mode="lines", line={"color": GRID, "dash": "dash"},
        name="linear", hoverinfo="skip",
    )  # fmt: skip
    fig.update_xaxes(type="log", title="times the smallest size")
    fig.update_yaxes(type="log", title=f"times its {QUANTITIES[quantity]}")
    found = exponent(points, "cells", quantity)
    title = f"With the number of cells, {QUANTITIES[quantity]} grows as their power {found:.2f}"
    size = Size()
    base = ", ".join(f"{getattr(size, axis)} {_NAMES[axis]}" for axis in AXES)
    return finished(fig, title, f"{base}; one of them is changed at a time.", 360)
