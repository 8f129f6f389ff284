"""One pure function per figure: the summary of a run -> a plotly Figure.

    condition_bars(summary).show()

The title states what was found, the subtitle what the marks are. One colour per kind of condition
in all figures (Okabe and Ito's colour-blind-safe palette, the orange darkened to show on white),
one marker per group of questions. The background is transparent, the text a grey that reads on
white and on black. Nothing here computes a statistic, except the reading of the plain line in
`frontier`, which is linear between two steps.
"""

import html
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emmech.evaluation.statistics import Estimate

Summary = Mapping[str, Any]
Row = Mapping[str, Any]

COLORS = {
    "base": "#0072B2",
    "finetuned": "#D55E00",
    "repair": "#009E73",
    "induce": "#CC79A7",
    "control": "#8A8A8A",
    "perturb": "#C58900",
}
SYMBOLS = ("circle", "diamond-open", "square", "triangle-up-open", "cross", "hexagon-open")
"""One per group, in the order of the summary."""
DASHES = ("solid", "dot", "dash", "dashdot", "longdash", "longdashdot")
INTERVAL = "Bars and bands are 95% intervals clustered by question"
RESID = re.compile(r"(?:repair|induce):resid-(\d+)")
HIDDEN_OUTSIDE = (-0.5, 1.5)
"""Shares restored are drawn in this range; random patches throw early layers far beyond it."""

_TEXT, _GRID = "#767676", "rgba(128,128,128,.25)"
HOUSE = go.layout.Template(
    layout={
        "font": {"size": 13, "color": _TEXT},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "title": {"x": 0.01, "xanchor": "left", "yref": "container", "y": 0.98, "yanchor": "top"},
        "title_font_size": 17,
        "title_subtitle_font_size": 12,
        "xaxis": {
            "gridcolor": _GRID,
            "zeroline": False,
            "linecolor": _GRID,
            "automargin": True,
            "ticklabelstandoff": 8,
        },
        "yaxis": {
            "gridcolor": _GRID,
            "zeroline": False,
            "linecolor": _GRID,
            "automargin": True,
            "ticklabelstandoff": 8,
        },
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "margin": {"l": 8, "r": 16, "b": 8},
        "hoverlabel": {"align": "left"},
        "modebar": {"orientation": "v", "bgcolor": "rgba(0,0,0,0)"},
    }
)


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
                error_x=_bars(of_kind, COLORS[kind]),
                marker=look | {"color": COLORS[kind], "line": {"color": COLORS[kind], "width": 2}},
                hovertext=[_hover(row, row["condition"]) for row in of_kind],
                hoverinfo="text",
                showlegend=False,
                name=_plain(f"{group}, {kind}"),
                **style,
            )
        if len(groups) > 1:  # legend entries in a colour that stands for no kind
            legend = look | {"color": _TEXT}
            fig.add_scatter(x=[None], y=[None], marker=legend, name=_plain(group), **style)
        if best := [row for row in mine if row.get("best")]:
            fig.add_scatter(
                x=[row["best"]["mean"] for row in best],
                y=[names.index(row["condition"]) + offset + 0.13 for row in best],
                error_x=_bars([row["best"] for row in best], COLORS["perturb"]),
                marker={"symbol": "star-open", "size": 10, "color": COLORS["perturb"]},
                hovertext=[_hover({**row, **row["best"]}, "best trial") for row in best],
                hoverinfo="text",
                name=_plain(f"{group}, best trial per question" if groups[1:] else "best trial"),
                cliponaxis=False,
                mode="markers",
            )
    ticks = {"tickvals": list(range(len(names))), "ticktext": [_plain(name) for name in names]}
    fig.update_yaxes(range=[len(names) - 0.5, -0.5], **ticks)
    fig.update_xaxes(**metric_axis(summary))
    return _finished(fig, finding(summary), INTERVAL + ".", 36 * max(3, len(names)) + 60)


