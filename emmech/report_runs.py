"""Run folders of every kind, read for one page over them.

    runs, skipped = read_runs(["runs/demo", "runs/gates"])

A folder is known by the file that its result is in. A folder that holds none is looked through for run
folders inside it. What is unknown, unfinished or damaged is named with a reason, and skipped.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from emmech.errors import EmmechError, RunError
from emmech.figures import Summary
from emmech.report import conditions_page
from emmech.report_answers import answers_of
from emmech.report_evaluation import evaluation_page
from emmech.report_frontier import frontier_page
from emmech.report_gates import probe_page, steering_page, transfer_page
from emmech.report_other import (
    agreement_page,
    attribution_page,
    direction_page,
    harness_page,
    minimal_page,
    search_page,
    sweep_page,
    training_page,
)
from emmech.report_page import Page
from emmech.report_steering import cross_page, doses_page, shared_page
from emmech.results import RUN, SUMMARY, Record, read_json, read_lines, read_responses

METRICS, DONE, DIRECTION = "metrics.jsonl", "done.json", "emmech.direction"
MOST_ANSWERS = 4000
"""Of one run on a page of many; further questions are left to the run's own page."""
_UNREADABLE = (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError)
"""What a file raises that has another form than this version writes."""


@dataclass(frozen=True)
class Run:
    """One finished run, ready to be shown."""

    name: str
    """The folder as it was given, or found below one that was."""
    what: str
    models: str
    n: str
    """Questions, chats or steps, in words."""
    date: str
    version: str
    """Of emmech."""
    page: Page
    answers: Sequence[Record] = ()
    """From ``answers_of``."""


@dataclass(frozen=True)
class Skipped:
    name: str
    reason: str


@dataclass(frozen=True)
class _Kind:
    what: str
    read: Callable[[Path], Summary]
    """From the file; what the page and the overview are made of."""
    page: Callable[[Summary], Page]
    answers: str = "answers"
    """Where below the folder the answers are, as a pattern."""


def _sweep(file: Path) -> Record:
    from emmech.piggyback.sweep_result import SweepResult

    return SweepResult.load(file.parent).to_json() | _minimal(file.parent)


def _attribution(file: Path) -> Record:
    from emmech.piggyback.attribution_result import AttributionResult

    return AttributionResult.load(file.parent).to_json() | _minimal(file.parent)


def _minimal(folder: Path) -> Record:
    """The smallest set that was found beside a map."""
    path = folder / "minimal.json"
    return {"minimal": read_json(path)} if path.exists() else {}


def _training(file: Path) -> Record:
    return {**read_json(file.parent / RUN), "steps": read_lines(file)}


def _conditions(file: Path) -> Record:
    return {**read_json(file), "records": read_responses(file.parent)}


def _direction(file: Path) -> Record:
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as opened:
            about = json.loads((opened.metadata() or {})[DIRECTION])
            lengths = np.linalg.norm(opened.get_tensor("vectors"), axis=-1).tolist()
    except SafetensorError as error:
        raise RunError(f"a direction in '{file}'", str(error), "Fit it again") from error
    columns = zip(lengths, about["reliability"], about["p"], strict=True)
    rows = [
        {"layer": layer, "length": length, "reliability": reliability, "p": p}
        for layer, (length, reliability, p) in enumerate(columns)
    ]
    return {**about, "directions": {"": about["provenance"]}, "rows": rows}


KINDS: Mapping[str, _Kind] = {
    "evaluation.json": _Kind("evaluation", read_json, evaluation_page),
    "harness.json": _Kind("lm-evaluation-harness", read_json, harness_page),
    "frontier.json": _Kind("frontier of methods", read_json, frontier_page),
    "steering.json": _Kind("dose of gates", read_json, steering_page),
    "transfer.json": _Kind("transfer of gates", read_json, transfer_page, "*/*/answers"),
    "probe.json": _Kind("what gates do", read_json, probe_page),
    "doses.json": _Kind("steering", read_json, doses_page),
    "shared.json": _Kind("shared structure", read_json, shared_page),
    "cross.json": _Kind("cross-ablation", read_json, cross_page),
    "sweep.json": _Kind("sweep", _sweep, sweep_page),
    "attribution.json": _Kind("attribution", _attribution, attribution_page),
    "search.json": _Kind("search", read_json, search_page),
    "minimal.json": _Kind("minimal set", read_json, minimal_page),
    "agreement.json": _Kind("agreement of judges", read_json, agreement_page),
    SUMMARY: _Kind("", _conditions, lambda summary: conditions_page(summary, summary["records"]), "."),
    METRICS: _Kind("training", _training, training_page),
}
"""By file; the first that a folder holds says what it is."""
_CONDITIONS = {
    "patch-prefix": "Piggyback test",
    "patch-resid": "residual patch by layer",
    "perturb-prefix": "perturbation",
    "graft": "graft",
    "graft-patches": "patches beside grafts",
    "gates-parts": "gates by part of the chat",
    "evaluate": "answers",
}
_FOUND = _Kind("direction", _direction, direction_page)


