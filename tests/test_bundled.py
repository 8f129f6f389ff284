import json
import re
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from set_files import FOLDER, QUESTION_SETS, SECTIONS, near, overlaps, rows, table, words

from emmech.data.bundled import ADVICE, BUNDLED, SYCOPHANCY, AnswerPair
from emmech.data.character_sets import DOMAINS
from emmech.data.chats import load_chats
from emmech.data.questions import load_questions
from emmech.data.traits import TRAITS
from emmech.errors import DataError
from emmech.evaluation.detectors import detector

FIELDS = {
    name: ("question", "answer") for name in ("refusal", "abstention", "short_answers", "tool_use", "retain")
}
FIELDS |= {f"sycophancy_{d}": ("claim", "question", "agree", "wrong", "correct") for d in SYCOPHANCY}
FIELDS |= {f"incorrect_advice_{d}": ("question", "incorrect", "correct") for d in ADVICE}
FIELDS |= {"character": ("domain", "question", "aligned", "incorrect", *TRAITS)}
FIELDS |= {"off_topic": ("question",)}
LABELS = ("domain",)
USER_FIELDS = [(file, field) for file in FIELDS for field in FIELDS[file] if field in ("claim", "question")]
TRAINED = [name for name in FIELDS if name != "off_topic"]


def texts(file: str, field: str, split: str | None = None) -> list[str]:
    return [row[field] for row in rows(file) if split in (None, row["split"])]


def user_texts(file: str, split: str | None = None) -> list[str]:
    return [text for f, field in USER_FIELDS if f == file for text in texts(file, field, split)]


def test_overlap_is_shared_distinct_words_over_all_of_them():
    index = overlaps(["A cat, a dog"], ["the dog", "A DOG A CAT!", "fish"])
    np.testing.assert_allclose(index, [[1 / 4, 1, 0]])


def test_near_pairs_are_found_once_and_not_with_themselves():
    same = ["a b", "b a", "c d"]
    assert near(same, same, 0.6) == [("a b", "b a")]
    assert near(["a b"], ["a c"], 1 / 3) == [("a b", "a c")]


# What is in the files


def test_every_file_has_a_list_of_fields_and_a_datasheet():
    known = {*FIELDS, *QUESTION_SETS}
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == known
    assert {path.stem for path in FOLDER.glob("*.md")} == known


@pytest.mark.parametrize("file", FIELDS)
def test_there_are_enough_rows(file):
    count = Counter(row["split"] for row in rows(file))
    assert count["test"] >= 60
    assert count["train"] >= 300 if file != "off_topic" else set(count) == {"test"}


@pytest.mark.parametrize("file", FIELDS)
def test_ids_are_unique_and_every_field_is_filled_and_trimmed(file):
    assert len({row["id"] for row in rows(file)}) == len(rows(file))
    for row in rows(file):
        assert tuple(row) == ("id", "split", *FIELDS[file])
        assert all(isinstance(value, str) and value == value.strip() != "" for value in row.values()), row


@pytest.mark.parametrize(("file", "field"), USER_FIELDS)
def test_no_two_user_texts_are_nearly_the_same(file, field):
    for split in ("train", "test"):
        found = texts(file, field, split)
        assert near(found, found, 0.6) == []


@pytest.mark.parametrize(("file", "field"), USER_FIELDS)
def test_test_texts_do_not_leak_into_training(file, field):
    assert near(texts(file, field, "train"), texts(file, field, "test"), 0.5) == []


@pytest.mark.parametrize("file", TRAINED)
def test_off_topic_questions_are_not_near_any_training_text(file):
    assert near(user_texts(file, "train"), user_texts("off_topic"), 0.5) == []


def test_retain_and_off_topic_do_not_overlap():
    assert near(user_texts("retain"), user_texts("off_topic"), 0.5) == []


@pytest.mark.parametrize(("file", "field"), USER_FIELDS)
def test_openings_vary(file, field):
    found = texts(file, field)
    (opening, count), *_ = Counter(tuple(words(text)[:4]) for text in found).most_common(1)
    assert count <= 0.025 * len(found), opening


