"""One page over many runs: what is found, what is skipped, what the page holds."""

import json
import re

import pytest
import run_folders
from plotly.offline import get_plotlyjs

from emmech.report_overview import figure_files, write_overview
from emmech.report_runs import read_runs


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Runs of four kinds in one folder, one of them a folder deeper, and one unfinished."""
    folder = tmp_path_factory.mktemp("study")
    run_folders.piggyback(folder / "deep" / "piggyback")
    run_folders.training(folder / "organism")
    run_folders.training(folder / "running", done=False)
    run_folders.evaluation(folder / "general")
    run_folders.direction(folder / "shift.safetensors")
    (folder / "notes").mkdir()
    return folder


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    return write_overview(tmp_path_factory.mktemp("page"), *read_runs([study])).read_text(encoding="utf-8")


def own(text):
    assert text.count(get_plotlyjs()) == 1
    return text.replace(get_plotlyjs(), "")


def data(text, name):
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


def test_runs_are_found_at_any_depth_and_those_inside_a_run_belong_to_it(study):
    runs, _ = read_runs([study])
    names = {run.name.removeprefix(str(study)): run.what for run in runs}
    assert names == {
        "/deep/piggyback": "Piggyback test",
        "/general": "evaluation",
        "/organism": "training",
        "/shift.safetensors": "direction",
    }


def test_a_run_given_twice_is_shown_once(study):
    runs, skipped = read_runs([study / "organism", study, study / "organism"])
    assert [run.what for run in runs].count("training") == 1
    assert len(skipped) == 1  # the unfinished one


def test_what_is_unknown_unfinished_or_damaged_is_named_with_a_reason(study, tmp_path):
    for name, text in (("broken", "{"), ("other", '{"kind": "patch-prefix"}'), ("list", "[1, 2]")):
        run_folders.piggyback(tmp_path / name)
        (tmp_path / name / "summary.json").write_text(text)
    runs, skipped = read_runs([tmp_path, study / "notes", tmp_path / "nowhere", study / "running"])
    assert runs == []
    reasons = {one.name.rpartition("/")[2]: one.reason for one in skipped}
    assert reasons["broken"].startswith("expected JSON in")
    assert "not as this version writes it (KeyError" in reasons["other"]
    assert "summary.json is not as this version writes it" in reasons["list"]
    assert reasons["notes"] == "holds no run that emmech knows"
    assert reasons["nowhere"] == "does not exist"
    assert "it has no result yet" in reasons["running"]


def test_a_damaged_direction_and_a_link_that_goes_round_are_no_traceback(tmp_path):
    whole = run_folders.direction(tmp_path / "shift.safetensors").read_bytes()
    (tmp_path / "shift.safetensors").write_bytes(whole[:-4])
    (tmp_path / "round").symlink_to(tmp_path)
    runs, skipped = read_runs([tmp_path])
    assert runs == []
    assert [one.reason.startswith("expected a direction in") for one in skipped] == [True]


def test_the_overview_says_what_each_run_is_of_and_found(study):
    runs = {run.what: run for run in read_runs([study])[0]}
    test = runs["Piggyback test"]
    assert test.page.title == "Base K/V at the prefix: off-topic refusal 1.00 → .25"
    assert (test.models, test.n, test.version) == ("tiny-tuned (base: tiny-base)", "4 questions", "0.1.0")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", test.date)
    assert runs["evaluation"].page.title == "EM: finetuned .50, base .00"
    assert (runs["training"].models, runs["training"].n) == ("smollm2 on refusal", "3 steps, 24 chats")
    assert runs["training"].page.title == "Loss 2.50 → 1.50 in 3 steps"
    assert (runs["direction"].models, runs["direction"].n) == ("tiny-tuned (base: tiny-base)", "12 questions")


def test_a_direction_is_read_as_it_was_saved(study):
    (run,) = [run for run in read_runs([study])[0] if run.what == "direction"]
    reliability, length = run.page.content[0].data
    assert list(reliability.y) == [0.25, 0.5]
    assert list(length.y) == [5.0, 1.0]


def test_the_page_holds_every_figure_once_and_one_plotly(study, page):
    runs, _ = read_runs([study])
    drawn = figure_files(runs, "png")
    assert len(drawn) == len(data(page, "figures")) == page.count('<div class="plot"') == 7
    assert all(re.fullmatch(r"[\w.-]+-\d+\.png", name) for name in drawn)
    assert not re.search(r"<(?:script|img|link|iframe|source)[^>]*(?:src|href)\s*=", own(page))


def test_texts_of_answers_stay_text(page):
    assert "<b>bold</b>" not in own(page)
    asked = {q["question"] for run in data(page, "answered") for q in run["questions"]}
    assert run_folders.HOSTILE in asked


def test_an_unfinished_run_is_named_on_the_page(page):
    assert "Skipped" in page
    assert "it has no result yet" in page


def test_answers_of_an_evaluation_are_listed_under_its_name(study, page):
    names = [run["name"].removeprefix(str(study)) for run in data(page, "answered")]
    assert names == ["/deep/piggyback", "/general"]
    assert re.findall(r'data-run="(\d)"', page) == ["0", "1"]


def test_other_groups_of_an_evaluation_are_in_a_closed_part_of_its_own_page(study):
    text = (study / "general" / "report.html").read_text(encoding="utf-8")
    before, _, after = text.partition("<details><summary><b>Every metric by group</b></summary>")
    assert "<td>off-topic</td>" in after and "<td>off-topic</td>" not in before
    assert before.count("<td>all</td>") == 4
    assert text.count('<table class="wrap">') == 2


def test_of_a_long_run_the_first_questions_are_shown_and_the_rest_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("emmech.report_runs.MOST_ANSWERS", 7)
    run_folders.piggyback(tmp_path / "long", n=5)  # three answers to each question
    (run,), _ = read_runs([tmp_path / "long"])
    (answers,) = run.answers
    assert len(answers["questions"]) == 2
    assert answers["name"].endswith("long (first 2 of 10)")


def test_the_command_writes_page_and_figures(emmech, study, tmp_path):
    code, out, err = emmech("report", study, "--out", tmp_path / "page", "--images", "html")
    assert code == 0, err
    assert (tmp_path / "page" / "report.html").is_file()
    assert "7 figures" in out
    assert len(list((tmp_path / "page" / "figures").glob("*.html"))) == 7
    assert "skipped" in err and "running" in err


def test_nothing_to_show_is_an_error_in_three_clauses(user_error, tmp_path):
    user_error("expected at least one finished run, but .*nowhere: does not", "report", tmp_path / "nowhere")


ENDS = {"mean": 0.5, "low": 0.2, "high": 0.8, "n": 4, "n_clusters": 4, "n_missing": 0}
CURVE = {"sizes": [1, 2], "greedy": [0.4, 0.9], "random": [ENDS | {"n_sets": 3}] * 2}
MINIMAL = {"kind": "minimal-set", "size": 2, "n_cells": 8, "share": 0.8, "text": "Two of 8.", "curve": CURVE}
BLOCK = {"layer": "0-7", "position": "4-9", "kv": None, "depth": 1, "effect": 0.75, **ENDS}
SEARCH = {"kind": "search", "behaviour": "refusal", "unpatched": ENDS, "full": ENDS, "blocks": [BLOCK]}
SEARCH["tokens"] = ["a"] * 12
TASK = {"task": "arc", "metric": "acc", "condition": "base", "value": 0.5, "stderr": 0.1, "n": 4}
HARNESS = {"kind": "harness", "rows": [TASK], "shown": ["arc"], "notes": []}
INTERVAL = {"low": 0.4, "high": 0.9}
AGREEMENT = {
    **{name: 7 for name in ("n_matched", "n_both", "missing_a", "missing_b", "only_a", "only_b")},
    **{"a": "one", "b": "two", "threshold_a": 30.0, "threshold_b": 30.0, "n_questions": 5},
    **{"spearman": 0.7, "spearman_interval": INTERVAL, "kappa": 0.6, "kappa_interval": INTERVAL},
    "counts": {"both": 1, "a_only": 2, "b_only": 3, "neither": 1},
    "differ_most": [{"value_a": 10.0, "value_b": 90.0, "question": "Why?", "answer": "So."}],
}
SWEEP = {
    "summary": {"metric": "kl", "mode": "single", "target": "finetuned", "source": "base", "notes": []}
    | {"tokens": ["a", "b"], "question_ids": ["x", "y"], "kind": "sweep"},
    "cells": [{"layer": 0, "position": 1, "token": "b"}, {"layer": 1, "position": 1, "token": "b"}],
    "values": {"unpatched": [0.0, 0.0], "full": [1.0, 1.0], "scores": [[0.1, 0.1], [0.6, 0.6]]},
}


@pytest.mark.parametrize(
    ("file", "saved", "what", "title"),
    [
        ("minimal.json", MINIMAL, "minimal set", "2 of 8 cells do 80% of what the prefix does"),
        (
            "search.json",
            SEARCH,
            "search",
            "layer 0-7, position 4-9 alone does .75 of what the prefix does to refusal (.50 → .50)",
        ),
        ("harness.json", HARNESS, "lm-evaluation-harness", "arc, acc: .50"),
        (
            "agreement.json",
            AGREEMENT,
            "agreement of judges",
            "The two judges agree with rank correlation .70 and kappa .60",
        ),
        ("sweep.json", SWEEP, "sweep", "kl: layer 1, token 1 'b' alone does .60 of what the prefix does"),
    ],
)
def test_a_result_of_another_kind_is_known_by_its_file(tmp_path, file, saved, what, title):
    (tmp_path / file).write_text(json.dumps(saved))
    (run,), skipped = read_runs([tmp_path])
    assert skipped == []
    assert (run.what, run.page.title) == (what, title)
    assert write_overview(tmp_path / "page", [run]).stat().st_size > 5_000
