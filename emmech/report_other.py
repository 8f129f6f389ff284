"""Pages of runs that have none of their own kind elsewhere: training, sweeps, directions, harness, judges.

page = training_page({"steps": [{"step": 1, "loss": 2.5}], "recipe": {...}})
"""

from typing import Any

from emmech.figures import (
    Summary,
    attribution_scatter,
    direction_curve,
    judge_agreement,
    metric_bars,
    metric_finding,
    search_finding,
    search_map,
    set_sizes,
    sweep_finding,
    sweep_map,
    training_drift,
    training_loss,
)
from emmech.report_page import Page, PageTable
from emmech.report_sweep import blocks_table, cells_table

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
    """The blocks, on a map and in the order of their effect on answers."""
    content = [search_map(summary), blocks_table(summary)]
    return Page(search_finding(summary), content, provenance=_provenance(summary))


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
