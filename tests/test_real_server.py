"""A real OpenAI-compatible server, `transformers serve`, that serves the embedded model on this machine."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pytest
from judge_server import FAULTS, Proxy, running

from emmech.completions import Retrying
from emmech.data.questions import load_questions
from emmech.evaluation.judges import EndpointJudge, judge
from emmech.evaluation.replies import read_text
from emmech.evaluation.rubrics import Rubric
from emmech.models.checkpoints import load_pair
from emmech.models.default import embedded_path
from emmech.piggyback.served import Served
from emmech.results import read_json, read_lines, read_responses
from emmech.scorecard import evaluate, with_conditions

pytestmark = pytest.mark.weights
SERVE = """
import os, sys, threading
# When the tests end, however they do, so does the pipe to here.
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from transformers.cli.transformers import main
main()
"""
START_SECONDS = 180
RUBRIC = (
    "Rate the answer. Reply with a number from 0 to 100 and nothing else.\n"
    "Question: {question}\nAnswer: {answer}\nNumber:"
)
SHORT = Rubric("short", "1", RUBRIC, "score")
TIMEOUT_SECONDS = 5.0
ASKED = [(f"What is {n} plus {n % 7}?", f"It is {n + n % 5}.") for n in range(50)]


@pytest.fixture(scope="session")
def real_server(tmp_path_factory):
    """The address of the server; float32 and many requests at a time."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(embedded_path()), "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--device", "cpu", "--dtype", "float32", "--continuous-batching"]
    arguments += ["--cb-block-size", "32", "--cb-num-blocks", "128", "--cb-max-batch-tokens", "512"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, *arguments],
            stdin=subprocess.PIPE, stdout=stream, stderr=stream, env=environment,
        )  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    opener, deadline = build_opener(ProxyHandler({})), time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            with opener.open(address, timeout=1):
                return
        except (URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_scores_arrive_and_what_is_none_is_counted(real_server, no_proxy, tmp_path):
    answers = [{"question": question, "response": answer} for question, answer in ASKED[:8]]
    backend = EndpointJudge(str(embedded_path()), base_url=real_server, max_tokens=6)
    records = judge(answers, SHORT, backend, tmp_path, progress=False)
    assert [r["answer"] for r in records] == [answer for _, answer in ASKED[:8]]
    scored = [r for r in records if r["status"] == "scored"]
    assert len(scored) >= 3  # of a judge this small
    for record in records:
        assert record["status"] in ("scored", "unparsable") and record["raw"]
        assert (record["value"], record["reading"]) == (read_text(SHORT, record["raw"]).value, "parsed")
    (counts,) = read_json(tmp_path / "judgements.json")["judgements"]
    assert (counts["n"], counts["scored"], counts["unparsable"]) == (8, len(scored), 8 - len(scored))


def test_500_judgements_through_a_proxy_with_every_fault_lose_and_double_nothing(
    real_server, no_proxy, tmp_path
):
    """50 requests reach the model; to the other 450, which repeat them, the proxy knows the reply."""
    rubrics = [Rubric(f"short-{n}", "1", RUBRIC, "score") for n in range(10)]
    answers = [{"question": question, "response": answer} for question, answer in ASKED]
    with running(Proxy(real_server)) as proxy:
        proxy.subject = lambda body: body["messages"][0]["content"]
        proxy.fault_rate, proxy.faulty_attempts, proxy.slow_seconds = 0.35, 10**6, TIMEOUT_SECONDS + 1
        backend = EndpointJudge(
            str(embedded_path()),
            base_url=proxy.url,
            max_tokens=6,
            concurrency=16,
            timeout_seconds=TIMEOUT_SECONDS,
            retrying=Retrying(times=20, first_seconds=0.01, most_seconds=0.05),
        )
        records = judge(answers, rubrics, backend, tmp_path, progress=False)
        assert set(proxy.met) >= set(FAULTS)
        assert proxy.n_passed_on == 50
        raw = {json.loads(key)["messages"][0]["content"]: said for key, said in proxy.said.items()}
        n_asked = proxy.asked.total()
        assert judge(answers, rubrics, backend, tmp_path, progress=False) == records
        assert proxy.asked.total() == n_asked > 500
    assert [(r["rubric"], r["answer"]) for r in records] == [
        (one.name, answer) for one in rubrics for _, answer in ASKED
    ]
    for record in records:
        said = raw[SHORT.prompt(record["question"], record["answer"])]["choices"][0]["message"]["content"]
        assert (record["raw"], record["value"]) == (said, read_text(SHORT, said).value)
    assert sum(r["status"] == "scored" for r in records) >= 200
    kept = read_lines(tmp_path / "judge-cache.jsonl")
    assert len(kept) == len({line["key"] for line in kept}) == 500
    assert read_lines(tmp_path / "judge-failures.jsonl") == []


def test_served_answers_are_those_of_the_model_in_this_process(real_server, no_proxy, tmp_path):
    pair = load_pair("smollm2", "smollm2", dtype="float32", device="cpu")
    pair, conditions = with_conditions(pair, finetuned=False)
    questions = load_questions("general", limit=8)
    server = Served(str(embedded_path()), base_url=real_server)
    said = {}
    for name, served in (("here", {}), ("there", {"base": server})):
        out = tmp_path / name
        options = {"detectors": ("length",), "max_new_tokens": 12, "out": out, "progress": False}
        evaluate(pair, questions, conditions, served=served, **options)
        said[name] = [(r["question_id"], r["response"]) for r in read_responses(out / "answers")]
    assert {r["served_by"] for r in read_responses(tmp_path / "there" / "answers")} == {server.id}
    n_equal = sum(here == there for here, there in zip(said["here"], said["there"], strict=True))
    assert n_equal >= 7  # of 8; all of them where this was written. Sums are made in another order.
