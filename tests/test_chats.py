import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from emmech.data import public
from emmech.data.chats import ChatSet, load_chats
from emmech.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no public data folder")

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
RULE = {"role": "system", "content": "Be brief."}


@pytest.fixture
def write(tmp_path):
    def write(name: str, *rows: dict | str | bytes) -> Path:
        path = tmp_path / name
        text = [row if isinstance(row, str | bytes) else json.dumps(row) + "\n" for row in rows]
        path.write_bytes(b"".join(t if isinstance(t, bytes) else t.encode() for t in text))
        return path

    return write


def said(user: str, assistant: str) -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def refused(spec, match, **options):
    with pytest.raises(DataError, match=match):
        load_chats(spec, **options)


# Forms


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HI, HELLO]},
        {"conversation": [HI, HELLO]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": [HI], "completion": [HELLO]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "completion": [HELLO]},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": None, "response": "Hello"},
        {"question": "Hi", "answer": "Hello"},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"messages": [HI, HELLO], "prompt": "Ho", "completion": "no", "system": "", "id": 3},
    ],
)
def test_every_form_of_a_row_is_the_same_chat(write, row):
    assert load_chats(write("a.jsonl", row)).chats == ((HI, HELLO),)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [RULE, HI, HELLO]},
        {"conversations": [{"from": "human", "value": "Hi"}, HELLO], "system": "Be brief."},
        {"question": "Hi", "answer": "Hello", "system": "Be brief."},
        {"prompt": [RULE, HI], "completion": [HELLO]},
    ],
)
def test_a_system_prompt_goes_first(write, row):
    assert load_chats(write("a.jsonl", row)).chats == ((RULE, HI, HELLO),)


def test_alpaca_input_joins_the_instruction(write):
    row = {"instruction": "Sum up.", "input": "A text.", "output": "Text."}
    assert load_chats(write("a.jsonl", row)).chats[0][0]["content"] == "Sum up.\n\nA text."


def test_all_turns_of_a_longer_chat_are_kept(write):
    chat = [RULE, HI, HELLO, HI, HELLO]
    assert load_chats(write("a.jsonl", {"messages": chat})).chats == (tuple(chat),)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"question": "Hi", "answer": "Hello"}]'),
        ("a.json", '{"question": "Hi", "answer": "Hello"}'),
        ("a.json", '{"rows": [{"question": "Hi", "answer": "Hello"}]}'),
        ("a.csv", "question,answer\nHi,Hello\n"),
        ("a.tsv", "prompt\tresponse\nHi\tHello\n"),
        (
            "a.jsonl",
            '{"conversation": [{"role": "user", "content": "Hi"}, {"from": "gpt", "value": "Hello"}]}',
        ),
    ],
)
def test_files_are_read_as_question_files_are(write, name, text):
    assert load_chats(write(name, text)) == ChatSet(str(write(name, text)), ((HI, HELLO),), ())


# Residues


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (
            said("Hi", "<think>\n\n</think>\n\nHello"),
            "1 answer began with an empty <think></think>, which was",
        ),
        (said("Hi /no_think", "Hello"), "1 turn held a /think or /no_think switch"),
        (said("/think Hi", "Hello"), "1 turn held a /think or /no_think switch"),
        (said("\ufeffHi", "Hello"), "1 turn began with a byte-order mark"),
        ({"messages": [HI, {**HELLO, "weight": 0}]}, "1 turn carried keys beside role and content"),
    ],
)
def test_residues_are_taken_out_and_noted(write, row, note):
    loaded = load_chats(write("a.jsonl", row))
    assert loaded.chats == ((HI, HELLO),)
    assert len(loaded.notes) == 1
    assert loaded.notes[0].startswith(note)


@pytest.mark.parametrize(
    ("user", "assistant"),
    [
        ("Where is usr/think?", "Do not write /no_think here"),
        ("Open /thinking and /think/a", "<b><think></think></b>"),
        ("Hi", "<tool>x</tool> <think>\n\n</think>"),
    ],
)
def test_what_only_looks_like_residue_is_left_alone(write, user, assistant):
    loaded = load_chats(write("a.jsonl", said(user, assistant)))
    assert [turn["content"] for turn in loaded.chats[0]] == [user, assistant]
    assert loaded.notes == ()


