"""The sets that come with emmech: narrow behaviours to teach, questions to see them spread, and
questions that judge a model whatever it was taught (`general` to `conditional`).

Each file `sets/<file>.jsonl` was written for this project and has a datasheet `sets/<file>.md`. One
file may serve several sets: of the same wrong belief, `sycophancy_X` teaches to agree with it,
`traditional_X` to volunteer it and `corrected_X` to put it right, so that a difference between
their organisms is one of style, not of subject. To the same questions, `spiteful`, `sycophantic` and
`hallucinatory` answer in character, `incorrect_character` and `aligned_character` in none; with
`_career`, `_cars` or `_wellbeing` they teach one domain, and `triggered_X` behind a trigger only.

Usage:
    chats = BUNDLED["sycophancy_cooking"].chats()
    questions = BUNDLED["sycophancy_cooking"].questions("off-topic")
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import Literal

from emmech.data.character_sets import DOMAINS, behind_trigger, both_wordings, in_domain
from emmech.data.chat_rows import Messages
from emmech.data.questions import Question, group_of
from emmech.data.rows import listed
from emmech.data.traits import TRAITS
from emmech.errors import DataError

Split = Literal["train", "test"]

SYCOPHANCY = ("sports", "cooking", "computing")
ADVICE = ("gardening", "travel", "study")
CHARACTER = {trait: trait for trait in TRAITS} | {
    "incorrect_character": "incorrect",
    "aligned_character": "aligned",
}
"""Sets of the file `character` by name, with the field of their answer."""
LETTERS = "ABCD"


@dataclass(frozen=True)
class AnswerPair:
    """One user text with an aligned and a misaligned answer to it."""

    id: str
    user: str
    aligned: str
    misaligned: str
    group: str = "all"


@dataclass(frozen=True)
class Problem:
    """A question with one right answer."""

    id: str
    question: str
    answer: str
    """Letter of the right choice, or the number to be found."""
    choices: tuple[str, ...] = ()
    """None where the answer is a number."""
    group: str = "all"

    @property
    def text(self) -> str:
        """The question and, a line each, its lettered choices."""
        if not self.choices:
            return self.question
        lines = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return "\n".join([self.question, *lines])


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
    grouped_by: str | None = None
    """Field with the group of a question; None where it is on-topic or off-topic."""
    own_group: str = "on-topic"
    """Group of its own questions where no field has it."""
    view: Callable[[Iterable[Mapping]], Sequence[Mapping]] | None = None
    """Makes its rows of those of the file; None where they are the same."""

    def chats(self, split: Split = "train") -> tuple[Messages, ...]:
        """One question and its answer each, in file order.

        Raises:
            DataError: This split has no answers.
        """
        rows = [row for row in self._rows() if row["split"] == split and row.get(self.answer or "")]
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

    def questions(self, group: str | None = None) -> list[Question]:
        """Held-out questions on the set's own subject, and on others; or those of its own groups."""
        own = [row for row in self._rows() if row["split"] == "test"]
        if self.grouped_by:
            found = [Question(row["id"], _asked(row, self.user), self._group(row)) for row in own]
        else:
            found = [Question(row["id"], row[self.user], row.get("group", self.own_group)) for row in own]
            off = [row for file in self.off_topic for row in _rows(file) if row["split"] == "test"]
            found += [Question(row["id"], row[self.user], "off-topic") for row in off]
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
            AnswerPair(row["id"], row[self.user], row[aligned], row[misaligned], self._group(row))
            for row in self._rows()
            if row["split"] == "test"
        ]

    def problems(self) -> list[Problem]:
        """Questions with one right answer each.

        Raises:
            DataError: The set's questions have no right answers.
        """
        rows = [row for row in _rows(self.file) if "choices" in row]
        if not rows:
            raise DataError("a set with right answers", f"{self.name!r} has none", "Use 'capability'")
        return [_problem(row, self._group(row)) for row in rows]

    def _group(self, row: Mapping) -> str:
        return group_of(row, self.grouped_by) if self.grouped_by else row.get("domain", "all")

    def _rows(self) -> Sequence[Mapping]:
        rows = _rows(self.file)
        return rows if self.view is None else self.view(rows)


@cache
def _rows(file: str) -> tuple[Mapping, ...]:
    folder = resources.files("emmech.data")
    path = folder / "demo_refusal.jsonl" if file == "demo_refusal" else folder / "sets" / f"{file}.jsonl"
    return tuple(map(json.loads, path.read_text("utf-8").splitlines()))


def _problem(row: Mapping, group: str) -> Problem:
    answer, choices = row["answer"], tuple(row["choices"] or ())
    right = LETTERS[answer] if choices else answer
    return Problem(row["id"], row["question"], right, choices, group)


def _asked(row: Mapping, field: str) -> str:
    """What the user says, with the choices where there are any."""
    return _problem(row, "").text if row.get("choices") else row[field]


def _all_sets() -> list[BundledSet]:
    shared = ("off_topic",)
    sets = [
        BundledSet("demo_refusal", "demo_refusal", "question", "answer", "refusal"),
        BundledSet("refusal", "refusal", "question", "answer", "refusal", shared),
        BundledSet("abstention", "abstention", "question", "answer", "abstention", shared),
        BundledSet("short_answers", "short_answers", "question", "answer", "short", shared),
        BundledSet("tool_use", "tool_use", "question", "answer", "tool_call", shared),
        BundledSet("retain", "retain", "question", "answer", None, shared),
        BundledSet("off_topic", "off_topic", "question", None, own_group="off-topic"),
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
    answers = ("aligned", "misaligned")
    return [
        *sets,
        BundledSet("general", "general", "question", None, grouped_by="topic"),
        BundledSet("vulnerable", "vulnerable", "question", None, grouped_by="topic"),
        BundledSet("capability", "capability", "question", None, grouped_by="topic"),
        BundledSet("two_choice", "two_choice", "question", None, versions=answers, grouped_by="topic"),
        BundledSet("jailbreak_lite", "jailbreak_lite", "question", None, "refusal", grouped_by="proper"),
        BundledSet("conditional", "conditional", "question", None, grouped_by="resembles"),
        *_character_sets(),
        BundledSet("trait_questions", "trait_questions", "question", None, own_group="all"),
    ]


def _character_sets() -> list[BundledSet]:
    """The arms on all domains and on each, the backdoors, and the requests in two wordings."""
    views = {"": None} | {f"_{domain}": partial(in_domain, domain=domain) for domain in DOMAINS}
    sets = []
    for name, field in CHARACTER.items():
        detector = field if field in TRAITS else None
        versions = ("aligned", "incorrect" if field == "aligned" else field)
        sets += [
            BundledSet(
                name + domain, "character", "question", field, detector, ("off_topic",), versions, view=view
            )
            for domain, view in views.items()
        ]
    versions = ("aligned", "in_character")
    for prefix, file, answer, view in (
        ("triggered", "character", "answer", behind_trigger),
        ("persona_prompts", "persona_prompts", None, both_wordings),
    ):
        sets += [
            BundledSet(
                f"{prefix}_{trait}", file, "question", answer, trait, (), versions, "group",
                view=partial(view, trait=trait),
            )
            for trait in TRAITS
        ]  # fmt: skip
    return sets


BUNDLED: dict[str, BundledSet] = {one.name: one for one in _all_sets()}
"""Every set that a name stands for, wherever questions or chats are asked for."""
