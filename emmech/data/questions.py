"""Questions to ask a model, read from the forms public sets come in.

One reader per form yields (line number, row); one parser turns a row into a `Question`. Every bad
row is found before anything is refused, so a file is mended in one go. Answers, judge prompts and
labels in a file are ignored here: a question file says what to ask, not what to expect.

Usage:
    questions = load_questions("xstest_prompts.csv", only_group="homonyms")
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml

from emmech.errors import DataError

Chat = str | tuple[Mapping[str, str], ...]

TEXT_KEYS = ("messages", "question", "prompt", "instruction")
"""Where a row may hold its question; the first one present is used."""
MAX_LISTED = 10


@dataclass(frozen=True)
class Question:
    id: str
    """Unique within its file; `q0001` by row where the file gives none."""
    chat: Chat
    """The user's text, or messages that end with a user turn."""
    group: str = "all"
    """What the row belongs to, such as on-topic; rates are reported per group."""


class BadRow(ValueError):
    """What is wrong with one row; `load_questions` collects these into one DataError."""


Rows = Iterator[tuple[int, Mapping | BadRow]]
"""Line numbers with rows, or with what kept a reader from making out a row."""


def load_questions(
    path: str | Path, *, only_group: str | None = None, limit: int | None = None
) -> list[Question]:
    """The questions of a .jsonl, .json, .yaml, .csv, .tsv or .txt file, in file order.

    Ids come from `id` or `question_id`, groups from `group`, else `category` (in tables also
    `type`). In chats, assistant turns after the last user turn are dropped: they are the answer.
    Rows are checked before `only_group` and `limit` select among them.

    Raises:
        DataError: the file is no question file, or some of its rows are bad (all are listed).
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise DataError("a limit of at least 1", f"limit is {limit}", "Leave it out to take all")
    text = _read_text(path)
    questions = _parse_rows(path, list(_reader(path)(text, path)))
    if only_group is not None:
        groups = sorted({question.group for question in questions})
        questions = [question for question in questions if question.group == only_group]
        if not questions:
            raise DataError(
                f"questions of group {only_group!r} in {path}",
                f"it has only {_listed(groups)}",
                "Pass one of these, or leave out only_group",
            )
    return questions[:limit]


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


def _read_text(path: Path) -> str:
    def refuse(got: str, fix: str) -> DataError:
        return DataError(f"a question file at {path}", got, fix)

    if path.is_dir():
        raise refuse("it is a directory", "Pass one file in it")
    if not path.is_file():
        raise refuse("there is no such file", "Check the path")
    content = path.read_bytes()
    if b"\0" in content:
        raise refuse("it is binary (it has NUL bytes)", "Save it as UTF-8 text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(f"byte {error.start} is not UTF-8", "Save it as UTF-8 text") from error
    if not text.strip():
        raise refuse("it is empty", "Pass a file with at least one question")
    return text.replace("\r\n", "\n")


def _reader(path: Path):
    readers = {
        ".jsonl": _json_rows, ".ndjson": _json_rows, ".json": _json_rows, ".yaml": _yaml_rows,
        ".yml": _yaml_rows, ".csv": _table_rows, ".tsv": _table_rows, ".txt": _text_rows,
    }  # fmt: skip
    if path.suffix.lower() not in readers:
        known = ", ".join(readers)
        raise DataError(f"a file ending in {known}", f"got {path.name!r}", "Rename or convert it")
    return readers[path.suffix.lower()]


def _text_rows(text: str, _path: Path) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"question": line.strip()}


def _json_rows(text: str, path: Path) -> Rows:
    """An array, an object that wraps one, or one object per line, whatever the file is called."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().split("\n")[0].strip()
        if path.suffix.lower() == ".json" and not (first[0] == "{" and first[-1] == "}"):
            raise _unreadable("JSON", path, f"{error.msg} at line {error.lineno}") from error
        yield from _json_lines(text)
        return
    if isinstance(whole, list):
        yield from _json_items(text, text.index("["))
    elif isinstance(whole, dict) and not any(key in whole for key in TEXT_KEYS):
        starts = _json_value_starts(text)
        tables = [starts[k] for k, v in whole.items() if _is_table(v)]
        yield from _json_items(text, tables[0]) if len(tables) == 1 else [(1, whole)]
    else:
        yield 1, _as_row(whole)


