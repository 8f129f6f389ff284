"""Run conditions over questions: batches, decoding, records on disk, back-off, progress, resume.

A unit is one batch under one condition. The plan of batches depends only on the arguments, and a
stopped run redoes units whole, so killed and continued it ends with the records of an unbroken run.
Several processes share the units; their records are those of one process, in the same order.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from emmech.chat import Prompt
from emmech.data.questions import Question
from emmech.errors import ChatError, DataError, PatchError
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import (
    Decoding,
    Limits,
    auto_limits,
    decode,
    out_of_memory,
    plan_batches,
)
from emmech.models.kv_cache import visible_share
from emmech.piggyback.patching import (
    Bench,
    Condition,
    PatchedBatch,
    refuse_impossible,
    restored_share,
)
from emmech.results import Record, RunFolder
from emmech.sharding import processes

Made = tuple[list[Record], Record | None]
"""The records of a unit, and its manipulation check."""


@dataclass(frozen=True)
class Row:
    """One prompt to answer, and what its records say about it."""

    question: Question
    prompt: Prompt
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further record fields that tell rows of one question apart, such as the trial."""

    @property
    def name(self) -> str:
        """A name that seeds the row's random draws."""
        return "/".join([self.question.id, *(str(value) for value in self.extra.values())])


@dataclass(frozen=True)
class Job:
    """Rows to run under each of some conditions.

    Where a run has both unpatched models among its conditions, every patched unit is checked against
    them: how far the patch moved the last prompt token, and how much of it the cache still holds.
    """

    rows: tuple[Row, ...]
    conditions: tuple[Condition, ...]


def as_questions(questions: Iterable[Any]) -> list[Question]:
    """Questions from texts, chats (lists of messages) or ``Question`` records."""
    made = []
    for number, given in enumerate(questions, start=1):
        if isinstance(given, Question):
            made.append(given)
        else:
            chat = given if isinstance(given, str) else tuple(given)
            made.append(Question(f"q{number:04d}", chat))
    if not made:
        raise DataError("at least one question", "there are none", "Pass a list of questions")
    return made


def render_rows(pair: ModelPair, questions: Sequence[Question], max_new_tokens: int) -> list[Row]:
    """Every question as a prompt.

    Raises:
        DataError: Some questions cannot be rendered, or do not fit in the context; all are listed.
    """
    rows, bad = [], []
    limit = getattr(pair.base.config, "max_position_embeddings", None)
    for question in questions:
        try:
            prompt = pair.chat.render(question.messages)
        except ChatError as error:
            bad.append(f"{question.id}: {error}")
            continue
        if limit and len(prompt) + max_new_tokens > limit:
            bad.append(f"{question.id}: {len(prompt)} tokens and {max_new_tokens} new ones")
        rows.append(Row(question, prompt))
    if bad:
        raise DataError(
            f"questions that render and fit in {limit} tokens",
            f"{len(bad)} of {len(questions)} do not: " + "; ".join(bad[:5]),
            "Shorten or remove them, or lower max_new_tokens",
        )
    return rows


