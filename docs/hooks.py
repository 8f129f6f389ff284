"""Pages that are made while the site is built: results, command line, and the notebooks that are there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

from emmech.cli import app

ROOT = Path(__file__).parents[1]
IMAGES_FIRST = ["image/svg+xml", "image/png", "text/html", "text/markdown", "text/plain"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have another source, and the notebooks to the navigation."""
    results = (ROOT / "figures/README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "results.md", content=results))
    for path in sorted((ROOT / "figures/pictures").glob("*.svg")):
        files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    pages = []
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        title, content, images = page_of(notebook)
        name = f"tutorials/{notebook.stem}.md"
        pages.append({title: name})
        files.append(File.generated(config, name, content=content))
        for path, data in images.items():
            files.append(File.generated(config, f"tutorials/{path}", content=data))
    if pages:
        (tutorials,) = [part for part in config.nav if "Tutorials" in part]
        tutorials["Tutorials"] = ["tutorials.md", *pages]
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that lead out of `docs` in the repository lead to their pages in the site."""
    return markdown.replace("../figures/README.md", "results.md").replace("../figures/pictures", "pictures")


def page_of(notebook: Path) -> tuple[str, str, dict[str, bytes]]:
    """A built notebook as title, Markdown and images; figures are their stored pictures."""
    exporter = MarkdownExporter()
    exporter.register_filter("strip_files_prefix", lambda text: text)
    settings = {"output_files_dir": f"{notebook.stem}_files", "unique_key": notebook.stem}
    cells = nbformat.read(notebook, as_version=4)
    for cell in cells.cells:
        for output in cell.get("outputs", ()):
            output.data = _best(output["data"]) if "data" in output else None
    content, made = exporter.from_notebook_node(cells, resources=settings)
    title = re.search(r"^# (.+)$", content, re.MULTILINE)
    return title[1] if title else notebook.stem, content, dict(made["outputs"])


def _best(data: dict[str, Any]) -> dict[str, Any]:
    """Of an output's forms, the one that a page without scripts shows best."""
    kind = next(kind for kind in (*IMAGES_FIRST, *data) if kind in data)
    return {kind: data[kind]}


def command_line() -> str:
    """Every command with its arguments and options, from the commands themselves."""
    root = typer.main.get_command(app)
    head = "# Command line\n\nMade from the commands; `emmech COMMAND --help` says the same.\n"
    return head + "\n".join(
        text for name, command in sorted(root.commands.items()) for text in _pages(name, command)
    )


def _pages(name: str, command: Any) -> Iterator[str]:
    for below, one in sorted(getattr(command, "commands", {}).items()):
        yield from _pages(f"{name} {below}", one)
    if getattr(command, "no_args_is_help", False):
        return  # it only holds the others
    lines = [f"\n## emmech {name}\n", (command.help or "").strip(), "\n| option | |", "|---|---|"]
    for one in command.params:
        if one.name != "help":
            is_option = bool(one.opts) and one.opts[0].startswith("-")
            label = ", ".join([*one.opts, *one.secondary_opts]) if is_option else one.name.upper()
            text = (getattr(one, "help", None) or "").replace("|", "\\|")
            lines.append(f"| `{label}` | {text}{_default(one)} |")
    example = re.sub(r"\[/?bold\]", "", command.epilog or "").removeprefix("Example: ")
    yield "\n".join([*lines, f"\n```\n{example}\n```" if example else ""])


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return " **Required.**"
    if value in (None, False, (), []) or callable(value):
        return ""
    return f" Default: `{getattr(value, 'value', value)}`."
