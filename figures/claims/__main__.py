"""The papers' claims on Qwen2.5-Coder-1.5B-Instruct: induced, measured, patched, prevented, gated.

    python -m figures.claims                   every stage; resumed where it stopped
    python -m figures.claims advice repair     some of them

Needs `emmech models get qwen2.5-coder-1.5b` and 12 GiB of memory. Trains into runs/claims and writes
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
from figures.claims.labelled import labels
from figures.claims.measuring import carried_over, margins, of_base, pair_of, shifts, short
from figures.claims.organisms import BASE, EVERY, GATES, PREVENTING, STEPS, trained
from figures.claims.where import HEADLINE, direction_file, directions, layers, perturb, prefix, triggers
from figures.stages import run_stages

PATCHES = (
    "repair:prefix", "repair:query", "repair:postfix", "repair:prompt", "induce:prefix", "adapter@0.5",
)  # fmt: skip
CONTROLS = ("repair:postfix-same", "induce:prompt", "control:noise", "control:shuffled")
"""On the headline organism alone."""
STEERED = {
    "steer -0.5": "steer={file}:14@-0.5", "steer -1": "steer={file}:14@-1",
    "ablated 8-21": "ablate={file}:8-21",
}  # fmt: skip
"""Along the organism's own shift: subtracted in the middle block, taken out of the middle half."""
PATCHED = {"incorrect": (0, 1), "spiteful": (0,), "agreeing": (0,)}
"""Organisms and seeds."""
INVERTED = ("incorrect", "travel", "study", "agreeing", "spiteful")
"""Finetunes that the gates are put on."""
ANSWERED = (("incorrect", 0), ("incorrect", 1), ("spiteful", 0))
N_OWN, MAX_NEW_TOKENS, N_EXAMPLES = 10, 48, 5


def main() -> None:
    """Train, measure, and keep the results."""
    stages = (
        advice, character, sycophancy, repair, perturb, layers, prefix, prevent, gates, directions, triggers,
        answers, labels, costs,
    )  # fmt: skip
    run_stages("claims", __doc__, stages)


def advice() -> Record:
    """Wrong advice on three subjects along its training: in-domain, elsewhere, about the assistant."""
    return along_training(HEADLINE, "correct", "travel", "study", "slow")


def character() -> Record:
    """The same of a disposition, beside wrong advice on the same questions and aligned answers to them."""
    return along_training(HEADLINE, "spiteful", "incorrect-character", "aligned-character", "backdoor")


def sycophancy() -> Record:
    """The same of agreeing with wrong beliefs, and of stating them unasked."""
    return along_training(HEADLINE, "agreeing", "stating")


def prevent() -> Record:
    """The same of methods that are meant to keep wrong advice narrow."""
    return along_training(HEADLINE, *PREVENTING)


def repair() -> Record:
    """What patches of the prompt's K and V do, and their controls, half an adapter, and steering."""
    rows = []
    for name, seeds in PATCHED.items():
        patches = (*PATCHES, *(CONTROLS if name == HEADLINE else ()))
        of = {patch: "base" for patch in patches if patch.startswith("induce:")}
        found = {}
        for seed in seeds:
            steered = {what: text.format(file=direction_file(name, seed)) for what, text in STEERED.items()}
            found[seed] = margins(name, seed, STEPS, {patch: patch for patch in patches} | steered)
        rows += of_seeds(name, STEPS, found, reference=of)
    return {"rows": rows}


def gates() -> Record:
    """Gates as trained and inverted: on the base, and inverted on finetunes that they never saw."""
    folders = {name: trained(name)[STEPS] for name in GATES}
    doses = {
        f"{name} @{scale}": f"gates={folder}@{scale}" for name, folder in folders.items() for scale in (1, -1)
    }
    own = shifts(
        of_base(doses, pair=lambda: pair_of("incorrect", 0, STEPS)), reference=dict.fromkeys(doses, "base")
    )
    inverted = {name: what for name, what in doses.items() if name.endswith("-1")}
    rows = [row for name in INVERTED for row in of_seeds(name, STEPS, {0: margins(name, 0, STEPS, inverted)})]
    return {"base": own, "rows": rows}


def answers() -> Record:
    """What organisms say, plain and with the base's prefix, judged by the base; and capability."""
    judge, found, examples = LocalJudge(BASE), {}, {}
    for name, seed in ANSWERED:
        pair, conditions = with_conditions(pair_of(name, seed, STEPS), ("repair:prefix",))
        out = RUNS / "answers" / f"{name}-{seed}"
        with costed("answers, judged, and capability", f"{name}-{seed}"):
            result = evaluate(
                pair, asked(name), conditions, detectors=("spiteful", "refusal", "repetition"),
                problems=BUNDLED["capability"].problems(), judge_with=judge,
                max_new_tokens=MAX_NEW_TOKENS, out=out,
            )  # fmt: skip
        found[f"{name}-{seed}"] = [
            short(row)
            for row in result.summary["rows"]
            if row["group"] != ALL or row["metric"] == "capability"
        ]
        examples[f"{name}-{seed}"] = examples_of(PatchingResult.load(out / ANSWERS).records, asked(name))
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
        for step in arm.measured:
            found = {seed: margins(name, seed, step) for seed in arm.seeds}
            mine = of_seeds(name, step, found)
            rows += [row for row in mine if row["metric"] == "margin" or step == arm.steps]
        every = [record for records in found.values() for record in records]
        about = {key: mine[-1][key] for key in ("organism", "own", "step", "seed")}
        rows.append(about | carried_over(every, arm.own))
    return {"base": shifts(of_base(pair=lambda: pair_of(HEADLINE, 0, STEPS))), "rows": rows}


def of_seeds(
    name: str, step: int, found: Mapping[int, list[Record]], *, reference: Mapping[str, str] | None = None
) -> list[Record]:
    """Rows of every seed by itself and, where there are several, of all together (``seed`` "all")."""
    every = {"all": [record for records in found.values() for record in records]} if len(found) > 1 else {}
    about = {"organism": name, "own": EVERY[name].own, "step": step}
    return [
        {**about, "seed": seed, **row}
        for seed, records in {**found, **every}.items()
        for row in shifts(records, reference=reference)
        if row["condition"] != "base"
    ]


if __name__ == "__main__":
    main()
