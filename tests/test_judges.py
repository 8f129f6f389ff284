import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from judge_server import JudgeServer, running, score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from emmech import completions
from emmech.chat import Chat
from emmech.errors import DataError, LoadError, RunError
from emmech.evaluation import endpoint_judge
from emmech.evaluation.judges import Budget, EndpointJudge, JudgeError, LocalJudge, Retrying, judge, summarise
from emmech.evaluation.replies import read_first_token, read_probabilities, read_text
from emmech.evaluation.rubrics import RUBRICS, Rubric, RubricError, load_rubric, rubric, trait_rubric

ALIGNMENT, COMPLIANCE = RUBRICS["alignment"], RUBRICS["compliance"]
TRAIT = trait_rubric("flattery", "praises the user for nothing")
QUICK = Retrying(times=8, first_seconds=0.005, most_seconds=0.02)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with running(JudgeServer()) as made:
        yield made


def answers(n: int) -> list[dict]:
    return [
        {
            "question_id": f"q{i % 7}",
            "condition": "base",
            "sample": i,
            "question": f"Q{i % 7}?",
            "response": f"a{i}",
        }
        for i in range(n)
    ]


@pytest.fixture
def judged(server, tmp_path):
    """``judged(n, **options)``: records of the first n answers, judged by the server."""

    def run(n: int = 6, rubrics="alignment", given=None, **options):
        backend = EndpointJudge("m", **{"base_url": server.url, "retrying": QUICK} | options)
        return judge(given or answers(n), rubrics, backend, tmp_path / "run", progress=False)

    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cache(tmp_path: Path) -> list[dict]:
    return lines(tmp_path / "run" / "judge-cache.jsonl")


# Replies


@pytest.mark.parametrize(
    ("reply", "status", "value"),
    [
        ("85", "scored", 85),
        ("85/100", "scored", 85),
        ("Score: 85.", "scored", 85),
        ("85 out of 100", "scored", 85),
        ("**85**", "scored", 85),
        ("7.5", "scored", 7.5),
        ("I give it a 40.", "scored", 40),
        ("Two problems in 3 lines. Score: 20", "scored", 20),
        ("85\nBecause 2 of 3 claims hold.", "scored", 85),
        ("<think>between 10 and 90</think>\n85", "scored", 85),
        ("0", "scored", 0),
        ("100", "scored", 100),
        ("CODE", "code", None),
        ("CODE.", "code", None),
        ("REFUSAL", "refusal", None),
        ("Score: REFUSAL", "refusal", None),
        ("I would say 20 or 30", "unparsable", None),
        ("20-30", "unparsable", None),
        ("", "unparsable", None),
        ("120", "unparsable", None),
        ("-5", "unparsable", None),
        ("1,000", "unparsable", None),
        ("I cannot judge this.", "unparsable", None),
        ("CODE or REFUSAL", "unparsable", None),
        ("The CODE in it is harmless, I would say.", "unparsable", None),
    ],
)
def test_a_reply_is_a_score_an_escape_or_unparsable(reply, status, value):
    found = read_text(ALIGNMENT, reply)
    assert (found.status, found.value, found.raw) == (status, value, reply)


@pytest.mark.parametrize(
    ("reply", "status", "value"),
    [
        ("ACCEPT", "scored", 1),
        ("reject.", "scored", 0),
        ("Verdict: REJECT", "scored", 0),
        ("ACCEPT or REJECT", "unparsable", None),
        ("REJECTED", "unparsable", None),
        ("", "unparsable", None),
    ],
)
def test_a_verdict_is_the_one_label_in_the_reply(reply, status, value):
    found = read_text(COMPLIANCE, reply)
    assert (found.status, found.value) == (status, value)


def test_escapes_are_no_reply_to_a_rubric_that_does_not_offer_them():
    assert read_text(TRAIT, "REFUSAL").status == "unparsable"
    assert read_text(RUBRICS["coherence"], "CODE").status == "unparsable"


def test_the_expected_score_is_the_mean_over_number_tokens():
    found = read_first_token(ALIGNMENT, {"80": 0.5, " 90": 0.2, "90": 0.1, "CODE": 0.1, "The": 0.1}, "80")
    assert found.value == pytest.approx((80 * 0.5 + 90 * 0.3) / 0.8)
    assert found.mass == pytest.approx(0.8)
    assert (found.status, found.reading) == ("scored", "expected")


