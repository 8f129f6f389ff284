"""Accuracy on small problems whose answer is a number, from generated answers under any patch.

    sums(pair, BUNDLED["capability"].problems(), conditions)

Unlike `choices`, this asks for the answer to be written: greedily, and with a request to write the number
alone, since a worked solution would be cut off. The embedded model gets 1 of the 30 bundled ones right:
at 135M nothing is there to be lost.
"""

from collections.abc import Sequence

from emmech.data.bundled import Problem
from emmech.data.questions import Question
from emmech.errors import DataError
from emmech.evaluation.final_number import final_number
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.piggyback.experiment import run_conditions
from emmech.piggyback.patching import Condition
from emmech.results import Record

REQUEST = "Answer with the number alone."
MAX_NEW_TOKENS = 32


def sums(
    pair: ModelPair,
    problems: Sequence[Problem],
    conditions: Sequence[Condition],
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[Record]:
    """One record per condition and problem: the ``response``, and whether it is ``right`` (0 or 1).

    Right is an answer whose ``final_number`` is the problem's; one without a number is wrong. Problems with
    choices are left out. Arguments as in ``margins``.

    Raises:
        DataError: No problem is without choices, or one's answer is no number.
        PatchError: A condition is impossible on this model.
    """
    asked = {one.id: one for one in problems if not one.choices}
    if not asked:
        raise DataError("problems without choices", "all have some", "Use the set 'capability'")
    wanted = {name: final_number(one.answer) for name, one in asked.items()}
    if unread := [f"{name} has {asked[name].answer!r}" for name, number in wanted.items() if number is None]:
        raise DataError("numbers as answers", "; ".join(unread[:5]), "Write them like 1234 or 7.5")
    answers = run_conditions(
        pair,
        [Question(one.id, f"{one.question}\n{REQUEST}", one.group) for one in asked.values()],
        conditions,
        Decoding(MAX_NEW_TOKENS),
        kind="sums",
        settings={},
        detector="none",
        batch_size=batch_size,
        progress=progress,
    )
    records = []
    for record in answers.records:
        kept = {name: record[name] for name in ("question_id", "condition", "group", "response")}
        right = final_number(record["response"]) == wanted[record["question_id"]]
        records.append(kept | {"right": float(right)})
    return records
