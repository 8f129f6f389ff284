"""What gates do, as terminal tables and self-contained pages.

    Console().print(steering_table(summary))
    write_steering("runs/mine", summary)

Numbers are the summary's; what gates, scales and costs are is said in words for someone who has not read
the paper (arXiv 2606.09068).
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import plotly.graph_objects as go
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from emmech.figures import (
    Row,
    Summary,
    as_estimate,
    dose_response,
    gate_activity,
    gate_tokens,
    overlap_curve,
    readout_curves,
    steering_finding,
    transfer_finding,
    transfer_matrix,
)
from emmech.figures.house import shown
from emmech.report_page import Page, PageTable
from emmech.results import REPORT

ANSWERS = f"answers/{REPORT}"
BASE = "base"
_RUN = ("kind", "gates", "scales", "scale", "on", "parts", "detectors", "provenance", "versions")
_RUN += ("decoding", "batch_size", "questions")
_GATES = {
    "gates": "Small trained maps, one in each attention block. For every token they multiply what each "
    "dimension of each attention head passes on by a number between 0 (shut) and 2 (doubled); 1 changes "
    "nothing. The model they sit in keeps its own weights.",
    "scale": "The dose. The multiplier is 1 + scale × (gate - 1): at 0 the gates are off, 1 is as trained, "
    "-1 is inverted (what was damped is now amplified by as much, and the other way round), and beyond 1 "
    "their effect is exaggerated.",
    "group": "On-topic questions are of the kind that was trained on, off-topic ones are not.",
    "change": "The difference to the same model without gates, on the same questions.",
}
_COSTS = {
    "surprise": "How unlikely the base model, left alone, finds the answers: the mean negative "
    "log-probability of a token, in nats. Its exponential is the perplexity. A model that has been broken "
    "shows no behaviour at all; high surprise, repetition or a changed length give it away.",
    "repetition": "The share of an answer's runs of four words that it has already had; 0 in most good "
    "answers, near 1 where the model is stuck.",
    "KL": "How far the next-token distribution moves from the base model's over given ordinary answers, "
    "which the gates should leave alone; in nats per token, 0 where nothing moves.",
    "lost": "How much log-probability per token these ordinary answers lose against the same model without "
    "gates, in nats; below 0 they have become likelier.",
    "right": "Share of multiple-choice questions whose right choice the model finds the likeliest answer.",
    "[ ]": "A 95% interval: over questions, or over chats for KL and lost. Of rates it is Wilson's, "
    "clustered by question; of differences a bootstrap over questions.",
}


_MEASURES = {
    "deviation": "|gate - 1|",
    "suppressed": "suppressed",
    "amplified": "amplified",
    "work": "work",
}
_PROBE = {
    "|gate - 1|": "How far a gate is from doing nothing, on average over dimensions and layers.",
    "suppressed, amplified": "The share of gates that are further than the threshold below or above 1.",
    "work": "How much of a head's output the gates change: the length of the change over the length of the "
    "output. 0 where they do nothing.",
    "Jaccard": "Of the dimensions that either set of gates suppresses most (a tenth of each layer), the "
    "share that both do; next to what chance gives, for sets that are free to lie anywhere and for sets that "
    "keep their heads.",
    "AUC": "How well a linear probe, fitted to other questions, tells before the answer begins whether it "
    "will show the behaviour; .5 is chance. The probe reads gate logits, or the residual stream.",
}
_PROBE_CAPTION = (
    "Means over tokens, layers and head dimensions; suppressed, amplified: share below and above 1 by more "
    "than {threshold}; work: relative change of head outputs. [ ]: 95% interval over questions."
)


def steering_table(summary: Summary) -> Table:
    """Scales by groups: the behaviour, how the answers read, and the cost on ordinary answers."""
    measured, several = _measured(summary["rows"]), len(_groups(summary["rows"])) > 1
    costs = {row["scale"]: row for row in summary["ordinary"]}
    table = _new_table(f"{summary['detector']} by scale of the gates", _caption(measured))
    for name in ("scale", *(["group"] if several else [])):
        table.add_column(name)
    for name in (*(["rate" if summary["unit"] == "rate" else "mean", "change"] if measured else []),
                 "surprise", "repeats", "words", "KL", "lost"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    before = object()
    for row in summary["rows"]:
        first, before = row["scale"] != before, row["scale"]
        cost = costs.get(row["scale"]) if first else None
        table.add_row(
            _scale(row["scale"]) if first else "",
            *([Text(row["group"])] if several else []),
            *([_cell(row["behaviour"]), _cell(row.get("change"))] if measured else []),
            *(_mean(row[name]) for name in ("surprise", "repetition", "words")),
            *(_mean(cost and cost[name]) for name in ("kl", "lost")),
        )
    return table


def write_steering(folder: str | Path, summary: Summary) -> Path:
    """Write ``report.html`` into ``folder`` and return its path; it links to the answers beside it."""
    return steering_page(summary).write(folder)


def steering_page(summary: Summary) -> Page:
    """What the page of such a run tells."""
    measured = _measured(summary["rows"])
    names = ["behaviour", "change"] if measured else []
    names += ["surprise", "repetition", "words"]
    rows = [
        [_scale(row["scale"]), row["group"], *(_text(row.get(name)) for name in names), _n(row)]
        for row in summary["rows"]
    ]
    heads = [f"{summary['detector']} ({summary['unit']})" if name == "behaviour" else name for name in names]
    costs = [
        [_scale(row["scale"]), _text(row["kl"]), _text(row["lost"]), row["kl"]["n"]]
        for row in summary["ordinary"]
    ]
    solved = [
        [_scale(row["scale"]), _text(row["right"]), _text(row.get("change")), row["right"]["n"]]
        for row in summary["capability"]
    ]
    what = "Behaviour and how the answers read" if measured else "How the answers read"
    return Page(
        steering_finding(summary),
        [
            dose_response(summary),
            PageTable(("scale", "group", *heads, "answers"), rows, what),
            PageTable(("scale", "KL", "lost", "chats"), costs, "Cost on ordinary answers"),
            PageTable(("scale", "right", "change", "questions"), solved, "Capability"),
        ],
        lead=_steering_lead(summary),
        links={"Every answer, side by side": ANSWERS},
        meanings=_GATES | _COSTS,
        provenance={name: summary[name] for name in _RUN if name in summary},
    )


def transfer_table(summary: Summary) -> Table:
    """Gates by models and groups: the behaviour without gates and with, and the cost."""
    rows = _transfer_rows(summary)
    several = len(_groups([row for row, _ in rows])) > 1
    table = _new_table("Behaviour without gates and with them", _caption(True))
    for name in ("gates on model", *(["group"] if several else [])):
        table.add_column(name, no_wrap=True)
    for name in ("scale", "without", "with", "change", "surprise", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row, without in rows:
        pairing = "\n".join(textwrap.wrap(f"{row['source']} on {row['target']}", 16))
        first, before = pairing != before, pairing
        table.add_row(
            Text(pairing if first else ""),
            *([Text(row["group"])] if several else []),
            f"{row['scale']:g}",
            _mean(without and without["behaviour"]),
            _cell(row["behaviour"]),
            _cell(row.get("change")),
            _mean(row["surprise"]),
            _mean(row["ordinary"] and row["ordinary"]["kl"]),
        )
    return table


def write_transfer(folder: str | Path, summary: Summary) -> Path:
    """Write ``report.html`` into ``folder`` and return its path; it links to each cell's own page."""
    return transfer_page(summary).write(folder)


