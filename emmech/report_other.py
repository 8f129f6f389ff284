"""Pages of runs that have none of their own kind elsewhere: training, sweeps, directions, harness, judges.

page = training_page({"steps": [{"step": 1, "loss": 2.5}], "recipe": {...}})
"""

from typing import Any

from emmech.figures import (
    Summary,
    as_estimate,
    attribution_scatter,
    direction_curve,
    judge_agreement,
    metric_bars,
    metric_finding,
    set_sizes,
    sweep_finding,
    sweep_map,
    training_drift,
    training_loss,
)
from emmech.figures.house import plain, shown
from emmech.report_page import Page, PageTable
from emmech.report_sweep import cells_table

_RUN = ("kind", "metric", "mode", "target", "source", "direction", "n_cells", "detector", "provenance")
_RUN += ("decoding", "versions")


def training_page(summary: Summary) -> Page:
    """Loss and drift by step; ``summary`` is ``run.json`` with ``metrics.jsonl`` as ``steps``."""
    steps = [row for row in summary["steps"] if "loss" in row]
    drawn = [training_loss(steps)]
    if any(name.startswith("drift/") for row in summary["steps"] for name in row):
        drawn.append(training_drift(summary["steps"]))
    objective = summary["recipe"]["objective"]
    weight = f", weight {objective['weight']:g}" if objective.get("weight") else ""
    return Page(
        _title(drawn[0]),
        drawn,
        lead=[f"{objective['name']}{weight}, learning rate {summary['recipe']['learning_rate']:g}."],
        provenance={name: summary[name] for name in summary if name != "steps"},
    )


def sweep_page(summary: Summary) -> Page:
    """The map and the strongest cells, and the minimal set where there is one."""
    return _with_set(summary, [sweep_map(summary), cells_table(summary)])


def attribution_page(summary: Summary) -> Page:
    """The map, exact patches beside it, and the minimal set where there is one."""
    return _with_set(summary, [sweep_map(summary), attribution_scatter(summary), cells_table(summary)])


def _with_set(summary: Summary, content: list[Any]) -> Page:
    minimal = summary.get("minimal")
    content += [set_sizes(minimal)] if minimal else []
    lead = [*([minimal["text"]] if minimal else []), *summary["notes"]]
    return Page(sweep_finding(summary), content, lead, provenance=_provenance(summary))


def minimal_page(summary: Summary) -> Page:
    """The effect by the number of cells."""
    drawn = set_sizes(summary)
    return Page(_title(drawn), [drawn], [summary["text"]], provenance=_provenance(summary))


def search_page(summary: Summary) -> Page:
    """Blocks in the order of their effect on answers."""
    known = [block for block in summary["blocks"] if block["effect"] is not None]
    found = sorted(known, key=lambda block: -abs(block["effect"]))
    places = [name for name in ("layer", "position", "kv_head", "kv") if any(name in one for one in found)]
    rows = [
        [
            *("all" if one.get(name) is None else one[name] for name in places),
            as_estimate(one).text(),
            shown(one["effect"]),
            one["depth"],
        ]
        for one in found
    ]
    detector = plain(summary["detector"])
    before, after = (shown(summary[name]["mean"]) for name in ("unpatched", "full"))
    title = f"No block of the prefix was patched; {detector} {before} unpatched"
    if found:
        where = ", ".join(f"{name} {found[0][name]}" for name in places if found[0].get(name) is not None)
        title = (
            f"{plain(where)} alone does {shown(found[0]['effect'])} of what the prefix does to {detector} "
            f"({before} → {after})"
        )
    table = PageTable((*places, summary["detector"], "effect", "depth"), rows, "Blocks")
    return Page(title, [table], provenance=_provenance(summary))


def direction_page(summary: Summary) -> Page:
    """Length and reliability by block."""
    drawn = direction_curve(summary["rows"], summary["n_questions"])
    about = ("site", "position", "method", "n_questions", "provenance")
    return Page(_title(drawn), [drawn], provenance={name: summary[name] for name in about})


def harness_page(summary: Summary) -> Page:
    """A figure per task and metric, with intervals where the value is a mean over documents."""
    rows = [
        {
            **row,
            "metric": f"{row['task']}, {row['metric']}",
            "unit": None,
            "group": "all",
            "mean": row["value"],
            "low": row.get("low"),
            "high": row.get("high"),
        }
        for row in summary["rows"]
        if row["task"] in summary["shown"]
    ]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    told = {"rows": rows}
    heads = ("task", "metric", "condition", "value", "standard error", "documents")
    cells = [
        [
            *(row["task"], row["metric"], row["condition"], f"{row['value']:.3f}"),
            "" if row["stderr"] is None else f"{row['stderr']:.3f}",
            row["n"],
        ]
        for row in summary["rows"]
    ]
    title = metric_finding(told, metrics[0]) if metrics else "No task was run"
    content = [*(metric_bars(told, name) for name in metrics), PageTable(heads, cells, "Every task")]
    return Page(title, content, summary["notes"], provenance=_provenance(summary))


def agreement_page(summary: Summary) -> Page:
    """How far two judges agree, and the answers on which they differ most."""
    drawn = judge_agreement(summary)
    rows = [
        [
            *(f"{row[value]:.1f}" for value in ("value_a", "value_b")),
            row.get("question") or row.get("question_id", ""),
            row.get("answer", ""),
        ]
        for row in summary["differ_most"]
    ]
    table = PageTable(("a", "b", "question", "answer"), rows, "Where they differ most", look="cards")
    facts = ("a", "b", "n_matched", "n_both", "missing_a", "missing_b", "only_a", "only_b")
    return Page(_title(drawn), [drawn, table], provenance={name: summary[name] for name in facts})


def _title(figure: Any) -> str:
    return figure.layout.title.text.replace("<br>", " ")


def _provenance(summary: Summary) -> dict[str, Any]:
    return {name: summary[name] for name in _RUN if name in summary}
