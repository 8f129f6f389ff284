"""Figures of an evaluation: one metric by condition, the cost in capability, two judges compared."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emmech.figures.house import (
    COLORS,
    GRID,
    INTERVAL,
    METHODS,
    SYMBOLS,
    TEXT,
    Row,
    Summary,
    as_estimate,
    bars,
    finished,
    folded,
    hover,
    plain,
    shown,
)
from emmech.figures.patching import role

AXES: Mapping[str | None, Mapping[str, Any]] = {
    "rate": {"title": "share (0 to 1)", "range": [0, 1]},
    "score": {"title": "score (0 to 100)", "range": [0, 100]},
    "nats": {"title": "nats per token", "zeroline": True, "zerolinecolor": GRID},
    "words": {"title": "words per answer", "rangemode": "tozero"},
}
SOLVED = ("capability", "arithmetic")
"""Metrics of an evaluation in which more is able."""
KNOWN = 0.05
"""Below it a corrected p is called known."""


def metric_bars(summary: Summary, metric: str, groups: Sequence[str] = ("all",)) -> go.Figure:
    """Every condition of an evaluation with its interval, from top to bottom, one marker per group."""
    rows = _measured(summary, metric, groups)
    names = list(dict.fromkeys(row["condition"] for row in rows))
    fig = go.Figure()
    for number, group in enumerate(groups):
        offset = (number - (len(groups) - 1) / 2) * 0.4 / max(1, len(groups) - 1)
        look = {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 10}
        for kind in dict.fromkeys(map(role, names)):
            mine = [row for row in rows if (role(row["condition"]), row["group"]) == (kind, group)]
            fig.add_scatter(
                x=[row["mean"] for row in mine],
                y=[names.index(row["condition"]) + offset for row in mine],
                error_x=bars(mine, COLORS[kind]),
                mode="markers",
                marker=look | {"color": COLORS[kind], "line": {"color": COLORS[kind], "width": 2}},
                hovertext=[_hover(row) for row in mine],
                hoverinfo="text",
                name=plain(f"{group}, {kind}"),
                legendgroup=plain(group),
                showlegend=False,
                cliponaxis=False,
            )
        if len(groups) > 1:  # a legend entry in a colour that stands for no kind
            mark = {"mode": "markers", "marker": look | {"color": TEXT}, "legendgroup": plain(group)}
            fig.add_scatter(x=[None], y=[None], name=plain(group), **mark)
    ticks = {"tickvals": list(range(len(names))), "ticktext": [folded(name, 22) for name in names]}
    fig.update_yaxes(range=[len(names) - 0.5, -0.5], **ticks)
    fig.update_xaxes(**AXES.get(rows[0]["unit"] if rows else None, {"title": plain(metric)}))
    counts = " to ".join(
        dict.fromkeys(str(pick(row["n"] for row in rows)) for pick in (min, max)) if rows else ()
    )
    caption = f"{INTERVAL}; n = {counts} answers a mark." if rows else "Nothing was measured."
    height = (34 + 14 * (len(groups) - 1)) * max(2, len(names)) + 50
    return finished(fig, metric_finding(summary, metric, groups), caption, height)


def metric_finding(summary: Summary, metric: str, groups: Sequence[str] = ("all",)) -> str:
    """The clearest comparison as a title ("EM: finetuned .32, base .00"), or that none is clear.

    A condition is compared with the model that it was made from, a wording with the plain one.
    """
    rows = _measured(summary, metric, groups)
    if not rows:
        return f"{plain(metric)}: nothing was measured"
    tests = [(row[kind], row, kind) for row in rows for kind in ("versus", "wording") if row.get(kind)]
    known = [one for one in tests if one[0]["p_holm"] < KNOWN]
    if not known:
        values = [row["mean"] for row in rows]
        spread = " to ".join(dict.fromkeys(shown(pick(values)) for pick in (min, max)))
        return f"{plain(metric)}: {spread}" + ("; no condition is known to change it" if tests else "")
    test, row, kind = min(known, key=lambda one: (one[0]["p_holm"], -abs(one[0]["mean"])))
    here = row["condition"], row["group"]
    other = (test["condition"], row["group"]) if kind == "versus" else (row["condition"], test["group"])
    means = {(one["condition"], one["group"]): shown(one["mean"]) for one in rows}
    told = []
    for condition, group in (here, other):
        name = condition if len(groups) < 2 else f"{condition} ({group})"
        told.append(f"{plain(name)} {means.get((condition, group), 'unknown')}")
    return f"{plain(metric)}: {', '.join(told)}"


def _measured(summary: Summary, metric: str, groups: Sequence[str]) -> list[Row]:
    """Rows of a metric and some groups in which something was measured."""
    rows = (row for row in summary["rows"] if row["metric"] == metric and row["group"] in groups)
    return [row for row in rows if row.get("mean") is not None]


def capability_cost(summary: Summary) -> go.Figure:
    """What each condition or dose changes in solved problems, against the model that it is made from."""
    rows = capability_changes(summary)
    names = list(dict.fromkeys(row["condition"] for row in rows))
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    fig = go.Figure()
    for number, metric in enumerate(metrics):
        mine = [row for row in rows if row["metric"] == metric]
        offset = (number - (len(metrics) - 1) / 2) * 0.3
        color = METHODS[(1, 4, 2)[number % 3]]
        fig.add_scatter(
            x=[row["mean"] for row in mine],
            y=[names.index(row["condition"]) + offset for row in mine],
            error_x=bars(mine, color),
            mode="markers",
            marker={"size": 9, "color": color, "symbol": SYMBOLS[number % len(SYMBOLS)]},
            hovertext=[hover(row, f"{row['condition']}, {metric}") for row in mine],
            hoverinfo="text",
            name=plain(metric),
            showlegend=len(metrics) > 1,
            cliponaxis=False,
        )
    fig.add_vline(x=0, line={"color": GRID, "width": 2})
    ticks = {"tickvals": list(range(len(names))), "ticktext": [folded(name, 22) for name in names]}
    fig.update_yaxes(range=[len(names) - 0.5, -0.5], **ticks)
    fig.update_xaxes(title="change in share solved")
    caption = f"{INTERVAL}, of the paired difference; below 0 is a loss. Chance is part of both shares."
    return finished(fig, _capability_finding(rows), caption, 34 * max(2, len(names)) + 70)


def capability_changes(summary: Summary) -> list[Row]:
    """Changes in the share of problems solved, of an evaluation or of doses."""
    if "capability" not in summary:
        rows = (row for row in summary["rows"] if row["metric"] in SOLVED and row["group"] == "all")
        return [
            {"condition": row["condition"], "metric": row["metric"], **row["versus"], "group": "all"}
            | {"condition": row["condition"]}
            for row in rows
            if row.get("versus")
        ]
    return [
        {**row["change"], "condition": _dose_name(row), "metric": SOLVED[0]}
        for row in summary["capability"]
        if row.get("change")
    ]


def judge_agreement(result: Summary) -> go.Figure:
    """Two judges of the same answers: how far they agree, and which answers either puts below."""
    fig = make_subplots(2, 1, row_heights=[0.4, 0.6], vertical_spacing=0.3)
    found = {"Spearman": "spearman", "kappa": "kappa"}
    points = [
        {"mean": result[key], **{end: result[f"{key}_interval"][end] for end in ("low", "high")}}
        | {"n": result["n_both"]}
        for key in found.values()
        if result[key] is not None
    ]
    names = [name for name, key in found.items() if result[key] is not None]
    fig.add_scatter(
        x=[point["mean"] for point in points],
        y=list(range(len(points))),
        error_x=bars(points, METHODS[1]),
        mode="markers",
        marker={"size": 11, "color": METHODS[1]},
        hovertext=[hover(point, name) for point, name in zip(points, names, strict=True)],
        hoverinfo="text",
        showlegend=False,
        row=1,
        col=1,
    )
    fig.update_yaxes(tickvals=list(range(len(names))), ticktext=names, range=[1.5, -0.5], row=1, col=1)
    fig.update_xaxes(title="agreement (-1 to 1)", range=[-1, 1], row=1, col=1)
    counts = result["counts"]
    cells = [[counts["both"], counts["a_only"]], [counts["b_only"], counts["neither"]]]
    fig.add_heatmap(
        x=["below", "not below"], y=["below", "not below"], z=cells, text=cells, texttemplate="%{text}",
        hoverinfo="text", textfont={"color": "#1b1f23"}, xgap=3, ygap=3, showscale=False,
        colorscale=[[0, "#F2F2F2"], [1, "#67A9CF"]], zmin=0, row=2, col=1,
    )  # fmt: skip
    fig.update_xaxes(title=f"b: {plain(_short(result['b']))}", showgrid=False, row=2, col=1)
    title = {"text": f"a: {plain(_short(result['a']))}", "standoff": 14}
    fig.update_yaxes(title=title, autorange="reversed", showgrid=False, row=2, col=1)
    caption = (
        f"n = {result['n_both']} answers to {result['n_questions']} questions scored by both. 95% intervals "
        f"over questions. Below: answers below {result['threshold_a']:g} (a) and "
        f"{result['threshold_b']:g} (b), which is what kappa is of."
    )
    return finished(fig, _agreement_finding(result), caption, 360)


def _hover(row: Row) -> str:
    text = hover(row, row["condition"])
    if row.get("versus"):
        test = row["versus"]
        text += f"<br>minus {plain(test['condition'])}: {as_estimate(test).text()}"
    return text


def _capability_finding(rows: Sequence[Row]) -> str:
    if not rows:
        return "No capability was measured"
    lost = [row for row in rows if row["high"] is not None and row["high"] < 0]
    n = " or ".join(str(n) for n in dict.fromkeys(row["n_clusters"] for row in rows))
    if not lost:
        return f"No loss of capability is seen with {n} problems"
    most = min(lost, key=lambda row: row["mean"])
    return f"{plain(most['condition'])} loses most: {shown(-most['mean'])} of the problems ({most['metric']})"


def _dose_name(row: Row) -> str:
    """As in "steer at 2", "scale -1"."""
    if "scale" in row:
        return f"scale {row['scale']:g}"
    return f"{row['method']} at {row['dose']:g}"


def _agreement_finding(result: Summary) -> str:
    said = []
    for name, key in (("rank correlation", "spearman"), ("kappa", "kappa")):
        low = result[f"{key}_interval"]["low"]
        doubt = ", not told from none" if low is not None and low <= 0 else ""
        said.append(f"{name} unknown" if result[key] is None else f"{name} {shown(result[key])}{doubt}")
    return f"The two judges agree with {said[0]} and {said[1]}"


def _short(name: str) -> str:
    """The end of a path or long name."""
    return name if len(name) <= 24 else "…" + name[-23:]
