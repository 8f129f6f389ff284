"""Notebooks: every source runs top to bottom in short mode, and what is built is what the source says."""

import ast
import runpy
from pathlib import Path

import nbformat
import pytest

from emmech.models.default import embedded_path

ROOT = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(ROOT.glob("[0-9][0-9]_*.py"))
NAMES = [source.stem for source in SOURCES]
MOST_CELLS, MOST_LINES = range(6, 16), 5
MOST_BYTES = 3_000_000
build = runpy.run_path(str(ROOT / "build.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all notebooks are started; runs lie beside it, and the organism of 01 serves the others."""
    embedded_path()  # converted here, with its progress bar, where it was not yet
    place = tmp_path_factory.mktemp("checkout") / "notebooks"
    place.mkdir()
    return place


def built(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def code(source):
    return [cell.source for cell in build["read"](source).cells if cell.cell_type == "code"]


@pytest.mark.weights
@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_it_runs_top_to_bottom(source, folder):
    notebook = build["execute"](build["read"](source), folder, short=True)
    shown = [cell for cell in notebook.cells if cell.get("outputs")]
    assert len(shown) >= 3
    assert "What would change our mind" in shown[-1].outputs[-1].data["text/markdown"]
    assert all(output.output_type != "stream" for output in build["outputs"](notebook)), shown
    texts = list(build["texts"](notebook))
    assert not [bad for bad in (str(folder.parent), "Training Loss") for text in texts if bad in text]


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_what_is_built_has_the_cells_of_its_source_and_was_run_in_order(source):
    notebook, plain = built(source), build["read"](source)
    kept = [(cell.id, cell.cell_type, cell.source) for cell in notebook.cells]
    assert kept == [(cell.id, cell.cell_type, cell.source) for cell in plain.cells]
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert notebook.metadata == plain.metadata
    nbformat.validate(notebook)


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_what_is_built_shows_figures_and_no_noise(source):
    found = list(build["outputs"](built(source)))
    kinds = [kind for output in found for kind in output.get("data", {})]
    assert kinds.count(build["PLOTLY"]) == kinds.count(build["PNG"])
    assert not [kind for kind in kinds if "widget" in kind]
    assert {output.output_type for output in found} <= {"display_data", "execute_result"}
    text = "\n".join(build["texts"](built(source)))
    assert "Training Loss" not in text  # transformers' own progress in a notebook
    assert not [
        place for place in ("/home/", "/root/", "/Users/", "/tmp/", str(ROOT.parent)) if place in text
    ]


def test_all_that_is_built_is_small_enough_for_a_repository():
    assert sum(path.stat().st_size for path in ROOT.glob("*.ipynb")) < MOST_BYTES


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_it_is_short_and_tells_its_question_first_and_its_finding_last(source):
    cells = build["read"](source).cells
    assert len(cells) in MOST_CELLS
    for word in ("**Question.**", "**Expected.**", "**Run time.**"):
        assert word in cells[0].source
    for word in ("What was found", "What would change our mind"):
        assert word in cells[-1].source


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_it_calls_the_library_and_defines_next_to_nothing(source):
    text = "\n".join(code(source))
    assert not [word for word in ("sys.path", "pip install", "!", "%") if f"\n{word}" in f"\n{text}"]
    functions = [one for one in ast.walk(ast.parse(text)) if isinstance(one, ast.FunctionDef)]
    long = [one.name for one in functions if one.end_lineno - one.lineno + 1 > MOST_LINES]
    assert not long


def test_the_list_of_notebooks_has_every_one():
    listed = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(SOURCES) == 7
    assert not [name for name in NAMES if f"({name}.ipynb)" not in listed]
