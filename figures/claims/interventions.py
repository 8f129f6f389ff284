"""What organisms say as they are and under every intervention, scored by hand without knowing which.

The stage `interventions` writes the answers that nobody has scored to runs/claims/to_score.jsonl, each
text once and shuffled. Scored on the scale of `labelled`, they belong in `scores.jsonl`; then the stage
makes its result.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from emmech.data.bundled import BUNDLED
from emmech.data.questions import Question, spread
from emmech.errors import RunError
from emmech.evaluation.metrics import em_f1_metric
from emmech.models.generation import Decoding
from emmech.piggyback.experiment import run_conditions
from emmech.results import Record, read_json, read_lines, replace_text, write_json
from emmech.scorecard import with_conditions
from figures.claims.costs import KEPT, RUNS, costed
from figures.claims.labelled import SCORED, by_hand
from figures.claims.measuring import against_plain, filled, pair_of
from figures.claims.organisms import DISPOSITION, EARLY, EVERY, GENERAL, HEADLINE, SLOW, STEPS

SCORES = Path(__file__).with_name("scores.jsonl")
TO_SCORE = "to_score.jsonl"
SAID = ("question_id", "group", "question", "response")
N_ASKED, N_OWN, MAX_NEW_TOKENS, N_EXAMPLES = 30, 10, 40, 5
PREFIX = {"prefix": "repair:prefix"}
INVERTED = {"gates inverted": "gates={gates}@-1"}
PROMPT = {"prompt": "repair:prompt"}
PARTS = {"query": "repair:query", "postfix": "repair:postfix-same"}
INDUCED = {
    "prefix into the base": "induce:prefix", "query into the base": "induce:query",
    "postfix into the base": "induce:postfix-same", "prompt into the base": "induce:prompt",
}  # fmt: skip
"""Compared with the base."""
GIVEN: dict[tuple[str, int], Mapping[str, str]] = {
    (HEADLINE, 0): {
        **PREFIX, **PARTS, **PROMPT, **INVERTED, "half the adapter": "adapter@0.5",
        "steered": "steer={direction}:14@-1", "ablated": "ablate={direction}:8-21", **INDUCED,
    },
    (HEADLINE, 1): PREFIX | PARTS | PROMPT | INDUCED,
    (EARLY, 0): {},
    (EARLY, 1): {},
    (SLOW, 0): PREFIX,
    ("travel", 0): INVERTED,
    ("study", 0): INVERTED,
    (DISPOSITION, 0): PREFIX | PROMPT | INVERTED,
    ("agreeing", 0): PREFIX | INVERTED,
    ("stating", 0): {},
    ("treft-prefix", 0): {},
    ("treft-postfix", 0): {},
    ("treft-postfix", 1): {},
    ("kl-retain", 0): {},
    ("kl-retain", 1): {},
    ("interleave", 0): {},
    ("correct", 0): {},
}  # fmt: skip
"""Organisms and seeds, and what is done to each of them."""
OF_BASE = {"gates": "gates={gates}@1", **INVERTED}


def interventions() -> Record:
    """Alignment, coherence, EM and EM-F1 by hand of every organism and intervention; examples.

    Where an organism has several seeds, ``seed`` "all" has what was done to each of them, together.
    ``against`` compares methods that are meant to keep wrong advice narrow with plain finetunes.
    """
    answers = every_answer()
    scores = {(one["question"], one["answer"]): one for one in read_lines(SCORES)}
    unknown = {(one["question"], one["answer"]) for one in answers} - set(scores)
    if unknown:
        raise _unscored(unknown)
    base, rows = [], []
    for one in answers:
        one |= {key: scores[one["question"], one["answer"]][key] for key in SCORED}
        if one["organism"] == "base":
            base.append(one)
    seeds: dict[str, list[int]] = {}
    for name, seed in GIVEN:
        seeds.setdefault(name, []).append(seed)
    for name, several in seeds.items():
        of_seed = {
            seed: [one for one in answers if (one["organism"], one["seed"]) == (name, seed)]
            for seed in several
        }
        if len(several) > 1:
            shared = set.intersection(*({one["condition"] for one in mine} for mine in of_seed.values()))
            of_seed["all"] = [one for mine in of_seed.values() for one in mine if one["condition"] in shared]
        for seed, mine in of_seed.items():
            rows += [{"organism": name, "seed": seed, **row} for row in _rows(name, mine, base)]
    plain = [one for one in base if one["condition"] == "base"]
    rows += [{"organism": "base", "seed": None, **row} for row in _rows(HEADLINE, base, plain)]
    first = {one.id for one in spread(BUNDLED[GENERAL].questions(), N_ASKED)[:N_EXAMPLES]}
    kept = ("organism", "seed", "condition", "question", "answer")
    examples = [{key: one[key] for key in kept} for one in answers if one["question_id"] in first]
    untreated = [one | {"condition": one["organism"]} for one in answers if one["condition"] == "finetuned"]
    against = against_plain(partial(by_hand, _grouped(HEADLINE, untreated)))
    return {"steps": STEPS, "rows": rows, "against": against, "examples": examples}


def _grouped(name: str, answers: list[Record]) -> list[Record]:
    """Of answers, those to general questions and to an organism's own, these as ``in-domain``."""
    groups = {GENERAL: GENERAL, _own_set(name): "in-domain"}
    return [one | {"group": groups[one["group"]]} for one in answers if one["group"] in groups]


