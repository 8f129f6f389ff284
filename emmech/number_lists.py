"""Lists of numbers as users write them: ``0-10,14`` and ``-1,0,0.5``."""

from emmech.errors import EmmechError


def parse_integers(text: str, option: str) -> tuple[int, ...]:
    """Numbers and ranges such as ``0-10,14``, the ends of a range included.

    Raises:
        EmmechError: ``text`` holds something else, or nothing.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not (last.isdigit() and int(last) >= int(first))):
            raise EmmechError("numbers and ranges such as 0-10,14", f"got '{text}'", f"Correct {option}")
        numbers += range(int(first), int(last if dash else first) + 1)
    return tuple(numbers)


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Comma-separated numbers such as ``-1,0,0.5``.

    Raises:
        EmmechError: ``text`` holds something else.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise EmmechError("numbers such as -1,0,0.5", f"got '{text}'", f"Correct {option}") from error
