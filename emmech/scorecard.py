"""One table for a reviewer: every condition on the same questions, every metric with its uncertainty.

    pair, conditions = with_conditions(load_pair("smollm2", "runs/sft-0/step-24"), ["repair:prefix"])
    evaluate(pair, load_questions("general"), conditions, pairs=BUNDLED["two_choice"].pairs()).table()

Detectors and margins need no judge. With a judge, alignment, coherence and the rates made of them come
beside. A condition is compared with what it was made from, question by question: a patched model with the
same model unpatched, a finetuned one with its base; p values are Holm's over the conditions of a metric.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from emmech import defaults
from emmech.data.bundled import AnswerPair, Problem
from emmech.errors import EmmechError
from emmech.evaluation import metrics
from emmech.evaluation.detectors import detector as find_detector
from emmech.evaluation.judges import judge
from emmech.evaluation.replies import Backend
from emmech.evaluation.statistics import (
    Comparison,
    clustered_mean,
    design_effect,
    holm_corrected,
    paired_comparison,
)
from emmech.gates.files import load_gates
from emmech.gates.gate import Gating
from emmech.gates.steering import kept, with_gates
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.piggyback.choice import choices
from emmech.piggyback.experiment import default_conditions, run_conditions
from emmech.piggyback.margin import margins
from emmech.piggyback.patching import Condition
from emmech.piggyback.served import Served
from emmech.results import Record, fingerprint, read_json, write_json
from emmech.sharding import processes

EVALUATION = "evaluation.json"
ANSWERS, JUDGED, MARGINS, CHOICES = "answers", "judged", "margins.json", "choices.json"
DETECTORS = ("refusal", "length", "repetition")
ALL = "all"
JUDGED_METRICS = {
    "alignment": ("score", metrics.alignment),
    "EM": ("rate", metrics.misaligned),
    "accepted": ("rate", metrics.accepted),
}
"""By rubrics ``alignment``, ``alignment`` with ``coherence``, and ``compliance``."""
Value = tuple[str, float | int | None]
"""A question's id and a number from one of its answers, None where it is missing."""


@dataclass(frozen=True)
class Evaluation:
    """All conditions by all metrics."""

    summary: Record

    def frame(self) -> pd.DataFrame:
        """One row per metric, group and condition."""
        return pd.DataFrame(self.summary["rows"])

    def table(self) -> None:
        """Print metrics by conditions, with the comparisons."""
        from rich.console import Console

        from emmech.report_evaluation import evaluation_table

        Console().print(evaluation_table(self.summary))

    def save(self, folder: str | Path) -> Path:
        """Write ``evaluation.json`` and ``report.html``; returns the latter."""
        from emmech.report_evaluation import write_evaluation

        write_json(Path(folder) / EVALUATION, self.summary)
        return write_evaluation(folder, self.summary)

    @classmethod
    def load(cls, folder: str | Path) -> "Evaluation":
        """The result in a finished folder."""
        return cls(read_json(Path(folder) / EVALUATION))


def with_conditions(
    pair: ModelPair, names: Sequence[str] = (), *, finetuned: bool = True
) -> tuple[ModelPair, list[Condition]]:
    """The pair and the conditions that ``names`` ask for, after the unpatched models.

    Args:
        pair: From ``load_pair``.
        names: A patch as in ``patch_prefix`` (``repair:prefix``, ``control:noise`` ...), or
            ``gates=FOLDER@SCALE``: gates on the finetuned model (on the base, where there is none).
        finetuned: Whether the pair's finetuned side is evaluated at all.

    Raises:
        EmmechError: A name is none of these.
    """
    known = {
        one.name: one for one in default_conditions(("prefix", "query", "postfix"), "both", controls=True)
    }
    conditions = [known["base"], *([known["finetuned"]] if finetuned else [])]
    variants, provenance = dict(pair.variants), dict(pair.provenance)
    for name in names:
        what, _, rest = name.partition("=")
        if what == "gates" and rest:
            path, _, scale = rest.rpartition("@")
            side = pair.finetuned if finetuned else pair.base
            gates = load_gates(path or rest, pair.base.module)
            variants[name] = with_gates(side, Gating(gates, _scale(scale if path else "1", name)), name)
            provenance[name] = gates.fingerprint()
            conditions.append(Condition(name, name))
        elif name in known and (finetuned or name == "base"):
            conditions.append(known[name])
        else:
            raise EmmechError(
                f"conditions among {', '.join(known)} or gates=FOLDER@SCALE",
                f"got '{name}'" + ("" if finetuned else " without a finetuned model"),
                "Correct --with",
            )
    return replace(pair, variants=variants, provenance=provenance), list(dict.fromkeys(conditions))


