"""Every trial of a perturbation as a dot: is it one wording, or any change of the tokens?"""

from collections.abc import Sequence

import plotly.graph_objects as go

from emmech.figures.house import (
    COLORS,
    DASHES,
    INTERVAL,
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
from emmech.figures.patching import groups_of, metric_axis, metric_rows, quantity

_PERTURB = "perturb:"


def perturbation_strip(summary: Summary, trials: Sequence[Row]) -> go.Figure:
    """Rates of single trials in pale, their mean with its interval, over the unperturbed model.

    Args:
        summary: Of a perturbation run.
        trials: From ``emmech.evaluation.trials.by_trial``.
    """
    groups, rows = groups_of(summary), metric_rows(summary)
    segments = list(dict.fromkeys(r["condition"] for r in rows if r["condition"].startswith(_PERTURB)))
    side = next((row["target"] for row in rows if row["condition"] in segments), "finetuned")
    kinds = {side: COLORS[side], **dict.fromkeys(segments, COLORS["perturb"])}
    heights = {name: number for number, name in enumerate(kinds)}
    fig = go.Figure()
    for number, group in enumerate(groups):
        offset = (number - (len(groups) - 1) / 2) * 0.4 / max(1, len(groups) - 1)
        symbol = SYMBOLS[number % len(SYMBOLS)]
        mine = [row for row in trials if row["group"] == group]
        fig.add_scatter(
            x=[row["mean"] for row in mine],
            y=[heights[row["condition"]] + offset + _beside(row["trial"]) for row in mine],
            mode="markers",
            marker={"size": 6, "symbol": symbol, "color": pale(COLORS["perturb"], 0.5)},
            hovertext=[hover(row, f"{row['condition']}, trial {row['trial']}") for row in mine],
            hoverinfo="text",
            name=plain(f"{group}, single trials"),
            showlegend=False,
        )
        for name, color in kinds.items():
            means = [row for row in rows if (row["condition"], row["group"]) == (name, group)]
            fig.add_scatter(
                x=[row["mean"] for row in means],
                y=[heights[name] + offset] * len(means),
                error_x=bars(means, color),
                mode="markers",
                marker={"size": 11, "symbol": symbol, "color": color, "line": {"width": 2, "color": color}},
                hovertext=[hover(row, name) for row in means],
                hoverinfo="text",
                name=plain(f"{group}, {name}"),
                showlegend=False,
                cliponaxis=False,
            )
            if name == side:
                for row in means:
                    fig.add_vline(x=row["mean"], line={"color": color, "dash": DASHES[1 + number % 5]})
        if len(groups) > 1:  # a legend entry in a colour that stands for no kind
            mark = {"size": 10, "symbol": symbol, "color": TEXT}
            fig.add_scatter(x=[None], y=[None], mode="markers", marker=mark, name=plain(group))
    names = ["unperturbed", *(plain(segment.removeprefix(_PERTURB)) for segment in segments)]
    fig.update_yaxes(tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.5, -0.5])
    fig.update_xaxes(**metric_axis(summary))
    caption = (
        f"{INTERVAL}; pale: one trial each, a draw of tokens for every question. Lines: the same model, "
        "unperturbed."
    )
    return finished(fig, _finding(summary, segments), caption, 70 * len(names) + 60)


def _beside(trial: int) -> float:
    """A small step up or down, so that equal rates stay apart."""
    return (trial % 5 - 2) * 0.03


def _finding(summary: Summary, segments: Sequence[str]) -> str:
    """The segment whose perturbation changes most, with the rate before and after."""
    groups = groups_of(summary)
    group = "off-topic" if "off-topic" in groups else groups[0]
    rows = {row["condition"]: row for row in metric_rows(summary) if row["group"] == group}
    tried = [segment for segment in segments if segment in rows]
    if not tried:
        return "Nothing was perturbed"
    before = rows.get(rows[tried[0]]["target"])
    if before is None:
        return f"Perturbed tokens: {quantity(summary, group)} {shown(rows[tried[0]]['mean'])}"
    most = max(tried, key=lambda name: abs(rows[name]["mean"] - before["mean"]))
    return (
        f"Perturbing the {plain(most.removeprefix(_PERTURB))} changes most: {quantity(summary, group)} "
        f"{shown(before['mean'])} → {shown(rows[most]['mean'])}"
    )