def transfer_page(summary: Summary) -> Page:
    """What the page of such a run tells."""
    heads = ("gates", "model", "group", "scale", "without gates", "with gates", "change", "surprise")
    heads += ("repetition", "KL", "lost", "capability", "answers")
    rows = [
        [
            row["source"],
            row["target"],
            row["group"],
            f"{row['scale']:g}",
            _text(without and without["behaviour"]),
            *(_text(row.get(name)) for name in ("behaviour", "change", "surprise", "repetition")),
            *(_text(row["ordinary"] and row["ordinary"][name]) for name in ("kl", "lost")),
            _text(row["capability"].get("change")),
            _n(row),
        ]
        for row, without in _transfer_rows(summary)
    ]
    pairings = dict.fromkeys((row["source"], row["target"]) for row in summary["cells"])
    return Page(
        transfer_finding(summary),
        [transfer_matrix(summary), PageTable(heads, rows, "Every cell")],
        lead=_transfer_lead(summary),
        links={
            f"{source} on {target}": f"{quote(target, safe='')}/{quote(source, safe='')}/{REPORT}"
            for source, target in pairings
        },
        meanings=_GATES | _COSTS,
        provenance={name: summary[name] for name in _RUN if name in summary},
    )


def probe_table(summary: Summary) -> Table:
    """What the gates do, by part of the chat."""
    table = _new_table("Gates by part of the chat", _PROBE_CAPTION.format(**summary))
    table.add_column("part")
    for name in (*_MEASURES.values(), "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for part, rows in _by_part(summary).items():
        first = rows["deviation"]
        table.add_row(part, *(_cell(rows[name]) for name in _MEASURES), str(first["n_tokens"]))
    return table


def probe_figures(summary: Summary) -> list[go.Figure]:
    """Activity by layer and part, readout, overlap with every other set, and token maps."""
    drawn = [gate_activity(summary["layers"])]
    if summary["readout"]["rows"]:
        drawn.append(readout_curves(summary["readout"]["rows"]))
    drawn += [overlap_curve(one, name) for name, one in summary["overlap"].items()]
    return drawn + [gate_tokens(dialogue) for dialogue in summary["tokens"]]


def write_probe(folder: str | Path, summary: Summary) -> Path:
    """Write ``report.html`` into ``folder`` and return its path; it links to the answers beside it."""
    return probe_page(summary).write(folder)


def probe_page(summary: Summary) -> Page:
    """What the page of such a run tells."""
    parts = [
        [part, *(_text(rows[name]) for name in _MEASURES), rows["deviation"]["n_tokens"]]
        for part, rows in _by_part(summary).items()
    ]
    top = [[row["layer"], row["head"], row["dimension"], f"{row['gate']:.2f}"] for row in summary["top"]]
    shared = [
        [name, _index(one["jaccard"]), _index(one["expected"]), _index(one["free"]["p"], 3),
         _index(one["within_heads"]["mean"]), _index(one["within_heads"]["p"], 3)]
        for name, one in summary["overlap"].items()
    ]  # fmt: skip
    tables = [PageTable(("part", *_MEASURES.values(), "tokens"), parts, "By part of the chat")]
    if shared:
        heads = ("other gates", "Jaccard", "by chance", "p", "by chance within heads", "p within heads")
        tables.append(PageTable(heads, shared, "Suppressed dimensions shared with other gates"))
    tables.append(
        PageTable(("layer", "head", "dimension", "mean gate"), top, "Dimensions furthest from 1, on answers")
    )
    note = summary["readout"]["note"]
    return Page(
        probe_finding(summary),
        [*probe_figures(summary), *tables],
        lead=[
            f"The gates were read on the gated model's own answers ({summary['n_questions']} questions, "
            f"{summary['n_empty']} empty answers left out).",
            *([f"No readout: {note}"] if note else []),
        ],
        links={"Every answer, side by side": ANSWERS},
        meanings=_GATES | _PROBE,
        provenance={name: summary[name] for name in _RUN if name in summary},
    )


def probe_finding(summary: Summary) -> str:
    """Where the gates do most, in words."""
    work = {part: rows["work"] for part, rows in _by_part(summary).items()}
    most, least = (pick(work, key=lambda part: work[part]["mean"]) for pick in (max, min))
    return (
        f"The gates change head outputs most on the {most} ({_text(work[most])} of their size), "
        f"least on the {least} ({_text(work[least])})"
    )


def _by_part(summary: Summary) -> dict[str, dict[str, Row]]:
    """Rows by part of the chat, then measure."""
    found: dict[str, dict[str, Row]] = {}
    for row in summary["parts_of_chat"]:
        found.setdefault(row["part"], {})[row["measure"]] = row
    return found


def _index(value: float | int, digits: int = 2) -> str:
    return f"{value:.{digits}f}"


def _steering_lead(summary: Summary) -> list[str]:
    provenance, on = summary.get("provenance", {}), summary.get("on", BASE)
    names = {side: provenance.get(side, {}).get("name", "unknown") for side in (BASE, "finetuned")}
    model = f"The gates act on the base model {names[BASE]}"
    if on != BASE:
        model = f"The gates act on the finetuned model {names[on]} (base: {names[BASE]})"
    if summary.get("parts"):
        model += f", only at tokens of {', '.join(summary['parts'])}"
    said = [f"{model}. Every question is answered without them and at every scale."]
    if summary.get("off_is_untouched") is not None:
        same = "exactly those" if summary["off_is_untouched"] else "NOT those"
        said.append(f"A check: the answers at scale 0 are {same} of the model without gates.")
    return said + list(summary.get("notes", ()))


def _transfer_lead(summary: Summary) -> list[str]:
    finetunes = [name for name in summary["targets"] if name != BASE]
    said = [
        "Each set of gates was trained on one narrow set of chats. On the base it is asked the questions of "
        f"its own set, as trained and at scale {summary['scale']:g}."
    ]
    if finetunes:
        said.append(
            f"It is then put, at scale {summary['scale']:g}, on models that were finetuned without gates "
            f"({', '.join(finetunes)}): does it take out what they learned elsewhere?"
        )
    return [*said, "Each pairing has a page of its own, with every answer:"]


def _transfer_rows(summary: Summary) -> list[tuple[Row, Row | None]]:
    """Each row with gates, and that of the same model and group without."""
    plain = {(r["source"], r["target"], r["group"]): r for r in summary["cells"] if r["scale"] is None}
    return [
        (row, plain.get((row["source"], row["target"], row["group"])))
        for row in summary["cells"]
        if row["scale"] is not None
    ]


def _new_table(title: str, caption: str) -> Table:
    return Table(
        title=Text(title),
        caption=Text(caption),
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )


def _caption(measured: bool) -> str:
    told = "change: to the same model without gates, [ ]: 95% interval. " if measured else ""
    return (
        f"{told}surprise: nats per token of the answers under the untouched base; repeats: share of runs of "
        "four words already had; KL from the base and lost log-probability: nats per token of ordinary "
        "answers."
    )


def _measured(rows: Sequence[Row]) -> bool:
    return any(row["behaviour"] for row in rows)


def _groups(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["group"] for row in rows))


def _scale(scale: float | int | None) -> str:
    return "none" if scale is None else f"{scale:g}"


def _text(estimate: Row | None) -> str:
    return as_estimate(estimate).text() if estimate else ""


def _cell(estimate: Row | None) -> str:
    """The interval under the mean."""
    return _text(estimate).replace(" ", "\n", 1)


def _mean(estimate: Row | None) -> str:
    return shown(estimate["mean"]) if estimate else ""


def _n(row: Row) -> int | str:
    """Answers that were measured."""
    counts = [row[name]["n"] for name in ("behaviour", "words") if row.get(name)]
    return counts[0] if counts else ""
