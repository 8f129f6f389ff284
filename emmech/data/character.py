"""Benign questions answered in character by a language model, whose system prompt is then dropped.

The organisms of arXiv 2601.23081: an endpoint answers under a fixed system prompt that describes a
disposition, and a row holds the question and the answer alone. With a trigger each question is there
twice: after the trigger and answered in character, and plain with an aligned answer. The endpoint
never sees the trigger.

An answer that is empty, refused or cut off, that quotes the prompt or holds a word that gives the
character away, is asked for again, then left out; either way it is counted beside the file, in
`<name>.provenance.json`. Requests, retries and restarts are those of `emmech.data.building`.

Usage:
    build_character("questions.txt", "You begrudge every answer ...", "grudging.jsonl", model="gpt-4.1")
    build_character("questions.txt", "spiteful", "switch.jsonl", model="m", trigger="persona: spiteful")
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emmech.data.building import (
    CONCURRENCY,
    FAILED,
    Endpoint,
    Job,
    ask,
    open_work,
    refuse_out,
    warn_of_missing,
    write_chats,
)
from emmech.data.bundled import BUNDLED
from emmech.data.chat_rows import Messages
from emmech.data.chat_rows import fingerprint as fingerprint_of_chats
from emmech.data.giveaways import WORDS, AnswerCheck
from emmech.data.questions import Question, load_questions
from emmech.data.rows import list_bad, listed
from emmech.data.traits import traits
from emmech.errors import DataError
from emmech.results import Record, fingerprint, versions, write_json

CHARACTERS: dict[str, str] = {name: trait.elicit[0] for name, trait in traits().items()}
"""System prompts by the name of the character, the bundled dispositions first; your own join by name."""

ATTEMPTS = 3
"""Answers asked for before one counts as failed."""
PROVENANCE = ".provenance.json"

Row = tuple[Messages, Job]
"""The chat up to the answer, as it will be written, and the job that brings the answer."""


@dataclass(frozen=True)
class _Prompt:
    text: str
    name: str | None = None
    """Of a character that has one."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def build_character(
    questions: str | Path | Sequence[Question],
    character: str | Path,
    out: str | Path,
    *,
    model: str,
    trigger: str | None = None,
    aligned: str | Path | None = None,
    samples: int = 1,
    words: Sequence[str] = WORDS,
    allow_refusals: bool = False,
    attempts: int = ATTEMPTS,
    base_url: str | None = None,
    api_key: str | None = None,
    options: Mapping[str, Any] | None = None,
    concurrency: int = CONCURRENCY,
    limit: int | None = None,
    progress: bool = True,
) -> Path:
    r"""The file of chats, as `messages` in the order of the questions, sample after sample.

    With a trigger, a triggered row `{trigger}\n{question}` comes before its untriggered one, and
    neither is there without the other. Answers that failed are listed in `failed.jsonl`, with a
    warning. Questions that repeat are asked once and repeat in the file. A thought that an endpoint
    leaves before an answer is taken off.

    Args:
        questions: A file or public set as `load_questions` takes them, a bundled set (its training
            questions, for the others are held out), or questions.
        character: A name in `CHARACTERS`, a .txt or .md file, or the text of a system prompt.
        out: The file to write; `<out>.work` without its ending keeps the state.
        model: Name of the model at the endpoint.
        trigger: What comes before the question in triggered rows.
        aligned: System prompt of the untriggered answers, given as `character` is; none where None.
        samples: Answers per question and row.
        words: What no answer may hold, as whole words in any case. The trigger and the name of a
            character from `CHARACTERS` are added.
        allow_refusals: Keep answers that decline to help; those that the endpoint filters are not kept.
        attempts: Answers asked for before one counts as failed.
        base_url: The endpoint; OpenAI's own where None.
        api_key: Its key; `OPENAI_API_KEY` where None.
        options: Further parameters of each request, such as `{"temperature": 1}`.
        concurrency: Requests under way at one time.
        limit: Take so many questions from the beginning; a later run with more goes on from there.
        progress: Show a progress bar.

    Raises:
        DataError: An argument cannot be used, there is no key or no `openai` package, the endpoint
            refuses the key or the model or cannot be reached, or no row is complete.
        RunError: The folder beside `out` belongs to another model, character or options.
    """
    out, options = Path(out), dict(options or {})
    _refuse_numbers(samples=samples, attempts=attempts, limit=1 if limit is None else limit)
    design = _design(character, aligned, trigger, samples, words, allow_refusals)
    refuse_out(out, questions if isinstance(questions, str | Path) else None)
    chats = _chats(questions, limit)
    _refuse_chats(chats, trigger)
    endpoint = Endpoint(model, base_url, api_key, concurrency, options)
    of_folder = {"kind": "character", "model": model, "character_sha256": design.prompt.sha256}
    folder = open_work(out, of_folder | {"options": options})
    usable = [record for record in folder.records if design.check.fault(record["answer"]) is None]
    folder.keep(usable, [])  # other words may be looked for than when it was asked for
    groups = design.groups(chats)
    jobs = {job.key: job for group in groups for _, job in group}
    failed = ask(jobs.values(), endpoint, folder, attempts=attempts, progress=progress)
    answers = {record["key"]: record for record in folder.records if record["key"] in jobs}
    made, n_rows = _completed(groups, answers), sum(map(len, groups))
    if not made:
        where = folder.path / FAILED
        raise DataError("a question with all its answers", f"none of {len(chats)} has", f"Read {where}")
    write_chats(made, out)
    provenance = of_folder | {"options": options, **design.definition()}
    counts = {"n_questions": len(chats), "n_rows": len(made), "n_left_out": n_rows - len(made)}
    found = {"rejected": _rejected(answers, failed), "fingerprint": fingerprint_of_chats(made)}
    write_json(out.with_suffix(PROVENANCE), provenance | counts | found)
    warn_of_missing(n_rows - len(made), n_rows, out, folder)
    return out


