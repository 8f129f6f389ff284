"""A run as a table in the terminal and as one HTML page that needs no network.

    Console().print(results_table(summary))
    write_report("runs/mine", summary, records)

The page holds plotly, every figure that applies and every answer, so that it can be mailed; what
the conditions are is said in words for someone who has not read the paper (arXiv 2606.06667). It
computes no statistic of its own: numbers are the summary's, and per answer the detector's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from emmech import figures
from emmech.chat import visible
from emmech.evaluation.detectors import detector
from emmech.evaluation.statistics import Estimate
from emmech.evaluation.trials import by_trial
from emmech.figures import RESID, Row, Summary, as_estimate, groups_of, headline, metric_rows
from emmech.report_answers import answers_of, answers_part
from emmech.report_page import Html, Note, Page, PageTable, as_text
from emmech.report_words import condition_meanings, idea_of
from emmech.results import Record

INTERVAL = (
    "[ ]: 95% interval; of rates Wilson's at the effective sample size, clustered by question; "
    "of differences a bootstrap over questions."
)
_CHECKS = (
    "restored: how far the patch moved the state of the last prompt token, as it enters the last block, from "
    "the unpatched model's (0) to that of the model the patch comes from (1). visible: the share of patched "
    "tokens that every layer still holds when the answer begins; below 1 only where a sliding window has "
    "passed them. tokens: how many per prompt were patched, on average."
)
_PAPER = Html(
    'Zhao et al. 2026, <a href="https://arxiv.org/abs/2606.06667" rel="noreferrer">arXiv 2606.06667</a>'
)
_RUN = ("kind", "provenance", "versions", "decoding", "batch_size", "questions")


def results_table(summary: Summary) -> Table:
    """Conditions by groups: the metric, the difference to the unpatched model, and n."""
    measured, groups = bool(metric_rows(summary)), groups_of(summary)
    scale = {"rate": "share of answers", "words": "words per answer"}.get(summary["unit"])
    table = Table(
        title=Text(f"{summary['detector']}: {scale or 'no metric, tokens per answer'}"),
        caption=Text(_interval_meaning(summary)) if measured else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("condition", no_wrap=True)
    columns = {"mean": lambda row: row, "difference": _difference, "best trial": lambda row: row.get("best")}
    # A column that no condition fills (differences of a perturbation run) is left out.
    columns = {t: of for t, of in columns.items() if any(map(of, metric_rows(summary)))}
    for group in groups:
        name = "" if group == "all" else f"{group} "
        for title in columns if measured else ("tokens",):
            table.add_column(Text(name + title), justify="right")
    table.add_column("n", justify="right")
    for name, cells in _by_condition(summary):
        shown: list[Any] = []
        for row in cells:
            if not measured:
                shown.append(f"{row['mean_new_tokens']:.1f}")
                continue
            numbers = (of(row) for of in columns.values())
            shown += [_Cell(as_estimate(number)) if number else "" for number in numbers]
        counts = dict.fromkeys(str(row.get("n", row["n_answers"])) for row in cells)
        table.add_row(Text(name), *shown, " / ".join(counts))
    return table


def shares_table(summary: Summary) -> Table:
    """Of a run of grafts, what each part of the chat does to the change from base to finetuned."""
    caption = "Change of the mean. Shares are averages over the orders of grafting and add up to the whole. "
    table = Table(caption=Text(caption + INTERVAL), caption_justify="left", box=SIMPLE_HEAD)
    head, rows = _shares(summary)
    for title in head:
        table.add_column(title)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _shares(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: group, part, its effect alone, when left out, and its share."""
    kinds = ("alone", "left_out", "share")
    rows = [
        [row["group"], row["part"], *(as_estimate(row[kind]).text() if row[kind] else "" for kind in kinds)]
        for row in summary.get("shares", ())
    ]
    return ["group", "part", "grafted alone", "lost when left out", "share"], rows


def write_report(folder: str | Path, summary: Summary, records: Sequence[Record]) -> Path:
    """Write ``report.html`` into ``folder`` and return its path.

    Raises:
        DetectorError: The summary's detector is one that this process does not know.
    """
    page = conditions_page(summary, records)
    return replace(page, answers=answers_part([answers_of(summary, records)])).write(folder)


def conditions_page(summary: Summary, records: Sequence[Record]) -> Page:
    """Everything but the answers."""
    content = [_table(summary), *_shares_part(summary), *_figures(summary, records)]
    return Page(
        figures.finding(summary),
        [*content, *_prompt(summary), *_checks(summary)],
        lead=[*_sentences(summary), idea_of(summary), *summary.get("notes", ())],
        meanings={name: meaning for name, meaning in condition_meanings(summary).items() if meaning},
        provenance={"method": _PAPER} | {name: summary[name] for name in _RUN if name in summary},
    )


@dataclass(frozen=True)
class _Cell:
    """An estimate on one line, or with its interval underneath where the column is narrow."""

    estimate: Estimate

    def __str__(self) -> str:
        return self.estimate.text()

    def __rich_measure__(self, _: Console, options: ConsoleOptions) -> Measurement:
        text = self.estimate.text()
        return Measurement(len(text.partition(" ")[2]), len(text)).with_maximum(options.max_width)

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        text = self.estimate.text()
        if len(text) > options.max_width:
            text = text.replace(" ", "\n", 1)
        yield Text(text, justify="right")


def _interval_meaning(summary: Summary) -> str:
    target = f"difference: to the {'base' if summary['kind'] == 'graft' else 'same model unpatched'}. "
    best = "best trial: the best one of each question. " if _has_best(summary) else ""
    return target + best + INTERVAL


def _has_best(summary: Summary) -> bool:
    return any(row.get("best") for row in summary["conditions"])


