"""Figures of single chats: a value for each token, by layer or on the text itself."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from emmech.figures.house import TEXT, Row, finished, plain, shown

PARTS = {"prefix": "#1F86C4", "query": "#C58900", "postfix": "#009E73", "response": "#C0609A"}
"""The colour of each part of a chat."""
SIGNED = ((0.0, "#67A9CF"), (0.5, "#F2F2F2"), (1.0, "#F1A340"))
"""Blue is below 0, orange above; all light enough for the dark text on them."""
MAGNITUDE = ((0.0, "#F2F2F2"), (1.0, "#F1A340"))
PER_LINE = 10


def gate_tokens(dialogue: Mapping[str, Any]) -> go.Figure:
    """One dialogue token by token: how far the gates of each layer are from 1."""
    tokens, parts, layers = dialogue["tokens"], dialogue["parts"], dialogue["layers"]
    values = dialogue["values"]
    labels = [
        f'<span style="color:{PARTS.get(part, TEXT)}">{plain(_visible(token))}</span>'
        for token, part in zip(tokens, parts, strict=True)
    ]
    names = [f"“{plain(_visible(token))}” ({plain(part)})" for token, part in zip(tokens, parts, strict=True)]
    fig = go.Figure()
    fig.add_heatmap(
        x=list(range(len(tokens))),
        y=layers,
        z=values,
        hovertext=[
            [f"{name}<br>layer {layer}: {shown(value)}" for name, value in zip(names, line, strict=True)]
            for layer, line in zip(layers, values, strict=True)
        ],
        hoverinfo="text",
        colorscale="Cividis",
        zmin=0,
        colorbar={"thickness": 12, "outlinewidth": 0, "title": "|gate - 1|"},
    )
    for start, end, part in _runs(parts):
        fig.add_annotation(
            x=(start + end) / 2, y=1, yref="paper", yanchor="bottom", showarrow=False, text=plain(part),
            font={"color": PARTS.get(part, TEXT)},
        )  # fmt: skip
        if start:
            fig.add_vline(x=start - 0.5, line={"color": TEXT, "width": 2})
    fig.update_xaxes(
        tickvals=list(range(len(tokens))), ticktext=labels, tickangle=-90, showgrid=False, ticks="",
        tickfont_size=11, ticklabelstandoff=2, range=[-0.5, len(tokens) - 0.5],
    )  # fmt: skip
    fig.update_yaxes(title="layer (block, counted from 0)", showgrid=False, ticks="")
    if len(tokens) > 16:
        fig.update_layout(width=140 + 18 * len(tokens))
    title = "No token was read"
    places = [(row, place) for row in range(len(layers)) for place in range(len(tokens))]
    if places:
        row, place = max(places, key=lambda at: values[at[0]][at[1]])
        far = shown(values[row][place])
        title = f"Gates are furthest from 1 at {names[place]} in layer {layers[row]}: by {far}"
    caption = "One dialogue (n = 1), so no intervals: mean |gate - 1| over a layer's head dimensions."
    return finished(fig, title, caption, max(220, 10 * len(layers)) + 140)


def projections_of(rows: Sequence[Row]) -> dict[str, Any]:
    """One text of ``emmech.steering.projections.token_projections``, as ``token_values`` draws it."""
    layers = sorted({row["layer"] for row in rows})
    lines = [sorted((r for r in rows if r["layer"] == at), key=lambda row: row["position"]) for at in layers]
    first = lines[0] if lines else []
    return {
        "tokens": [row["token"] for row in first],
        "parts": [row["part"] for row in first],
        "layers": layers,
        "values": [[row["projection"] for row in line] for line in lines],
        "quantity": "projection",
        "signed": True,
    }


def token_values(dialogue: Mapping[str, Any], layer: int | None = None) -> go.Figure:
    """One chat as text, each token on a colour that shows its value in one layer.

    Args:
        dialogue: ``tokens``, ``parts``, ``layers`` and ``values`` by layer and token, and what the values are
            in ``quantity``; where ``signed``, blue is below 0 and orange above.
        layer: By default the one with the value furthest from 0.
    """
    tokens, parts, layers = dialogue["tokens"], dialogue["parts"], dialogue["layers"]
    rows = dict(zip(layers, dialogue["values"], strict=True))
    if layer is None:
        layer = max(rows, key=lambda at: max(map(abs, rows[at]), default=0), default=None)
    values = [] if layer is None else rows[layer]
    quantity, signed = dialogue.get("quantity", "|gate - 1|"), dialogue.get("signed", False)
    names = [f"“{plain(_visible(token))}” ({plain(part)})" for token, part in zip(tokens, parts, strict=True)]
    told = [f"{name}<br>{plain(quantity)} {shown(value)}" for name, value in zip(names, values, strict=True)]
    most = max(map(abs, values), default=0) or 1
    fig = go.Figure(
        go.Heatmap(
            z=_lines(values),
            text=_lines([plain(_visible(token)) for token in tokens], ""),
            hovertext=_lines(told, ""),
            texttemplate="%{text}",
            textfont={"size": 12, "color": "#1b1f23"},
            hoverinfo="text",
            hoverongaps=False,
            xgap=2,
            ygap=4,
            colorscale=SIGNED if signed else MAGNITUDE,
            zmin=-most if signed else 0,
            zmax=most,
            colorbar={"thickness": 12, "outlinewidth": 0, "title": plain(quantity)},
        )
    )
    fig.update_xaxes(visible=False)
    fig.update_yaxes(visible=False, autorange="reversed")
    title = "No token was read"
    if values:
        place = max(range(len(values)), key=lambda at: abs(values[at]))
        title = (
            f"{plain(quantity)} is furthest from 0 at {names[place]}: {shown(values[place])}, layer {layer}"
        )
    caption = f"One chat (n = 1), so no intervals: {plain(quantity)} of every token in layer {layer}."
    return finished(fig, title, caption, 34 * max(2, -(-len(tokens) // PER_LINE)) + 40)


def _lines(values: Sequence[Any], nothing: Any = None) -> list[list[Any]]:
    """Cut into lines, the last filled up with ``nothing``."""
    padded = [*values, *[nothing] * (-len(values) % PER_LINE)]
    return [padded[at : at + PER_LINE] for at in range(0, len(padded), PER_LINE)]


def _visible(token: str) -> str:
    """Blanks and breaks as marks, a long token cut."""
    text = token.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
    return text if len(text) <= 16 else text[:15] + "…"


def _runs(parts: Sequence[str]) -> Iterable[tuple[int, int, str]]:
    """First place, last place and name of each stretch of one part."""
    starts = [i for i, part in enumerate(parts) if i == 0 or part != parts[i - 1]]
    for start, end in zip(starts, [*starts[1:], len(parts)], strict=True):
        yield start, end - 1, parts[start]
