"""The frontier as a terminal table and a self-contained page."""

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from emmech.evaluation.tradeoff import Interval
from emmech.figures import Summary, frontier_of_methods, methods_finding
from emmech.results import REPORT, replace_text

HEADINGS = (
    "method", "seeds", "off-topic at target", "on-topic there", "against sft", "best EM-F1", "at step",
)  # fmt: skip
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>emmech: {title}</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem;
color-scheme: light dark; }} table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ text-align: left; padding: .3rem .9rem .3rem 0; white-space: nowrap; }}
th {{ border-bottom: 1px solid #8888; }} .soft {{ opacity: .75; font-size: .9rem; max-width: 48rem; }}
</style></head><body>
<h1>{title}</h1>
<table><tr>{headings}</tr>{rows}</table>
<p class="soft">{caption}</p>
{figure}
</body></html>
"""


def frontier_table(summary: Summary) -> Table:
    """Methods by what they spread at the target and at their best."""
    table = Table(
        title=f"{summary['detector']}: off-topic rate at on-topic {summary['target']:g}",
        caption=_caption(summary),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number else "left", no_wrap=number == 0)
    for row in _rows(summary):
        table.add_row(*row)
    return table


def write_frontier(folder: str | Path, summary: Summary) -> Path:
    """Write ``report.html`` into ``folder`` and return its path."""
    figure = frontier_of_methods(summary)
    page = _PAGE.format(
        title=methods_finding(summary),
        headings=_cells("th", HEADINGS),
        rows="".join(f"<tr>{_cells('td', row)}</tr>" for row in _rows(summary)),
        caption=html.escape(_caption(summary)),
        figure=figure.to_html(full_html=False, include_plotlyjs=True, config={"responsive": True}),
    )
    path = Path(folder) / REPORT
    replace_text(path, page)
    return path


def _rows(summary: Summary) -> Iterable[tuple[str, ...]]:
    for method in summary["methods"]:
        reached = f"{method['n_reached']}/{method['n_seeds']}"
        difference = method["difference"]
        yield (
            method["method"],
            str(method["n_seeds"]),
            _interval(method["off_at_target"]),
            f"{method['on_there']:.2f} (reached by {reached})",
            "" if difference is None else _interval(difference),
            _interval(method["best_f1"]),
            str(method["best_step"]),
        )


def _caption(summary: Summary) -> str:
    base = {group: rate["mean"] for group, rate in summary["base"].items()}
    return (
        f"{summary['n_on_topic']} on-topic and {summary['n_off_topic']} off-topic questions per seed and "
        "step; 95% intervals over questions and seeds, the same draws for all methods. Off-topic at target "
        "is the least along training with the on-topic rate at least there, 'against sft' its difference "
        "from that of sft, which is stopping early. The best steps are chosen on these very questions. "
        f"Base: on-topic {base['on-topic']:.2f}, off-topic {base['off-topic']:.2f}."
    )


def _interval(value: Summary) -> str:
    return Interval(**value).text()


def _cells(tag: str, texts: Iterable[Any]) -> str:
    return "".join(f"<{tag}>{html.escape(str(text))}</{tag}>" for text in texts)
