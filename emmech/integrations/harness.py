"""Tasks of lm-evaluation-harness under every condition: is general capability kept?

    pair, conditions = with_conditions(load_pair("smollm2", "runs/sft-0/step-24"), ["repair:prefix"])
    run_harness(pair, conditions, ["mmlu"], limit=50, out="runs/mmlu").table()

Tasks, prompts, metrics and standard errors are the harness's own. Beside them each condition is compared
with what it was made from, document by document, as in ``emmech.scorecard``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emmech.errors import DataError
from emmech.integrations import missing
from emmech.integrations.harness_model import ConditionLM
from emmech.integrations.harness_rows import all_rows, harness_table, shown
from emmech.integrations.harness_tasks import Tasks, load_tasks, prepare
from emmech.models.checkpoints import ModelPair
from emmech.piggyback.patching import Condition, refuse_impossible
from emmech.reprs import of_table
from emmech.results import (
    Record,
    RunFolder,
    append_line,
    fingerprint,
    keep_lines,
    read_json,
    read_lines,
    versions,
    write_json,
)
from emmech.scorecard import made_from

try:
    from lm_eval.api.task import Task
    from lm_eval.evaluator import evaluate
except ModuleNotFoundError as error:
    raise missing("lm_eval", "harness") from error

CELLS, HARNESS = "cells.jsonl", "harness.json"


@dataclass(frozen=True)
class HarnessResult:
    """Tasks by conditions."""

    summary: Record

    def frame(self) -> pd.DataFrame:
        """One row per task, metric and condition."""
        return pd.DataFrame(self.summary["rows"])

    def table(self) -> None:
        """Print the tasks that were asked for; a group's own tasks are in ``frame``."""
        from rich.console import Console

        Console().print(harness_table(self.summary))

    def _repr_html_(self) -> str:
        return of_table(harness_table(self.summary))

    @classmethod
    def load(cls, folder: str | Path) -> "HarnessResult":
        """The result in a finished folder."""
        return cls(read_json(Path(folder) / HARNESS))


def run_harness(
    pair: ModelPair,
    conditions: Sequence[Condition],
    tasks: Sequence[str] | Tasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path,
    progress: bool = True,
) -> HarnessResult:
    """Run tasks under every condition.

    Args:
        pair: From ``with_conditions``, like ``conditions``; the first is the unpatched base.
        tasks: The harness's names of tasks, groups and tags, or what ``load_tasks`` made of them.
        limit: Documents per task, the first ones; all by default.
        num_fewshot: As in ``load_tasks``, like ``include_path``.
        seed: Of the random controls, and of sampling where a task samples.
        batch_size: Requests per batch; by free memory by default.
        out: Folder. A stopped run goes on there: a task that is finished under a condition is not
            run again.
        progress: Show progress bars.

    Raises:
        EmmechError: Tasks, conditions or folder are refused, before any work.
    """
    if limit is not None and limit < 1:
        raise DataError("a limit of at least 1", f"limit is {limit}", "Leave it out to take all")
    for condition in conditions:
        refuse_impossible(pair, condition)
    loaded = tasks if isinstance(tasks, Tasks) else load_tasks(tasks, include_path, num_fewshot)
    options = {"batch_size": batch_size, "seed": seed, "progress": progress}
    model = ConditionLM(pair, conditions[0], **options)
    names = [condition.name for condition in conditions]
    arguments = {
        "kind": "harness",
        "tasks": list(loaded.asked),
        "limit": limit,
        "num_fewshot": {name: task.get_config("num_fewshot") for name, task in loaded.tasks.items()},
        "conditions": names,
        "seed": seed,
        "requests": {name: _requests(model, task, limit) for name, task in loaded.tasks.items()},
        "provenance": dict(pair.provenance),
        "versions": versions() | {"lm_eval": version("lm_eval")},
    }
    folder = RunFolder(out, arguments, lines=False).path
    keep_lines(folder / CELLS, lambda _: True)  # what follows a broken line
    cells = {(cell["task"], cell["condition"]): cell for cell in read_lines(folder / CELLS)}
    for name, task in loaded.tasks.items():
        for condition in conditions:
            if (name, condition.name) not in cells:
                cell = _cell(model.under(condition), task, limit)
                append_line(folder / CELLS, cell)
                cells[name, condition.name] = cell
    reference = {condition.name: made_from(condition, names) for condition in conditions}
    rows = all_rows(loaded, cells, reference)
    result = HarnessResult({**arguments, "notes": list(pair.notes), "shown": shown(loaded), "rows": rows})
    write_json(folder / HARNESS, result.summary)
    return result


def _requests(model: ConditionLM, task: Task, limit: int | None) -> str:
    """A fingerprint of everything that the model is asked; raises what asking it would raise."""
    prepare(task)
    task.build_all_requests(
        limit=limit,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        chat_template=model.apply_chat_template,
    )
    model.check(task.instances)
    return fingerprint([[request.doc_id, *request.args] for request in task.instances])


def _cell(model: ConditionLM, task: Task, limit: int | None) -> Record:
    """One task under one condition: the harness's metrics, and what each document got."""
    prepare(task)
    name = task.task_name
    found = evaluate(
        model,
        {"tasks": {name: task}},
        limit=limit,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    return {
        "task": name,
        "condition": model.condition.name,
        "metrics": {key: _plain(value) for key, value in found["results"][name].items()},
        "samples": [
            {
                "id": f"{name}/{sample['doc_id']}",
                "filter": sample["filter"],
                "target": _plain(sample["target"]),
                "responses": _plain(sample["resps"]),
                "values": {metric: _plain(sample[metric]) for metric in sample["metrics"]},
            }
            for sample in found["samples"][name]
        ],
    }


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)
