"""Figures of one run of conditions: bars, layer curves, what a patch restored."""

import re
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emmech.figures.house import (
    COLORS,
    DASHES,
    INTERVAL,
    SYMBOLS,
    TEXT,
    Row,
    Summary,
    add_band,
    bars,
    finished,
    hover,
    plain,
    shown,
)

RESID = re.compile(r"(?:repair|induce):resid-(\d+)")
HIDDEN_OUTSIDE = (-0.5, 1.5)
"""Shares restored are drawn in this range; random patches throw early layers far beyond it."""


def condition_bars(summary: Summary) -> go.Figure:
    """Every condition with its interval, from top to bottom, one marker per group."""
    fig = go.Figure()
    rows, groups = metric_rows(summary), groups_of(summary)
    names = list(dict.fromkeys(row["condition"] for row in rows))
    for number, group in enumerate(groups if rows else ()):
        offset = (number - (len(groups) - 1) / 2) * 0.36 / max(1, len(groups) - 1)
        mine = [row for row in rows if row["group"] == group]
        style = {"legendgroup": group, "mode": "markers", "cliponaxis": False}
        look = {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 9}
        for kind in dict.fromkeys(role(row["condition"]) for row in mine):
            of_kind = [row for row in mine if role(row["condition"]) == kind]
            fig.add_scatter(
                x=[row["mean"] for row in of_kind],
                y=[names.index(row["condition"]) + offset for row in of_kind],
                error_x=bars(of_kind, COLORS[kind]),
                marker=look | {"color": COLORS[kind], "line": {"color": COLORS[kind], "width": 2}},
                hovertext=[hover(row, row["condition"]) for row in of_kind],
                hoverinfo="text",
                showlegend=False,
                name=plain(f"{group}, {kind}"),
                **style,
            )
        if len(groups) > 1:  # legend entries in a colour that stands for no kind
            legend = look | {"color": TEXT}
            fig.add_scatter(x=[None], y=[None], marker=legend, name=plain(group), **style)
        if best := [row for row in mine if row.get("best")]:
            fig.add_scatter(
                x=[row["best"]["mean"] for row in best],
                y=[names.index(row["condition"]) + offset + 0.13 for row in best],
                error_x=bars([row["best"] for row in best], COLORS["perturb"]),
                marker={"symbol": "star-open", "size": 10, "color": COLORS["perturb"]},
                hovertext=[hover({**row, **row["best"]}, "best trial") for row in best],
                hoverinfo="text",
                name=plain(f"{group}, best trial per question" if groups[1:] else "best trial"),
                cliponaxis=False,
                mode="markers",
            )
    ticks = {"tickvals": list(range(len(names))), "ticktext": [plain(name) for name in names]}
    fig.update_yaxes(range=[len(names) - 0.5, -0.5], **ticks)
    fig.update_xaxes(**metric_axis(summary))
    return finished(fig, finding(summary), INTERVAL + ".", 36 * max(3, len(names)) + 60)


def layer_curve(summary: Summary) -> go.Figure:
    """The metric by patched layer, one panel per group, over the two unpatched models."""
    groups, rows = groups_of(summary), metric_rows(summary)
    fig = make_subplots(len(groups), 1, shared_xaxes=True, vertical_spacing=0.08)
    for panel, group in enumerate(groups, start=1):
        mine = [row for row in rows if row["group"] == group]
        curve = [(int(at[1]), row) for row in mine if (at := RESID.fullmatch(row["condition"]))]
        layers = [layer for layer, _ in curve] or [0]
        unpatched = {row["condition"]: row for row in mine if row["condition"] in ("base", "finetuned")}
        lines = [
            (name, [(min(layers) - 0.5, row), (max(layers) + 0.5, row)], {"dash": "dash"})
            for name, row in unpatched.items()
        ]
        kind = role(curve[0][1]["condition"]) if curve else "repair"
        for name, points, line in [*lines, (kind, curve, {})]:
            add_band(fig, points, COLORS[name], panel)
            fig.add_scatter(
                x=[x for x, _ in points],
                y=[row["mean"] for _, row in points],
                line=line | {"color": COLORS[name], "width": 2},
                mode="lines+markers" if name == kind else "lines",
                hovertext=[hover(row, row["condition"]) for _, row in points],
                hoverinfo="text",
                name="patched at one layer" if name == kind else name,
                legendgroup=name,
                showlegend=panel == 1,
                row=panel,
                col=1,
            )
        axis = metric_axis(summary)
        if len(groups) > 1:
            axis["title"] = f"{plain(group)} {axis['title']}"
        fig.update_yaxes(**axis, row=panel, col=1)
    at = "patched layer (block, counted from 0)"
    fig.update_xaxes(title=at, row=len(groups), col=1)
    return finished(fig, finding(summary), INTERVAL + ".", 260 * len(groups) + 60)