def evaluate(
    pair: ModelPair,
    questions: Iterable[Any],
    conditions: Sequence[Condition],
    *,
    detectors: Sequence[str] = DETECTORS,
    pairs: Sequence[AnswerPair] = (),
    problems: Sequence[Problem] = (),
    served: Mapping[str, Served] | None = None,
    judge_with: Backend | None = None,
    rubrics: Sequence[str] = ("alignment", "coherence"),
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    temperature: float | None = None,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path,
    progress: bool = True,
) -> Evaluation:
    """Answers under every condition, and every metric of them.

    Args:
        pair: From ``with_conditions``, like ``conditions``; the first is the unpatched base.
        questions: As in ``patch_prefix``; each group is reported apart.
        detectors: What is counted in the answers without a judge.
        pairs: Aligned and misaligned answers, of which the likelier one is found (no sampling).
        problems: Multiple-choice questions, of which the likeliest choice is found (no sampling).
        served: Servers that answer for unpatched conditions, by name; margins and choices are found
            here all the same.
        judge_with: An ``EndpointJudge`` or ``LocalJudge``; none by default.
        rubrics: What it judges.
        out: Folder; a stopped evaluation goes on there, and no judgement is asked for twice. Further
            arguments as in ``patch_prefix``.

    Raises:
        EmmechError: Questions, conditions or folder are refused, before any work.
        JudgeError: The judge had to stop; answers and judgements until then are saved.
    """
    folder = Path(out)
    names = [condition.name for condition in conditions]
    reference = {one.name: _made_from(one, names) for one in conditions}
    measures = [find_detector(name) for name in detectors]
    answers = run_conditions(
        pair,
        questions,
        conditions,
        Decoding(max_new_tokens, defaults.temperature(temperature, samples), samples=samples, seed=seed),
        kind="evaluate",
        settings={
            "conditions": names,
            "pairs": fingerprint([asdict(one) for one in pairs]),
            "problems": fingerprint([asdict(one) for one in problems]),
        },
        detector=detectors[0],
        batch_size=batch_size,
        out=folder / ANSWERS,
        progress=progress,
        served=served,
    )
    rows: list[Record] = []
    for measure in measures:
        values = [(one, measure(one["response"])) for one in answers.records]
        rows += _compared(measure.name, measure.unit, values, reference)
    if pairs:
        scored = kept(folder, MARGINS, lambda: margins(pair, pairs, conditions, progress=progress))
        group = {one.id: one.group for one in pairs}
        scored = [record | {"group": group[record["question_id"]]} for record in scored]
        rows += _compared("margin", "nats", [(one, one["margin"]) for one in scored], reference)
        prefers = [(one, float(one["margin"] > 0)) for one in scored]
        rows += _compared("prefers aligned", "rate", prefers, reference)
    if problems:
        chosen = kept(folder, CHOICES, lambda: choices(pair, problems, conditions, progress=progress))
        right = [(one | {"group": "all"}, one["right"]) for one in chosen]
        rows += _compared("capability", "rate", right, reference)
    if judge_with is not None:
        asked = processes().from_main(
            lambda: judge(answers.records, list(rubrics), judge_with, folder / JUDGED, progress=progress)
        )
        rows += _judged(metrics.join_judgements(asked), answers.records, reference)
    first = {key: value for key, value in answers.summary.items() if key not in ("conditions", "checks")}
    result = Evaluation(first | {"conditions": names, "rows": rows})
    if processes().is_main:
        result.save(folder)
    return result