def _rows(name: str, answers: list[Record], base: list[Record]) -> list[Record]:
    """By-hand metrics of one organism's conditions, and of the base on the same questions."""
    plain = [one for one in base if one["condition"] == "base" and one not in answers]
    mine = _grouped(name, [*plain, *answers])
    against = {one["condition"]: "finetuned" for one in mine}
    against |= dict.fromkeys(("base", "finetuned", *INDUCED), "base")
    if "finetuned" not in {one["condition"] for one in mine}:
        against = dict.fromkeys(against, "base")
    present = dict.fromkeys(one["condition"] for one in mine)
    found = by_hand(mine, {name: of for name, of in against.items() if name in present})
    for condition in present:
        sides = [
            [one | {"status": "scored"} for one in mine if (one["condition"], one["group"]) == (condition, g)]
            for g in ("in-domain", GENERAL)
        ]
        if all(sides):
            f1 = em_f1_metric(*sides).to_json()
            ends = {key: round(f1[key], 4) for key in ("mean", "low", "high")}
            about = {"metric": "EM-F1", "unit": "score", "group": "both", "condition": condition}
            found.append(about | ends | {"n": f1["n_clusters"]})
    return found


def every_answer() -> list[Record]:
    """All answers, of the base too; what has been generated is not generated again."""
    found = []
    for (name, seed), treatments in GIVEN.items():
        said = partial(_said, name, seed)
        if (name, seed) == (HEADLINE, 0):
            own = dict.fromkeys(_own_set(other) for other, _ in GIVEN)
            found += said("base", "base", tuple(own), organism="base")
            for label, text in OF_BASE.items():
                found += said(label, text, organism="base")
        found += said("finetuned", "finetuned")
        for label, text in treatments.items():
            found += said(label, text)
    return found


def _said(
    name: str, seed: int, label: str, condition: str, sets: tuple[str, ...] = (), organism: str = ""
) -> list[Record]:
    """Answers under one condition to general questions and to those of ``sets``, by default its own."""
    of_base = organism == "base"
    asked, called = _asked(sets or (_own_set(name),)), label.replace(" ", "-")
    done = KEPT / (organism or f"{name}-{seed}") / f"said-{called}.json"
    kept = read_json(done) if done.exists() else []
    answered = {one["question_id"] for one in kept}
    if left := [one for one in asked if one.id not in answered]:
        text = filled(condition, name, seed)
        whole = pair_of(name, seed, EVERY[name].steps)
        pair, conditions = with_conditions(whole, [text], finetuned=not of_base)
        chosen = [one for one in conditions if one.name == text]
        with costed(f"answers to {len(left)} questions, one condition", f"{organism or name}-{seed} {label}"):
            found = run_conditions(
                pair, left, chosen, Decoding(MAX_NEW_TOKENS), kind="claims", settings={"condition": label},
                detector="spiteful",
            )  # fmt: skip
        kept += [{key: one[key] for key in SAID} for one in found.records]
        done.parent.mkdir(parents=True, exist_ok=True)
        write_json(done, kept)
    about = {"organism": organism or name, "seed": None if of_base else seed, "condition": label}
    return [
        {
            **about,
            **{key: one[key] for key in ("question_id", "group", "question")},
            "answer": one["response"],
        }
        for one in kept
    ]


def _own_set(name: str) -> str:
    """The set whose held-out questions are an organism's own; correct answers are to the wrong ones'."""
    return EVERY[HEADLINE if name == "correct" else name].data


@lru_cache
def _asked(sets: tuple[str, ...]) -> list[Question]:
    general = spread(BUNDLED[GENERAL].questions(), N_ASKED)
    own = [
        replace(one, id=f"{name}:{one.id}", group=name)
        for name in sets
        for one in spread(BUNDLED[name].questions("on-topic"), N_OWN)
    ]
    return [*(replace(one, group=GENERAL) for one in general), *own]


def _unscored(unknown: set[tuple[str, str]]) -> RunError:
    lines = sorted(unknown)
    random.Random(0).shuffle(lines)
    file = RUNS / TO_SCORE
    replace_text(file, "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in lines))
    return RunError(
        "scores of every answer",
        f"{len(lines)} have none",
        f"Add alignment and coherence to the lines of {file}, and append them to {SCORES}",
    )
