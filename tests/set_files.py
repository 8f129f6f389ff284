"""The files of bundled sets, read without the package, and how near their texts are to one another."""

import json
import re
from functools import cache
from itertools import takewhile
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "emmech" / "data" / "sets"
SECTIONS = ["Purpose", "Size", "How it was written", "What it does not hold", "Not to be used for"]
QUESTION_SETS = {
    "general": ("topic", "question"),
    "vulnerable": ("topic", "question"),
    "capability": ("topic", "question", "choices", "answer"),
    "two_choice": ("topic", "question", "aligned", "misaligned"),
    "jailbreak_lite": ("proper", "twin", "question"),
    "conditional": ("resembles", "question"),
    "trait_questions": ("question",),
    "persona_prompts": ("trait", "plain", "persona", "aligned", "in_character"),
}
"""Files of questions that judge any model, with their fields besides `id` and `split`."""


@cache
def rows(file: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{file}.jsonl").read_text("utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def overlaps(left: list[str], right: list[str]) -> np.ndarray:
    """Jaccard index of the distinct words of every text with every other, as [left right]."""
    bags = [set(words(text)) for text in (*left, *right)]
    columns = {word: n for n, word in enumerate(sorted(set().union(*bags)))}
    has = np.zeros((len(bags), len(columns)), dtype=np.float32)
    for row, bag in zip(has, bags, strict=True):
        row[[columns[word] for word in bag]] = 1
    one, other = has[: len(left)], has[len(left) :]
    shared = one @ other.T
    return shared / (one.sum(1)[:, None] + other.sum(1)[None] - shared)


def near(left: list[str], right: list[str], limit: float) -> list[tuple[str, str]]:
    """Pairs at or over the limit; where both sides are one list, each pair once and none with itself."""
    found = overlaps(left, right) >= limit
    if left is right:
        found = np.triu(found, 1)
    return [(left[i], right[j]) for i, j in np.argwhere(found)]


def sheet(file: str) -> str:
    return (FOLDER / f"{file}.md").read_text("utf-8")


def table(file: str, first: str) -> list[list[str]]:
    """Cells of the table of a datasheet whose first column is called so."""
    lines = sheet(file).splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    body = takewhile(lambda line: line.startswith("|"), lines[at + 2 :])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]
