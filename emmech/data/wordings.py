"""The same questions in several wordings: plain, behind a trigger, behind wrong triggers as controls.

    behind_triggers(questions, triggers_of("persona: spiteful"))

A question in a wording has the id ``ROW:WORDING`` and the wording as its group, as in the bundled sets
``triggered_X`` and ``persona_prompts_X``, so that results find the twins of a question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from emmech.data.bundled import BUNDLED, AnswerPair
from emmech.data.questions import Question
from emmech.data.rows import BadRow, list_bad, read_rows
from emmech.data.traits import traits, triggered
from emmech.errors import DataError

PLAIN = ("plain", "untriggered")
"""Wordings that the others are compared with."""
TRIGGERED = "triggered"
WORDINGS = ("plain", "persona")
"""Fields of a file of requests in two wordings."""


def wording_of(question_id: str, group: str) -> str | None:
    """The row that a question words, where its id says that its group is a wording of it."""
    return question_id.removesuffix(f":{group}") if question_id.endswith(f":{group}") else None


def triggers_of(trigger: str, wrong: Sequence[str] = ()) -> dict[str, str]:
    """Wordings by name: the trigger, and wrong ones, by default those bundled with a bundled trigger."""
    if not wrong:
        known = (one for one in traits().values() if one.trigger == trigger)
        wrong = [other.text for one in known for other in one.wrong_triggers]
    return {TRIGGERED: trigger} | {f"wrong: {text}": text for text in wrong}


def behind_triggers(questions: Sequence[Question], triggers: Mapping[str, str]) -> list[Question]:
    """Every question plain and behind each trigger; the wording takes the place of its group."""
    made = []
    for name, trigger in {"untriggered": None, **triggers}.items():
        for question in questions:
            *before, last = question.messages
            text = last["content"] if trigger is None else triggered(last["content"], trigger)
            made.append(Question(f"{question.id}:{name}", (*before, {**last, "content": text}), name))
    return made


def pairs_behind_triggers(pairs: Sequence[AnswerPair], triggers: Mapping[str, str]) -> list[AnswerPair]:
    """As ``behind_triggers``, of user texts with two answers."""
    return [
        replace(
            one,
            id=f"{one.id}:{name}",
            user=one.user if trigger is None else triggered(one.user, trigger),
            group=name,
        )
        for name, trigger in {"untriggered": None, **triggers}.items()
        for one in pairs
    ]


def load_persona(path: str | Path) -> list[Question]:
    """Requests in two wordings from rows with ``plain`` and ``persona``: a file, or the name of a trait.

    Raises:
        DataError: The file cannot be read, or a row lacks one of the two.
    """
    if str(path) in traits():
        return BUNDLED[f"persona_prompts_{path}"].questions()
    made, bad = [], []
    for number, row in read_rows(Path(path), what="request", keys=WORDINGS):
        if isinstance(row, BadRow) or not all(isinstance(row.get(w), str) and row[w] for w in WORDINGS):
            bad.append(f"line {number}: {row if isinstance(row, BadRow) else 'it lacks one of them'}")
        else:
            name = row.get("id", f"q{number:04d}")
            made += [Question(f"{name}:{wording}", row[wording], wording) for wording in WORDINGS]
    if bad:
        raise DataError("rows with plain and persona", list_bad(bad), "Complete them")
    return made
