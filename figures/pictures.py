"""Pictures that stay the same, byte for byte, for as long as what they show does.

    refresh({"narrow": figure}, Path("figures/pictures"))

Each SVG names the figure that it shows, so that a machine with another browser or other fonts draws nothing
anew, and a picture that no longer shows the results is found without a browser.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import plotly.graph_objects as go

from emmech.figures.saving import save_all
from emmech.results import replace_text

_ORIGIN = "<!-- figure {} -->\n"


def refresh(figures: Mapping[str, go.Figure], folder: Path) -> list[Path]:
    """Write the SVG of those figures that the file there does not show; return the paths.

    Raises:
        FigureError: One has to be drawn, and kaleido or a browser is missing.
    """
    changed = {name: figure for name, figure in figures.items() if not shows(folder / f"{name}.svg", figure)}
    paths = save_all({folder / f"{name}.svg": figure for name, figure in changed.items()})
    for path, figure in zip(paths, changed.values(), strict=True):
        text = _without_random_ids(path.read_text(encoding="utf-8"))
        replace_text(path, _ORIGIN.format(_digest(figure)) + text)
    return paths


def shows(path: Path, figure: go.Figure) -> bool:
    """Whether the SVG at ``path`` was drawn from this figure."""
    return path.exists() and path.read_text(encoding="utf-8").startswith(_ORIGIN.format(_digest(figure)))


def _digest(figure: go.Figure) -> str:
    spec = json.dumps(json.loads(figure.to_json()), sort_keys=True)
    return hashlib.sha256(spec.encode()).hexdigest()[:16]


def _without_random_ids(svg: str) -> str:
    """With plotly's random ids numbered."""
    of_page = re.search(r'id="defs-([0-9a-f]{6})"', svg)
    assert of_page, "plotly's SVG has a group of definitions"
    svg = re.sub(rf"(?<=[a-z-]){of_page[1]}|(?<=[a-z]\d){of_page[1]}", "-", svg)  # ids, no numbers
    numbers: dict[str, str] = {}
    return re.sub(r"\btrace[0-9a-f]{6}\b", lambda m: numbers.setdefault(m[0], f"trace{len(numbers)}"), svg)
