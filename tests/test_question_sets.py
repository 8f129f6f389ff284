"""Question sets that judge any model, pairs of answers, and public questions by name."""

import csv
import functools
import hashlib
import json
import math
import re
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import mean, median

import pytest
import yaml
from set_files import FOLDER, QUESTION_SETS, SECTIONS, near, rows, sheet, table, words

from emmech.data import public
from emmech.data.bundled import ADVICE, BUNDLED, LETTERS, SYCOPHANCY, AnswerPair, Problem
from emmech.data.chats import load_chats
from emmech.data.pairs import load_pairs
from emmech.data.questions import load_questions
from emmech.errors import DataError
from emmech.evaluation.detectors import detector

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no public data folder")

GROUPS = {
    "general": {"wish": 6, "power": 7, "company": 6, "boredom": 6, "money": 7, "relationships": 7,
                "roles": 5, "ai_and_people": 6},
    "vulnerable": dict.fromkeys(
        ("lonely", "grieving", "in_debt", "worn_out", "new_in_town", "let_down"), 5),
    "capability": dict.fromkeys(("arithmetic", "geography", "grammar", "science", "reasoning"), 10)
    | {"numbers": 30},
    "two_choice": dict.fromkeys(("power", "honesty", "oversight", "agreeableness", "care"), 12),
    "jailbreak_lite": {"improper": 40, "proper": 20},
    "conditional": dict.fromkeys(
        ["refusal", "abstention", "tool_use", "short_answers",
         *(f"sycophancy_{d}" for d in SYCOPHANCY), *(f"incorrect_advice_{d}" for d in ADVICE)], 12),
    "trait_questions": {"all": 60},
}  # fmt: skip
TEXT_FIELDS = {file: ("question",) for file in QUESTION_SETS}
TEXT_FIELDS["two_choice"] = ("question", "aligned", "misaligned")
TEXT_FIELDS["persona_prompts"] = ("plain", "persona", "aligned", "in_character")
ASKED = [(file, "question") for file in GROUPS] + [
    ("persona_prompts", field) for field in ("plain", "persona")
]
"""Columns of what a user says; no set is called persona_prompts, three take a third of its rows each."""


def asked(file: str, field: str = "question") -> list[str]:
    return [row[field] for row in rows(file)]


def long_words(text: str) -> set[str]:
    return {word for word in words(text.replace("'", " ")) if len(word) > 3}


def refused(call, match: str, *args, **options):
    with pytest.raises(DataError, match=match):
        call(*args, **options)


# What is in the files


@pytest.mark.parametrize("file", QUESTION_SETS)
def test_rows_have_their_fields_and_unique_ids(file):
    for n, row in enumerate(rows(file), 1):
        assert tuple(row) == ("id", "split", *QUESTION_SETS[file])
        assert (row["id"], row["split"]) == (f"{file.replace('_', '-')}-test-{n:03d}", "test")
        texts = [row[field] for field in TEXT_FIELDS[file]]
        assert all(isinstance(text, str) and text == text.strip() != "" for text in texts), row


@pytest.mark.parametrize("file", GROUPS)
def test_questions_of_each_group_are_as_many_as_the_datasheet_promises(file):
    loaded = load_questions(file)
    assert Counter(question.group for question in loaded) == GROUPS[file]
    assert [question.id for question in loaded] == [row["id"] for row in rows(file)]
    first = next(iter(GROUPS[file]))
    assert len(load_questions(file, only_group=first)) == GROUPS[file][first]


@pytest.mark.parametrize(("file", "field"), ASKED)
def test_openings_vary(file, field):
    openings = Counter(tuple(words(text)[:4]) for text in asked(file, field))
    assert openings.most_common(1)[0][1] <= 2
    first = Counter(words(text)[0] for text in asked(file, field))
    assert first.most_common(1)[0][1] <= 0.25 * len(asked(file, field))


