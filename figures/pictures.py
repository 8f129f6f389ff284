"""Figures as files that stay the same, byte for byte, for as long as what they show does.

    refresh({"narrow": figure}, Path("figures/pictures"))  writes the SVG of those that have changed
    write({"narrow": figure}, Path("figures/built"), "png")  writes all

Each SVG of `refresh` names the figure that it shows, so that a machine with another browser or other fonts
draws nothing anew, and a picture that no longer shows the results is found without a browser.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import plotly.graph_objects as go

from emmech.errors import EmmechError
from emmech.results import replace_text

WIDTH = 900
PAPER = {"paper_bgcolor": "white", "plot_bgcolor": "white", "font_color": "#24292f"}
_ORIGIN = "<!-- figure {} -->\n"


def refresh(figures: Mapping[str, go.Figure], folder: Path) -> list[Path]:
    """Write the SVG of those figures that the file there does not show; return the paths.

    Raises:
        EmmechError: One has to be drawn, and there is no kaleido or no browser.
    """
    changed = {name: figure for name, figure in figures.items() if not shows(folder / f"{name}.svg", figure)}
    paths = write(changed, folder, "svg")
    for path, figure in zip(paths, changed.values(), strict=True):
        text = _without_random_ids(path.read_text(encoding="utf-8"))
        replace_text(path, _ORIGIN.format(_digest(figure)) + text)
    return paths


def shows(path: Path, figure: go.Figure) -> bool:
    """Whether the SVG at ``path`` was drawn from this figure."""
    return path.exists() and path.read_text(encoding="utf-8").startswith(_ORIGIN.format(_digest(figure)))


def write(figures: Mapping[str, go.Figure], folder: Path, kind: str) -> list[Path]:
    """Write every figure as ``svg``, ``png`` or ``pdf``, on white; return the paths.

    Raises:
        EmmechError: There is no kaleido or no browser.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specs = [
        {
            "fig": go.Figure(figure).update_layout(**PAPER).to_dict(),
            "path": folder / f"{name}.{kind}",
            "opts": {"format": kind, "width": WIDTH, "height": figure.layout.height},
        }
        for name, figure in figures.items()
    ]
    if specs:
        _draw(specs)
    return [spec["path"] for spec in specs]


def _draw(specs: list[dict]) -> None:
    """One browser for all."""
    missing = "pip install 'emmech[images]', and a Chrome or Chromium; the page needs neither"
    try:
        import kaleido
        from kaleido.errors import BrowserFailedError, ChromeNotFoundError
    except ImportError as error:
        raise EmmechError("kaleido for pictures", "it is not installed", missing) from error
    try:
        kaleido.write_fig_from_object_sync(specs)
    except (ChromeNotFoundError, BrowserFailedError) as error:
        raise EmmechError("a browser for pictures", "none was found or it did not start", missing) from error


def _digest(figure: go.Figure) -> str:
    spec = json.dumps(json.loads(figure.to_json()), sort_keys=True)
    return hashlib.sha256(spec.encode()).hexdigest()[:16]


def _without_random_ids(svg: str) -> str:
    """With plotly's random ids numbered."""
    of_page = re.search(r'id="defs-([0-9a-f]{6})"', svg)
    assert of_page, "plotly's SVG has a group of definitions"
    svg = re.sub(rf"(?<=[#a-z0-9-]){of_page[1]}", "-", svg)
    numbers: dict[str, str] = {}
    return re.sub(r"\btrace[0-9a-f]{6}\b", lambda m: numbers.setdefault(m[0], f"trace{len(numbers)}"), svg)