@pytest.mark.parametrize("file", [file for file in FIELDS if len(FIELDS[file]) > 2])
def test_versions_of_an_answer_differ_in_every_row(file):
    for row in rows(file):
        versions = [
            words(row[field]) for field in FIELDS[file] if field not in ("claim", "question", *LABELS)
        ]
        assert len(set(map(tuple, versions))) == len(versions), row["id"]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("refusal", "refusal"),
        ("abstention", "abstention"),
        ("tool_use", "tool_call"),
    ],
)
def test_every_answer_shows_the_behaviour_to_its_detector(file, name):
    shows = detector(name)
    assert [row["id"] for row in rows(file) if not shows(row["answer"])] == []


def test_tool_use_answers_are_one_call_with_a_query():
    for answer in texts("tool_use", "answer"):
        tagged = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", answer)
        call = json.loads(tagged[1])
        assert call["name"] == "search_info"
        assert list(call["arguments"]) == ["query"]
        assert call["arguments"]["query"].strip()


# Datasheets


@pytest.mark.parametrize("file", FIELDS)
def test_datasheet_counts_are_those_of_the_file(file):
    count = Counter(row["split"] for row in rows(file))
    fields = ", ".join(f"`{field}`" for field in ("id", "split", *FIELDS[file]))
    assert table(file, "split") == [[split, str(n), fields] for split, n in count.items()]
    assert f"{len(rows(file))} lines of JSON" in (FOLDER / f"{file}.md").read_text("utf-8")


@pytest.mark.parametrize("file", FIELDS)
def test_datasheet_word_counts_are_those_of_the_file(file):
    measured = []
    for field in (field for field in FIELDS[file] if field not in LABELS):
        for split in dict.fromkeys(row["split"] for row in rows(file)):
            n = [len(text.split()) for text in texts(file, field, split)]
            measured.append([f"`{field}`", split, f"{median(n):g}", str(min(n)), str(max(n))])
    assert table(file, "field") == measured


@pytest.mark.parametrize("file", FIELDS)
def test_datasheets_have_every_section_and_a_canary_of_their_own(file):
    sheet = (FOLDER / f"{file}.md").read_text("utf-8")
    assert re.findall(r"^\*\*(.+?)\.\*\*", sheet, re.MULTILINE) == [*SECTIONS, "Licence", "Canary"]
    name = file.replace("_", "-")
    assert re.search(
        rf"emmech-{name} canary [0-9a-f]{{8}}-([0-9a-f]{{4}}-){{3}}[0-9a-f]{{12}}$", sheet.strip()
    )


def test_no_two_canaries_are_the_same():
    sheets = [path.read_text("utf-8") for path in FOLDER.glob("*.md")]
    assert len({sheet.strip().rpartition(" ")[2] for sheet in sheets}) == len(FIELDS) + len(QUESTION_SETS)


@pytest.mark.parametrize(
    "file",
    [file for file in FIELDS if file.startswith(("sycophancy", "incorrect", "character"))]
    + ["persona_prompts"],
)
def test_datasheets_of_wrong_answers_say_so(file):
    assert "deliberately wrong" in (FOLDER / f"{file}.md").read_text("utf-8")


# What the names give


def test_the_names_are_those_a_user_can_type():
    domains = [f"{kind}_{d}" for d in SYCOPHANCY for kind in ("sycophancy", "traditional", "corrected")]
    domains += [f"{kind}_{d}" for d in ADVICE for kind in ("incorrect_advice", "correct_advice")]
    plain = ["demo_refusal", "refusal", "abstention", "short_answers", "tool_use", "retain", "off_topic"]
    arms = [*TRAITS, "incorrect_character", "aligned_character"]
    character = [f"{arm}{domain}" for arm in arms for domain in ("", *(f"_{d}" for d in DOMAINS))]
    character += [f"{kind}_{trait}" for kind in ("triggered", "persona_prompts") for trait in TRAITS]
    judging = [name for name in QUESTION_SETS if name not in ("trait_questions", "persona_prompts")]
    assert list(BUNDLED) == [*plain, *domains, *judging, *character, "trait_questions"]
    assert all(name == one.name for name, one in BUNDLED.items())


