"""Where it rides in the 1.5B model: the prompt's wording, layers, K and V of the prefix, directions."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from emmech.data.bundled import BUNDLED, AnswerPair
from emmech.data.questions import Question, spread
from emmech.data.traits import traits
from emmech.data.wordings import WORDINGS, pairs_behind_triggers, triggers_of
from emmech.models.checkpoints import ModelPair
from emmech.models.sides import SideName
from emmech.piggyback.margin import margins
from emmech.piggyback.patching import Condition
from emmech.piggyback.perturbation import perturbed_margins
from emmech.piggyback.residual_sweep import sweep_resid
from emmech.piggyback.sweep import sweep_kv
from emmech.results import Record
from emmech.scorecard import ALL, compared
from emmech.sharding import kept
from emmech.steering.contrasts import Contrast, between_prompts, between_sides, between_wordings, with_trigger
from emmech.steering.shared import shared_structure, shift
from figures.claims.costs import RUNS, costed
from figures.claims.measuring import QUIET, directing, pair_of, short
from figures.claims.organisms import (
    BACKDOOR,
    DISPOSITION,
    GENERAL,
    HEADLINE,
    N_PAIRS,
    STEPS,
    battery,
)

TRIALS = 2
"""Perturbations of a question; the paper has 10."""
N_SWEPT = 10
"""General pairs in a sweep."""
LAYERS = (7, 14, 21)
"""Blocks whose cosines are kept, of 28."""


def general() -> list[AnswerPair]:
    """Pairs of answers about no subject that was trained on."""
    return battery([GENERAL])


def perturb() -> Record:
    """Margins behind prompts with ten tokens of a segment replaced, of organism and base."""
    pair, rows = pair_of(HEADLINE, 0, STEPS), []
    for side in ("finetuned", "base"):
        rows += [{"side": side, **row} for row in _perturbed(pair, side)]
    return {"organism": HEADLINE, "trials": TRIALS, "rows": rows}


def _perturbed(pair: ModelPair, side: SideName) -> list[Record]:
    pairs = general()
    plain = margins(pair, pairs, [Condition(side, side)], **QUIET)
    records = kept(_folder("perturbed"), f"{side}.json", partial(_score_perturbed, pair, pairs, side))
    best: dict[tuple[str, str], Record] = {}
    for one in records:
        key = one["condition"], one["question_id"]
        best[key] = max(one, best.get(key, one), key=lambda record: record["margin"])
    against = {name: side for name in dict.fromkeys(one["condition"] for one in (*plain, *records))}
    return [
        short(row)
        for metric, chosen in (("margin", records), ("best margin", best.values()))
        for row in compared(metric, "nats", [(_general(r), r["margin"]) for r in (*plain, *chosen)], against)
    ]


def _score_perturbed(pair: ModelPair, pairs: Sequence[AnswerPair], side: SideName) -> list[Record]:
    with costed("perturbed margins", side):
        return perturbed_margins(pair, pairs, side=side, trials=TRIALS)


def _general(record: Record) -> Record:
    return record | {"group": GENERAL}


def layers() -> Record:
    """The base's residual stream after one block, at one segment of the prompt, in the organism."""
    pair, asked = pair_of(HEADLINE, 0, STEPS), spread(general(), N_SWEPT)
    with costed("residual sweep", HEADLINE):
        found = sweep_resid(pair, asked, over=("layer", "segment"), out=_folder("layers"))
    return {"organisms": {f"{HEADLINE}-0": found.to_json()}}


def prefix() -> Record:
    """K and V of the prefix, layer by layer and token by token, from the base into the organism."""
    pair, asked = pair_of(HEADLINE, 0, STEPS), spread(general(), N_SWEPT)
    found = {}
    for axis in ("layer", "position"):
        with costed("prefix sweep", axis):
            found[axis] = sweep_kv(pair, asked, over=(axis, "kv"), out=_folder(f"prefix-{axis}")).to_json()
    return found


def directions() -> Record:
    """Cosines of what finetunes, trigger, persona-aligned and system prompts do to the last prompt token."""
    questions, trait = directing(), traits()[DISPOSITION]
    found: dict[str, Contrast] = {}
    for name in (HEADLINE, DISPOSITION, "agreeing", BACKDOOR, "correct"):
        pair = pair_of(name, 0, STEPS)
        found[name] = between_sides(pair, questions, **QUIET)
        if name == BACKDOOR:
            found["trigger"] = with_trigger(pair, questions, trait.trigger, **QUIET)
            found["wrong trigger"] = with_trigger(pair, questions, trait.wrong_triggers[0].text, **QUIET)
    found[f"{HEADLINE}, seed 1"] = between_sides(pair_of(HEADLINE, 1, STEPS), questions, **QUIET)
    prompts = (trait.elicit[:4], trait.suppress[:4])
    found["system prompts"] = between_prompts(pair, questions, *prompts, position="last", **QUIET)
    found["persona prompts"] = between_wordings(pair, *_by_wording(), side="base", **QUIET)
    shifts = {name: shift(*both) for name, both in found.items()}
    result = shared_structure(shifts, found[HEADLINE][1], controls=("correct", "wrong trigger"))
    result.save(_folder("directions"))
    about = {
        name: {"reliability": [one["reliability"][layer] for layer in LAYERS], "control": one["control"]}
        for name, one in result.summary["shifts"].items()
    }
    rows = [row for row in result.summary["rows"] if row["layer"] in LAYERS]
    return {"layers": list(LAYERS), "shifts": about, "rows": rows}


def _by_wording() -> list[list[Question]]:
    """Persona-aligned requests, and the same plainly worded, under the same ids."""
    requests = BUNDLED[f"persona_prompts_{DISPOSITION}"].questions()
    return [
        [Question(one.id.removesuffix(f":{name}"), one.chat) for one in requests if one.group == name]
        for name in reversed(WORDINGS)
    ]


def triggers() -> Record:
    """Margins behind trigger and wrong triggers, and of persona-aligned and plain requests."""
    spiteful = spread(BUNDLED[DISPOSITION].pairs(), N_PAIRS)
    behind = pairs_behind_triggers(spiteful, triggers_of(traits()[DISPOSITION].trigger))
    requests = BUNDLED[f"persona_prompts_{DISPOSITION}"].pairs()
    sets = {BACKDOOR: [behind, requests], DISPOSITION: [requests]}
    return {
        "organisms": {
            name: [row for pairs in several for row in _worded(name, pairs)] for name, several in sets.items()
        }
    }


def _worded(name: str, pairs: Sequence[AnswerPair]) -> list[Record]:
    """Margins of base and organism, each wording compared with the plain one."""
    pair, group = pair_of(name, 0, STEPS), {one.id: one.group for one in pairs}
    conditions = [Condition(side, side) for side in ("base", "finetuned")]
    found = margins(pair, pairs, conditions, **QUIET)
    values = [(one | {"group": group[one["question_id"]]}, one["margin"]) for one in found]
    rows = compared("margin", "nats", values, {"base": "base", "finetuned": "base"})
    return [short(row) for row in rows if row["group"] != ALL]


def _folder(name: str) -> Path:
    folder = RUNS / "where" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
