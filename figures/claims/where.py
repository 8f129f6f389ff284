"""Where it rides in the 1.5B model: the prompt's wording, layers, K and V of the prefix, directions."""

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from emmech.chat import SEGMENTS
from emmech.data.bundled import BUNDLED, AnswerPair
from emmech.data.questions import Question, spread
from emmech.data.traits import traits
from emmech.data.wordings import WORDINGS, pairs_behind_triggers, triggers_of
from emmech.models.checkpoints import ModelPair
from emmech.models.sides import SideName
from emmech.piggyback.attribution import attribute
from emmech.piggyback.attribution_result import AttributionResult
from emmech.piggyback.cells import KV
from emmech.piggyback.margin import margins
from emmech.piggyback.patching import Condition
from emmech.piggyback.perturbation import perturbed_margins
from emmech.piggyback.residual_sweep import ResidCell, sweep_resid
from emmech.piggyback.sweep_result import mean_and_interval
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
from figures.riding_results import as_sweep, mapped, rounded

TRIALS = 2
"""Perturbations of a question; the paper has 10."""
N_SWEPT = 20
"""General pairs in a sweep."""
SWEPT_BLOCKS = (0, 4, 8, 12, 16, 20, 24, 27)
"""After which the residual stream is exchanged, of 28."""
STEPS_OF_GRADIENTS, N_CHECKED = 4, 24
"""Points on the way from one prefix cache to the other; cells that are patched exactly beside them."""
LAYERS = (7, 14, 21)
"""Blocks whose cosines are kept."""
N_WRONG = 3
"""Wrong triggers of six."""


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
    cells = [ResidCell(layer, segment=segment) for layer, segment in product(SWEPT_BLOCKS, SEGMENTS)]
    with costed("residual sweep", HEADLINE):
        found = sweep_resid(pair, asked, over=cells, out=_folder("layers"))
    whole = _changes((found.full - found.unpatched)[None], [{}])[0]
    return {"organism": f"{HEADLINE}-0", "prefix": whole, "rows": _changes(found.differences, found.cells)}


def prefix() -> Record:
    """K and V of the base at every layer and token of the organism's prefix, by gradients.

    For the margin, and for the KL of the answer's first token from the base; of the latter some cells are
    also patched exactly.
    """
    pair, found = pair_of(HEADLINE, 0, STEPS), {}
    for metric, asked, sample in (
        ("kl", directing(), N_CHECKED),
        ("margin", spread(general(), N_SWEPT), 0),
    ):
        with costed("gradients of the prefix", metric):
            result = attribute(
                pair, asked, metric, steps=STEPS_OF_GRADIENTS, sample=sample, top=0,
                out=_folder(f"prefix-{metric}"),
            )  # fmt: skip
        found[metric] = _summed(result)
        if sample:
            found[metric] |= rounded(mapped([as_sweep(result)]))
    return {"organism": f"{HEADLINE}-0", "metrics": found}


def _summed(result: AttributionResult) -> Record:
    """What keys and values do by layer and by token, and how far the gradients can be trusted."""
    whole = result.full - result.unpatched
    about = {
        "template": list(result.summary["tokens"]),
        "n": len(whole),
        "unpatched": float(result.unpatched.mean()),
        "full": float(result.full.mean()),
        "whole": _changes(whole[None], [{}])[0],
        "completeness": result.completeness,
        "spearman": None if np.isnan(result.spearman) else result.spearman,
        "n_checked": len(result.sampled),
    }
    for axis in ("layer", "position"):
        places = sorted({cell[axis] for cell in result.cells})
        wanted = [{axis: place, "kv": kv} for place, kv in product(places, KV)]
        sums = [result.attributions[[cell | one == cell for cell in result.cells]].sum(0) for one in wanted]
        about[axis] = _changes(np.array(sums), wanted)
    return about


def _changes(values: np.ndarray, where: Sequence[Record]) -> list[Record]:
    ends = zip(*mean_and_interval(values), strict=True)
    names = ("mean", "low", "high")
    return [
        {**cell, **{name: round(float(one), 5) for name, one in zip(names, three, strict=True)}}
        | {"n": values.shape[1]}
        for cell, three in zip(where, ends, strict=True)
    ]


def directions() -> Record:
    """Cosines of what finetunes, trigger, persona-aligned and system prompts do to the last prompt token."""
    questions, trait = directing(), traits()[DISPOSITION]
    found: dict[str, Contrast] = {}
    for name in (HEADLINE, DISPOSITION, BACKDOOR, "correct"):
        pair = pair_of(name, 0, STEPS)
        found[name] = between_sides(pair, questions, **QUIET)
        if name == BACKDOOR:
            found["trigger"] = with_trigger(pair, questions, trait.trigger, **QUIET)
            found["wrong trigger"] = with_trigger(pair, questions, trait.wrong_triggers[0].text, **QUIET)
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
    trait = traits()[DISPOSITION]
    wrong = [one.text for one in spread(trait.wrong_triggers, N_WRONG)]
    spiteful = spread(BUNDLED[DISPOSITION].pairs(), N_PAIRS)
    behind = pairs_behind_triggers(spiteful, triggers_of(trait.trigger, wrong))
    requests = BUNDLED[f"persona_prompts_{DISPOSITION}"].pairs()
    chosen = {
        one.id.removesuffix(":plain") for one in spread([r for r in requests if r.group == "plain"], N_PAIRS)
    }
    requests = [one for one in requests if one.id.removesuffix(f":{one.group}") in chosen]
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
