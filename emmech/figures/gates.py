"""Figures of alignment gates in use: the dose, and transfer to other finetunes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emmech.figures.house import (
    DASHES,
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
    pale,
    plain,
    shown,
)
from emmech.figures.patching import metric_axis, quantity

DOSES = {-1.0: "inverted", 0.0: "off", 1.0: "as trained"}
"""The scales that have a name."""
CHANGE = ((0.0, "#67A9CF"), (0.5, "#F2F2F2"), (1.0, "#F1A340"))
"""Blue falls, orange rises; both stay light enough for the dark text on them."""
BASE = "base"
COSTS = {"kl": ("KL", "#009E73"), "lost": ("lost", "#C58900")}
READINGS = {
    "surprise": {"title": "surprise (nats)", "rangemode": "tozero"},
    "repetition": {"title": "repetition", "range": [0, 1]},
}


def dose_response(summary: Summary) -> go.Figure:
    """Behaviour, how the answers read and the cost on ordinary answers, against the scale."""
    rows, scales = summary["rows"], _scales(summary)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    axes = {"behaviour": metric_axis(summary)} | READINGS
    panels = [name for name in axes if any(row[name] for row in rows)]
    heights = [2.0 if name == "behaviour" else 1.2 for name in panels] + [1.3]
    n, height = len(heights), 150 * sum(heights)
    fig = make_subplots(n, 1, shared_xaxes=True, vertical_spacing=min(0.06, 36 / height), row_heights=heights)
    ends = _ends(scales)
    for panel, name in enumerate(panels, start=1):
        for number, group in enumerate(groups):
            look = {"color": METHODS[number % len(METHODS)], "symbol": SYMBOLS[number % len(SYMBOLS)]}
            mine = [row for row in rows if row["group"] == group and row[name]]
            _add_reference(fig, [row[name] for row in mine if row["scale"] is None], group, ends, look, panel)
            dosed = sorted((r for r in mine if r["scale"] is not None), key=lambda row: row["scale"])
            fig.add_scatter(
                x=[row["scale"] for row in dosed],
                y=[row[name]["mean"] for row in dosed],
                error_y=bars([row[name] for row in dosed], pale(look["color"], 0.6)),
                mode="lines+markers",
                marker={"size": 8, "symbol": look["symbol"], "line": {"color": look["color"], "width": 2}},
                line={"color": look["color"], "width": 2},
                hovertext=[_dose_hover(row, name) for row in dosed],
                hoverinfo="text",
                name=plain(group),
                legendgroup=plain(group),
                showlegend=panel == 1 and len(groups) > 1,
                cliponaxis=False,
                row=panel,
                col=1,
            )
        fig.update_yaxes(**axes[name], row=panel, col=1)
    if panels:
        dash = {"color": TEXT, "dash": "dash"}
        fig.add_scatter(x=[None], y=[None], mode="lines", line=dash, name="no gates", row=1, col=1)
    _add_costs(fig, summary["ordinary"], n)
    fig.add_vline(x=0, line={"color": GRID}, row="all", col=1)
    for dose in (-1, 1):
        fig.add_vline(x=dose, line={"color": GRID, "dash": "dot"}, row="all", col=1)
    fig.update_xaxes(range=ends, **_dose_ticks(scales))
    fig.update_xaxes(title="scale of the gates", row=n, col=1)
    caption = (
        f"{INTERVAL}; dashed: the same model without gates. Surprise: nats per token of the answers under "
        "the untouched base. Repetition: share of runs of four words that an answer already had. Cost, on "
        "ordinary answers, in nats per token: KL from the base, and log-probability lost against no gates."
    )
    fig = finished(fig, steering_finding(summary), caption, round(height) + 60)
    beside_costs = fig.layout[f"yaxis{n if n > 1 else ''}"].domain[1]
    return fig.update_layout(legend2={"orientation": "h", "x": 0, "y": beside_costs, "yanchor": "bottom"})


def steering_finding(summary: Summary) -> str:
    """What the gates do to the behaviour, as a title; that nothing is seen, where nothing is.

    Of several scales, inverted and as trained come before the one with the largest change. Two scales
    count as different where their intervals do not meet, a scale and no gates where the interval of the
    paired difference leaves out 0.
    """
    measured = [row for row in summary["rows"] if row["behaviour"]]
    if not measured:
        return f"No metric: the detector {plain(summary['detector'])} measures nothing"
    group = _main_group(row["group"] for row in measured)
    rows = {row["scale"]: row for row in measured if row["group"] == group}
    rate = {scale: shown(row["behaviour"]["mean"]) for scale, row in rows.items()}
    moved = [scale for scale, row in rows.items() if scale is not None and _excludes_0(row.get("change"))]
    what, without = quantity(summary, group), f"{rate[None]} without gates"
    inverted, trained = rows.get(-1), rows.get(1)
    if inverted and trained and summary.get("on", BASE) == BASE and _apart(inverted, trained, "behaviour"):
        found = f"Inverted, the gates take {what} from {rate[1]} at scale 1 to {rate[-1]} ({without})"
        return found + _repetition(rows[None], inverted)
    if moved:
        largest = max(moved, key=lambda scale: abs(rows[scale]["change"]["mean"]))
        dose = next((scale for scale in (-1, 1) if scale in moved), largest)
        how = DOSES[dose].capitalize() if dose in DOSES else f"At scale {dose:g}"
        if dose not in (-1, 1) and len(rows) > 2:
            how += f", the largest change of {len(rows) - 1} scales"
        found = f"{how}, the gates take {what} from {without} to {rate[dose]}"
        return found + _repetition(rows[None], rows[dose])
    scales = [scale for scale in rows if scale is not None]
    if len(scales) == 1:
        return f"At scale {scales[0]:g}, the gates do not visibly change {what}: {rate[scales[0]]}, {without}"
    low, high = (shown(pick(rows[scale]["behaviour"]["mean"] for scale in scales)) for pick in (min, max))
    rates = low if low == high else f"{low} to {high}"
    return (
        f"No scale of the gates visibly changes {what}: {rates} at scales {min(scales):g} to "
        f"{max(scales):g}, {without}"
    )


def transfer_matrix(summary: Summary) -> go.Figure:
    """Sources by targets, the behaviour before and after in each cell, one panel per group."""
    cells, sources, targets = _cells(summary), summary["sources"], summary["targets"]
    groups = list(dict.fromkeys(group for _, _, group in cells))
    names = [folded(name) for name in sources]
    ticks = [f"{BASE}, asked<br>the gates' own" if name == BASE else folded(name) for name in targets]
    row_height = max(56, *(18 * (1 + name.count("<br>")) for name in names))
    height = max(1, len(groups)) * (row_height * len(sources) + 30)
    fig = make_subplots(
        max(1, len(groups)),
        1,
        shared_xaxes=True,
        vertical_spacing=min(0.5, 34 / height),
        subplot_titles=[plain(group) for group in groups] if len(groups) > 1 else None,
    )
    for panel, group in enumerate(groups, start=1):
        grid = [[cells.get((source, target, group)) for target in targets] for source in sources]
        fig.add_heatmap(
            x=list(range(len(targets))),
            y=list(range(len(sources))),
            z=[[None if cell is None else cell["change"] for cell in line] for line in grid],
            text=[[_before_after(cell) for cell in line] for line in grid],
            hovertext=[[cell["hover"] if cell else "" for cell in line] for line in grid],
            texttemplate="%{text}",
            textfont={"size": 13, "color": "#1b1f23"},
            hoverinfo="text",
            hoverongaps=False,
            xgap=3,
            ygap=3,
            coloraxis="coloraxis",
            row=panel,
            col=1,
        )
    fig.update_yaxes(
        tickvals=list(range(len(sources))),
        ticktext=names,
        range=[len(sources) - 0.5, -0.5],
        showgrid=False,
        ticks="",
        title={"text": "gates of", "standoff": 12},
    )
    fig.update_xaxes(
        tickvals=list(range(len(targets))),
        ticktext=ticks,
        range=[-0.5, len(targets) - 0.5],
        showgrid=False,
        tickangle=0,
        ticks="",
    )
    fig.update_xaxes(title="put on", row=max(1, len(groups)), col=1)
    bar = {"title": "change", "thickness": 12, "outlinewidth": 0, "tickvals": [-1, -0.5, 0, 0.5, 1]}
    fig.update_layout(coloraxis={"colorscale": CHANGE, "cmin": -1, "cmax": 1, "colorbar": bar})
    if len(targets) > 3:
        fig.update_layout(width=190 + 92 * len(targets))
    fig.update_annotations(x=0, xanchor="left")
    dose, told = _dose(summary["scale"]), []
    if BASE in targets:
        start = "without gates" if summary["scale"] == 1 else "as trained"
        told.append(f"on the base, asked what these gates learned, {start} → {dose}")
    if set(targets) - {BASE}:
        told.append(
            f"on models finetuned without these gates, each asked what it learned, without gates → {dose}"
        )
    caption = f"Behaviour {'; '.join(told)}. Colour is the change; 95% intervals are at the pointer."
    return finished(fig, transfer_finding(summary), caption, height + 90)


def transfer_finding(summary: Summary) -> str:
    """In how many pairings the gates move a finetune's behaviour, and where most; else their own."""
    cells, scale = _cells(summary), summary["scale"]
    gates = {-1: "Inverted gates", 1: "Gates as trained"}.get(scale, f"Gates at scale {scale:g}")
    main = [
        (source, target, _main_group(g for s, t, g in cells if (s, t) == (source, target)))
        for source, target in dict.fromkeys((s, t) for s, t, _ in cells)
    ]
    pairings = {key: cells[key] for key in main if key[1] != BASE and cells[key]["paired"]}
    own = {key: cells[key] for key in main if key[1] == BASE}
    if not pairings and not own:
        return "Nothing was measured"
    if pairings:
        down, up = (
            [key for key, cell in pairings.items() if _excludes_0(cell["paired"], sign)] for sign in (-1, 1)
        )
        n = f"{len(pairings)} pairing{'s' * (len(pairings) > 1)} with finetunes"
        if not down and not up:
            return f"{gates} do not visibly change the behaviour in any of {n}"
        counts = [f"lower the behaviour in {len(down)}"] if down else []
        if up:
            counts.append(f"raise {'it' if down else 'the behaviour'} in {len(up)}")
        most = max(down or up, key=lambda key: abs(pairings[key]["change"]))
        found = f"{gates} {' and '.join(counts)} of {n}; most {plain(most[0])} on {plain(most[1])}: "
        return found + _change(summary, most, pairings[most])
    key = max(own, key=lambda key: abs(own[key]["change"]))
    which = f"{plain(key[0])} on the base" + (f", the largest change of {len(own)}" if len(own) > 1 else "")
    change = _change(summary, key, own[key])
    if own[key]["apart"]:
        return f"{gates} of {which}: {change}"
    return f"{gates} do not visibly change what they learned ({which}: {change})"


