"""Answers judged by a language model: `judge(answers, rubrics, backend, out) -> records`.

A backend (`EndpointJudge`, `LocalJudge`) gives one judgement for each rubric and each different pair
of question and answer. A judgement is on disk as soon as it arrives; a later run asks for what is
missing only. Nothing is dropped: replies that are no score, refusals and failures are records too.

In the folder: `judge-cache.jsonl` (a line per judgement, by rubric, judge, question and answer),
`judge-failures.jsonl` (a log of what failed, asked for again by the next run), `judgements.jsonl`
(the records, a line per answer and rubric) and `judgements.json` (counts, means, what was spent).

Usage:
    judge("runs/demo", "alignment", EndpointJudge("gpt-4.1-mini"), "runs/demo")
    judge("runs/demo", ["alignment", "trait:flatters the user"], LocalJudge(), "runs/demo")
"""

import json
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emmech.completions import Retrying as Retrying
from emmech.errors import RunError
from emmech.evaluation.endpoint_judge import Budget as Budget
from emmech.evaluation.endpoint_judge import EndpointJudge as EndpointJudge
from emmech.evaluation.local_judge import LocalJudge as LocalJudge
from emmech.evaluation.replies import MIN_MASS, STATUSES, Asked, Backend, JudgeError, Judgement, Number
from emmech.evaluation.rubrics import Rubric, rubric
from emmech.results import (
    Record,
    append_line,
    keep_lines,
    read_json,
    read_lines,
    read_responses,
    replace_text,
    write_json,
)

CACHE, FAILURES = "judge-cache.jsonl", "judge-failures.jsonl"
JUDGEMENTS, SUMMARY = "judgements.jsonl", "judgements.json"
Answers = str | Path | Sequence[Mapping[str, Any]]


def judge(
    answers: Answers,
    rubrics: str | Path | Rubric | Sequence[str | Path | Rubric],
    backend: Backend,
    out: str | Path,
    *,
    progress: bool = True,
) -> list[Record]:
    """One record per answer and rubric, in the order of the answers.

    A record has `question_id`, `condition`, `sample`, `question`, `answer`, `rubric`,
    `rubric_hash`, `judge`, `value` (None unless scored), `status`, `raw`, `mass`, `reading`,
    `probabilities` and `reason`, as in `Judgement`. `judgements.jsonl` keeps the records of other
    judges and rubrics in the folder and replaces those of the same.

    Args:
        answers: A run folder, a file, or records with `question` and `response` (or `answer`) and,
            if they have them, `question_id`, `condition` and `sample`.
        rubrics: One or several: bundled names, `trait:DESCRIPTION`, files, or a `Rubric`.
        backend: Who judges.
        out: Folder for cache and records; the run folder itself will do.
        progress: Show the estimate and a progress bar.

    Raises:
        JudgeError: There are no answers to judge, or the judge had to stop: no server, a refused
            key, the spend cap. What was judged until then is saved.
        RubricError: A rubric is unknown.
        RunError: The folder cannot be written.
    """
    wanted = [rubrics] if isinstance(rubrics, str | Path | Rubric) else list(rubrics)
    loaded = list(dict.fromkeys(map(rubric, wanted)))
    if not loaded:
        raise JudgeError("a rubric", "there is none", "Pass rubrics, such as 'alignment'")
    named = read_answers(answers)
    folder = _Folder(Path(out), backend.id)
    rows = [(one, Asked(text, one["question"], one["answer"])) for text in loaded for one in named]
    todo = [asked for asked in dict.fromkeys(asked for _, asked in rows) if folder.of(asked) is None]
    todo.sort(key=folder.failed_before)  # last, so that they hold up no others
    estimate = backend.estimate(todo) if todo else {}
    if progress and todo:
        told = ", ".join(f"{name} {value}" for name, value in estimate.items())
        tqdm.write(f"{len(rows)} judgements, {len(todo)} to make: {told}", file=sys.stderr)
    with tqdm(total=len(todo), disable=not progress, unit="judgement") as bar:

        def done(asked: Asked, judgement: Judgement) -> None:
            folder.add(asked, judgement)
            bar.update()

        try:
            if todo:
                backend.run(todo, done, folder.spent)
        finally:
            records = [_record(one, asked, j, backend.id) for one, asked in rows if (j := folder.of(asked))]
            about = {**backend.describe(), "estimate": estimate} if todo else {}
            folder.write(records, loaded, len(rows), about)
    if n_failed := sum(record["status"] == "failed" for record in records):
        warnings.warn(
            f"{n_failed} of {len(records)} judgements failed and have no value: see "
            f"{folder.path / FAILURES}; another run tries them again",
            stacklevel=2,
        )
    return records


