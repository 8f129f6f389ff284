"""The Piggyback test: base, finetuned, every patch in both directions, and the controls.

    result = patch_prefix(pair, load_questions("questions.jsonl"), out="runs/mine")
    result.table()

Conditions: ``base``, ``finetuned``; ``repair:SEGMENT`` puts the base's K and V into the finetuned
model and ``induce:SEGMENT`` the finetuned's into the base. ``repair:postfix`` takes its donor from a
prompt without a query (the paper's), ``repair:postfix-same`` from the same question;
``repair:prompt`` patches all three segments from the same question. Controls: ``control:self`` (from
itself: nothing may change), ``control:noise``, ``control:shuffled`` and ``control:span`` (as many
query tokens as the prefix has).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from emmech import defaults
from emmech.chat import SEGMENTS, Segment
from emmech.data.questions import Question
from emmech.errors import EmmechError
from emmech.evaluation.detectors import detector as find_detector
from emmech.evaluation.statistics import clustered_mean, paired_difference
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.models.sides import SideName
from emmech.piggyback.patching import Condition, KVPatch, QuerySpan, ResidPatch
from emmech.piggyback.running import Job, as_questions, open_folder, render_rows, run
from emmech.piggyback.served import Served, ask_served, refuse_unservable
from emmech.reprs import of_table
from emmech.results import (
    SUMMARY,
    Record,
    fingerprint,
    read_json,
    read_responses,
    versions,
    write_json,
)
from emmech.sharding import processes

Direction = Literal["repair", "induce", "both"]


@dataclass(frozen=True)
class PatchingResult:
    """Every answer, and what they add up to."""

    summary: Mapping[str, Any]
    """Per condition and group: the metric with its 95% interval, differences, checks, provenance."""
    records: Sequence[Record]
    """One per question, condition and sample."""

    def frame(self) -> pd.DataFrame:
        """One row per condition and group: mean, low, high, n, difference to the unpatched model."""
        return pd.DataFrame(self.summary["conditions"])

    def table(self) -> None:
        """Print conditions by groups; of grafts, the share of each part too."""
        from rich.console import Console

        from emmech.report import results_table, shares_table

        Console().print(results_table(self.summary))
        if self.summary.get("shares"):
            Console().print(shares_table(self.summary))

    def _repr_html_(self) -> str:
        from emmech.report import results_table

        return of_table(results_table(self.summary))

    def figure(self) -> Any:
        """The plotly figure of the table."""
        from emmech.figures import condition_bars

        return condition_bars(self.summary)

    def save(self, folder: str | Path) -> Path:
        """Write ``summary.json`` and ``report.html`` beside the responses; returns the report."""
        from emmech.report import write_report

        write_json(Path(folder) / SUMMARY, self.summary)
        return write_report(folder, self.summary, self.records)

    @classmethod
    def load(cls, folder: str | Path) -> "PatchingResult":
        """The result in a finished run folder."""
        return cls(read_json(Path(folder) / SUMMARY), read_responses(folder))


def patch_prefix(
    pair: ModelPair,
    questions: Iterable[Any],
    *,
    segments: Sequence[Segment] = SEGMENTS,
    direction: Direction = "both",
    controls: bool = True,
    detector: str = defaults.DETECTOR,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    temperature: float | None = None,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    query_span: QuerySpan = "all",
    out: str | Path | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Run the Piggyback test on ``questions``.

    Args:
        pair: From ``load_pair``.
        questions: Texts, chats (lists of messages) or records from ``load_questions``.
        segments: Which of prefix, query and postfix to patch.
        direction: Repair the finetuned model, induce in the base, or both.
        controls: Also run the controls.
        detector: What is counted in the answers; see ``emmech.evaluation.detectors``.
        max_new_tokens: Answer length.
        temperature: 0 is greedy; by default 0 for one sample and 1 for several. ``top_p`` bounds the
            nucleus.
        samples: Answers per question and condition.
        seed: Of sampling and of the random controls.
        batch_size: Questions per batch; by default as many as half of the free memory holds.
        query_span: Patch the whole query, or as many of its tokens as the prefix has.
        out: Folder for responses, summary and report; a stopped run continues there.
        progress: Show a progress bar.

    Raises:
        EmmechError: The questions, the folder or the conditions are refused, before any work.
    """
    conditions = default_conditions(segments, direction, controls=controls, query_span=query_span)
    settings = {"segments": list(segments), "direction": direction, "controls": controls}
    return run_conditions(
        pair,
        questions,
        conditions,
        Decoding(max_new_tokens, defaults.temperature(temperature, samples), top_p, samples, seed),
        kind="patch-prefix",
        settings=settings | {"query_span": query_span},
        detector=detector,
        batch_size=batch_size,
        out=out,
        progress=progress,
    )