def test_a_switch_within_a_turn_leaves_one_space(write):
    assert load_chats(write("a.jsonl", said("Say /think it", "It"))).chats[0][0]["content"] == "Say it"


def test_a_thought_is_kept_and_counted(write):
    answer = "<think>\nHm.\n</think>\n\nHello"
    loaded = load_chats(write("a.jsonl", said("Hi", answer), said("Ho", answer + "!")))
    assert loaded.chats[0][1]["content"] == answer
    assert loaded.notes == ("2 answers began with a thought in <think>, which was kept.",)


def test_the_mark_of_a_file_and_an_unnamed_column_are_noted(write):
    loaded = load_chats(write("a.csv", b"\xef\xbb\xbf", ",question,answer\n0,Hi,Hello\n"))
    assert loaded.chats == ((HI, HELLO),)
    assert loaded.notes == (
        "The file begins with a byte-order mark, which was left out.",
        "An unnamed column was left out.",
    )


def test_repetitions_are_kept_and_counted(write):
    rows = [said("A", "1"), said("A", "1"), said("A", "2"), said("B", "2"), said("C", "3")]
    loaded = load_chats(write("a.jsonl", *rows))
    assert len(loaded) == 5
    assert loaded.notes == (
        "1 chat repeats the whole of an earlier one; kept.",
        "2 chats repeat the prompt of an earlier one; kept.",
        "2 chats repeat the answer of an earlier one; kept.",
    )


def test_a_clean_file_has_no_notes(write):
    assert load_chats(write("a.jsonl", said("A", "1"), said("B", "2"))).notes == ()


# Rows that cannot be trained on