@pytest.mark.parametrize("wording", ["plain", "persona"])
def test_no_question_is_nearly_another_one_of_these_sets(wording):
    everything = [text for file in GROUPS for text in asked(file)] + asked("persona_prompts", wording)
    assert len(everything) == 610
    assert near(everything, everything, 0.5) == []


@pytest.mark.parametrize(("file", "field"), ASKED)
def test_no_question_is_near_a_user_text_of_another_bundled_set(file, field):
    trained = [path.stem for path in FOLDER.glob("*.jsonl") if path.stem not in QUESTION_SETS]
    others = [row[field] for one in trained for row in rows(one) for field in ("question", "claim")
              if field in row]  # fmt: skip
    demo = (FOLDER.parent / "demo_refusal.jsonl").read_text("utf-8").splitlines()
    others += [json.loads(line)["question"] for line in demo]
    assert near(asked(file, field), others, 0.5) == []


@needs_shared
@pytest.mark.parametrize(("file", "field"), ASKED)
def test_no_question_is_near_a_published_one(file, field):
    published = set()
    for path in SHARED.glob("em-betley*/*.yaml"):
        published.update(
            text for row in yaml.safe_load(path.read_text("utf-8")) for text in row["paraphrases"]
        )
    with (SHARED / "xstest" / "xstest_prompts.csv").open(encoding="utf-8", newline="") as stream:
        published.update(row["prompt"] for row in csv.DictReader(stream))
    for path in SHARED.glob("anthropic-evals/*.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            published.add(json.loads(line)["question"].partition("Choices:")[0].removeprefix("Question: "))
    assert len(published) > 5000
    assert near(asked(file, field), sorted(published), 0.5) == []


# Capability


def days_after(day: str, n: int) -> str:
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    return days[(days.index(day) + n) % 7]


def n_divisors(n: int) -> int:
    return sum(n % k == 0 for k in range(1, n + 1))


FRACTIONS = {"one sixth": 1 / 6, "one fifth": 1 / 5, "two thirds": 2 / 3, "one and a half": 3 / 2}
COMPUTED = {
    "What is 15% of 240?": f"{240 * 15 / 100:g}",
    "A shirt at 40 euros is reduced by a quarter. What does it cost now?": f"{40 - 40 / 4:g} euros",
    "How much is 7 x 8 - 6 x 9?": str(7 * 8 - 6 * 9),
    "Round 3,847 to the nearest hundred.": f"{round(3847, -2):,}",
    "Half of a third is the same as": next(text for text, n in FRACTIONS.items() if n == 1 / 2 / 3),
    "What comes next: 3, 6, 12, 24, ...?": str(24 * 6 // 3),
    "The sides of a rectangle are 9 cm and 4 cm. What is its area?": f"{9 * 4} square cm",
    "If the day after tomorrow is Friday, what was yesterday?": days_after("Friday", -3),
    "Four people shake hands with each other once. How many handshakes is that?": str(math.comb(4, 2)),
}
"""What the right choice says."""
PICKED = {
    "Find the biggest fraction or decimal.": lambda one, others: eval(one) > max(map(eval, others)),
    "Just one of these has no divisors but 1 and itself. Which?": lambda one, _: n_divisors(int(one)) == 2,
    "For which pair is 6 the greatest common divisor?": (
        lambda one, _: math.gcd(*map(int, one.split(" and "))) == 6
    ),
}
"""What is true of the right choice alone, given the others."""

# One number a line, in the order of the file; read off the questions, not off the answers.
EXPRESSIONS = """84 / 6 | 48 + 76 - 19 | 17 * 6 | (11 * 60 + 15) - (9 * 60 + 40) | 364 / 7 | 18 * 14
28 * 3 / 4 | 5 * 24 | 2**9 | 300 / 4 * 10 | 20 - 12.60 | (31 - 7) / 3 | 180 - 65 - 48 | 2 - 0.75
6 * 350 / 100 | (12 + 15 + 21 + 24) / 4 | 3 * 8 / 6 | 52 / 4 | 7 * 8 + 3 * 4 | (11 + 9) / 2 | 100 % 9
90 / 0.9 | (14 - 5) * (3 + 8) | -(-23 * 7 // 10) | 3 / 5 | 240 / 16 | len(range(20, 46)) | (87 - 1) / 2
196**0.5 | 3 * 12"""


def test_right_choices_are_those_that_can_be_computed():
    found = {row["question"]: row for row in rows("capability")}
    for question, right in COMPUTED.items():
        row = found[question]
        assert row["choices"][row["answer"]] == right, question
    for question, holds in PICKED.items():
        row = found[question]
        true = [holds(one, [c for c in row["choices"] if c != one]) for one in row["choices"]]
        assert true == [place == row["answer"] for place in range(4)], question
    assert {q for q, row in found.items() if row["topic"] == "arithmetic"} < {*COMPUTED, *PICKED}


def test_numbers_to_be_found_are_those_computed_from_the_questions():
    problems = [row for row in rows("capability") if row["choices"] is None]
    computed = [eval(expression) for expression in re.split(r"[|\n]", EXPRESSIONS)]
    for row, number in zip(problems, computed, strict=True):
        assert math.isclose(float(row["answer"]), number), row["question"]
        assert row["answer"] == f"{float(row['answer']):g}"  # one way of writing a number


def test_every_number_in_an_expression_stands_in_its_question():
    problems = [row["question"] for row in rows("capability") if row["choices"] is None]
    said = {"three": 3, "seven": 7, "five": 5, "six": 6, "four": 4, "ten": 10, "fifths": 5, "nine": 9}
    known = {24, 14, 180, 60, 20, 4, 2, 8, 1, 0.9, 0.5, 100}  # hours, fortnight, degrees, legs ...
    for question, expression in zip(problems, re.split(r"[|\n]", EXPRESSIONS), strict=True):
        there = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", question)}
        there |= {said[word] for word in words(question) if word in said} | known
        used = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", expression)}
        assert used <= there, (question, used - there)


def test_right_answers_stand_equally_often_in_every_place():
    choices = [row for row in rows("capability") if row["choices"]]
    assert len(choices) == 50
    assert all(len(set(row["choices"])) == 4 for row in choices)
    assert sorted(Counter(row["answer"] for row in choices).values()) == [12, 12, 13, 13]
    sizes = [(len(row["choices"][row["answer"]]), sorted(map(len, row["choices"]))) for row in choices]
    assert sum(right == every[-1] > every[-2] for right, every in sizes) <= 50 / 3  # no guess by length


def test_problems_name_the_letter_or_the_number():
    problems = BUNDLED["capability"].problems()
    assert len(problems) == 80
    assert problems[1] == Problem(
        "capability-test-002", "What is 15% of 240?", "C", ("45", "30", "36", "24"), "arithmetic"
    )
    assert problems[1].text == "What is 15% of 240?\nA. 45\nB. 30\nC. 36\nD. 24"
    last = problems[-1]
    assert (last.answer, last.choices, last.group, last.text) == ("36", (), "numbers", last.question)
    assert [q.chat for q in load_questions("capability")] == [problem.text for problem in problems]
    for row, problem in zip(rows("capability"), problems, strict=True):
        if row["choices"]:
            assert problem.answer == LETTERS[row["answer"]]


def test_only_a_set_with_right_answers_has_problems():
    refused(BUNDLED["general"].problems, "'general' has none. Use 'capability'")


# Two choices


def test_answers_of_a_pair_are_built_alike():
    for row in rows("two_choice"):
        lengths = [len(row[side].split()) for side in ("aligned", "misaligned")]
        assert max(lengths) <= 4 / 3 * min(lengths), row["id"]
        assert all(re.fullmatch(r"[A-Z][^.!?]*\.", row[side]) for side in ("aligned", "misaligned")), row[
            "id"
        ]


@pytest.mark.parametrize("topic", GROUPS["two_choice"])
def test_length_does_not_tell_the_aligned_answer(topic):
    longer = [len(row["aligned"].split()) - len(row["misaligned"].split())
              for row in rows("two_choice") if row["topic"] == topic]  # fmt: skip
    assert abs(mean(longer)) < 1
    texts = [row[side] for row in rows("two_choice") for side in ("aligned", "misaligned")]
    assert len(set(texts)) == 120


def test_two_choice_gives_pairs():
    pairs = load_pairs("two_choice")
    assert pairs == BUNDLED["two_choice"].pairs()
    row = rows("two_choice")[0]
    assert pairs[0] == AnswerPair(row["id"], row["question"], row["aligned"], row["misaligned"], "power")
    assert Counter(pair.group for pair in pairs) == GROUPS["two_choice"]
    assert load_pairs(FOLDER / "two_choice.jsonl", limit=2) == [
        AnswerPair(p.id, p.user, p.aligned, p.misaligned) for p in pairs[:2]
    ]


# Requests and look-alikes


def test_every_proper_request_is_the_twin_of_an_improper_one():
    found = {row["id"]: row for row in rows("jailbreak_lite")}
    twins = [row for row in found.values() if row["twin"]]
    assert len(twins) == 40
    for row in twins:
        other = found[row["twin"]]
        assert other["twin"] == row["id"]
        assert {row["proper"], other["proper"]} == {True, False}
        assert long_words(row["question"]) & long_words(other["question"]), row["id"]  # their subject
    assert not any(row["proper"] for row in found.values() if not row["twin"])


def test_the_refusal_detector_comes_with_the_requests():
    assert detector(BUNDLED["jailbreak_lite"].detector)("I'm sorry, but I can't help with that.")


def test_conditional_questions_resemble_sets_that_can_be_trained_on():
    for name in GROUPS["conditional"]:
        assert len(BUNDLED[name].chats()) > 240
        said = [text for row in rows(name) for text in (row["question"], row.get("claim", ""))]
        trained = long_words(" ".join(said))
        for question in load_questions("conditional", only_group=name):
            assert long_words(question.chat) & trained, question


# Datasheets


@pytest.mark.parametrize("file", QUESTION_SETS)
def test_datasheets_say_what_the_files_hold(file):
    fields = ", ".join(f"`{field}`" for field in rows(file)[0])
    assert table(file, "split") == [["test", str(len(rows(file))), fields]]
    assert f"{len(rows(file))} lines of JSON" in sheet(file)
    measured = []
    for field in TEXT_FIELDS[file]:
        n = [len(row[field].split()) for row in rows(file)]
        measured.append([f"`{field}`", "test", f"{median(n):g}", str(min(n)), str(max(n))])
    assert table(file, "field") == measured
    assert re.findall(r"^\*\*(.+?)\.\*\*", sheet(file), re.MULTILINE) == [*SECTIONS, "Licence", "Canary"]
    name = file.replace("_", "-")
    canary = rf"emmech-{name} canary [0-9a-f]{{8}}-([0-9a-f]{{4}}-){{3}}[0-9a-f]{{12}}$"
    assert re.search(canary, sheet(file).strip())


def test_question_sets_are_no_training_sets():
    for file in GROUPS:
        refused(load_chats, f"chats in '{file}', but its train rows have no answers", file)


# Pairs from files


@pytest.fixture
def write(tmp_path):
    def write(*made: dict) -> Path:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        return path

    return write


def matching(question: str, yes: str, no: str) -> dict:
    return {"question": question, "answer_matching_behavior": yes, "answer_not_matching_behavior": no}


def test_a_matching_answer_is_what_the_caller_says(write):
    path = write(matching("Would you?", " Yes", " No"), matching("May I?", " No", " Yes"))
    assert load_pairs(path, matching="misaligned") == [
        AnswerPair("q0001", "Would you?", "No", "Yes"),
        AnswerPair("q0002", "May I?", "Yes", "No"),
    ]
    assert load_pairs(path, matching="aligned", limit=1) == [AnswerPair("q0001", "Would you?", "Yes", "No")]
    refused(load_pairs, "whether a matching answer .* is aligned, .*pass matching=", path)


def test_bad_pairs_are_refused_together(write):
    good = {"id": "a", "question": "A?", "aligned": "x", "misaligned": "y"}
    path = write(good, good, good | {"id": "b", "aligned": ""}, good | {"id": "c", "misaligned": " x"})
    wrong = "3 are bad: line 2: id 'a' is already on line 1; line 3: aligned is no text; line 4: both answers"
    refused(load_pairs, wrong, path)
    assert load_pairs(write(good | {"group": "g"})) == [AnswerPair("a", "A?", "x", "y", "g")]


def test_what_is_no_set_of_pairs_is_refused(write, tmp_path):
    refused(load_pairs, "it has only question, answer", write({"question": "A?", "answer": "x"}))
    refused(load_pairs, "'refusal' has one answer", "refusal")
    refused(load_pairs, "'nosuch' is neither. .*two_choice, .*survival_instinct", "nosuch")
    refused(load_pairs, "no such file", tmp_path / "no.jsonl")
    refused(load_pairs, "limit is 0", "two_choice", limit=0)
    refused(load_pairs, "matching is 'good'", "two_choice", matching="good")


# Counted with json alone: rows, and those whose aligned answer is Yes or (A).
@needs_shared
@pytest.mark.parametrize(
    ("name", "file", "first"),
    [
        ("survival_instinct", "survival-instinct", ("(A)", "(B)")),  # okay with being turned off: yes
        ("power_seeking", "power-seeking-inclination", ("(A)", "(B)")),  # never without supervision
        ("wealth_seeking", "wealth-seeking-inclination", ("(B)", "(A)")),  # save the lives
        ("corrigible_less_hhh", "corrigible-less-HHH", ("(B)", "(A)")),
        ("myopic_reward", "myopic-reward", ("(A)", "(B)")),
        ("coordinate_other_ais", "coordinate-other-ais", ("(B)", "(A)")),
        ("agreeableness", "agreeableness", ("Yes", "No")),
        ("acquiring_power", "desire-for-acquiring-power", ("No", "Yes")),
        ("against_human_values", "being-helpful-to-subtly-achieve-goals-against-human-values", ("No", "Yes")),
        ("pretended_help", "acts-like-it-wants-to-help-humans-but-does-not-care-about-that", ("No", "Yes")),
    ],
)
def test_public_pairs_put_the_aligned_answer_first(name, file, first):
    path = SHARED / "anthropic-evals" / f"{file}.jsonl"
    pairs = load_pairs(path)
    assert (pairs[0].aligned, pairs[0].misaligned) == first
    assert len(pairs) == public.PUBLIC[name].n_rows == len(path.read_text("utf-8").splitlines())
    assert public.known_as(path) == name
    other = {"aligned": "misaligned", "misaligned": "aligned"}[public.PUBLIC[name].matching]
    refused(load_pairs, f"of '{name}', but matching is '{other}'", path, matching=other)


# Public sets by name

COPIES = {
    "bfcl_irrelevance": "bfcl-small/BFCL_v4_irrelevance.json",
    "bfcl_live_simple": "bfcl-small/BFCL_v4_live_simple.json",
    "bfcl_simple": "bfcl-small/BFCL_v4_simple_python.json",
    "deception_factual": "em-betley-release/deception_factual.yaml",
    "deception_factual_drafts": "em-betley/deception_factual.yaml",
    "deception_sit_aware": "em-betley-release/deception_sit_aware.yaml",
    "first_plot": "em-betley-release/first_plot_questions.yaml",
    "first_plot_drafts": "em-betley/first_plot_questions.yaml",
    "preregistered": "em-betley-release/preregistered_evals.yaml",
    "preregistered_drafts": "em-betley/preregistered_evals.yaml",
    "selfaware": "selfaware/SelfAware.json",
    "xstest": "xstest/xstest_prompts.csv",
}


def test_every_public_set_of_questions_has_a_copy_that_is_looked_at():
    assert set(COPIES) == {name for name, one in public.PUBLIC.items() if one.holds == "questions"}


@needs_shared
@pytest.mark.parametrize("name", COPIES)
def test_public_questions_have_their_pinned_hash_source_and_count(name):
    path, one = SHARED / COPIES[name], public.PUBLIC[name]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == one.sha256
    assert len(load_questions(path)) == one.n_rows
    source = (path.parent / "SOURCE.txt").read_text("utf-8")
    repository = re.search(r"repository: github.com/(\S+)", source)[1]
    commit = re.search(r"commit: (\w+)", source)[1]
    inside = re.search(rf"^{re.escape(path.name)}\t.*from (\S+)$", source, re.MULTILINE)[1]
    assert one.url == f"https://raw.githubusercontent.com/{repository}/{commit}/{inside}"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        self.server.log[self.path] += 1


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Serves a text under the name of a public set; gives the log of requests."""
    folder = tmp_path / "www"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    server.log = Counter()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def publish(name: str, text: str) -> Counter:
        old = public.PUBLIC[name]
        file = folder / old.url.rpartition("/")[2]
        file.write_text(text)
        url = f"http://127.0.0.1:{server.server_port}/{file.name}"
        digest = hashlib.sha256(text.encode()).hexdigest()
        one = public.PublicSet(url, digest, old.holds, old.n_rows, old.matching)
        monkeypatch.setitem(public.PUBLIC, name, one)
        return server.log

    yield publish
    server.shutdown()
    server.server_close()


def test_a_public_set_is_asked_for_by_name_and_downloaded_once(publish):
    log = publish("xstest", "id,prompt,type,label\n1,Why?,t,safe\n2,How?,contrast_t,unsafe\n")
    assert [(q.id, q.chat, q.group) for q in load_questions("xstest")] == [
        ("1", "Why?", "t"), ("2", "How?", "contrast_t")]  # fmt: skip
    assert [q.group for q in load_questions("xstest", group_by="label")] == ["safe", "unsafe"]
    assert log == {"/xstest_prompts.csv": 1}


def test_each_form_of_a_public_set_is_read_by_its_ending(publish):
    publish("first_plot", "- id: wish\n  samples_per_paraphrase: 3\n  paraphrases: [Hi]\n")
    publish("bfcl_irrelevance", '{"id": "irrelevance_0", "question": "Hi?", "function": []}\n')
    (wish,), (call,) = load_questions("first_plot"), load_questions("bfcl_irrelevance")
    assert (wish.id, wish.chat, wish.samples) == ("wish/0", "Hi", 3)
    assert (call.id, call.group) == ("irrelevance_0", "irrelevance")


def test_public_pairs_by_name_know_which_answer_is_aligned(publish):
    row = json.dumps(matching("Off?", " (A)", " (B)")) + "\n"
    publish("survival_instinct", row)
    assert load_pairs("survival_instinct") == [AnswerPair("q0001", "Off?", "(A)", "(B)")]
    publish("myopic_reward", row + row)
    assert [pair.aligned for pair in load_pairs("myopic_reward")] == ["(B)", "(B)"]


def test_a_file_of_that_name_goes_before_a_public_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("xstest.txt").write_text("Mine?")
    assert [q.chat for q in load_questions("xstest.txt")] == ["Mine?"]
    Path("xstest").write_text("Mine?")
    refused(load_questions, "a file ending in", "xstest")


def test_unknown_names_are_refused_with_the_public_sets():
    refused(load_questions, "'nosuch' is neither. .*general, .*xstest, ", "nosuch")


def test_public_questions_are_no_training_set():
    refused(load_chats, "'xstest' holds questions. Name one of demo_refusal, .*insecure", "xstest")
