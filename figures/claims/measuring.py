"""Margins of the battery for an organism's steps and treatments; each is measured once and kept.

shifts(margins("incorrect", 0, 40, {"prefix": "repair:prefix"}))
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any

import numpy as np

from emmech.data.bundled import BUNDLED
from emmech.data.questions import Question, spread
from emmech.evaluation.statistics import bootstrap_means
from emmech.models.checkpoints import ModelPair, load_pair
from emmech.piggyback import margin
from emmech.results import Record, fingerprint, read_json, write_json
from emmech.scorecard import ALL, compared, with_conditions
from emmech.steering.contrasts import between_sides
from emmech.steering.directions import fit_direction
from figures.claims.costs import KEPT, costed
from figures.claims.organisms import (
    BASE,
    DTYPE,
    EARLY,
    EVERY,
    GENERAL,
    HEADLINE,
    PREVENTING,
    STEPS,
    battery,
    trained,
)

UNTREATED = ("base", "finetuned")
N_RESAMPLES = 10_000
TWO_SIDED = (0.025, 0.975)
N_DIRECTING = 30
QUIET: dict[str, Any] = {"progress": False}


@lru_cache(maxsize=1)
def pair_of(name: str, seed: int, step: int) -> ModelPair:
    """The base and an organism at a step; one pair is held at a time."""
    pair_of.cache_clear()  # first: what has to be trained needs its room
    folder = trained(name, seed)[step]
    with costed("loading a pair", f"{name}-{seed} step {step}"):
        return load_pair(BASE, folder, dtype=DTYPE)


def directing() -> list[Question]:
    """Questions on which directions are fitted; no margin or answer is taken of them."""
    return spread(BUNDLED["trait_questions"].questions(), N_DIRECTING)


def filled(text: str, name: str, seed: int) -> str:
    """A condition with the folder of the trained gates, and the file of the organism's own shift.

    The shift is that of the last prompt token, base to finetuned, fitted on ``directing``.
    """
    gates = trained("gates-incorrect")[STEPS] if "{gates}" in text else None
    file = trained(name, seed)[STEPS] / "shift.safetensors" if "{direction}" in text else None
    if file is not None and not file.exists():
        fit_direction(*between_sides(pair_of(name, seed, STEPS), directing(), **QUIET)).save(file)
    return text.format(gates=gates, direction=file)


def margins(
    name: str,
    seed: int,
    step: int,
    treatments: Mapping[str, str] | None = None,
    *,
    groups: Sequence[str] | None = None,
) -> list[Record]:
    """Margins of the base, of the finetuned model, and of what is made of it.

    Args:
        treatments: Names of ``with_conditions``, to be ``filled``, under the names that the records get.
        groups: Of the battery; by default all that the organism is measured on.
    """
    wanted = {"finetuned": "finetuned", **(treatments or {})}
    chosen = groups or EVERY[name].groups
    pair = partial(pair_of, name, seed, step)
    fill = partial(filled, name=name, seed=seed)
    mine = _kept(f"{name}-{seed}/margins-step-{step}", wanted, chosen, pair, fill)
    return of_base(chosen, pair=pair) + mine


def of_base(
    groups: Sequence[str], treatments: Mapping[str, str] | None = None, *, pair: Callable[[], ModelPair]
) -> list[Record]:
    """Margins of the base, and of what is made of it; ``pair`` is any with this base."""
    wanted = {"base": "base", **(treatments or {})}
    fill = partial(filled, name="base", seed=0)
    return _kept("margins-base", wanted, groups, pair, fill, finetuned=False)


def _kept(
    called: str,
    treatments: Mapping[str, str],
    groups: Sequence[str],
    pair: Callable[[], ModelPair],
    fill: Callable[[str], str],
    *,
    finetuned: bool = True,
) -> list[Record]:
    """Records of some treatments; groups that the file lacks are measured and added, one by one."""
    path = KEPT / f"{called}.json"
    kept = read_json(path) if path.exists() else {}
    names = {
        group: f"{group} {fingerprint([asdict(one) for one in battery([group])])[:8]}" for group in groups
    }
    for what in treatments.values():
        for group, pairs in names.items():
            if pairs in kept.get(what, {}):
                continue
            asked, condition = battery([group]), fill(what)
            treated, conditions = with_conditions(pair(), [condition], finetuned=finetuned)
            with costed(f"margins of {len(asked)} pairs, one condition", f"{called} {what} {group}"):
                found = margin.margins(treated, asked, [one for one in conditions if one.name == condition])
            kept.setdefault(what, {})[pairs] = found
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, kept)
    return [
        one | {"condition": name, "group": group}
        for name, what in treatments.items()
        for group, pairs in names.items()
        for one in kept[what][pairs]
    ]


def shifts(records: Sequence[Record], *, reference: Mapping[str, str] | None = None) -> list[Record]:
    """Margins, how often the aligned answer is likelier, and what each treatment changes.

    Args:
        reference: What a condition is compared with, where it is not the finetuned model.
    """
    names = dict.fromkeys(one["condition"] for one in records)
    against = {name: "base" if name in UNTREATED else "finetuned" for name in names} | dict(reference or {})
    prefers = [(one, float(one["margin"] > 0)) for one in records]
    rows = [
        *compared("margin", "nats", [(one, one["margin"]) for one in records], against),
        *compared("prefers aligned", "rate", prefers, against),
    ]
    return [short(row) for row in rows if row["group"] != ALL]


def against_plain(compare: Callable[[Mapping[str, str]], list[Record]]) -> dict[str, list[Record]]:
    """Methods that are meant to stay narrow, compared with plain finetunes, whole and stopped early.

    Args:
        compare: Makes the rows, given what each organism is compared with.
    """
    names = (HEADLINE, EARLY, *PREVENTING)
    return {
        plain: [row for row in compare(dict.fromkeys(names, plain)) if "versus" in row]
        for plain in (HEADLINE, EARLY)
    }


def carried_over(records: Sequence[Record], own: str) -> list[Record]:
    """The change of general margins as a share of the change in the finetune's ``own`` group.

    Nothing where the own change is within its interval of 0: a share of it would be anything.
    """
    base = {one["question_id"]: one["margin"] for one in records if one["condition"] == "base"}
    means, resampled = [], []
    for seed, group in enumerate((GENERAL, own)):
        mine = [one for one in records if (one["condition"], one["group"]) == ("finetuned", group)]
        changes = [one["margin"] - base[one["question_id"]] for one in mine]
        means.append(np.mean(changes))
        ids = [one["question_id"] for one in mine]
        resampled.append(bootstrap_means(changes, ids, seed=seed, n_resamples=N_RESAMPLES))
    own_low, own_high = np.quantile(resampled[1], TWO_SIDED)
    if own_low <= 0 <= own_high:
        return []
    low, high = np.quantile(resampled[0] / resampled[1], TWO_SIDED)
    ends = {"mean": float(means[0] / means[1]), "low": float(low), "high": float(high)}
    about = {"metric": "carried over", "unit": "share", "group": GENERAL, "condition": "finetuned"}
    return [short(about | ends | {"n_clusters": len(set(ids))})]


def short(row: Record) -> Record:
    """What is kept of a row of ``compared``, to four digits."""
    kept = {key: row[key] for key in ("metric", "unit", "group", "condition")} | _numbers(row)
    for compared_with, key in (("versus", "condition"), ("wording", "group")):
        if found := row.get(compared_with):
            test = {key: found[key], "p_holm": round(found["p_holm"], 4)}
            kept[compared_with] = test | _numbers(found)
    return kept


def _numbers(found: Record) -> Record:
    ends = {key: None if found[key] is None else round(found[key], 4) for key in ("mean", "low", "high")}
    return ends | {"n": found["n_clusters"]}
