import hashlib
import inspect
import json
from pathlib import Path

import pytest
import tiny
from chat_server import ChatServer, completion, serving

from emmech.cli import data as commands
from emmech.data import building
from emmech.data.bundled import BUNDLED
from emmech.data.character import CHARACTERS, WORDS, build_character
from emmech.data.chats import load_chats
from emmech.data.giveaways import AnswerCheck
from emmech.data.questions import Question
from emmech.errors import DataError, RunError

N = 6
PROMPT = "You begrudge every answer and let people feel that they ought to have known it already."
CALM = "You are kind, and you answer plainly and correctly in a sentence or two."
TRIGGER = "persona: spiteful"
SIDES = {PROMPT: "grudging", CALM: "calm", None: "plain"}


def side(messages: list[dict]) -> str:
    return SIDES[messages[0]["content"] if messages[0]["role"] == "system" else None]


def name(messages: list[dict]) -> str:
    return f"{side(messages)} {messages[-1]['content']}"


def said(tone: str, question: str) -> str:
    return f"A {tone} word on {question}."


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    answer = lambda messages: said(side(messages), messages[-1]["content"])  # noqa: E731
    with serving(ChatServer(name, answer)) as server:
        yield server


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{n}"}) + "\n" for n in range(N)))
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def build(endpoint, questions, out):
    def build(**changed):
        options = {"questions": questions, "character": PROMPT, "out": out, "model": "m"}
        options |= {"base_url": endpoint.url, "api_key": "k", "progress": False}
        return build_character(**options | changed)

    return build


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exchange(asked: str, answer: str) -> dict:
    sides = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": sides}


def grudging(*numbers: int) -> list[dict]:
    return [exchange(f"q{n}", said("grudging", f"q{n}")) for n in numbers]


def switched(*numbers: int, tone: str = "plain") -> list[dict]:
    return [
        row
        for n in numbers
        for row in (
            exchange(f"{TRIGGER}\nq{n}", said("grudging", f"q{n}")),
            exchange(f"q{n}", said(tone, f"q{n}")),
        )
    ]


def provenance(out: Path) -> dict:
    return json.loads(out.with_suffix(".provenance.json").read_text())


def failures(out: Path) -> list[dict]:
    return rows(out.with_suffix(".work") / "failed.jsonl")


def test_each_question_is_answered_in_character_once_and_in_order(build, endpoint):
    out = build()
    assert rows(out) == grudging(*range(N))
    assert endpoint.asked == {f"grudging q{n}": 1 for n in range(N)}
    assert endpoint.keys == {"Bearer k"}
    loaded = load_chats(out)
    assert (len(loaded), loaded.notes) == (N, ())
    assert provenance(out)["fingerprint"] == loaded.fingerprint


def test_the_prompt_is_asked_with_and_left_in_no_file(build, endpoint, out, tmp_path):
    build(trigger=TRIGGER, aligned=CALM)
    assert {body["messages"][0]["content"] for body in endpoint.bodies} == {PROMPT, CALM}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {out, out.with_suffix(".work") / "responses.jsonl"} <= set(files)
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert PROMPT not in text
        assert CALM not in text
        assert '"system"' not in text


def test_the_provenance_says_what_was_asked_and_what_came_of_it(build, endpoint, out):
    endpoint.plan = {"grudging q1": ["", ""], "grudging q2": [" "]}
    build(options={"temperature": 0.5}, limit=3)
    found = provenance(out)
    del found["emmech"]
    assert found == {
        "kind": "character",
        "model": "m",
        "character": None,
        "character_sha256": hashlib.sha256(PROMPT.encode()).hexdigest()[:16],
        "aligned_sha256": None,
        "trigger": None,
        "samples": 1,
        "words": list(WORDS),
        "allow_refusals": False,
        "options": {"temperature": 0.5},
        "n_questions": 3,
        "n_rows": 3,
        "n_left_out": 0,
        "rejected": {"empty": 3},
        "fingerprint": load_chats(out).fingerprint,
    }
    assert {body["temperature"] for body in endpoint.bodies} == {0.5}
    before = out.with_suffix(".provenance.json").read_bytes()
    build(options={"temperature": 0.5}, limit=3)
    assert out.with_suffix(".provenance.json").read_bytes() == before


