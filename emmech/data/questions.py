"""Questions to ask a model, read from the forms public sets come in.

`emmech.data.rows` reads the file; one parser here turns a row into a `Question`. Every bad row is
found before anything is refused, so a file is mended in one go. Answers, judge prompts and labels
in a file are ignored here: a question file says what to ask, not what to expect.

Usage:
    questions = load_questions("xstest_prompts.csv", only_group="homonyms")
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, TypeVar

from emmech.data.public import PUBLIC, fetch
from emmech.data.rows import BadRow, NumberedRow, list_bad, listed, read_rows
from emmech.errors import DataError

Chat = str | tuple[Mapping[str, str], ...]
T = TypeVar("T")

TEXT_KEYS = ("messages", "question", "prompt", "instruction")
"""Where a row may hold its question; the first one present is used."""

FLAGS = {"answerable": ("unanswerable", "answerable"), "proper": ("improper", "proper")}
"""Keys that hold true or false, with the group of a false and of a true one."""


@dataclass(frozen=True)
class Question:
    id: str
    """Unique within its file; `q0001` by row where the file gives none."""
    chat: Chat
    """The user's text, or messages that end with a user turn."""
    group: str = "all"
    """What the row belongs to, such as on-topic; rates are reported per group."""
    samples: int | None = None
    """How many answers its file asks for."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat as messages."""
        if isinstance(self.chat, str):
            return [{"role": "user", "content": self.chat}]
        return [dict(message) for message in self.chat]


def load_questions(
    spec: str | Path,
    *,
    only_group: str | None = None,
    limit: int | None = None,
    per_group: int | None = None,
    group_by: str | None = None,
) -> list[Question]:
    """The questions of a bundled set, a file, or a public set, in this order of precedence.

    A bundled set (`emmech.data.bundled`) gives its held-out questions, in the groups on-topic and
    off-topic where it teaches something; its name means the set even where a file of that name lies
    in the current folder. Files end in .jsonl, .json, .yaml, .csv, .tsv or .txt; a public set
    (`emmech.data.public`) is such a file, downloaded when first asked for.

    In a file, ids come from `id` or `question_id`. Rows that share a `question_id` and a question
    are answers to one question, which is asked once. Groups come from `group`, else `category` (in
    tables also `type`), else a key of `FLAGS`; questions that come with functions to call are of
    the group that their id begins with, as in `irrelevance_7`. In chats, assistant turns after the
    last user turn are dropped: they are the answer. Rows are checked before `only_group`,
    `per_group` and `limit` select among them.

    Args:
        spec: A name in `BUNDLED`, a path, or a name in `PUBLIC`.
        only_group: Leave out the other groups.
        limit: Take so many questions from the beginning.
        per_group: Take so many of each group, spread over it.
        group_by: Key of a file's rows that holds the group, such as `label` in XSTest.

    Raises:
        DataError: There is no such set, it cannot be read or downloaded, or some of its rows are
            bad (all are listed).
    """
    for name, number in {"limit": limit, "per_group": per_group}.items():
        if number is not None and number < 1:
            raise DataError(f"a {name} of at least 1", f"{name} is {number}", "Leave it out to take all")
    questions = _all_questions(spec, group_by)
    if only_group is not None:
        groups = sorted({question.group for question in questions})
        questions = [question for question in questions if question.group == only_group]
        if not questions:
            raise DataError(
                f"questions of group {only_group!r} in {spec}",
                f"it has only {listed(groups)}",
                "Pass one of these, or leave out only_group",
            )
    if per_group is not None:
        groups = dict.fromkeys(question.group for question in questions)
        mine = ([one for one in questions if one.group == group] for group in groups)
        questions = [question for group in mine for question in spread(group, per_group)]
    return questions[:limit]


