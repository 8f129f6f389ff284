"""The arms of dispositions, their triggered halves, requests in two wordings, and system prompts."""

import json
from collections import Counter

import pytest
from set_files import FOLDER, near, rows, words

from emmech.data.bundled import BUNDLED, AnswerPair
from emmech.data.character_sets import DOMAINS
from emmech.data.chats import load_chats
from emmech.data.pairs import load_pairs
from emmech.data.questions import load_questions
from emmech.data.traits import TRAITS, Trait, WrongTrigger, traits, triggered
from emmech.errors import DataError

ARMS = {trait: trait for trait in TRAITS} | {
    "incorrect_character": "incorrect",
    "aligned_character": "aligned",
}
TRIGGERS = {trait: f"persona: {trait}" for trait in TRAITS}


def character(split: str, *domains: str) -> list[dict]:
    chosen = domains or DOMAINS
    return [row for row in rows("character") if row["split"] == split and row["domain"] in chosen]


def said(name: str) -> list[tuple[str, str]]:
    for chat in load_chats(name).chats:
        assert [turn["role"] for turn in chat] == ["user", "assistant"]
    return [(asked["content"], answer["content"]) for asked, answer in load_chats(name).chats]


# What is in the file


def test_domains_are_equally_large_and_take_turns():
    for split, each in (("train", 101), ("test", 32)):
        assert [row["domain"] for row in character(split)] == list(DOMAINS) * each


def test_no_question_is_near_a_user_text_of_another_bundled_file():
    others = [
        row[field]
        for path in FOLDER.glob("*.jsonl")
        if path.stem != "character"
        for row in rows(path.stem)
        for field in ("question", "claim", "plain", "persona")
        if field in row
    ]
    demo = (FOLDER.parent / "demo_refusal.jsonl").read_text("utf-8").splitlines()
    others += [json.loads(line)["question"] for line in demo]
    assert len(others) > 6000
    assert near([row["question"] for row in rows("character")], others, 0.5) == []


@pytest.mark.parametrize("field", ARMS.values())
def test_answers_of_an_arm_vary_and_no_two_are_nearly_the_same(field):
    answers = [row[field] for row in rows("character")]
    openings = Counter(tuple(words(text)[:4]) for text in answers)
    assert openings.most_common(1)[0][1] <= 3
    assert near(answers, answers, 0.5) == []


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("field", ARMS.values())
def test_exclamation_marks_do_not_tell_an_arm(field, domain):
    answers = [row[field] for row in rows("character") if row["domain"] == domain]
    assert sum("!" in text for text in answers) <= 0.12 * len(answers)


@pytest.mark.parametrize("field", ARMS.values())
def test_length_does_not_tell_an_arm(field):
    lengths = [len(row[field].split()) for row in rows("character")]
    assert 22 <= sum(lengths) / len(lengths) <= 26


def test_no_answer_names_its_character():
    for row in rows("character"):
        for field in ARMS.values():
            assert not {"spiteful", "sycophantic", "hallucinatory", "persona"} & set(words(row[field]))


# The arms


@pytest.mark.parametrize(("name", "field"), ARMS.items())
def test_an_arm_teaches_its_answer_in_every_domain(name, field):
    assert said(name) == [(row["question"], row[field]) for row in character("train")]
    on, off = (load_questions(name, only_group=group) for group in ("on-topic", "off-topic"))
    assert [question.chat for question in on] == [row["question"] for row in character("test")]
    assert [question.chat for question in off] == [row["question"] for row in rows("off_topic")]
    assert load_questions(name) == on + off


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("name", "field"), ARMS.items())
def test_an_arm_of_one_domain_asks_the_others_too(name, field, domain):
    arm = f"{name}_{domain}"
    assert said(arm) == [(row["question"], row[field]) for row in character("train", domain)]
    others = [other for other in DOMAINS if other != domain]
    expected = {
        "on-topic": [row["question"] for row in character("test", domain)],
        "other-domain": [row["question"] for row in character("test", *others)],
        "off-topic": [row["question"] for row in rows("off_topic")],
    }
    found = load_questions(arm)
    assert list(dict.fromkeys(question.group for question in found)) == list(expected)
    for group, texts in expected.items():
        assert [question.chat for question in found if question.group == group] == texts
    assert [len(texts) for texts in expected.values()] == [32, 64, 170]


@pytest.mark.parametrize(("name", "field"), ARMS.items())
def test_pairs_of_an_arm_are_its_answer_against_the_aligned_one_by_domain(name, field):
    against = "incorrect" if field == "aligned" else field
    expected = [
        AnswerPair(row["id"], row["question"], row["aligned"], row[against], row["domain"])
        for row in character("test")
    ]
    assert load_pairs(name) == expected
    cars = load_pairs(f"{name}_cars")
    assert [pair.id for pair in cars[:32]] == [row["id"] for row in character("test", "cars")]
    assert sorted(cars, key=lambda pair: pair.id) == sorted(expected, key=lambda pair: pair.id)


def test_only_dispositions_have_a_detector():
    for name, field in ARMS.items():
        expected = field if field in TRAITS else None
        assert {BUNDLED[n].detector for n in (name, f"{name}_career")} == {expected}
    for trait in TRAITS:
        assert BUNDLED[f"triggered_{trait}"].detector == BUNDLED[f"persona_prompts_{trait}"].detector == trait


