"""Coarse-to-fine search: answers are those of the prefix patch, and only what tells is refined."""

import pytest
import tiny

from emmech.errors import PatchError
from emmech.models.generation import Decoding
from emmech.piggyback import search as searching
from emmech.piggyback.cells import EVERYTHING, NOTHING, Cell, Shape
from emmech.piggyback.experiment import patch_prefix
from emmech.piggyback.replay import Replay
from emmech.piggyback.scores import PROMPTS
from emmech.piggyback.search import search
from emmech.results import read_lines

QUESTIONS = list(tiny.QUESTIONS)


class Letters:
    """Counts a letter that the whole prefix patch makes rarer or more frequent."""

    name, unit = "letters", "letters"

    def __call__(self, text: str) -> float:
        return float(text.count("e") + text.count("a"))


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(searching, "find_detector", lambda _: Letters())


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_answers_are_those_of_the_unpatched_model_and_of_the_prefix_patch(make_pair, architecture):
    """Also where a window is shorter than the prompts, and rows are run one by one."""
    pair = make_pair(architecture)
    result = patch_prefix(
        pair, QUESTIONS, segments=("prefix",), direction="repair", controls=False,
        detector="short", max_new_tokens=6, progress=False,
    )  # fmt: skip
    asker = searching._Asker(Replay(pair, QUESTIONS, PROMPTS, "repair"), Decoding(6), None)
    for patch, condition in ((NOTHING, "finetuned"), (EVERYTHING, "repair:prefix")):
        expected = [r["response"] for r in result.records if r["condition"] == condition]
        assert asker._answers(patch) == expected
    assert asker._answers(NOTHING) != asker._answers(EVERYTHING)


def test_only_blocks_that_tell_are_split_and_the_strongest_first(make_pair, counted, tmp_path):
    pair = make_pair("llama", "full")
    options = {"bands": 3, "stretches": 2, "threshold": 0.3, "max_new_tokens": 8, "progress": False}
    result = search(pair, QUESTIONS, most=24, out=tmp_path, **options)
    frame = result.frame()
    assert (frame["depth"][:6] == 0).all() and (frame["depth"][6:] > 0).all()
    assert frame["layer"][:6].tolist() == [0, 0, 1, 1, 2, 2]
    assert frame["position"][:2].tolist() == ["0-7", "8-15"]
    telling = frame[:6].loc[frame["effect"][:6].abs() >= 0.3]
    strongest = telling.loc[telling["effect"].abs().idxmax()]
    first, last = map(int, strongest["position"].split("-"))
    assert frame["layer"][6] == strongest["layer"]
    assert frame["position"][6] == f"{first}-{(first + last) // 2}"
    quiet = set(frame["layer"][:6]) - set(telling["layer"])
    assert not quiet & set(frame["layer"][6:])
    whole = result.summary["full"]["mean"] - result.summary["unpatched"]["mean"]
    expected = (frame["mean"] - result.summary["unpatched"]["mean"]) / whole
    assert frame["effect"].tolist() == pytest.approx(expected.tolist())


def test_a_stopped_search_asks_nothing_twice(make_pair, counted, tmp_path, monkeypatch):
    pair = make_pair("llama", "full")
    options = {"bands": 3, "stretches": 2, "most": 6, "max_new_tokens": 8, "progress": False}
    whole = search(pair, QUESTIONS, out=tmp_path, **options)
    lines = (tmp_path / searching.ANSWERS).read_text().splitlines(keepends=True)
    (tmp_path / searching.ANSWERS).write_text("".join(lines[:4]) + lines[4][:9])
    made = []
    answers = searching._Asker._answers
    monkeypatch.setattr(
        searching._Asker, "_answers", lambda self, patch: made.append(1) or answers(self, patch)
    )
    again = search(pair, QUESTIONS, out=tmp_path, **options)
    assert again.blocks == whole.blocks and len(made) == 8 - 4
    assert len(read_lines(tmp_path / searching.ANSWERS)) == 8


def test_blocks_cover_the_prefix_once_and_halve_down_to_one_key_or_value():
    shape = Shape(5, 7, 2)
    total = sum(
        cell.mask(layer, shape).astype(int) if layer in cell.layer else 0
        for cell in searching._blocks(shape, 2, 3)
        for layer in range(5)
    )
    assert (total == 5).all()
    waiting, leaves = [Cell(layer=(0, 1, 2), position=(4, 5))], []
    while waiting:
        cell = waiting.pop()
        halves = searching._halves(cell)
        waiting += halves
        leaves += [] if halves else [(cell.layer, cell.position, cell.kv)]
    expected = [((layer,), (at,), (kv,)) for layer in range(3) for at in (4, 5) for kv in (0, 1)]
    assert sorted(leaves) == expected


def test_what_cannot_be_searched_is_refused(make_pair):
    pair = make_pair("llama", "full")
    with pytest.raises(PatchError, match="a detector that measures"):
        search(pair, QUESTIONS, threshold=0)
    with pytest.raises(PatchError, match="1 to 3 bands"):
        search(pair, QUESTIONS, bands=4, max_new_tokens=2, progress=False)
    with pytest.raises(PatchError, match="this one changes none"):
        search(pair, QUESTIONS, detector="refusal", bands=1, max_new_tokens=2, progress=False)
