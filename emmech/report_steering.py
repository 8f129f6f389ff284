"""Steering as terminal tables and self-contained pages: doses of methods, and shared structure.

Console().print(doses_table(summary))
write_doses("runs/mine", summary)
"""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from emmech.figures import (
    Summary,
    as_estimate,
    capability_changes,
    capability_cost,
    cross_finding,
    cross_matrix,
    doses_finding,
    methods_at_cost,
    middle,
    shared_finding,
    shared_matrix,
)
from emmech.figures.house import shown
from emmech.report_page import Page, PageTable
from emmech.results import REPORT

_RUN = (
    "kind",
    "doses",
    "untreated",
    "kl_from",
    "provenance",
    "versions",
    "decoding",
    "batch_size",
    "questions",
)
_WORDS = {
    "method, dose": "What was done to the model, and how strongly. Steering: how many times the direction "
    "was added, or the share that was taken out. Gates and adapter scale: 1 is as trained, 0 off, -1 "
    "inverted. Base prefix K/V: the share of blocks, from the lowest, that read the base's prefix.",
    "change": "The difference to the untreated model, on the same questions.",
    "surprise": "How unlikely the base model, left alone, finds the answers, in nats per token. A model "
    "that has been broken shows no behaviour at all; high surprise or repetition give it away.",
    "KL": "How far the next-token distribution is from the model named, over given ordinary answers, in "
    "nats per token.",
    "lost": "Log-probability per token that ordinary answers lose against the untreated model, in nats.",
    "right": "Share of multiple-choice questions whose right choice the model finds the likeliest answer.",
    "[ ]": "A 95% interval over questions, or over chats for KL and lost.",
}


def direction_table(frame: pd.DataFrame, n_questions: int) -> Table:
    """Length, reliability and p of a direction by block."""
    table = Table(box=SIMPLE_HEAD, title=f"Direction over {n_questions} questions", title_justify="left")
    for name in ("block", "length", "reliability", "p"):
        table.add_column(name, justify="right")
    for row in frame.itertuples():
        p = f"{row.p:.3f}" if row.p >= 0.001 else "<.001"
        table.add_row(str(row.layer), f"{row.length:.2f}", shown(row.reliability), p)
    table.caption = (
        "reliability: cosine between the directions of random halves; p: kinds exchanged at random"
    )
    return table


