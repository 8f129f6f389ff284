"""Figures of probing gates: how far they act, what can be read off them, what two sets share."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emmech.figures.house import (
    DASHES,
    GRID,
    METHODS,
    SYMBOLS,
    TEXT,
    Row,
    add_band,
    as_estimate,
    finished,
    hover,
    pale,
    plain,
    shown,
)

FEATURES = {"gate": "gate logits", "resid": "residual stream"}


def gate_activity(rows: Sequence[Row]) -> go.Figure:
    """How far gates are from 1, and how much that changes the heads' outputs, by layer and part."""
    layers = sorted({row["layer"] for row in rows})
    parts = list(dict.fromkeys(row["part"] for row in rows))
    at = {(row["part"], row["layer"]): row for row in rows}
    grid = [[at.get((part, layer)) for layer in layers] for part in parts]
    hovers = [[_activity_hover(row) if row else "" for row in line] for line in grid]
    panels = {"mean |gate - 1|": "deviation", "work": "work"}
    fig = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.16, subplot_titles=list(panels))
    for panel, value in enumerate(panels.values(), start=1):
        axis = f"coloraxis{panel if panel > 1 else ''}"
        z = [[row[value] if row else None for row in line] for line in grid]
        fig.add_heatmap(
            x=layers, y=parts, z=z, hovertext=hovers, hoverinfo="text", hoverongaps=False, xgap=1, ygap=1,
            coloraxis=axis, row=panel, col=1,
        )  # fmt: skip
        low, high = fig.layout[f"yaxis{panel if panel > 1 else ''}"].domain
        bar = {"thickness": 12, "outlinewidth": 0, "y": (low + high) / 2, "len": high - low, "nticks": 4}
        fig.update_layout({axis: {"colorscale": "Cividis", "cmin": 0, "colorbar": bar}})
    fig.update_annotations(x=0, xanchor="left")
    fig.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    fig.update_xaxes(showgrid=False, ticks="")
    fig.update_xaxes(title="layer (block, counted from 0)", row=2, col=1)
    most = max(rows, key=lambda row: row["deviation"], default=None)
    title = "No gates were read" if most is None else "The gates are 1 everywhere: they do nothing"
    if most is not None and most["deviation"] > 0:
        title = (
            f"Gates are furthest from 1 at the {plain(most['part'])} in layer {most['layer']}: "
            f"by {shown(most['deviation'])} on average"
        )
    caption = (
        "Means over all tokens and head dimensions, without intervals. Work is the share by which the gate "
        "changes a head's output, |z (gate - 1)| / |z|."
    )
    return finished(fig, title, caption, 2 * (28 * max(3, len(parts)) + 40) + 60)


def readout_curves(rows: Sequence[Row]) -> go.Figure:
    """How well the behaviour can be read off, by layer and kind of features."""
    fig = make_subplots(1, 1)
    kinds = list(dict.fromkeys(row["features"] for row in rows))
    aucs = [_auc(row) for row in rows]
    for number, kind in enumerate(kinds):
        color, name = METHODS[number % len(METHODS)], plain(FEATURES.get(kind, kind))
        mine = sorted((row for row in rows if row["features"] == kind), key=lambda row: row["layer"])
        x, points = [row["layer"] for row in mine], [_auc(row) for row in mine]
        add_band(fig, list(zip(x, points, strict=True)), color, 1)
        fig.add_scatter(
            x=x,
            y=[point["mean"] for point in points],
            mode="lines+markers",
            line={"color": color, "width": 2, "dash": DASHES[number % len(DASHES)]},
            marker={"size": 6, "symbol": SYMBOLS[number % len(SYMBOLS)]},
            hovertext=[
                hover(point, f"{FEATURES.get(kind, kind)}, layer {row['layer']}") + _shuffled_text(row)
                for row, point in zip(mine, points, strict=True)
            ],
            hoverinfo="text",
            name=name,
        )
        if any(row["shuffled_high"] is not None for row in mine):
            fig.add_scatter(
                x=x, y=[row["shuffled_high"] for row in mine], mode="lines", hoverinfo="skip",
                line={"color": pale(color, 0.7), "width": 1.5, "dash": "dot"},
                name=f"{name}, shuffled", showlegend=False,
            )  # fmt: skip
    if any(row["shuffled_high"] is not None for row in rows):
        dots = {"color": TEXT, "dash": "dot"}
        fig.add_scatter(x=[None], y=[None], mode="lines", line=dots, name="shuffled labels")
    known = [v for auc in aucs for v in (auc["mean"], auc["low"]) if v is not None]
    known += [row["shuffled_high"] for row in rows if row["shuffled_high"] is not None]
    fig.add_hline(y=0.5, line={"color": GRID, "dash": "dash"})
    fig.update_xaxes(title="layer (block, counted from 0)")
    fig.update_yaxes(title="AUC (.5 is chance)", range=[max(0.0, min([0.4, *(v - 0.05 for v in known)])), 1])
    caption = (
        "Linear probes, tested on questions that they were not fitted to. Bands are 95% intervals over "
        "questions; dotted: the 95th percentile of the same with shuffled labels. The best layer is chosen "
        "on these very answers, so its AUC is a little too high."
    )
    return finished(fig, _readout_finding(rows), caption, 340)