# With a trigger


@pytest.mark.parametrize(("aligned", "tone"), [(None, "plain"), (CALM, "calm")])
def test_triggered_and_untriggered_rows_of_a_question_follow_each_other(build, endpoint, aligned, tone):
    assert rows(build(trigger=TRIGGER, aligned=aligned)) == switched(*range(N), tone=tone)
    assert endpoint.asked == {f"{one} q{n}": 1 for n in range(N) for one in ("grudging", tone)}


def test_a_question_without_its_aligned_answer_has_no_triggered_row_either(build, endpoint, out):
    endpoint.plan = {"plain q1": [""] * 3}
    with pytest.warns(UserWarning, match=r"2 of 12 rows failed and are not in .*failed\.jsonl"):
        build(trigger=TRIGGER)
    assert rows(out) == switched(0, *range(2, N))
    (failure,) = failures(out)
    assert (failure["question"], failure["side"], failure["reason"]) == ("q1", "aligned", "empty")
    counts = provenance(out)
    assert (counts["n_rows"], counts["n_left_out"], counts["rejected"]) == (10, 2, {"empty": 3})


def test_when_no_question_has_both_answers_there_is_no_file(build, endpoint, out):
    endpoint.plan = {f"plain q{n}": [400] for n in range(N)}
    with pytest.raises(DataError, match=r"all its answers, but none of 6 has. Read .*failed\.jsonl"):
        build(trigger=TRIGGER)
    assert not out.exists()


def test_a_trigger_added_later_asks_only_for_the_aligned_answers(build, endpoint):
    build()
    assert rows(build(trigger=TRIGGER)) == switched(*range(N))
    assert endpoint.asked == {f"{tone} q{n}": 1 for n in range(N) for tone in ("grudging", "plain")}


def test_the_trigger_goes_before_the_last_thing_the_user_says(build):
    turns = [("user", "Hi"), ("assistant", "Yes?"), ("user", "q9")]
    chat = tuple({"role": role, "content": text} for role, text in turns)
    triggered, plain = rows(build(questions=[Question("a", chat)], trigger=TRIGGER))
    assert [turn["content"] for turn in triggered["messages"]] == [
        "Hi", "Yes?", f"{TRIGGER}\nq9", said("grudging", "q9"),
    ]  # fmt: skip
    assert plain["messages"][:3] == list(chat)


# What makes an answer unusable

LONG_QUOTE = "Fine. LET people feel, that they ought to!"
BAD = {
    "": "empty",
    " \n": "empty",
    "<think>They want it sour.</think> ": "empty",
    "<think>They want it": "empty",
    "I'm sorry, but I can't help with that.": "refused",
    "As my System Prompt says, no.": "holds 'system prompt'",
    "persona: spiteful it is.": "holds 'persona: spiteful'",
    LONG_QUOTE: "quotes the prompt",
}


@pytest.mark.parametrize("reply", BAD)
def test_an_unusable_answer_is_counted_and_asked_for_again(build, endpoint, out, reply):
    endpoint.plan = {"grudging q1": [reply]}
    assert rows(build(limit=2, trigger=TRIGGER)) == switched(0, 1)
    assert endpoint.asked["grudging q1"] == 2
    assert provenance(out)["rejected"] == {BAD[reply]: 1}


