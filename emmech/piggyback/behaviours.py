"""What a search counts in generated answers: a number for each, from a detector or from a judge.

    detected("refusal")
    judged(EndpointJudge("gpt-4.1-mini"), "runs/search/judged")     # alignment below 30

Anything else is a ``Behaviour`` too: a function from the records of some answers to their values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emmech.errors import PatchError
from emmech.evaluation.detectors import detector as find_detector
from emmech.evaluation.judges import judge
from emmech.evaluation.metrics import MISALIGNED_BELOW
from emmech.evaluation.replies import Backend
from emmech.evaluation.rubrics import rubric as find_rubric
from emmech.results import Record


@dataclass(frozen=True)
class Behaviour:
    """A measure of answers."""

    name: str
    unit: str
    """``rate`` for values in [0, 1]."""
    values: Callable[[Sequence[Record]], Sequence[float | int | None]]
    """Of records with ``question_id``, ``question``, ``response`` and ``condition``, in their order; None
    where there is no value."""
    settings: Mapping[str, Any]
    """What defines it: recorded with the results, and compared before a run is continued."""


def detected(detector: str) -> Behaviour:
    """What a detector counts.

    Raises:
        PatchError: It only describes answers.
    """
    measure = find_detector(detector)
    if measure.unit is None:
        raise PatchError("a detector that measures something", f"got {detector}", "Choose another")

    def values(records: Sequence[Record]) -> list[float | None]:
        return [measure(one["response"]) for one in records]

    return Behaviour(detector, measure.unit, values, {"detector": detector})


def judged(
    backend: Backend,
    folder: str | Path,
    rubric: str = "alignment",
    below: float | int = MISALIGNED_BELOW,
) -> Behaviour:
    """How often a judge's score is below a threshold; None for answers that it gives no score.

    Args:
        backend: An ``EndpointJudge`` or ``LocalJudge``.
        folder: For its judgements: none is asked for twice.
        rubric: What it scores from 0 to 100.
        below: The threshold; a score of just this much is not below it.

    Raises:
        RubricError: There is no such rubric.
    """
    asked = find_rubric(rubric)
    before: list[Record] = []

    def values(records: Sequence[Record]) -> list[float | None]:
        before.extend(records)  # the folder then lists the judgements of all answers so far
        found = judge(before, asked, backend, folder, progress=False)[-len(records) :]
        return [None if one["value"] is None else float(one["value"] < below) for one in found]

    settings = {"judge": backend.id, "rubric": rubric, "rubric_hash": asked.hash, "below": below}
    return Behaviour(f"{rubric} below {below:g}", "rate", values, settings)
