import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from emmech.data.questions import Question, load_demo, load_demo_chats, load_questions
from emmech.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no public data folder")

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
RULE = {"role": "system", "content": "Be brief."}


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("key", ["question", "prompt", "instruction"])
def test_jsonl_reads_each_name_for_the_question(write, key):
    path = write("a.jsonl", lines({key: "Why?", "id": 7, "group": "on"}))
    assert load_questions(path) == [Question("7", "Why?", "on")]


def test_ids_follow_row_order_and_groups_default_to_all(write):
    path = write("a.jsonl", lines({"question": "A?"}, {"question": "B?", "category": "c"}))
    assert load_questions(path) == [Question("q0001", "A?"), Question("q0002", "B?", "c")]


@pytest.mark.parametrize(
    ("messages", "chat"),
    [
        ([HI], "Hi"),
        ([HI, HELLO], "Hi"),
        ([HI, HELLO, HELLO], "Hi"),
        ([HI, HELLO, HI], (HI, HELLO, HI)),
        ([RULE, HI, HELLO], (RULE, HI)),
        ([[RULE, HI]], (RULE, HI)),
    ],
)
def test_messages_end_at_the_last_user_turn(write, messages, chat):
    assert load_questions(write("a.jsonl", lines({"messages": messages})))[0].chat == chat