def run(
    pair: ModelPair,
    jobs: Sequence[Job],
    decoding: Decoding,
    *,
    batch_size: int | None,
    folder: RunFolder | None,
    progress: bool = True,
) -> tuple[list[Record], list[Record]]:
    """All answers of all jobs, and a manipulation check for each patched unit (see ``Job``).

    Raises:
        PatchError: A condition is impossible on this model, or one row does not fit in memory.
    """
    for condition in {c.name: c for job in jobs for c in job.conditions}.values():
        refuse_impossible(pair, condition)
    ours = processes()
    todo = _units(pair, jobs, decoding, batch_size, folder)
    # The manipulation check compares with both unpatched runs: done where they are run anyway.
    unpatched = {c.target for job in jobs for c in job.conditions if c.source is None}
    checked = {"base", "finetuned"} <= unpatched
    done: dict[tuple, Made] = {}
    if folder is not None:
        done = ours.from_main(lambda: _resume(folder, todo, decoding, checked))
    mine = ours.share([unit for unit in todo if (unit[3].name, unit[0]) not in done])
    bench = Bench(pair, decoding.seed)
    done_before = sum(len(records) for records, _ in done.values())
    total = done_before + sum(len(rows) for _, rows, _, _ in mine) * decoding.samples
    bar = _Bar(total, done_before, progress and ours.is_main)
    made: dict[tuple, Made] = {}
    with bar:
        for key, rows, share, conditions in _by_batch(mine):
            for condition, records, check in _run_batch(
                bench, rows, share, conditions, decoding, checked, bar.tokens
            ):
                if check is not None:
                    check |= {"unit": key}
                if folder is not None:
                    folder.append(records, check)
                made[condition.name, key] = records, check
                bar.answers(len(records), condition.name)
    done |= ours.together(made)
    every = [done[condition.name, key] for key, _, _, condition in todo]
    records = [record for unit, _ in every for record in unit]
    checks = [check for _, check in every if check is not None]
    if folder is not None and (done_before or ours.count > 1):  # in the order of an unbroken run
        ours.from_main(lambda: folder.keep(records, checks))
    return records, checks


def open_folder(
    out: str | Path | None, arguments: Mapping[str, Any], *, lines: bool = True
) -> RunFolder | None:
    """The run folder ``out``, opened by the main process; the others get files of their own in it.

    Without ``lines`` it holds no responses.

    Raises:
        RunError: It cannot be written, or it holds a run with other arguments.
    """
    if out is None:
        return None
    ours = processes()
    folder = ours.from_main(lambda: RunFolder(out, arguments, lines=lines))
    folder.process = ours.rank
    return folder


def _units(
    pair: ModelPair,
    jobs: Sequence[Job],
    decoding: Decoding,
    batch_size: int | None,
    folder: RunFolder | None,
) -> list[tuple[str, list[Row], bool, Condition]]:
    """Every batch under every condition: (name of the batch, rows, layout, condition)."""

    def choose() -> Limits:
        free = auto_limits(pair.finetuned, decoding.samples) if batch_size is None else Limits(batch_size)
        if folder is None:
            return free
        return Limits(**folder.remember("limits", asdict(free)))

    limits = processes().from_main(choose)  # free memory differs from device to device and start to start
    units = []
    for number, job in enumerate(jobs):
        prompts = [row.prompt for row in job.rows]
        plans = plan_batches(prompts, pair.base.config, limits, decoding.max_new_tokens)
        for index, plan in enumerate(plans):
            rows = [job.rows[row] for row in plan.rows]
            units += [(f"{number}.{index}", rows, plan.share_prefix, c) for c in job.conditions]
    return units


def _by_batch(units: list[tuple[str, list[Row], bool, Condition]]) -> Iterable[tuple]:
    """Units of one batch together, so that its unpatched runs are done once."""
    batches: dict[str, tuple[list[Row], bool, list[Condition]]] = {}
    for key, rows, share, condition in units:
        batches.setdefault(key, (rows, share, []))[2].append(condition)
    for key, (rows, share, conditions) in batches.items():
        yield key, rows, share, conditions


def _resume(
    folder: RunFolder,
    units: list[tuple[str, list[Row], bool, Condition]],
    decoding: Decoding,
    checked: bool,
) -> dict[tuple, Made]:
    """Complete units of an earlier start, by (condition, batch); the rest is dropped from disk."""
    found: dict[tuple, Record] = {}
    for record in folder.records:
        found[record["condition"], record["row"], record["sample"]] = record
    checks = {(check["condition"], check["unit"]): check for check in folder.checks}
    done: dict[tuple, Made] = {}
    for key, rows, _, condition in units:
        wanted = [(condition.name, row.name, sample) for row in rows for sample in range(decoding.samples)]
        check = checks.get((condition.name, key))
        lacks_check = checked and condition.source is not None and check is None
        if all(one in found for one in wanted) and not lacks_check:
            done[condition.name, key] = [found[one] for one in wanted], check
    folder.keep(
        [record for records, _ in done.values() for record in records],
        [check for _, check in done.values() if check is not None],
    )
    return done


