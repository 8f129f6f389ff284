"""Figures of on-topic against off-topic rate along training."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from emmech.figures.house import (
    COLORS,
    GRID,
    METHODS,
    SYMBOLS,
    Summary,
    bars,
    finished,
    hover,
    pale,
    plain,
    shown,
)
from emmech.figures.patching import metric_axis, role


def frontier(summary: Summary) -> go.Figure:
    """On-topic against off-topic along training, plain and with the base's prefix patched in."""
    fig = go.Figure()
    points = summary["frontier"]
    axis = metric_axis(summary)
    end = max([1.0, *(p[g]["mean"] for p in points for g in ("on_topic", "off_topic"))])
    end = 1 if summary["unit"] == "rate" else end
    fig.add_scatter(
        x=[0, end], y=[0, end], mode="lines", hoverinfo="skip", showlegend=False, name="diagonal",
        line={"color": GRID, "dash": "dot"},
    )  # fmt: skip
    names = {"finetuned": "finetuned, stopped at a step", "repair:prefix": "base prefix patched in"}
    for condition, name in names.items():
        line = [point for point in points if point["condition"] == condition]
        on, off = ([point[group] for point in line] for group in ("on_topic", "off_topic"))
        kind = role(condition)
        faint = pale(COLORS[kind], 0.35)
        fig.add_scatter(
            x=[point["mean"] for point in on],
            y=[point["mean"] for point in off],
            error_x=bars(on, faint),
            error_y=bars(off, faint),
            text=_step_labels(line),
            textposition="top left" if kind == "finetuned" else "middle right",
            mode="lines+markers+text",
            marker={"size": 9, "symbol": "circle" if kind == "finetuned" else "square"},
            line={"color": COLORS[kind], "width": 2},
            hovertext=[
                f"{name}<br>step {point['step']}<br>on-topic {hover(point['on_topic'])}"
                f"<br>off-topic {hover(point['off_topic'])}"
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
    return finished(fig, _frontier_finding(summary), caption, 560)


def frontier_of_methods(summary: Summary) -> go.Figure:
    """On-topic against off-topic rate along training, one line per method, its seeds as faint dots."""
    fig = go.Figure()
    detector, target = plain(summary["detector"]), summary["target"]
    fig.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", hoverinfo="skip", showlegend=False, name="diagonal",
        line={"color": GRID, "dash": "dot"},
    )  # fmt: skip
    fig.add_vline(x=target, line={"color": GRID, "dash": "dash"})
    for i, method in enumerate(summary["methods"]):
        color, points = METHODS[i % len(METHODS)], method["points"]
        patched = method["method"].endswith("prefix patch")
        seeds = [pair for point in points for pair in point["by_seed"]]
        fig.add_scatter(
            x=[on for on, _ in seeds], y=[off for _, off in seeds], mode="markers", hoverinfo="skip",
            marker={"size": 5, "color": pale(color, 0.3)}, showlegend=False, legendgroup=method["method"],
            name=f"{method['method']}, by seed",
        )  # fmt: skip
        on, off = ([point[group] for point in points] for group in ("on_topic", "off_topic"))
        fig.add_scatter(
            x=[rate["mean"] for rate in on],
            y=[rate["mean"] for rate in off],
            error_y=bars(off, pale(color, 0.35)),
            mode="lines+markers",
            marker={"size": 9, "symbol": "square-open" if patched else SYMBOLS[i % len(SYMBOLS)]},
            line={"color": color, "width": 2, "dash": "dot" if patched else "solid"},
            hovertext=[
                f"{method['method']}, step {point['step']}<br>on-topic {hover(point['on_topic'])}"
                f"<br>off-topic {hover(point['off_topic'])}"
                for point in points
            ],
            hoverinfo="text",
            legendgroup=method["method"],
            name=f"{method['method']} ({method['n_seeds']} seed{'s' * (method['n_seeds'] > 1)})",
            cliponaxis=False,
        )
    rate_axis = {"range": [-0.02, 1.02], "constrain": "domain"}
    fig.update_xaxes(title=f"on-topic {detector} (rate)", **rate_axis)
    fig.update_yaxes(title=f"off-topic {detector} (rate)", scaleanchor="x", **rate_axis)
    caption = (
        f"n = {summary['n_on_topic']} on-topic and {summary['n_off_topic']} off-topic questions per seed and "
        "step. Bars are 95% intervals over questions and seeds; each line runs through the saved steps. "
        "A method is better than stopping early where its line lies below that of sft."
    )
    return finished(fig, methods_finding(summary), caption, 620)


def methods_finding(summary: Summary) -> str:
    """Which method spreads least at the target on-topic rate, and how that compares with sft."""
    reached = [m for m in summary["methods"] if m["n_reached"] == m["n_seeds"]]
    name, target = plain(summary["detector"]), shown(summary["target"])
    if not reached:
        return f"No method reaches on-topic {name} {target} with every seed"
    best = min(reached, key=lambda method: method["off_at_target"]["mean"])
    found = f"At on-topic {name} {target}, {plain(best['method'])} spreads least: off-topic "
    found += shown(best["off_at_target"]["mean"])
    gap = best["difference"]
    if gap is None:
        return found + "; nothing beats stopping early"
    sure = "" if gap["high"] < 0 else ", which this sample does not tell from none"
    return f"{found}, {shown(-gap['mean'])} below early stopping{sure}"


def early_stopping(points: Sequence[Mapping[str, Any]], on_topic: float | int) -> float | None:
    """Off-topic rate on the plain line where it first reaches ``on_topic``; None where it never does."""
    line = [
        (point["on_topic"]["mean"], point["off_topic"]["mean"])
        for point in sorted(points, key=lambda point: point["step"])
        if point["condition"] == "finetuned"
    ]
    for (x0, y0), (x1, y1) in pairwise(line):
        if min(x0, x1) <= on_topic <= max(x0, x1):
            return y0 if x0 == x1 else y0 + (y1 - y0) * (on_topic - x0) / (x1 - x0)
    return None


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
    name = plain(summary["detector"])
    found = f"Prefix patched at step {last['step']}: off-topic {name} {shown(off)} at on-topic {shown(on)}"
    alone = early_stopping(points, on)
    return found if alone is None else f"{found}; early stopping alone: about {shown(alone)}"
