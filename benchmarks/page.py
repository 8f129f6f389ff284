"""One page: how a sweep grows, on log axes, and the tables of all ratios."""

from collections.abc import Mapping
from pathlib import Path

import plotly.graph_objects as go

from benchmarks.growth_figure import QUANTITIES, growth
from benchmarks.measure import Row, cells
from emmech.report_page import PageTable, write_page


def write(folder: Path, results: Mapping[str, Row]) -> Path:
    """Write ``report.html`` into ``folder``; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    content: list[PageTable | go.Figure] = []
    if "growth" in results:
        points = [row for row in results["growth"]["rows"] if "axis" in row]
        content = [growth(points, quantity) for quantity in QUANTITIES]
    headings = ("", "ratio", "range", "cpu", "aim", "")
    for name, found in results.items():
        rows = [(row["name"], *cells(row)) for row in found["rows"] if "axis" not in row]
        content.append(PageTable(headings, rows, title=name))
    meanings = {
        "ratio": "The median time of what stands left of the stroke over that of what stands right of it; "
        "they were run in turn.",
        "range": "The least and the largest ratio within one turn; of training steps the quartiles.",
        "cpu": "The same ratio in seconds of all processor cores, which other programs change less.",
        "exponent": "b of y = a x^b, fitted on log axes: 1 is linear, 0 is flat.",
    }
    facts = {name: found["machine"] | found["code"] | found["setting"] for name, found in results.items()}
    return write_page(folder, "Benchmarks", content, meanings=meanings, provenance=shared(facts))


def shared(facts: Mapping[str, Row]) -> Row:
    """Facts that all benchmarks have in common, then by benchmark those that differ."""
    first, *others = facts.values()
    same = {key: value for key, value in first.items() if all(one.get(key) == value for one in others)}
    rest = {name: {k: v for k, v in one.items() if k not in same} for name, one in facts.items()}
    return same | {name: one for name, one in rest.items() if one}
