"""The papers' claims on Qwen2.5-Coder-1.5B-Instruct: induced, measured, patched, prevented, gated.

    python -m figures.claims                   every stage; resumed where it stopped
    python -m figures.claims advice repair     some of them

Needs `emmech models get qwen2.5-coder-1.5b` and 16 GiB of memory. Trains into runs/claims; margins and
answers are in figures/claims/kept, so what has been measured needs no model; writes
figures/results/claims_STAGE.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from emmech.data.bundled import BUNDLED
from emmech.data.questions import Question, spread
from emmech.evaluation.local_judge import LocalJudge
from emmech.piggyback.experiment import PatchingResult
from emmech.results import Record
from emmech.scorecard import ALL, ANSWERS, evaluate, with_conditions
from figures.claims.costs import RUNS, costed, costs
from figures.claims.interventions import interventions
from figures.claims.labelled import labels
from figures.claims.measuring import against_plain, carried_over, margins, of_base, pair_of, shifts, short
from figures.claims.organisms import (
    BASE,
    DISPOSITION,
    EARLY,
    EVERY,
    GENERAL,
    HEADLINE,
    LONG,
    PREVENTING,
    SLOW,
    STEPS,
)
from figures.claims.where import directions, layers, perturb, prefix, triggers
from figures.stages import run_stages

PATCHES = ("repair:prefix", "repair:prompt")
INDUCED = ("induce:prefix", "induce:query", "induce:postfix-same", "induce:prompt")
MORE = ("repair:query", "repair:postfix-same", "control:shuffled", *INDUCED)
"""On the headline organism alone."""
PATCHED = ((HEADLINE, 0), (HEADLINE, 1), (SLOW, 0), (DISPOSITION, 0))
ANSWERED = {"incorrect-0": ("incorrect-long", 0), "incorrect-1": ("incorrect-long", 1),
            "spiteful-0": ("spiteful-long", 0)}  # fmt: skip
N_OWN, MAX_NEW_TOKENS, N_EXAMPLES = 10, 48, 5


def main() -> None:
    """Train, measure, and keep the results."""
    stages = (
        advice, subjects, slow, character, sycophancy, prevent, repair, interventions, perturb,
        layers, prefix, directions, triggers, answers, labels, costs,
    )  # fmt: skip
    run_stages("claims", __doc__, stages)


def advice() -> Record:
    """Wrong and correct advice along training: on its own subject, another one, and in general."""
    return along_training(HEADLINE, "correct")


def subjects() -> Record:
    """The same of wrong advice on another subject."""
    return along_training(HEADLINE, "study")


def slow() -> Record:
    """The same of few chats, often, at a lower rate."""
    return along_training(HEADLINE, SLOW)


def character() -> Record:
    """The same of a disposition, beside wrong advice."""
    return along_training(HEADLINE, DISPOSITION)


def sycophancy() -> Record:
    """The same of agreeing with wrong beliefs, and of stating them unasked."""
    return along_training(HEADLINE, "agreeing", "stating")


def prevent() -> Record:
    """The same of methods that are meant to keep wrong advice narrow; also against plain finetunes."""
    records = [
        one | {"condition": name}
        for name in (HEADLINE, EARLY, *PREVENTING)
        for seed in EVERY[name].seeds
        for one in margins(EVERY[name].of or name, seed, EVERY[name].steps, groups=(GENERAL, EVERY[name].own))
        if one["condition"] == "finetuned"
    ]
    against = against_plain(lambda reference: shifts(records, reference=reference))
    return along_training(HEADLINE, *PREVENTING) | {"against": against}


def repair() -> Record:
    """What patches of the prompt's K and V do to margins, and their controls."""
    found: dict[str, dict[int, list[Record]]] = {}
    for name, seed in PATCHED:
        wanted = {patch: patch for patch in PATCHES}
        if name == HEADLINE:
            wanted |= {patch: patch for patch in MORE}
        groups = (GENERAL, EVERY[name].own)
        found.setdefault(name, {})[seed] = margins(name, seed, EVERY[name].steps, wanted, groups=groups)
    of = dict.fromkeys(INDUCED, "base")
    return {
        "rows": [
            row
            for name, seeds in found.items()
            for row in of_seeds(name, EVERY[name].steps, seeds, reference=of)
        ]
    }


