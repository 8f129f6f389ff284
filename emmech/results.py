"""Result records in and out: a run folder that survives being killed, and the files in it.

``run.json`` holds the arguments that define the run, ``responses.jsonl`` one line per answer in the
order they were made, ``checks.jsonl`` the manipulation checks. Records are appended one finished
unit (a batch under a condition) at a time; on the next start, complete units are kept, anything
after a broken line or of an unfinished unit is dropped, and the run goes on with the same plan.
Of several processes that share a run, each but the first appends to files of its own
(``responses-1.jsonl``), until all records are put together.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from emmech.errors import RunError

Record = dict[str, Any]
RUN, CHOICES, RESPONSES, CHECKS, SUMMARY, REPORT = (
    "run.json",
    "choices.json",
    "responses.jsonl",
    "checks.jsonl",
    "summary.json",
    "report.html",
)


class RunFolder:
    """An output folder that belongs to one set of arguments."""

    def __init__(self, folder: str | Path, arguments: Mapping[str, Any], *, lines: bool = True):
        """Open or create the folder; without ``lines`` it holds no responses.

        Raises:
            RunError: It cannot be written, or it holds a run with other arguments.
        """
        self.path = Path(folder)
        self.arguments = json.loads(json.dumps(arguments))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / RUN).exists():
                write_json(self.path / RUN, self.arguments)
            if lines:
                with (self.path / RESPONSES).open("a"):  # writable, before any work
                    pass
        except OSError as error:
            raise RunError(
                f"a folder to write results in at '{folder}'",
                f"it cannot be written ({error.strerror})",
                "Choose another --out, or change its permissions",
            ) from error
        self._refuse_other_arguments()
        self.process = 0
        """The number of the process that appends."""
        self.records, self.checks = (
            [record for file in self.files(name) for record in read_lines(file)]
            for name in (RESPONSES, CHECKS)
        )

    def keep(self, complete: Iterable[Record], checks: Iterable[Record]) -> None:
        """Drop every record but these, on disk too, where one file then holds those of all processes."""
        self.records, self.checks = list(complete), list(checks)
        self.replace(RESPONSES, self.records)
        self.replace(CHECKS, self.checks)

    def replace(self, name: str, records: Iterable[Record]) -> None:
        """Make these the only records under ``name``, in one file, whichever processes have written."""
        replace_text(self.path / name, "".join(map(_line, records)))
        for file in self.files(name)[1:]:
            file.unlink()

    def remember(self, name: str, value: Any) -> Any:
        """What was first stored under ``name`` in this folder: a choice that a restart repeats."""
        path = self.path / CHOICES
        choices = read_json(path) if path.exists() else {}
        if name not in choices:
            choices[name] = value
            write_json(path, choices)
        return choices[name]

    def append(self, records: Sequence[Record], check: Record | None) -> None:
        """Add one finished unit; it is on disk when this returns."""
        if check is not None:
            self.checks.append(check)
            _append(self.file(CHECKS), _line(check))
        self.records += records
        _append(self.file(RESPONSES), "".join(map(_line, records)))

    def file(self, name: str) -> Path:
        """Where this process appends."""
        stem, suffix = name.split(".")
        return self.path / (f"{stem}-{self.process}.{suffix}" if self.process else name)

    def files(self, name: str) -> list[Path]:
        """The file of the first process, then those that further ones have left."""
        stem, suffix = name.split(".")
        return [self.path / name, *sorted(self.path.glob(f"{stem}-[0-9]*.{suffix}"))]

    def _refuse_other_arguments(self) -> None:
        try:
            before = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RunError(
                f"a readable {RUN} in '{self.path}'", str(error), "Choose an empty folder"
            ) from error
        before, now = _flat(before), _flat(self.arguments)
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            first = changed[0]
            raise RunError(
                f"the run in '{self.path}' to have these arguments",
                f"its {first} is {_short(before.get(first))}, not {_short(now.get(first))}"
                + (f" (and {len(changed) - 1} more differ)" if changed[1:] else ""),
                "Choose another --out, or delete that folder",
            )


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new one, never a part."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def read_json(path: Path) -> Any:
    """The JSON in ``path``.

    Raises:
        RunError: There is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"JSON in '{path}'", str(error), "Point to a finished run folder") from error


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that change with any character of the value's JSON."""
    return hashlib.sha256(json.dumps(value, default=list).encode()).hexdigest()[:16]


def read_responses(folder: str | Path) -> list[Record]:
    """The answers of a run folder, whole lines only."""
    return read_lines(Path(folder) / RESPONSES)


def versions() -> dict[str, str]:
    """Versions of emmech and of what its numbers depend on."""
    found = {}
    for package in ("emmech", "torch", "transformers", "peft", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def read_lines(path: Path) -> list[Record]:
    """Records up to the first line that is not whole; none where there is no file."""
    records: list[Record] = []
    if not path.exists():
        return records
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def append_line(path: Path, record: Record) -> None:
    """Add one record to a file of lines; it is on disk when this returns."""
    _append(path, _line(record))


def keep_lines(path: Path, wanted: Callable[[Record], bool]) -> None:
    """Drop the other records, and whatever follows a broken line."""
    if path.exists():
        replace_text(path, "".join(_line(record) for record in read_lines(path) if wanted(record)))


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested arguments by dotted names, such as ``decoding.seed``."""
    if not isinstance(value, dict):
        return {name: value}
    return {
        dotted: leaf
        for key, inner in value.items()
        for dotted, leaf in _flat(inner, f"{name}.{key}".lstrip(".")).items()
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."