def layer_curve(summary: Summary) -> go.Figure:
    """The metric by patched layer, one panel per group, over the two unpatched models."""
    groups, rows = groups_of(summary), metric_rows(summary)
    fig = make_subplots(len(groups), 1, shared_xaxes=True, vertical_spacing=0.08)
    for panel, group in enumerate(groups, start=1):
        mine = [row for row in rows if row["group"] == group]
        curve = [(int(at[1]), row) for row in mine if (at := RESID.fullmatch(row["condition"]))]
        layers = [layer for layer, _ in curve] or [0]
        plain = {row["condition"]: row for row in mine if row["condition"] in ("base", "finetuned")}
        lines = [
            (name, [(min(layers) - 0.5, row), (max(layers) + 0.5, row)], {"dash": "dash"})
            for name, row in plain.items()
        ]
        kind = role(curve[0][1]["condition"]) if curve else "repair"
        for name, points, line in [*lines, (kind, curve, {})]:
            _add_band(fig, points, COLORS[name], panel)
            fig.add_scatter(
                x=[x for x, _ in points],
                y=[row["mean"] for _, row in points],
                line=line | {"color": COLORS[name], "width": 2},
                mode="lines+markers" if name == kind else "lines",
                hovertext=[_hover(row, row["condition"]) for _, row in points],
                hoverinfo="text",
                name="patched at one layer" if name == kind else name,
                legendgroup=name,
                showlegend=panel == 1,
                row=panel,
                col=1,
            )
        axis = metric_axis(summary)
        if len(groups) > 1:
            axis["title"] = f"{_plain(group)} {axis['title']}"
        fig.update_yaxes(**axis, row=panel, col=1)
    at = "patched layer (block, counted from 0)"
    fig.update_xaxes(title=at, row=len(groups), col=1)
    return _finished(fig, finding(summary), INTERVAL + ".", 260 * len(groups) + 60)


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
                    f"{_plain(name)}<br>after layer {layer}: {_unknown(share)}<br>{tokens}, {n}"
                    for layer, share in enumerate(shares)
                ],
                hoverinfo="text",
                name=_plain(name),
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
    fig = _finished(fig, title, caption, 230 * max(1, len(kinds)) + 110)
    many = sum(trace.showlegend is not False for trace in fig.data) > 20
    legend = {"yref": "container", "y": 0, "yanchor": "bottom", "tracegroupgap": 4}
    return fig.update_layout(legend=legend, showlegend=not many)


def frontier(summary: Summary) -> go.Figure:
    """On-topic against off-topic along training, plain and with the base's prefix patched in."""
    fig = go.Figure()
    points = summary["frontier"]
    axis = metric_axis(summary)
    end = max([1.0, *(p[g]["mean"] for p in points for g in ("on_topic", "off_topic"))])
    end = 1 if summary["unit"] == "rate" else end
    fig.add_scatter(
        x=[0, end], y=[0, end], mode="lines", hoverinfo="skip", showlegend=False, name="diagonal",
        line={"color": _GRID, "dash": "dot"},
    )  # fmt: skip
    names = {"finetuned": "finetuned, stopped at a step", "repair:prefix": "base prefix patched in"}
    for condition, name in names.items():
        line = [point for point in points if point["condition"] == condition]
        on, off = ([point[group] for point in line] for group in ("on_topic", "off_topic"))
        kind = role(condition)
        faint = _faint(COLORS[kind], 0.35)
        fig.add_scatter(
            x=[point["mean"] for point in on],
            y=[point["mean"] for point in off],
            error_x=_bars(on, faint),
            error_y=_bars(off, faint),
            text=_step_labels(line),
            textposition="top left" if kind == "finetuned" else "middle right",
            mode="lines+markers+text",
            marker={"size": 9, "symbol": "circle" if kind == "finetuned" else "square"},
            line={"color": COLORS[kind], "width": 2},
            hovertext=[
                f"{name}<br>step {point['step']}<br>on-topic {_hover(point['on_topic'])}"
                f"<br>off-topic {_hover(point['off_topic'])}"
                for point in line
            ],
            hoverinfo="text",
            name=name,
            cliponaxis=False,
        )
    fig.update_xaxes(**axis, constrain="domain")
    fig.update_xaxes(title=f"on-topic {axis['title']}")
    fig.update_yaxes(**axis, scaleanchor="x", constrain="domain", constraintoward="top")
    fig.update_yaxes(title=f"off-topic {axis['title']}")
    caption = (
        "Numbers beside the points are training steps, bars are 95% intervals. Stopping training "
        "early moves back along the plain line: that is what early stopping alone would do. A "
        "patch does better than stopping early only where its line lies below the plain one."
    )
    return _finished(fig, _frontier_finding(summary), caption, 560)


def early_stopping(points: Sequence[Mapping[str, Any]], on_topic: float | int) -> float | None:
    """Off-topic rate on the plain line where it first reaches ``on_topic``; None where it never does."""
    plain = [
        (point["on_topic"]["mean"], point["off_topic"]["mean"])
        for point in sorted(points, key=lambda point: point["step"])
        if point["condition"] == "finetuned"
    ]
    for (x0, y0), (x1, y1) in pairwise(plain):
        if min(x0, x1) <= on_topic <= max(x0, x1):
            return y0 if x0 == x1 else y0 + (y1 - y0) * (on_topic - x0) / (x1 - x0)
    return None


def finding(summary: Summary) -> str:
    """What the main condition did, as a title: "Base K/V at the prefix: off-topic refusal .79 → .26"."""
    if not metric_rows(summary):
        return f"No metric: the detector {_plain(summary['detector'])} measures nothing"
    pair = headline(summary)
    if pair is None:
        return _plain(f"{summary['detector']} by condition")
    before, after = pair
    change = f"{_number(before['mean'])} → {_number(after['mean'])}"
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
    patched = [name for name in patched if rows[name].get("target", "finetuned") in rows]
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


