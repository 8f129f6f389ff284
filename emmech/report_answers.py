"""Answers side by side, with filters: the part of a page that shows what models said.

    answers_part([answers_of(summary, records, "my run")])

Texts go into the page as data and are shown as text. Per answer the detector says what it counts.
"""

from collections.abc import Sequence
from typing import Any

from emmech.evaluation.detectors import detector
from emmech.figures import Summary, headline
from emmech.report_page import Html, as_json, filled
from emmech.results import Record

_FIXED = ("question_id", "question", "group", "condition", "sample", "response", "n_new_tokens", "row")


def answers_part(runs: Sequence[Record]) -> Html:
    """The section and its script; empty where no run has an answer."""
    runs = [run for run in runs if run["questions"]]
    return Html(filled("report_answers.html", {"data": as_json(runs)}) if runs else "")


def answers_of(summary: Summary, records: Sequence[Record], name: str = "") -> Record:
    """What the section shows of one run: its questions, with the answers of each condition.

    Raises:
        DetectorError: The summary's detector is one that this process does not know.
    """
    measure = detector(summary["detector"])
    questions: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        key = (record["group"], record["question_id"])
        entry = questions.setdefault(
            key, {"id": key[1], "group": key[0], "question": record["question"], "answers": {}}
        )
        answer = [record["response"], measure(record["response"]), _label(record, entry["question"])]
        entry["answers"].setdefault(record["condition"], []).append(answer)
    conditions = list(dict.fromkeys(record["condition"] for record in records))
    pair = headline(summary)
    compared = [row["condition"] for row in pair] if pair else []
    chosen = ["base", "finetuned", *compared] if compared else conditions[:3]
    return {
        "name": name,
        "questions": list(questions.values()),
        "conditions": conditions,
        "groups": list(dict.fromkeys(group for group, _ in questions)),
        "chosen": [condition for condition in conditions if condition in chosen],
        "compared": compared,
        "detector": summary["detector"],
        "unit": summary["unit"],
    }


def _label(record: Record, question: str) -> str:
    """What tells this answer from others to its question: sample, trial, changed wording."""
    extra = [f"{name} {value}" for name, value in record.items() if name not in _FIXED]
    sample = [f"sample {record['sample']}"] if record["sample"] else []
    asked = [f"asked: {record['question']}"] if record["question"] != question else []
    return ", ".join(extra + sample + asked)
