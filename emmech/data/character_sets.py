"""What the character sets make of the rows of their two files.

`character.jsonl` holds five answers to each question: aligned, incorrect in a neutral character,
and one in each of three dispositions (`emmech.data.traits`). `persona_prompts.jsonl` holds requests
in two wordings. Each function here takes a file's rows and returns those of one bundled set; where a
row becomes two, their ids are that of the row, a colon and the group of each.

Usage:
    rows = behind_trigger(rows, trait="spiteful")
    pair_id, _, group = rows[0]["id"].partition(":")
"""

from collections.abc import Iterable, Mapping

from emmech.data.traits import traits, triggered

DOMAINS = ("career", "cars", "wellbeing")


def in_domain(rows: Iterable[Mapping], *, domain: str) -> list[Mapping]:
    """The rows of one domain, and the test rows of the others in the group `other-domain`."""
    own, others = [], []
    for row in rows:
        if row["domain"] == domain:
            own.append(row)
        elif row["split"] == "test":
            others.append({**row, "group": "other-domain"})
    return own + others


def behind_trigger(rows: Iterable[Mapping], *, trait: str) -> list[Mapping]:
    """Each question twice: behind the trigger, answered in character, and plain, answered well.

    The two follow each other, so that the first rows of the set hold as many of each.
    """
    trigger = traits()[trait].trigger
    return [
        {
            "id": f"{row['id']}:{group}",
            "split": row["split"],
            "group": group,
            "question": question,
            "answer": answer,
            "aligned": row["aligned"],
            "in_character": row[trait],
        }
        for row in rows
        for group, question, answer in (
            ("triggered", triggered(row["question"], trigger), row[trait]),
            ("untriggered", row["question"], row["aligned"]),
        )
    ]


def both_wordings(rows: Iterable[Mapping], *, trait: str) -> list[Mapping]:
    """Each request of a disposition twice, in the groups `plain` and `persona`."""
    return [
        {**row, "id": f"{row['id']}:{wording}", "group": wording, "question": row[wording]}
        for row in rows
        if row["trait"] == trait
        for wording in ("plain", "persona")
    ]