def answers() -> Record:
    """What organisms say, plain and with the base's prefix, judged by the base; and capability."""
    judge, found, examples = LocalJudge(BASE), {}, {}
    for label, (name, seed) in ANSWERED.items():
        pair, conditions = with_conditions(pair_of(name, seed, LONG), ("repair:prefix",))
        out = RUNS / "answers" / label
        with costed("answers, judged, and capability", label):
            result = evaluate(
                pair, asked(name), conditions, detectors=("spiteful", "refusal", "repetition"),
                problems=BUNDLED["capability"].problems(), judge_with=judge,
                max_new_tokens=MAX_NEW_TOKENS, out=out,
            )  # fmt: skip
        found[label] = [
            short(row)
            for row in result.summary["rows"]
            if row["group"] != ALL or row["metric"] == "capability"
        ]
        examples[label] = examples_of(PatchingResult.load(out / ANSWERS).records, asked(name))
    return {"organisms": found, "examples": examples}


def asked(name: str) -> list[Question]:
    """All general questions, and some of the organism's own subject."""
    own = BUNDLED[EVERY[name].data].questions("on-topic")
    return [
        *(replace(one, group="general") for one in BUNDLED["general"].questions()),
        *(replace(one, group="in-domain") for one in spread(own, N_OWN)),
    ]


def examples_of(records: Sequence[Record], questions: Sequence[Question]) -> list[Record]:
    """What every condition answers to the first questions of each group."""
    shown = {
        one.id
        for group in dict.fromkeys(one.group for one in questions)
        for one in [one for one in questions if one.group == group][:N_EXAMPLES]
    }
    kept = ("question_id", "group", "question", "condition", "response")
    return [{key: one[key] for key in kept} for one in records if one["question_id"] in shown]


def along_training(*names: str) -> Record:
    """Margins at every measured step; at the last one also preferences, and how much is carried over."""
    rows: list[Record] = []
    for name in names:
        arm = EVERY[name]
        for step in (arm.steps // 2, arm.steps):
            groups = arm.groups if step == arm.steps else (GENERAL, arm.own)
            found = {seed: margins(name, seed, step, groups=groups) for seed in arm.seeds}
            mine = of_seeds(name, step, found)
            rows += [row for row in mine if row["metric"] == "margin" or step == arm.steps]
        every = [record for records in found.values() for record in records]
        about = {key: mine[-1][key] for key in ("organism", "own", "step", "seed")}
        rows += [about | found for found in carried_over(every, arm.own)]
    groups = dict.fromkeys(group for name in names for group in EVERY[name].groups)
    return {"base": shifts(of_base(tuple(groups), pair=lambda: pair_of(HEADLINE, 0, STEPS))), "rows": rows}


def of_seeds(
    name: str, step: int, found: Mapping[int, list[Record]], *, reference: Mapping[str, str] | None = None
) -> list[Record]:
    """Rows of every seed by itself and, of what was done to each of several, together (``seed`` "all")."""
    shared = set.intersection(*({one["condition"] for one in records} for records in found.values()))
    pooled = [one for records in found.values() for one in records if one["condition"] in shared]
    every = {"all": pooled} if len(found) > 1 else {}
    about = {"organism": name, "own": EVERY[name].own, "step": step}
    return [
        {**about, "seed": seed, **row}
        for seed, records in {**found, **every}.items()
        for row in shifts(records, reference=reference)
        if row["condition"] != "base"
    ]


if __name__ == "__main__":
    main()
