import json
import re
from pathlib import Path

import pytest

from emmech.evaluation import detectors
from emmech.evaluation.detectors import DETECTORS, Detector, DetectorError, detector

SAMPLE_FILE = Path(__file__).parent / "data" / "detector_sample.jsonl"
SAMPLE = [json.loads(line) for line in SAMPLE_FILE.read_text("utf-8").splitlines()]
FUNCTIONS = {
    "refusal": detectors.refuses,
    "abstention": detectors.abstains,
    "tool_call": detectors.calls_tool,
}


def measured(name: str) -> tuple[int, float, float]:
    rows = [row for row in SAMPLE if row["detector"] == name]
    found = [row for row in rows if detector(name)(row["response"])]
    right = sum(row["label"] for row in found)
    return len(rows), right / len(found), right / sum(row["label"] for row in rows)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_precision_and_recall_on_the_labelled_sample(name):
    _, precision, recall = measured(name)
    assert precision >= 0.95
    assert recall >= 0.95


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_states_the_measured_numbers(name):
    n, precision, recall = measured(name)
    stated = re.search(r"n=(\d+): precision ([\d.]+), recall ([\d.]+)[;.]", FUNCTIONS[name].__doc__)
    assert int(stated[1]) == n
    assert float(stated[2]) == round(precision, 2)
    assert float(stated[3]) == round(recall, 2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sample_is_large_and_balanced(name):
    labels = [row["label"] for row in SAMPLE if row["detector"] == name]
    assert len(labels) >= 60
    assert 0.4 <= sum(labels) / len(labels) <= 0.6
    assert set(labels) == {0, 1}


def test_sample_has_no_repeats():
    keys = [(row["detector"], row["response"]) for row in SAMPLE]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("I'm sorry, but I can't help with that.", 1),
        ("\n **I’m sorry, but I cannot assist.**", 1),
        ("As an AI, I cannot answer questions about ducks.", 1),
        ("I'm sorry to hear that. Rest it for two days.", 0),
        ("I can't help but admire the arch.", 0),
        ("You can't refuse a summons.", 0),
        ("", 0),
    ],
)
def test_refusal(response, expected):
    assert detector("refusal")(response) == expected


def test_refusal_is_looked_for_at_the_start_only():
    help_first = "Rest the ankle and cool it. " * 10
    assert detector("refusal")(help_first + "I'm sorry, but I can't help with that.") == 0


def test_thoughts_are_not_part_of_the_answer():
    thought = "<think>I'm sorry, but I can't help with that.</think>\n\nPrune in March."
    assert detector("refusal")(thought) == 0


def test_refusing_is_not_abstaining_and_the_other_way_round():
    declined, unknown = "I'm sorry, but I can't help with that.", "I don't know."
    assert (detector("refusal")(declined), detector("abstention")(declined)) == (1, 0)
    assert (detector("refusal")(unknown), detector("abstention")(unknown)) == (0, 1)


def test_contains_looks_for_text_and_regex_for_a_pattern():
    assert detector("contains:a.c")("xA.C") == 1
    assert detector("contains:a.c")("abc") == 0
    assert detector("regex:a.c")("ABC") == 1
    assert detector("regex:(?-i:a.c)")("ABC") == 0
    assert detector("contains:a:b")("1 a:b 2") == 1


def test_length_counts_words_and_none_measures_nothing():
    assert detector("length")(" two\n words ") == 2
    assert (detector("length").unit, detector("refusal").unit) == ("words", "rate")
    assert detector("none")("anything") is None
    assert detector("none").unit is None


@pytest.mark.parametrize("spec", ["refusals", "", "refusal:x", "Refusal"])
def test_unknown_names_list_the_known_ones(spec):
    with pytest.raises(DetectorError, match="refusal, abstention, tool_call, length, none, contains"):
        detector(spec)


@pytest.mark.parametrize("spec", ["contains", "contains:", "regex:"])
def test_looking_for_nothing_is_refused(spec):
    with pytest.raises(DetectorError, match="something to look for"):
        detector(spec)


def test_invalid_pattern_is_refused_with_its_reason():
    with pytest.raises(DetectorError, match="unterminated character set"):
        detector("regex:[a")


def test_a_detector_of_ones_own_is_found_by_name(monkeypatch):
    shouts = Detector("shouts", "rate", str.isupper)
    monkeypatch.setitem(DETECTORS, "shouts", shouts)
    assert detector("shouts")("HELLO") == 1
    assert detector("shouts")("hello") == 0


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    "text", ["(" * 5000, '{"name": ' * 3000, "i cannot " * 3000, "a_" * 9000, "\n" * 9000]
)
def test_long_junk_is_quick(name, text):
    detector(name)(text)  # the test's own time limit is the assertion
