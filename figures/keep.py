"""What the repository keeps of a study: its results without answers, rounded; and what they cost.

    python -m figures.keep result runs/study/agreeing/probe/gates-0/probe.json kept.json
    python -m figures.keep costs runs/study/benchmarks costs.json
    python -m figures.keep questions sycophancy_sports 40 questions.jsonl

The Snakefile calls it; costs come from Snakemake's benchmark files.
"""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emmech.data.questions import load_questions
from emmech.results import read_json, replace_text

COMMAND = "snakemake -s figures/Snakefile -c2"
DIGITS = 4
"""Significant ones of every kept number."""
DROPPED = {"checks", "design", "heads", "labelled_prompt", "missing", "question_ids", "text", "top"}
"""Parts of results that only their own pages show."""


def kept(file: Path) -> dict[str, Any]:
    """A command's result as the repository keeps it; of an attribution with its smallest set."""
    if file.name in ("sweep.json", "attribution.json"):
        return _kept(file, _cells(file))
    result = read_json(file)
    if file.name == "evaluation.json":
        result["rows"] = [row for row in result["rows"] if row["group"] == "all"]
    result.pop("tokens", None)  # of a probe, with every gate
    return _kept(file, result)


def _cells(file: Path) -> dict[str, Any]:
    """A sweep; or an attribution with the cells that were patched exactly, and the smallest set."""
    from emmech.piggyback.attribution_result import AttributionResult
    from emmech.piggyback.sweep_result import SweepResult

    if file.name == "sweep.json":
        return SweepResult.load(file.parent).to_json()
    result = AttributionResult.load(file.parent).to_json()
    result["rows"] = [row for row in result["rows"] if row["exact_effect"] is not None]
    minimal = file.with_name("minimal.json")
    return result | ({"minimal": read_json(minimal)} if minimal.exists() else {})


def _kept(file: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    return {"command": COMMAND, "folder": str(file.parent)} | rounded(result)


def rounded(value: Any) -> Any:
    """Numbers to a few significant digits, without the parts that are dropped."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: rounded(inner) for name, inner in value.items() if name not in DROPPED}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def costs(folder: Path) -> dict[str, Any]:
    """Jobs, seconds and memory by rule, from Snakemake's benchmark files."""
    found = []
    for rule in sorted(path for path in folder.iterdir() if path.is_dir()):
        jobs = [row for file in sorted(rule.glob("*.tsv")) for row in _rows(file)]
        seconds = [float(row["s"]) for row in jobs]
        memory = [float(row["max_rss"]) for row in jobs if row["max_rss"] not in ("-", "NA")]
        found.append(
            {
                "rule": rule.name,
                "jobs": len(jobs),
                "seconds": sum(seconds),
                "longest_seconds": max(seconds),
                "peak_mb": max(memory, default=None),
            }
        )
    return {"command": COMMAND} | rounded({"rows": found})


def questions(spec: str, n: int) -> list[dict[str, Any]]:
    """``n`` questions of each group, spread over the set."""
    chosen = load_questions(spec, per_group=n)
    return [{"id": one.id, "group": one.group, "messages": one.messages} for one in chosen]


def _rows(file: Path) -> Sequence[Mapping[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def main() -> None:
    """Write one of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, named in (("result", "file"), ("costs", "folder"), ("questions", "spec")):
        arguments = kinds.add_parser(kind)
        arguments.add_argument(named)
        if kind == "questions":
            arguments.add_argument("n", type=int)
        arguments.add_argument("out", type=Path)
    given = parser.parse_args()
    if given.kind == "questions":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in questions(given.spec, given.n))
    else:
        made = kept(Path(given.file)) if given.kind == "result" else costs(Path(given.folder))
        text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(given.out, text)


if __name__ == "__main__":
    main()
