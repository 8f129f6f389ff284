"""One self-contained HTML page: a finding, what was done, tables, figures, answers, where it comes from.

    Page(finding, [figure, PageTable(("scale", "KL"), rows)]).write("runs/mine")

It needs no network, reads on a phone and in the dark, and can be mailed. A page is a value, so that the
pages of many runs can be put together (``report_overview``).
"""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from emmech.results import REPORT, replace_text

_DRAW = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const places = [...document.querySelectorAll(".plot")];
function draw(place) {
  if (place.dataset.drawn) return;
  place.dataset.drawn = "yes";
  const figure = figures[places.indexOf(place)];
  const options = { responsive: true, displaylogo: false, displayModeBar: false };
  Plotly.newPlot(place, figure.data, figure.layout, options);
}
const seen = new IntersectionObserver(entries => entries.forEach(entry => {
  if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
}), { rootMargin: "600px" });
places.forEach(place => seen.observe(place));
window.addEventListener("beforeprint", () => places.forEach(draw));
"""


class Html(str):
    """Text that is HTML already; all other text on a page is shown as it is."""


@dataclass(frozen=True)
class PageTable:
    """Text only; markup in it is shown as it is."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    caption: str = ""
    closed: bool = False
    """Shown when its title is clicked."""
    look: Literal["", "wrap", "cards"] = ""
    """``wrap``: the last two columns break into lines. ``cards``: all do, and a row is a card on a phone."""


@dataclass(frozen=True)
class Note:
    """HTML under a title."""

    html: str
    title: str = ""


Item = PageTable | Note | go.Figure


@dataclass(frozen=True)
class Page:
    """What is told of a run, before it is HTML."""

    title: str
    """The finding as HTML, as titles of ``emmech.figures`` are."""
    content: Sequence[Item]
    """Figures in house style, whose title and caption become text that wraps. A figure that sets its
    width is drawn no narrower, and scrolls."""
    lead: Sequence[str] = ()
    """Paragraphs below the title, text or ``Html``."""
    meanings: Mapping[str, str] = field(default_factory=dict)
    """Words and what they mean, text."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What is needed to run it again, nested; listed flat."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Relative addresses by what is there."""
    answers: str = ""
    """HTML from ``report_answers``."""

    def write(self, folder: str | Path) -> Path:
        """Write ``report.html`` into ``folder``, which exists, and return its path."""
        specs: list[Mapping[str, Any]] = []
        parts = [f"<h1>{self.title}</h1>", *self.opening(), *blocks(self.content, specs, self.title)]
        if self.meanings:
            parts.append(f"<h2>What the words mean</h2><dl>{_definitions(self.meanings.items())}</dl>")
        parts.append(self.answers)
        if self.provenance:
            facts = f'<dl class="facts">{definitions(self.provenance)}</dl>'
            parts.append(f"<h2>Where this comes from</h2>{facts}")
        path = Path(folder) / REPORT
        replace_text(path, shell(self.title, "\n".join(parts), specs))
        return path

    def opening(self) -> list[str]:
        """The lead and the links as HTML."""
        parts = [f"<p>{as_text(paragraph)}</p>" for paragraph in self.lead]
        if self.links:
            items = (f'<a href="{as_text(to)}">{as_text(name)}</a>' for name, to in self.links.items())
            parts.append(f"<p>{' · '.join(items)}</p>")
        return parts


def write_page(folder: str | Path, title: str, content: Sequence[Any], **more: Any) -> Path:
    """Write a ``Page`` of these fields into ``folder`` and return its path."""
    return Page(title, content, **more).write(folder)


def shell(title: str, body: str, specs: Sequence[Mapping[str, Any]]) -> str:
    """The whole page around ``body``, with the figures and one plotly where there are any."""
    parts = {"title": title, "body": body, "scripts": _scripts(specs)}
    return filled("report_shell.html", parts)


def filled(template: str, parts: Mapping[str, str]) -> str:
    """A file of the package with ``{{name}}`` replaced."""
    text = files("emmech").joinpath(template).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)


