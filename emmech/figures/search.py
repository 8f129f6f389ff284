"""What a search of generated answers found: the prefix cut into the blocks that were patched."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from emmech.figures.house import Row, Summary, as_estimate, finished, plain, shown
from emmech.figures.sweep import CHANGE, token_labels, wide_enough

PLACES = ("layer", "position", "kv_head", "kv")


def search_finding(summary: Summary) -> str:
    """The block of largest effect as a title."""
    behaviour = plain(summary["behaviour"])
    before, after = (shown(summary[name]["mean"]) for name in ("unpatched", "full"))
    found = strongest(summary)
    if not found:
        return f"No block of the prefix was patched; {behaviour} {before} unpatched"
    return (
        f"{plain(_where(found[0]))} alone does {shown(found[0]['effect'])} of what the prefix does to "
        f"{behaviour} ({before} → {after})"
    )


def strongest(summary: Summary) -> list[Row]:
    """The blocks with an effect, the largest first."""
    known = [block for block in summary["blocks"] if block["effect"] is not None]
    return sorted(known, key=lambda block: -abs(block["effect"]))


def search_map(summary: Summary) -> go.Figure:
    """Layers by prefix tokens; each place has the effect of the smallest block that was patched there."""
    blocks = sorted(strongest(summary), key=lambda block: (block["depth"], abs(block["effect"])))
    n_tokens = len(summary["tokens"])
    n_layers = 1 + max((_span(block["layer"])[-1] for block in blocks), default=0)
    effects: list[list[float | None]] = [[None] * n_tokens for _ in range(n_layers)]
    texts = [[""] * n_tokens for _ in range(n_layers)]
    for block in blocks:  # the deeper ones last, over those that they are parts of
        for layer in _span(block["layer"]):
            for token in _span(block["position"]):
                effects[layer][token] = block["effect"]
                texts[layer][token] = _hover(block, summary)
    fig = go.Figure()
    fig.add_heatmap(
        x=list(range(n_tokens)),
        y=list(range(n_layers)),
        z=effects,
        hovertext=texts,
        hoverinfo="text",
        hoverongaps=False,
        coloraxis="coloraxis",
    )
    most = max((abs(block["effect"]) for block in blocks), default=1) or 1
    bar = {"title": "effect", "thickness": 12, "outlinewidth": 0}
    fig.update_layout(coloraxis={"colorscale": CHANGE, "cmin": -most, "cmax": most, "colorbar": bar})
    labels = token_labels(summary["tokens"])
    fig.update_xaxes(tickvals=list(range(n_tokens)), ticktext=labels, tickangle=-90, showgrid=False)
    fig.update_yaxes(title="layer (block, counted from 0)", showgrid=False)
    before, after = (shown(summary[name]["mean"]) for name in ("unpatched", "full"))
    caption = (
        "Each place has the effect of the smallest block that was patched there, of a key and a value the "
        f"larger; 0 as unpatched ({before}), 1 as with the whole prefix ({after}). Intervals are at the "
        "pointer."
    )
    return wide_enough(
        finished(fig, search_finding(summary), caption, max(240, 17 * n_layers) + 150), n_tokens
    )


def _span(at: Any) -> Sequence[int]:
    """The places of "3-7" or of one number."""
    first, _, last = str(at).partition("-")
    return range(int(first), int(last or first) + 1)


def _where(block: Row) -> str:
    return ", ".join(f"{name} {block[name]}" for name in PLACES if block.get(name) is not None)


def _hover(block: Row, summary: Summary) -> str:
    measured = f"{plain(summary['behaviour'])} {as_estimate(block).text()}"
    return f"{plain(_where(block))}<br>effect {shown(block['effect'])}<br>{measured}"
