"""Run notebooks top to bottom and keep what they show: ``NN_name.py`` -> ``NN_name.ipynb``.

    python notebooks/build.py            all of them
    python notebooks/build.py 01 04      these, by how their names begin

Sources are percent-format scripts. What is built depends on the source and its outputs alone: no times, no
random ids, no paths. A figure is kept twice, as plotly's JSON, and as a picture for readers without
plotly, where a browser can draw one (extra ``emmech[images]``).
"""

import argparse
import base64
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SHORT = "EMMECH_SHORT"
"""Set to 1, notebooks ask fewer questions and train fewer steps."""
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
QUIET = {
    "PLOTLY_RENDERER": "plotly_mimetype",  # without 5 MB of plotly.js in each notebook
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",  # between third parties
    "GOMP_SPINCOUNT": "20000",
}
ABOUT = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},  # no version
}
WIDTH = 900
"""Of a picture, in pixels."""
TIMEOUT_SECONDS = 1800


def main() -> None:
    """Build the notebooks that are named, and say how long each took to run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="how their names begin; all by default")
    for source in sources(parser.parse_args().names):
        started = time.monotonic()
        notebook = execute(read(source), HERE)
        print(f"{source.stem}: {time.monotonic() - started:.0f} s", flush=True)  # noqa: T201
        if found := [text for text in texts(notebook) if str(HERE.parent) in text]:
            sys.exit(f"{source.name} shows a path of this machine: {found[0][:300]}")
        add_pictures(notebook)
        nbformat.write(notebook, source.with_suffix(".ipynb"))


def sources(names: Sequence[str] = ()) -> list[Path]:
    """Sources whose names begin so, in order."""
    found = sorted(HERE.glob("[0-9][0-9]_*.py"))
    return [source for source in found if not names or source.name.startswith(tuple(names))]


def read(source: Path) -> nbformat.NotebookNode:
    """A source as a notebook without outputs, its cells numbered."""
    notebook = jupytext.read(source)
    notebook.metadata = nbformat.from_dict(ABOUT)
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id, cell.metadata = f"{source.stem[:2]}-{number}", nbformat.from_dict({})
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path, *, short: bool = False) -> nbformat.NotebookNode:
    """Run every cell in a fresh kernel that is started in ``folder``."""
    environment = os.environ | QUIET | {SHORT: "1" if short else "0"}
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=TIMEOUT_SECONDS, resources=where, record_timing=False)
    client.execute(env=environment)
    notebook.metadata = nbformat.from_dict(ABOUT)  # as it was
    for output in outputs(notebook):
        if "text/html" in output.get("data", {}):
            output.data.pop("text/plain", None)  # the same again, or all of a large object
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> Iterator[Any]:
    """What the cells show, in order."""
    for cell in notebook.cells:
        yield from cell.get("outputs", ())


def texts(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Everything shown but pictures, as text."""
    for output in outputs(notebook):
        yield str({kind: value for kind, value in output.items() if kind != "data"})
        yield from (str(value) for kind, value in output.get("data", {}).items() if kind != PNG)


def add_pictures(notebook: nbformat.NotebookNode) -> None:
    """Beside every plotly figure, the same as a PNG."""
    import plotly.io as pio

    for output in outputs(notebook):
        if figure := output.get("data", {}).get(PLOTLY):
            drawn = pio.from_json(pio.json.to_json_plotly(figure), skip_invalid=True)
            output.data[PNG] = base64.b64encode(drawn.to_image("png", width=WIDTH)).decode()


if __name__ == "__main__":
    main()
