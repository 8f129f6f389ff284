"""The command doctor."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from emmech.cli.options import example

if TYPE_CHECKING:
    from emmech.doctor import Finding

app = typer.Typer()
_MARKS = {"ok": "[green]ok[/green]", "absent": "[yellow]-[/yellow]", "missing": "[red]missing[/red]"}


@app.command(epilog=example("emmech doctor --url http://localhost:8000/v1"))
def doctor(
    url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint to try; OPENAI_BASE_URL by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """See what is installed and reachable: versions, devices, extras, models, endpoints.

    Exit code 1 when something needed is missing.
    """
    from emmech.doctor import examine

    findings = examine(url)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _show(findings)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def _show(findings: "list[Finding]") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    topic = None
    for finding in findings:
        shown = "" if finding.topic == topic else f"[bold]{finding.topic}[/bold]"
        text = escape(finding.detail + (f". {finding.fix}" if finding.fix else ""))
        table.add_row(shown, escape(finding.name), _MARKS[finding.state], text)
        topic = finding.topic
    Console().print(table)
