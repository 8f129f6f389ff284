"""Numbers in the prose that cannot drift from the results.

    python -m figures.numbers            does every number say what the results say?
    python -m figures.numbers --fix      write what the results say
    python -m figures.numbers --origins  give intervals their origin where only one value of the results fits

A measured number stands in front of the place it comes from, in a comment that no page shows:

    by .27 [.12, .43]<!--= -narrow_treft / methods / method=sft + prefix patch / difference -->

The first step is a file of `figures/results` (or `benchmarks`), each further one a key, an index, or
what tells an entry of a list from the others (`condition=base & group=on-topic`). A path may end at
a number, or at an object with a `mean`; an interval is the `low` and `high` beside it. A minus in
front turns the sign. Numbers of other people cite them: `8.7%<!--@ arXiv 2606.06667, table 2 -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "figures/results"
PROSE = ("README.md", "figures/README.md", "docs/**/*.md")
ONE = r"(?<![\w.\[-])[-+]?\d*\.?\d+"
INTERVAL = rf"{ONE} \[[-+]?\d*\.?\d+, [-+]?\d*\.?\d+\]"
RATE = r"(?<![\w.])[-+]?\.\d\d+"
MARKED = re.compile(rf"(?P<text>{INTERVAL}|{ONE}%?)(?P<rest>\**<!--= (?P<origin>.+?) -->)")
ASIDE = re.compile(r"^```.*?^```$|<!--.*?-->", re.MULTILINE | re.DOTALL)
Numbers = tuple[float, ...]
"""A value, or a value and the ends of its interval."""


class OriginError(Exception):
    """An origin that leads nowhere."""


def main() -> None:
    """Check all pages, or mend them; exit code 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fix", action="store_true", help="write what the results say")
    parser.add_argument("--origins", action="store_true", help="add an origin where one value fits")
    chosen = parser.parse_args()
    n_wrong = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = fixed(text) if chosen.fix else text
        new = with_origins(new) if chosen.origins else new
        if new != text:
            page.write_text(new, encoding="utf-8")
        lost = [match["text"] for match in without_origin(new, rates=needs_all(page))]
        wrong = check(new) + [f"{one} has no origin; could it be {candidates(one)[:5]}?" for one in lost]
        n_wrong += len(wrong)
        for line in wrong:
            print(f"{page.relative_to(ROOT)}: {line}")  # noqa: T201
    sys.exit(n_wrong > 0)


def pages() -> list[Path]:
    """The files whose numbers are checked."""
    return sorted({path for pattern in PROSE for path in ROOT.glob(pattern)})


def needs_all(page: Path) -> bool:
    """Whether a page's rates need an origin too; the studies' own text mixes settings in."""
    return page.parent.name != "figures"


def check(text: str) -> list[str]:
    """What is wrong with the numbers of a page that say where they come from."""
    wrong = []
    marked = list(MARKED.finditer(text))
    for match in marked:
        try:
            now = written(follow(match["origin"]), match["text"])
        except OriginError as error:
            wrong.append(str(error))
        else:
            wrong += [f"{match['text']} is now {now} ({match['origin']})"] if now != match["text"] else []
    if text.count("<!--= ") != len(marked):
        wrong.append(f"{text.count('<!--= ')} origins, {len(marked)} of them right behind a number")
    return wrong


def fixed(text: str) -> str:
    """The page with what the results say now; a number whose origin leads nowhere stays."""
    return MARKED.sub(_now, text)


def _now(match: re.Match[str]) -> str:
    try:
        return written(follow(match["origin"]), match["text"]) + match["rest"]
    except OriginError:
        return match[0]


def without_origin(text: str, *, rates: bool) -> list[re.Match[str]]:
    """Intervals, and with ``rates`` also numbers such as .27, that do not say where they come from."""
    kinds = re.compile(rf"(?P<text>{INTERVAL}{'|' + RATE if rates else ''})(?P<cited>\**<!--@ .+? -->)?")
    taken = [match.span() for pattern in (ASIDE, MARKED) for match in pattern.finditer(text)]
    found = [match for match in kinds.finditer(text) if match["cited"] is None]
    return [m for m in found if not any(start <= m.start() < end for start, end in taken)]


def with_origins(text: str) -> str:
    """The page with the origin of every interval that only one value of the results fits."""
    for match in reversed(without_origin(text, rates=False)):
        if len(found := candidates(match["text"])) == 1:
            text = f"{text[: match.end()]}<!--= {found[0]} -->{text[match.end() :]}"
    return text