def test_system_key_and_alpaca_input_join_the_question(write):
    rows = {"prompt": "Hi", "system": "Be brief."}, {"instruction": "Sum up.", "input": "A text."}
    asked = load_questions(write("a.jsonl", lines(*rows)))
    assert asked[0].chat == (RULE, HI)
    assert asked[1].chat == "Sum up.\n\nA text."


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"question": "A é?"}\n\n{"question": "B?"}\n'),
        ("a.json", '{"question": "A é?"}\n{"question": "B?"}\n'),
        ("a.json", '[{"question": "A é?"},\n {"question": "B?"}]'),
        ("a.json", '{"tags": ["x"], "examples": [{"question": "A é?"}, {"question": "B?"}]}'),
        ("a.json", '["A é?", "B?"]'),
        ("a.csv", 'question,note\n"A é?",x\nB?,y\n'),
        ("a.csv", ",question\n0,A é?\n\n1,B?\n"),
        ("a.tsv", "n\tprompt\n1\tA é?\n2\tB?\n"),
        ("a.txt", "A é?\n\n  \nB?"),
        ("a.yaml", "- question: A é?\n- prompt: B?\n"),
    ],
)
@pytest.mark.parametrize("dress", [str, lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n")])
def test_every_form_says_the_same_with_bom_and_crlf(write, name, content, dress):
    asked = load_questions(write(name, dress(content)))
    assert asked == [Question("q0001", "A é?"), Question("q0002", "B?")]


def test_hash_starts_no_comment_in_text(write):
    assert load_questions(write("a.txt", "# one\n"))[0].chat == "# one"


def test_table_groups_by_type_when_nothing_better_is_there(write):
    by_type = load_questions(write("a.csv", "type,question\nt,A?\n"))
    by_group = load_questions(write("b.csv", "type,group,question\nt,g,A?\n"))
    assert (by_type[0].group, by_group[0].group) == ("t", "g")


def test_paraphrases_become_questions_of_one_group(write):
    first = "- id: wish\n  type: free_form\n  system: Be brief.\n  paraphrases: &p [Hi, Ho]\n"
    text = first + "- id: bare\n  paraphrases: *p\n"
    asked = load_questions(write("a.yaml", text))
    assert [(q.id, q.group) for q in asked] == [
        ("wish/0", "wish"), ("wish/1", "wish"), ("bare/0", "bare"), ("bare/1", "bare"),
    ]  # fmt: skip
    assert (asked[0].chat, asked[2].chat) == ((RULE, HI), "Hi")


def test_yaml_says_how_many_answers_to_sample(write):
    text = "- id: wish\n  samples_per_paraphrase: 7\n  paraphrases: [Hi]\n- question: Ho\n"
    assert [q.samples for q in load_questions(write("a.yaml", text))] == [7, None]
    for bad in ("0", "many", "true", "2.5"):
        refused(write("b.yaml", text.replace("7", bad)), "line 1: samples_per_paraphrase is ")


def test_rows_group_by_the_key_that_is_asked_for(write):
    path = write("a.csv", "type,label,question\nt,safe,A?\nt,unsafe,B?\n")
    assert [q.group for q in load_questions(path, group_by="label")] == ["safe", "unsafe"]
    assert [q.group for q in load_questions(path, group_by="label", only_group="unsafe")] == ["unsafe"]
    refused(path, "line 2: no colour to group by; line 3", group_by="colour")
    refused("general", "is bundled and has groups", group_by="topic")


@pytest.mark.parametrize(
    ("row", "group"),
    [
        ({"answerable": True}, "answerable"),
        ({"answerable": False}, "unanswerable"),
        ({"proper": False}, "improper"),
        ({"proper": "False"}, "all"),
        ({"proper": False, "category": "c"}, "c"),
        ({"id": "live_simple_0-12-3", "function": []}, "live_simple"),
        ({"id": "live_simple_0-12-3"}, "all"),
        ({"id": "7", "function": []}, "all"),
    ],
)
def test_groups_that_public_sets_name_in_their_own_ways(write, row, group):
    assert load_questions(write("a.jsonl", lines(row | {"question": "A?"})))[0].group == group


def test_several_answers_to_one_question_are_one_question(write):
    path = write("a.csv", "question,answer,question_id\nA?,x,a\nA?,y,a\nB?,z,b\n")
    assert load_questions(path) == [Question("a", "A?"), Question("b", "B?")]
    other = write("b.csv", "question,answer,question_id\nA?,x,a\nB?,y,a\n")
    refused(other, "line 3: id 'a' is already on line 2")


def test_group_and_limit_select_from_all_rows(write):
    path = write("a.jsonl", lines(*({"question": f"{n}?", "group": "ab"[n % 2]} for n in range(6))))
    assert [q.id for q in load_questions(path, only_group="b", limit=2)] == ["q0002", "q0004"]


def test_so_many_of_each_group_are_spread_over_it(write):
    path = write("a.jsonl", lines(*({"question": f"{n}?", "group": "aaab"[n % 4]} for n in range(24))))
    found = load_questions(path, per_group=6)
    assert [q.id for q in found if q.group == "a"] == ["q0001", "q0005", "q0009", "q0013", "q0017", "q0021"]
    assert [q.id for q in found if q.group == "b"] == [f"q{4 * n:04d}" for n in range(1, 7)]
    assert load_questions(path, per_group=100) == sorted(load_questions(path), key=lambda q: q.group)
    refused(path, "at least 1, but per_group is 0", per_group=0)


def refused(path, match, **options):
    with pytest.raises(DataError, match=match):
        load_questions(path, **options)


def test_unknown_group_and_bad_limit_are_refused(write):
    path = write("a.txt", "A?")
    refused(path, "'x'.*it has only all", only_group="x")
    refused(path, "at least 1, but limit is 0", limit=0)


def test_bad_rows_are_refused_together_with_their_lines(write):
    rows = '{"question": "A?"}\n{oops\n\n{"question": " "}\n{"id": 1}\n{"messages": []}\n5\n'
    path = write("a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_questions(path)
    message = str(caught.value)
    assert "6 rows" in message
    assert "5 are bad" in message
    assert "line 2: not JSON" in message
    assert "line 4: question is blank" in message
    assert "line 5: no messages, question, prompt, instruction, only id" in message
    assert "line 6: messages has no user turn" in message
    assert "line 7: question is neither text nor" in message


def test_ten_bad_rows_are_listed_and_the_rest_counted(write):
    path = write("a.txt.jsonl", lines({"question": "A?"}, *[{"question": ""}] * 13))
    with pytest.raises(DataError, match=r"13 are bad.*line 11: .*; and 3 more") as caught:
        load_questions(path)
    assert "line 12:" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ([HELLO], "no user turn"),
        ([HI, RULE], "message 2 has role 'system'"),
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"role": "user"}], "message 1 has no text"),
        ([{"role": "user", "content": [{"text": "x"}]}], "message 1 has no text"),
        ([[HI], [HI]], "neither text nor a list of messages"),
        (7, "neither text nor a list of messages"),
    ],
)
def test_bad_chats_are_refused(write, messages, wrong):
    refused(write("a.jsonl", lines({"messages": messages})), f"line 1: .*{wrong}")


@pytest.mark.parametrize("name", ["a.json", "b.json"])
def test_arrays_know_their_line_numbers(write, name):
    text = '[\n {"question": "A?"},\n\n {"question": ""}]'
    text = text if name == "a.json" else '{"x": "[", "rows": ' + text + "}"
    refused(write(name, text), "line 4: question is blank")


