"""The frontier: what each method learned on-topic against what spread off-topic, along training.

    compare_runs(["runs/sft-0", "runs/treft-0"], load_questions("refusal"), detector="refusal", out="runs/f")

Every saved step of every run answers the same questions, plain and with the base's prefix K/V patched
in. Runs that differ only in their seed are one method. Early stopping is the plain line of sft itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from emmech import defaults
from emmech.data.questions import Question
from emmech.errors import DataError, RunError
from emmech.evaluation.detectors import detector as find_detector
from emmech.evaluation.statistics import clustered_mean
from emmech.evaluation.tradeoff import Line, compare, rates
from emmech.models.checkpoints import ModelPair, load_pair, swap_adapter
from emmech.models.generation import Decoding
from emmech.piggyback.experiment import (
    PatchingResult,
    default_conditions,
    questions_fingerprint,
    run_conditions,
)
from emmech.piggyback.patching import Condition
from emmech.results import RUN, SUMMARY, Record, RunFolder, read_json, versions
from emmech.summarised import Summarised
from emmech.training.recipes import label
from emmech.training.saving import saved_steps

Patched = Literal["all", "sft", "none"]
PATCHED: tuple[Patched, ...] = ("all", "sft", "none")
PLAIN, REPAIR = "finetuned", "repair:prefix"
WITH_PATCH = " + prefix patch"
FRONTIER = "frontier.json"


@dataclass(frozen=True)
class FrontierResult(Summarised):
    """Methods along the frontier: one row per method."""

    FILE = FRONTIER
    ROWS = "methods"

    def figure(self) -> Any:
        """On-topic against off-topic rate, one line per method."""
        from emmech.figures import frontier_of_methods

        return frontier_of_methods(self.summary)

    def _table(self) -> Any:
        from emmech.report_frontier import frontier_table

        return frontier_table(self.summary)

    def _write_page(self, folder: str | Path) -> Path:
        from emmech.report_frontier import write_frontier

        return write_frontier(folder, self.summary)


@dataclass(frozen=True)
class _Run:
    """A folder that ``finetune`` wrote."""

    folder: Path
    record: Record
    method: str

    @property
    def seed(self) -> int:
        return self.record["recipe"]["seed"]

    @property
    def name(self) -> str:
        return f"{self.method} seed {self.seed}"


def compare_runs(
    runs: Sequence[str | Path],
    questions: Iterable[Question],
    *,
    detector: str,
    out: str | Path,
    steps: Sequence[int] | None = None,
    patched: Patched = "all",
    target: float = defaults.TARGET_RATE,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
) -> FrontierResult:
    """Evaluate saved steps of finetuning runs and compare their methods.

    Args:
        runs: Folders that ``finetune`` wrote, over one base; several seeds of a method are pooled.
        questions: With groups ``on-topic`` and ``off-topic``.
        detector: Tells whether an answer shows the behaviour; its unit must be a rate.
        out: Folder for answers and results; a stopped evaluation continues there.
        steps: Saved steps to evaluate; all by default.
        patched: Which runs are also evaluated under the base's prefix K/V.
        target: On-topic rate at which methods are compared.
        max_new_tokens: Answer length.
        batch_size: Questions per batch; by free memory by default.
        device: As in ``load_pair``; so is ``dtype``.
        progress: Show a progress bar.

    Raises:
        DataError: Groups are missing, the detector measures no rate, or the runs do not fit together.
        RunError: A folder holds no run, or the steps asked for were not saved.
    """
    measure = find_detector(detector)
    if measure.unit != "rate":
        raise DataError("a detector of a behaviour", f"'{detector}' measures no rate", "Choose another")
    asked = [question for question in questions if question.group in ("on-topic", "off-topic")]
    for group in ("on-topic", "off-topic"):
        if not any(question.group == group for question in asked):
            raise DataError(f"questions of group {group}", "there are none", "Add a group to the file")
    found = _read_runs(runs)
    decoding = Decoding(max_new_tokens)
    arguments = {
        "kind": "frontier",
        "runs": {run.name: run.record for run in found},
        "questions": questions_fingerprint(asked),
        "decoding": asdict(decoding),
        "patched": patched,
        "versions": versions(),
    }
    RunFolder(out, arguments, lines=False)
    asking = _Asking(asked, decoding, batch_size, {"device": device, "dtype": dtype})
    scores: dict[tuple[str, int, int], dict[str, float]] = {}
    points = [(run, step) for run in found for step in _steps(run, steps)]
    with tqdm(points, disable=not progress, unit="checkpoint", dynamic_ncols=True) as bar:
        for run, step in bar:
            bar.set_postfix_str(f"{run.name}, step {step}")
            place = Path(out) / "points" / run.name.replace(" ", "-") / f"step-{step}"
            conditions = _conditions(run, patched)
            result = asking.answers(run, step, conditions, place)
            for condition in conditions:
                method = run.method + (WITH_PATCH if condition.name == REPAIR else "")
                scores[method, run.seed, step] = {
                    record["question_id"]: measure(record["response"])
                    for record in result.records
                    if record["condition"] == condition.name
                }
        run, step = points[0]
        base = asking.answers(run, step, [Condition("base", "base")], Path(out) / "points" / "base")
    lines = _lines(scores, asked)
    summary = arguments | {
        "detector": detector,
        "target": target,
        "n_on_topic": int(lines[0].on_topic.shape[2]),
        "n_off_topic": int(lines[0].off_topic.shape[2]),
        "base": _rates_of(base, measure),
        "methods": _methods(lines, target),
    }
    result = FrontierResult(summary)
    result.save(out)
    return result


@dataclass
class _Asking:
    """The questions put to one checkpoint after another; the last pair is kept for the next."""

    questions: Sequence[Question]
    decoding: Decoding
    batch_size: int | None
    how: Mapping[str, str]
    pair: ModelPair | None = None

    def answers(self, run: _Run, step: int, conditions: Sequence[Condition], place: Path) -> PatchingResult:
        """Answers of one checkpoint, made only once."""
        if (place / SUMMARY).exists():
            return PatchingResult.load(place)
        folder = run.folder / f"step-{step}"
        self.pair = self.pair and swap_adapter(self.pair, folder)
        self.pair = self.pair or load_pair(run.record["base"], folder, **self.how)
        return run_conditions(
            self.pair,
            self.questions,
            conditions,
            self.decoding,
            kind="frontier",
            settings={"run": run.name, "step": step},
            detector="none",
            batch_size=self.batch_size,
            out=place,
            progress=False,
        )


def _read_runs(folders: Sequence[str | Path]) -> list[_Run]:
    """The runs with their methods named; refused unless they share base and data."""
    records = [(Path(folder), read_json(Path(folder) / RUN)) for folder in folders]
    if not records:
        raise DataError("at least one run", "there is none", "Pass folders that `emmech finetune` wrote")
    for folder, record in records:
        if record.get("kind") != "finetune":
            got = f"'{folder}' holds a run of another kind"
            raise RunError("a folder of `emmech finetune`", got, "Pass the folder of a finetune")
    first = records[0][1]
    for folder, record in records:
        for field in ("base", "data"):
            if record[field] != first[field]:
                raise DataError(
                    f"runs with one {field}", f"'{folder}' has {record[field]}, not {first[field]}",
                    "Compare them apart",
                )  # fmt: skip
    names = _method_names([record["recipe"] for _, record in records])
    runs = [_Run(folder, record, name) for (folder, record), name in zip(records, names, strict=True)]
    repeated = {run.name for run in runs if sum(other.name == run.name for other in runs) > 1}
    if repeated:
        raise DataError("runs of different seeds or settings", f"twice {', '.join(repeated)}", "Drop one")
    return runs


def _method_names(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The objective in short, and whatever else differs between runs of one objective."""
    names = []
    for recipe in recipes:
        name = label(recipe["objective"], recipe.get("gates"))
        kin = [other for other in recipes if label(other["objective"], other.get("gates")) == name]
        differing = [
            f"{key} {recipe[key]}"
            for key in recipe
            if key not in ("objective", "gates", "seed") and len({str(other.get(key)) for other in kin}) > 1
        ]
        names.append(" ".join([name, *differing]))
    return names