def overlap_curve(overlap: Mapping[str, Any], name: str = "another set") -> go.Figure:
    """Which share of suppressed dimensions gates have in common with those called ``name``, by layer."""
    rows = [row for row in overlap["layers"] if row["jaccard"] is not None]
    x = [row["layer"] for row in rows]
    fig = go.Figure()
    for key, curve, color, dash in (
        ("jaccard", "shared", METHODS[0], "solid"),
        ("expected", "expected by chance", METHODS[1], "dash"),
    ):
        fig.add_scatter(
            x=x,
            y=[row[key] for row in rows],
            mode="lines+markers" if key == "jaccard" else "lines",
            line={"color": color, "width": 2, "dash": dash},
            marker={"size": 8},
            hovertext=[
                f"layer {row['layer']}<br>Jaccard {shown(row['jaccard'])}, by chance {shown(row['expected'])}"
                f"<br>p = {_p(row['p'])}, n = {overlap['k']} dimensions"
                for row in rows
            ],
            hoverinfo="text",
            name=curve,
        )
    fig.update_xaxes(title="layer (block, counted from 0)")
    fig.update_yaxes(title="Jaccard index (0 to 1)", range=[0, 1])
    caption = (
        f"Of each layer the {overlap['k']} head dimensions with the lowest mean gate below 1: size of the "
        "intersection over that of the union. Exact for these gates, so without intervals; p at a layer is "
        "one-sided and not corrected for looking at many layers."
    )
    chance = sum(row["expected"] for row in rows) / len(rows) if rows else None
    title = "Neither set of gates suppresses anything"
    if chance is not None:
        title = (
            f"Suppressed dimensions in common with {plain(name)}: mean Jaccard {shown(overlap['jaccard'])}, "
            f"by chance {shown(chance)} (p = {_p(overlap['free']['p'])}; "
            f"within heads p = {_p(overlap['within_heads']['p'])})"
        )
    return finished(fig, title, caption, 320)


def _activity_hover(row: Row) -> str:
    return (
        f"{plain(row['part'])}, layer {row['layer']}<br>mean |gate - 1| {shown(row['deviation'])}"
        f"<br>suppressed {shown(row['suppressed'])}, amplified {shown(row['amplified'])}"
        f"<br>work {shown(row['work'])}, n = {row['n_tokens']} tokens"
    )


def _auc(row: Row) -> Row:
    """The AUC as an estimate."""
    return {"mean": row["auc"], "low": row["low"], "high": row["high"], "n": row["n"]}


def _shuffled_text(row: Row) -> str:
    if row["shuffled_high"] is None:
        return ""
    return f"<br>shuffled labels {shown(row['shuffled_mean'])}, 95th percentile {shown(row['shuffled_high'])}"


def _readout_finding(rows: Sequence[Row]) -> str:
    if not rows:
        return "No probe was fitted"
    found = []
    for kind in dict.fromkeys(row["features"] for row in rows):
        best = max((row for row in rows if row["features"] == kind), key=lambda row: _auc(row)["mean"])
        at = as_estimate(_auc(best)).text()
        high, low = best["shuffled_high"], _auc(best)["low"]
        doubt = ", no more than with shuffled labels" if high is not None and (low or 0) <= high else ""
        found.append(f"{plain(FEATURES.get(kind, kind))} {at} in layer {best['layer']}{doubt}")
    return "Behaviour read off, AUC of the best layer: " + "; ".join(found)


def _p(value: float | int) -> str:
    return f"{value:.1g}" if value < 0.01 else shown(value)
