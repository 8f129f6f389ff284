"""Estimates along something, one line per series: for results that no figure of one run shows.

lines({"sft": [(10, row), (20, row)]}, "step", "margin (nats)", "The margin falls", "20 questions.").show()
"""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from emmech.figures import Row
from emmech.figures.house import GRID, METHODS, SYMBOLS, bars, finished, hover, pale, plain

Series = Mapping[str, Sequence[tuple[Row | float | int, Row]]]
"""By name, where each point is along x (a number or an estimate), and the estimate there."""


def lines(series: Series, across: str, what: str, finding: str, caption: str) -> go.Figure:
    """One colour and symbol per series, 95% intervals as bars on either axis."""
    fig = go.Figure()
    for number, (name, points) in enumerate(series.items()):
        color = METHODS[number % len(METHODS)]
        places = [place if isinstance(place, Mapping) else {"mean": place} for place, _ in points]
        rows = [row for _, row in points]
        fig.add_scatter(
            x=[place["mean"] for place in places],
            y=[row["mean"] for row in rows],
            error_x=bars(places, pale(color, 0.35)) if all("low" in place for place in places) else None,
            error_y=bars(rows, pale(color, 0.35)),
            mode="lines+markers",
            marker={"size": 8, "symbol": SYMBOLS[number % len(SYMBOLS)]},
            line={"color": color, "width": 2, "dash": ("solid", "dot")[number // len(METHODS) % 2]},
            hovertext=[
                hover(row, f"{name}, {across} {place['mean']:g}")
                for place, row in zip(places, rows, strict=True)
            ],
            hoverinfo="text",
            name=plain(name),
            cliponaxis=False,
        )
    fig.update_xaxes(title=plain(across))
    fig.update_yaxes(title=plain(what), zeroline=True, zerolinecolor=GRID)
    return finished(fig, finding, caption, 460 + 20 * (len(series) // 5))