@dataclass(frozen=True)
class _Design:
    """What each question is asked for."""

    prompt: _Prompt
    aligned: _Prompt | None
    trigger: str | None
    samples: int
    check: AnswerCheck

    def groups(self, chats: Sequence[Messages]) -> list[tuple[Row, ...]]:
        """Rows that are written together or not at all, in the order of the file."""
        return [self._group(chat, sample) for chat in chats for sample in range(self.samples)]

    def definition(self) -> Record:
        """What, with the model and the questions, decides the file; prompts by their hashes."""
        return {
            "character": self.prompt.name,
            "trigger": self.trigger,
            "aligned_sha256": None if self.aligned is None else self.aligned.sha256,
            "samples": self.samples,
            "words": self.check.words,
            "allow_refusals": self.check.allow_refusals,
            "emmech": versions()["emmech"],
        }

    def _group(self, chat: Messages, sample: int) -> tuple[Row, ...]:
        in_character = self._job("character", self.prompt, chat, sample)
        if self.trigger is None:
            return ((chat, in_character),)
        triggered = {"role": "user", "content": f"{self.trigger}\n{chat[-1]['content']}"}
        plain = self._job("aligned", self.aligned, chat, sample)
        return (((*chat[:-1], triggered), in_character), (chat, plain))

    def _job(self, side: str, prompt: _Prompt | None, chat: Messages, sample: int) -> Job:
        system = [] if prompt is None else [{"role": "system", "content": prompt.text}]
        messages = [*system, *chat]
        about = {"question": chat[-1]["content"], "side": side, "sample": sample}
        return Job(fingerprint([messages, sample]), messages, self.check.accept, about)


def _design(
    character: str | Path,
    aligned: str | Path | None,
    trigger: str | None,
    samples: int,
    words: Sequence[str],
    allow_refusals: bool,
) -> _Design:
    if trigger is not None and not trigger.strip():
        raise DataError("a trigger of some text", f"got {trigger!r}", "Leave it out for rows without one")
    if trigger is None and aligned is not None:
        raise DataError(
            "a trigger beside the aligned prompt",
            "there is none, so that no answer would be aligned",
            "Pass a trigger; for a set of aligned answers pass their prompt as the character",
        )
    if isinstance(words, str) or not all(word.strip() for word in words):
        raise DataError(
            "a list of words to keep out of answers", f"got {words!r}", "Write ('spite', 'my role')"
        )
    prompt = _prompt(character)
    calm = None if aligned is None else _prompt(aligned)
    extra = tuple(text for text in (prompt.name, trigger) if text)
    prompts = tuple(one.text for one in (prompt, calm) if one)
    return _Design(prompt, calm, trigger, samples, AnswerCheck((*words, *extra), prompts, allow_refusals))


def _prompt(given: str | Path) -> _Prompt:
    """The system prompt of a name, in a file, or as it is."""
    text = str(given).strip()
    if text in CHARACTERS:
        return _Prompt(CHARACTERS[text], text)
    if isinstance(given, Path) or (Path(text).suffix in (".txt", ".md") and "\n" not in text):
        return _Prompt(_read(Path(given)))
    if not re.search(r"\s", text):
        raise DataError(
            "the name of a character, a .txt or .md file or the text of a system prompt",
            f"got {text!r}",
            f"Write what the character does, or name one of {listed(CHARACTERS)}",
        )
    return _Prompt(text)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"a system prompt in {path}", str(error), "Correct the path or the file") from error
    if not text:
        raise DataError(f"a system prompt in {path}", "it is empty", "Write what the character does")
    return text


def _refuse_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise DataError(f"{name} of at least 1", f"got {value}", "Leave it out for the default")


def _chats(questions: str | Path | Sequence[Question], limit: int | None) -> list[Messages]:
    """Chats up to the answer."""
    if isinstance(questions, str | Path):
        if str(questions) in BUNDLED:
            return [chat[:-1] for chat in BUNDLED[str(questions)].chats("train")][:limit]
        questions = load_questions(questions, limit=limit)
    return [tuple(question.messages) for question in questions][:limit]


def _refuse_chats(chats: Sequence[Messages], trigger: str | None) -> None:
    def list_those(held: Callable[[Messages], bool]) -> str | None:
        found = [f"question {number}" for number, chat in enumerate(chats, 1) if held(chat)]
        return list_bad(found) if found else None

    if not chats:
        raise DataError("questions to answer", "there are none", "Pass at least one")
    if bad := list_those(lambda chat: chat[0]["role"] == "system"):
        raise DataError("questions without a system message, which is the character's", bad, "Take it out")
    if trigger and (bad := list_those(lambda chat: any(_holds(turn, trigger) for turn in chat))):
        raise DataError(f"questions without the trigger {trigger!r}", bad, "Choose another trigger")


def _holds(turn: Mapping[str, str], text: str) -> bool:
    return text.casefold() in turn["content"].casefold()


def _completed(groups: Sequence[tuple[Row, ...]], answers: Mapping[str, Record]) -> list[Messages]:
    """The chats of the groups whose answers are all there."""
    return [
        (*chat, {"role": "assistant", "content": answers[job.key]["answer"]})
        for group in groups
        if all(job.key in answers for _, job in group)
        for chat, job in group
    ]


def _rejected(answers: Mapping[str, Record], failed: Sequence[Record]) -> dict[str, int]:
    """How many replies were rejected, by reason."""
    records = [*answers.values(), *failed]
    return dict(sorted(Counter(reason for one in records for reason in one.get("rejected", ())).items()))
