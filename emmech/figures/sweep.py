"""Figures of sweeps: maps and curves of what each part of the prefix carries."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emmech.figures.house import (
    COLORS,
    GRID,
    METHODS,
    SYMBOLS,
    Row,
    Summary,
    add_band,
    bars,
    finished,
    plain,
    shown,
)

CHANGE = (
    (0.0, "#2B7BBA"),
    (0.5, "rgba(43,123,186,0)"),
    (0.5, "rgba(230,126,0,0)"),
    (1.0, "#E67E00"),
)
"""Blue is against the whole patch, orange with it; no effect is the page's own colour, light or dark."""
INTERVALS = "95% intervals over questions, not corrected for looking at many cells"
_TITLES = {"layer": "layer (block, counted from 0)", "kv_head": "K/V head"}
_MOST_BARS, _PHONE = 40, 400


def sweep_map(summary: Summary) -> go.Figure:
    """A heat map over two axes, a curve over one, bars for cells of one's own."""
    axes = list(summary["axes"])
    regular = axes and all(_is_place(row[axis]) for row in summary["rows"] for axis in axes)
    across = [axis for axis in axes if axis not in ("layer", "kv")]
    if not regular or not ({"layer", "position"} & set(axes)):
        return _bars(summary)
    if "layer" in axes and across:
        return _heat(summary, "position" if "position" in across else across[0])
    return _curve(summary, "layer" if "layer" in axes else "position")


def sweep_finding(summary: Summary) -> str:
    """The strongest cell as a title: "Value at layer 12, token 3: .12 of what the whole prefix does"."""
    known = [row for row in summary["rows"] if row["effect"] is not None]
    metric = plain(summary["metric"])
    if not known:
        return f"{metric}: the donor's prefix changes nothing"
    if summary["mode"].startswith("cumulative"):
        half = [row for row in known if row["effect"] >= 0.5]
        up = summary["mode"] == "cumulative_up"
        if half and all(isinstance(row["layer"], int) for row in half):
            layer = (min if up else max)(row["layer"] for row in half)
            layers = f"0 to {layer}" if up else f"{layer} and up"
            return f"{metric}: half of what the prefix does is reached with layers {layers}"
    if summary["mode"] == "leave_one_out":
        row = min(known, key=lambda row: row["effect"])
        return f"{metric}: all but {_where(row, summary)} do {shown(row['effect'])} of what the prefix does"
    row = max(known, key=lambda row: abs(row["effect"]))
    if summary["mode"] == "attribution":
        return f"{metric}: {_where(row, summary)} has the largest attribution, {shown(row['effect'])}"
    return f"{metric}: {_where(row, summary)} alone does {shown(row['effect'])} of what the prefix does"


def attribution_scatter(summary: Summary) -> go.Figure:
    """Estimated against exact effect of the cells that were patched."""
    fig = go.Figure()
    rows = [row for row in summary["rows"] if row["exact_effect"] is not None]
    for number, (name, sampled) in enumerate((("drawn at random", True), ("largest attribution", False))):
        mine = [row for row in rows if row["sampled"] == sampled]
        fig.add_scatter(
            x=[row["effect"] for row in mine],
            y=[row["exact_effect"] for row in mine],
            mode="markers",
            marker={"color": METHODS[1 - number], "symbol": SYMBOLS[number], "size": 8},
            hovertext=[_hover(row, summary) for row in mine],
            hoverinfo="text",
            name=name,
        )
    ends = [value for row in rows for value in (row["effect"], row["exact_effect"])] or [0, 1]
    line = {"x": [min(ends), max(ends)], "y": [min(ends), max(ends)], "line": {"color": GRID, "dash": "dash"}}
    fig.add_scatter(**line, mode="lines", hoverinfo="skip", showlegend=False)
    fig.update_xaxes(title="attribution (share of the whole prefix)")
    fig.update_yaxes(title="exact effect (share of the whole prefix)")
    rank = summary["spearman"]
    n = sum(row["sampled"] for row in rows)
    title = "Exact patches of too few cells to compare"
    if rank is not None:
        title = f"Attribution ranks cells as exact patches do: Spearman {shown(rank)}, n = {n}"
    caption = "The correlation is over the cells drawn at random. On the dashed line both are equal."
    return finished(fig, title, caption, 380)


def token_labels(tokens: Sequence[str]) -> list[str]:
    """Tokens as axis labels: their number, and their text with blanks and line breaks shown."""
    marks = {" ": "·", "\n": "⏎", "\t": "⇥"}
    return [f"{plain(''.join(marks.get(c, c) for c in text))} {at}" for at, text in enumerate(tokens)]


