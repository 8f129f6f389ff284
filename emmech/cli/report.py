"""The command that puts runs on one page: report."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from emmech.cli.options import example
from emmech.errors import RunError

app = typer.Typer()


class Image(StrEnum):
    png = "png"
    svg = "svg"
    pdf = "pdf"
    html = "html"


class Width(StrEnum):
    screen = "screen"
    print = "print"


@app.command(epilog=example("emmech report runs --out runs/overview --images pdf --size print"))
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders of any kind, folders of them, or directions.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html and images.")] = Path("report"),
    images: Annotated[
        Image | None,
        typer.Option(help="Also every figure as a file, on white; all but html need kaleido and a browser."),
    ] = None,
    size: Annotated[Width, typer.Option(help="Of images.")] = Width.print,
) -> None:
    """One page over runs: findings, figures, answers side by side with filters, where all comes from.

    Folders that are unknown or unfinished are named and skipped. Writes report.html, which needs no
    network and no other file, to --out; images go to figures/ there.
    """
    from emmech.figures.saving import save_all
    from emmech.report_overview import figure_files, write_overview
    from emmech.report_runs import read_runs

    runs, skipped = read_runs(folders)
    if not runs:
        reasons = "; ".join(f"{one.name}: {one.reason.rstrip('.')}" for one in skipped)
        raise RunError("at least one finished run", reasons, "Pass folders of finished runs")
    for one in skipped:
        typer.echo(f"skipped {one.name}: {one.reason}", err=True)
    path = write_overview(out, runs, skipped)
    if images is not None:
        drawn = figure_files(runs, images.value)
        save_all({out / "figures" / name: figure for name, figure in drawn.items()}, size=size.value)
        typer.echo(f"{len(drawn)} figures: {out / 'figures'}")
    typer.echo(f"Report: {path}")