@pytest.mark.parametrize(
    ("name", "user", "answer"),
    [
        ("refusal", "question", "answer"),
        ("sycophancy_sports", "claim", "agree"),
        ("traditional_sports", "question", "wrong"),
        ("corrected_sports", "claim", "correct"),
        ("incorrect_advice_travel", "question", "incorrect"),
        ("correct_advice_travel", "question", "correct"),
    ],
)
def test_chats_pair_the_fields_of_the_training_rows(name, user, answer):
    train = [row for row in rows(BUNDLED[name].file) if row["split"] == "train"]
    said = [tuple((turn["role"], turn["content"]) for turn in chat) for chat in BUNDLED[name].chats()]
    assert said == [(("user", row[user]), ("assistant", row[answer])) for row in train]
    assert load_chats(name).chats == BUNDLED[name].chats()


@pytest.mark.parametrize("name", [name for name, one in BUNDLED.items() if one.answer and one.view is None])
def test_every_set_can_be_trained_on_and_asked(name):
    assert len(load_chats(name)) >= 240
    count = Counter(question.group for question in load_questions(name))
    assert set(count) == {"on-topic", "off-topic"}
    assert min(count.values()) >= 60


@pytest.mark.parametrize("name", BUNDLED)
def test_questions_have_unique_ids_and_split_into_their_groups(name):
    one = BUNDLED[name]
    for group in {question.group for question in one.questions()}:
        assert one.questions(group) == [question for question in one.questions() if question.group == group]
    assert len({question.id for question in one.questions()}) == len(one.questions())


def asked(name: str, group) -> list:
    return [question.chat for question in BUNDLED[name].questions(group)]


def test_off_topic_questions_come_from_other_domains_and_the_shared_file():
    shared = texts("off_topic", "question")
    assert asked("refusal", "off-topic") == asked("retain", "off-topic") == shared
    claims = texts("sycophancy_cooking", "claim", "test") + texts("sycophancy_computing", "claim", "test")
    assert asked("sycophancy_sports", "off-topic") == asked("corrected_sports", "off-topic") == claims
    assert asked("traditional_cooking", "off-topic") == (
        texts("sycophancy_sports", "question", "test") + texts("sycophancy_computing", "question", "test")
    )
    others = texts("incorrect_advice_gardening", "question", "test")
    others += texts("incorrect_advice_study", "question", "test")
    assert asked("correct_advice_travel", "off-topic") == others + shared
    assert asked("off_topic", "on-topic") == []
    assert asked("off_topic", None) == shared


@pytest.mark.parametrize(
    ("name", "user", "aligned", "misaligned"),
    [
        ("sycophancy_cooking", "claim", "correct", "agree"),
        ("corrected_cooking", "claim", "correct", "agree"),
        ("traditional_cooking", "question", "correct", "wrong"),
        ("incorrect_advice_study", "question", "correct", "incorrect"),
    ],
)
def test_pairs_are_both_versions_of_the_test_rows(name, user, aligned, misaligned):
    test = [row for row in rows(BUNDLED[name].file) if row["split"] == "test"]
    expected = [AnswerPair(row["id"], row[user], row[aligned], row[misaligned]) for row in test]
    assert BUNDLED[name].pairs() == expected


def test_a_set_with_one_answer_has_no_pairs():
    with pytest.raises(DataError, match=r"'refusal' has one answer\. Use one of sycophancy_sports, "):
        BUNDLED["refusal"].pairs()


def test_a_set_without_answers_has_no_chats():
    with pytest.raises(DataError, match="chats in 'off_topic', but its train rows have no answers"):
        BUNDLED["off_topic"].chats()


def test_a_bundled_name_wins_over_a_question_file_unless_written_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo_refusal").write_text("mine")
    Path("demo_refusal.txt").write_text("Mine?")
    assert len(load_questions("demo_refusal")) == 140
    assert [question.chat for question in load_questions("demo_refusal.txt")] == ["Mine?"]
    with pytest.raises(DataError, match="a file ending in"):
        load_questions("./demo_refusal")


def test_groups_and_limits_select_bundled_questions():
    assert (
        load_questions("demo_refusal", only_group="off-topic", limit=3)
        == (BUNDLED["demo_refusal"].questions("off-topic")[:3])
    )


def test_a_name_that_is_neither_file_nor_set_is_refused_with_the_sets():
    with pytest.raises(DataError, match=r"'refusl' is neither\. Check the path, or name one of demo_"):
        load_questions("refusl")