def blocks(
    content: Sequence[Item],
    specs: list[Mapping[str, Any]],
    page_title: str = "",
    *,
    fold: bool = False,
) -> list[str]:
    """Content as HTML; what plotly draws of each figure is added to ``specs``.

    With ``fold``, everything with a title but figures is shown when the title is clicked.
    """
    parts = []
    for item in content:
        if isinstance(item, PageTable):
            parts.append(_titled(as_text(item.title), _table(item), fold or item.closed))
        elif isinstance(item, Note):
            parts.append(_titled(item.title, item.html, fold))
        else:
            block, spec = figure_parts(item, page_title)
            parts.append(block)
            specs.append(spec)
    return parts


def figure_parts(figure: go.Figure, page_title: str = "") -> tuple[str, dict[str, Any]]:
    """Title and caption as HTML, which wraps on a narrow screen, and the figure without them.

    A title that is the page's is not repeated.
    """
    spec = json.loads(figure.to_json())
    title = spec["layout"].pop("title")
    heading, caption = (t.replace("<br>", " ") for t in (title["text"], title["subtitle"]["text"]))
    removed = spec["layout"]["margin"]["t"] - (48 if _has_top(figure) else 16)
    spec["layout"]["margin"]["t"] -= removed
    spec["layout"]["height"] -= removed
    width = spec["layout"].pop("width", None)
    wide = "" if width is None else f";min-width:{width:g}px;max-width:none"
    shown = "" if heading == page_title else f"<h3>{heading}</h3>"
    label, height = heading.replace('"', "&quot;"), spec["layout"]["height"]
    return (
        f'<figure>{shown}<div class="scroll"><div class="plot" role="img" aria-label="{label}" '
        f'style="height:{height}px{wide}"></div></div>'
        f"<figcaption>{caption} Values and n appear at the pointer.</figcaption></figure>"
    ), spec


def _has_top(figure: go.Figure) -> bool:
    """Whether a legend or a text stands above the axes."""
    named = [trace for trace in figure.data if trace.showlegend is not False]
    is_legend = len(named) > 1 or any(trace.showlegend for trace in named)
    return is_legend or bool(figure.layout.annotations)


def folded(title: str, inside: str) -> str:
    """HTML that is shown when the title is clicked."""
    return f"<details><summary>{title}</summary>{inside}</details>"


def definitions(facts: Mapping[str, Any]) -> str:
    """Nested facts as the entries of one flat definition list."""
    return _definitions((name, "none" if value is None else value) for name, value in _flat(facts))


def as_text(value: Any) -> str:
    """HTML that shows the value as it is."""
    return value if isinstance(value, Html) else html.escape(str(value))


def as_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in; ASCII, so that any text survives."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")


def _scripts(specs: Sequence[Mapping[str, Any]]) -> str:
    """The figures and one plotly, which draws each when it comes into view; nothing where there is none."""
    if not specs:
        return ""
    data = f'<script type="application/json" id="figures">{as_json(specs)}</script>'
    return f"{data}\n<script>{get_plotlyjs()}</script>\n<script>{_DRAW}</script>"


def _titled(title: str, inside: str, fold: bool) -> str:
    if fold and title:
        return folded(f"<b>{title}</b>", inside)
    return (f"<h2>{title}</h2>" if title else "") + inside


def _table(table: PageTable) -> str:
    head = "".join(f'<th scope="col">{as_text(name)}</th>' for name in table.headings)
    rows = "".join(f"<tr>{''.join(f'<td>{as_text(c)}</td>' for c in row)}</tr>" for row in table.rows)
    caption = f'<p class="soft">{as_text(table.caption)}</p>' if table.caption else ""
    kind = f' class="{table.look}"' if table.look else ""
    body = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll">{body}</div>{caption}'


def _definitions(entries: Iterable[tuple[str, Any]]) -> str:
    return "".join(f"<dt>{as_text(name)}</dt><dd>{as_text(value)}</dd>" for name, value in entries)


def _flat(facts: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name} ")
        else:
            yield f"{before}{name}".replace("_", " "), value