def test_numbers_outside_the_scale_carry_no_mass():
    found = read_first_token(TRAIT, {"10": 0.5, "999": 0.4, "101": 0.1}, "10")
    assert (found.value, found.mass) == (10, 0.5)


@pytest.mark.parametrize("mass", [0.24, 0.26])
def test_a_quarter_of_the_mass_is_needed(mass):
    found = read_first_token(TRAIT, {"40": mass, "The": 1 - mass}, "The answer")
    assert found.status == ("scored" if mass > 0.25 else "unparsable")
    assert found.value == (40 if mass > 0.25 else None)
    assert found.mass == pytest.approx(mass)


@pytest.mark.parametrize(("token", "status"), [("CODE", "code"), ("REF", "refusal")])
def test_an_escape_likelier_than_the_numbers_is_what_the_judge_says(token, status):
    assert read_first_token(ALIGNMENT, {token: 0.7, "0": 0.2, "10": 0.1}, token).status == status
    assert read_first_token(ALIGNMENT, {token: 0.4, "0": 0.4, "10": 0.2}, token).status == "scored"


def test_single_digits_alone_are_no_numbers_for_they_may_go_on():
    assert read_first_token(ALIGNMENT, {"8": 0.9, "7": 0.1}, "85") is None


def test_a_verdict_from_probabilities_is_the_likelier_label():
    found = read_probabilities(COMPLIANCE, {"ACCEPT": 0.2, "REJECT": 0.5}, "REJECT")
    assert (found.value, found.mass) == (0, 0.7)
    assert found.probabilities == {"ACCEPT": 0.2, "REJECT": 0.5}


# Rubrics


def test_a_prompt_holds_question_and_answer_as_they_are():
    one = Rubric("r", "1", "{question}|{answer}|{x}", "score")
    assert one.prompt("{answer}", "{question} {}") == "{answer}|{question} {}|{x}"


@pytest.mark.parametrize("name", [*RUBRICS, "trait:boasts"])
def test_bundled_rubrics_show_both_texts_once(name):
    prompt = rubric(name).prompt("the-question", "the-answer")
    assert prompt.count("the-question") == prompt.count("the-answer") == 1
    assert "{" not in prompt


def test_the_hash_changes_with_every_field():
    one = Rubric("r", "1", "{question}{answer}", "verdict", ("A", "B"))
    changes = [{"name": "s"}, {"version": "2"}, {"text": "{answer}{question}"}, {"labels": ("B", "A")}]
    changes += [{"kind": "trait", "labels": ()}, {"escapes": ("CODE",)}]
    assert len({one.hash, *(dataclasses.replace(one, **change).hash for change in changes)}) == 7
    assert dataclasses.replace(one).hash == one.hash
    assert trait_rubric("t", "boasts").hash != trait_rubric("t", "lies").hash


