"""The five-minute demonstration: train a narrow organism, run the Piggyback test, show the frontier.

A chat model of 135M parameters is finetuned to refuse health questions. It then also refuses
questions that have nothing to do with health, and less so when it attends to the base model's K and
V at the template prefix. The frontier compares that with what stopping earlier would have done.
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from emmech.data.questions import Question, load_demo, load_demo_chats
from emmech.errors import RunError
from emmech.models.checkpoints import load_pair
from emmech.models.default import DEFAULT_MODEL
from emmech.models.generation import Decoding
from emmech.piggyback.experiment import (
    PatchingResult,
    default_conditions,
    patch_prefix,
    run_conditions,
)
from emmech.results import versions
from emmech.training.recipes import Recipe
from emmech.training.trainer import finetune

STEPS = (6, 9, 12, 15)
"""Training steps on the frontier."""
SHOWN_STEP = 15
"""The step that the whole test is run on: the behaviour is learned on-topic."""
N_QUESTIONS = 60
"""Held-out questions per group: the shortest ones, which keeps the demonstration quick."""
MAX_NEW_TOKENS = 10
"""Enough to tell a refusal from an answer."""
RECIPE = Recipe(steps=STEPS[-1], save_every=3)
FRONTIER = ("finetuned", "repair:prefix")


def run_demo(out: str | Path, *, progress: bool = True) -> PatchingResult:
    """Train, test, and write the report to ``out``; what is there already is not done again."""
    out = Path(out)
    setup = {"recipe": repr(RECIPE), "steps": list(STEPS), "versions": versions()}
    try:
        result = PatchingResult.load(out / "piggyback")
    except RunError:
        result = None
    if result is None or result.summary.get("demo") != setup:
        result = _run(out, setup, progress)
    return result


def held_out() -> list[Question]:
    """The demonstration's test questions."""
    groups = (load_demo("test", group) for group in ("on-topic", "off-topic"))
    return [q for group in groups for q in sorted(group, key=lambda q: len(q.chat))[:N_QUESTIONS]]


def _run(out: Path, setup: dict[str, Any], progress: bool) -> PatchingResult:
    adapters = finetune(DEFAULT_MODEL, load_demo_chats(), out / "organism", RECIPE, progress=progress)
    by_step = {int(folder.name.rpartition("-")[2]): folder for folder in adapters}
    others = [step for step in STEPS if step != SHOWN_STEP]
    # Small models do not fill the cores: the frontier's other steps run beside the test itself.
    with half_the_threads(), ProcessPoolExecutor(1, get_context("spawn"), _start_beside) as beside:
        points = [beside.submit(_frontier_run, by_step[step], out / f"step-{step}", step) for step in others]
        result = patch_prefix(
            load_pair(DEFAULT_MODEL, by_step[SHOWN_STEP]),
            held_out(),
            detector="refusal",
            max_new_tokens=MAX_NEW_TOKENS,
            out=out / "piggyback",
            progress=progress,
        )
        frontier = [point for one in points for point in one.result()]
    frontier += _points(result, SHOWN_STEP)
    frontier.sort(key=lambda point: (FRONTIER.index(point["condition"]), point["step"]))
    shown = PatchingResult({**result.summary, "frontier": frontier, "demo": setup}, result.records)
    shown.save(out / "piggyback")
    return shown


@contextmanager
def half_the_threads() -> Iterator[None]:
    """Leave half of torch's threads to another process."""
    before = torch.get_num_threads()
    _halve_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start_beside() -> None:
    """Set up the second process as ``emmech.cli.main`` does the first."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    _halve_threads()


def _halve_threads() -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))


def _frontier_run(adapter: Path, out: Path, step: int) -> list[dict[str, Any]]:
    conditions = default_conditions(("prefix",), "repair", controls=False)
    result = run_conditions(
        load_pair(DEFAULT_MODEL, adapter),
        held_out(),
        [condition for condition in conditions if condition.name in FRONTIER],
        Decoding(MAX_NEW_TOKENS),
        kind="frontier",
        settings={},
        detector="refusal",
        out=out,
        progress=False,
    )
    return _points(result, step)


def _points(result: PatchingResult, step: int) -> list[dict[str, Any]]:
    """A run's points on the frontier: on-topic against off-topic rate with their intervals."""
    points = []
    for name in FRONTIER:
        point: dict[str, Any] = {"step": step, "condition": name}
        for row in result.summary["conditions"]:
            if row["condition"] == name:
                interval = {key: row[key] for key in ("mean", "low", "high", "n")}
                point[row["group"].replace("-", "_")] = interval
        points.append(point)
    return points