def _scales(summary: Summary) -> list[float | int]:
    return sorted({row["scale"] for row in summary["rows"] if row["scale"] is not None})


def _ends(scales: Sequence[float | int]) -> list[float | int]:
    pad = max(0.15, 0.04 * (scales[-1] - scales[0]))
    return [scales[0] - pad, scales[-1] + pad]


def _dose_ticks(scales: Sequence[float | int]) -> dict[str, Any]:
    """Whole scales and the ends, those with a name in words."""
    wanted = sorted({scale for scale in scales if scale == int(scale)} | {scales[0], scales[-1]})
    texts = [f"{scale:g}" + (f"<br>{DOSES[scale]}" if scale in DOSES else "") for scale in wanted]
    return {"tickvals": wanted, "ticktext": texts, "tickangle": 0}


def _dose_hover(row: Row, name: str) -> str:
    text = hover({**row[name], "group": row["group"]}, f"scale {row['scale']:g}")
    if name == "behaviour" and row.get("change"):
        text += f"<br>change {as_estimate(row['change']).text()}"
    return text


def _add_reference(
    fig: go.Figure,
    ungated: Sequence[Row],
    group: str,
    ends: Sequence[float | int],
    look: Mapping[str, Any],
    panel: int,
) -> None:
    """The ungated model as a dashed line across the panel."""
    for estimate in ungated:
        fig.add_scatter(
            x=list(ends),
            y=[estimate["mean"]] * 2,
            mode="lines",
            line={"color": pale(look["color"], 0.8), "width": 1.5, "dash": "dash"},
            hovertext=[hover({**estimate, "group": group}, "without gates")] * 2,
            hoverinfo="text",
            name=plain(f"{group}, without gates"),
            legendgroup=plain(group),
            showlegend=False,
            row=panel,
            col=1,
        )


