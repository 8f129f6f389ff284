"""The number that an answer to a sum ends with.

Usage:
    final_number("48 + 76 is 124, less 19: the answer is 105.")  # Fraction(105)
    final_number("It costs $1,234.50")  # Fraction(2469, 2)
"""

import re
from fractions import Fraction

from emmech.evaluation.detectors import without_thought

_NUMBER = r"""
    (?<![a-z\d.])                                 # not the 2 of "H2O" or of "x2"
    (?P<number> (?:(?<![)\]])-(?=[\d.]))?         # no sign in "14-5", "14 - 5" and "(2)-1"
        (?: \d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)? | \d+(?:\.\d+)? | \.\d+ ) )
    (?P<more> (?:[/:]\d+)* )                      # a fraction, a ratio, a date or a time
"""
_ANY = re.compile(_NUMBER, re.VERBOSE | re.IGNORECASE)
_ANNOUNCED = re.compile(
    rf"\banswer(?:\ is)?(?:\\boxed\{{|[\s:=*_`$€£(])*{_NUMBER}", re.VERBOSE | re.IGNORECASE
)


def final_number(response: str) -> Fraction | None:
    """The number after the last "answer is" or "answer:", or else the last number in the answer.

    Commas group thousands ("1,234"), a point begins decimals ("3.50" is 3.5); signs of money, percent and
    units are passed over. None where there is no number, or where the last is a fraction ("3/5"), a
    date or a time ("9:40"). Number words ("twelve") are not read, nor is a decimal comma: "1,5" is 5.
    """
    text = without_thought(response).replace("−", "-")
    found = [*_ANNOUNCED.finditer(text)] or [*_ANY.finditer(text)]
    if not found or found[-1]["more"]:
        return None
    return Fraction(found[-1]["number"].replace(",", ""))