def _by_condition(summary: Summary) -> Iterable[tuple[str, list[Row]]]:
    by_name: dict[str, list[Row]] = {}
    for row in summary["conditions"]:
        by_name.setdefault(row["condition"], []).append(row)
    return by_name.items()


def _difference(row: Row) -> Row | None:
    return row.get("versus_finetuned") or row.get("versus_base")


def _table(summary: Summary) -> PageTable:
    """One row per condition and group."""
    measured, several = bool(metric_rows(summary)), len(groups_of(summary)) > 1
    head = ["condition", *(["group"] if several else [])]
    head += ["mean", "95% interval", "difference", "95% interval"] if measured else []
    head += ["best trial", "95% interval"] if _has_best(summary) else []
    head += ["answers", "questions", "tokens per answer"]
    lines = []
    for name, rows in _by_condition(summary):
        for number, row in enumerate(rows):
            cells = [name if number == 0 else "", *([row["group"]] if several else [])]
            if measured:
                cells += [*_mean_and_interval(row), *_mean_and_interval(_difference(row))]
            if _has_best(summary):
                cells += _mean_and_interval(row.get("best"))
            cells += [str(row.get("n", row["n_answers"])), str(row["n_questions"])]
            lines.append([*cells, f"{row['mean_new_tokens']:.1f}"])
    return PageTable(head, lines, "Results", _interval_meaning(summary) if measured else "")


def _shares_part(summary: Summary) -> list[PageTable]:
    """The shares of grafts; nothing in other runs."""
    head, rows = _shares(summary)
    return [PageTable(head, rows, "What each part adds to the change from base to finetuned")] if rows else []


def _mean_and_interval(row: Row | None) -> list[str]:
    if row is None or row.get("mean") is None:
        return ["", ""]
    mean, _, interval = as_estimate(row).text().partition(" ")
    return [mean, interval]


def _sentences(summary: Summary) -> list[Html]:
    """What the title says, with intervals, in sentences; then what the controls did."""
    provenance = summary.get("provenance", {})
    names = [provenance.get(side, {}).get("name", "unknown") for side in ("base", "finetuned")]
    said = [f"Base model: <b>{as_text(names[0])}</b>. Finetuned model: <b>{as_text(names[1])}</b>."]
    pair = headline(summary)
    if pair is not None:
        before, after = pair
        of = figures.quantity(summary, after["group"])
        said.append(
            f"{of[0].upper() + of[1:]} is {as_estimate(before).text()} under "
            f"<b>{as_text(before['condition'])}</b> and {as_estimate(after).text()} under "
            f"<b>{as_text(after['condition'])}</b>"
            + (f", a difference of {as_estimate(d).text()}" if (d := _difference(after)) else "")
            + f" (n = {after['n']} answers to {after['n_questions']} questions; in brackets 95% intervals)."
        )
        controls = [
            f"{as_estimate(row).text()} with {what} there"
            for name, what in (("noise", "noise"), ("shuffled", "the base's contents shuffled"))
            for row in metric_rows(summary)
            if (row["condition"], row["group"]) == (f"control:{name}", after["group"])
            and after["condition"] == "repair:prefix"
        ]
        if controls:
            said.append(
                f"For comparison, it is {' and '.join(controls)}: where these do as much and the "
                "answers still make sense, the effect does not need what the base model had written at "
                "those tokens. Read the answers first: a model that breaks shows no behaviour at all."
            )
    return [Html(sentence) for sentence in said]


def _figures(summary: Summary, records: Sequence[Record]) -> Iterable[go.Figure]:
    by_layer = any(RESID.fullmatch(row["condition"]) for row in summary["conditions"])
    if metric_rows(summary):
        yield figures.layer_curve(summary) if by_layer else figures.condition_bars(summary)
    if trials := by_trial(records, detector(summary["detector"])):
        yield figures.perturbation_strip(summary, trials)
    if summary.get("frontier"):
        yield figures.frontier(summary)
    checks = summary.get("checks", {}).values()
    if not by_layer and any(share is not None for check in checks for share in check["restored"]):
        yield figures.restored_curves(summary)


def _prompt(summary: Summary) -> Iterable[Note]:
    """The first prompt of the run, token by token, each segment in its colour."""
    tokens = summary.get("labelled_prompt")
    if tokens:
        shown = "".join(
            f'<span class="{token["segment"]}" title="{token["segment"]}, position {token["position"]}, '
            f'id {token["id"]}">{as_text(visible(token["text"]))}</span>'
            + ("<br>" if "\n" in token["text"] else "&#8203;")
            for token in tokens
        )
        segments = {"prefix": "before the question", "query": "the question", "postfix": "after it"}
        legend = ", ".join(f'<span class="{name}">{name}</span> {what}' for name, what in segments.items())
        yield Note(
            f'<p class="soft">The first prompt of the run, token by token: {legend}. A blank is a ·.</p>'
            f'<div class="tokens">{shown}</div>',
            "How a prompt is divided",
        )


def _checks(summary: Summary) -> Iterable[PageTable | Note]:
    """The manipulation check: what each number says, and the numbers."""
    same = summary.get("self_patch_identical")
    if same is not None:
        verdict = "the same as" if same else "<b>not the same as</b>"
        yield Note(
            f"<p>Patched with its own keys and values, the model's answers are {verdict} unpatched.</p>"
        )
    rows = [
        (
            name,
            _decimal(check["restored"][-1] if check["restored"] else None),
            _decimal(check["visible"]),
            f"{check['patched_tokens_per_prompt']:.1f}",
        )
        for name, check in summary.get("checks", {}).items()
    ]
    if rows:
        yield PageTable(
            ("condition", "restored", "visible", "tokens"), rows, "Did the patch arrive?", _CHECKS
        )


def _decimal(value: float | int | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
