"""House style: colours, template, intervals, titles.

One colour per kind of condition in all figures (Okabe and Ito's colour-blind-safe palette, the
orange darkened to show on white), one marker per group of questions. The background is transparent,
the text a grey that reads on white and on black.
"""

import html
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from emmech.evaluation.statistics import Estimate

Summary = Mapping[str, Any]
Row = Mapping[str, Any]
COLORS = {
    "base": "#0072B2",
    "finetuned": "#D55E00",
    "repair": "#009E73",
    "induce": "#CC79A7",
    "control": "#8A8A8A",
    "perturb": "#C58900",
    "graft": "#56B4E9",
}
METHODS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#C58900", "#56B4E9", "#5B5B5B", "#8C564B")
"""One colour per method of finetuning, in the order of the summary."""
SYMBOLS = ("circle", "diamond-open", "square", "triangle-up-open", "cross", "hexagon-open")
"""One per group, in the order of the summary."""
DASHES = ("solid", "dot", "dash", "dashdot", "longdash", "longdashdot")
INTERVAL = "Bars and bands are 95% intervals clustered by question"
TEXT, GRID = "#767676", "rgba(128,128,128,.25)"
HOUSE = go.layout.Template(
    layout={
        "font": {"size": 13, "color": TEXT},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "title": {"x": 0.01, "xanchor": "left", "yref": "container", "y": 1, "yanchor": "top"},
        "title_font_size": 17,
        "title_subtitle_font_size": 12,
        "xaxis": {
            "gridcolor": GRID,
            "zeroline": False,
            "linecolor": GRID,
            "automargin": True,
            "ticklabelstandoff": 8,
        },
        "yaxis": {
            "gridcolor": GRID,
            "zeroline": False,
            "linecolor": GRID,
            "automargin": True,
            "ticklabelstandoff": 8,
        },
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "margin": {"l": 8, "r": 16, "b": 14},
        "hoverlabel": {"align": "left"},
        "modebar": {"orientation": "v", "bgcolor": "rgba(0,0,0,0)"},
    }
)


def as_estimate(row: Row) -> Estimate:
    """An estimate as it was before JSON, which has no nan."""
    mean, low, high = (math.nan if row.get(k) is None else float(row[k]) for k in ("mean", "low", "high"))
    n = row.get("n", 0)
    return Estimate(mean, low, high, row.get("n_clusters", n), n, row.get("n_missing", 0))


def bars(rows: Sequence[Row], color: str) -> dict[str, Any]:
    """Error bars from mean, low and high; none where the interval is unknown."""
    known = [(row["mean"], row["low"], row["high"]) for row in rows]
    return {
        "type": "data",
        "symmetric": False,
        "array": [None if high is None else high - mean for mean, _, high in known],
        "arrayminus": [None if low is None else mean - low for mean, low, _ in known],
        "color": color,
        "thickness": 1.5,
        "width": 0,
    }


def add_band(fig: go.Figure, points: Sequence[tuple[float | int, Row]], color: str, panel: int) -> None:
    """Shade from low to high over ``points`` of x and estimate, leaving out unknown intervals."""
    known = [(x, row) for x, row in points if row["low"] is not None]
    fig.add_scatter(
        x=[x for x, _ in known] + [x for x, _ in reversed(known)],
        y=[row["high"] for _, row in known] + [row["low"] for _, row in reversed(known)],
        fill="toself",
        fillcolor=pale(color, 0.15),
        mode="none",
        hoverinfo="skip",
        showlegend=False,
        row=panel,
        col=1,
    )


def hover(row: Row, name: str = "") -> str:
    """What stands at the pointer: name, group, estimate and n."""
    group = row.get("group", "all")
    head = f"{name}{'' if group == 'all' else ', ' + group}"
    return (plain(head) + "<br>" if name else "") + f"{as_estimate(row).text()}, n = {row['n']}"


def finished(fig: go.Figure, title: str, caption: str, height: int) -> go.Figure:
    """Title and subtitle wrapped, with a margin that holds them and one line of legend."""
    lines, small = (
        textwrap.wrap(text, width, break_on_hyphens=False) for text, width in ((title, 72), (caption, 104))
    )
    top = 56 + 22 * len(lines) + 16 * len(small)
    return fig.update_layout(
        template=HOUSE,
        title={
            "text": "<br>".join(lines),
            "subtitle": {"text": "<br>".join(small)},
            "pad": {"t": 22 if len(lines) > 1 else 10},  # plotly puts the second line where one alone is
        },
        margin_t=top,
        height=height + top,
    )


def pale(color: str, opacity: float) -> str:
    """A ``#rrggbb`` colour, seen through."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def shown(value: float | int) -> str:
    """A number as tables write it, such as ".53"."""
    return as_estimate({"mean": value}).text().split()[0]


def plain(text: str) -> str:
    """Shown as it is: plotly would read < and & as markup."""
    return html.escape(text, quote=False)


def folded(name: str, width: int = 14) -> str:
    """A label on several lines, at blanks, hyphens and the like, else cut."""
    lines = [""]
    for word in re.sub(r"([_/-])", r"\1 ", name).split(" "):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        joint = "" if not lines[-1] or lines[-1][-1] in "-_/" else " "
        lines[-1] += joint + (word if len(word) <= width else word[: width - 1] + "…")
    return "<br>".join(map(plain, lines))
