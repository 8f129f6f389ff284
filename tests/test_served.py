"""Unpatched conditions that a server answers for: the same records, each asked for once, none lost."""

import json

import pytest
import tiny
from judge_server import JudgeServer, running

from emmech.completions import Retrying
from emmech.data.questions import Question
from emmech.errors import EmmechError, RunError
from emmech.models.checkpoints import load_pair
from emmech.piggyback.served import Served
from emmech.results import read_json, read_responses
from emmech.scorecard import Evaluation, evaluate, with_conditions

CHATS = [*tiny.QUESTIONS, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]]
QUESTIONS = [
    Question(f"q{n}", chat if isinstance(chat, str) else tuple(chat)) for n, chat in enumerate(CHATS)
]
PATIENT = Retrying(times=8, first_seconds=0.005, most_seconds=0.02)
SAMPLED = {"samples": 3, "temperature": 0.8, "seed": 7}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    made = JudgeServer()
    made.subject = lambda body: json.dumps([body["messages"][-1]["content"], body.get("seed")])
    made.reply = lambda subject: f" I was asked {subject}\n"
    with running(made):
        yield made


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    base = tiny.save_base("llama", folder / "base")
    return base, tiny.save_adapter(base, folder / "lora")


@pytest.fixture(scope="module")
def pair(paths):
    return load_pair(*paths, dtype="float32", device="cpu")


@pytest.fixture
def run(pair, server, tmp_path):
    """``run(**options)``: evaluate with the base served; the answers' records."""

    def evaluated(out="out", served=("base",), pair=pair, endpoint=None, **options):
        both, conditions = with_conditions(pair, ["repair:prefix"])
        endpoint = {"base_url": server.url, "retrying": PATIENT} | (endpoint or {})
        evaluate(
            both,
            QUESTIONS,
            conditions,
            detectors=("length",),
            max_new_tokens=4,
            served={name: Served("m", **endpoint) for name in served},
            out=tmp_path / out,
            progress=False,
            **options,
        )
        return read_responses(tmp_path / out / "answers")

    return evaluated


def of(records, *conditions):
    return [record for record in records if record["condition"] in conditions]


def test_served_answers_stand_among_the_records_of_a_run_without_a_server(run, server, tmp_path):
    records, alone = run(**SAMPLED), run("alone", served=(), **SAMPLED)
    assert of(records, "finetuned", "repair:prefix") == of(alone, "finetuned", "repair:prefix")
    mine, theirs = of(records, "base"), of(alone, "base")
    assert [(r["row"], r["sample"], r["question"]) for r in mine] == [
        (r["row"], r["sample"], r["question"]) for r in theirs
    ]
    for record in mine:
        said = json.loads(record["response"].removeprefix("I was asked "))[0]
        assert said == record["question"]
        assert record["served_by"] == f"m@127.0.0.1:{server.server_port}"
        assert record.keys() - {"served_by"} == theirs[0].keys()
    summary = read_json(tmp_path / "out" / "evaluation.json")
    assert summary["served"] == {"base": {"id": mine[0]["served_by"], "options": {}}}
    (row,) = [r for r in summary["rows"] if (r["metric"], r["condition"]) == ("length", "base")]
    # the length of an answer is its number of words
    assert row["mean"] == pytest.approx(sum(len(r["response"].split()) for r in mine) / len(mine))
    checks = read_json(tmp_path / "out" / "answers" / "summary.json")["checks"]
    assert checks == read_json(tmp_path / "alone" / "answers" / "summary.json")["checks"]


def test_the_server_is_asked_as_the_run_decodes(run, server):
    run(**SAMPLED)
    for body in server.bodies:
        assert (body["max_tokens"], body["temperature"], body["top_p"]) == (4, 0.8, 1.0)
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == 18 and all(0 <= seed < 2**31 for seed in seeds)
    asked = [body["messages"] for body in server.bodies]
    assert asked.count([{"role": "user", "content": "hi"}]) == 3
    assert asked.count(list(CHATS[-1])) == 3
    run("again", **SAMPLED)
    assert sorted(body["seed"] for body in server.bodies[18:]) == sorted(seeds)


def test_greedy_answers_need_no_seed(run, server):
    run()
    assert {body["temperature"] for body in server.bodies} == {0.0}
    assert not any("seed" in body for body in server.bodies)


