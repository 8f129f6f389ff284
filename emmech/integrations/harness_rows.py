"""What tasks of lm-evaluation-harness add up to: rows of tasks by conditions, and their table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from emmech.integrations.harness_tasks import Tasks
from emmech.report_evaluation import difference
from emmech.results import Record
from emmech.scorecard import compared

_CAPTION = (
    "value ± standard error: lm-evaluation-harness's. difference: from the same model unpatched, of an "
    "unpatched one from the base, over the same documents, 95% interval; p: sign flips over documents, "
    "Holm's over the conditions of a task and metric."
)


def all_rows(
    loaded: Tasks, cells: Mapping[tuple[str, str], Record], reference: Mapping[str, str]
) -> list[Record]:
    """The rows of every group and task."""
    rows = []
    for name, group in loaded.groups.items():
        if group.has_aggregation:
            inside = [task.task_name for task in group.get_all_tasks()]
            metrics = {
                condition: group.aggregate({task: cells[task, condition]["metrics"] for task in inside})
                for condition in reference
            }
            rows += _rows(name, inside, metrics, cells, reference)
    for name in loaded.tasks:
        metrics = {condition: cells[name, condition]["metrics"] for condition in reference}
        rows += _rows(name, [name], metrics, cells, reference)
    return rows


def _rows(
    name: str,
    inside: Sequence[str],
    metrics: Mapping[str, Mapping[str, Any]],
    cells: Mapping[tuple[str, str], Record],
    reference: Mapping[str, str],
) -> list[Record]:
    """Per metric and condition the harness's value, and the comparison over documents.

    There is none where the value is no mean over documents (F1, a group that weighs its tasks alike).
    """
    rows = []
    first = next(iter(metrics.values()))
    for key in [key for key in first if "," in key and "_stderr," not in key]:
        metric, _, chosen = key.partition(",")
        values = {
            condition: [
                (sample["id"], sample["values"][metric])
                for task in inside
                for sample in cells[task, condition]["samples"]
                if sample["filter"] == chosen and metric in sample["values"]
            ]
            for condition in reference
        }
        own = {
            condition: {"value": found[key], "stderr": _number(found.get(f"{metric}_stderr,{chosen}"))}
            for condition, found in metrics.items()
        }
        shared = {"task": name, "metric": metric if chosen == "none" else key}
        if all(_is_mean(own[condition]["value"], pairs) for condition, pairs in values.items()):
            tests = _tests(metric, values, reference)
        else:
            tests = {condition: {"n": len(pairs)} for condition, pairs in values.items()}
        rows += [shared | {"condition": one} | own[one] | tests[one] for one in reference]
    return rows


def _number(value: Any) -> float | None:
    """None for the harness's "N/A"."""
    return value if isinstance(value, float | int) else None


def _is_mean(value: Any, pairs: Sequence[tuple[str, Any]]) -> bool:
    numbers = [number for _, number in pairs if isinstance(number, float | int)]
    return len(numbers) == len(pairs) > 0 and abs(float(np.mean(numbers)) - value) < 1e-9


def _tests(
    metric: str, values: Mapping[str, Sequence[tuple[str, Any]]], reference: Mapping[str, str]
) -> dict[str, Record]:
    """Per condition the interval, and the comparison with what it was made from."""
    records = [
        ({"condition": condition, "group": "all", "question_id": document}, float(value))
        for condition, pairs in values.items()
        for document, value in pairs
    ]
    unit = "rate" if all(0 <= value <= 1 for _, value in records) else None
    return {
        row["condition"]: {key: row[key] for key in ("n", "low", "high", "versus") if key in row}
        for row in compared(metric, unit, records, reference)
    }


def shown(loaded: Tasks) -> list[str]:
    """The names with numbers of their own; a tag, and a group that has none, by their tasks."""
    own = {name for name, group in loaded.groups.items() if group.has_aggregation} | set(loaded.tasks)
    inside = {
        task.task_name
        for name, group in loaded.groups.items()
        if name in own and name in loaded.asked
        for task in group.get_all_tasks()
    }
    asked = [name for name in loaded.asked if name in own]
    return asked + [name for name in loaded.tasks if name not in inside and name not in asked]


def harness_table(summary: Record) -> Table:
    """One line per task, metric and condition, of the tasks that were asked for."""
    table = Table(
        title=Text("lm-evaluation-harness"), caption=Text(_CAPTION), caption_justify="left",
        box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False,
    )  # fmt: skip
    for name in ("task", "condition", "value", "n", "difference"):
        table.add_column(name, justify="right" if name == "n" else "left")
    before = ""
    for row in [row for name in summary["shown"] for row in summary["rows"] if row["task"] == name]:
        name = f"{row['task']}, {row['metric']}"
        first = name if name != before else ""
        table.add_row(*map(Text, (first, row["condition"], _value(row), str(row["n"]), difference(row))))
        before = name
    return table


def _value(row: Record) -> str:
    """The value and its standard error, where the harness gives one."""
    return f"{row['value']:.3f}" + ("" if row["stderr"] is None else f" ± {row['stderr']:.3f}")