def patch_resid(
    pair: ModelPair,
    questions: Iterable[Any],
    *,
    layers: Sequence[int] | None = None,
    segments: Sequence[Segment] = ("prefix",),
    direction: Literal["repair", "induce"] = "repair",
    detector: str = defaults.DETECTOR,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Patch the residual stream after one block at a time, and run on (arXiv 2606.06667, s4.2).

    Args and raises as in ``patch_prefix``; ``layers`` are all blocks by default. Conditions are
    called ``repair:resid-L``.
    """
    source: SideName = "base" if direction == "repair" else "finetuned"
    chosen = range(pair.base.config.num_hidden_layers) if layers is None else layers
    conditions = [Condition("base", "base"), Condition("finetuned", "finetuned")]
    for layer in chosen:
        patch = ResidPatch(tuple(segments), source, layer)
        conditions.append(Condition(f"{direction}:resid-{layer}", pair.other(source), resid=patch))
    return run_conditions(
        pair,
        questions,
        conditions,
        Decoding(max_new_tokens, defaults.temperature(None, samples), samples=samples, seed=seed),
        kind="patch-resid",
        settings={"segments": list(segments), "direction": direction, "layers": list(chosen)},
        detector=detector,
        batch_size=batch_size,
        out=out,
        progress=progress,
    )


def default_conditions(
    segments: Sequence[Segment],
    direction: Direction,
    *,
    controls: bool,
    query_span: QuerySpan = "all",
) -> list[Condition]:
    """The rows of the Piggyback test, in the order they are shown."""
    unknown = [s for s in segments if s not in SEGMENTS]
    if unknown or not segments:
        raise EmmechError(f"segments among {', '.join(SEGMENTS)}", f"got {list(segments)}", "Correct it")
    if direction not in ("repair", "induce", "both"):
        raise EmmechError("a direction repair, induce or both", f"got '{direction}'", "Correct it")
    conditions = [Condition("base", "base"), Condition("finetuned", "finetuned")]
    ways: list[tuple[str, SideName, SideName]] = [
        ("repair", "finetuned", "base"),
        ("induce", "base", "finetuned"),
    ]
    for way, target, source in ways:
        if direction in (way, "both"):
            for name, patch in _segment_patches(segments, source, query_span):
                conditions.append(Condition(f"{way}:{name}", target, (patch,)))
    if controls:
        everything = tuple(segments)
        conditions += [
            Condition("control:self", "finetuned", (KVPatch(everything, "finetuned"),)),
            Condition("control:noise", "finetuned", (KVPatch(("prefix",), "base", "noise"),)),
            Condition("control:shuffled", "finetuned", (KVPatch(("prefix",), "base", "shuffled"),)),
            Condition(
                "control:span",
                "finetuned",
                (KVPatch(("query",), "base", query_span="prefix-length"),),
            ),
        ]
    return conditions


def _segment_patches(
    segments: Sequence[Segment], source: SideName, query_span: QuerySpan
) -> Iterable[tuple[str, KVPatch]]:
    for segment in SEGMENTS:
        if segment not in segments:
            continue
        if segment == "postfix":
            yield "postfix", KVPatch(("postfix",), source, "empty")
            yield "postfix-same", KVPatch(("postfix",), source)
        else:
            yield segment, KVPatch((segment,), source, query_span=query_span)
    if set(segments) == set(SEGMENTS):
        yield "prompt", KVPatch(SEGMENTS, source)


def run_conditions(
    pair: ModelPair,
    questions: Iterable[Any],
    conditions: Sequence[Condition],
    decoding: Decoding,
    *,
    kind: str,
    settings: Mapping[str, Any],
    detector: str,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    served: Mapping[str, Served] | None = None,
) -> PatchingResult:
    """Answers to ``questions`` under any conditions, summarised; ``patch_prefix`` with your own rows.

    ``kind`` and ``settings`` describe the run: they are recorded, and a folder is only continued
    with the same ones. ``served`` says which unpatched conditions a server answers for (then ``out``
    is needed).
    """
    served = dict(served or {})
    refuse_unservable(conditions, served, pair.chat)
    if served:
        settings = {**settings, "served": {name: one.describe() for name, one in served.items()}}
    measure = find_detector(detector)  # an unknown one is refused before any work
    asked = as_questions(questions)
    rows = render_rows(pair, asked, decoding.max_new_tokens)
    arguments = run_arguments(kind, pair, asked, decoding, batch_size, settings)
    folder = open_folder(out, arguments)
    if served:
        assert folder is not None
        processes().from_main(lambda: ask_served(rows, served, decoding, pair.chat, folder, progress))
    records, checks = run(
        pair,
        [Job(tuple(rows), tuple(conditions))],
        decoding,
        batch_size=batch_size,
        folder=folder,
        progress=progress,
    )
    records = in_order(records, [c.name for c in conditions], asked)
    summary = {
        **arguments,
        "notes": list(pair.notes),
        "n_questions": len(asked),
        "labelled_prompt": rows[0].prompt.as_records(),
        **summarise(records, conditions, measure),
        "checks": {c.name: check for c in conditions if (check := _check(c.name, checks))},
    }
    result = PatchingResult(summary, records)
    if out is not None and processes().is_main:
        result.save(out)
    return result


def run_arguments(
    kind: str,
    pair: ModelPair,
    questions: Sequence[Question],
    decoding: Decoding,
    batch_size: int | None,
    settings: Mapping[str, Any],
) -> Record:
    """What defines a run: recorded with its results, and compared before it is continued."""
    return {
        "kind": kind,
        **settings,
        "decoding": asdict(decoding),
        "batch_size": batch_size or "auto",
        "questions": questions_fingerprint(questions),
        "provenance": dict(pair.provenance),
        "versions": versions(),
    }


def questions_fingerprint(questions: Sequence[Question]) -> str:
    """A hash of ids, texts and groups."""
    return fingerprint([[question.id, question.chat, question.group] for question in questions])


def in_order(
    records: Iterable[Record], conditions: Sequence[str], questions: Sequence[Question]
) -> list[Record]:
    """Records by condition, then question, then sample."""
    at = {name: number for number, name in enumerate(conditions)}
    asked = {question.id: number for number, question in enumerate(questions)}
    return sorted(records, key=lambda r: (at[r["condition"]], asked[r["question_id"]], r["row"], r["sample"]))


def summarise(records: Sequence[Record], conditions: Sequence[Condition], measure: Any) -> Record:
    """The metric per condition and group, with intervals over questions and paired differences.

    A patch is compared with its unpatched model where that was run too.
    """
    values = {id(record): measure(record["response"]) for record in records}
    groups = list(dict.fromkeys(record["group"] for record in records))
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        cells.setdefault((record["condition"], record["group"]), []).append(record)
    rows = []
    for condition in conditions:
        for group in groups:
            cell = cells[condition.name, group]
            row = {
                "condition": condition.name,
                "target": condition.target,
                "group": group,
                "n_questions": len({r["question_id"] for r in cell}),
                "n_answers": len(cell),
                "mean_new_tokens": sum(r["n_new_tokens"] for r in cell) / len(cell),
            }
            if measure.unit is not None:
                mine = [values[id(r)] for r in cell]
                row |= clustered_mean(mine, [r["question_id"] for r in cell], unit=measure.unit).to_json()
                if condition.source is not None and (condition.target, group) in cells:
                    twin = [values[id(r)] for r in cells[condition.target, group]]
                    difference = paired_difference(mine, twin, [r["question_id"] for r in cell])
                    row["versus_" + condition.target] = difference.to_json()
            rows.append(row)
    summary: Record = {"detector": measure.name, "unit": measure.unit, "conditions": rows}
    by_name = {name: [r for r in records if r["condition"] == name] for name in ("finetuned", "control:self")}
    if by_name["control:self"]:
        summary["self_patch_identical"] = all(
            a["response"] == b["response"]
            for a, b in zip(by_name["finetuned"], by_name["control:self"], strict=True)
        )
    return summary


def _check(name: str, checks: Sequence[Record]) -> Record | None:
    """The manipulation check of a condition over all of its batches."""
    mine = [check for check in checks if check["condition"] == name]
    if not mine:
        return None
    numerator, denominator = (
        [sum(values) for values in zip(*(c[part] for c in mine), strict=True)]
        for part in ("numerator", "denominator")
    )
    n_patched = sum(c["n_patched"] for c in mine)
    seen = [sum(values) for values in zip(*(c["n_visible"] for c in mine), strict=True)]
    return {
        # By layer: how far the last prompt token moved towards the donor's model, 0 to 1.
        "restored": [n / d if d > 0 else None for n, d in zip(numerator, denominator, strict=True)],
        # The least, over layers, of the share of patched slots still in the cache (sliding windows).
        "visible": min(seen) / n_patched if seen and n_patched else None,
        "patched_tokens_per_prompt": n_patched / sum(c["n_prompts"] for c in mine),
    }
