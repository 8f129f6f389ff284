"""What sweeps found, as one self-contained page.

write_sweep("runs/mine", result.to_json())
"""

import html
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from emmech.figures import (
    Row,
    Summary,
    as_estimate,
    attribution_scatter,
    search_finding,
    search_map,
    set_sizes,
    strongest,
    sweep_finding,
    sweep_map,
)
from emmech.figures.house import shown
from emmech.figures.search import PLACES
from emmech.report_page import PageTable, write_page

N_STRONGEST, N_IN_TERMINAL = 15, 8
_RUN = (
    "kind",
    "metric",
    "mode",
    "target",
    "source",
    "n_cells",
    "late_start",
    "provenance",
    "versions",
)
_SEARCHED = (
    *(
        "kind",
        "detector",
        "judge",
        "rubric",
        "rubric_hash",
        "below",
        "bands",
        "stretches",
        "threshold",
        "most",
    ),
    *("decoding", "target", "source", "provenance", "versions"),
)
_CACHE = (
    "While a transformer reads a prompt it stores a key and a value for each token, layer and head, and "
    "what comes later is written from these."
)
_KV = (
    f"{_CACHE} Here the entries of one cell come from the other model; the question and a given answer are "
    "then read as usual, and the answer is scored."
)
_RESID = (
    "After a block, or each of several, the residual stream at some tokens becomes the other model's on the "
    "same text; all that follows from it follows. The given answer is then scored."
)
_MEANINGS = {
    "effect": "What a cell changes as a share of what the other model's whole prefix changes: 0 as "
    "unpatched, 1 as with the whole prefix. Sums over questions are divided, not shares averaged. Cells "
    "need not add up to 1.",
    "margin": "Mean log-probability per token of the aligned answer minus that of the misaligned one, in "
    "nats. Below zero the misaligned answer is likelier.",
    "kl": "How far the first token's distribution is from that of the model the patch comes from, in nats.",
    "kl_base": "How far the first token's distribution is from that of the base model, in nats.",
    "target": "Mean log-probability per token of a given answer, in nats.",
    "prefix": "The tokens that the chat template writes before the question. Its own later activations "
    "stay those of the patched model: an effect is that of what later tokens read.",
    "[ ]": "95% interval over questions; not corrected for looking at many cells.",
}


def write_sweep(folder: str | Path, summary: Summary, minimal: Summary | None = None) -> Path:
    """Write ``report.html`` into ``folder`` and return its path; ``minimal`` is of a ``MinimalSet``."""
    n = len(summary["question_ids"])
    whole = summary["whole"]
    lead = [
        _RESID if summary["kind"] == "sweep-resid" else _KV,
        f"{n} questions; {summary['metric']} is {shown(summary['unpatched'])} unpatched and "
        f"{shown(summary['full'])} with the whole prefix of the {summary['source']} model, a difference of "
        f"{_interval(whole)}. {summary['n_cells']} cells, {summary['seconds']:.0f} s.",
        *([minimal["text"]] if minimal else []),
        *summary["notes"],
    ]
    return write_page(
        folder,
        sweep_finding(summary),
        [sweep_map(summary), cells_table(summary), *([set_sizes(minimal)] if minimal else [])],
        lead=lead,
        meanings=_MEANINGS,
        provenance=_provenance(summary),
    )


def write_attribution(folder: str | Path, summary: Summary, minimal: Summary | None = None) -> Path:
    """Write ``report.html`` into ``folder`` and return its path; ``minimal`` is of a ``MinimalSet``."""
    rank, sums_to = (summary[name] for name in ("spearman", "completeness"))
    how = "one gradient" if summary["steps"] == 1 else f"{summary['steps']} gradients"
    lead = [
        _CACHE,
        f"Each cell's effect is estimated from {how} per question at the {summary['target']} model's prefix "
        f"cache, times the difference to the {summary['source']} model's.",
        f"Rank correlation with exact patches of cells drawn at random: "
        f"{'unknown' if rank is None else shown(rank)}. The attributions sum to "
        f"{'an unknown share' if sums_to is None else shown(sums_to)} of what the whole prefix does. "
        f"{len(summary['question_ids'])} questions, {summary['n_cells']} cells; "
        f"gradients {summary['seconds_gradient']:.0f} s, exact patches {summary['seconds']:.0f} s.",
        *([minimal["text"]] if minimal else []),
        *summary["notes"],
    ]
    return write_page(
        folder,
        sweep_finding(summary),
        [
            sweep_map(summary),
            attribution_scatter(summary),
            cells_table(summary),
            *([set_sizes(minimal)] if minimal else []),
        ],
        lead=lead,
        meanings=_MEANINGS,
        provenance=_provenance(summary),
    )


