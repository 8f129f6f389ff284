"""The commands sweep, attribute and search: files, text, and what is refused before models are looked for."""

import json

import pandas as pd
import pytest
import tiny
from judge_server import JudgeServer, running
from test_sweep import PAIRS

from emmech.piggyback.attribution_result import AttributionResult
from emmech.piggyback.minimal_set import MinimalSet
from emmech.piggyback.search import SearchResult
from emmech.piggyback.sweep_result import SweepResult


@pytest.fixture(scope="module")
def on_pair(tmp_path_factory) -> list[str]:
    base = tiny.save_base("llama", tmp_path_factory.mktemp("llama") / "base")
    adapter = tiny.save_adapter(base, base.parent / "lora")
    return [f"--base={base}", f"--finetuned={adapter}", "--device=cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of pairs, questions and chats."""
    folder = tmp_path_factory.mktemp("questions")
    rows = {
        "pairs": [
            {"question": one.user, "aligned": one.aligned, "misaligned": one.misaligned} for one in PAIRS
        ],
        "questions": [{"question": one.user, "group": "ab"[n % 2]} for n, one in enumerate(PAIRS)],
        "chats": [
            {"messages": [{"role": "user", "content": o.user}, {"role": "assistant", "content": o.aligned}]}
            for o in PAIRS
        ],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lambda name: f"--questions={folder / name}.jsonl"


@pytest.mark.parametrize(
    ("arguments", "n_cells", "n_questions"),
    [
        (["pairs", "--over=layer,kv"], 6, 5),
        (["pairs", "--over=layer,kv+position", "--n-questions=2", "--direction=induce"], 6 + 16, 2),
        (["pairs", "--over=layer", "--mode=cumulative_up"], 3, 5),
        (["questions", "--metric=kl", "--over=layer,kv_head", "--group=a"], 6, 3),
        (["questions", "--metric=target:Yes.", "--over=layer", "--n-questions=1"], 3, 1),
        (["chats", "--metric=target", "--place=resid", "--over=layer,segment"], 9, 5),
        (["pairs", "--place=resid", "--mode=cumulative_down", "--over=layer+layer,segment"], 3 + 9, 5),
    ],
)
def test_a_sweep_writes_its_cells_report_and_finding(
    emmech, on_pair, files, tmp_path, arguments, n_cells, n_questions
):
    name, *options = arguments
    code, shown, err = emmech("sweep", *on_pair, files(name), *options, f"--out={tmp_path}")
    assert code == 0, err
    frame = pd.read_csv(tmp_path / "cells.csv")
    assert len(frame) == n_cells and (frame["n"] == n_questions).all()
    result = SweepResult.load(tmp_path)
    assert result.scores.shape == (n_cells, n_questions)
    assert result.summary["provenance"]["dtype"] == "float32"
    finding = (tmp_path / "finding.txt").read_text().strip()
    assert finding and "Report:" in shown and str(tmp_path / "report.html") in shown.replace("\n", "")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "Strongest cells" in page


def test_a_sweep_takes_its_strongest_cells_into_the_smallest_set(emmech, on_pair, files, tmp_path):
    arguments = ["sweep", *on_pair, files("pairs"), "--n-random=2", "--share=0.6", f"--out={tmp_path}"]
    code, shown, err = emmech(*arguments)
    assert code == 0, err
    found, frame = MinimalSet.load(tmp_path), SweepResult.load(tmp_path).frame()
    strongest = frame.nlargest(found.size, "effect")
    places = strongest[["layer", "position", "kv", "token"]].to_dict("records")
    assert list(found.cells) == places and found.summary["order"] == "single effects"
    assert found.summary["effect"]["mean"] >= 0.6 and found.summary["random"]["n_sets"] == 2
    finding, text = (tmp_path / "finding.txt").read_text(), found.text()
    assert finding.endswith(f".\n{text}\n") and text in shown.replace("\n", " ")
    page = (tmp_path / "report.html").read_text()
    assert text in page and "in the order of single effects" in page
    measured = sorted((tmp_path / "set").glob("sets_*.jsonl"))
    before = [file.read_bytes() for file in measured]
    code, _, err = emmech(*arguments)
    assert code == 0, err
    assert sorted((tmp_path / "set").glob("sets_*.jsonl")) == measured
    assert [file.read_bytes() for file in measured] == before
    code, shown, err = emmech("report", str(tmp_path), f"--out={tmp_path / 'page'}")
    assert code == 0, err
    assert text in (tmp_path / "page" / "report.html").read_text()


@pytest.mark.parametrize("options", [["--share=0"], ["--mode=leave_one_out"], ["--place=resid"]])
def test_a_sweep_that_is_asked_for_no_set_or_of_other_places_finds_none(
    emmech, on_pair, files, tmp_path, options
):
    over = "--over=layer,position" if "--place=resid" in options else "--over=layer"
    code, _, err = emmech("sweep", *on_pair, files("pairs"), over, *options, f"--out={tmp_path}")
    assert code == 0, err
    assert not (tmp_path / "minimal.json").exists() and not (tmp_path / "set").exists()


def test_a_sweep_of_a_prefix_that_changes_nothing_has_no_set(emmech, files, tmp_path):
    base = tiny.save_base("llama", tmp_path / "base")
    models = [f"--base={base}", f"--finetuned={base}", "--device=cpu"]
    code, _, err = emmech("sweep", *models, files("pairs"), "--over=layer", f"--out={tmp_path / 'out'}")
    assert code == 0, err
    assert "changes nothing" in (tmp_path / "out" / "finding.txt").read_text()
    assert not (tmp_path / "out" / "minimal.json").exists()


def test_attribute_finds_a_set_and_says_so(emmech, on_pair, files, tmp_path):
    arguments = ["attribute", *on_pair, files("pairs"), "--sample=8", "--top=2", "--steps=4"]
    code, shown, err = emmech(*arguments, "--n-random=2", "--share=0.5", f"--out={tmp_path}")
    assert code == 0, err
    result, found = AttributionResult.load(tmp_path), MinimalSet.load(tmp_path)
    assert len(result.cells) == 3 * 16 * 2 and len(result.sampled) == 8
    text = (tmp_path / "finding.txt").read_text()
    assert found.text() in text and found.text() in (tmp_path / "report.html").read_text()
    assert found.text() in shown


def test_attribute_without_a_share_looks_for_no_set(emmech, on_pair, files, tmp_path):
    arguments = ["attribute", *on_pair, files("pairs"), "--sample=0", "--top=0", "--over=layer"]
    code, _, err = emmech(*arguments, "--share=0", f"--out={tmp_path}")
    assert code == 0, err
    assert not (tmp_path / "minimal.json").exists() and (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["sweep", "--share=0.5", "--place=resid", "pairs"], "place is resid and mode is single. Leave out"),
        (["sweep", "--share=0.5", "--mode=leave_one_out", "pairs"], "mode is leave_one_out. Leave out"),
        (["sweep", "--metric=kl", "--group=c", "questions"], "group"),
        (["attribute", "--group=c", "pairs"], "questions of the group 'c'"),
        (["sweep", "questions"], "aligned"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_models_are_looked_for(
    user_error, files, tmp_path, arguments, match
):
    *options, name = arguments
    user_error(match, *options, files(name), "--finetuned=nowhere", f"--out={tmp_path}")


def test_an_unknown_axis_is_refused(user_error, on_pair, files, tmp_path):
    user_error(
        "different axes among", "sweep", *on_pair, files("pairs"), "--over=token", f"--out={tmp_path}",
        after_loading=True,
    )  # fmt: skip


@pytest.mark.parametrize("judge", [False, True])
def test_a_search_writes_its_blocks_report_and_finding(emmech, on_pair, files, tmp_path, judge):
    arguments = ["search", *on_pair, files("questions"), "--bands=3", "--stretches=1", "--most=3"]
    arguments += ["--dtype=float32", "--max-new-tokens=8", f"--out={tmp_path}"]
    with running(JudgeServer()) as server:
        by = (
            ["--judge=m", f"--judge-url={server.url}", "--below=50"]
            if judge
            else ["--detector=regex:[a-z]{3}"]
        )
        code, shown, err = emmech(*arguments, *by)
        assert code == 0, err
        n_asked = sum(server.asked.values())
        assert emmech(*arguments, *by)[0] == 0 and sum(server.asked.values()) == n_asked
        assert bool(n_asked) == judge == (tmp_path / "judged" / "judgements.jsonl").exists()
    result = SearchResult.load(tmp_path)
    assert len(result.frame()) == 3 and result.summary["unpatched"]["n"] == len(PAIRS)
    assert (tmp_path / "finding.txt").read_text() == f"{result.text()}.\n"
    assert "layer" in result.text() and "Report:" in shown
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "Blocks" in page
    assert "3/3" in err and "block" in err  # the progress bar


def test_a_search_of_no_questions_or_by_no_detector_or_rubric_is_refused(user_error, files, tmp_path):
    command = ["search", files("questions"), "--finetuned=nowhere", f"--out={tmp_path}"]
    user_error("questions of group 'c'", *command, "--group=c")
    user_error("but got 'nonsense'", *command, "--detector=nonsense")
    user_error("a detector or a judge", *command, "--detector=refusal", "--judge=local")
    user_error(
        "but got 'nonsense'", *command, "--judge=m", "--judge-url=http://127.0.0.1:9/v1", "--rubric=nonsense"
    )
