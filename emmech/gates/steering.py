"""Turn gates up, down and round: what the dose does to a behaviour, and what it costs.

    pair = load_pair("smollm2", "runs/gates/step-40")
    result = steer_gates(pair, load_gates("runs/gates/step-40"), BUNDLED["refusal"].questions())
    result.table()

Every batch of questions is answered at every scale. Beside the behaviour stand the signs of a broken
model: length, repetition and how unlikely the untouched base finds the answers. The cost is taken on
ordinary answers (KL from the base, and how much less likely the given answers become) and on
multiple-choice questions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from emmech import defaults
from emmech.data.bundled import BUNDLED
from emmech.data.chat_rows import Messages, fingerprint
from emmech.data.questions import Question
from emmech.errors import DataError
from emmech.evaluation.detectors import DETECTORS, Detector
from emmech.evaluation.detectors import detector as find_detector
from emmech.evaluation.statistics import clustered_mean, paired_difference
from emmech.gates.gate import GateError, Gates, Gating
from emmech.models.checkpoints import ModelPair, Side, SideName
from emmech.models.generation import Decoding
from emmech.piggyback.choice import choices
from emmech.piggyback.experiment import run_conditions
from emmech.piggyback.likelihood import Answered, answered, likelihoods
from emmech.piggyback.patching import Condition
from emmech.piggyback.running import as_questions
from emmech.results import Record, read_json, write_json
from emmech.sharding import processes

ANSWERS = "answers"
"""Subfolder with every answer and a page to read them side by side."""
SCALES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
STEERING = "steering.json"
N_ORDINARY = 60
"""Ordinary answers on which the cost is taken, unless others are given."""


@dataclass(frozen=True)
class Steering:
    """What each scale does; everything that the table, the figure and the page show."""

    summary: Record

    def frame(self) -> pd.DataFrame:
        """One row per scale and group of questions."""
        return pd.DataFrame(self.summary["rows"])

    def table(self) -> None:
        """Print scales by groups."""
        from rich.console import Console

        from emmech.report_gates import steering_table

        Console().print(steering_table(self.summary))

    def figure(self) -> Any:
        """Behaviour, coherence and cost against the scale."""
        from emmech.figures import dose_response

        return dose_response(self.summary)

    def save(self, folder: str | Path) -> Path:
        """Write ``steering.json`` and ``report.html``; returns the latter."""
        from emmech.report_gates import write_steering

        write_json(Path(folder) / STEERING, self.summary)
        return write_steering(folder, self.summary)

    @classmethod
    def load(cls, folder: str | Path) -> "Steering":
        """The result in a finished folder."""
        return cls(read_json(Path(folder) / STEERING))


def steer_gates(
    pair: ModelPair,
    gates: Gates,
    questions: Iterable[Any],
    *,
    scales: Sequence[float | int] = SCALES,
    on: SideName = "base",
    parts: Sequence[str] | None = None,
    detector: str = defaults.DETECTOR,
    ordinary: Sequence[Messages] | None = None,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Steering:
    """Answers, their coherence and the cost on ordinary chats at every scale of the gates.

    Args:
        pair: From ``load_pair``: of the gates themselves, or of a finetuned organism to treat.
        gates: From ``load_gates``.
        questions: As in ``patch_prefix``.
        scales: 0 off, 1 as trained, -1 inverted.
        on: The side that gets the gates: the base, or a finetuned model that they never saw.
        parts: Restrict the gates to tokens of prefix, query, postfix or response.
        detector: The behaviour that is counted.
        ordinary: Chats whose last answer the gates should leave alone; the bundled retain set by
            default.
        max_new_tokens: Answer length; ``samples`` and ``seed`` as in ``patch_prefix``.
        batch_size: Questions per batch; by free memory by default.
        out: Folder for answers, table and figure; a stopped run continues there.
        progress: Show progress bars.

    Raises:
        GateError: The gates do not fit the model, or no scale is given.
        EmmechError: Questions or folder are refused, before any work.
    """
    if not scales or len(set(scales)) < len(scales):
        raise GateError("scales, each once", f"got {list(scales)}", "Correct them")
    if ordinary is not None and not ordinary:
        raise DataError("ordinary chats", "there are none", "Leave ordinary out for the bundled ones")
    measure = find_detector(detector)
    chats = BUNDLED["retain"].chats("test")[:N_ORDINARY] if ordinary is None else ordinary
    plain = pair.side(on)
    names = {float(scale): f"scale {scale:g}" for scale in sorted(scales)}
    sides = [
        with_gates(plain, Gating(gates, scale, parts=None if parts is None else tuple(parts)), name)
        for scale, name in names.items()
    ]
    pair = replace(pair, variants={side.name: side for side in sides})
    conditions = [Condition(on, on), *(Condition(name, name) for name in names.values())]
    settings = {
        "gates": {"fingerprint": gates.fingerprint(), **gates.provenance},
        "scales": list(names),
        "on": on,
        "parts": None if parts is None else list(parts),
        "ordinary": fingerprint(chats),
    }
    asked = as_questions(questions)
    folder = None if out is None else Path(out)
    answers = run_conditions(
        pair,
        asked,
        conditions,
        Decoding(max_new_tokens, defaults.temperature(None, samples), samples=samples, seed=seed),
        kind="gates-steer",
        settings=settings,
        detector=detector,
        batch_size=batch_size,
        out=None if folder is None else folder / ANSWERS,
        progress=progress,
    )
    surprise = kept(folder, "surprise.json", lambda: base_surprise(pair, asked, answers.records, progress))
    costs = kept(folder, "costs.json", lambda: ordinary_costs(pair, chats, conditions, progress))
    problems = BUNDLED["capability"].problems()
    solved = kept(folder, "solved.json", lambda: choices(pair, problems, conditions, progress=progress))
    by_name = {name: scale for scale, name in names.items()}
    records = [
        record | {"surprise": value, "scale": by_name.get(record["condition"])}
        for record, value in zip(answers.records, surprise, strict=True)
    ]
    first = {name: value for name, value in answers.summary.items() if name not in ("conditions", "checks")}
    summary = {
        **first,
        "unit": measure.unit,
        "rows": _rows(records, measure),
        "ordinary": _costs(costs, on, by_name),
        "capability": _solved(solved, on, by_name),
        "off_is_untouched": _off_is_untouched(records),
    }
    result = Steering(summary)
    if folder is not None:
        result.save(folder)
    return result


def with_gates(side: Side, gating: Gating, name: str) -> Side:
    """A side with gates on top of what it is, under a new name."""
    return replace(side, name=name, interventions=(*side.interventions, gating.on))


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
    pair: ModelPair, chats: Sequence[Messages], conditions: Sequence[Condition], progress: bool = True
) -> list[Record]:
    """Per chat and condition, ``log_probability`` of its last answer and ``kl`` from the base, by token."""
    items = [answered(pair, chat, f"ordinary-{number}") for number, chat in enumerate(chats)]
    return likelihoods(pair, items, conditions, kl=True, progress=progress)


def kept(folder: Path | None, name: str, make: Callable[[], Any]) -> Any:
    """What is in the folder under ``name``, or what ``make`` returns, written there."""
    if folder is None:
        return make()
    path, ours = folder / name, processes()
    if ours.from_main(lambda: not path.exists()):
        made = make()  # all processes share this
        ours.from_main(lambda: write_json(path, made))
    return ours.from_main(lambda: read_json(path))


def _rows(records: Sequence[Record], measure: Detector) -> list[Record]:
    """Per scale (None: without gates) and group, the behaviour and how the answers read."""
    cells: dict[tuple[float | None, str], list[Record]] = {}
    for record in records:
        cells.setdefault((record["scale"], record["group"]), []).append(record)
    rows = []
    for (scale, group), cell in cells.items():
        questions = [record["question_id"] for record in cell]
        behaviour = [measure(record["response"]) for record in cell]
        columns = {
            "behaviour": (behaviour, measure.unit),
            "words": ([DETECTORS["length"](record["response"]) for record in cell], "words"),
            "repetition": ([DETECTORS["repetition"](record["response"]) for record in cell], "rate"),
            "surprise": ([record["surprise"] for record in cell], "nats"),
        }
        row: Record = {"scale": scale, "group": group}
        for name, (values, unit) in columns.items():
            known = any(value is not None for value in values)
            row[name] = clustered_mean(values, questions, unit=unit).to_json() if known else None
        if scale is not None and row["behaviour"] is not None:
            plain = [measure(record["response"]) for record in cells[None, group]]
            if any(None not in both for both in zip(behaviour, plain, strict=True)):
                row["change"] = paired_difference(behaviour, plain, questions).to_json()
        rows.append(row)
    return rows


def _costs(costs: Sequence[Record], on: str, scales: Mapping[str, float]) -> list[Record]:
    """Per scale, KL from the base and the loss of log-probability against the ungated side."""
    by_condition: dict[str, list[Record]] = {}
    for record in costs:
        by_condition.setdefault(record["condition"], []).append(record)
    plain = [record["log_probability"] for record in by_condition[on]]
    rows = []
    for name, scale in scales.items():
        mine = by_condition[name]
        chats = [record["id"] for record in mine]
        lost = paired_difference(plain, [record["log_probability"] for record in mine], chats)
        kl = clustered_mean([record["kl"] for record in mine], chats, unit="nats")
        rows.append({"scale": scale, "kl": kl.to_json(), "lost": lost.to_json()})
    return rows


def _solved(solved: Sequence[Record], on: str, scales: Mapping[str, float]) -> list[Record]:
    """Per scale (None: without gates), the share of multiple-choice questions right, and its change."""
    right: dict[str, list[float]] = {}
    for record in solved:
        right.setdefault(record["condition"], []).append(record["right"])
    ids = list(range(len(right[on])))
    rows: list[Record] = []
    for name, scale in ({on: None} | dict(scales)).items():
        rate = clustered_mean(right[name], ids, unit="rate").to_json()
        rows.append({"scale": scale, "right": rate})
        if scale is not None:
            rows[-1]["change"] = paired_difference(right[name], right[on], ids).to_json()
    return rows


def _off_is_untouched(records: Sequence[Record]) -> bool | None:
    """Whether the answers at scale 0 are those of the ungated side; None where 0 was not asked for."""
    plain, off = (
        {(r["row"], r["sample"]): r["response"] for r in records if r["scale"] == scale}
        for scale in (None, 0.0)
    )
    return plain == off if off else None
