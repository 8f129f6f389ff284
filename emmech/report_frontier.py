"""The frontier as a terminal table and a self-contained page."""

from collections.abc import Iterable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from emmech.evaluation.tradeoff import Interval
from emmech.figures import Summary, frontier_of_methods, methods_finding
from emmech.report_page import Page, PageTable

HEADINGS = ("method", "off-topic", "at on", "against sft", "best EM-F1")


def frontier_table(summary: Summary) -> Table:
    """Methods by what they spread at the target and at their best."""
    table = Table(
        title=f"{summary['detector']}: off-topic rate at on-topic {summary['target']:g}",
        caption=_caption(summary),
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in _rows(summary):
        table.add_row(*row)
    return table


def write_frontier(folder: str | Path, summary: Summary) -> Path:
    """Write ``report.html`` into ``folder`` and return its path."""
    return frontier_page(summary).write(folder)


def frontier_page(summary: Summary) -> Page:
    """What the page of such a run tells."""
    table = PageTable(HEADINGS, list(_rows(summary)), caption=_caption(summary))
    return Page(methods_finding(summary), [table, frontier_of_methods(summary)])


def _rows(summary: Summary) -> Iterable[tuple[str, ...]]:
    for method in summary["methods"]:
        n_short = method["n_seeds"] - method["n_reached"]
        difference = method["difference"]
        yield (
            method["method"],
            _interval(method["off_at_target"]),
            f"{method['on_there']:.2f}" + (f" ({n_short} short)" if n_short else ""),
            "" if difference is None else _interval(difference),
            f"{_interval(method['best_f1'])} @{method['best_step']}",
        )


def _caption(summary: Summary) -> str:
    base = {group: rate["mean"] for group, rate in summary["base"].items()}
    return (
        f"Off-topic: the least along training with an on-topic rate of at least {summary['target']:g}; "
        "'short' counts seeds that stay below it, read at their highest. Against sft: the difference "
        "from stopping sft early in the same way. EM-F1 with the step of its best mean, chosen on these very "
        f"questions. {summary['n_on_topic']} on-topic and {summary['n_off_topic']} off-topic questions, "
        f"{_seeds(summary)} a method; 95% intervals over both, the same draws for all methods. "
        f"Base: on-topic {base['on-topic']:.2f}, off-topic {base['off-topic']:.2f}."
    )


def _seeds(summary: Summary) -> str:
    counts = sorted({method["n_seeds"] for method in summary["methods"]})
    return " or ".join(map(str, counts)) + (" seeds" if counts[-1] > 1 else " seed")


def _interval(value: Summary) -> str:
    return Interval(**value).text()
