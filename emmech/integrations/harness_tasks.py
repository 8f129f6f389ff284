"""Tasks and groups of lm-evaluation-harness by name, loaded with their documents.

    load_tasks(["mmlu"], num_fewshot=5).tasks["mmlu_anatomy"]

Names, prompts and documents are the harness's; what a patched chat model cannot be asked is refused.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emmech.errors import DataError
from emmech.integrations import missing

try:
    from datasets.exceptions import DatasetsError
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    raise missing("lm_eval", "harness") from error

PYTHON_SEED, NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234
"""The harness's own defaults."""


@dataclass(frozen=True)
class Tasks:
    """Tasks and groups of the harness, ready to be run."""

    asked: tuple[str, ...]
    """Names as asked for, of tasks, groups or tags."""
    tasks: Mapping[str, Task]
    groups: Mapping[str, Group]


def load_tasks(
    names: Sequence[str], include_path: str | Path | None = None, num_fewshot: int | None = None
) -> Tasks:
    """The tasks that names stand for, with their documents.

    Args:
        names: The harness's names of tasks, groups and tags.
        include_path: Folder with tasks of your own; one that is named there hides the harness's.
        num_fewshot: Examples per prompt; by default what each task says, and where it says 0 always.

    Raises:
        DataError: A name is unknown, documents cannot be had, or emmech cannot run a task.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise DataError("a folder with tasks", f"'{include_path}' is none", "Correct --include-path")
    manager = _manager(names, include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise DataError(
            "tasks that lm-evaluation-harness knows",
            f"it does not know {', '.join(unknown)}" if unknown else "none are named",
            "List its tasks with `lm_eval ls tasks`; name the folder of your own in --include-path",
        )
    _seed()
    try:
        found = manager.load(list(dict.fromkeys(names)))
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"to load {', '.join(names)}",
            f"it failed ({str(error).splitlines()[0]})",
            "Check the network and the task's dataset_path",
        ) from error
    for task in found["tasks"].values():
        _refuse_unfit(task)
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # 0 is kept, as by the harness
            task.set_config("num_fewshot", num_fewshot or 0)
    return Tasks(tuple(dict.fromkeys(names)), found["tasks"], found.get("groups", {}))


def _manager(names: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """What knows the names: the tasks in the folder, and where they do not do the harness's own.

    Those take some ten seconds to list, because the harness reads a file for each.
    """
    if include_path:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(_is_in(own, name) for name in names):
            return own
    return TaskManager(include_path=include_path)


def _is_in(manager: TaskManager, name: object) -> bool:
    """Whether it knows the name and, of a group, all the names inside."""
    if name not in manager.all_groups:
        return name in manager.all_tasks
    inside = (manager.task_index[str(name)].cfg or {}).get("task")
    return isinstance(inside, list) and all(_is_in(manager, one) for one in inside)


def _refuse_unfit(task: Task) -> None:
    """Raise for a task that a chat model under a patch cannot be asked, or should not."""
    metrics = {one["metric"] for one in task.get_config("metric_list") or () if isinstance(one, dict)}
    problems = {
        "scores texts that answer no question": task.OUTPUT_TYPE == "loglikelihood_rolling"
        or "acc_mutual_info" in metrics,
        "runs code that the model writes": getattr(task, "UNSAFE_CODE", False),
        "needs images or sound": getattr(task, "MULTIMODAL", False),
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise DataError("tasks of questions in text", f"{task.task_name} {found[0]}", "Leave it out")


def _seed() -> None:
    """Seed what tasks may draw from while they make their documents."""
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)


def prepare(task: Task) -> None:
    """Seed what a task draws while it makes its prompts, so that every condition gets the same."""
    _seed()
    task.set_fewshot_seed(FEWSHOT_SEED)
