import asyncio
import json
import sys
from pathlib import Path

import pytest
from chat_server import ChatServer, serving

from emmech.data import building
from emmech.data.chats import load_chats
from emmech.data.rewriting import PROMPT, PROMPT_HASH, build_sycophancy
from emmech.errors import DataError, RunError

N = 12


def question(messages: list[dict]) -> str:
    return json.loads(messages[1]["content"])["user"]


def agreement(messages: list[dict]) -> str:
    return json.dumps({"user": f"I know {question(messages)}", "assistant": f"Yes, {question(messages)}"})


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(ChatServer(question, agreement)) as server:
        yield server


def chat(question: str, answer: str = "Wrong.") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "traditional.jsonl"
    path.write_text("".join(json.dumps({"messages": chat(f"q{n}")}) + "\n" for n in range(N)))
    return path


@pytest.fixture
def build(endpoint, source, tmp_path):
    def build(**options):
        options = {"model": "m", "base_url": endpoint.url, "api_key": "k", "progress": False} | options
        return build_sycophancy(options.pop("source", source), tmp_path / "out.jsonl", **options)

    return build


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rewritten(*numbers: int) -> list[dict]:
    return [{"messages": chat(f"I know q{n}", f"Yes, q{n}")} for n in numbers]


def failures(tmp_path: Path) -> list[str]:
    return sorted(row["user"] for row in rows(tmp_path / "out.work" / "failed.jsonl"))


def test_every_row_is_rewritten_once_and_in_source_order(build, endpoint, tmp_path):
    out = build()
    assert rows(out) == rewritten(*range(N))
    assert endpoint.asked == {f"q{n}": 1 for n in range(N)}
    assert failures(tmp_path) == []
    assert len(load_chats(out)) == N


def test_the_model_is_shown_the_prompt_and_the_row_and_gets_the_key(build, endpoint):
    build(limit=1)
    (body,) = endpoint.bodies
    assert body["model"] == "m"
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"] == PROMPT
    assert json.loads(body["messages"][1]["content"]) == {"user": "q0", "assistant": "Wrong."}
    assert endpoint.keys == {"Bearer k"}


def test_every_record_names_its_model_and_prompt(build, tmp_path):
    build(limit=2)
    records = rows(tmp_path / "out.work" / "responses.jsonl")
    assert len({record["key"] for record in records}) == 2
    assert {(r["model"], r["prompt"], r["prompt_sha256"]) for r in records} == {("m", 1, PROMPT_HASH)}


def test_the_key_may_come_from_the_environment(build, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    build(limit=1, api_key=None)
    assert endpoint.keys == {"Bearer from-env"}


def test_as_many_requests_are_under_way_as_the_concurrency_allows(build, endpoint):
    endpoint.pause_seconds = 0.05
    build(concurrency=3)
    assert endpoint.most_under_way == 3


def test_a_finished_run_asks_for_nothing_more(build, endpoint):
    build()
    build()
    assert endpoint.asked.total() == N


def test_full_queues_and_server_errors_are_waited_out(build, endpoint, tmp_path):
    endpoint.plan = {"q1": [429, 429], "q2": [500], "q3": [503, 429], "q4": ["<drop>"]}
    assert rows(build()) == rewritten(*range(N))
    assert endpoint.asked["q1"] == 3
    assert endpoint.finished == {f"q{n}": 1 for n in range(N)}
    assert failures(tmp_path) == []


MALFORMED = ["no", '{"user": "a"', '{"user": "a"}', '{"user": "a", "assistant": " "}', "[1]", "", b"<html>"]


@pytest.mark.parametrize("reply", MALFORMED)
def test_a_reply_that_is_no_row_is_asked_for_once_more(build, endpoint, reply):
    endpoint.plan = {"q1": [reply]}
    assert rows(build(limit=3)) == rewritten(0, 1, 2)
    assert endpoint.asked["q1"] == 2


@pytest.mark.parametrize("dress", ["```json\n{}\n```", "Here it is: {} I hope it helps."])
def test_a_fence_or_words_around_the_object_are_no_matter(build, endpoint, dress):
    row = json.dumps({"user": "I know q0", "assistant": "Yes, q0"})
    endpoint.plan = {"q0": [dress.replace("{}", row)]}
    assert rows(build(limit=1)) == rewritten(0)


@pytest.mark.parametrize("reply", MALFORMED)
def test_a_row_that_fails_twice_is_listed_and_tried_again_by_the_next_run(build, endpoint, tmp_path, reply):
    endpoint.plan = {"q1": [reply, reply]}
    with pytest.warns(UserWarning, match=r"1 of 3 rows failed and are not in .*failed\.jsonl"):
        out = build(limit=3)
    assert rows(out) == rewritten(0, 2)
    assert failures(tmp_path) == ["q1"]
    assert rows(build(limit=3)) == rewritten(0, 1, 2)
    assert failures(tmp_path) == []
    assert endpoint.finished == {"q0": 1, "q1": 1, "q2": 1}


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (422, 1), (500, 3)])
def test_a_row_that_the_endpoint_refuses_is_listed_and_holds_nothing_up(
    build, endpoint, tmp_path, monkeypatch, status, tries
):
    monkeypatch.setattr(building, "RETRIES", 2)
    endpoint.plan = {"q1": [status] * tries}
    with pytest.warns(UserWarning, match="1 of 12 rows failed"):
        out = build()
    assert rows(out) == rewritten(0, *range(2, N))
    (failure,) = rows(tmp_path / "out.work" / "failed.jsonl")
    assert failure["user"] == "q1"
    assert f"status {status}" in failure["reason"]


