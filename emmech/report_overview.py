"""One page over any set of runs: what each is, what it found, its figures, and every answer with filters.

    runs, skipped = read_runs(["runs"])
    write_overview("summary", runs, skipped)

Figures are drawn when they come into view, so that fifty runs open as quickly as one.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from emmech.report_answers import answers_part
from emmech.report_page import Html, PageTable, as_text, blocks, definitions, folded, shell
from emmech.report_runs import Run, Skipped
from emmech.results import REPORT, Record, replace_text


def write_overview(folder: str | Path, runs: Sequence[Run], skipped: Sequence[Skipped] = ()) -> Path:
    """Write ``report.html`` into ``folder``, which is made, and return its path."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    specs: list[Mapping[str, Any]] = []
    title = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    parts = [f'<h1 id="overview">{title}</h1>', *blocks([_overview(runs), *_skipped(skipped)], specs)]
    lists: list[Record] = []
    for number, run in enumerate(runs):
        shown = [one for one in run.answers if one["questions"]]
        parts.append(_section(run, number, len(lists) if shown else None, specs))
        lists += shown
    parts.append(answers_part(lists))
    replace_text(place / REPORT, shell(title, "\n".join(parts), specs))
    return place / REPORT


def figure_files(runs: Sequence[Run], kind: str) -> dict[str, go.Figure]:
    """Every figure of every run by a file name that ends in ``kind``."""
    found = {}
    for run in runs:
        drawn = [item for item in run.page.content if isinstance(item, go.Figure)]
        slug = re.sub(r"[^\w.-]+", "-", run.name.strip("./")).strip("-")
        for number, figure in enumerate(drawn, start=1):
            found[f"{slug}-{number}.{kind}"] = figure
    return found


def _overview(runs: Sequence[Run]) -> PageTable:
    heads = ("run", "what", "finding", "models", "n", "date", "version")
    rows = [
        [
            Html(f'<a href="#run-{number}">{_breaking(run.name)}</a>'),
            run.what,
            Html(run.page.title),
            Html(_breaking(run.models)),
            *(Html(f'<span class="whole">{as_text(one)}</span>') for one in (run.n, run.date, run.version)),
        ]
        for number, run in enumerate(runs)
    ]
    return PageTable(heads, rows, "Overview", "date: when the result was written.", look="cards")


def _breaking(name: str) -> str:
    """A path as HTML, which may break into lines behind its signs."""
    return re.sub(r"([/_-])", r"\1<wbr>", as_text(name))


def _skipped(skipped: Sequence[Skipped]) -> list[PageTable]:
    rows = [[one.name, one.reason] for one in skipped]
    return [PageTable(("folder", "why"), rows, "Skipped", look="cards")] if rows else []


def _section(run: Run, number: int, answers: int | None, specs: list[Mapping[str, Any]]) -> str:
    """A run's finding, figures, and on demand its tables, words and origin.

    ``answers`` is the number of its first list of answers; None where there is none.
    """
    page = run.page
    version = run.version and f"emmech {run.version}"
    about = " · ".join(map(as_text, filter(None, (run.what, run.models, run.n, run.date, version))))
    links = ['<a href="#overview">overview</a>']
    if answers is not None:
        links.append(f'<a href="#answers" data-run="{answers}">answers</a>')
    content = sorted(page.content, key=lambda item: not isinstance(item, go.Figure))
    parts = [
        f'<section id="run-{number}"><h2>{as_text(run.name)}</h2>',
        f'<p class="soft">{about} · {" · ".join(links)}</p><p><b>{page.title}</b></p>',
        *(f"<p>{as_text(paragraph)}</p>" for paragraph in page.lead),
        *blocks(content, specs, page.title, fold=True),
    ]
    if page.meanings:
        parts.append(folded("What the words mean", f"<dl>{definitions(page.meanings)}</dl>"))
    if page.provenance:
        facts = f'<dl class="facts">{definitions(page.provenance)}</dl>'
        parts.append(folded("Where this comes from", facts))
    return "\n".join((*parts, "</section>"))
