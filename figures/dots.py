"""Estimates side by side, with their intervals: for results that no figure of one run shows.

dots([("sft", "base", row), ("treft", "base", row)], "Refusals of ordinary questions", "rate").show()
"""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from emmech.figures import Row
from emmech.figures.house import GRID, INTERVAL, METHODS, SYMBOLS, bars, finished, hover, plain, shown

Point = tuple[str, str, Row]
"""A line of the figure, a series, and the estimate that both have there."""
AXES = {"rate": [-0.02, 1.02], "score": [-2, 102]}


def dots(points: Sequence[Point], what: str, unit: str) -> go.Figure:
    """One line per label from top to bottom, one colour and symbol per series, 95% intervals."""
    known = [point for point in points if point[2].get("mean") is not None]
    labels = list(dict.fromkeys(label for label, _, _ in points))
    names = list(dict.fromkeys(series for _, series, _ in points))
    fig = go.Figure()
    for number, name in enumerate(names):
        mine = [(label, row) for label, series, row in known if series == name]
        offset = (number - (len(names) - 1) / 2) * 0.5 / max(1, len(names) - 1)
        color = METHODS[(number + 1) % len(METHODS)]
        fig.add_scatter(
            x=[row["mean"] for _, row in mine],
            y=[labels.index(label) + offset for label, _ in mine],
            error_x=bars([row for _, row in mine], color),
            mode="markers",
            marker={"color": color, "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8},
            hovertext=[hover(row, f"{label}, {name}" if name else label) for label, row in mine],
            hoverinfo="text",
            name=plain(name),
            showlegend=len(names) > 1,
            cliponaxis=False,
        )
    ticks = {"tickvals": list(range(len(labels))), "ticktext": [plain(label) for label in labels]}
    fig.update_yaxes(range=[len(labels) - 0.5, -0.5], **ticks)
    fig.update_xaxes(title=plain(f"{what} ({unit})"), range=AXES.get(unit), zeroline=True, zerolinecolor=GRID)
    return finished(fig, _span(known, what), f"{INTERVAL}.", 60 + (16 + 9 * len(names)) * len(labels))


def cost_bars(summary: Mapping[str, Any]) -> go.Figure:
    """Seconds of all jobs of each rule of a study, with the peak memory of one job beside the bar."""
    rows = sorted(summary["rows"], key=lambda row: row["seconds"])
    fig = go.Figure(
        go.Bar(
            x=[row["seconds"] for row in rows],
            y=[row["rule"] for row in rows],
            orientation="h",
            text=[_cost(row) for row in rows],
            marker_color=METHODS[1],
            hoverinfo="skip",
        )
    )
    minutes = sum(row["seconds"] for row in rows) / 60
    fig.update_xaxes(title="seconds of all jobs")
    caption = "Wall time, summed over jobs, of which two run at a time; of resumed jobs the last part only."
    return finished(fig, f"All jobs together took {minutes:.0f} minutes", caption, 60 + 34 * len(rows))


def _cost(row: Row) -> str:
    memory = "" if row["peak_mb"] is None else f", up to {row['peak_mb'] / 1024:.1f} GiB"
    return f"{row['jobs']} jobs{memory}"


def _span(points: Sequence[Point], what: str) -> str:
    """The highest and the lowest estimate, in words."""
    if not points:
        return f"{plain(what)}: not measured"
    low, high = (pick(points, key=lambda point: point[2]["mean"]) for pick in (min, max))
    if low[2]["mean"] == high[2]["mean"]:
        return f"{plain(what)}: {shown(low[2]['mean'])} everywhere"
    ends = [
        f"{plain(', '.join(filter(None, point[:2])))} ({shown(point[2]['mean'])})" for point in (low, high)
    ]
    return f"{plain(what)}: from {ends[0]} to {ends[1]}"