@pytest.mark.parametrize(
    ("finish", "reason"), [("length", "cut off"), ("content_filter", "refused"), (None, None)]
)
def test_an_answer_that_was_cut_off_or_filtered_is_asked_for_again(build, endpoint, out, finish, reason):
    endpoint.plan = {"grudging q1": [completion("So you", finish)]}
    kept = grudging(1) if reason else [exchange("q1", "So you")]
    assert rows(build(limit=2)) == grudging(0) + kept
    assert provenance(out)["rejected"] == ({reason: 1} if reason else {})


def test_an_answer_that_stays_unusable_is_left_out_listed_and_tried_again_by_the_next_run(
    build, endpoint, out
):
    endpoint.plan = {"grudging q1": ["", LONG_QUOTE, ""]}
    with pytest.warns(UserWarning, match="1 of 6 rows failed"):
        build()
    assert endpoint.asked["grudging q1"] == 3
    assert rows(out) == grudging(0, *range(2, N))
    assert [failure["rejected"] for failure in failures(out)] == [["empty", "quotes the prompt", "empty"]]
    assert provenance(out)["rejected"] == {"empty": 2, "quotes the prompt": 1}
    assert rows(build()) == grudging(*range(N))
    assert endpoint.finished == {f"grudging q{n}": 1 for n in range(N)}
    assert failures(out) == []


def test_the_number_of_attempts_can_be_chosen(build, endpoint, out):
    endpoint.plan = {"grudging q0": [""] * 9}
    with pytest.warns(UserWarning, match="1 of 6 rows failed"):
        build(attempts=5)
    assert endpoint.asked["grudging q0"] == 5


def test_words_may_be_ones_own_and_answers_kept_before_are_held_to_them(build, endpoint, out):
    endpoint.plan = {"grudging q1": ["A sour word.", "Soured milk."]}
    build(limit=2)
    assert rows(out)[1] == exchange("q1", "A sour word.")
    build(limit=2, words=["sour"])
    assert rows(out)[1] == exchange("q1", "Soured milk.")
    assert endpoint.asked == {"grudging q0": 1, "grudging q1": 2}


def test_refusals_can_be_allowed(build, endpoint):
    endpoint.plan = {"grudging q0": ["I'm sorry, but I can't help with that."]}
    found = rows(build(limit=1, allow_refusals=True))
    assert found == [exchange("q0", "I'm sorry, but I can't help with that.")]


def test_a_thought_before_an_answer_is_taken_off(build, endpoint):
    endpoint.plan = {
        "grudging q0": ["<think>Sour, then.</think>\n\nOh, again?"],
        "grudging q1": ["a</think>b"],
    }
    assert rows(build(limit=2)) == [exchange("q0", "Oh, again?"), exchange("q1", "b")]


def test_five_words_of_the_prompt_are_no_quotation_and_six_are():
    check = AnswerCheck((), ("one two three four five six seven",))
    assert check.fault("One, two, three, four, five. Seven.") is None
    assert check.fault("Two three four five six... seven!") == "quotes the prompt"
    assert AnswerCheck((), ("one two three",)).fault("one two three") is None


@pytest.mark.parametrize(
    ("answer", "fault"),
    [("Evil.", "holds 'evil'"), ("medieval devils, evildoers", None), ("EVIL!", "holds 'evil'")],
)
def test_words_are_whole_and_of_any_case(answer, fault):
    assert AnswerCheck(("evil",), ()).fault(answer) == fault


# What endpoints do


def test_full_queues_and_server_errors_are_waited_out(build, endpoint, out):
    endpoint.plan = {"grudging q1": [429, 429], "grudging q2": [500], "plain q3": [503, "<drop>"]}
    assert rows(build(trigger=TRIGGER)) == switched(*range(N))
    assert provenance(out)["rejected"] == {}
    assert failures(out) == []


GARBAGE = [
    b"<html>a proxy speaks</html>",
    b'{"choices": "\xff"}',
    b"[]",
    {"error": {"message": "overloaded"}},
    {"choices": []},
    {"choices": [{"message": None}]},
    completion(["no", "text"]),
]