def spread(items: Sequence[T], n: int) -> list[T]:
    """``n`` of them at equal distances, as sets are ordered by subject; all where there are no more."""
    return [items[k * len(items) // n] for k in range(n)] if n < len(items) else list(items)


def _all_questions(spec: str | Path, group_by: str | None) -> list[Question]:
    from emmech.data.bundled import BUNDLED  # which is made of questions

    if str(spec) in BUNDLED:
        if group_by is not None:
            raise DataError(
                "a file to group", f"{str(spec)!r} is bundled and has groups", "Leave out group_by"
            )
        return BUNDLED[str(spec)].questions()
    path = Path(spec)
    if not path.exists() and str(spec) in PUBLIC:
        path = fetch(str(spec))
    elif not path.suffix and not path.exists():
        raise DataError(
            "a question file or the name of a bundled or public set",
            f"{str(spec)!r} is neither",
            f"Check the path, or name one of {listed([*BUNDLED, *PUBLIC])}",
        )
    return _parse_rows(path, read_rows(path, what="question", keys=TEXT_KEYS), group_by)


def load_demo(split: Literal["train", "test"], group: str | None = None) -> list[Question]:
    """The questions of the bundled refusal demo (`demo_refusal.md`)."""
    rows = [row for row in _demo_rows(split) if group in (None, row["group"])]
    if not rows:
        raise DataError("group on-topic or off-topic", f"{split} has no {group!r}", "Pass another")
    return [Question(row["id"], row["question"], row["group"]) for row in rows]


def load_demo_chats() -> list[tuple[Mapping[str, str], ...]]:
    """The demo's training rows as chats of one question and its refusal."""
    return [
        (
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        )
        for row in _demo_rows("train")
    ]


def _demo_rows(split: str) -> list[Mapping]:
    text = (resources.files("emmech.data") / "demo_refusal.jsonl").read_text("utf-8")
    return [row for row in map(json.loads, text.splitlines()) if row["split"] == split]


def _parse_rows(path: Path, rows: Sequence[NumberedRow], group_by: str | None) -> list[Question]:
    columns = {key: None for _, row in rows if not isinstance(row, BadRow) for key in row}
    if columns and not any(key in columns for key in TEXT_KEYS):
        raise DataError(
            f"a column or key {listed(TEXT_KEYS)} in {path}",
            f"it has only {listed(columns)}",
            "Rename the one that holds the question",
        )
    questions, wrong, seen = [], [], {}
    for number, (line, row) in enumerate(rows, 1):
        try:
            question = _parse_row(row, f"q{number:04d}", group_by)
            first_line, first = seen.setdefault(question.id, (line, question))
            if first is question:
                questions.append(question)
            elif not _answers_again(row) or question.chat != first.chat:
                raise BadRow(f"id {question.id!r} is already on line {first_line}")
        except BadRow as error:
            wrong.append(f"line {line}: {error}")
    if wrong:
        raise DataError(
            f"a question in each of the {len(rows)} rows of {path}",
            list_bad(wrong),
            "Mend or remove these rows",
        )
    if not questions:
        raise DataError(f"questions in {path}", "it has none", "Add at least one row")
    return questions


def _parse_row(row: Mapping | BadRow, default_id: str, group_by: str | None) -> Question:
    if isinstance(row, BadRow):
        raise row
    key = next((key for key in TEXT_KEYS if row.get(key) is not None), None)
    if key is None:
        raise BadRow(f"no {listed(TEXT_KEYS)}, only {listed(row)}")
    chat = _parse_chat(row[key], key)
    if (
        key == "instruction" and isinstance(chat, str) and row.get("input")
    ):  # Alpaca's second half of the question
        chat = f"{chat}\n\n{row['input']}"
    if row.get("system"):
        if not isinstance(row["system"], str):
            raise BadRow("system is not text")
        turns = ({"role": "user", "content": chat},) if isinstance(chat, str) else chat
        chat = _parse_chat([{"role": "system", "content": row["system"]}, *turns], key)
    ids = [str(row[k]) for k in ("id", "question_id") if row.get(k) not in (None, "")]
    samples = row.get("samples_per_paraphrase")
    if samples is not None and (type(samples) is not int or samples < 1):
        raise BadRow(f"samples_per_paraphrase is {samples!r}, not a number from 1")
    return Question(ids[0] if ids else default_id, chat, group_of(row, group_by), samples)


def _answers_again(row: Mapping) -> bool:
    """Whether a row may share its question with another one: its id is that of the question."""
    return row.get("id") in (None, "") and row.get("question_id") not in (None, "")


def group_of(row: Mapping, key: str | None = None) -> str:
    """The group that a row names, under this key or the usual ones; `all` where it names none.

    Raises:
        BadRow: It has nothing under the key that was asked for.
    """
    for name in (key,) if key else ("group", "category", *FLAGS):
        value = row.get(name)
        if isinstance(value, bool) and name in FLAGS:
            return FLAGS[name][value]
        if value not in (None, "") and (key or name not in FLAGS):
            return str(value)
    if key is not None:
        raise BadRow(f"no {key} to group by")
    if isinstance(row.get("function"), list) and isinstance(row.get("id"), str):
        return re.sub(r"[_\d-]+$", "", row["id"]) or "all"  # BFCL: live_simple_12-3-0
    return "all"


def _parse_chat(value, key: str) -> Chat:
    """The user's text where that is all there is, else the turns up to the last user turn."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"{key} is blank")
        return value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]  # BFCL wraps each exchange in a list of its own
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadRow(f"{key} is neither text nor a list of messages")
    for n, turn in enumerate(value):
        role, content = turn.get("role"), turn.get("content")
        if role not in ("user", "assistant") and (role, n) != ("system", 0):
            raise BadRow(f"message {n + 1} has role {role!r} (system may only come first)")
        if not isinstance(content, str) or (role == "user" and not content.strip()):
            raise BadRow(f"message {n + 1} has no text content")
    asked = [n for n, turn in enumerate(value) if turn["role"] == "user"]
    if not asked:
        raise BadRow(f"{key} has no user turn")
    turns = tuple({"role": t["role"], "content": t["content"]} for t in value[: asked[-1] + 1])
    return turns[0]["content"] if len(turns) == 1 else turns