def _steps(run: _Run, wanted: Sequence[int] | None) -> list[int]:
    saved = [int(folder.name.rpartition("-")[2]) for folder in saved_steps(run.folder)]
    missing = sorted(set(wanted or ()) - set(saved))
    if missing or not saved:
        raise RunError(
            f"steps {', '.join(map(str, wanted or ['1 or more']))} in '{run.folder}'",
            f"it has {', '.join(map(str, saved)) or 'none'}",
            "Finish the run, or choose other --steps",
        )
    return saved if wanted is None else sorted(wanted)


def _conditions(run: _Run, patched: Patched) -> list[Condition]:
    name = run.record["recipe"]["objective"]["name"]
    wanted = {PLAIN} | ({REPAIR} if patched == "all" or (patched == "sft" and name == "sft") else set())
    every = default_conditions(("prefix",), "repair", controls=False)
    return [condition for condition in every if condition.name in wanted]


def _rates_of(result: PatchingResult, measure: Any) -> dict[str, Record]:
    """The metric by group, with its interval."""
    rows = {group: [r for r in result.records if r["group"] == group] for group in ("on-topic", "off-topic")}
    return {
        group: clustered_mean(
            [measure(record["response"]) for record in records],
            [record["question_id"] for record in records],
            unit="rate",
        ).to_json()
        for group, records in rows.items()
    }