def _add_costs(fig: go.Figure, rows: Sequence[Row], panel: int) -> None:
    for number, (key, (name, color)) in enumerate(COSTS.items()):
        fig.add_scatter(
            x=[row["scale"] for row in rows],
            y=[row[key]["mean"] for row in rows],
            error_y=bars([row[key] for row in rows], pale(color, 0.6)),
            mode="lines+markers",
            marker={"size": 8, "symbol": SYMBOLS[number], "line": {"color": color, "width": 2}},
            line={"color": color, "width": 2, "dash": DASHES[number]},
            hovertext=[hover(row[key], f"{name}, scale {row['scale']:g}") for row in rows],
            hoverinfo="text",
            name=name,
            legend="legend2",
            cliponaxis=False,
            row=panel,
            col=1,
        )
    fig.update_yaxes(title="cost (nats)", row=panel, col=1)


def _main_group(groups: Iterable[str]) -> str:
    names = list(groups)
    return "off-topic" if "off-topic" in names else names[0]


def _apart(one: Row, other: Row, name: str) -> bool:
    """Whether two 95% intervals do not meet."""
    a, b = one[name], other[name]
    if not a or not b or None in (a["low"], a["high"], b["low"], b["high"]):
        return False
    return a["high"] < b["low"] or b["high"] < a["low"]


