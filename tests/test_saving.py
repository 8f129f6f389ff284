"""Figures as files."""

import struct
import sys

import pytest
from browser import needs_browser

from emmech import figures
from emmech.figures.saving import FigureError, printed, save, save_all

STEPS = [{"step": step, "loss": 3.0 - step / 2} for step in range(4)]


@pytest.fixture
def figure():
    return figures.training_loss(STEPS)


def test_html_needs_no_browser_and_keeps_plotly_in_one_file_beside(figure, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    save(figure, tmp_path / "a" / "one.html")
    save(figure, tmp_path / "a" / "two.html")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "one.html",
        "plotly.min.js",
        "two.html",
    ]
    text = (tmp_path / "a" / "one.html").read_text()
    assert "Loss 3.00" in text and len(text) < 100_000


def test_print_is_dark_on_solid_white_and_as_wide_as_a_text(figure):
    copy = printed(figure)
    assert (copy.layout.paper_bgcolor, copy.layout.plot_bgcolor) == ("#ffffff", "#ffffff")
    assert copy.layout.font.color == "#1b1f23"
    assert copy.layout.width == 660
    assert copy.to_plotly_json()["data"] == figure.to_plotly_json()["data"]
    assert figure.layout.paper_bgcolor is None  # the figure itself stays see-through


def test_a_figure_wider_than_print_keeps_its_width(figure):
    assert printed(figure.update_layout(width=1400)).layout.width == 1400


def test_an_ending_that_is_no_format_is_refused_before_anything_is_written(figure, tmp_path):
    with pytest.raises(FigureError, match=r"expected a path that ends in .*, but got .*bmp'\. Correct"):
        save_all({tmp_path / "a.html": figure, tmp_path / "a.bmp": figure})
    assert not list(tmp_path.iterdir())


def test_without_kaleido_an_image_is_refused_and_says_what_to_install(figure, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)  # what Python does where a package is missing
    with pytest.raises(FigureError, match=r"expected kaleido .*pip install 'emmech\[images\]'"):
        save(figure, tmp_path / "a.png")


def test_without_a_browser_an_image_is_refused_and_says_what_to_install(figure, tmp_path, monkeypatch):
    pytest.importorskip("kaleido")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))  # where kaleido looks
    with pytest.raises(FigureError, match=r"expected a Chrome or Chromium, .*kaleido_get_chrome"):
        save(figure, tmp_path / "a.png")


@needs_browser
def test_images_of_all_kinds_are_written_at_once(figure, tmp_path):
    pytest.importorskip("kaleido")
    paths = save_all({tmp_path / f"loss.{kind}": figure for kind in ("png", "svg", "pdf")}, size="print")
    png, svg, pdf = (path.read_bytes() for path in paths)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24])[0] == 4 * 660
    assert svg.startswith(b"<svg") and b"Loss 3.00" in svg
    assert pdf.startswith(b"%PDF")
