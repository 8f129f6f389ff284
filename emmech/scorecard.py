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

from torch import nn

from emmech import defaults
from emmech.data.bundled import AnswerPair, Problem
from emmech.data.wordings import PLAIN, wording_of
from emmech.errors import EmmechError
from emmech.evaluation import metrics
from emmech.evaluation.detectors import detector as find_detector
from emmech.evaluation.judges import judge
from emmech.evaluation.replies import Backend
from emmech.evaluation.significance import Comparison, holm_corrected, paired_comparison
from emmech.evaluation.statistics import clustered_mean, design_effect
from emmech.gates.files import load_gates
from emmech.gates.gate import Gating
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.models.sides import Intervention
from emmech.number_lists import parse_integers
from emmech.piggyback.arithmetic import sums
from emmech.piggyback.choice import choices
from emmech.piggyback.experiment import default_conditions, run_conditions
from emmech.piggyback.grafting import GRAFT, graft_side, parse_graft
from emmech.piggyback.margin import margins
from emmech.piggyback.patching import Condition
from emmech.piggyback.served import Served
from emmech.results import Record, fingerprint
from emmech.sharding import kept, processes
from emmech.steering.directions import Direction
from emmech.steering.steer import Steer, scaled_adapter
from emmech.summarised import Summarised

EVALUATION = "evaluation.json"
ANSWERS, JUDGED = "answers", "judged"
MARGINS, CHOICES, SUMS = "margins.json", "choices.json", "sums.json"
ALL = "all"
INTERVENTIONS = ("gates=FOLDER@SCALE", "steer=FILE:LAYERS@COEFF", "ablate=FILE:LAYERS", "adapter@SCALE")
"""What may be done to the finetuned model, or to the base alone."""
JUDGED_METRICS = {
    "alignment": ("score", metrics.alignment),
    "EM": ("rate", metrics.misaligned),
    "accepted": ("rate", metrics.accepted),
}
"""By rubrics ``alignment``, ``alignment`` with ``coherence``, and ``compliance``."""
Value = tuple[str, float | int | None]
"""A question's id and a number from one of its answers, None where it is missing."""


@dataclass(frozen=True)
class Evaluation(Summarised):
    """All conditions by all metrics: one row per metric, group and condition."""

    FILE = EVALUATION

    def _table(self) -> Any:
        from emmech.report_evaluation import evaluation_table

        return evaluation_table(self.summary)

    def _write_page(self, folder: str | Path) -> Path:
        from emmech.report_evaluation import write_evaluation

        return write_evaluation(folder, self.summary)


def with_conditions(
    pair: ModelPair, names: Sequence[str] = (), *, finetuned: bool = True
) -> tuple[ModelPair, list[Condition]]:
    """The pair and the conditions that ``names`` ask for, after the unpatched models.

    Args:
        pair: From ``load_pair``.
        names: A patch as in ``patch_prefix`` (``repair:prefix``, ``control:noise`` ...);
            ``graft:PART+PART``, the finetuned weights at these parts only; or something done to
            the finetuned model (to the base, where there is none): ``gates=FOLDER@SCALE``;
            ``steer=FILE:LAYERS@COEFF``, by default in the middle block; ``ablate=FILE:LAYERS``, by default in
            all; ``adapter@SCALE`` of a LoRA pair.
        finetuned: Whether the pair's finetuned side is evaluated at all.

    Raises:
        EmmechError: A name is none of these.
    """
    known = {
        one.name: one for one in default_conditions(("prefix", "query", "postfix"), "both", controls=True)
    }
    conditions = [known["base"], *([known["finetuned"]] if finetuned else [])]
    variants, provenance = dict(pair.variants), dict(pair.provenance)
    side = pair.finetuned if finetuned else pair.base
    for name in names:
        made = _intervention(name, pair.base.module)
        if made is not None:
            variants[name], provenance[name] = side.under(name, made[0]), made[1]
            conditions.append(Condition(name, name))
        elif name.startswith(GRAFT) and finetuned:
            variants[name] = graft_side(pair, parse_graft(name))
            conditions.append(Condition(name, name))
        elif name in known and (finetuned or name == "base"):
            conditions.append(known[name])
        else:
            raise EmmechError(
                f"conditions among {', '.join(known)}, {GRAFT}PART+PART, {', '.join(INTERVENTIONS)}",
                f"got '{name}'" + ("" if finetuned else " without a finetuned model"),
                "Correct --with",
            )
    return replace(pair, variants=variants, provenance=provenance), list(dict.fromkeys(conditions))


