"""A figure as a file: HTML always, an image where kaleido and a browser are there.

    save(condition_bars(summary), "figures/piggyback.pdf", size="print")

Images are on white with dark text, for slides and paper. HTML takes plotly from a file beside it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go

from emmech.errors import EmmechError

Size = Literal["screen", "print"]
SIZES: Mapping[Size, tuple[int, float]] = {"screen": (960, 2.0), "print": (660, 4.0)}
"""Width in pixels of 1/96 inch, and how many dots of a PNG each becomes; print is as wide as a text."""
IMAGES = ("png", "svg", "pdf")


class FigureError(EmmechError):
    """A figure cannot be written."""


def save(figure: go.Figure, path: str | Path, *, size: Size = "screen") -> Path:
    """Write a figure as what the path ends in: .html, .png, .svg or .pdf. Returns the path.

    Args:
        figure: In house style.
        path: The file; its folder is made.
        size: Of images. A figure that sets a larger width keeps it.

    Raises:
        FigureError: The ending is another, kaleido or a browser is missing, or the browser fails.
    """
    return save_all({path: figure}, size=size)[0]


def save_all(figures: Mapping[str | Path, go.Figure], *, size: Size = "screen") -> list[Path]:
    """Write several figures, by their paths, all images in one browser; as in ``save``."""
    chosen = {Path(path): figure for path, figure in figures.items()}
    kinds = {path: path.suffix.removeprefix(".") for path in chosen}
    for path, kind in kinds.items():
        if kind not in ("html", *IMAGES):
            raise FigureError(
                "a path that ends in .html, .png, .svg or .pdf", f"got '{path}'", "Correct the ending"
            )
    images = {path: printed(figure, size) for path, figure in chosen.items() if kinds[path] != "html"}
    write = _image_writer() if images else None
    for path, figure in chosen.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if kinds[path] == "html":
            figure.write_html(path, include_plotlyjs="directory")
    if write:
        write(images, SIZES[size][1])
    return list(chosen)


def printed(figure: go.Figure, size: Size = "print") -> go.Figure:
    """A copy on solid white with dark text, as wide as ``size`` says."""
    copy = go.Figure(figure)
    width = max(SIZES[size][0], figure.layout.width or 0)
    return copy.update_layout(
        width=width, paper_bgcolor="#ffffff", plot_bgcolor="#ffffff", font_color="#1b1f23"
    )


def _image_writer() -> Callable[[Mapping[Path, go.Figure], float], None]:
    """What writes images by path.

    Raises:
        FigureError: kaleido or its browser is missing.
    """
    try:
        import kaleido
        from kaleido import errors
    except ImportError as error:
        raise FigureError(
            "kaleido 1 or later, which writes images",
            "it is not installed",
            "Install it with `pip install 'emmech[images]'`, or save as .html",
        ) from error
    failures = (errors.KaleidoError, errors.JavascriptError)
    failures += (errors.BrowserFailedError, errors.BrowserClosedError)

    def write(images: Mapping[Path, go.Figure], scale: float) -> None:
        specs = []
        for path, figure in images.items():
            shape = {"width": figure.layout.width, "height": figure.layout.height, "scale": scale}
            specs.append(
                {"fig": figure.to_dict(), "path": str(path), "opts": shape | {"format": path.suffix[1:]}}
            )
        try:
            kaleido.write_fig_from_object_sync(specs)
        except errors.ChromeNotFoundError as error:
            raise FigureError(
                "a Chrome or Chromium, which draws images",
                "kaleido found none",
                "Install chromium, run `kaleido_get_chrome`, or save as .html",
            ) from error
        except failures as error:
            raise FigureError(
                "an image of every figure", f"the browser failed ({error})", "Save as .html"
            ) from error

    return write