def _lines(
    scores: Mapping[tuple[str, int, int], Mapping[str, float]], questions: Sequence[Question]
) -> list[Line]:
    """Scores as arrays, over the steps that all seeds of a method have, in the order of the questions."""
    on, off = ([q.id for q in questions if q.group == group] for group in ("on-topic", "off-topic"))
    lines = []
    for method in dict.fromkeys(method for method, _, _ in scores):
        seeds = sorted({seed for name, seed, _ in scores if name == method})
        by_seed = [{step for name, s, step in scores if (name, s) == (method, seed)} for seed in seeds]
        steps = tuple(sorted(set.intersection(*by_seed)))
        if not steps:
            raise DataError(f"a step that all seeds of {method} saved", "there is none", "Choose --steps")
        cells = [[scores[method, seed, step] for step in steps] for seed in seeds]
        on_topic, off_topic = (
            np.array([[[cell[name] for name in ids] for cell in row] for row in cells]) for ids in (on, off)
        )
        lines.append(Line(method, steps, on_topic, off_topic))
    return lines


def _methods(lines: Sequence[Line], target: float) -> list[Record]:
    """Everything shown about each method."""
    compared = compare(lines, target=target, baseline=_baseline(lines))
    methods = []
    for line, row in zip(lines, compared, strict=True):
        on, off = rates(line.on_topic), rates(line.off_topic)
        points = [
            {
                "step": step,
                "on_topic": asdict(on[k]) | {"n": line.on_topic[:, k].size},
                "off_topic": asdict(off[k]) | {"n": line.off_topic[:, k].size},
                "by_seed": [
                    [float(line.on_topic[s, k].mean()), float(line.off_topic[s, k].mean())]
                    for s in range(len(line.on_topic))
                ],
            }
            for k, step in enumerate(line.steps)
        ]
        methods.append(asdict(row) | {"points": points})
    return methods


def _baseline(lines: Sequence[Line]) -> str:
    """Early stopping, which is sft itself; else the first method."""
    names = [line.method for line in lines]
    return "sft" if "sft" in names else names[0]