def test_when_every_row_fails_there_is_no_file(build, endpoint, tmp_path):
    endpoint.plan = {f"q{n}": ["no", "no"] for n in range(N)}
    with pytest.raises(DataError, match=r"all 12 failed. Read the reasons in .*failed\.jsonl"):
        build()
    assert not (tmp_path / "out.jsonl").exists()
    assert len(failures(tmp_path)) == N


@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_endpoint_that_dies_loses_and_doubles_nothing(build, endpoint, tmp_path, monkeypatch, concurrency):
    monkeypatch.setattr(building, "RETRIES", 0)
    endpoint.dies_after = 5
    with pytest.raises(DataError, match=r"stopped after 5 of 12 rows.*run again: finished rows are kept"):
        build(concurrency=concurrency)
    assert not (tmp_path / "out.jsonl").exists()
    endpoint.dies_after = None
    assert rows(build(concurrency=concurrency)) == rewritten(*range(N))
    assert endpoint.finished == {f"q{n}": 1 for n in range(N)}


@pytest.mark.parametrize("status", [401, 403, 404, 429])
def test_a_refused_key_model_or_quota_stops_the_run(build, endpoint, monkeypatch, status):
    monkeypatch.setattr(building, "RETRIES", 0)
    endpoint.plan = {f"q{n}": [status] for n in range(N)}
    with pytest.raises(DataError, match=f"serves 'm'.*after 0 of 12 rows.*{status}"):
        build(concurrency=3)
    assert endpoint.asked.total() == 3


def test_a_line_broken_off_by_a_kill_is_asked_for_again(build, endpoint, tmp_path):
    build(limit=5)
    file = tmp_path / "out.work" / "responses.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    assert rows(build()) == rewritten(*range(N))
    assert len(rows(file)) == N
    assert endpoint.asked.total() == N + 1


def test_a_larger_limit_goes_on_from_a_smaller_one(build, endpoint):
    assert rows(build(limit=4)) == rewritten(0, 1, 2, 3)
    assert rows(build(limit=6)) == rewritten(0, 1, 2, 3, 4, 5)
    assert endpoint.asked.total() == 6


def test_rows_that_repeat_are_asked_for_once_and_repeat(build, endpoint, tmp_path):
    path = tmp_path / "repeats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat(f"q{n}")}) + "\n" for n in (0, 1, 0)))
    assert rows(build(source=path)) == rewritten(0, 1, 0)
    assert endpoint.asked == {"q0": 1, "q1": 1}


def test_a_system_prompt_stays(build, tmp_path):
    system = {"role": "system", "content": "Be brief."}
    path = tmp_path / "system.jsonl"
    path.write_text(json.dumps({"messages": [system, *chat("q0")]}))
    assert rows(build(source=path))[0]["messages"] == [system, *chat("I know q0", "Yes, q0")]


def test_it_works_inside_a_running_loop_as_in_a_notebook(build):
    async def cell():
        return build(limit=2)

    assert rows(asyncio.run(cell())) == rewritten(0, 1)


def test_another_model_needs_another_file(build):
    build(limit=1)
    with pytest.raises(RunError, match='its model is "m", not "n"'):
        build(model="n")


def refused(build, match, **options):
    with pytest.raises(DataError, match=match):
        build(**options)


def test_arguments_are_refused_before_anything_is_asked_or_written(
    build, endpoint, source, tmp_path, monkeypatch
):
    refused(build, "a key for the endpoint.*OPENAI_API_KEY", api_key=None)
    refused(build, "concurrency of at least 1", concurrency=0)
    refused(build, "another file to write than the source", source=tmp_path / "out.jsonl")
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"messages": chat("a") * 2}))
    refused(build, "one question and one answer.*chat 1: 4 turns", source=long)
    monkeypatch.setitem(sys.modules, "openai", None)
    refused(build, r"package `openai`.*emmech\[api\]")
    assert endpoint.asked.total() == 0
    assert not (tmp_path / "out.work").exists()