def doses_table(summary: Summary) -> Table:
    """Methods and doses by groups: the behaviour, how the answers read, and the cost."""
    table = Table(box=SIMPLE_HEAD, title=f"{summary['detector']} by method and dose", title_justify="left")
    for name in ("method", "dose", "group"):
        table.add_column(name)
    for name in (
        "rate" if summary["unit"] == "rate" else "mean",
        "change",
        "surprise",
        "repeats",
        "KL",
        "right",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["rows"]:
        cost, solved = _of(summary, "ordinary", row), _of(summary, "capability", row)
        table.add_row(
            row["method"] or summary["untreated"],
            "" if row["dose"] is None else f"{row['dose']:g}",
            row["group"],
            _text(row["behaviour"]),
            _text(row.get("change")),
            *(_mean(row[name]) for name in ("surprise", "repetition")),
            _mean(cost and cost["kl"]),
            _mean(solved and solved["right"]),
        )
    return table


def write_doses(folder: str | Path, summary: Summary) -> Path:
    """Write ``report.html`` into ``folder`` and return its path; it links to the answers beside it."""
    return doses_page(summary).write(folder)


def doses_page(summary: Summary) -> Page:
    """What the page of such a run tells."""
    rows = [
        [
            row["method"] or summary["untreated"],
            "" if row["dose"] is None else f"{row['dose']:g}",
            row["group"],
            *(_text(row.get(name)) for name in ("behaviour", "change", "surprise", "repetition", "words")),
            *(_text((_of(summary, "ordinary", row) or {}).get(name)) for name in ("kl", "lost")),
            _text((_of(summary, "capability", row) or {}).get("right")),
        ]
        for row in summary["rows"]
    ]
    heads = ("method", "dose", "group", summary["detector"], "change", "surprise", "repetition", "words")
    drawn = [methods_at_cost(summary)]
    if capability_changes(summary):
        drawn.append(capability_cost(summary))
    return Page(
        doses_finding(summary),
        [*drawn, PageTable((*heads, "KL", "lost", "right"), rows, "Every dose")],
        lead=[
            f"The {summary['untreated']} model, treated in several ways and strengths, answers the same "
            f"questions. KL is taken from the {summary['kl_from']} model."
        ],
        links={"Every answer, side by side": quote(f"answers/{REPORT}")},
        meanings=_WORDS,
        provenance={name: summary[name] for name in _RUN if name in summary},
    )


def shared_table(summary: Summary, layer: int | None = None) -> Table:
    """Pairs of shifts in one block: cosine with interval, and what random directions reach."""
    layer = middle(summary) if layer is None else layer
    table = Table(box=SIMPLE_HEAD, title=shared_finding(summary, layer), title_justify="left")
    for name in ("shift", "and"):
        table.add_column(name)
    for name in ("cosine", "null", "beyond"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _pairs(summary, layer):
        table.add_row(*row)
    table.caption = f"block {layer}; null: what 95% of random directions of the model's covariance stay below"
    return table


def write_shared(folder: str | Path, summary: Summary) -> Path:
    """Write ``report.html`` into ``folder`` and return its path."""
    return shared_page(summary).write(folder)


def shared_page(summary: Summary) -> Page:
    """What the page of such a run tells."""
    last = max(row["layer"] for row in summary["rows"])
    layers = dict.fromkeys((middle(summary), last // 4, 3 * last // 4))
    heads = ("shift", "and", "cosine", "null", "beyond")
    content: list[Any] = []
    for layer in layers:
        content.append(shared_matrix(summary, layer))
        content.append(PageTable(heads, _pairs(summary, layer), f"Every pair after block {layer}"))
    return Page(
        shared_finding(summary, middle(summary)),
        content,
        meanings={
            "shift": "How a state moves, on average over questions, from one model or wording to another.",
            "null": "The size of cosine that 95% of random directions with the covariance of the model's own "
            "states stay below; beyond it is a shared direction, not the narrowness of the space.",
        },
        provenance={name: summary[name] for name in ("site", "position", "shifts", "provenance", "versions")},
    )


def cross_table(summary: Summary) -> Table:
    """Effects by ablated directions."""
    table = Table(box=SIMPLE_HEAD, title=cross_finding(summary), title_justify="left")
    for name in ("effect", "ablated"):
        table.add_column(name)
    for name in ("size", "change", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _effects(summary):
        table.add_row(*row)
    return table


def write_cross(folder: str | Path, summary: Summary) -> Path:
    """Write ``report.html`` into ``folder`` and return its path."""
    return cross_page(summary).write(folder)


def cross_page(summary: Summary) -> Page:
    """What the page of such a run tells."""
    heads = ("effect", "ablated", "size", "change", "left")
    return Page(
        cross_finding(summary),
        [cross_matrix(summary), PageTable(heads, _effects(summary), "Every effect")],
        meanings={
            "size": "How much likelier, in nats per token, a misaligned answer becomes against an aligned "
            "one, from the one model or wording to the other.",
            "change": "The difference to the same effect with nothing ablated, question by question.",
            "left": "The share of the effect that is left.",
        },
        provenance={name: summary[name] for name in ("layers", "parts", "directions", "versions")},
    )


def _effects(summary: Summary) -> list[list[str]]:
    return [
        [
            row["effect"],
            row["ablated"] or "nothing",
            _text(row["size"]),
            _text(row.get("change")),
            "" if row.get("left") is None else shown(row["left"]),
        ]
        for row in summary["rows"]
    ]


def _pairs(summary: Summary, layer: int) -> list[list[str]]:
    return [
        [
            row["a"],
            row["b"],
            f"{shown(row['cosine'])} [{shown(row['low'])}, {shown(row['high'])}]",
            shown(row["null"]),
            "yes" if row["beyond_null"] else "no",
        ]
        for row in summary["rows"]
        if row["layer"] == layer
    ]


def _of(summary: Summary, part: str, row: Any) -> Any:
    """The entry of the same method and dose; None where there is none."""
    key = row["method"], row["dose"]
    return next((one for one in summary[part] if (one["method"], one["dose"]) == key), None)


def _text(row: Any) -> str:
    return "" if row is None else as_estimate(row).text()


def _mean(row: Any) -> str:
    return "" if row is None else shown(row["mean"])
