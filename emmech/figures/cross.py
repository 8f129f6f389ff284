"""What is left of an effect when another effect's direction is ablated."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emmech.figures.house import (
    COLORS,
    GRID,
    INTERVAL,
    METHODS,
    TEXT,
    Row,
    Summary,
    bars,
    finished,
    folded,
    hover,
    pale,
    plain,
    shown,
)


def cross_matrix(summary: Summary) -> go.Figure:
    """The size of each effect with each direction ablated, one panel per effect.

    Random directions are one grey band from the least to the most that they leave.
    """
    effects = summary["effects"]
    names = [None, *(name for name in _ablated(summary) if not _is_random(summary, name))]
    fig = make_subplots(
        len(effects), 1, shared_xaxes=True, vertical_spacing=min(0.5, 36 / (150 * len(effects))),
        subplot_titles=[plain(effect) for effect in effects],
    )  # fmt: skip
    for panel, effect in enumerate(effects, start=1):
        rows = {row["ablated"]: row for row in summary["rows"] if row["effect"] == effect}
        colors = [COLORS["control"] if name and _is_control(name) else METHODS[1] for name in names]
        fig.add_scatter(
            x=list(range(len(names))),
            y=[rows[name]["size"]["mean"] for name in names],
            error_y=bars([rows[name]["size"] for name in names], TEXT),
            mode="markers",
            marker={
                "size": 10,
                "color": colors,
                "symbol": ["circle-open" if name == effect else "circle" for name in names],
                "line": {"color": colors, "width": 2},
            },
            hovertext=[_cross_hover(rows[name]) for name in names],
            hoverinfo="text",
            name=plain(effect),
            showlegend=False,
            row=panel,
            col=1,
        )
        random = [rows[name]["size"]["mean"] for name in rows if name and _is_random(summary, name)]
        if random:
            shade = {"fillcolor": pale(COLORS["control"], 0.3), "line": {"width": 0}}
            fig.add_hrect(y0=min(random), y1=max(random), **shade, layer="below", row=panel, col=1)
        whole = rows[None]["size"]["mean"]
        fig.add_hline(y=whole, line={"color": TEXT, "dash": "dash"}, row=panel, col=1)
    fig.update_annotations(x=0, xanchor="left")
    fig.update_xaxes(
        tickvals=list(range(len(names))), ticktext=[folded(name or "nothing") for name in names], tickangle=0,
        range=[-0.5, len(names) - 0.5],
    )  # fmt: skip
    fig.update_xaxes(title="ablated direction", row=len(effects), col=1)
    fig.update_yaxes(rangemode="tozero", zeroline=True, zerolinecolor=GRID)
    caption = (
        "Effects in nats per token: how much likelier misaligned answers become against aligned ones. "
        f"{INTERVAL}. Dashed: nothing ablated; grey band: the means that random directions leave; grey "
        "points: unrelated ones; hollow: the effect's own direction. A direction fitted elsewhere was used "
        "where its point lies below the band."
    )
    return finished(fig, cross_finding(summary), caption, 150 * len(effects) + 70)


def cross_finding(summary: Summary) -> str:
    """The direction that takes most out of another's effect, against what random and unrelated ones do.

    Unrelated directions are those with "control" in their name.
    """
    rows = {(row["effect"], row["ablated"]): row for row in summary["rows"]}
    known = [
        row
        for (effect, name), row in rows.items()
        if name not in (None, effect) and not (_is_random(summary, name) or _is_control(name))
        if row["change"]["high"] is not None and row["change"]["high"] < 0
    ]
    if not known:
        return "No direction is known to lower another's effect"

    def controls(effect: str) -> list[float]:
        names = [name for name in _ablated(summary) if _is_random(summary, name) or _is_control(name)]
        return [rows[effect, name]["size"]["mean"] for name in names]

    def beyond(row: Row) -> float:
        """How much further the effect falls than under any control, or at all where there is none."""
        return (
            min(controls(row["effect"]), default=row["size"]["mean"] - row["change"]["mean"])
            - row["size"]["mean"]
        )

    best = max(known, key=beyond)
    if beyond(best) <= 0:
        return "No direction lowers another's effect further than random or unrelated directions do"
    whole, left = (shown(one["size"]["mean"]) for one in (rows[best["effect"], None], best))
    found = (
        f"Without the direction of {plain(best['ablated'])} the effect of {plain(best['effect'])} falls from "
    )
    found += f"{whole} to {left} nats per token"
    least = controls(best["effect"])
    return found + (f", without a random or unrelated one to {shown(min(least))} at least" if least else "")


def _ablated(summary: Summary) -> list[str]:
    """Names of ablated directions in order."""
    return [name for name in dict.fromkeys(row["ablated"] for row in summary["rows"]) if name is not None]


def _is_random(summary: Summary, name: str) -> bool:
    return "random" in summary["directions"].get(name, {})


def _is_control(name: str) -> bool:
    return "control" in name


def _cross_hover(row: Row) -> str:
    left = "" if row.get("left") is None else f"<br>{shown(row['left'])} of the effect left"
    return f"{hover(row['size'], row['effect'])}<br>without {plain(row['ablated'] or 'nothing')}{left}"