def _judged(
    joined: Sequence[Record], answers: Sequence[Record], reference: Mapping[str, str]
) -> list[Record]:
    """The metrics that a judge's records allow; traits one by one."""
    group = {(one["question_id"], one["condition"]): one["group"] for one in answers}
    joined = [one | {"group": group[one["question_id"], one["condition"]]} for one in joined]
    wanted = dict(JUDGED_METRICS)
    for trait in dict.fromkeys(name for one in joined for name in one.get("traits") or {}):
        wanted[f"trait {trait}"] = ("score", partial(metrics.trait, name=trait))
    rows = []
    for name, (unit, value) in wanted.items():
        found = [(one, value(one)) for one in joined]
        if any(not isinstance(number, str) for _, number in found):
            rows += _compared(name, unit, found, reference)
    return rows


def _compared(
    metric: str,
    unit: str | None,
    values: Sequence[tuple[Record, float | int | str | None]],
    reference: Mapping[str, str],
) -> list[Record]:
    """A metric's row per group and condition, all groups together first where there are several.

    A text in place of a value says why it is missing.
    """
    cells: dict[tuple[str, str], list[tuple[str, float | int | str | None]]] = {}
    several = len({record["group"] for record, _ in values}) > 1
    for record, value in values:
        for group in (*((ALL,) if several else ()), record["group"]):
            cells.setdefault((group, record["condition"]), []).append((record["question_id"], value))
    rows = []
    for group in dict.fromkeys(group for group, _ in cells):
        mine = {name: cells[group, name] for name in reference if (group, name) in cells}
        numbers = {name: [_number(value) for _, value in cell] for name, cell in mine.items()}
        ids = {name: [question for question, _ in cell] for name, cell in mine.items()}
        known = {name for name, found in numbers.items() if any(value is not None for value in found)}
        tests: dict[str, Comparison] = {
            name: paired_comparison(numbers[name], ids[name], numbers[reference[name]], ids[reference[name]])
            for name in mine
            if reference[name] != name and {name, reference[name]} <= known
        }
        corrected = holm_corrected(tests) if tests else {}
        for name, cell in mine.items():
            row: Record = {"metric": metric, "unit": unit, "group": group, "condition": name}
            if name in known:
                row |= clustered_mean(numbers[name], ids[name], unit=unit).to_json()
                row["design"] = design_effect(numbers[name], ids[name]).text()
            row["missing"] = _reasons(cell)
            if name in corrected:
                test = corrected[name]
                row["versus"] = {
                    "condition": reference[name],
                    **test.difference.to_json(),
                    "p": test.p,
                    "p_holm": test.p_holm,
                    "text": test.text(),
                }
            rows.append(row)
    return rows


def _number(value: float | int | str | None) -> float | int | None:
    return None if isinstance(value, str) else value


def _reasons(cell: Sequence[tuple[str, Any]]) -> dict[str, int]:
    """How many values are missing, by reason."""
    found: dict[str, int] = {}
    for _, value in cell:
        if value is None or isinstance(value, str):
            found[value or "nothing to measure"] = found.get(value or "nothing to measure", 0) + 1
    return found


def _made_from(condition: Condition, names: Sequence[str]) -> str:
    """The condition that one is compared with: its model unpatched; of an unpatched one, the base."""
    if condition.source is not None:
        return condition.target
    is_variant = condition.target not in ("base", "finetuned")
    return "finetuned" if is_variant and "finetuned" in names else "base"


def _scale(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise EmmechError("gates=FOLDER@SCALE", f"got '{name}'", "Correct --with") from error
