"""Which tokens need the finetuned weights: a behaviour under every choice of parts of the chat.

    result = graft_parts(pair, load_questions("questions.jsonl"), out="runs/grafts")
    result.table()

Conditions: ``base`` (no part), ``finetuned`` (all parts) and ``graft:PART+PART`` for every choice between
them, so that each part is tried both alone and as the only one left out. Over all choices, the change
from base to finetuned is shared out among the parts: a part's share is what it adds, averaged over
the orders in which parts can be grafted (Shapley 1953); shares add up to the change.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path
from statistics import mean
from typing import Any

from emmech import defaults
from emmech.chat import PARTS
from emmech.errors import PatchError
from emmech.evaluation.detectors import Detector
from emmech.evaluation.detectors import detector as find_detector
from emmech.evaluation.statistics import bootstrap_mean, paired_difference
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.piggyback.experiment import PatchingResult, run_conditions
from emmech.piggyback.grafting import PLACES, graft_name, graft_side, graft_sites
from emmech.piggyback.patching import Condition
from emmech.results import Record

Subset = tuple[str, ...]
Values = Mapping[tuple[str, str], Mapping[str, float | int | None]]
"""By group and condition, a number per question."""
_WHOLE = ({*PARTS}, {*PLACES} - {"postfix"})
"""Parts that make up a chat."""


def graft_parts(
    pair: ModelPair,
    questions: Iterable[Any],
    *,
    parts: Sequence[str] = PARTS,
    subsets: Sequence[Sequence[str]] | None = None,
    detector: str = defaults.DETECTOR,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Answers of the base, of the finetuned model, and of both joined token by token.

    Args:
        pair: From ``load_pair``.
        questions: As in ``patch_prefix``.
        parts: What can be grafted: among ``grafting.PLACES``, without overlap.
        subsets: The choices of ``parts`` that are run; by default all, which shares need.
        detector: And all further arguments as in ``patch_prefix``.

    Raises:
        PatchError: Unknown or overlapping parts, or models that cannot be grafted.
        EmmechError: Questions or folder are refused, before any work.
    """
    measure = find_detector(detector)
    chosen = _chosen(parts, subsets)
    sites = graft_sites(pair)
    sides = {_name(subset): graft_side(pair, subset, sites) for subset in chosen}
    names = ["base", "finetuned", *(name for name in sides if name not in ("base", "finetuned"))]
    result = run_conditions(
        replace(pair, variants={name: sides[name] for name in names[2:]}),
        questions,
        [Condition(name, name) for name in names],
        Decoding(max_new_tokens, defaults.temperature(None, samples), samples=samples, seed=seed),
        kind="graft",
        settings={"parts": list(parts), "subsets": [list(subset) for subset in chosen]},
        detector=detector,
        batch_size=batch_size,
        out=out,
        progress=progress,
    )
    summary = dict(result.summary)
    if measure.unit is not None:
        values = _by_question(result.records, measure)
        summary["conditions"] = [
            row | _versus_base(values, row["group"], row["condition"]) for row in summary["conditions"]
        ]
        summary["shares"] = shares(values, chosen[-1]) if len(chosen) == 2 ** len(parts) else []
    result = replace(result, summary=summary)
    if out is not None:
        result.save(out)
    return result


def _chosen(parts: Sequence[str], subsets: Sequence[Sequence[str]] | None) -> list[Subset]:
    """The subsets to run, each in the order of ``parts``, smaller ones first.

    Raises:
        PatchError: There is no part, an unknown one, or one that is contained in another.
    """
    known = [part for part in PLACES if part in parts]
    overlap = "postfix" in known and {"postfix-rest", "last"} & {*known}
    if not known or len(known) != len(parts) or overlap:
        raise PatchError(
            f"parts among {', '.join(PLACES)}, each token in one of them at most",
            f"got {list(parts)}",
            "Correct them; postfix is postfix-rest and last",
        )
    every = [subset for size in range(len(known) + 1) for subset in combinations(known, size)]
    if subsets is None:
        return every
    wanted = [{*subset} for subset in subsets]
    if not all(one <= {*known} for one in wanted):
        raise PatchError(f"subsets of {', '.join(known)}", f"got {subsets}", "Correct them")
    return [subset for subset in every if {*subset} in wanted]


def _name(subset: Subset) -> str:
    """No part is the base, and the whole chat the finetuned model."""
    if {*subset} in _WHOLE:
        return "finetuned"
    return graft_name(subset) if subset else "base"


def _by_question(records: Sequence[Record], measure: Detector) -> Values:
    """The mean over a question's answers, by group, condition and question; None where one is missing."""
    answers: dict[tuple[str, str], dict[str, list[float | int | None]]] = {}
    for record in records:
        cell = answers.setdefault((record["group"], record["condition"]), {})
        cell.setdefault(record["question_id"], []).append(measure(record["response"]))
    return {
        key: {question: None if None in found else mean(found) for question, found in cell.items()}
        for key, cell in answers.items()
    }


def _versus_base(values: Values, group: str, name: str) -> Record:
    """The difference to the base, for any other condition."""
    if name == "base":
        return {}
    mine, base = values[group, name], values[group, "base"]
    difference = paired_difference(list(mine.values()), [base[question] for question in mine], list(mine))
    return {"versus_base": difference.to_json()}


def shares(values: Values, parts: Subset) -> list[Record]:
    """Per group and part: its effect ``alone``, when it is the only one ``left_out``, and its ``share``.

    Each with a 95% interval over the questions that have a value under every condition. The share
    is its Shapley value: the sum over the choices S of other parts of |S|! (k - |S| - 1)! / k! times
    the change from S to S with the part.

    Args:
        values: By group and condition, a value per question; a condition per subset of ``parts``.
        parts: All parts.
    """
    rows: list[Record] = []
    for group in dict.fromkeys(group for group, _ in values):
        found = {name: cell for (of, name), cell in values.items() if of == group}
        questions = [q for q in found["base"] if all(cell[q] is not None for cell in found.values())]
        for part in parts:
            others = [other for other in parts if other != part]
            steps: dict[Subset, list[float | int]] = {}
            for subset in (s for size in range(len(parts)) for s in combinations(others, size)):
                grown = tuple(one for one in parts if one in subset or one == part)
                after, before = found[_name(grown)], found[_name(subset)]
                steps[subset] = [after[q] - before[q] for q in questions]
            weights = {s: 1 / (len(parts) * comb(len(others), len(s))) for s in steps}
            share = [sum(weights[s] * steps[s][at] for s in steps) for at in range(len(questions))]
            measured = {"alone": steps[()], "left_out": steps[tuple(others)], "share": share}
            row: Record = {"group": group, "part": part}
            for name, numbers in measured.items():
                row[name] = bootstrap_mean(numbers, questions, seed=0).to_json() if questions else None
            rows.append(row)
    return rows