def _excludes_0(change: Row | None, sign: int = 0) -> bool:
    """Whether the interval leaves out 0; asked for a sign, on that side."""
    if change is None or change["low"] is None or change["high"] is None:
        return False
    return (change["low"] > 0 and sign >= 0) or (change["high"] < 0 and sign <= 0)


def _repetition(before: Row, after: Row) -> str:
    """What a title must add where the answers begin to repeat themselves."""
    if not _apart(before, after, "repetition"):
        return ""
    was, now = before["repetition"]["mean"], after["repetition"]["mean"]
    return f", while repetition goes from {shown(was)} to {shown(now)}" if now > was else ""


def _cells(summary: Summary) -> dict[tuple[str, str, str], dict[str, Any]]:
    """By source, target and group what is drawn, where the behaviour was measured before and after."""
    rows = {(r["source"], r["target"], r["group"], r["scale"]): r for r in summary["cells"] if r["behaviour"]}
    scale, cells = summary["scale"], {}
    for source, target, group in dict.fromkeys(key[:3] for key in rows):
        start = 1 if target == BASE and scale != 1 else None
        before, after = (rows.get((source, target, group, at)) for at in (start, scale))
        if before is None or after is None:
            continue
        paired = after.get("change")
        lines = [plain(f"{source} on {target}" + ("" if group == "all" else f", {group}"))]
        for at in dict.fromkeys((None, start, scale)):
            if row := rows.get((source, target, group, at)):
                name = "without gates" if at is None else _dose(at)
                lines.append(f"{name} {hover(row['behaviour'])}")
        if paired:
            lines.append(f"change from no gates {as_estimate(paired).text()}")
        difference = after["behaviour"]["mean"] - before["behaviour"]["mean"]
        cells[source, target, group] = {
            "before": before["behaviour"]["mean"],
            "after": after["behaviour"]["mean"],
            "change": paired["mean"] if start is None and paired else difference,
            "paired": paired,
            "start": "without gates" if start is None else _dose(start),
            "apart": _apart(before, after, "behaviour"),
            "hover": "<br>".join(lines),
        }
    return cells


def _before_after(cell: Mapping[str, Any] | None) -> str:
    return "" if cell is None else f"{shown(cell['before'])}<br>→ {shown(cell['after'])}"


def _change(summary: Summary, key: tuple[str, str, str], cell: Mapping[str, Any]) -> str:
    """As in "off-topic refusal .80 → .05"; on the base with what came before the arrow."""
    source, target, group = key
    detectors = summary.get("detectors", {})
    detector = detectors.get(BASE, {}).get(source, "") if target == BASE else detectors.get(target, "")
    what = " ".join(plain(name) for name in ("" if group == "all" else group, detector) if name)
    start = f" {cell['start']}" if target == BASE else ""
    return f"{what} {shown(cell['before'])}{start} → {shown(cell['after'])}".strip()


def _dose(scale: float | int) -> str:
    return DOSES.get(scale, f"scale {scale:g}")
