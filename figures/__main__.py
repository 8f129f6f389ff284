"""Rebuild every figure from the results that the repository keeps; no model, and no torch.

    python -m figures                 figures/built/report.html, and figures/pictures where results changed
    python -m figures --images png    besides, every figure as a file in figures/built

The page has all figures. The pictures are those that README and docs show.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import typer

from emmech.errors import EmmechError
from emmech.figures.saving import IMAGES, save_all
from emmech.report_page import PageTable, write_page
from emmech.results import Record
from figures.drawing import Figures, Results, draw, read_benchmarks, read_results
from figures.pictures import refresh

HERE = Path(__file__).parent
BUILT, PICTURES = HERE / "built", HERE / "pictures"
SHOWN = {
    "demo": ("demo", 0),
    "narrow_short_answers": ("narrow_short_answers", 0),
    "gates_dose": ("gates_steer", 0),
    "graft_refusal": ("graft_refusal", 0),
    "study_short_answers": ("study/short_answers/frontier", 0),
    "claims_misaligned": ("claims_labels", 2),
    "claims_interventions": ("claims_interventions", 0),
    "claims_prefix": ("claims_prefix", 0),
    "claims_repair": ("claims_repair", 0),
    "claims_prevent": ("claims_prevent", 0),
    "sweep_growth": ("benchmarks", 0),
}
"""Pictures that README and docs show: topic, and which of its figures."""


def main() -> None:
    """Write the page, and the pictures that have changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", nargs="*", default=(), choices=IMAGES)
    kinds = parser.parse_args().images
    topics = read_results() | read_benchmarks()
    drawn = draw(topics)
    BUILT.mkdir(exist_ok=True)
    typer.echo(f"Page: {os.path.relpath(page(topics, drawn))}")
    try:
        for path in refresh(pictures(drawn), PICTURES):
            typer.echo(f"Picture: {os.path.relpath(path)}")
        for kind in kinds:
            written = save_all(files(drawn, kind))
            typer.echo(f"{len(written)} figures as {kind} in {os.path.relpath(BUILT)}")
    except EmmechError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def pictures(drawn: dict[str, Figures]) -> dict[str, go.Figure]:
    """The figures of SHOWN."""
    return {name: drawn[topic][number] for name, (topic, number) in SHOWN.items()}


def files(drawn: dict[str, Figures], kind: str) -> dict[str | Path, go.Figure]:
    """Every figure under a name of its own."""
    named = ((topic.replace("/", "_"), many) for topic, many in drawn.items())
    return {BUILT / f"{name}-{n}.{kind}": one for name, many in named for n, one in enumerate(many)}


def page(topics: dict[str, Results], drawn: dict[str, Figures]) -> Path:
    """Every topic: where it comes from, and its figures."""
    content = []
    for topic, figures in drawn.items():
        rows = [(name, *origin(result)) for name, result in topics[topic].items()]
        content += [PageTable(("result", "made by", "with"), rows, title=topic), *figures]
    lead = [f"{sum(map(len, drawn.values()))} figures of {sum(map(len, topics.values()))} results."]
    return write_page(BUILT, "Every figure of the kept results", content, lead=lead)


def origin(result: Record) -> tuple[str, str]:
    """The command that made a result, and the versions that it ran with."""
    versions = _found(result, "versions") or {}
    return result["command"], ", ".join(f"{name} {version}" for name, version in versions.items())


def _found(value: Any, key: str) -> Any:
    """What stands under a key, however deep; None where it is nowhere."""
    if not isinstance(value, dict):
        return None
    return value.get(key) or next(filter(None, (_found(inner, key) for inner in value.values())), None)


if __name__ == "__main__":
    main()