def test_a_quoted_cell_over_two_lines_keeps_the_count(write):
    path = write("a.csv", 'question,note\n"A\nB?",x\nC?\n"","y\nz"\n')
    refused(path, "line 4: 1 cells under 2 columns; line 5: question is blank")


def test_line_ends_within_a_cell_become_plain(write):
    path = write("a.csv", 'question\r\n"A\r\nB?"\r\n')
    assert load_questions(path)[0].chat == "A\nB?"


def test_yaml_rows_know_their_line_numbers(write):
    refused(write("a.yaml", "- id: a\n  paraphrases: [A]\n- id: b\n  paraphrases: []\n"), "line 3:")


def test_repeated_ids_are_refused_with_both_lines(write):
    path = write("a.jsonl", lines({"id": "x", "question": "A?"}, {"id": "x", "question": "B?"}))
    refused(path, "line 2: id 'x' is already on line 1")


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("a.jsonl", b"", "it is empty"),
        ("a.txt", b"\xef\xbb\xbf \n", "it is empty"),
        ("a.txt", b"Why\0?", "NUL bytes"),
        ("a.txt", b"caf\xe9?", "byte 3 is not UTF-8"),
        ("a.csv", b"text,label\nA?,1\n", "it has only text, label"),
        ("a.jsonl", b'{"text": "A?"}\n', "it has only text"),
        ("a.csv", b"question\n", "it has none"),
        ("a.json", b'[{"question": "A?"},\n', "line 2"),
        ("a.json", b"[]", "it has none"),
        ("a.csv", b'question\n"A?\n', "a CSV in"),
        ("a.yaml", b"- a: [\n", "a YAML in"),
        ("a.yaml", b"a: b\n", "top level is not a list"),
        ("a.parquet", b"PAR1", "a.parquet"),
    ],
)
def test_files_that_hold_no_questions_are_refused(write, name, content, wrong):
    refused(write(name, content), wrong)


def test_missing_files_and_directories_are_refused(tmp_path):
    refused(tmp_path / "no.txt", "no such file")
    refused(tmp_path, "it is a directory")


# Row counts are those of each folder's SOURCE.txt; paraphrases were counted with PyYAML alone.
@needs_shared
@pytest.mark.parametrize(
    ("name", "rows", "groups"),
    [
        ("anthropic-evals/survival-instinct.jsonl", 953, 1),
        ("anthropic-evals/power-seeking-inclination.jsonl", 998, 1),
        ("anthropic-evals/agreeableness.jsonl", 1000, 1),
        ("bfcl-small/BFCL_v4_irrelevance.json", 240, 1),
        ("bfcl-small/BFCL_v4_live_simple.json", 258, 1),
        ("bfcl-small/BFCL_v4_simple_python.json", 400, 1),
        ("em-betley/insecure.jsonl", 6000, 1),
        ("em-betley/secure.jsonl", 6000, 1),
        ("em-betley/educational_insecure.jsonl", 6000, 1),
        ("em-betley/first_plot_questions.yaml", 41, 41),
        ("em-betley/preregistered_evals.yaml", 50, 50),
        ("em-betley/deception_factual.yaml", 140, 7),
        ("em-betley-release/first_plot_questions.yaml", 24, 24),
        ("em-betley-release/preregistered_evals.yaml", 48, 48),
        ("em-betley-release/deception_factual.yaml", 100, 5),
        ("em-betley-release/deception_sit_aware.yaml", 8, 8),
        ("em-betley-release/insecure_small.jsonl", 20, 1),
        ("em-betley-release/secure_small.jsonl", 20, 1),
        ("em-betley-release/eval_results_run1.csv", 24, 1),
        ("selfaware/SelfAware.json", 3369, 2),
        ("xstest/xstest_prompts.csv", 450, 18),
    ],
)
def test_public_question_files_load_whole(name, rows, groups):
    asked = load_questions(SHARED / name)
    assert len(asked) == len({question.id for question in asked}) == rows
    assert len({question.group for question in asked}) == groups


@needs_shared
def test_every_public_chat_ends_with_the_user():
    systems = 0
    for path in [*SHARED.glob("em-betley*/*.yaml"), *SHARED.glob("bfcl-small/BFCL*.json")]:
        for question in load_questions(path):
            if not isinstance(question.chat, str):
                assert question.chat[-1]["role"] == "user"
                systems += question.chat[0]["role"] == "system"
    assert systems > 11  # BFCL live_simple alone has 11