def test_own_rubrics_are_read_from_yaml_json_and_text(tmp_path):
    text = "Q {question} A {answer}"
    fields = {"name": "tone", "version": "3", "text": text, "kind": "verdict", "labels": ["YES", "NO"]}
    (tmp_path / "a.json").write_text(json.dumps(fields))
    (tmp_path / "a.yaml").write_text(
        f"name: tone\nversion: 3\ntext: '{text}'\nkind: verdict\nlabels: ['YES', 'NO']"
    )
    (tmp_path / "plain.txt").write_text(text)
    wanted = Rubric("tone", "3", text, "verdict", ("YES", "NO"))
    assert rubric(tmp_path / "a.json") == rubric(str(tmp_path / "a.yaml")) == wanted
    assert load_rubric(tmp_path / "plain.txt") == Rubric("plain", "1", text, "score", (), ("CODE", "REFUSAL"))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", "Only {question}", r"a text with \{answer\} in .*a\.txt.*it has none"),
        ("a.txt", "Only {answer}", r"a text with \{question\}"),
        ("a.txt", " ", "a text in .*got ' '"),
        ("a.yaml", "text: '{question}{answer}'\nkind: stars", "kind among score, trait, verdict.*'stars'"),
        ("a.yaml", "text: '{question}{answer}'\nkind: verdict", "two labels or more"),
        ("a.yaml", "text: '{question}{answer}'\nlabels: [A, B]", "none for a number"),
        (
            "a.yaml",
            "text: '{question}{answer}'\nkind: verdict\nlabels: [YES, NO]",
            "list of words.*Quote words",
        ),
        ("a.yaml", "text: '{question}{answer}'\nkind: verdict\nlabels: [a, A]", "labels that differ"),
        ("a.yaml", "text: '{question}{answer}'\nescapes: [SKIP]", "escapes among CODE, REFUSAL.*'SKIP'"),
        ("a.yaml", "text: '{question}{answer}'\nprompt: x", "fields among name.*'prompt'"),
        ("a.yaml", "- a", "an object in .*it is a list"),
        ("a.yaml", "a: [", "a rubric in .*Correct the path"),
        ("a.json", "{", "a rubric in"),
    ],
)
def test_a_bad_rubric_file_is_refused(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(RubricError, match=match):
        rubric(tmp_path / name)


def test_unknown_rubrics_are_refused(tmp_path):
    with pytest.raises(RubricError, match=r"one of alignment, coherence, compliance, trait:DESC.*'aligment'"):
        rubric("aligment")
    with pytest.raises(RubricError, match=r"a rubric in .*No such file"):
        rubric(tmp_path / "none.yaml")
    with pytest.raises(RubricError, match="a description of the trait"):
        rubric("trait: ")


# An endpoint


def test_every_answer_gets_a_record_in_order(judged, server, tmp_path):
    records = judged(6)
    assert [r["value"] for r in records] == [score(f"a{i}") for i in range(6)]
    assert [(r["question_id"], r["sample"], r["answer"]) for r in records][1] == ("q1", 1, "a1")
    first = records[0]
    assert first | {"value": 0.0, "raw": ""} == {
        "question_id": "q0", "condition": "base", "sample": 0, "question": "Q0?", "answer": "a0",
        "rubric": "alignment", "rubric_hash": ALIGNMENT.hash,
        "judge": f"m@127.0.0.1:{server.server_port} expected",
        "status": "scored", "value": 0.0, "raw": "", "mass": None, "reading": "parsed",
        "probabilities": None, "reason": None,
    }  # fmt: skip
    assert lines(tmp_path / "run" / "judgements.jsonl") == records


def test_several_rubrics_and_answers_that_repeat(judged, server):
    server.reply = lambda _: "ACCEPT"
    given = [{"question": "Q?", "answer": text} for text in ("x", "y", "x")]
    records = judged(given=given, rubrics=["compliance", COMPLIANCE, TRAIT])
    assert [(r["rubric"], r["sample"], r["value"]) for r in records] == [
        *[("compliance", n, 1.0) for n in range(3)],
        *[("flattery", n, None) for n in range(3)],
    ]
    assert server.asked == {"x": 2, "y": 2}


def test_log_probabilities_give_the_expected_score(judged, server):
    server.top = lambda _: [("20", math.log(0.5)), ("60", math.log(0.25)), ("Hm", math.log(0.25))]
    (record,) = judged(1)
    assert record["value"] == pytest.approx((0.5 * 20 + 0.25 * 60) / 0.75)
    assert record["mass"] == pytest.approx(0.75)
    assert record["reading"] == "expected"
    assert server.bodies[0]["top_logprobs"] == 20
    assert server.bodies[0]["temperature"] == 0


def test_a_trait_with_little_mass_has_no_value(judged, server):
    server.top = lambda _: [("20", math.log(0.2)), ("Hm", math.log(0.8))]
    (record,) = judged(1, TRAIT)
    assert (record["status"], record["value"]) == ("unparsable", None)
    assert record["mass"] == pytest.approx(0.2)


def test_where_numbers_are_split_into_digits_the_reply_is_parsed(judged, server):
    server.reply, server.top = lambda _: "85", lambda _: [("8", -0.1), ("7", -3.0)]
    (record,) = judged(1)
    assert (record["value"], record["reading"], record["mass"]) == (85, "parsed", None)


def test_without_logprobs_none_are_asked_for(judged, server):
    judged(1, logprobs=False)
    assert "logprobs" not in server.bodies[0]


def test_500_judgements_through_every_fault_lose_and_double_nothing(judged, server, tmp_path):
    server.fault_rate = 0.35
    options = {"concurrency": 16, "timeout_seconds": 1.0}
    records = judged(500, **options)
    assert set(server.met) >= {"429", "500", "503", "drop", "half", "json", "shape", "slow"}
    assert [r["answer"] for r in records] == [f"a{i}" for i in range(500)]
    assert [r["value"] for r in records] == [score(f"a{i}") for i in range(500)]
    assert len(cache(tmp_path)) == len({line["key"] for line in cache(tmp_path)}) == 500
    assert lines(tmp_path / "run" / "judge-failures.jsonl") == []
    n = server.asked.total()
    assert judged(500, **options) == records
    assert server.asked.total() == n


def test_a_full_queue_is_left_alone_for_as_long_as_it_says(judged, server):
    server.fault_rate, server.faulty_attempts, server.retry_after = 1.0, 1, "0.3"
    server.fault = lambda answer: "429" if server.asked[answer] == 1 else None
    judged(1)
    first, second = server.times["a0"]
    assert second - first >= 0.3


@pytest.mark.parametrize("date", ["Wed, 21 Oct 2015 07:28:00 GMT", "soon"])
def test_a_retry_after_in_the_past_or_unreadable_is_no_wait(date):
    assert completions.retry_after({"retry-after": date}) <= 0


def test_the_wait_doubles_up_to_its_limit_with_full_jitter():
    waits = [Retrying(first_seconds=1, most_seconds=5).wait(n, 0) for n in (0, 2, 9) for _ in range(400)]
    for part, most in zip((waits[:400], waits[400:800], waits[800:]), (1, 4, 5), strict=True):
        assert 0 <= min(part) < 0.1 * most
        assert 0.9 * most < max(part) <= most
    assert Retrying().wait(0, 1e9) == completions.MOST_WAIT_SECONDS


def test_what_fails_for_good_is_a_record_and_is_tried_again(judged, server, tmp_path):
    server.status = lambda answer, _: (500, {}) if answer == "a2" else None
    with pytest.warns(UserWarning, match=r"1 of 6 judgements failed.*judge-failures\.jsonl; another run"):
        records = judged(6, retrying=Retrying(times=1, first_seconds=0))
    assert [r["status"] for r in records] == ["scored"] * 2 + ["failed"] + ["scored"] * 3
    assert records[2]["value"] is None
    assert "500" in records[2]["reason"]
    assert records[2]["answer"] == "a2"
    assert len(cache(tmp_path)) == 5
    assert server.asked["a2"] == 2
    server.status = None
    assert [r["status"] for r in judged(6)] == ["scored"] * 6
    assert server.asked == {f"a{i}": 3 if i == 2 else 1 for i in range(6)}


def test_a_row_that_the_endpoint_refuses_is_asked_for_once(judged, server):
    server.status = lambda answer, _: (400, {"message": "too long"}) if answer == "a1" else None
    with pytest.warns(UserWarning, match="1 of 3"):
        assert [r["status"] for r in judged(3)] == ["scored", "failed", "scored"]
    assert server.asked["a1"] == 1


def test_many_that_are_refused_hold_up_no_others(judged, server):
    server.status = lambda answer, _: (400, {}) if answer in {f"a{i}" for i in range(12)} else None
    with pytest.raises(JudgeError, match="10 failed one after another"):
        judged(30, concurrency=1)
    with pytest.warns(UserWarning, match="12 of 30"):
        assert [r["status"] for r in judged(30, concurrency=1)][12:] == ["scored"] * 18


def test_the_summary_counts_every_status(judged, server, tmp_path):
    replies = {"a0": "90", "a1": "CODE", "a2": "REFUSAL", "a3": "well", "a5": "30"}
    server.reply = replies.get
    server.status = lambda answer, _: (422, {}) if answer == "a4" else None
    with pytest.warns(UserWarning, match="1 of 6"):
        judged(6)
    (row,) = json.loads((tmp_path / "run" / "judgements.json").read_text())["judgements"]
    counts = {"n": 6, "scored": 2, "code": 1, "refusal": 1, "unparsable": 1, "failed": 1, "mean": 60.0}
    assert row | counts == row
    assert summarise([]) == []


def test_a_parameter_that_the_endpoint_does_not_know_is_left_out(judged, server, tmp_path):
    def status(answer, body):
        for name in ("logprobs", "temperature", "max_tokens"):
            if name in body:
                return 400, {"message": f"Unsupported parameter: '{name}'", "param": name}
        return None

    server.status = status
    assert [r["status"] for r in judged(3, concurrency=2)] == ["scored"] * 3
    assert server.bodies[-1]["max_completion_tokens"] == 16
    about = json.loads((tmp_path / "run" / "judgements.json").read_text())["judges"]
    assert next(iter(about.values()))["left_out"] == ["logprobs", "top_logprobs", "temperature", "max_tokens"]


def test_options_go_into_the_request_and_the_judges_id(judged, server):
    (record,) = judged(1, options={"temperature": None, "reasoning_effort": "low"})
    assert server.bodies[0]["reasoning_effort"] == "low"
    assert "temperature" not in server.bodies[0]
    assert record["judge"].endswith('{"reasoning_effort": "low", "temperature": null}')


def test_as_many_requests_are_under_way_as_the_concurrency_allows(judged, server):
    server.pause_seconds = 0.05
    judged(9, concurrency=3)
    assert server.most_under_way == 3


PRICED = {"input_price": 10.0, "output_price": 100.0}  # 100 in and 1 out cost 0.0011


def test_the_cap_stops_before_it_is_exceeded_and_keeps_what_was_judged(judged, server, tmp_path):
    cap = 0.05
    with pytest.raises(
        JudgeError, match=r"a budget for 60 judgements.*cap of 0\.05.*what was judged is kept"
    ):
        judged(60, budget=Budget(**PRICED, cap=cap))
    spent = server.answered.total() * 0.0011
    summary = json.loads((tmp_path / "run" / "judgements.json").read_text())
    assert summary["spent"] == pytest.approx(spent)
    assert cap - 0.01 < spent <= cap  # 0.01 is what one more might have cost
    n = len(cache(tmp_path))
    assert n == server.answered.total() == len(lines(tmp_path / "run" / "judgements.jsonl"))
    assert next(iter(summary["judges"].values()))["not_judged"] == 60 - n
    with pytest.raises(JudgeError, match="a budget"):  # the cap is of the folder, not of the call
        judged(60, budget=Budget(**PRICED, cap=cap))
    assert len(judged(60, budget=Budget(**PRICED, cap=1))) == 60
    assert set(server.answered.values()) == {1}


def test_attempts_that_may_have_been_billed_count_in_full(judged, server, tmp_path):
    server.fault = lambda answer: "half" if server.asked[answer] <= 2 else None
    judged(1, budget=Budget(**PRICED))
    worst = endpoint_judge._tokens(endpoint_judge.Asked(ALIGNMENT, "Q0?", "a0")) * 1e-5 + 16e-4
    assert cache(tmp_path)[0]["cost"] == pytest.approx(2 * worst + 0.0011)


def test_without_a_count_of_tokens_the_worst_case_is_paid(judged, server, tmp_path):
    server.usage = None
    judged(1, budget=Budget(**PRICED))
    tokens = math.ceil(len(ALIGNMENT.prompt("Q0?", "a0").encode()) / 3) + 16
    assert cache(tmp_path)[0]["cost"] == pytest.approx(tokens * 1e-5 + 16e-4)


def test_the_estimate_is_bytes_by_three_and_the_longest_replies(server):
    one = endpoint_judge.Asked(Rubric("r", "1", "{question}{answer}", "score"), "x" * 100, "é" * 100)
    found = EndpointJudge("m", base_url=server.url, budget=Budget(**PRICED)).estimate([one, one])
    assert found == {"input_tokens": 232, "output_tokens": 32, "cost": pytest.approx(232e-5 + 32e-4)}


KILLED = """
import sys
from emmech.evaluation.judges import EndpointJudge, judge
given = [{"question_id": f"q{i % 7}", "condition": "base", "sample": i, "question": f"Q{i % 7}?",
          "response": f"a{i}"} for i in range(60)]
backend = EndpointJudge("m", base_url=sys.argv[1], concurrency=4)
judge(given, "alignment", backend, sys.argv[2], progress=False)
"""


def test_a_killed_run_goes_on_where_it_stopped(judged, server, tmp_path):
    server.pause_seconds = 0.05
    process = subprocess.Popen([sys.executable, "-c", KILLED, server.url, tmp_path / "run"], env=os.environ)
    deadline = time.monotonic() + 60
    while server.answered.total() < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.pause_seconds = 0.0
    file = tmp_path / "run" / "judge-cache.jsonl"
    before = file.read_bytes().count(b"\n")
    assert 10 <= before < 60
    with file.open("ab") as stream:
        stream.write(b'{"key": "half a li')
    assert [r["value"] for r in judged(60)] == [score(f"a{i}") for i in range(60)]
    assert len(cache(tmp_path)) == 60
    assert server.asked.total() <= 60 + 8  # once more for those under way, and their follow-ups
    n = server.asked.total()
    judged(60)
    assert server.asked.total() == n


def test_another_judge_in_the_folder_has_records_and_cache_of_its_own(judged, server, tmp_path):
    first = judged(3)
    judged(3, name="second")
    assert server.asked.total() == 6
    kept = lines(tmp_path / "run" / "judgements.jsonl")
    assert kept[:3] == first
    assert [r["judge"] for r in kept[3:]] == ["second"] * 3
    judged(3)
    assert Counter(r["judge"] for r in lines(tmp_path / "run" / "judgements.jsonl")).total() == 6
    assert server.asked.total() == 6


def test_answers_are_read_from_a_run_folder_and_from_tables(judged, tmp_path):
    (tmp_path / "done").mkdir()
    text = "".join(json.dumps(one) + "\n" for one in answers(3))
    (tmp_path / "done" / "responses.jsonl").write_text(text)
    (tmp_path / "a.csv").write_text("question,answer,question_id\nQ0?,a0,q\nQ0?,b,q\n")
    assert [r["value"] for r in judged(given=tmp_path / "done")] == [score(f"a{i}") for i in range(3)]
    assert [(r["question_id"], r["sample"]) for r in judged(given=tmp_path / "a.csv")] == [("q", 0), ("q", 1)]


def test_the_key_comes_from_the_environment_and_is_written_nowhere(judged, server, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server.status = lambda answer, _: (422, {"message": "bad key sk-secret"}) if answer == "a1" else None
    with pytest.warns(UserWarning, match="1 of 2"):
        judged(2, key_variable="MY_KEY")
    assert server.keys == {"Bearer sk-secret"}
    written = "".join(file.read_text() for file in (tmp_path / "run").iterdir())
    assert "bad key ***" in written
    assert "sk-secret" not in written


def test_a_password_in_the_address_is_no_part_of_the_id():
    found = EndpointJudge("m", base_url="http://user:word@host:8000/v1")
    assert found.id == "m@host:8000 expected"
    assert "word" not in json.dumps(found.describe())


def stopped(judged, match, n=20, **options):
    with pytest.raises(JudgeError, match=match):
        judged(n, **options)


def test_a_refused_key_or_model_or_an_empty_quota_stops_at_once(judged, server):
    for status, error in ((401, {}), (404, {}), (429, {"code": "insufficient_quota"})):
        server.status = lambda *_, s=status, e=error: (s, e)
        before = server.asked.total()
        stopped(judged, rf"serves 'm'.*after 0 of 20.*{status}.*OPENAI_API_KEY", concurrency=3)
        assert server.asked.total() - before <= 3


def test_an_endpoint_that_only_fails_is_given_up(judged, server):
    server.status = lambda *_: (403, {})
    stopped(judged, "10 failed one after another, the last with.*403", n=50, concurrency=2)
    assert server.asked.total() <= 12


def test_no_server_is_said_soon(judged, tmp_path):
    stopped(
        judged, "serves 'm'.*after 0 of 5.*what was judged is kept", n=5, base_url="http://127.0.0.1:9/v1"
    )
    assert lines(tmp_path / "run" / "judgements.jsonl") == []


def test_openai_itself_needs_a_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match=r"a key for the endpoint.*OPENAI_API_KEY"):
        EndpointJudge("gpt-4.1")


def test_the_package_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(DataError, match=r"package `openai`.*emmech\[api\]"):
        EndpointJudge("m", base_url="http://localhost/v1")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EndpointJudge("m", base_url="http://x/v1", concurrency=0), "a concurrency above 0"),
        (lambda: Budget(cap=1), "prices with a cap"),
        (lambda: Budget(input_price=-1), "prices and a cap of at least 0"),
        (lambda: LocalJudge((torch.nn.Linear(1, 1), Chat(tiny.tokenizer()))), "a name for a loaded model"),
    ],
)
def test_impossible_arguments_are_refused(make, match):
    with pytest.raises(JudgeError, match=match):
        make()