def _heat(summary: Summary, across: str) -> go.Figure:
    """Layers by ``across``; of several heads in one place the strongest is shown."""
    kinds = _kinds(summary)
    columns = list(dict.fromkeys(row[across] for row in summary["rows"]))
    layers = list(dict.fromkeys(row["layer"] for row in summary["rows"]))
    n_layers = max(layers) + 1
    titles = [f"{kind}s" for kind in kinds] if len(kinds) > 1 else None
    fig = make_subplots(1, len(kinds), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles)
    most = max((abs(row["effect"]) for row in summary["rows"] if row["effect"] is not None), default=1) or 1
    for panel, kind in enumerate(kinds, start=1):
        best: dict[tuple[Any, Any], Row] = {}
        for row in summary["rows"]:
            at = (row["layer"], row[across])
            if row.get("kv") == kind and abs(row["effect"] or 0) >= abs(best.get(at, {}).get("effect") or 0):
                best[at] = row
        grid = [[best.get((layer, column)) for column in columns] for layer in range(n_layers)]
        fig.add_heatmap(
            x=list(range(len(columns))),
            y=list(range(n_layers)),
            z=[[None if row is None else row["effect"] for row in line] for line in grid],
            hovertext=[["" if row is None else _hover(row, summary) for row in line] for line in grid],
            hoverinfo="text",
            hoverongaps=False,
            coloraxis="coloraxis",
            row=1,
            col=panel,
        )
    labels = token_labels(summary["tokens"]) if across == "position" else [plain(str(c)) for c in columns]
    labels = [labels[column] for column in columns] if across == "position" else labels
    fig.update_xaxes(
        tickvals=list(range(len(columns))),
        ticktext=labels,
        tickangle=-90,
        title=None if across == "position" else _TITLES.get(across, across),
    )
    for update in (fig.update_xaxes, fig.update_yaxes):
        update(showgrid=False, showline=True, mirror=True)
    fig.update_yaxes(title=_TITLES["layer"], row=1, col=1)
    bar = {"title": "effect", "thickness": 12, "outlinewidth": 0}
    fig.update_layout(coloraxis={"colorscale": CHANGE, "cmin": -most, "cmax": most, "colorbar": bar})
    heads = ", the strongest head of each place" if {"kv_head", across} <= set(summary["axes"]) else ""
    if across == "kv_head":
        heads = ""
    caption = f"{_caption(summary)}{heads}. {INTERVALS} are at the pointer."
    fig = finished(fig, sweep_finding(summary), caption, max(240, 17 * n_layers) + 150)
    return wide_enough(fig, len(kinds) * max(len(columns), 12))


def wide_enough(fig: go.Figure, n_labels: int) -> go.Figure:
    """With a width at which upright labels stay apart, where a phone is narrower; a page then scrolls."""
    width = 170 + 16 * n_labels
    return fig.update_layout(width=width) if width > _PHONE else fig


def _curve(summary: Summary, along: str) -> go.Figure:
    """The effect along one axis, keys and values as two curves where they are apart."""
    fig = make_subplots(1, 1)
    for number, kind in enumerate(_kinds(summary)):
        rows = [row for row in summary["rows"] if row.get("kv") == kind and row["effect"] is not None]
        color = METHODS[(1, 0)[number % 2]]
        points = [(row[along], _as_effect(row)) for row in rows]
        add_band(fig, points, color, 1)
        fig.add_scatter(
            x=[x for x, _ in points],
            y=[row["mean"] for _, row in points],
            mode="lines+markers",
            line={"color": color, "width": 2},
            hovertext=[_hover(row, summary) for row in rows],
            hoverinfo="text",
            name=f"{kind}s" if kind else "keys and values",
            showlegend=len(_kinds(summary)) > 1,
        )
    fig.update_yaxes(title="effect (1 as the whole prefix)")
    fig = finished(fig, sweep_finding(summary), f"{_caption(summary)}. Bands are {INTERVALS}.", 380)
    if along == "layer":
        return fig.update_xaxes(title=_TITLES[along])
    labels = token_labels(summary["tokens"])
    fig.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, tickangle=-90)
    return wide_enough(fig, len(labels))