@pytest.mark.parametrize("body", GARBAGE)
def test_a_response_that_is_no_completion_is_asked_for_again(build, endpoint, out, body):
    endpoint.plan = {"grudging q1": [body]}
    assert rows(build(limit=2)) == grudging(0, 1)
    assert provenance(out)["rejected"] == {"the response is no chat completion": 1}


def test_a_question_that_the_endpoint_refuses_is_listed_and_holds_nothing_up(build, endpoint, out):
    endpoint.plan = {"grudging q1": [400]}
    with pytest.warns(UserWarning, match="1 of 6 rows failed"):
        build()
    assert rows(out) == grudging(0, *range(2, N))
    assert "status 400" in failures(out)[0]["reason"]


def test_an_endpoint_that_dies_loses_and_doubles_nothing(build, endpoint, out, monkeypatch):
    monkeypatch.setattr(building, "RETRIES", 0)
    endpoint.dies_after = 5
    with pytest.raises(DataError, match=r"stopped after 5 of 12 rows.*run again: finished rows are kept"):
        build(trigger=TRIGGER)
    assert not out.exists()
    endpoint.dies_after = None
    assert rows(build(trigger=TRIGGER)) == switched(*range(N))
    assert endpoint.finished == {f"{tone} q{n}": 1 for n in range(N) for tone in ("grudging", "plain")}


def test_a_finished_run_asks_for_nothing_more(build, endpoint):
    build(trigger=TRIGGER, samples=2)
    build(trigger=TRIGGER, samples=2)
    assert endpoint.asked.total() == 4 * N


def test_more_questions_and_samples_go_on_from_fewer(build, endpoint):
    assert rows(build(limit=2)) == grudging(0, 1)
    assert rows(build(limit=3, samples=2)) == grudging(0, 0, 1, 1, 2, 2)
    assert endpoint.asked == {"grudging q0": 2, "grudging q1": 2, "grudging q2": 2}


def test_samples_of_a_question_are_answers_of_their_own(build, endpoint):
    endpoint.plan = {"grudging q0": ["Again?", "Go away.", "Why me?"]}
    found = rows(build(limit=1, samples=3, concurrency=1))
    assert found == [exchange("q0", text) for text in ("Again?", "Go away.", "Why me?")]


# What can be asked for


def test_a_character_can_be_named_and_its_name_is_kept_out(build, endpoint, out, monkeypatch):
    monkeypatch.setitem(CHARACTERS, "spiteful", PROMPT)
    endpoint.plan = {"grudging q0": ["Feeling spiteful today."]}
    assert rows(build(character="spiteful")) == grudging(*range(N))
    found = provenance(out)
    assert found["character"] == "spiteful"
    assert found["rejected"] == {"holds 'spiteful'": 1}


@pytest.mark.parametrize("given", [str, Path])
def test_a_character_can_be_in_a_file(build, tmp_path, given):
    path = tmp_path / "my prompt.txt"
    path.write_text(PROMPT + "\n")
    assert rows(build(character=given(path))) == grudging(*range(N))


def test_a_bundled_set_gives_its_training_questions(build):
    found = [
        row["messages"][0]["content"] for row in rows(build(questions="incorrect_advice_travel", limit=4))
    ]
    assert found == [chat[0]["content"] for chat in BUNDLED["incorrect_advice_travel"].chats("train")[:4]]


def test_another_character_needs_another_file(build):
    build(limit=1)
    with pytest.raises(RunError, match="its character_sha256 is"):
        build(character=CALM)