def restored_curves(summary: Summary) -> go.Figure:
    """Did the patch arrive? How far the last prompt token moved towards the donor, by layer."""
    checks = {
        name: check
        for name, check in summary.get("checks", {}).items()
        if any(share is not None for share in check["restored"])
    }
    kinds = list(dict.fromkeys(role(name) for name in checks))
    fig = make_subplots(max(1, len(kinds)), 1, shared_xaxes=True, vertical_spacing=0.07)
    for panel, kind in enumerate(kinds, start=1):
        of_kind = [name for name in checks if role(name) == kind]
        for number, name in enumerate(of_kind):
            shares = checks[name]["restored"]
            tokens = f"{checks[name]['patched_tokens_per_prompt']:.1f} tokens patched per prompt"
            n = f"n = {summary['n_questions']} questions"
            fig.add_scatter(
                x=list(range(len(shares))),
                y=shares,
                mode="lines",
                line={"color": COLORS[kind], "dash": DASHES[number % len(DASHES)], "width": 2.5},
                hovertext=[
                    f"{plain(name)}<br>after layer {layer}: {_unknown(share)}<br>{tokens}, {n}"
                    for layer, share in enumerate(shares)
                ],
                hoverinfo="text",
                name=plain(name),
                legendgroup=kind,
                row=panel,
                col=1,
            )
        fig.update_yaxes(title=f"{kind}: share (0 to 1)", range=HIDDEN_OUTSIDE, row=panel, col=1)
    at = "after layer (block, counted from 0)"
    fig.update_xaxes(title=at, row=max(1, len(kinds)), col=1)
    main = "repair:prefix" if "repair:prefix" in checks else next(iter(checks), None)
    title = "No patch to check"
    if main is not None:
        last = _unknown(checks[main]["restored"][-1])
        title = f"{_action(main)}: {last} of the way to the other model before the last block"
    low, high = HIDDEN_OUTSIDE
    caption = (
        "State of the last prompt token: 0 as without the patch, 1 as in the model the patch comes "
        "from. A ratio of sums over all prompts, so without an interval; the axis ends at "
        f"{low:g} and {high:g}."
    )
    fig = finished(fig, title, caption, 230 * max(1, len(kinds)) + 110)
    many = sum(trace.showlegend is not False for trace in fig.data) > 20
    legend = {"yref": "container", "y": 0, "yanchor": "bottom", "tracegroupgap": 4}
    return fig.update_layout(legend=legend, showlegend=not many)


def finding(summary: Summary) -> str:
    """What the main condition did, as a title: "Base K/V at the prefix: off-topic refusal .79 → .26"."""
    if not metric_rows(summary):
        return f"No metric: the detector {plain(summary['detector'])} measures nothing"
    pair = headline(summary)
    if pair is None:
        return plain(f"{summary['detector']} by condition")
    before, after = pair
    change = f"{shown(before['mean'])} → {shown(after['mean'])}"
    if after["condition"] == "finetuned":
        return f"Base → finetuned: {quantity(summary, after['group'])} {change}"
    action = _action(after["condition"])
    if RESID.fullmatch(after["condition"]):
        tried = {r["condition"] for r in summary["conditions"] if RESID.fullmatch(r["condition"])}
        action += f", the largest change of {len(tried)} layers"
    return f"{action}: {quantity(summary, after['group'])} {change}"


def headline(summary: Summary) -> tuple[Row, Row] | None:
    """The row the run is about, after the row of its unpatched model; off-topic where there is one.

    The prefix comes first; of layers, the one that changed most.
    """
    groups = groups_of(summary)
    group = "off-topic" if "off-topic" in groups else groups[0]
    rows = {row["condition"]: row for row in metric_rows(summary) if row["group"] == group}
    patched = [name for name in rows if role(name) in ("repair", "induce", "perturb")]
    patched = [name for name in patched if rows[name].get("target", "finetuned") in rows.keys() - {name}]
    if layers := [name for name in patched if RESID.fullmatch(name)]:
        moved = {name: rows[name]["mean"] - rows[rows[name]["target"]]["mean"] for name in layers}
        patched = [max(layers, key=lambda name: abs(moved[name]))]
    patched.sort(key=lambda name: not name.endswith(":prefix"))
    if patched:
        after = rows[patched[0]]
        return rows[after.get("target", "finetuned")], after
    return (rows["base"], rows["finetuned"]) if {"base", "finetuned"} <= rows.keys() else None


def role(condition: str) -> str:
    """The kind of a condition, which is a key of `COLORS`."""
    kind = condition.partition(":")[0]
    return kind if kind in COLORS else "perturb"


def groups_of(summary: Summary) -> list[str]:
    """Groups of questions in order."""
    return list(dict.fromkeys(row["group"] for row in summary["conditions"]))


def metric_rows(summary: Summary) -> list[Row]:
    """Rows in which something was measured."""
    return [row for row in summary["conditions"] if row.get("mean") is not None]


def quantity(summary: Summary, group: str) -> str:
    """What is measured, in running text: "off-topic refusal"."""
    unit = " (words)" if summary["unit"] == "words" else ""
    return plain(("" if group == "all" else group + " ") + summary["detector"] + unit)


def metric_axis(summary: Summary) -> dict[str, Any]:
    """Title with the unit, and the range where it is fixed."""
    name = plain(summary["detector"])
    if summary["unit"] == "rate":
        return {"title": f"{name} rate (0 to 1)", "range": [-0.02, 1.02]}
    return {"title": f"{name} ({summary['unit'] or 'no unit'} per answer)", "rangemode": "tozero"}


def _action(condition: str) -> str:
    """What was done, as the beginning of a title."""
    kind, _, rest = condition.partition(":")
    if kind in ("repair", "induce"):
        source = "Base" if kind == "repair" else "Finetuned"
        if at := RESID.fullmatch(condition):
            return f"{source} residual stream after block {at[1]}"
        places = {"prompt": "whole prompt", "postfix-same": "postfix (same question)"}
        return f"{source} K/V at the {plain(places.get(rest, rest))}"
    if kind == "perturb":
        return f"Tokens changed in the {plain(rest)}"
    return plain(f"{kind.capitalize()} {rest}")


def _unknown(share: float | int | None) -> str:
    return "unknown" if share is None else shown(share)
