"""Margins of the battery for an organism's steps and treatments; each is measured once and kept.

shifts(margins("incorrect", 0, 40, {"prefix": "repair:prefix"}))
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from emmech.evaluation.statistics import bootstrap_means
from emmech.models.checkpoints import ModelPair, load_pair
from emmech.piggyback import margin
from emmech.results import Record, fingerprint, read_json, write_json
from emmech.scorecard import ALL, compared, with_conditions
from figures.claims.costs import RUNS, costed
from figures.claims.organisms import BASE, GENERAL, battery, trained

UNTREATED = ("base", "finetuned")
N_RESAMPLES = 10_000


@lru_cache(maxsize=1)
def pair_of(name: str, seed: int, step: int) -> ModelPair:
    """The base and an organism at a step; one pair is held at a time."""
    folder = trained(name, seed)[step]
    with costed("loading a pair", f"{name}-{seed} step {step}"):
        return load_pair(BASE, folder)


def margins(name: str, seed: int, step: int, treatments: Mapping[str, str] | None = None) -> list[Record]:
    """Margins of the base, of the finetuned model, and of what is made of it.

    Args:
        treatments: Names of ``with_conditions``, under the names that the records get.
    """
    wanted = {"finetuned": "finetuned", **(treatments or {})}
    folder = trained(name, seed)[step]
    return of_base(pair=lambda: pair_of(name, seed, step)) + _kept(
        folder.with_name(f"margins-{folder.name}"), wanted, lambda: pair_of(name, seed, step)
    )


def of_base(treatments: Mapping[str, str] | None = None, *, pair: Callable[[], ModelPair]) -> list[Record]:
    """Margins of the base, and of what is made of it; ``pair`` is any with this base."""
    return _kept(RUNS / "margins-base", {"base": "base", **(treatments or {})}, pair, finetuned=False)


def _kept(
    stem: Path, treatments: Mapping[str, str], pair: Callable[[], ModelPair], *, finetuned: bool = True
) -> list[Record]:
    """Records of some treatments; those that the file lacks are measured and added, one by one."""
    asked = battery()
    path = stem.with_name(f"{stem.name}-{fingerprint([asdict(one) for one in asked])[:8]}.json")
    kept = read_json(path) if path.exists() else {}
    for what in treatments.values():
        if what not in kept:
            treated, conditions = with_conditions(pair(), [what], finetuned=finetuned)
            with costed(f"margins of {len(asked)} pairs, one condition", f"{stem} {what}"):
                kept[what] = margin.margins(treated, asked, [one for one in conditions if one.name == what])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, kept)
    group = {one.id: one.group for one in asked}
    return [
        one | {"condition": name, "group": group[one["question_id"]]}
        for name, what in treatments.items()
        for one in kept[what]
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


def carried_over(records: Sequence[Record], own: str) -> Record:
    """The change of general margins as a share of the change in the finetune's ``own`` group."""
    base = {one["question_id"]: one["margin"] for one in records if one["condition"] == "base"}
    means, resampled = [], []
    for seed, group in enumerate((GENERAL, own)):
        mine = [one for one in records if (one["condition"], one["group"]) == ("finetuned", group)]
        changes = [one["margin"] - base[one["question_id"]] for one in mine]
        means.append(np.mean(changes))
        ids = [one["question_id"] for one in mine]
        resampled.append(bootstrap_means(changes, ids, seed=seed, n_resamples=N_RESAMPLES))
    low, high = np.quantile(resampled[0] / resampled[1], [0.025, 0.975])
    ends = {"mean": float(means[0] / means[1]), "low": float(low), "high": float(high)}
    about = {"metric": "carried over", "unit": "share", "group": GENERAL, "condition": "finetuned"}
    return short(about | ends | {"n_clusters": len(set(ids))})


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