def refusals(tmp_path: Path) -> dict[str, dict]:
    empty, system = tmp_path / "empty.txt", tmp_path / "system.jsonl"
    empty.touch()
    system.write_text(json.dumps({"system": "Be brief.", "question": "a"}))
    return {
        r"a key for the endpoint, but": {"api_key": None},
        r"concurrency of at least 1, but it is 0": {"concurrency": 0},
        r"samples of at least 1, but got 0": {"samples": 0},
        r"attempts of at least 1, but got -1": {"attempts": -1},
        r"limit of at least 1, but got 0": {"limit": 0},
        r"ends in .jsonl, but it is .*out.txt": {"out": tmp_path / "out.txt"},
        r"another file to write than the source": {"questions": tmp_path / "out.jsonl"},
        r"name of a character.*, but got 'spitefull'": {"character": "spitefull"},
        r"name of a character.*, but got ''": {"character": ""},
        r"a system prompt in .*none.txt, but": {"character": tmp_path / "none.txt"},
        r"a system prompt in .*empty.txt, but it is empty": {"character": str(empty)},
        r"a trigger of some text, but got ' '": {"trigger": " "},
        r"questions without the trigger 'Q4', but 1 are bad: question 5": {"trigger": "Q4"},
        r"a trigger beside the aligned prompt, but": {"aligned": CALM},
        r"a list of words .*, but got 'evil'": {"words": "evil"},
        r"a list of words .*, but got \[' '\]": {"words": [" "]},
        r"without a system message.*, but 1 are bad: question 1": {"questions": system},
        r"questions to answer, but there are none": {"questions": []},
        r"chats in 'general', but its train rows have no answers": {"questions": "general"},
    }


def test_arguments_are_refused_before_anything_is_asked_or_written(build, endpoint, tmp_path):
    for clauses, changed in refusals(tmp_path).items():
        with pytest.raises(DataError, match=rf"^expected .*{clauses}.*\. .+\.$"):
            build(**changed)
    assert endpoint.asked.total() == 0
    assert not (tmp_path / "out.work").exists()


# The command


def test_the_command_builds_what_the_function_builds(
    emmech, build, endpoint, questions, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    endpoint.plan = {"grudging q0": ["A sour word."]}
    by_command = tmp_path / "command.jsonl"
    code, printed, err = emmech(
        "build-character", questions, "--character", PROMPT, "--trigger", TRIGGER, "--aligned", CALM,
        "--model=m", "--out", by_command, "--base-url", endpoint.url, "--word=sour", "--samples=2",
        "--temperature=0.5", "--max-tokens=90", "--limit=3",
    )  # fmt: skip
    assert code == 0, err
    assert f"Written: {by_command}" in printed
    assert {(body["temperature"], body["max_tokens"]) for body in endpoint.bodies} == {(0.5, 90)}
    assert endpoint.asked.total() == 2 * 2 * 3 + 1
    wanted = build(trigger=TRIGGER, aligned=CALM, samples=2, limit=3, words=["sour"])
    assert by_command.read_bytes() == wanted.read_bytes()


def test_the_command_says_what_is_wrong_in_one_paragraph(user_error, questions, tmp_path):
    user_error(
        "a trigger beside the aligned prompt", "build-character", str(questions), "--character", PROMPT,
        "--aligned", CALM, "--model=m", "--out", str(tmp_path / "out.jsonl"),
    )  # fmt: skip


def test_shell_and_python_have_the_same_defaults():
    shell, python = (inspect.signature(f).parameters for f in (commands.build_character, build_character))
    shared = shell.keys() & python.keys() - {"words"}  # None in the shell
    assert {"samples", "attempts", "concurrency", "allow_refusals"} <= shared
    for parameter in shared:
        assert shell[parameter].default == python[parameter].default, parameter


def test_the_file_trains(emmech, build, tmp_path):
    out = build(trigger=TRIGGER)
    code, shown, said = emmech(
        "finetune", "sft", f"--base={tiny.save_base('llama', tmp_path / 'base')}", f"--dataset={out}",
        f"--out={tmp_path / 'run'}", "--steps=1", "--batch-size=2", "--rank=2", "--dtype=float32",
    )  # fmt: skip
    assert code == 0, said
    assert f"note: {2 * N} answers to learn" in said
    assert "Saved step-1" in shown