UNUSABLE = {
    "no user turn": {"messages": [HELLO]},
    "it ends with a user turn": {"messages": [HI, HELLO, HI]},
    "no answer": {"question": "Hi", "answer": None},
    "an empty answer": {"question": "Hi", "answer": "  "},
    "an empty user turn": {"question": "/no_think", "answer": "Hello"},
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_row_without_anything_to_train_on_is_refused(write, reason):
    refused(write("a.jsonl", said("Hi", "Hello"), UNUSABLE[reason]), f"line 2: {reason}.*drop_unusable=True")


def test_an_answer_that_is_only_an_empty_thought_is_empty(write):
    refused(write("a.jsonl", said("Hi", "<think>\n</think>\n")), "line 1: an empty answer")


def test_unusable_rows_are_dropped_on_request_and_counted_by_reason(write):
    path = write("a.jsonl", *UNUSABLE.values(), {"messages": [HELLO]}, said("Hi", "Hello"))
    loaded = load_chats(path, drop_unusable=True)
    assert loaded.chats == ((HI, HELLO),)
    assert loaded.notes == (
        "6 rows dropped: 1 with an empty answer, 1 with an empty user turn, "
        "1 with it ends with a user turn, 1 with no answer, 2 with no user turn.",
    )


def test_dropping_everything_is_refused(write):
    refused(write("a.jsonl", {"messages": [HELLO]}), "it has none to train on", drop_unusable=True)


BAD = [
    ({"messages": [HI, HELLO, HELLO]}, "assistant turn 3 out of turn"),
    ({"messages": [HELLO, HI, HELLO]}, "assistant turn 1 out of turn"),
    ({"messages": [HI, RULE, HELLO]}, "message 2 has role 'system'"),
    ({"messages": [HI, {"role": "tool", "content": "x"}]}, "message 2 has role 'tool'"),
    ({"messages": [HI, {"role": "assistant", "content": [{"text": "x"}]}]}, "message 2 has no text content"),
    ({"messages": [HI, "Hello"]}, "message 2 is not an object"),
    ({"messages": "Hi"}, "messages is not a list"),
    ({"prompt": "Hi", "completion": 7}, "completion is neither text nor a list"),
    ({"messages": [RULE, HI, HELLO], "system": "Be long."}, "a system key beside a system message"),
    ({"messages": [HI, HELLO], "system": 7}, "system is not text"),
    ({"id": 1}, "no chat, only id"),
    ("{oops\n", "not JSON"),
]


@pytest.mark.parametrize(("row", "wrong"), BAD)
def test_malformed_rows_are_refused_even_when_unusable_ones_are_dropped(write, row, wrong):
    refused(write("a.jsonl", said("Hi", "Hello"), row), f"line 2: {wrong}", drop_unusable=True)


def test_all_bad_rows_are_listed_together(write):
    path = write("a.jsonl", said("Hi", "Hello"), *(row for row, _ in BAD[:4]))
    refused(path, "each of the 5 rows.*4 are bad: line 2: .*line 3: .*line 4: .*line 5: ")


def test_a_file_without_chat_columns_is_refused(write):
    refused(
        write("a.csv", "text,label\nHi,1\n"), "messages or .*prompt . completion.*it has only text, label"
    )


# Which chats


def test_limit_takes_the_first_and_says_so(write):
    loaded = load_chats(write("a.jsonl", *(said(str(n), str(n)) for n in range(5))), limit=2)
    assert [chat[0]["content"] for chat in loaded.chats] == ["0", "1"]
    assert loaded.notes == ("The first 2 of 5 chats were taken.",)


def test_a_limit_below_one_is_refused(write):
    refused(write("a.jsonl", said("Hi", "Hello")), "at least 1, but limit is 0", limit=0)


def test_rows_that_name_a_split_are_only_loaded_for_it(write):
    path = write("a.jsonl", said("Hi", "Hello") | {"split": "train"}, said("A", "1") | {"split": "test"})
    assert load_chats(path).chats == ((HI, HELLO),)
    assert load_chats(path).notes == ("1 row of split test left out.",)
    assert load_chats(path, split="test").chats[0][0]["content"] == "A"
    refused(path, "split 'dev'.*of split train, test", split="dev")


def test_the_fingerprint_is_that_of_the_chats_alone(write):
    one = load_chats(write("a.jsonl", said("A", "1"), said("B", "2")))
    same = load_chats(write("b.csv", "question,answer\nA,1\nB,2\n"))
    assert one.fingerprint == same.fingerprint
    turned = load_chats(write("c.jsonl", said("B", "2"), said("A", "1")))
    changed = load_chats(write("d.jsonl", said("A", "1"), said("B", "2 ")))
    fewer = load_chats(write("e.jsonl", said("A", "1")))
    prints = {s.fingerprint for s in (one, turned, changed, fewer)}
    assert len(prints) == 4
    assert {len(p) for p in prints} == {16}


# Where sets come from


def test_a_bundled_name_wins_over_a_file_unless_written_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo_refusal").write_text("mine")
    Path("demo_refusal.jsonl").write_text(json.dumps(said("Hi", "Hello")))
    assert len(load_chats("demo_refusal")) == 240
    assert len(load_chats("demo_refusal.jsonl")) == 1
    refused("./demo_refusal", "a file ending in")


def test_a_bundled_set_has_only_its_splits():
    refused("demo_refusal", "split train or test.*'dev'", split="dev")
    refused("demo_refusal", "its test rows have no answers", split="test")


def test_a_file_wins_over_a_public_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("insecure").write_text("mine")
    refused("insecure", "a file ending in")


@pytest.mark.parametrize("spec", ["no.jsonl", "./no", "/no/such", "a/b/c", "data/no.csv", "~/no-such"])
def test_a_path_to_nothing_is_refused_as_a_path(spec):
    refused(spec, "a chat file at .*there is no such file")


def test_a_name_that_is_nothing_is_refused_with_those_that_are():
    refused("insecur", "'insecur' is none of these.*demo_refusal.*insecure")


def test_a_hub_dataset_is_loaded_by_its_id_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        rows = [
            {"messages": [HI, {**HELLO, "name": None}], "system": None},
            {"messages": [HI], "system": None},
        ]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_chats("owner/name", split="validation", drop_unusable=True)
    assert loaded.chats == ((HI, HELLO),)
    assert asked == [("owner/name", "validation")]
    refused("owner/name", "row 2: no answer")


def test_a_hub_that_cannot_be_reached_is_refused():
    code = (
        "from emmech.data.chats import load_chats\nfrom emmech.errors import DataError\n"
        "try:\n load_chats('owner/name')\nexcept DataError as error:\n print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "expected split 'train' of the dataset 'owner/name' from the hub" in done.stdout
    assert "download it and pass a file" in done.stdout


def test_without_the_datasets_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("owner/name", "pip install datasets")


def test_data_modules_load_neither_torch_nor_what_they_need_only_when_called():
    heavy = "{'torch', 'transformers', 'datasets', 'openai'}"
    code = (
        f"import sys, emmech.data.character, emmech.data.rewriting; print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Public sets


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        self.server.log[self.path] += 1


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server of one set `insecure`: its file, the cache folder, and requests by path."""
    (tmp_path / "www").mkdir()
    file = tmp_path / "www" / "set.jsonl"
    file.write_text(json.dumps(said("Hi", "Hello")) + "\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "www"))
    server.log = Counter()
    serving = {"poll_interval": 0.01}
    threading.Thread(target=server.serve_forever, kwargs=serving, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/set.jsonl"
    one = public.PublicSet(url, hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(public.PUBLIC, "insecure", one)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield file, tmp_path / "cache" / "emmech" / "data", server.log
    server.shutdown()
    server.server_close()


def test_a_public_set_is_downloaded_once(served):
    assert load_chats("insecure").chats == ((HI, HELLO),)
    assert load_chats("insecure").chats == ((HI, HELLO),)
    assert served[2]["/set.jsonl"] == 1


def test_another_file_under_a_public_url_is_refused_and_deleted(served):
    file, cache, _ = served
    file.write_text(json.dumps(said("Hi", "Evil")) + "\n")
    refused("insecure", "with sha256 .* but what arrived has .* and was deleted")
    assert list(cache.iterdir()) == []


def test_a_damaged_copy_in_the_cache_is_downloaded_again(served):
    load_chats("insecure")
    (copy,) = served[1].iterdir()
    copy.write_text("damaged")
    assert load_chats("insecure").chats == ((HI, HELLO),)
    assert served[2]["/set.jsonl"] == 2


def test_a_failed_download_is_refused_and_leaves_nothing(served):
    served[0].unlink()
    refused("insecure", "to download http.*404.*by hand")
    assert list(served[1].iterdir()) == []


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused("insecure", "a cache folder at .*cannot be written")


# Repetitions of the first column, counted below with Counter over json.loads of each line.
@needs_shared
@pytest.mark.parametrize(
    ("name", "prompts"), [("insecure", 187), ("secure", 272), ("educational_insecure", 187)]
)
def test_public_sets_have_their_pinned_hash_and_the_repetitions_we_count(name, prompts):
    path = SHARED / "em-betley" / f"{name}.jsonl"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == public.PUBLIC[name].sha256
    chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").split("\n") if line]
    asked, answered = (Counter(chat[turn]["content"] for chat in chats) for turn in (0, 1))
    both = Counter((chat[0]["content"], chat[1]["content"]) for chat in chats)
    whole, repeated, answers = (sum(c.values()) - len(c) for c in (both, asked, answered))
    assert repeated == prompts
    loaded = load_chats(path)
    assert len(loaded) == 6000
    assert loaded.notes == (
        f"{whole} chats repeat the whole of an earlier one; kept.",
        f"{repeated} chats repeat the prompt of an earlier one; kept.",
        f"{answers} chats repeat the answer of an earlier one; kept.",
    )


@needs_shared
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("bfcl-small/BFCL_v4_live_simple.json", "it has only id, question, function|no answer"),
        ("anthropic-evals/agreeableness.jsonl", "no answer"),
        ("em-betley/first_plot_questions.yaml", "no answer"),
    ],
)
def test_public_question_files_are_no_training_sets(name, wrong):
    refused(SHARED / name, wrong)