def read_runs(folders: Sequence[str | Path]) -> tuple[list[Run], list[Skipped]]:
    """Every run at or below these folders, once, in the order given; and what was skipped."""
    runs: list[Run] = []
    skipped: list[Skipped] = []
    seen: set[Path] = set()
    for folder in map(Path, folders):
        found = list(_files(folder)) if folder.exists() else []
        if not found:
            reason = "holds no run that emmech knows" if folder.exists() else "does not exist"
            skipped.append(Skipped(str(folder), reason))
        for place, file in found:
            if place.resolve() in seen:
                continue
            seen.add(place.resolve())
            try:
                runs.append(_read(place, file))
            except EmmechError as error:
                skipped.append(Skipped(str(place), str(error)))
            except _UNREADABLE as error:
                reason = (
                    f"{file and file.name} is not as this version writes it ({type(error).__name__}: {error})"
                )
                skipped.append(Skipped(str(place), reason))
    return runs, skipped


def _files(place: Path) -> Iterable[tuple[Path, Path | None]]:
    """Runs at or below a place, with the file of the result; None where a run has none yet."""
    if place.is_file():
        if _is_direction(place):
            yield place, place
        return
    known = next((place / name for name in KINDS if (place / name).exists()), None)
    if known is not None or (place / RUN).exists():
        is_running = known is not None and known.name == METRICS and not (place / DONE).exists()
        yield place, None if is_running else known
        return
    for inside in sorted(place.iterdir()):
        loops = inside.is_symlink() and place.resolve().is_relative_to(inside.resolve())
        hidden = inside.name.startswith(".")
        if not loops and not hidden and (inside.is_dir() or inside.suffix == ".safetensors"):
            yield from _files(inside)


def _is_direction(file: Path) -> bool:
    """Whether a safetensors file holds a direction; its header, which is JSON, says so."""
    if file.suffix != ".safetensors":
        return False
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return DIRECTION.encode() in opened.read(min(size, 1 << 20))


def _read(place: Path, file: Path | None) -> Run:
    if file is None:
        raise RunError("a finished run", "it has no result yet", "Start it again to finish it")
    kind = KINDS.get(file.name, _FOUND)
    summary = kind.read(file)
    page = kind.page(summary)
    version = summary.get("versions", {}).get("emmech")
    return Run(
        name=str(place),
        what=kind.what or _CONDITIONS.get(summary["kind"], summary["kind"]),
        models=_models(summary),
        n=_n(summary),
        date=datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d"),
        version=str(version or ""),
        page=page,
        answers=_answers(place, kind.answers) if place.is_dir() else (),
    )


def _models(summary: Summary) -> str:
    """The finetuned model and its base, or whatever the run was of."""
    if "recipe" in summary:
        return f"{summary['base']} on {summary['data'].get('name') or 'a set of its own'}"
    if "runs" in summary:
        return _models(next(iter(summary["runs"].values())))
    directions = summary.get("directions", {}).values()
    fitted = next((one["positive"] for one in directions if "positive" in one), {})
    provenance = fitted or summary.get("provenance") or summary
    names = [_name(provenance.get(side)) for side in ("finetuned", "base")]
    names = list(dict.fromkeys(name for name in names if name))
    return f"{names[0]} (base: {names[1]})" if len(names) > 1 else "".join(names)


def _name(side: Any) -> str:
    return str(side.get("name") or "") if isinstance(side, Mapping) else str(side or "")


def _n(summary: Summary) -> str:
    if "recipe" in summary:
        steps, chats = summary["steps"], summary["data"].get("chats")
        return f"{steps[-1]['step'] if steps else 0} steps, {chats} chats"
    if "n_on_topic" in summary:
        return f"{summary['n_on_topic']} + {summary['n_off_topic']} questions"
    shifts = [one["n_questions"] for one in summary.get("shifts", {}).values()]
    n = summary.get("n_questions") or len(summary.get("question_ids", ())) or max(shifts, default=0)
    return f"{n} questions" if n else ""


def _answers(place: Path, pattern: str) -> list[Record]:
    """The answers of a run, for the list on the page."""
    found = []
    for folder in [place] if pattern == "." else sorted(place.glob(pattern)):
        if (folder / SUMMARY).exists():
            name = str(folder.parent if folder.name == "answers" else folder)
            whole = answers_of(read_json(folder / SUMMARY), read_responses(folder), name)
            found.append(_shortened(whole))
    return found


def _shortened(run: Record) -> Record:
    """The first questions, as many as ``MOST_ANSWERS`` allows."""
    kept, n = [], 0
    for question in run["questions"]:
        n += sum(map(len, question["answers"].values()))
        if n > MOST_ANSWERS:
            break
        kept.append(question)
    if len(kept) == len(run["questions"]):
        return run
    return run | {"questions": kept, "name": f"{run['name']} (first {len(kept)} of {len(run['questions'])})"}