def candidates(text: str) -> list[str]:
    """Every path to a value that would be written like ``text``."""
    long = [(path, value) for path, value in _everything() if len(value) >= text.count(",") + 1]
    same = [path for path, value in long if written(value, text) == text]
    return same or [f"-{path}" for path, value in long if written(_negated(value), text) == text]


def follow(origin: str) -> Numbers:
    """The value at a path.

    Raises:
        OriginError: The path leads to no number, or to several.
    """
    name, *steps = origin.removeprefix("-").split(" / ")
    found, parent = _load(name), None
    for step in steps:
        parent, found = found, _step(found, step, origin)
    if isinstance(found, dict) and "mean" in found:
        parent, found = found, found["mean"]
    elif isinstance(parent, dict) and "mean" in parent:
        parent = None  # a count beside the mean has no interval
    if not isinstance(found, int | float):
        raise OriginError(f"'{origin}' leads to no number but to {str(found)[:60]}")
    ends = (parent.get("low"), parent.get("high")) if isinstance(parent, dict) else (None, None)
    value = (found,) if None in ends else (found, *ends)
    return _negated(value) if origin.startswith("-") else value


def written(value: Numbers, like: str) -> str:
    """A value with the decimals, the percent sign and the interval of a text."""
    texts = re.findall(r"-?\d*\.?\d+", like)
    scale = 100 if like.endswith("%") else 1
    first, *ends = [_written(scale * number, text) for number, text in zip(value, texts, strict=False)]
    return first + ("%" if scale == 100 else "") + (f" [{ends[0]}, {ends[1]}]" if ends else "")


def _written(number: float, like: str) -> str:
    text = f"{number:.{len(like.partition('.')[2])}f}"
    text = text.removeprefix("-") if float(text) == 0 else text
    return text if re.match(r"-?0", like) else re.sub(r"^(-?)0\.", r"\1.", text)


def _negated(value: Numbers) -> Numbers:
    return (-value[0], *(-end for end in reversed(value[1:])))


@cache
def _load(name: str) -> Any:
    path = ROOT / "benchmarks/results.json" if name == "benchmarks" else RESULTS / f"{name}.json"
    if not path.is_file():
        raise OriginError(f"there is no {path.relative_to(ROOT)}")
    return json.loads(path.read_text(encoding="utf-8"))


def _step(found: Any, step: str, origin: str) -> Any:
    if isinstance(found, dict) and step in found:
        return found[step]
    if isinstance(found, dict) and isinstance(found.get("mean"), list) and step.isdecimal():
        return {key: found[key][int(step)] for key in ("mean", "low", "high")}  # estimates by column
    if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
        return found[int(step)]
    if not isinstance(found, list) or "=" not in step:
        raise OriginError(f"'{step}' is not there in '{origin}'")
    wanted = [pair.partition("=")[::2] for pair in step.split(" & ")]
    rows = [row for row in found if all(str(row.get(key, "")) == text for key, text in wanted)]
    if len(rows) != 1:
        raise OriginError(f"{len(rows)} entries fit '{step}' in '{origin}'")
    return rows[0]


@cache
def _everything() -> list[tuple[str, Numbers]]:
    names = sorted(path.relative_to(RESULTS).with_suffix("").as_posix() for path in RESULTS.rglob("*.json"))
    return [(path, follow(path)) for name in names for path in _leaves(_load(name), name)]


def _leaves(found: Any, path: str) -> Iterator[str]:
    """Paths to numbers; one path for a mean and its interval."""
    if isinstance(found, dict):
        for key, value in found.items():
            if not {"low", "high"} <= found.keys() or key not in ("low", "high"):
                own = key == "mean" and not isinstance(value, dict)
                yield from _leaves(value, path if own else f"{path} / {key}")
    elif isinstance(found, list):
        for number, value in enumerate(found):
            yield from _leaves(value, f"{path} / {_told_apart(found, number)}")
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield path


def _told_apart(rows: list[Any], number: int) -> str:
    """The fewest keys that tell an entry from the others; its index if none do."""
    row = rows[number] if isinstance(rows[number], dict) else {}
    keys = [key for key, value in row.items() if isinstance(value, str | int | None) or key == "scale"]
    for size in range(1, 5):
        for chosen in combinations(keys, size):
            if sum(all(str(other.get(key)) == str(row[key]) for key in chosen) for other in rows) == 1:
                return " & ".join(f"{key}={row[key]}" for key in chosen)
    return str(number)


if __name__ == "__main__":
    main()
