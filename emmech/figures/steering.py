"""Figures of steering: methods at what they cost, shared structure, one direction by block."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emmech.figures.house import (
    GRID,
    INTERVAL,
    METHODS,
    SYMBOLS,
    TEXT,
    Row,
    Summary,
    bars,
    finished,
    hover,
    pale,
    plain,
    shown,
)
from emmech.figures.patching import metric_axis

COSINES = ((0.0, "#67A9CF"), (0.5, "#F2F2F2"), (1.0, "#F1A340"))


def methods_at_cost(summary: Summary) -> go.Figure:
    """Behaviour against KL on ordinary answers, one line per method through its doses."""
    rows = [row for row in summary["rows"] if row["behaviour"]]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    cost = {(row["method"], row["dose"]): row["kl"] for row in summary["ordinary"]}
    fig = make_subplots(len(groups), 1, shared_xaxes=True, vertical_spacing=0.08)
    axis = metric_axis(summary)
    for panel, group in enumerate(groups, start=1):
        mine = [row for row in rows if row["group"] == group]
        untreated = next(row for row in mine if row["method"] is None)
        fig.add_hline(
            y=untreated["behaviour"]["mean"], line={"color": TEXT, "dash": "dash"}, row=panel, col=1
        )
        for number, method in enumerate(dict.fromkeys(row["method"] for row in mine if row["method"])):
            line = sorted((row for row in mine if row["method"] == method), key=lambda row: row["dose"])
            color = METHODS[number % len(METHODS)]
            kl = [cost[row["method"], row["dose"]] for row in line]
            fig.add_scatter(
                x=[one["mean"] for one in kl],
                y=[row["behaviour"]["mean"] for row in line],
                error_x=bars(kl, pale(color, 0.35)),
                error_y=bars([row["behaviour"] for row in line], pale(color, 0.35)),
                mode="lines+markers+text",
                text=[f"{row['dose']:g}" for row in line],
                textposition="top right",
                textfont={"size": 10},
                marker={"size": 8, "symbol": SYMBOLS[number % len(SYMBOLS)]},
                line={"color": color, "width": 2},
                hovertext=[_dose_hover(row, one) for row, one in zip(line, kl, strict=True)],
                hoverinfo="text",
                name=plain(method),
                legendgroup=plain(method),
                showlegend=panel == 1,
                cliponaxis=False,
                row=panel,
                col=1,
            )
        title = axis["title"] if len(groups) == 1 else f"{plain(group)} {axis['title']}"
        fig.update_yaxes(**axis | {"title": title}, row=panel, col=1)
    fig.update_xaxes(rangemode="tozero")
    fig.update_xaxes(
        title=f"KL from the {plain(summary['kl_from'])} on ordinary answers (nats per token)",
        row=len(groups),
        col=1,
    )
    caption = (
        f"{INTERVAL}; numbers beside the points are doses, dashed is the untreated "
        f"{plain(summary['untreated'])} model. The better method lies lower at the same cost, or costs less "
        "at the same behaviour."
    )
    return finished(fig, doses_finding(summary), caption, 300 * len(groups) + 60)


def doses_finding(summary: Summary) -> str:
    """How far each method lowers the behaviour at its best dose, known changes only."""
    rows = [row for row in summary["rows"] if row["behaviour"]]
    if not rows:
        return f"No metric: the detector {plain(summary['detector'])} measures nothing"
    groups = [row["group"] for row in rows]
    group = "off-topic" if "off-topic" in groups else groups[0]
    mine = [row for row in rows if row["group"] == group]
    before = next(row for row in mine if row["method"] is None)["behaviour"]["mean"]
    lower = [row for row in mine if row["method"] and row.get("change") and row["change"]["high"] < 0]
    what = f"{group} {plain(summary['detector'])}" if group != "all" else plain(summary["detector"])
    if not lower:
        return f"No dose is known to lower {what}, {shown(before)} untreated"
    best: dict[str, Row] = {}
    for row in sorted(lower, key=lambda row: (row["behaviour"]["mean"], _kl(summary, row))):
        best.setdefault(row["method"], row)
    told = (
        f"{shown(row['behaviour']['mean'])} by {plain(method)} at {row['dose']:g}"
        for method, row in best.items()
    )
    return f"{what[0].upper()}{what[1:]} falls from {shown(before)} at most to {', '.join(told)}"


def shared_matrix(summary: Summary, layer: int | None = None) -> go.Figure:
    """Cosines between shifts in one block, the middle one by default; the reliability on the diagonal."""
    layer = middle(summary) if layer is None else layer
    names = list(summary["shifts"])
    place = {name: number for number, name in enumerate(names)}
    cells: list[list[float | None]] = [[None] * len(names) for _ in names]
    texts, told = ([[""] * len(names) for _ in names] for _ in range(2))
    for name, number in place.items():
        reliability = summary["shifts"][name]["reliability"][layer]
        cells[number][number] = reliability
        texts[number][number] = f"({shown(reliability)})"
        told[number][number] = f"{plain(name)}: cosine of halves {shown(reliability)}"
    for row in summary["rows"]:
        if row["layer"] != layer:
            continue
        for a, b in ((row["a"], row["b"]), (row["b"], row["a"])):
            cells[place[a]][place[b]] = row["cosine"]
            texts[place[a]][place[b]] = shown(row["cosine"]) + ("*" if row["beyond_null"] else "")
            told[place[a]][place[b]] = _cosine_hover(row)
    labels = [plain(name) + (" (control)" if summary["shifts"][name]["control"] else "") for name in names]
    fig = go.Figure(
        go.Heatmap(
            z=cells, x=labels, y=labels, text=texts, texttemplate="%{text}", hovertext=told,
            hoverinfo="text", zmin=-1, zmax=1, colorscale=COSINES, xgap=2, ygap=2,
            colorbar={"title": "cosine", "outlinewidth": 0},
        )
    )  # fmt: skip
    fig.update_yaxes(autorange="reversed", gridcolor=GRID)
    fig.update_xaxes(tickangle=-30)
    caption = (
        f"Shifts of the {plain(summary['position'])} states after block {layer}. On the diagonal, the cosine "
        "between random halves of the questions: noise bounds what can be seen. * the 95% interval "
        "over questions lies beyond what 95% of random directions of the model's own covariance reach."
    )
    return finished(fig, shared_finding(summary, layer), caption, 120 + 44 * len(names))


def shared_finding(summary: Summary, layer: int) -> str:
    """How many pairs share structure, and the strongest one."""
    rows = [row for row in summary["rows"] if row["layer"] == layer and not row["control"]]
    beyond = [row for row in rows if row["beyond_null"]]
    if not beyond:
        return f"No two shifts share more than random directions do in block {layer}"
    best = max(beyond, key=lambda row: abs(row["cosine"]))
    return (
        f"{len(beyond)} of {len(rows)} pairs of shifts share structure in block {layer}, most "
        f"{plain(best['a'])} and {plain(best['b'])} ({shown(best['cosine'])})"
    )


def direction_curve(rows: Sequence[Row], n_questions: int) -> go.Figure:
    """By block, how long the direction is and how alike those of random halves of the questions are.

    Args:
        rows: Of ``Direction.frame``: layer, length, reliability, p.
        n_questions: That it was fitted to.
    """
    fig = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    panels = {
        "reliability": {"title": "reliability (-1 to 1)", "range": [-0.05, 1.02]},
        "length": {"title": "length", "rangemode": "tozero"},
    }
    x, told = [row["layer"] for row in rows], [_block_hover(row, n_questions) for row in rows]
    for panel, (name, axis) in enumerate(panels.items(), start=1):
        fig.add_scatter(
            x=x,
            y=[row[name] for row in rows],
            mode="lines+markers",
            line={"color": METHODS[1], "width": 2},
            marker={"size": 8, "symbol": ["circle" if row["p"] < 0.01 else "circle-open" for row in rows]},
            hovertext=told,
            hoverinfo="text",
            name=name,
            showlegend=False,
            row=panel,
            col=1,
        )
        fig.update_yaxes(**axis, row=panel, col=1)
    fig.update_xaxes(title="layer (block, counted from 0)", row=2, col=1)
    best = max(rows, key=lambda row: row["reliability"], default=None)
    title = "No block was fitted"
    if best is not None:
        title = f"The direction is most reliable in block {best['layer']}: {shown(best['reliability'])}"
    caption = (
        f"n = {n_questions} questions. Reliability: mean cosine of the directions of random halves, which "
        "bounds what noise allows. Filled: p < .01 that kinds exchanged at random differ as much, not "
        "corrected for looking at many blocks."
    )
    return finished(fig, title, caption, 400)


def middle(summary: Summary) -> int:
    """The middle block."""
    layers = [row["layer"] for row in summary["rows"]]
    return max(layers) // 2


def _kl(summary: Summary, row: Row) -> float:
    key = row["method"], row["dose"]
    return next(one["kl"]["mean"] for one in summary["ordinary"] if (one["method"], one["dose"]) == key)


def _dose_hover(row: Row, kl: Row) -> str:
    lines: Sequence[Any] = (
        f"{plain(row['method'])} at {row['dose']:g}",
        f"behaviour {hover(row['behaviour'])}",
        f"KL {hover(kl)}",
        *(f"{name} {shown(row[name]['mean'])}" for name in ("surprise", "repetition") if row[name]),
    )
    return "<br>".join(lines)


def _cosine_hover(row: Row) -> str:
    return (
        f"{plain(row['a'])} and {plain(row['b'])}<br>{shown(row['cosine'])} "
        f"[{shown(row['low'])}, {shown(row['high'])}]<br>95% of random directions: below {shown(row['null'])}"
    )


def _block_hover(row: Row, n_questions: int) -> str:
    p = "&lt; .001" if row["p"] < 0.001 else f"= {row['p']:.3f}"
    lines = (
        f"block {row['layer']}",
        f"reliability {shown(row['reliability'])}",
        f"length {shown(row['length'])}",
    )
    return "<br>".join((*lines, f"p {p}, n = {n_questions} questions"))