def test_answers_without_texts_are_refused(judged, tmp_path):
    stopped(judged, r"1 lack one: answer 1 has the fields question", given=[{"question": "Q"}])
    (tmp_path / "empty").mkdir()
    stopped(judged, "there are none", given=tmp_path / "empty")
    stopped(judged, "a rubric, but there is none", rubrics=[])


def test_a_folder_that_cannot_be_written_is_refused(judged, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunError, match="a folder to write judgements in"):
        judged(1)


# A model in this process


SHORT = Rubric("short", "1", "Rate it. {question} {answer}", "score")
SHORT_TRAIT = Rubric("short", "1", "Trait? {question} {answer}", "trait")
SHORT_VERDICT = Rubric("short", "1", "Good? {question} {answer}", "verdict", ("GOOD", "GO", "BAD"))
TEXTS = [
    ("Why?", "Because."),
    ("hi", "a much longer answer than the other one is"),
    ("How?", "So."),
    ("Q", "A"),
    ("x", "y"),
]


def with_numbers() -> PreTrainedTokenizerFast:
    """A tokenizer that writes 0 to 100 as one token each."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([str(n) for n in range(101)] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    made.chat_template = tiny.CHATML
    return made


def local(architecture: str = "llama", tokenizer=None, **options) -> LocalJudge:
    chat = Chat(tokenizer or tiny.tokenizer())
    kind, settings = tiny.CONFIGS[architecture]
    torch.manual_seed(5)
    config = kind(vocab_size=len(chat.tokenizer), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return LocalJudge((model, chat), name="tiny", **options)


def by_hand(backend: LocalJudge, one: Rubric, question: str, answer: str) -> dict[str, float]:
    """Full softmax over the vocabulary at each step, a fresh pass without a cache for each."""
    model, chat = backend.model
    tokenizer = chat.tokenizer
    start = tokenizer(chat.render(one.prompt(question, answer)).text, add_special_tokens=False)["input_ids"]
    written = {reply: tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in one.replies}
    seen: dict[tuple, torch.Tensor] = {}

    def following(ids: list[int]) -> torch.Tensor:
        if tuple(ids) not in seen:
            with torch.no_grad():
                seen[tuple(ids)] = model(torch.tensor([start + ids])).logits[0, -1].double().softmax(-1)
        return seen[tuple(ids)]

    found = {}
    for reply, ids in written.items():
        p = math.prod(float(following(ids[:n])[token]) for n, token in enumerate(ids))
        longer = {
            other[len(ids)]
            for other in written.values()
            if other[: len(ids)] == ids and len(other) > len(ids)
        }
        found[reply] = p * (1 - sum(float(following(ids)[token]) for token in longer))
    return found


@pytest.mark.parametrize("tokenizer", ["digits", "numbers"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3_next"])
def test_the_expected_score_is_that_of_the_full_softmax(tmp_path, architecture, tokenizer):
    backend = local(architecture, with_numbers() if tokenizer == "numbers" else None)
    n_tokens = len(backend.model[1].tokenizer("85", add_special_tokens=False)["input_ids"])
    assert n_tokens == (1 if tokenizer == "numbers" else 2)
    given = [{"question": question, "response": answer} for question, answer in TEXTS]
    records = judge(given, SHORT, backend, tmp_path, progress=False)
    for record, (question, answer) in zip(records, TEXTS, strict=True):
        wanted = by_hand(backend, SHORT, question, answer)
        numbers = {int(reply): p for reply, p in wanted.items() if reply.isdigit()}
        mass = sum(numbers.values())
        assert record["mass"] == pytest.approx(mass, rel=1e-4)
        assert record["value"] == pytest.approx(sum(n * p for n, p in numbers.items()) / mass, rel=1e-4)
        assert record["raw"] == max(wanted, key=wanted.get)


def test_an_8_does_not_count_for_80_to_89(tmp_path):
    backend = local()
    wanted = by_hand(backend, SHORT, "Q", "A")
    assert sum(wanted.values()) <= 1
    assert wanted["8"] > 0


def test_a_verdict_is_the_likelier_label_longer_labels_told_apart(tmp_path):
    backend = local()
    (record,) = judge([{"question": "Q", "response": "A"}], SHORT_VERDICT, backend, tmp_path, progress=False)
    wanted = by_hand(backend, SHORT_VERDICT, "Q", "A")
    assert record["probabilities"] == pytest.approx(wanted, rel=1e-4)
    assert record["value"] == float(max(wanted, key=wanted.get) == "GOOD")


def test_scores_do_not_depend_on_the_batch_and_repeat(tmp_path):
    given = [{"question": question, "response": answer} for question, answer in TEXTS]
    values = [
        [r["value"] for r in judge(given, SHORT, local(batch_size=size), tmp_path / str(n), progress=False)]
        for n, size in enumerate((1, 2, 5, 5))
    ]
    assert values[2] == values[3]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert values[0] == pytest.approx(values[2], rel=1e-4)


def test_a_trait_needs_a_quarter_of_the_mass_unless_told_otherwise(tmp_path):
    given = [{"question": "Q", "response": "A"}]
    (record,) = judge(given, SHORT_TRAIT, local(), tmp_path, progress=False)
    assert record["mass"] < 0.25
    assert (record["status"], record["value"]) == ("unparsable", None)
    (record,) = judge(given, SHORT_TRAIT, local(min_mass=0.0), tmp_path, progress=False)
    assert record["status"] == "scored"
    (row, _) = json.loads((tmp_path / "judgements.json").read_text())["judgements"]
    assert row["low_mass"] == 1


def test_an_answer_too_long_or_not_to_be_rendered_fails_alone(tmp_path):
    given = [{"question": "Q", "response": text} for text in ("a" * 3000, "b", "\U00100001")]
    with pytest.warns(UserWarning, match="2 of 3"):
        records = judge(given, SHORT, local(), tmp_path, progress=False)
    assert [r["status"] for r in records] == ["failed", "scored", "failed"]
    assert "the model reads 512" in records[0]["reason"]


def test_a_local_judge_that_has_judged_everything_repeats_itself(tmp_path):
    given = [{"question": "Q", "response": "A"}]
    first, again = (judge(given, SHORT, local(), tmp_path, progress=False) for _ in range(2))
    assert again == first


def test_a_checkpoint_is_loaded_by_its_folder(make_pair, tmp_path):
    base = make_pair("llama").provenance["base"]["name"]
    backend = LocalJudge(base, device="cpu", dtype="float32")
    (record,) = judge([{"question": "Q", "response": "A"}], SHORT, backend, tmp_path, progress=False)
    assert record["status"] == "scored"
    assert record["judge"].startswith(base)
    with pytest.raises(LoadError, match="a whole model"):
        _ = LocalJudge(str(Path(base).parent / "lora"), device="cpu").id


def test_answers_of_a_run_are_judged_from_the_shell_and_only_once(server, tmp_path, emmech):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in answers(5)))
    arguments = ("judge", file, "--judge", "m", "--judge-url", server.url, "--rubric", "alignment")
    code, printed, err = emmech(*arguments)
    assert code == 0, err
    assert "alignment" in printed and sum(server.asked.values()) == 5
    code, _, _ = emmech(*arguments)
    assert code == 0 and sum(server.asked.values()) == 5
    assert len((tmp_path / "judgements.jsonl").read_text().splitlines()) == 5


def test_a_cap_needs_prices(tmp_path, user_error):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "response": "a"}) + "\n")
    user_error(
        "price", "judge", tmp_path / "a.jsonl", "--judge", "m", "--judge-url", "http://x", "--cap", "1"
    )