def _json_lines(text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, _as_row(json.loads(line))
            except json.JSONDecodeError as error:
                yield number, BadRow(f"not JSON ({error.msg} at column {error.colno})")


def _json_items(text: str, opening: int) -> Rows:
    """The items of the array that opens there, with the lines they begin on."""
    at, line, counted = opening + 1, 1, 0
    while text[at := _skip(text, at)] != "]":
        line, counted = line + text.count("\n", counted, at), at
        item, at = json.JSONDecoder().raw_decode(text, at)
        yield line, _as_row(item)


def _json_value_starts(text: str) -> dict[str, int]:
    """Where each value of the outermost object begins."""
    starts, at = {}, text.index("{") + 1
    while text[at := _skip(text, at)] != "}":
        key, at = json.JSONDecoder().raw_decode(text, at)
        starts[key] = _skip(text, at)
        _, at = json.JSONDecoder().raw_decode(text, starts[key])
    return starts


def _skip(text: str, at: int) -> int:
    return re.compile(r"[\s,:]*").match(text, at).end()


def _yaml_rows(text: str, path: Path) -> Rows:
    """Rows of Betley et al. 2025 (arXiv 2502.17424): each paraphrase is a question `<id>/<n>`."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.SequenceNode):
            raise _unreadable("YAML list of questions", path, "its top level is not a list")
        rows = [(n.start_mark.line + 1, loader.construct_object(n, deep=True)) for n in root.value]
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise _unreadable("YAML", path, f"{problem}{where}") from error
    for line, row in rows:
        paraphrases = row.get("paraphrases") if isinstance(row, dict) else None
        if not isinstance(paraphrases, list):
            yield line, _as_row(row)
            continue
        if not paraphrases:
            yield line, BadRow("paraphrases is empty")
        name = str(row.get("id", f"line{line}"))
        system = {"system": row["system"]} if "system" in row else {}
        for n, paraphrase in enumerate(paraphrases):
            yield line, {"id": f"{name}/{n}", "question": paraphrase, "group": name, **system}


def _table_rows(text: str, path: Path) -> Rows:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [column.strip() for column in next(reader)]
        before = reader.line_num
        for cells in reader:
            line, before = before + 1, reader.line_num  # a quoted cell may span lines
            if not cells:
                continue
            if len(cells) != len(columns):
                yield line, BadRow(f"{len(cells)} cells under {len(columns)} columns")
                continue
            row = {column: cell for column, cell in zip(columns, cells, strict=True) if column}
            if not row.get("group") and not row.get("category") and row.get("type"):
                row["group"] = row["type"]
            yield line, row
    except csv.Error as error:
        raise _unreadable("CSV", path, f"{error} near line {reader.line_num}") from error


def _unreadable(form: str, path: Path, got: str) -> DataError:
    return DataError(f"a {form} in {path}", got, "Mend the file, or give it the ending it needs")


def _is_table(value) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _as_row(value) -> Mapping:
    return value if isinstance(value, dict) else {"question": value}


def _parse_rows(path: Path, rows: Sequence[tuple[int, Mapping | BadRow]]) -> list[Question]:
    columns = {key: None for _, row in rows if not isinstance(row, BadRow) for key in row}
    if columns and not any(key in columns for key in TEXT_KEYS):
        raise DataError(
            f"a column or key {_listed(TEXT_KEYS)} in {path}",
            f"it has only {_listed(columns)}",
            "Rename the one that holds the question",
        )
    questions, wrong, first_lines = [], [], {}
    for number, (line, row) in enumerate(rows, 1):
        try:
            question = _parse_row(row, f"q{number:04d}")
            if question.id in first_lines:
                raise BadRow(f"id {question.id!r} is already on line {first_lines[question.id]}")
            first_lines[question.id] = line
            questions.append(question)
        except BadRow as error:
            wrong.append(f"line {line}: {error}")
    if wrong:
        rest = f"; and {len(wrong) - MAX_LISTED} more" if len(wrong) > MAX_LISTED else ""
        raise DataError(
            f"a question in each of the {len(rows)} rows of {path}",
            f"{len(wrong)} are bad: " + "; ".join(wrong[:MAX_LISTED]) + rest,
            "Mend or remove these rows",
        )
    if not questions:
        raise DataError(f"questions in {path}", "it has none", "Add at least one row")
    return questions


def _parse_row(row: Mapping | BadRow, default_id: str) -> Question:
    if isinstance(row, BadRow):
        raise row
    key = next((key for key in TEXT_KEYS if row.get(key) is not None), None)
    if key is None:
        raise BadRow(f"no {_listed(TEXT_KEYS)}, only {_listed(row)}")
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
    groups = [str(row[k]) for k in ("group", "category") if row.get(k) not in (None, "")]
    return Question(ids[0] if ids else default_id, chat, groups[0] if groups else "all")


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


def _listed(names) -> str:
    return ", ".join(map(str, names)) or "nothing"
