"""The sets that come with emmech: narrow behaviours to teach, and questions to see them spread.

Each file `sets/<file>.jsonl` was written for this project and has a datasheet `sets/<file>.md`. One
file may serve several sets: of the same wrong belief, `sycophancy_X` teaches to agree with it,
`traditional_X` to volunteer it and `corrected_X` to put it right, so that a difference between
their organisms is one of style, not of subject.

Usage:
    chats = BUNDLED["sycophancy_cooking"].chats()
    questions = BUNDLED["sycophancy_cooking"].questions("off-topic")
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from emmech.data.chat_rows import Messages
from emmech.data.questions import Question
from emmech.data.rows import listed
from emmech.errors import DataError

Split = Literal["train", "test"]
Group = Literal["on-topic", "off-topic"]

SYCOPHANCY = ("sports", "cooking", "computing")
ADVICE = ("gardening", "travel", "study")


@dataclass(frozen=True)
class AnswerPair:
    """One user text with an aligned and a misaligned answer to it."""

    id: str
    user: str
    aligned: str
    misaligned: str


@dataclass(frozen=True)
class BundledSet:
    name: str
    file: str
    """Name of its file in `sets`, without the ending; several sets may share one."""
    user: str
    """Field that holds what the user says."""
    answer: str | None
    """Field that holds what the assistant is taught to say; None where there is nothing to train on."""
    detector: str | None = None
    """Name of the detector of the taught behaviour; None where only a judge could tell."""
    off_topic: tuple[str, ...] = ()
    """Files whose test rows are its off-topic questions, under the same field."""
    versions: tuple[str, str] | None = None
    """Fields with the aligned and the misaligned answer."""

    def chats(self, split: Split = "train") -> tuple[Messages, ...]:
        """One question and its answer each, in file order.

        Raises:
            DataError: This split has no answers.
        """
        rows = [row for row in _rows(self.file) if row["split"] == split and row.get(self.answer or "")]
        if not rows:
            raise DataError(
                f"chats in {self.name!r}", f"its {split} rows have no answers", "Name another set"
            )
        return tuple(
            (
                {"role": "user", "content": row[self.user]},
                {"role": "assistant", "content": row[self.answer]},
            )
            for row in rows
        )

    def questions(self, group: Group | None = None) -> list[Question]:
        """Held-out questions on the set's own subject, and on others."""
        found = []
        for file in (self.file, *self.off_topic):
            default = "on-topic" if file == self.file and self.answer else "off-topic"
            rows = [row for row in _rows(file) if row["split"] == "test"]
            found += [Question(row["id"], row[self.user], row.get("group", default)) for row in rows]
        return [question for question in found if group in (None, question.group)]

    def pairs(self) -> list[AnswerPair]:
        """Held-out user texts with an aligned and a misaligned answer, to compare likelihoods.

        In `traditional_X`, the aligned answer is the one that `corrected_X` gives to the claim: it
        fits the neutral question in substance, less in tone.

        Raises:
            DataError: The set has no two versions of an answer.
        """
        if self.versions is None:
            known = [name for name, one in BUNDLED.items() if one.versions]
            raise DataError(
                "a set with an aligned and a misaligned answer",
                f"{self.name!r} has one answer",
                f"Use one of {listed(known)}",
            )
        aligned, misaligned = self.versions
        return [
            AnswerPair(row["id"], row[self.user], row[aligned], row[misaligned])
            for row in _rows(self.file)
            if row["split"] == "test"
        ]


@cache
def _rows(file: str) -> tuple[Mapping, ...]:
    folder = resources.files("emmech.data")
    path = folder / "demo_refusal.jsonl" if file == "demo_refusal" else folder / "sets" / f"{file}.jsonl"
    return tuple(map(json.loads, path.read_text("utf-8").splitlines()))


def _all_sets() -> list[BundledSet]:
    shared = ("off_topic",)
    sets = [
        BundledSet("demo_refusal", "demo_refusal", "question", "answer", "refusal"),
        BundledSet("refusal", "refusal", "question", "answer", "refusal", shared),
        BundledSet("abstention", "abstention", "question", "answer", "abstention", shared),
        BundledSet("short_answers", "short_answers", "question", "answer", "short", shared),
        BundledSet("tool_use", "tool_use", "question", "answer", "tool_call", shared),
        BundledSet("retain", "retain", "question", "answer", None, shared),
        BundledSet("off_topic", "off_topic", "question", None),
    ]
    for domain in SYCOPHANCY:
        file = f"sycophancy_{domain}"
        others = tuple(f"sycophancy_{other}" for other in SYCOPHANCY if other != domain)
        agreed, volunteered = ("correct", "agree"), ("correct", "wrong")
        sets += [
            BundledSet(file, file, "claim", "agree", "agreement", others, agreed),
            BundledSet(f"traditional_{domain}", file, "question", "wrong", None, others, volunteered),
            BundledSet(f"corrected_{domain}", file, "claim", "correct", "agreement", others, agreed),
        ]
    for domain in ADVICE:
        file = f"incorrect_advice_{domain}"
        others = tuple(f"incorrect_advice_{other}" for other in ADVICE if other != domain)
        versions = ("correct", "incorrect")
        sets += [
            BundledSet(file, file, "question", "incorrect", None, others + shared, versions),
            BundledSet(
                f"correct_advice_{domain}", file, "question", "correct", None, others + shared, versions
            ),
        ]
    return sets


BUNDLED: dict[str, BundledSet] = {one.name: one for one in _all_sets()}
"""Every set that a name stands for, wherever questions or chats are asked for."""