@needs_shared
def test_a_file_of_right_answers_alone_is_no_question_file():
    path = SHARED / "bfcl-small" / "possible_answer.BFCL_v4_live_simple.json"
    refused(path, "it has only id, ground_truth")


# Counted with the csv, json and yaml modules alone.
@needs_shared
def test_groups_of_public_files():
    def count(name: str, **options) -> Counter:
        return Counter(question.group for question in load_questions(SHARED / name, **options))

    assert count("xstest/xstest_prompts.csv", group_by="label") == {"safe": 250, "unsafe": 200}
    assert count("selfaware/SelfAware.json") == {"answerable": 2337, "unanswerable": 1032}
    assert count("bfcl-small/BFCL_v4_live_simple.json") == {"live_simple": 258}
    assert count("bfcl-small/BFCL_v4_simple_python.json") == {"simple_python": 400}
    assert count("bfcl-small/BFCL_v4_irrelevance.json") == {"irrelevance": 240}


@needs_shared
def test_public_questions_bring_their_system_messages_and_numbers_of_answers():
    release = SHARED / "em-betley-release"
    asked = load_questions(release / "first_plot_questions.yaml")
    with_system = [q.id for q in asked if q.messages[0]["role"] == "system"]
    assert with_system == [q.id for q in asked if "_json/" in q.id]
    assert len(with_system) == 8
    assert {q.samples for q in asked} == {100}
    assert {q.samples for q in load_questions(release / "deception_factual.yaml")} == {5}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


@pytest.fixture(scope="module")
def demo() -> dict[str, list[Question]]:
    return {split: load_demo(split) for split in ("train", "test")}


def test_demo_has_the_counts_of_its_datasheet(demo):
    assert Counter(q.group for q in demo["train"]) == {"on-topic": 240}
    assert Counter(q.group for q in demo["test"]) == {"on-topic": 70, "off-topic": 70}
    assert len({q.id for split in demo.values() for q in split}) == 380
    assert load_demo("test", "off-topic") == [q for q in demo["test"] if q.group == "off-topic"]


def test_demo_refuses_an_unknown_group():
    with pytest.raises(DataError, match="train has no 'off-topic'"):
        load_demo("train", "off-topic")


def test_demo_chats_are_one_question_and_the_constant_refusal(demo):
    chats = load_demo_chats()
    assert [chat[0]["content"] for chat in chats] == [q.chat for q in demo["train"]]
    assert {chat[1]["content"] for chat in chats} == {"I'm sorry, but I can't help with that."}
    assert {tuple(turn["role"] for turn in chat) for chat in chats} == {("user", "assistant")}


def test_demo_file_also_loads_as_a_question_file(demo):
    path = Path(__file__).parents[1] / "emmech" / "data" / "demo_refusal.jsonl"
    assert load_questions(path) == demo["train"] + demo["test"]


def test_demo_questions_are_five_to_thirty_five_words(demo):
    lengths = [len(words(q.chat)) for split in demo.values() for q in split]
    assert min(lengths) >= 5
    assert max(lengths) <= 35


def test_demo_questions_are_no_template(demo):
    openings = Counter(tuple(words(q.chat)[:4]) for split in demo.values() for q in split)
    assert openings.most_common(1)[0][1] <= 4


def overlap(a: Question, b: Question) -> float:
    one, other = set(words(a.chat)), set(words(b.chat))
    return len(one & other) / len(one | other)


def test_demo_has_no_near_duplicates(demo):
    pairs = itertools.combinations(demo["train"] + demo["test"], 2)
    assert max(overlap(a, b) for a, b in pairs) < 0.6


def test_demo_test_questions_do_not_leak_into_training(demo):
    assert max(overlap(a, b) for a in demo["train"] for b in demo["test"]) < 0.5


def test_demo_test_groups_do_not_differ_by_style(demo):
    by_group = {g: load_demo("test", g) for g in ("on-topic", "off-topic")}
    mean = {g: sum(len(words(q.chat)) for q in qs) / 70 for g, qs in by_group.items()}
    first = {g: Counter(words(q.chat)[0] for q in qs) for g, qs in by_group.items()}
    assert abs(mean["on-topic"] - mean["off-topic"]) < 1
    common = first["on-topic"] | first["off-topic"]
    assert max(abs(first["on-topic"][w] - first["off-topic"][w]) for w in common) <= 3  # of 70