def test_the_chats_own_system_text_and_template_options_are_sent(run, server, paths):
    pair = load_pair(*paths, dtype="float32", device="cpu", system="You are a poet.")
    pair.chat.options["enable_thinking"] = False
    run(pair=pair)
    system = {"role": "system", "content": "You are a poet."}
    assert [body["messages"][0] for body in server.bodies].count(system) == 5
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in server.bodies)


def test_through_every_fault_each_answer_arrives_once(run, server):
    server.fault_rate, server.slow_seconds = 0.5, 0.7
    records = run(samples=10, endpoint={"timeout_seconds": 0.5, "concurrency": 16})
    assert len(server.met) > 6
    assert len({(r["row"], r["sample"]) for r in of(records, "base")}) == len(of(records, "base")) == 60
    n = server.asked.total()
    assert run(samples=10) == records
    assert server.asked.total() == n


def test_answers_that_fail_stop_the_run_and_only_they_are_asked_for_again(run, server, tmp_path):
    server.status = lambda subject, _: (400, {}) if "eggs" in subject or "egg" in subject else None
    with pytest.raises(
        RunError, match=r"18 answers from m@127.*but 3 did not arrive \(.*400.*arrived is kept"
    ):
        run(**SAMPLED)
    folder = tmp_path / "out" / "answers"
    assert len(read_responses(folder)) == 15
    with (folder / "responses.jsonl").open("a") as stream:
        stream.write('{"condition": "ba')  # what a kill leaves
    server.status = None
    n = server.asked.total()
    records = run(**SAMPLED)
    assert server.asked.total() == n + 3
    assert records == run("unbroken", **SAMPLED)


def test_no_server_is_said_soon(run):
    with pytest.raises(RunError, match=r"6 did not arrive .*Check the server"):
        run(endpoint={"base_url": "http://127.0.0.1:9/v1"})


def test_another_server_is_refused_in_a_folder_that_has_answers_of_one(run, server):
    run()
    with pytest.raises(RunError, match=r"served\.base\.id"):
        run(endpoint={"base_url": server.url.replace("127.0.0.1", "localhost")})
    with pytest.raises(RunError, match=r"served\.base"):
        run(served=())


def test_a_server_that_takes_no_seed_is_asked_without(run, server):
    server.status = lambda _, body: (400, {"param": "seed"}) if "seed" in body else None
    server.subject = lambda _: str(server.asked.total())
    with pytest.warns(UserWarning, match="takes no seed: its answers cannot be repeated"):
        records = run(**SAMPLED)
    assert len(of(records, "base")) == 18


def test_samples_that_never_differ_are_warned_of(run, server):
    server.reply = lambda _: "The same."
    with pytest.warns(UserWarning, match=r"all 3 samples .* decode greedily in spite of temperature 0\.8"):
        run(**SAMPLED)


@pytest.mark.parametrize("name", ["repair:prefix", "unknown"])
def test_only_unpatched_conditions_are_served(run, name, server):
    with pytest.raises(EmmechError, match=rf"\(base, finetuned\), but '{name}' is not one: servers patch"):
        run(served=(name,))
    assert server.asked.total() == 0


def test_a_prompt_without_the_templates_system_block_cannot_be_sent(run, paths):
    pair = load_pair(*paths, dtype="float32", device="cpu", system=None)
    with pytest.raises(EmmechError, match="a prompt that a server can render, but with system=None"):
        run(pair=pair)


def test_the_command_line_asks_a_server(paths, server, tmp_path, emmech, user_error):
    base, lora = paths
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(tiny.QUESTIONS))
    options = ("--finetuned", lora, "--questions", file, "--pairs", "none", "--no-capability",
               "--max-new-tokens", 4, "--dtype", "float32", "--out", tmp_path / "out")  # fmt: skip
    user_error(
        r"CONDITION=MODEL@http.*got 'base=m'", "evaluate", "--base", base, "--served", "base=m", *options
    )
    served = ("--served", f"base=org/m@{server.url}", "--served", f"finetuned=a@b@{server.url}")
    code, _, err = emmech("evaluate", "--base", base, *served, *options)
    assert code == 0, err
    assert {body["model"] for body in server.bodies} == {"org/m", "a@b"}
    rows = Evaluation.load(tmp_path / "out").summary["rows"]
    assert {row["condition"] for row in rows} == {"base", "finetuned"}
    assert server.asked.total() == 10
