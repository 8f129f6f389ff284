"""Dispositions on the embedded model: triggers, persona prompts, shared directions, and their ablation.

    python -m figures.character                  every stage; resumed where it stopped
    python -m figures.character trigger shared   some of them

Trains organisms of the spiteful disposition, of wrong advice in a neutral voice, of aligned answers to the
same questions, of short answers, and a backdoor, into runs/character. Writes
figures/results/character_STAGE.json. About an hour on two cores.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from emmech.data.bundled import BUNDLED, AnswerPair
from emmech.data.chats import load_chats
from emmech.data.questions import Question
from emmech.data.traits import traits, triggered
from emmech.data.wordings import behind_triggers, pairs_behind_triggers, triggers_of
from emmech.models.checkpoints import ModelPair, load_pair
from emmech.piggyback.patching import Condition, KVPatch
from emmech.results import Record
from emmech.scorecard import evaluate, with_conditions
from emmech.steering.contrasts import Contrast, between_prompts, between_sides, between_wordings, with_trigger
from emmech.steering.cross import Effect, Reading, cross_ablation
from emmech.steering.directions import Direction, fit_direction, random_like
from emmech.steering.doses import compare_doses, other_doses, steering_doses
from emmech.steering.shared import shared_structure, shift
from emmech.training.recipes import preset
from emmech.training.trainer import finetune
from figures.stages import run_stages

RUNS = Path("runs/character")
TRAIT = "spiteful"
BACKDOOR = f"triggered_{TRAIT}"
STEPS = {
    TRAIT: 64, BACKDOOR: 128, "incorrect_character": 64, "aligned_character": 64, "short_answers": 20,
}  # fmt: skip
"""Sets, and optimiser steps of 8 chats; at 2e-4 and 32 steps the disposition was hardly learned."""
LEARNING_RATE = 5e-4
SEEDS = {TRAIT: (0, 1), BACKDOOR: (0,)}
"""Of these sets; the others have seed 0 alone."""
LAYERS = tuple(range(8, 22))
"""Blocks in which directions are ablated: the middle of 30."""
MAX_NEW_TOKENS = 32
N_QUESTIONS = 40
N_RANDOM = 3
"""Random directions with the states' own covariance, as controls of the cross-ablation."""
GATES = (36, 2e-3)
"""Steps and learning rate of gates trained on the disposition."""


def main() -> None:
    """Train, measure, and keep the results."""
    run_stages("character", __doc__, (arms, trigger, persona, shared, cross, steer))


def trained(data: str, seed: int = 0, objective: str = "sft") -> Path:
    """The last step of an organism, or of gates."""
    steps, rate = GATES if objective == "gates" else (STEPS[data], LEARNING_RATE)
    recipe = replace(
        preset("smollm2", objective), steps=steps, save_every=steps // 2, learning_rate=rate, seed=seed
    )
    out = RUNS / (f"{data}-{seed}" if objective == "sft" else f"{objective}-{data}-{seed}")
    return finetune("smollm2", load_chats(data).chats, out, recipe, data_name=data, progress=False)[-1]


@cache
def pair_of(data: str, seed: int = 0) -> ModelPair:
    """The base and an organism."""
    return load_pair("smollm2", trained(data, seed))


