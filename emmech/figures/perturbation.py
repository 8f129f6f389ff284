"""Every trial of a perturbation as a dot: is it one wording, or any change of the tokens?"""

from collections.abc import Sequence

import plotly.graph_objects as go

from emmech.figures.house import (
    COLORS,
    INTERVAL,
    SYMBOLS,
    TEXT,
    Row,
    Summary,
    as_estimate,
    bars,
    finished,
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
    segments = [row["condition"] for row in rows if row["condition"].startswith(_PERTURB)]
    segments = list(dict.fromkeys(segments))
    fig = go.Figure()
    for number, group in enumerate(groups):
        offset = (number - (len(groups) - 1) / 2) * 0.4 / max(1, len(groups) - 1)
        symbol = SYMBOLS[number % len(SYMBOLS)]
        mine = [row for row in trials if row["group"] == group]
        fig.add_scatter(
            x=[row["mean"] for row in mine],
            y=[segments.index(row["condition"]) + offset + _beside(row["trial"]) for row in mine],
            mode="markers",
            marker={"size": 6, "symbol": symbol, "color": pale(COLORS["perturb"], 0.5)},
            hovertext=[
                f"{plain(row['condition'])}, {plain(group)}<br>trial {row['trial']}: "
                f"{as_estimate(row).text()}, n = {row['n']}"
                for row in mine
            ],
            hoverinfo="text",
            name=plain(f"{group}, single trials"),
            showlegend=False,
        )
        means = [row for row in rows if row["group"] == group and row["condition"] in segments]
        fig.add_scatter(
            x=[row["mean"] for row in means],
            y=[segments.index(row["condition"]) + offset for row in means],
            error_x=bars(means, COLORS["perturb"]),
            mode="markers",
            marker={"size": 11, "symbol": symbol, "color": COLORS["perturb"], "line": {"width": 2}},
            hovertext=[f"mean of trials<br>{as_estimate(row).text()}, n = {row['n']}" for row in means],
            hoverinfo="text",
            name=plain(group),
            showlegend=len(groups) > 1,
        )
        side = means[0]["target"] if means else "finetuned"
        untouched = [row for row in rows if (row["condition"], row["group"]) == (side, group)]
        for row in untouched:
            fig.add_vline(
                x=row["mean"], line={"color": COLORS["finetuned"], "dash": ("dash", "dot")[number % 2]}
            )
            fig.add_annotation(
                x=row["mean"], y=-0.55, yanchor="bottom", showarrow=False, font={"color": TEXT, "size": 11},
                text="unperturbed" if group == "all" else f"unperturbed, {plain(group)}",
            )  # fmt: skip
    names = [plain(segment.removeprefix(_PERTURB)) for segment in segments]
    fig.update_yaxes(tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.4, -0.8])
    fig.update_xaxes(**metric_axis(summary))
    caption = (
        f"{INTERVAL}; pale: one trial each, a draw of tokens for every question. Dashed: the same model, "
        "unperturbed."
    )
    return finished(fig, _finding(summary, segments), caption, 90 * max(1, len(segments)) + 70)


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
