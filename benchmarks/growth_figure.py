"""How a sweep grows, on log axes: what is varied, the exponents, and the figure; no torch.

Growth is the exponent b of y = a x^b, fitted on log axes: 1 is linear, 0 is flat.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emmech.figures.house import COLORS, GRID, SYMBOLS, finished

AXES: Mapping[str, Sequence[int]] = {
    "cells": (60, 240, 960),
    "questions": (2, 8, 32),
    "prefix": (24, 256, 1024),
    "rows": (4, 16, 64),
}
QUANTITIES = {"seconds": "time", "peak_gib": "peak memory"}
_COLORS = dict(zip(AXES, ("finetuned", "base", "repair", "induce"), strict=True))
_UNITS = {"seconds": "s", "peak_gib": "GiB resident"}
_NAMES = {"cells": "cells", "questions": "questions", "prefix": "prefix tokens", "rows": "rows of a batch"}


@dataclass(frozen=True)
class Size:
    """What one process sweeps."""

    cells: int = 60
    questions: int = 2
    prefix: int = 24
    """Tokens of the prefix."""
    rows: int = 32
    """Rows of a batch."""


def exponent(points: Sequence[Mapping[str, Any]], axis: str, quantity: str) -> float:
    """The slope of a quantity along an axis on log axes, by least squares."""
    mine = [point for point in points if point["axis"] == axis]
    x, y = (np.log([point[key] for point in mine]) for key in ("at", quantity))
    return float(np.polyfit(x, y, 1)[0])


def growth(points: Sequence[Mapping[str, Any]], quantity: str) -> go.Figure:
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