def as_estimate(row: Row) -> Estimate:
    """An estimate as it was before JSON, which has no nan."""
    mean, low, high = (math.nan if row.get(k) is None else float(row[k]) for k in ("mean", "low", "high"))
    n = row.get("n", 0)
    return Estimate(mean, low, high, row.get("n_clusters", n), n, row.get("n_missing", 0))


def quantity(summary: Summary, group: str) -> str:
    """What is measured, in running text: "off-topic refusal"."""
    unit = " (words)" if summary["unit"] == "words" else ""
    return _plain(("" if group == "all" else group + " ") + summary["detector"] + unit)


def metric_axis(summary: Summary) -> dict[str, Any]:
    """Title with the unit, and the range where it is fixed."""
    name = _plain(summary["detector"])
    if summary["unit"] == "rate":
        return {"title": f"{name} rate (0 to 1)", "range": [0, 1]}
    return {"title": f"{name} ({summary['unit'] or 'no unit'} per answer)", "rangemode": "tozero"}


def _step_labels(line: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each point's step; where points lie on each other, all of their steps at the first."""
    labels: list[str] = []
    first = 0
    for number, point in enumerate(line):
        near = all(
            abs(point[group]["mean"] - line[first][group]["mean"]) < 0.03
            for group in ("on_topic", "off_topic")
        )
        if number and near:
            labels[first] += f", {point['step']}"
            labels.append("")
        else:
            first = number
            labels.append(str(point["step"]))
    return labels


def _frontier_finding(summary: Summary) -> str:
    points = summary["frontier"]
    patched = [point for point in points if point["condition"] == "repair:prefix"]
    if not patched:
        return "No patched step"
    last = max(patched, key=lambda point: point["step"])
    on, off = last["on_topic"]["mean"], last["off_topic"]["mean"]
    name = _plain(summary["detector"])
    found = (
        f"Prefix patched at step {last['step']}: off-topic {name} {_number(off)} at on-topic {_number(on)}"
    )
    alone = early_stopping(points, on)
    return found if alone is None else f"{found}; early stopping alone: about {_number(alone)}"


def _action(condition: str) -> str:
    """What was done, as the beginning of a title."""
    kind, _, rest = condition.partition(":")
    if kind in ("repair", "induce"):
        source = "Base" if kind == "repair" else "Finetuned"
        if at := RESID.fullmatch(condition):
            return f"{source} residual stream after block {at[1]}"
        places = {"prompt": "whole prompt", "postfix-same": "postfix (same question)"}
        return f"{source} K/V at the {_plain(places.get(rest, rest))}"
    if kind == "perturb":
        return f"Tokens changed in the {_plain(rest)}"
    return _plain(f"{kind.capitalize()} {rest}")


def _bars(rows: Sequence[Row], color: str) -> dict[str, Any]:
    """Error bars from mean, low and high; none where the interval is unknown."""
    known = [(row["mean"], row["low"], row["high"]) for row in rows]
    return {
        "type": "data",
        "symmetric": False,
        "array": [None if high is None else high - mean for mean, _, high in known],
        "arrayminus": [None if low is None else mean - low for mean, low, _ in known],
        "color": color,
        "thickness": 1.5,
        "width": 0,
    }


def _add_band(fig: go.Figure, points: Sequence[tuple[float | int, Row]], color: str, panel: int) -> None:
    known = [(x, row) for x, row in points if row["low"] is not None]
    fig.add_scatter(
        x=[x for x, _ in known] + [x for x, _ in reversed(known)],
        y=[row["high"] for _, row in known] + [row["low"] for _, row in reversed(known)],
        fill="toself",
        fillcolor=_faint(color, 0.15),
        mode="none",
        hoverinfo="skip",
        showlegend=False,
        row=panel,
        col=1,
    )


def _hover(row: Row, name: str = "") -> str:
    group = row.get("group", "all")
    head = f"{name}{'' if group == 'all' else ', ' + group}"
    return (_plain(head) + "<br>" if name else "") + f"{as_estimate(row).text()}, n = {row['n']}"


def _finished(fig: go.Figure, title: str, caption: str, height: int) -> go.Figure:
    """Title and subtitle wrapped, with a margin that holds them and one line of legend."""
    lines, small = (
        textwrap.wrap(text, width, break_on_hyphens=False) for text, width in ((title, 72), (caption, 104))
    )
    top = 56 + 22 * len(lines) + 16 * len(small)
    return fig.update_layout(
        template=HOUSE,
        title={"text": "<br>".join(lines), "subtitle": {"text": "<br>".join(small)}},
        margin_t=top,
        height=height + top,
    )


def _faint(color: str, opacity: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _number(value: float | int) -> str:
    return as_estimate({"mean": value}).text().split()[0]


def _unknown(share: float | int | None) -> str:
    return "unknown" if share is None else _number(share)


def _plain(text: str) -> str:
    """Shown as it is: plotly would read < and & as markup."""
    return html.escape(text, quote=False)