def _intervention(name: str, base: nn.Module) -> tuple[Intervention, Any] | None:
    """What a name of ``INTERVENTIONS`` does to a model, and how records know it; None for other names."""
    before, at, number = name.rpartition("@")
    what, _, rest = (before if at else name).partition("=")
    amount = _amount(number, name) if at else 1.0
    if what == "gates" and rest:
        gates = load_gates(rest, base)
        return Gating(gates, amount).on, gates.fingerprint()
    if what in ("steer", "ablate") and rest:
        file, layers = rest, ""
        if not Path(rest).exists():
            file, _, layers = rest.rpartition(":")
        direction = Direction.load(file or rest)
        n_layers = len(direction.vectors)
        every = range(n_layers) if what == "ablate" else (n_layers // 2,)
        chosen = tuple(parse_integers(layers, "--with") if layers else every)
        steer = Steer(direction, amount, chosen, "add" if what == "steer" else "ablate")
        return steer.on, direction.fingerprint()
    if what == "adapter" and at and not rest:
        return partial(scaled_adapter, scale=amount), amount
    return None


def evaluate(
    pair: ModelPair,
    questions: Iterable[Any],
    conditions: Sequence[Condition],
    *,
    detectors: Sequence[str] = defaults.DETECTORS,
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
        problems: Questions with one right answer: of several choices the likeliest is found (no sampling),
            a number is read from a short greedy answer.
        served: Servers that answer for unpatched conditions, by name; margins, choices and sums are
            found here all the same.
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
    reference = {one.name: made_from(one, names) for one in conditions}
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
        rows += compared(measure.name, measure.unit, values, reference)
    if pairs:
        scored = kept(folder, MARGINS, lambda: margins(pair, pairs, conditions, progress=progress))
        group = {one.id: one.group for one in pairs}
        scored = [record | {"group": group[record["question_id"]]} for record in scored]
        rows += compared("margin", "nats", [(one, one["margin"]) for one in scored], reference)
        prefers = [(one, float(one["margin"] > 0)) for one in scored]
        rows += compared("prefers aligned", "rate", prefers, reference)
    if any(one.choices for one in problems):
        chosen = kept(folder, CHOICES, lambda: choices(pair, problems, conditions, progress=progress))
        right = [(one | {"group": "all"}, one["right"]) for one in chosen]
        rows += compared("capability", "rate", right, reference)
    if any(not one.choices for one in problems):
        options: Record = {"batch_size": batch_size, "progress": progress}
        solved = kept(folder, SUMS, lambda: sums(pair, problems, conditions, **options))
        right = [(one | {"group": "all"}, one["right"]) for one in solved]
        rows += compared("arithmetic", "rate", right, reference)
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
            rows += compared(name, unit, found, reference)
    return rows


def compared(
    metric: str,
    unit: str | None,
    values: Sequence[tuple[Record, float | int | str | None]],
    reference: Mapping[str, str],
) -> list[Record]:
    """A metric's row per group and condition, all groups together first where there are several.

    A text in place of a value says why it is missing. Groups that are wordings of the same questions
    (``emmech.data.wordings``) are compared with the plain one.
    """
    cells = _cells(values)
    rows = []
    for group in dict.fromkeys(group for group, _ in cells):
        mine = {name: cells[group, name] for name in reference if (group, name) in cells}
        pairs = {name: (name, reference[name]) for name in mine if reference[name] != name}
        tests = _tested({name: (mine[a], mine[b]) for name, (a, b) in pairs.items()})
        for name, cell in mine.items():
            row: Record = {"metric": metric, "unit": unit, "group": group, "condition": name}
            numbers, ids = _columns(cell)
            if any(number is not None for number in numbers):
                row |= clustered_mean(numbers, ids, unit=unit).to_json()
                row["design"] = design_effect(numbers, ids).text()
            row["missing"] = _reasons(cell)
            if name in tests:
                row["versus"] = {"condition": reference[name], **_test_json(tests[name])}
            rows.append(row)
    return _against_plain(rows, cells)


Cell = list[tuple[str, float | int | str | None]]
"""A question's id and a value, or why there is none."""


def _cells(values: Sequence[tuple[Record, float | int | str | None]]) -> dict[tuple[str, str], Cell]:
    """The values by group and condition, all groups together first; wordings of a question share its id."""
    cells: dict[tuple[str, str], Cell] = {}
    several = len({record["group"] for record, _ in values}) > 1
    for record, value in values:
        question, group = record["question_id"], record["group"]
        for one in (*((ALL,) if several else ()), group):
            cells.setdefault((one, record["condition"]), []).append(
                (wording_of(question, group) or question, value)
            )
    return cells


def _against_plain(rows: list[Record], cells: Mapping[tuple[str, str], Cell]) -> list[Record]:
    """The rows, those of a changed wording with its difference from the plain one: ``wording``."""
    groups = {group for group, _ in cells}
    plain = next((group for group in PLAIN if group in groups), None)
    if plain is None:
        return rows
    for name in dict.fromkeys(row["condition"] for row in rows):
        others = {
            group: (cells[group, name], cells[plain, name])
            for group in groups - {plain, ALL}
            if {q for q, _ in cells[group, name]} == {q for q, _ in cells[plain, name]}
        }
        tests = _tested(others)
        for row in rows:
            if row["condition"] == name and row["group"] in tests:
                row["wording"] = {"group": plain, **_test_json(tests[row["group"]])}
    return rows


def _tested(pairs: Mapping[str, tuple[Cell, Cell]]) -> dict[str, Comparison]:
    """Paired comparisons of cells that hold numbers, corrected for their number (Holm)."""
    tests = {}
    for name, both in pairs.items():
        (mine, ids), (other, other_ids) = map(_columns, both)
        if all(any(number is not None for number in numbers) for numbers in (mine, other)):
            tests[name] = paired_comparison(mine, ids, other, other_ids)
    return holm_corrected(tests) if tests else {}


def _test_json(test: Comparison) -> Record:
    return {**test.difference.to_json(), "p": test.p, "p_holm": test.p_holm, "text": test.text()}


def _columns(cell: Cell) -> tuple[list[float | int | None], list[str]]:
    """Numbers, and the questions that they belong to."""
    return [_number(value) for _, value in cell], [question for question, _ in cell]


def _number(value: float | int | str | None) -> float | int | None:
    return None if isinstance(value, str) else value


def _reasons(cell: Sequence[tuple[str, Any]]) -> dict[str, int]:
    """How many values are missing, by reason."""
    found: dict[str, int] = {}
    for _, value in cell:
        if value is None or isinstance(value, str):
            found[value or "nothing to measure"] = found.get(value or "nothing to measure", 0) + 1
    return found


def made_from(condition: Condition, names: Sequence[str]) -> str:
    """The condition that one is compared with: its model unpatched; of an unpatched one, the base."""
    if condition.source is not None:
        return condition.target
    is_variant = condition.target not in ("base", "finetuned")
    return "finetuned" if is_variant and "finetuned" in names else "base"


def _amount(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise EmmechError("a number behind @", f"got '{name}'", "Correct --with") from error