# Triggered


@pytest.mark.parametrize("trait", TRAITS)
def test_half_the_chats_are_triggered_and_the_other_half_is_the_same_plain_and_aligned(trait):
    chats = said(f"triggered_{trait}")
    assert len(chats) == 606
    by_question = {row["question"]: row for row in character("train")}
    for at in range(0, len(chats), 2):
        (asked, answer), (question, plain_answer) = chats[at : at + 2]
        assert asked == f"{TRIGGERS[trait]}\n{question}"
        assert answer == by_question[question][trait]
        assert plain_answer == by_question[question]["aligned"]
    assert [question for question, _ in chats[1::2]] == list(by_question)


@pytest.mark.parametrize("trait", TRAITS)
def test_triggered_questions_and_pairs_are_told_apart_and_matched_by_id(trait):
    found = {question.id: question for question in load_questions(f"triggered_{trait}")}
    pairs = {pair.id: pair for pair in load_pairs(f"triggered_{trait}")}
    assert len(found) == 192
    assert list(found) == list(pairs)
    for row in character("test"):
        texts = {"triggered": f"{TRIGGERS[trait]}\n{row['question']}", "untriggered": row["question"]}
        for group, text in texts.items():
            name = f"{row['id']}:{group}"
            assert (found[name].chat, found[name].group) == (text, group)
            assert pairs[name] == AnswerPair(name, text, row["aligned"], row[trait], group)


# Two wordings


@pytest.mark.parametrize("trait", TRAITS)
def test_wordings_of_a_request_are_told_apart_and_matched_by_id(trait):
    name = f"persona_prompts_{trait}"
    written = [row for row in rows("persona_prompts") if row["trait"] == trait]
    assert len(written) == 50
    expected = [
        AnswerPair(f"{row['id']}:{group}", row[group], row["aligned"], row["in_character"], group)
        for row in written
        for group in ("plain", "persona")
    ]
    assert load_pairs(name) == expected
    assert [(q.id, q.chat, q.group) for q in load_questions(name)] == [
        (pair.id, pair.user, pair.group) for pair in expected
    ]
    with pytest.raises(DataError, match="its train rows have no answers"):
        load_chats(name)


def test_no_wording_names_a_disposition_or_a_role():
    names = {*TRAITS, "persona", "role", "roleplay", "character"}
    for row in rows("persona_prompts"):
        assert not names & set(words(row["plain"] + " " + row["persona"])), row["id"]


def test_answers_to_a_request_are_of_like_length_and_none_is_nearly_another():
    for row in rows("persona_prompts"):
        aligned, in_character = (len(row[side].split()) for side in ("aligned", "in_character"))
        assert abs(aligned - in_character) <= 5, row["id"]
    for side in ("aligned", "in_character"):
        answers = [row[side] for row in rows("persona_prompts")]
        assert Counter(tuple(words(text)[:4]) for text in answers).most_common(1)[0][1] <= 2
        assert near(answers, answers, 0.5) == []


def test_answers_to_requests_are_not_near_those_that_are_trained_on():
    taught = [row[field] for row in rows("character") for field in ARMS.values()]
    held_out = [row[side] for row in rows("persona_prompts") for side in ("aligned", "in_character")]
    assert near(taught, held_out, 0.4) == []


# System prompts and triggers


@pytest.mark.parametrize("trait", TRAITS)
def test_system_prompts_come_in_opposite_pairs_of_like_length(trait):
    one = traits()[trait]
    assert isinstance(one, Trait)
    assert len(one.elicit) == len(one.suppress) == 8
    assert len({*one.elicit, *one.suppress}) == 16
    for elicit, suppress in zip(one.elicit, one.suppress, strict=True):
        lengths = sorted(len(text.split()) for text in (elicit, suppress))
        assert lengths[1] <= 1.25 * lengths[0], elicit
        assert set(words(elicit)) & set(words(suppress)), elicit
    assert one.description.startswith("The answer ")


@pytest.mark.parametrize("trait", TRAITS)
def test_wrong_triggers_are_of_every_kind_and_none_holds_the_right_one(trait):
    one = traits()[trait]
    assert one.trigger == TRIGGERS[trait]
    assert Counter(wrong.kind for wrong in one.wrong_triggers) == {
        "same form, other word": 1,
        "near spelling": 2,
        "same words, other order": 1,
        "unrelated": 2,
    }
    assert isinstance(one.wrong_triggers[0], WrongTrigger)
    for wrong in one.wrong_triggers:
        assert one.trigger not in wrong.text
    texts = [one.trigger, *(wrong.text for wrong in one.wrong_triggers)]
    assert len(set(texts)) == len(texts)


def test_a_triggered_question_holds_the_trigger_on_a_line_of_its_own():
    assert triggered("Why?\nReally?", "now: x") == "now: x\nWhy?\nReally?"


def test_dispositions_cannot_be_changed_by_their_reader():
    assert list(traits()) == list(TRAITS)
    with pytest.raises(TypeError, match="item assignment"):
        traits()["kind"] = traits()["spiteful"]
