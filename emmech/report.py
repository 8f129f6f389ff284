"""A run as a table in the terminal and as one HTML page that needs no network.

    Console().print(results_table(summary))
    write_report("runs/mine", summary, records)

The page holds plotly, every figure that applies and every answer, so that it can be mailed; what
the conditions are is said in words for someone who has not read the paper (arXiv 2606.06667). It
computes no statistic of its own: numbers are the summary's, and per answer the detector's.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from emmech import figures
from emmech.evaluation.detectors import detector
from emmech.evaluation.statistics import Estimate
from emmech.figures import RESID, Row, Summary, as_estimate, groups_of, headline, metric_rows
from emmech.report_page import as_json, as_text, definitions, figure_parts
from emmech.results import REPORT, Record, replace_text

INTERVAL = (
    "[ ]: 95% interval; of rates Wilson's at the effective sample size, clustered by question; "
    "of differences a bootstrap over questions."
)
_PATCHING = (
    "While a transformer reads a prompt it stores a key and a value for each token at each layer, "
    "and the answer is written from these. Patching exchanges some of them, or the states they "
    "are made from, while the prompt is read; then the model answers as usual."
)
_GRAFTING = (
    "Weights act on each token by itself, and tokens meet only where the model attends. So a chat can be "
    "read with the finetuned weights at some tokens and the base's at all others, answer included."
)
_CHANGING = "The prompt is changed before the model reads it; nothing inside the model is touched."
_PLACES = {
    "prefix": "at the prefix (what the chat template writes before the question)",
    "query": "at the question's own tokens",
    "postfix": "at the postfix (what the template writes after the question). They come from a "
    "prompt without the question, so that nothing of the question comes along",
    "postfix-same": "at the postfix, taken from the same question",
    "prompt": "at every token of the prompt",
}
_GRAFTED = {"last": "prompt's last token", "postfix-rest": "postfix without its last token"}
_MEANINGS = {
    "base": "The model before finetuning, left alone.",
    "finetuned": "The model after finetuning, left alone.",
    "control:self": "The finetuned model patched with its own keys and values: nothing may change.",
    "control:noise": "As repair:prefix, but with random numbers of the same size: what breaking the "
    "prefix does by itself.",
    "control:shuffled": "As repair:prefix, but with the base's contents at each other's positions.",
    "control:span": "As repair:query, but at no more tokens than the prefix has.",
}


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
    drawn = [figure_parts(figure) for figure in _figures(summary)]
    specs = [spec for _, spec in drawn]
    parts = {
        "finding": figures.finding(summary),
        "sentences": _sentences(summary),
        "notes": "".join(f"<li>{as_text(note)}</li>" for note in summary.get("notes", ())),
        "table": _table(summary) + _shares_part(summary),
        "interval": as_text(_interval_meaning(summary)) if metric_rows(summary) else "",
        "idea": _idea(summary),
        "meanings": _rows((name, meaning) for name, meaning in condition_meanings(summary)),
        "figures": "".join(block for block, _ in drawn),
        "checks": _checks(summary),
        "provenance": _definitions(summary),
        "data": as_json(_page_data(summary, records) | {"figures": specs}),
        "plotly": get_plotlyjs() if specs else "",
    }
    template = files("emmech").joinpath("report_template.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)
    path = Path(folder) / REPORT
    replace_text(path, page)
    return path


def condition_meanings(summary: Summary) -> list[tuple[str, str]]:
    """Each condition in words; one entry for all layers of a residual run."""
    meanings = {}
    for row in summary["conditions"]:
        name = row["condition"]
        if RESID.fullmatch(name):
            name = re.sub(r"\d+$", "L", name)
        meanings[name] = _meaning(name, summary)
    return list(meanings.items())


def _idea(summary: Summary) -> str:
    """What was done, for someone who has not read the paper."""
    if summary.get("kind") == "graft":
        return _GRAFTING
    return _PATCHING if summary.get("checks") else _CHANGING


def _meaning(name: str, summary: Summary) -> str:
    kind, _, rest = name.partition(":")
    target, source = ("finetuned", "base") if kind == "repair" else ("base", "finetuned")
    if name in _MEANINGS:
        return _MEANINGS[name]
    if rest == "resid-L":
        where = ", ".join(summary.get("segments", ()))
        return (
            f"The {target} model with the residual stream after block L replaced by the {source} "
            f"model's ({where}), and run on from there."
        )
    if kind in ("repair", "induce"):
        place = _PLACES.get(rest, f"at {rest}")
        return f"The {target} model with its keys and values replaced by the {source} model's {place}."
    if kind == "graft":
        where = ", ".join(_GRAFTED.get(part, part) for part in rest.split("+"))
        return f"The finetuned weights at the {where}, and the base's at every other token."
    if kind == "perturb":
        return f"The finetuned model, unpatched, with tokens of the {rest} changed for similar ones."
    if kind == "template":
        return f"The finetuned model, unpatched, with another template text: {rest}."
    return ""


@dataclass(frozen=True)
class _Cell:
    """An estimate on one line, or with its interval underneath where the column is narrow."""

    estimate: Estimate

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


def _table(summary: Summary) -> str:
    """The results as HTML, one row per condition and group."""
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
            cells.append(f"{row['mean_new_tokens']:.1f}")
            kind = ' class="first"' if number == 0 else ""
            lines.append(f"<tr{kind}>{''.join(f'<td>{as_text(c)}</td>' for c in cells)}</tr>")
    header = "".join(f'<th scope="col">{as_text(name)}</th>' for name in head)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _shares_part(summary: Summary) -> str:
    """The shares of grafts as HTML; nothing in other runs."""
    head, rows = _shares(summary)
    if not rows:
        return ""
    header = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        "<h3>What each part adds to the change from base to finetuned</h3>"
        f'<table class="numbers"><thead><tr>{header}</tr></thead><tbody>{_rows(rows)}</tbody></table>'
    )


def _mean_and_interval(row: Row | None) -> list[str]:
    if row is None or row.get("mean") is None:
        return ["", ""]
    mean, _, interval = as_estimate(row).text().partition(" ")
    return [mean, interval]


def _sentences(summary: Summary) -> str:
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
    return "".join(f"<p>{sentence}</p>" for sentence in said)


def _figures(summary: Summary) -> Iterable[go.Figure]:
    by_layer = any(RESID.fullmatch(row["condition"]) for row in summary["conditions"])
    if metric_rows(summary):
        yield figures.layer_curve(summary) if by_layer else figures.condition_bars(summary)
    if summary.get("frontier"):
        yield figures.frontier(summary)
    checks = summary.get("checks", {}).values()
    if not by_layer and any(share is not None for check in checks for share in check["restored"]):
        yield figures.restored_curves(summary)


def _checks(summary: Summary) -> str:
    """The manipulation check: what each number says, and the numbers."""
    checks = summary.get("checks", {})
    same = summary.get("self_patch_identical")
    told = ""
    if same is not None:
        verdict = "the same as" if same else "<b>not the same as</b>"
        told = f"<p>Patched with its own keys and values, the model's answers are {verdict} unpatched.</p>"
    if not checks:
        return told + "<p>Nothing was patched in this run.</p>"
    rows = [
        (
            name,
            _decimal(check["restored"][-1] if check["restored"] else None),
            _decimal(check["visible"]),
            f"{check['patched_tokens_per_prompt']:.1f}",
        )
        for name, check in checks.items()
    ]
    head = ("condition", "restored", "visible", "tokens")
    header = "".join(f'<th scope="col">{name}</th>' for name in head)
    return told + (
        f'<div class="scroll"><table class="numbers"><thead><tr>{header}</tr></thead>'
        f"<tbody>{_rows(rows)}</tbody></table></div>"
    )


def _decimal(value: float | int | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _definitions(summary: Summary) -> str:
    """Everything needed to run it again, as a flat definition list."""
    wanted = ("kind", "provenance", "versions", "decoding", "batch_size", "questions")
    return definitions({name: summary[name] for name in wanted if name in summary})


def _page_data(summary: Summary, records: Sequence[Record]) -> dict[str, Any]:
    """What the page's script shows: tokens, and questions with their answers per condition."""
    measure = detector(summary["detector"])
    questions: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        key = (record["group"], record["question_id"])
        entry = questions.setdefault(
            key, {"id": key[1], "group": key[0], "question": record["question"], "answers": {}}
        )
        answer = [record["response"], measure(record["response"]), _label(record, entry["question"])]
        entry["answers"].setdefault(record["condition"], []).append(answer)
    conditions = list(dict.fromkeys(record["condition"] for record in records))
    pair = headline(summary)
    compared = [row["condition"] for row in pair] if pair else []
    chosen = ["base", "finetuned", *compared] if compared else conditions[:3]
    return {
        "tokens": summary.get("labelled_prompt", []),
        "questions": list(questions.values()),
        "conditions": conditions,
        "groups": list(dict.fromkeys(group for group, _ in questions)),
        "chosen": [name for name in conditions if name in chosen],
        "compared": compared,
        "detector": summary["detector"],
        "unit": summary["unit"],
    }


_FIXED = ("question_id", "question", "group", "condition", "sample", "response", "n_new_tokens", "row")


def _label(record: Record, question: str) -> str:
    """What tells this answer from others to its question: sample, trial, changed wording."""
    extra = [f"{name} {value}" for name, value in record.items() if name not in _FIXED]
    sample = [f"sample {record['sample']}"] if record["sample"] else []
    asked = [f"asked: {record['question']}"] if record["question"] != question else []
    return ", ".join(extra + sample + asked)


def _rows(rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"<tr>{''.join(f'<td>{as_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
