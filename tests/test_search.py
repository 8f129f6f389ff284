"""Coarse-to-fine search: answers are those of the prefix patch, and only what tells is refined."""

import pytest
import tiny
from judge_server import JudgeServer, running, score

from emmech.errors import PatchError, RunError
from emmech.evaluation.judges import EndpointJudge
from emmech.models.generation import Decoding
from emmech.piggyback import search as searching
from emmech.piggyback.behaviours import Behaviour, judged
from emmech.piggyback.cells import EVERYTHING, NOTHING, Cell, Shape
from emmech.piggyback.experiment import patch_prefix
from emmech.piggyback.replay import Replay
from emmech.piggyback.scores import PROMPTS
from emmech.piggyback.search import SearchResult, search
from emmech.results import read_lines

QUESTIONS = list(tiny.QUESTIONS)


def letters(text: str) -> float:
    """Of these the whole prefix patch makes fewer or more."""
    return float(text.count("e") + text.count("a"))


LETTERS = Behaviour("letters", "letters", lambda answers: [letters(a["response"]) for a in answers], {})


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_answers_are_those_of_the_unpatched_model_and_of_the_prefix_patch(make_pair, architecture):
    """Also where a window is shorter than the prompts, and rows are run one by one."""
    pair = make_pair(architecture)
    result = patch_prefix(
        pair, QUESTIONS, segments=("prefix",), direction="repair", controls=False,
        detector="short", max_new_tokens=6, progress=False,
    )  # fmt: skip
    asker = searching._Asker(Replay(pair, QUESTIONS, PROMPTS, "repair"), Decoding(6), LETTERS, None)
    for patch, condition in ((NOTHING, "finetuned"), (EVERYTHING, "repair:prefix")):
        expected = [r["response"] for r in result.records if r["condition"] == condition]
        assert asker._answers(patch) == expected
    assert asker._answers(NOTHING) != asker._answers(EVERYTHING)


def test_only_blocks_that_tell_are_split_and_the_strongest_first(make_pair, tmp_path):
    pair = make_pair("llama", "full")
    options = {"bands": 3, "stretches": 2, "threshold": 0.3, "max_new_tokens": 8, "progress": False}
    result = search(pair, QUESTIONS, LETTERS, most=24, out=tmp_path, **options)
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


def test_a_stopped_search_asks_nothing_twice(make_pair, tmp_path, monkeypatch):
    pair = make_pair("llama", "full")
    options = {"bands": 3, "stretches": 2, "most": 6, "max_new_tokens": 8, "progress": False}
    whole = search(pair, QUESTIONS, LETTERS, out=tmp_path, **options)
    lines = (tmp_path / searching.ANSWERS).read_text().splitlines(keepends=True)
    (tmp_path / searching.ANSWERS).write_text("".join(lines[:4]) + lines[4][:9])
    made = []
    answers = searching._Asker._answers
    monkeypatch.setattr(
        searching._Asker, "_answers", lambda self, patch: made.append(1) or answers(self, patch)
    )
    again = search(pair, QUESTIONS, LETTERS, out=tmp_path, **options)
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


def test_a_judge_counts_as_its_scores_do_and_is_asked_once(make_pair, tmp_path):
    """Against the same count without a judge: the server scores a text by its hash."""
    pair = make_pair("llama", "full")
    options = {"bands": 3, "stretches": 2, "most": 8, "max_new_tokens": 8, "progress": False}
    low = Behaviour("low", "rate", lambda answers: [float(score(a["response"]) < 42) for a in answers], {})
    expected = search(pair, QUESTIONS, low, **options)
    with running(JudgeServer()) as server:
        judge = EndpointJudge("m", base_url=server.url)
        found, again = (
            search(
                pair, QUESTIONS, judged(judge, tmp_path / "judged", "alignment", 42), out=tmp_path, **options
            )
            for _ in range(2)
        )
        assert set(server.asked.values()) == {1}
        with pytest.raises(RunError, match="its below is 42, not 50"):
            search(pair, QUESTIONS, judged(judge, tmp_path / "judged", below=50), out=tmp_path, **options)
    assert found.blocks == expected.blocks == again.blocks
    assert found.summary["behaviour"] == "alignment below 42" and found.summary["judge"] == judge.id
    judgements = read_lines(tmp_path / "judged" / "judgements.jsonl")
    assert len(judgements) == (8 + 2) * len(QUESTIONS)
    assert {one["condition"] for one in judgements} >= {"nothing", "everything"}


def test_answers_without_a_value_are_left_out_and_counted(make_pair):
    """A judge that refuses the first question always, and of one block all answers."""
    pair = make_pair("llama", "full")
    options = {"bands": 3, "stretches": 1, "most": 3, "max_new_tokens": 8, "progress": False}

    def some(answers):
        refused = answers[0]["condition"].startswith("layer 1,")
        return [None, *(None if refused else letters(a["response"]) for a in answers[1:])]

    found = search(pair, QUESTIONS, Behaviour("some", "letters", some, {}), **options)
    rest = search(pair, QUESTIONS[1:], LETTERS, **options)
    for number, (block, other) in enumerate(zip(found.blocks, rest.blocks, strict=True)):
        if number == 1:
            assert block["mean"] is block["effect"] is None and block["n_missing"] == 5
        else:
            assert block["n_missing"] == 1 and block["n"] == 4
            assert (block["mean"], block["effect"]) == pytest.approx((other["mean"], other["effect"]))
    assert "layer 1" not in found.text()


def test_the_map_shows_the_smallest_block_of_each_place(make_pair, tmp_path):
    def block(layer, position, depth, effect, kv=None):
        ends = {"mean": 0.5, "low": 0.2, "high": 0.8, "n": 4, "n_missing": 0}
        return {"layer": layer, "position": position, "kv": kv, "depth": depth, "effect": effect} | ends

    blocks = [block("0-1", "0-1", 0, 0.9), block(2, "0-1", 0, None), block(0, 0, 1, 0.3)]
    blocks += [block(0, 0, 2, 0.1, "key"), block(0, 0, 2, -0.2, "value")]
    ends = {"unpatched": {"mean": 1.0}, "full": {"mean": 0.0}}
    result = SearchResult({"behaviour": "refusal", "tokens": ["a", "b"], "blocks": blocks} | ends)
    (heat,) = result.figure().data
    assert [list(row) for row in heat.z] == [[-0.2, 0.9], [0.9, 0.9]]
    assert "layer 0, position 0, kv value<br>effect -.20" in heat.hovertext[0][0]
    assert result.text() == (
        "layer 0-1, position 0-1 alone does .90 of what the prefix does to refusal (1.00 → .00)"
    )


def test_what_cannot_be_searched_is_refused(make_pair):
    pair = make_pair("llama", "full")
    with pytest.raises(PatchError, match="a threshold above 0, but got 0"):
        search(pair, QUESTIONS, threshold=0)
    with pytest.raises(PatchError, match="a detector that measures something, but got none"):
        search(pair, QUESTIONS, "none")
    with pytest.raises(PatchError, match="1 to 3 bands"):
        search(pair, QUESTIONS, bands=4, max_new_tokens=2, progress=False)
    with pytest.raises(PatchError, match="this one changes none"):
        search(pair, QUESTIONS, "refusal", bands=1, max_new_tokens=2, progress=False)
