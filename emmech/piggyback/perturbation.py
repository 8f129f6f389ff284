"""Perturb the prompt's tokens: is the exact wording of the template what carries the behaviour?

The paper's test (arXiv 2606.06667, s4.1): in one segment, replace 10 random tokens, each by one of
its 5 nearest neighbours by dot product in the input embeddings; 10 independent trials per question.
``perturb:SEGMENT`` reports the average over trials and questions, and ``best``: the trial that shows
the behaviour least, averaged over questions. (With 10 tries, ``best`` falls by luck alone: compare
segments, never ``best`` with an unperturbed rate.) ``template:...`` conditions keep the tokens but
change the template: another system prompt, none, other white space, capitals. ``perturbed_margins`` is
the same test without answers to be judged: both given answers behind the perturbed prompt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from emmech import defaults
from emmech.chat import SEGMENTS, Segment
from emmech.data.bundled import AnswerPair
from emmech.errors import EmmechError
from emmech.evaluation.detectors import detector as find_detector
from emmech.evaluation.statistics import clustered_mean
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.models.sides import SideName
from emmech.piggyback.experiment import PatchingResult, in_order, run_arguments, summarise
from emmech.piggyback.margin import both_answers, margin_records
from emmech.piggyback.patching import Condition
from emmech.piggyback.perturbed_prompts import Neighbours, template_variants
from emmech.piggyback.running import Job, Row, as_questions, open_folder, render_rows, run
from emmech.results import Record
from emmech.sharding import processes


def perturb_prefix(
    pair: ModelPair,
    questions: Iterable[Any],
    *,
    segments: Sequence[Segment] = SEGMENTS,
    trials: int = defaults.TRIALS,
    n_tokens: int = defaults.N_TOKENS,
    n_neighbours: int = defaults.N_NEIGHBOURS,
    templates: bool = True,
    side: SideName = "finetuned",
    detector: str = defaults.DETECTOR,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Answers of one model to perturbed prompts.

    Args:
        pair: From ``load_pair``.
        questions: As in ``patch_prefix``.
        segments: Segments to perturb, one at a time.
        trials: Independent perturbations per question and segment.
        n_tokens: Tokens replaced in each (all of a shorter segment).
        n_neighbours: Candidates per token.
        templates: Also run the template-level variants.
        side: The model that answers.
        detector: What is counted; ``best`` is the trial with the least of it.
        max_new_tokens: Answer length; greedy.
        seed: Of positions and neighbours.
        batch_size: Prompts per batch, chosen by free memory by default.
        out: Folder for responses, summary and report; a stopped run continues there.
        progress: Show a progress bar.

    Raises:
        EmmechError: Unknown segments, counts below 1, or refused questions or folder.
    """
    _refuse(segments, trials=trials, n_tokens=n_tokens, n_neighbours=n_neighbours)
    measure = find_detector(detector)
    asked = as_questions(questions)
    rows = render_rows(pair, asked, max_new_tokens)
    decoding = Decoding(max_new_tokens, seed=seed)
    settings = {
        "segments": list(segments),
        "trials": trials,
        "n_tokens": n_tokens,
        "n_neighbours": n_neighbours,
        "templates": templates,
        "side": side,
    }
    arguments = run_arguments("perturb-prefix", pair, asked, decoding, batch_size, settings)
    folder = open_folder(out, arguments)
    jobs = [Job(tuple(rows), (Condition("base", "base"), Condition("finetuned", "finetuned")))]
    neighbours = Neighbours(pair, n_neighbours)
    for segment in segments:
        perturbed = [
            Row(
                row.question,
                neighbours.perturb(
                    row.prompt, segment, n_tokens, seed=seed, question_id=row.question.id, trial=trial
                ),
                {"trial": trial},
            )
            for row in rows
            for trial in range(trials)
        ]
        jobs.append(Job(tuple(perturbed), (Condition(f"perturb:{segment}", side),)))
    if templates:
        for name, prompts in template_variants(pair.chat, rows):
            changed = tuple(Row(r.question, p) for r, p in zip(rows, prompts, strict=True))
            jobs.append(Job(changed, (Condition(f"template:{name}", side),)))
    records, _ = run(pair, jobs, decoding, batch_size=batch_size, folder=folder, progress=progress)
    conditions = [condition for job in jobs for condition in job.conditions]
    records = in_order(records, [c.name for c in conditions], asked)
    summary = {
        **arguments,
        "notes": list(pair.notes),
        "n_questions": len(asked),
        "labelled_prompt": jobs[min(1, len(jobs) - 1)].rows[0].prompt.as_records(),
        **summarise(records, conditions, measure),
        "checks": {},
    }
    if measure.unit is not None:
        _add_best(summary["conditions"], records, measure)
    result = PatchingResult(summary, records)
    if out is not None and processes().is_main:
        result.save(out)
    return result


def perturbed_margins(
    pair: ModelPair,
    answers: Sequence[AnswerPair],
    *,
    segments: Sequence[Segment] = SEGMENTS,
    trials: int = defaults.TRIALS,
    n_tokens: int = defaults.N_TOKENS,
    n_neighbours: int = defaults.N_NEIGHBOURS,
    side: SideName = "finetuned",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[Record]:
    """Margins behind perturbed prompts: the records of ``margins``, each with its ``trial``.

    Args:
        answers: User texts with an aligned and a misaligned answer.
        side: The model that scores them.
        batch_size: Prompts per batch; by free memory by default.

    ``segments``, ``trials``, ``n_tokens``, ``n_neighbours`` and ``seed`` as in ``perturb_prefix``: the same
    question, segment and trial have the same tokens replaced.

    Raises:
        EmmechError: Unknown segments, or counts below 1.
        ChatError: A text cannot be rendered.
    """
    _refuse(segments, trials=trials, n_tokens=n_tokens, n_neighbours=n_neighbours)
    neighbours, plain = Neighbours(pair, n_neighbours), both_answers(pair, answers)
    records = []
    for segment in segments:
        for trial in range(trials):
            given = {"segment": segment, "n_tokens": n_tokens, "seed": seed, "trial": trial}
            both = [
                replace(one, prompt=neighbours.perturb(one.prompt, question_id=one.id, **given))
                for one in plain
            ]
            condition = Condition(f"perturb:{segment}", side)
            found = margin_records(pair, both, [condition], batch_size=batch_size, progress=progress)
            records += [record | {"trial": trial} for record in found]
    return records


def _refuse(segments: Sequence[Segment], **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise EmmechError(f"{name} of at least 1", f"got {value}", "Raise it")
    if not set(segments) <= set(SEGMENTS):
        raise EmmechError(f"segments among {', '.join(SEGMENTS)}", f"got {segments}", "Correct it")


def _add_best(rows: Sequence[Record], records: Sequence[Record], measure: Any) -> None:
    """Give each perturbation row ``best``: the least over trials, averaged over questions."""
    for row in rows:
        if not row["condition"].startswith("perturb:"):
            continue
        least: dict[str, float] = {}
        for record in records:
            if (record["condition"], record["group"]) == (row["condition"], row["group"]):
                value = measure(record["response"])
                if value is not None:
                    name = record["question_id"]
                    least[name] = min(value, least.get(name, value))
        if least:
            best = clustered_mean(list(least.values()), list(least), unit=measure.unit)
            row["best"] = best.to_json()
