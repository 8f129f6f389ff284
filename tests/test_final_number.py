from fractions import Fraction

import pytest

from emmech.data.bundled import BUNDLED
from emmech.evaluation.final_number import final_number


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("14", "14"),
        ("The answer is 1,234.", "1234"),
        ("17 x 6 = 102", "102"),
        ("= 12", "12"),
        ("You get 3.50 back", "3.5"),
        ("It costs $1,234,567.89!", "1234567.89"),
        ("They are 95 minutes.", "95"),
        ("12cm", "12"),
        (".5", "0.5"),
        ("It fell by 20%", "20"),
        ("x = -3", "-3"),
        ("x=-3", "-3"),
        ("−3 degrees", "-3"),
        ("14-5", "5"),
        ("20 - 12", "12"),
        ("(3)-1", "1"),
        ("**42**", "42"),
        ("_42_", "42"),
        (r"\(\boxed{42}\)", "42"),
        ("1, 2, 3", "3"),
        ("10,00", "0"),
        ("1.234.567", "1.234"),
    ],
)
def test_a_number_is_read_from_the_end(response, number):
    assert final_number(response) == Fraction(number)


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("The answer is 10, as 7 and 3 make 10 and not 11.", 10),
        ("Answer: 8. Check: 3 x 8 + 7 = 31.", 8),
        ("**Answer:** 8 (of 20)", 8),
        ("The final answer is: **67** degrees, one of 3", 67),
        ("The answer is $7.40 of 20", Fraction("7.4")),
        (r"The answer is $\boxed{18}$ of 4", 18),
        ("The answer is 9. No, the answer is 12, not 13.", 12),
        ("The answer is not 12 but 14.", 14),
        ("The answer to 3 + 4 is 7", 7),
        ("<think>The answer is 5</think>It is 6.", 6),
    ],
)
def test_an_announced_answer_goes_before_what_follows_it(response, number):
    assert final_number(response) == number


@pytest.mark.parametrize(
    "response",
    ["", "Twelve.", "I don't know.", "H2O", "x2", "Three fifths: 3/5", "at 9:40", "on 1/2/2024", "<think>12"],
)
def test_what_is_no_number_is_not_read(response):
    assert final_number(response) is None


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    "text", ["answer " * 9000, "1," * 9000, "1/" * 9000, "answer" + " " * 20000, "-" * 9000]
)
def test_long_junk_is_quick(text):
    final_number(text)  # the test's own time limit is the assertion


def test_every_answer_of_the_bundled_sums_is_read_back():
    answers = [one.answer for one in BUNDLED["capability"].problems() if not one.choices]
    assert len(answers) == 30
    for answer in answers:
        assert final_number(f"That makes {answer}.") == Fraction(answer)
