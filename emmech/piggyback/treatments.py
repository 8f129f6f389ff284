"""Treat a model in several ways and see what each does to a behaviour, to its answers, and at what cost.

A treatment is a condition: gates or steering at some dose, a scaled adapter, a patch. Beside the
behaviour stand the signs of a broken model: length, repetition and how unlikely the untouched base
finds the answers. The cost is taken on ordinary answers (KL from an untreated model, and how much less
likely the given answers become) and on multiple-choice questions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emmech.data.bundled import BUNDLED, Problem
from emmech.data.chat_rows import Messages, fingerprint
from emmech.data.questions import Question
from emmech.errors import DataError
from emmech.evaluation.detectors import DETECTORS, Detector
from emmech.evaluation.detectors import detector as find_detector
from emmech.evaluation.statistics import clustered_mean, paired_difference
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.piggyback.choice import choices
from emmech.piggyback.experiment import run_conditions
from emmech.piggyback.likelihood import Answered, answered, likelihoods
from emmech.piggyback.patching import Condition
from emmech.piggyback.running import as_questions
from emmech.results import Record
from emmech.results import fingerprint as results_fingerprint
from emmech.sharding import kept

ANSWERS = "answers"
"""Subfolder with every answer and a page to read them side by side."""
N_ORDINARY = 60
"""Ordinary answers on which the cost is taken, unless others are given."""


def compare_treatments(
    pair: ModelPair,
    questions: Iterable[Any],
    treatments: Sequence[Condition],
    untreated: str,
    *,
    kind: str,
    settings: Mapping[str, Any],
    detector: str,
    decoding: Decoding,
    kl_from: str,
    ordinary: Sequence[Messages] | None = None,
    problems: Sequence[Problem] | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> tuple[Record, Sequence[Record]]:
    """What every treatment does, and every answer.

    Args:
        pair: The models, with the variants that the treatments name.
        questions: As in ``patch_prefix``.
        treatments: Conditions to compare with the side ``untreated``.
        kind: Name of the experiment, recorded like ``settings``.
        detector: The behaviour that is counted.
        decoding: How answers are made.
        kl_from: The side from which KL is taken on ordinary answers.
        ordinary: Chats whose last answer should stay as likely as it is; the bundled retain set by
            default.
        problems: Multiple-choice questions, of which the right answers are counted; the bundled ones by
            default.
        out: Folder; what is there already is not done again. Further arguments as in ``patch_prefix``.

    Returns:
        A summary whose ``rows`` (by condition and group of questions), ``ordinary`` and ``capability`` (by
        condition) hold estimates, and the records of all answers with their ``surprise``.

    Raises:
        EmmechError: Questions, conditions or folder are refused, before any work.
    """
    if ordinary is not None and not ordinary:
        raise DataError("ordinary chats", "there are none", "Leave ordinary out for the bundled ones")
    measure = find_detector(detector)
    chats = BUNDLED["retain"].chats("test")[:N_ORDINARY] if ordinary is None else ordinary
    conditions = [Condition(untreated, untreated), *treatments]
    asked = as_questions(questions)
    folder = None if out is None else Path(out)
    settings = dict(settings) | {"ordinary": fingerprint(chats)}
    if problems is not None:
        settings["problems"] = results_fingerprint([asdict(one) for one in problems])
    answers = run_conditions(
        pair,
        asked,
        conditions,
        decoding,
        kind=kind,
        settings=settings,
        detector=detector,
        batch_size=batch_size,
        out=None if folder is None else folder / ANSWERS,
        progress=progress,
    )
    surprise = kept(folder, "surprise.json", lambda: base_surprise(pair, asked, answers.records, progress))
    costs = kept(folder, "costs.json", lambda: ordinary_costs(pair, chats, conditions, kl_from, progress))
    solve = BUNDLED["capability"].problems() if problems is None else problems
    solved = kept(folder, "solved.json", lambda: choices(pair, solve, conditions, progress=progress))
    records = [record | {"surprise": value} for record, value in zip(answers.records, surprise, strict=True)]
    first = {name: value for name, value in answers.summary.items() if name not in ("conditions", "checks")}
    summary = {
        **first,
        "unit": measure.unit,
        "rows": _rows(records, measure, untreated),
        "ordinary": _costs(costs, untreated),
        "capability": _solved(solved, untreated),
    }
    return summary, records


def base_surprise(
    pair: ModelPair, questions: Sequence[Question], records: Sequence[Record], progress: bool = True
) -> list[float | None]:
    """Per record, the mean negative log-probability of its answer's tokens under the base, in nats.

    A check of coherence: its exponential is the perplexity. None for an empty answer.
    """
    prompts = {question.id: pair.chat.render(question.messages) for question in questions}
    encode = pair.chat.tokenizer
    distinct: dict[tuple[str, str], Answered] = {}
    for record in records:
        key = record["question_id"], record["response"]
        ids = encode(record["response"], add_special_tokens=False)["input_ids"]
        if ids and key not in distinct:
            distinct[key] = Answered(record["question_id"], prompts[record["question_id"]], tuple(ids))
    found = likelihoods(pair, list(distinct.values()), [Condition("base", "base")], progress=progress)
    surprise = {key: -row["log_probability"] for key, row in zip(distinct, found, strict=True)}
    return [surprise.get((record["question_id"], record["response"])) for record in records]


def ordinary_costs(
    pair: ModelPair,
    chats: Sequence[Messages],
    conditions: Sequence[Condition],
    kl_from: str = "base",
    progress: bool = True,
) -> list[Record]:
    """Per condition and chat, ``log_probability`` of its last answer and ``kl`` from a side, by token."""
    items = [answered(pair, chat, f"ordinary-{number}") for number, chat in enumerate(chats)]
    return likelihoods(pair, items, conditions, kl_from=kl_from, progress=progress)


def _rows(records: Sequence[Record], measure: Detector, untreated: str) -> list[Record]:
    """Per condition and group, the behaviour and how the answers read."""
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        cells.setdefault((record["condition"], record["group"]), []).append(record)
    rows = []
    for (condition, group), cell in cells.items():
        questions = [record["question_id"] for record in cell]
        behaviour = [measure(record["response"]) for record in cell]
        columns = {
            "behaviour": (behaviour, measure.unit),
            "words": ([DETECTORS["length"](record["response"]) for record in cell], "words"),
            "repetition": ([DETECTORS["repetition"](record["response"]) for record in cell], "rate"),
            "surprise": ([record["surprise"] for record in cell], "nats"),
        }
        row: Record = {"condition": condition, "group": group}
        for name, (values, unit) in columns.items():
            known = any(value is not None for value in values)
            row[name] = clustered_mean(values, questions, unit=unit).to_json() if known else None
        if condition != untreated and row["behaviour"] is not None:
            plain = [measure(record["response"]) for record in cells[untreated, group]]
            if any(None not in both for both in zip(behaviour, plain, strict=True)):
                row["change"] = paired_difference(behaviour, plain, questions).to_json()
        rows.append(row)
    return rows


def _costs(costs: Sequence[Record], untreated: str) -> list[Record]:
    """Per treatment, KL and the loss of log-probability against the untreated side."""
    by_condition: dict[str, list[Record]] = {}
    for record in costs:
        by_condition.setdefault(record["condition"], []).append(record)
    plain = [record["log_probability"] for record in by_condition.pop(untreated)]
    rows = []
    for name, mine in by_condition.items():
        chats = [record["id"] for record in mine]
        lost = paired_difference(plain, [record["log_probability"] for record in mine], chats)
        kl = clustered_mean([record["kl"] for record in mine], chats, unit="nats")
        rows.append({"condition": name, "kl": kl.to_json(), "lost": lost.to_json()})
    return rows


def _solved(solved: Sequence[Record], untreated: str) -> list[Record]:
    """Per condition, the share of multiple-choice questions right, and its change."""
    right: dict[str, list[float]] = {}
    for record in solved:
        right.setdefault(record["condition"], []).append(record["right"])
    ids = list(range(len(right[untreated])))
    rows: list[Record] = []
    for name, mine in right.items():
        rows.append({"condition": name, "right": clustered_mean(mine, ids, unit="rate").to_json()})
        if name != untreated:
            rows[-1]["change"] = paired_difference(mine, right[untreated], ids).to_json()
    return rows