def read_answers(answers: Answers) -> list[Record]:
    """Answers as `question_id`, `condition`, `sample`, `question` and `answer`.

    Without an id the question stands for itself; without a number, samples of a question under a
    condition are counted as they come.

    Raises:
        JudgeError: There are none, or one lacks a question or answer.
    """
    if isinstance(answers, str | Path):
        answers = _read(Path(answers))
    counted: Counter = Counter()
    named, wrong = [], []
    for number, given in enumerate(answers, 1):
        question = given.get("question")
        answer = given.get("response", given.get("answer"))
        if not isinstance(question, str) or not isinstance(answer, str):
            wrong.append(f"answer {number} has the fields {', '.join(map(str, given))}")
            continue
        name = (str(given.get("question_id") or question), str(given.get("condition") or ""))
        sample = given.get("sample")
        counted[name] += 1
        named.append(
            {
                "question_id": name[0],
                "condition": name[1],
                "sample": int(sample) if sample not in (None, "") else counted[name] - 1,
                "question": question,
                "answer": answer,
            }
        )
    if wrong or not named:
        raise JudgeError(
            "answers with the texts `question` and `response` (or `answer`)",
            f"{len(wrong)} lack one: {wrong[0]}" if wrong else "there are none",
            "Point to a finished run, or name the fields so",
        )
    return named


def _read(path: Path) -> list[Record]:
    if path.is_dir():
        return read_responses(path)
    from emmech.data.rows import BadRow, read_rows

    rows = read_rows(path, what="answer", keys=("question", "response", "answer"))
    if bad := [f"line {line}: {row}" for line, row in rows if isinstance(row, BadRow)]:
        raise JudgeError(f"readable rows in {path}", bad[0], "Mend the file")
    return [dict(row) for _, row in rows if not isinstance(row, BadRow)]


@dataclass
class _Folder:
    """The judgements of one judge in a folder, and what all of them have cost."""

    path: Path
    judge: str
    spent: Number = 0.0
    _known: dict[str, Judgement] = field(default_factory=dict)
    _failed: dict[str, Judgement] = field(default_factory=dict)
    _failed_before: set[str] = field(default_factory=set)

    def __post_init__(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in (CACHE, FAILURES):
                with (self.path / name).open("a"):
                    pass
                keep_lines(self.path / name, lambda _: True)  # a line that a kill broke off is gone
        except OSError as error:
            raise RunError(
                f"a folder to write judgements in at '{self.path}'",
                f"it cannot be written ({error.strerror})",
                "Choose another out, or change its permissions",
            ) from error
        fields = Judgement.__dataclass_fields__
        for line in read_lines(self.path / CACHE):
            self.spent += line["cost"]
            if line["judge"] == self.judge:
                self._known[line["key"]] = Judgement(**{k: v for k, v in line.items() if k in fields})
        for line in read_lines(self.path / FAILURES):
            self.spent += line["cost"]
            self._failed_before.add(line["key"])

    def of(self, asked: Asked) -> Judgement | None:
        key = asked.key(self.judge)
        return self._known.get(key) or self._failed.get(key)

    def failed_before(self, asked: Asked) -> bool:
        return asked.key(self.judge) in self._failed_before

    def add(self, asked: Asked, judgement: Judgement) -> None:
        """Keep a judgement; it is on disk when this returns."""
        key = asked.key(self.judge)
        failed = judgement.status == "failed"
        line = {"key": key, "rubric_hash": asked.rubric.hash, "judge": self.judge, **asdict(judgement)}
        append_line(self.path / (FAILURES if failed else CACHE), line)
        (self._failed if failed else self._known)[key] = judgement
        self.spent += judgement.cost

    def write(
        self, records: Sequence[Record], rubrics: Sequence[Rubric], n_wanted: int, about: Record
    ) -> None:
        mine = {(self.judge, one.hash) for one in rubrics}
        others = [r for r in read_lines(self.path / JUDGEMENTS) if (r["judge"], r["rubric_hash"]) not in mine]
        every = [*others, *records]
        replace_text(self.path / JUDGEMENTS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in every))
        place = self.path / SUMMARY
        before = read_json(place) if place.exists() else {"judges": {}, "rubrics": {}}
        judges, texts = before["judges"], before["rubrics"]
        counts = {"wanted": n_wanted, "not_judged": n_wanted - len(records)}
        judges[self.judge] = judges.get(self.judge, {}) | about | counts
        texts |= {one.hash: asdict(one) for one in rubrics}
        summary = {"judgements": summarise(every), "judges": judges, "rubrics": texts, "spent": self.spent}
        write_json(place, summary)


def _record(one: Record, asked: Asked, judgement: Judgement, judge_id: str) -> Record:
    about = {"rubric": asked.rubric.name, "rubric_hash": asked.rubric.hash, "judge": judge_id}
    said = asdict(judgement)
    del said["cost"]  # of answers that repeat it was paid once
    return {**one, **about, **said}


def summarise(records: Sequence[Record]) -> list[Record]:
    """Per judge, rubric and condition: how many judgements have which status, and the mean value.

    `n` is the sum of the five counts; `mean` is over the scored ones, None where there are none;
    `low_mass` counts those whose numbers or labels had less than a quarter of the probability.
    """
    cells: dict[tuple, list[Record]] = {}
    for r in records:
        cells.setdefault((r["judge"], r["rubric"], r["rubric_hash"], r["condition"]), []).append(r)
    rows = []
    for key, cell in cells.items():
        names = dict(zip(("judge", "rubric", "rubric_hash", "condition"), key, strict=True))
        statuses = Counter(r["status"] for r in cell)
        values = [r["value"] for r in cell if r["value"] is not None]
        counts = {status: statuses[status] for status in STATUSES}
        mean = sum(values) / len(values) if values else None
        low = sum(r["mass"] is not None and r["mass"] < MIN_MASS for r in cell)
        rows.append({**names, "n": len(cell), **counts, "mean": mean, "low_mass": low})
    return rows