def write_search(folder: str | Path, summary: Summary) -> Path:
    """Write ``report.html`` into ``folder`` and return its path."""
    lead = [
        _CACHE,
        f"Here blocks of them come from the {summary['source']} model, and the {summary['target']} model "
        f"answers {len(summary['question_ids'])} questions. A block that does at least "
        f"{summary['threshold']:.0%} of what the whole prefix does was split, the strongest first; "
        f"{len(summary['blocks'])} were patched.",
        *summary["notes"],
    ]
    return write_page(
        folder,
        search_finding(summary),
        [search_map(summary), blocks_table(summary)],
        lead=lead,
        meanings={"effect": _MEANINGS["effect"], "[ ]": _MEANINGS["[ ]"]},
        provenance={name: summary[name] for name in _SEARCHED if name in summary},
    )


def blocks_table(summary: Summary) -> PageTable:
    """The blocks that were patched, the one with the largest effect first."""
    found = strongest(summary)
    places = [name for name in PLACES if any(name in one for one in found)]
    rows = [
        [
            *_places(one, places),
            as_estimate(one).text(),
            shown(one["effect"]),
            one["depth"],
        ]
        for one in found
    ]
    return PageTable((*places, summary["behaviour"], "effect", "depth"), rows, "Blocks")


def search_text(summary: Summary) -> str:
    """What was found, as plain text."""
    return html.unescape(search_finding(summary))


def finding_text(summary: Summary) -> str:
    """The title of the page as plain text."""
    return html.unescape(sweep_finding(summary))


def terminal_table(summary: Summary) -> Table:
    """The cells with the largest effect, for the terminal."""
    return _in_terminal(cells_table(summary), finding_text(summary))


def search_table(summary: Summary) -> Table:
    """The blocks with the largest effect, for the terminal."""
    return _in_terminal(blocks_table(summary), search_text(summary))


def _in_terminal(page: PageTable, title: str) -> Table:
    table = Table(title=Text(title), box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in page.headings:
        table.add_column(Text(name), justify="right" if name in ("effect", "exact", "difference") else "left")
    for row in page.rows[:N_IN_TERMINAL]:
        table.add_row(*(Text(str(value)) for value in row))
    return table


def cells_table(summary: Summary) -> PageTable:
    """The cells with the largest effect."""
    known = [row for row in summary["rows"] if row["effect"] is not None]
    rows = sorted(known, key=lambda row: -abs(row["effect"]))[:N_STRONGEST]
    axes = [*summary["axes"], *(["token"] if "position" in summary["axes"] else [])]
    exact = "exact_effect" in rows[0] if rows else False
    return PageTable(
        (*axes, "effect", *(["exact"] if exact else []), "difference", "questions"),
        [
            [*_places(row, axes), _effect(row), *([_exact(row)] if exact else []), _interval(row), row["n"]]
            for row in rows
        ],
        "Strongest cells",
        _MEANINGS["[ ]"],
    )


def _provenance(summary: Summary) -> dict[str, object]:
    return {name: summary[name] for name in _RUN if name in summary}


def _exact(row: Row) -> str:
    return "" if row["exact_effect"] is None else shown(row["exact_effect"])


def _places(row: Row, axes: Sequence[str]) -> list[str]:
    return ["all" if row[axis] is None else str(row[axis]).replace("\n", "⏎") for axis in axes]


def _effect(row: Row) -> str:
    return _interval({"mean": row["effect"], "low": row["effect_low"], "high": row["effect_high"]})


def _interval(row: Row) -> str:
    mean = row.get("mean", row.get("difference"))
    if row["low"] is None:
        return shown(mean)
    return f"{shown(mean)} [{shown(row['low'])}, {shown(row['high'])}]"
