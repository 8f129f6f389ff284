"""Figures of one training run: how far the prefix moved by layer, and the loss."""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emmech.figures.house import COLORS, METHODS, Row, finished, pale, shown

PARTS = ("key", "value")
MOST_LINES = 8


def training_drift(steps: Sequence[Row]) -> go.Figure:
    """How far each layer's prefix keys and values are from the base's, one line per saved step.

    Args:
        steps: Lines of ``metrics.jsonl``; those with ``drift/LAYER/key`` and ``/value`` are drawn.
    """
    saved = [row for row in steps if any(name.startswith("drift/") for name in row)]
    drawn = saved if len(saved) <= MOST_LINES else _spread(saved)
    layers = _layers(saved[-1]) if saved else []
    fig = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.07)
    for number, row in enumerate(drawn, start=1):
        for panel, part in enumerate(PARTS, start=1):
            values = [row[f"drift/{layer}/{part}"] for layer in layers]
            fig.add_scatter(
                x=layers,
                y=values,
                mode="lines",
                line={"color": pale(METHODS[1], 0.2 + 0.8 * number / len(drawn)), "width": 2},
                hovertext=[
                    f"step {row['step']}, layer {layer}<br>{part} {shown_small(value)}"
                    for layer, value in zip(layers, values, strict=True)
                ],
                hoverinfo="text",
                name=f"step {row['step']}",
                legendgroup=f"step {row['step']}",
                showlegend=panel == 1,
                row=panel,
                col=1,
            )
    for panel, part in enumerate(PARTS, start=1):
        fig.update_yaxes(title=f"{part} drift", rangemode="tozero", row=panel, col=1)
    fig.update_xaxes(title="layer (block, counted from 0)", row=2, col=1)
    caption = (
        "Relative squared deviation of the prefix's keys and values from the base's, 0 as in the base. "
        "Measured on one prefix, which every prompt shares, so without intervals (n = 1 run)."
    )
    return finished(fig, _drift_finding(saved, layers), caption, 420)


def training_loss(steps: Sequence[Row]) -> go.Figure:
    """The loss by step, and what the objective adds to it where it adds something."""
    penalised = [row for row in steps if "penalty" in row]
    fig = make_subplots(1 + bool(penalised), 1, shared_xaxes=True, vertical_spacing=0.08)
    curves = [("loss", steps, COLORS["finetuned"])]
    curves += [("penalty", penalised, COLORS["repair"])] if penalised else []
    for panel, (name, rows, color) in enumerate(curves, start=1):
        fig.add_scatter(
            x=[row["step"] for row in rows],
            y=[row[name] for row in rows],
            mode="lines+markers" if len(rows) < 60 else "lines",
            line={"color": color, "width": 2},
            hovertext=[f"step {row['step']}<br>{name} {shown_small(row[name])}" for row in rows],
            hoverinfo="text",
            name=name,
            showlegend=False,
            row=panel,
            col=1,
        )
        fig.update_yaxes(title=f"{name} (nats)" if name == "loss" else name, row=panel, col=1)
    fig.update_xaxes(title="step", row=len(curves), col=1)
    title = "No step was logged"
    if steps:
        title = f"Loss {shown(steps[0]['loss'])} → {shown(steps[-1]['loss'])} in {steps[-1]['step']} steps"
    caption = "Of each step's own batch, so without intervals (n = 1 run)."
    return finished(fig, title, caption, 200 * len(curves) + 40)


def shown_small(value: float | int) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def _layers(row: Row) -> list[int]:
    return sorted({int(name.split("/")[1]) for name in row if name.startswith("drift/")})


def _spread(rows: Sequence[Row]) -> list[Row]:
    """Some rows over the whole length, the first and last among them."""
    last = len(rows) - 1
    return [rows[round(number * last / (MOST_LINES - 1))] for number in range(MOST_LINES)]


def _drift_finding(saved: Sequence[Row], layers: Sequence[int]) -> str:
    if not saved:
        return "No drift was logged"
    last = saved[-1]
    part, layer = max(
        ((part, layer) for part in PARTS for layer in layers), key=lambda at: last[f"drift/{at[1]}/{at[0]}"]
    )
    most = shown_small(last[f"drift/{layer}/{part}"])
    return f"By step {last['step']} the prefix moved most in the {part}s of layer {layer}: by {most}"