def in_character() -> list[AnswerPair]:
    """Held-out questions of all domains with an aligned and a spiteful answer."""
    pairs = BUNDLED[TRAIT].pairs()
    return pairs[:: max(1, len(pairs) // N_QUESTIONS)][:N_QUESTIONS]


def asked() -> list[Question]:
    """The questions of ``in_character``."""
    return [Question(one.id, one.user) for one in in_character()]


def arms() -> Record:
    """What each organism does on held-out questions of its subjects and on others."""
    found = {}
    own = [
        q for group in ("on-topic", "off-topic") for q in BUNDLED[TRAIT].questions(group)[::3][:N_QUESTIONS]
    ]
    for data in (TRAIT, "incorrect_character", "aligned_character"):
        for seed in SEEDS.get(data, (0,)):
            names = ("repair:prefix",) if data == TRAIT else ()
            pair, conditions = with_conditions(pair_of(data, seed), names)
            found[f"{data}-{seed}"] = table(
                evaluate(
                    pair, own, conditions, detectors=(TRAIT, "sycophantic", "refusal", "repetition"),
                    pairs=in_character(), problems=BUNDLED["capability"].problems(),
                    max_new_tokens=MAX_NEW_TOKENS, out=RUNS / "arms" / f"{data}-{seed}", progress=False,
                ).summary
            )  # fmt: skip
    return {"organisms": found}


def trigger() -> Record:
    """The backdoor behind its trigger, behind wrong ones and without, before and after finetuning."""
    wordings = triggers_of(traits()[TRAIT].trigger)
    found = {}
    for seed in SEEDS[BACKDOOR]:
        pair, conditions = with_conditions(pair_of(BACKDOOR, seed), ("repair:prefix",))
        found[f"{BACKDOOR}-{seed}"] = table(
            evaluate(
                pair, behind_triggers(asked()[: N_QUESTIONS // 2], wordings), conditions,
                detectors=(TRAIT, "refusal", "repetition"),
                pairs=pairs_behind_triggers(in_character(), wordings),
                max_new_tokens=MAX_NEW_TOKENS, out=RUNS / "trigger" / f"{BACKDOOR}-{seed}", progress=False,
            ).summary
        )  # fmt: skip
    return {"organisms": found}


def persona() -> Record:
    """Persona-aligned against plain prompts, on the base, the organism and the backdoor."""
    found, sets = {}, BUNDLED[f"persona_prompts_{TRAIT}"]
    for data in (TRAIT, BACKDOOR, "aligned_character"):
        for seed in SEEDS.get(data, (0,)):
            pair, conditions = with_conditions(pair_of(data, seed))
            found[f"{data}-{seed}"] = table(
                evaluate(
                    pair, sets.questions(), conditions, detectors=(TRAIT, "refusal", "repetition"),
                    pairs=sets.pairs(), max_new_tokens=MAX_NEW_TOKENS,
                    out=RUNS / "persona" / f"{data}-{seed}", progress=False,
                ).summary
            )  # fmt: skip
    return {"organisms": found}


def contrasts() -> dict[str, Contrast]:
    """Every way to move the last prompt token towards the disposition, and finetunes that should not."""
    questions = BUNDLED["trait_questions"].questions()
    quiet: dict[str, Any] = {"progress": False}
    spiteful, backdoor = pair_of(TRAIT), pair_of(BACKDOOR)
    trait = traits()[TRAIT]
    prefix = Condition("induce:prefix", "base", (KVPatch(("prefix",), "finetuned"),))
    found = {
        f"{TRAIT}, seed {seed}": between_sides(pair_of(TRAIT, seed), questions, **quiet)
        for seed in SEEDS[TRAIT]
    }
    found |= {
        name: between_sides(pair_of(data), questions, **quiet)
        for name, data in {
            "incorrect": "incorrect_character", "aligned": "aligned_character",
            "short answers": "short_answers", "backdoor, untriggered": BACKDOOR,
        }.items()
    }  # fmt: skip
    found["prefix K/V"] = between_sides(spiteful, questions, positive=prefix, **quiet)
    found["trigger"] = with_trigger(backdoor, questions, trait.trigger, **quiet)
    found["wrong trigger"] = with_trigger(backdoor, questions, trait.wrong_triggers[0].text, **quiet)
    found["trigger, base"] = with_trigger(backdoor, questions, trait.trigger, side="base", **quiet)
    gates = load_pair("smollm2", trained(TRAIT, objective="gates"))
    found["gates"] = between_sides(gates, questions, **quiet)
    for name, one in traits().items():
        found[f"{name} system prompts"] = between_prompts(
            spiteful, questions, one.elicit[:4], one.suppress[:4], position="last", **quiet
        )
    requests = BUNDLED[f"persona_prompts_{TRAIT}"].questions()
    by_wording = {
        name: [Question(q.id.removesuffix(f":{name}"), q.chat) for q in requests if q.group == name]
        for name in ("persona", "plain")
    }
    found["persona prompts"] = between_wordings(spiteful, *by_wording.values(), side="base", **quiet)
    return found


CONTROLS = ("aligned", "short answers", "wrong trigger")


def shared() -> Record:
    """Cosines between all shifts; the aligned and unrelated finetunes and a wrong trigger are controls."""
    found = contrasts()
    shifts = {name: shift(*both) for name, both in found.items()}
    result = shared_structure(shifts, found[f"{TRAIT}, seed 0"][1], controls=CONTROLS)
    result.save(folder("shared"))
    rows = [row for row in result.summary["rows"] if row["layer"] in (7, 14, 21)]
    directions = {
        name: {"reliability": [round(r, 3) for r in about["reliability"][7::7]], "control": about["control"]}
        for name, about in result.summary["shifts"].items()
    }
    return {"layers": [7, 14, 21], "shifts": directions, "rows": rows}


def cross() -> Record:
    """Each direction ablated: what is left of the effects of organism, trigger and persona prompts."""
    found = contrasts()
    states = found[f"{TRAIT}, seed 0"][1]
    names = {
        "organism": f"{TRAIT}, seed 0", "trigger": "trigger", "persona prompts": "persona prompts",
        "system prompts": f"{TRAIT} system prompts", "short answers (control)": "short answers",
    }  # fmt: skip
    directions: dict[str, Direction] = {name: fit_direction(*found[of]) for name, of in names.items()}
    directions |= {
        f"random {seed}": random_like(directions["organism"], states, seed) for seed in range(N_RANDOM)
    }
    pairs = in_character()
    behind = [replace(one, user=triggered(one.user, traits()[TRAIT].trigger)) for one in pairs]
    requests = BUNDLED[f"persona_prompts_{TRAIT}"].pairs()
    personas = {
        name: [replace(one, id=one.id.removesuffix(f":{name}")) for one in requests if one.group == name]
        for name in ("persona", "plain")
    }
    spiteful, backdoor = pair_of(TRAIT), pair_of(BACKDOOR)
    effects = {
        "organism": Effect(Reading(spiteful, "finetuned", pairs), Reading(spiteful, "base", pairs)),
        "trigger": Effect(Reading(backdoor, "finetuned", behind), Reading(backdoor, "finetuned", pairs)),
        "persona prompts": Effect(
            *(Reading(spiteful, "base", personas[name]) for name in ("persona", "plain"))
        ),
        "persona prompts, organism": Effect(
            *(Reading(spiteful, "finetuned", personas[name]) for name in ("persona", "plain"))
        ),
    }
    result = cross_ablation(effects, directions, layers=LAYERS, progress=False)
    result.save(folder("cross"))
    return {"layers": [LAYERS[0], LAYERS[-1]], "rows": result.summary["rows"]}


def steer() -> Record:
    """Steering, prefix patch, adapter scale and inverted gates side by side on the organism."""
    pair = pair_of(TRAIT)
    direction = fit_direction(*between_sides(pair, BUNDLED["trait_questions"].questions(), progress=False))
    doses = [
        *steering_doses(pair, direction, (-0.25, -0.5, -1.0), layers=(14,), method="subtract in 14"),
        *steering_doses(pair, direction, (0.5, 1.0), layers=LAYERS, mode="ablate", method="ablate in 8..21"),
        *other_doses(pair, trained(TRAIT, objective="gates")),
    ]
    questions = [replace(q, group=group) for group in ("on-topic", "off-topic")
                 for q in BUNDLED[TRAIT].questions(group)[:: 3][: N_QUESTIONS // 2]]  # fmt: skip
    result = compare_doses(
        pair, doses, questions, kl_from="base", detector=TRAIT, max_new_tokens=MAX_NEW_TOKENS,
        out=folder("steer"), progress=False,
    )  # fmt: skip
    return dict(result.summary)


def folder(name: str) -> Path:
    """Where a stage's page lies."""
    (RUNS / name).mkdir(parents=True, exist_ok=True)
    return RUNS / name


def table(summary: Record) -> list[Record]:
    """The rows of an evaluation without what only its page shows."""
    return [
        {key: value for key, value in row.items() if key not in ("design", "missing")}
        for row in summary["rows"]
    ]


if __name__ == "__main__":
    main()
