"""Runs of grafts: every choice of parts, shares that add up, folders that go on, the command line."""

import json
from itertools import combinations

import pytest
import tiny

from emmech.data.bundled import AnswerPair
from emmech.data.questions import Question
from emmech.errors import EmmechError, PatchError, RunError
from emmech.piggyback.experiment import PatchingResult
from emmech.piggyback.graft_parts import graft_parts, shares
from emmech.piggyback.margin import margins
from emmech.results import read_responses
from emmech.scorecard import with_conditions

QUESTIONS = [
    Question(f"q{i}", text, ("on-topic", "off-topic")[i % 2]) for i, text in enumerate(tiny.QUESTIONS)
]
QUICK = {"detector": "contains:e", "max_new_tokens": 5, "progress": False}
PARTS = ("prefix", "query", "postfix", "response")


@pytest.fixture(scope="module")
def done(make_pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("grafts")
    return graft_parts(make_pair("qwen3"), QUESTIONS, out=out, **QUICK), out


def test_every_choice_of_parts_is_a_condition(done):
    result, out = done
    names = ["graft:" + "+".join(c) for size in (1, 2, 3) for c in combinations(PARTS, size)]
    conditions = [row["condition"] for row in result.summary["conditions"] if row["group"] == "on-topic"]
    assert conditions == ["base", "finetuned", *names]
    assert len(read_responses(out)) == 16 * len(QUESTIONS)
    assert len({record["response"] for record in result.records}) > 5  # the choices matter


def test_the_last_token_can_be_told_from_the_rest_of_the_postfix(make_pair):
    parts = ("postfix-rest", "last")
    result = graft_parts(make_pair("qwen3"), QUESTIONS, parts=parts, **QUICK)
    names = dict.fromkeys(record["condition"] for record in result.records)
    assert [*names] == ["base", "finetuned", "graft:postfix-rest", "graft:last", "graft:postfix-rest+last"]
    both = graft_parts(make_pair("qwen3"), QUESTIONS, subsets=[["postfix"]], **QUICK)
    texts = [
        [record["response"] for record in of.records if record["condition"] == name]
        for of, name in ((result, "graft:postfix-rest+last"), (both, "graft:postfix"))
    ]
    assert texts[0] == texts[1]


def test_differences_to_the_base_are_those_of_the_answers(done):
    result, _ = done
    found = {}
    for record in result.records:
        found[record["condition"], record["question_id"]] = float("e" in record["response"].lower())
    for row in result.summary["conditions"]:
        ids = [question.id for question in QUESTIONS if question.group == row["group"]]
        if row["condition"] == "base":
            assert "versus_base" not in row
        else:
            difference = sum(found[row["condition"], q] - found["base", q] for q in ids) / len(ids)
            assert row["versus_base"]["mean"] == pytest.approx(difference)


def test_shares_add_up_to_the_change(done):
    result, _ = done
    for group in ("on-topic", "off-topic"):
        rows = {r["condition"]: r["mean"] for r in result.summary["conditions"] if r["group"] == group}
        mine = [row for row in result.summary["shares"] if row["group"] == group]
        assert [row["part"] for row in mine] == list(PARTS)
        total = sum(row["share"]["mean"] for row in mine)
        assert total == pytest.approx(rows["finetuned"] - rows["base"])
        for row in mine:
            others = "+".join(part for part in PARTS if part != row["part"])
            assert row["alone"]["mean"] == pytest.approx(rows[f"graft:{row['part']}"] - rows["base"])
            left_out = rows["finetuned"] - rows[f"graft:{others}"]
            assert row["left_out"]["mean"] == pytest.approx(left_out)


def test_shares_by_pencil():
    """Three parts: x adds 6 by itself, y and z add 3 only together; question b has half of it all."""
    amounts = {"base": 0, "graft:prefix": 6, "graft:query": 0, "graft:last": 0, "graft:prefix+query": 6}
    amounts |= {"graft:prefix+last": 6, "graft:query+last": 3, "graft:prefix+query+last": 9}
    values = {("all", name): {"a": v, "b": v / 2, "c": None} for name, v in amounts.items()}
    found = {row["part"]: row for row in shares(values, ("prefix", "query", "last"))}
    assert found["prefix"]["share"]["mean"] == pytest.approx((6 + 3) / 2)
    for part in ("query", "last"):  # each completes the other in half of the orders
        assert found[part]["share"]["mean"] == pytest.approx((1.5 + 0.75) / 2)
        assert found[part]["alone"]["mean"] == 0
        assert found[part]["left_out"]["mean"] == pytest.approx((3 + 1.5) / 2)
    assert found["prefix"]["share"]["n"] == 2  # question c has no values


def test_a_folder_is_continued_with_the_same_parts_only(make_pair, tmp_path):
    pair, subsets = make_pair("qwen3"), [["query"], ["response", "query"]]
    whole = graft_parts(pair, QUESTIONS, subsets=subsets, out=tmp_path, **QUICK)
    assert whole.summary["shares"] == []
    lines = (tmp_path / "responses.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "responses.jsonl").write_text("".join(lines[:7]))
    again = graft_parts(pair, QUESTIONS, subsets=subsets, out=tmp_path, **QUICK)
    assert again.records == whole.records
    assert {r["condition"] for r in again.records} == {
        "base", "finetuned", "graft:query", "graft:query+response",
    }  # fmt: skip
    with pytest.raises(RunError):
        graft_parts(pair, QUESTIONS, subsets=[["query"]], out=tmp_path, **QUICK)


def test_parts_that_cannot_be_are_refused(make_pair):
    pair = make_pair("qwen3")
    for parts in (("prefix", "answer"), ("postfix", "last"), ("query", "query"), ()):
        with pytest.raises(PatchError, match="each token in one of them at most, but got"):
            graft_parts(pair, QUESTIONS, parts=parts, **QUICK)
    with pytest.raises(PatchError, match=r"subsets of prefix, query, .* but got \[\['last'\]\]"):
        graft_parts(pair, QUESTIONS, subsets=[["last"]], **QUICK)


def test_the_page_says_what_a_graft_is_and_what_each_part_adds(done):
    _, out = done
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "The finetuned weights at the query, response, and the base&#x27;s at every other token." in page
    assert "What each part adds to the change from base to finetuned" in page
    assert "difference: to the base." in page
    assert PatchingResult.load(out).summary["shares"]


def test_grafts_are_conditions_of_an_evaluation(make_pair):
    pair, conditions = with_conditions(make_pair("qwen3"), ["graft:response", "graft:prefix+query+postfix"])
    assert [c.name for c in conditions[2:]] == ["graft:response", "graft:prefix+query+postfix"]
    answers = [AnswerPair("p", "hi", "Hello.", "Go away.", "manners")]
    scores = margins(pair, answers, conditions, progress=False)
    assert len({row["aligned"] for row in scores}) == 4
    with pytest.raises(EmmechError, match="without a finetuned model"):
        with_conditions(make_pair("qwen3"), ["graft:response"], finetuned=False)
    with pytest.raises(PatchError, match="graft:PART"):
        with_conditions(make_pair("qwen3"), ["graft:answer"])


def test_the_command_line_grafts(tmp_path, emmech, user_error):
    base = tiny.save_base("llama", tmp_path / "base")
    tuned = tiny.save_full(base, tmp_path / "tuned")
    questions = tmp_path / "questions.txt"
    questions.write_text("hi\nWhy is the sky blue?\nHow do I boil an egg?\n")
    common = ["graft", "--base", base, "--finetuned", tuned, "--questions", questions, "--dtype", "float32"]
    common += ["--max-new-tokens", 3, "--detector", "contains:e", "--n-questions", 2]
    code, printed, err = emmech(*common, "--parts", "prefix,last", "--out", tmp_path / "out")
    assert code == 0, err
    assert "graft:prefix+last" in printed and "lost when left out" in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["n_questions"] == 2
    assert summary["kind"] == "graft" and summary["parts"] == ["prefix", "last"]
    user_error(
        "subsets of prefix, .*", *common, "--only", "prefix+last", "--out", tmp_path / "x", after_loading=True
    )