def _bars(summary: Summary) -> go.Figure:
    """The strongest cells, from top to bottom."""
    fig = go.Figure()
    known = [row for row in summary["rows"] if row["effect"] is not None]
    rows = sorted(known, key=lambda row: -abs(row["effect"]))[:_MOST_BARS]
    fig.add_scatter(
        x=[row["effect"] for row in rows],
        y=list(range(len(rows))),
        error_x=bars([_as_effect(row) for row in rows], METHODS[1]),
        mode="markers",
        marker={"color": METHODS[1], "size": 9},
        hovertext=[_hover(row, summary) for row in rows],
        hoverinfo="text",
        showlegend=False,
    )
    ticks = {"tickvals": list(range(len(rows))), "ticktext": [_where(row, summary) for row in rows]}
    fig.update_yaxes(range=[len(rows) - 0.5, -0.5], **ticks)
    fig.update_xaxes(title="effect (1 as the whole prefix)", rangemode="tozero")
    caption = f"{_caption(summary)}. Bars are {INTERVALS}."
    return finished(fig, sweep_finding(summary), caption, 26 * max(3, len(rows)) + 60)


def _caption(summary: Summary) -> str:
    what = {
        "single": "One cell at a time",
        "leave_one_out": "All but one cell",
        "cumulative_up": "Each layer and all below",
        "cumulative_down": "Each layer and all above",
        "attribution": "Estimates from gradients",
    }[summary["mode"]]
    return (
        f"{what} of the {summary['target']} model from the {summary['source']}; effect 0 as unpatched "
        f"({shown(summary['unpatched'])}), 1 as with the whole prefix ({shown(summary['full'])})"
    )


def _kinds(summary: Summary) -> list[str | None]:
    """Key and value where they are apart, else None."""
    return list(dict.fromkeys(row.get("kv") for row in summary["rows"]))


def _is_place(value: Any) -> bool:
    return isinstance(value, int) or value in ("key", "value", "prefix", "query", "postfix")


def _as_effect(row: Row) -> Mapping[str, Any]:
    return {"mean": row["effect"], "low": row["effect_low"], "high": row["effect_high"], "n": row["n"]}


def _where(row: Row, summary: Summary) -> str:
    """As in "layer 12, token 3 'user', value"."""
    parts = []
    for axis in summary["axes"]:
        at = row[axis]
        if at is None:
            continue
        if axis == "position":
            token = "" if row.get("token") is None else f" {row['token']!r}"
            parts.append(f"token {at}{token}")
        else:
            parts.append(str(at) if axis in ("kv", "segment") else f"{axis.replace('kv_', '')} {at}")
    return plain(", ".join(parts) or "everything")


def _hover(row: Row, summary: Summary) -> str:
    effect = "unknown" if row["effect"] is None else shown(row["effect"])
    interval = (
        "" if row["effect_low"] is None else f" [{shown(row['effect_low'])}, {shown(row['effect_high'])}]"
    )
    change = f"{shown(row['difference'])} in {plain(summary['metric'])}"
    return f"{_where(row, summary)}<br>effect {effect}{interval}<br>{change}, n = {row['n']}"


def set_sizes(summary: Summary) -> go.Figure:
    """The effect of the first cells of an order, and of as many random ones."""
    fig = make_subplots(1, 1)
    curve = summary["curve"]
    points = list(zip(curve["sizes"], curve["random"], strict=True))
    add_band(fig, points, COLORS["control"], 1)
    lines = (
        (f"in the order of {summary.get('order', 'attribution')}", curve["greedy"], COLORS["repair"]),
        ("random sets", [row["mean"] for row in curve["random"]], COLORS["control"]),
    )
    for name, effects, color in lines:
        fig.add_scatter(
            x=curve["sizes"],
            y=effects,
            mode="lines+markers",
            line={"color": color, "width": 2},
            hovertext=[
                f"{name}<br>{n} cells: {shown(e)}" for n, e in zip(curve["sizes"], effects, strict=True)
            ],
            hoverinfo="text",
            name=name,
        )
    fig.add_hline(y=summary["share"], line={"color": GRID, "dash": "dash"})
    fig.update_xaxes(type="log", tickvals=curve["sizes"][::2], title="cells patched")
    fig.update_yaxes(title="effect (1 as the whole prefix)")
    wanted = f"{summary['share']:.0%} of what the prefix does"
    title = f"No set in this order does {wanted}"
    if summary["size"] is not None:
        title = f"{summary['size']} of {summary['n_cells']} cells do {wanted}"
    caption = (
        f"Every point was patched exactly. The band holds 95% of {points[0][1]['n_sets']} random orders."
    )
    return finished(fig, plain(title), caption, 360)