def _run_batch(
    bench: Bench,
    rows: Sequence[Row],
    share: bool,
    conditions: Sequence[Condition],
    decoding: Decoding,
    checked: bool,
    on_token: Any,
) -> Iterable[tuple[Condition, list[Record], Record | None]]:
    """Records of one batch under each condition; the batch is halved when memory runs out."""
    parts = [list(rows)]
    memo: dict[int, PatchedBatch] = {}
    for condition in conditions:
        while True:
            try:
                made = []
                for number, part in enumerate(parts):
                    if number not in memo:
                        if len(parts) > 1:
                            memo.clear()  # memory is short: hold one part's states at a time
                        memo[number] = bench.batch(
                            [row.prompt for row in part], [r.name for r in part], share_prefix=share
                        )
                    made.append(_run_unit(memo[number], part, condition, decoding, checked, on_token))
                break
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(parts) == len(rows):
                    raise PatchError(
                        "memory for one question at a time",
                        "it ran out even then",
                        "Lower max_new_tokens or samples, or use a smaller dtype or quantization",
                    ) from error
                parts = [half for part in parts for half in _halves(part)]
                memo.clear()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        records = [record for part, _ in made for record in part]
        yield condition, records, _summed([check for _, check in made if check is not None])


def _halves(rows: list[Row]) -> list[list[Row]]:
    middle = (len(rows) + 1) // 2
    return [half for half in (rows[:middle], rows[middle:]) if half]


def _run_unit(
    batch: PatchedBatch,
    rows: Sequence[Row],
    condition: Condition,
    decoding: Decoding,
    checked: bool,
    on_token: Any,
) -> tuple[list[Record], Record | None]:
    pair = batch.bench.pair
    start = batch.prefill(condition)
    check = None
    if checked and condition.source is not None:
        target, source = (batch.plain(pair.side(n))[0] for n in (condition.target, condition.source))
        numerator, denominator = restored_share(start.last_resid, target.last_resid, source.last_resid)
        patched = batch.patched_positions(condition)
        seen = visible_share(start.cache, patched, patched.shape[1])
        check = {
            "condition": condition.name,
            "numerator": numerator.tolist(),
            "denominator": denominator.tolist(),
            "n_patched": int(patched.sum()),
            "n_prompts": len(rows),
            "n_visible": [round(float(s) * int(patched.sum())) for s in seen],
        }
    with pair.side(condition.target).active() as module:
        answers = decode(module, start, decoding, [row.name for row in rows], pair.chat.end_ids, on_token)
    texts = pair.chat.tokenizer.batch_decode(answers, skip_special_tokens=True)
    records = []
    for number, (answer, text) in enumerate(zip(answers, texts, strict=True)):
        row, sample = rows[number // decoding.samples], number % decoding.samples
        records.append(
            {
                "question_id": row.question.id,
                "question": row.prompt.query,
                "group": row.question.group,
                "condition": condition.name,
                "sample": sample,
                "response": text.strip(),
                "n_new_tokens": len(answer),
                "row": row.name,
                **row.extra,
            }
        )
    return records, check


def _summed(checks: list[Record]) -> Record | None:
    if not checks:
        return None
    total = dict(checks[0])
    for name in ("numerator", "denominator", "n_visible"):
        total[name] = [sum(values) for values in zip(*(c[name] for c in checks), strict=True)]
    for name in ("n_patched", "n_prompts"):
        total[name] = sum(c[name] for c in checks)
    return total


class _Bar:
    """A progress bar over answers with tokens per second."""

    def __init__(self, total: int, done: int, shown: bool):
        self._bar = tqdm(total=total, initial=done, disable=not shown, unit="answer", dynamic_ncols=True)
        self._tokens, self._since = 0, time.monotonic()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def tokens(self, count: int) -> None:
        self._tokens += count

    def answers(self, count: int, condition: str) -> None:
        rate = self._tokens / max(time.monotonic() - self._since, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s, {condition}", refresh=False)
        self._bar.update(count)
