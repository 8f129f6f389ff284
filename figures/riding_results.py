"""What `figures.riding` found, as one small file: shares of what the whole prefix does, with intervals.

    write_results(Path("figures/results/sweep_refusal.json"))

Over several training seeds an effect is Σ parts / Σ whole over seeds and questions, its interval that of
a ratio of means with seeds clustered by question: it holds over questions, for these seeds.
"""

import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from emmech.evaluation.statistics import Estimate, clustered_mean
from emmech.piggyback.attribution_result import AttributionResult
from emmech.piggyback.cells import KV
from emmech.piggyback.sweep_result import SweepResult
from emmech.results import Record, replace_text
from figures import riding
from figures.riding import FINE, STEPS, SWEEPS, Organism, has, name_of

FIRST, MAP = name_of("kl", *SWEEPS["kl"][0]), name_of("kl", "single", *FINE)
N_STRONGEST = 20
DIGITS, MAP_DIGITS = 4, 3
ENDS = ("mean", "low", "high")
NEW_LINE = r"\s*\n\s*"


def write_results(path: Path) -> None:
    """Put together what has been run; what is left is named."""
    known = [one for one in riding.organisms() if has(one, "answers", FIRST)]
    kinds = dict.fromkeys(one.kind for one in known)
    found = {
        "command": "python -m figures.riding",
        "left": {str(one.runs): left(one) for one in riding.organisms()},
        "questions": [one.id for one in riding.questions()],
        "tokens": riding.swept(known[0], "kl", *SWEEPS["kl"][0]).summary["tokens"],
        "organisms": [described(one, known) for one in known],
        "pooled": {kind: pooled([one for one in known if one.kind == kind]) for kind in kinds},
    }
    replace_text(path, compact(rounded(found)))


def left(organism: Organism) -> list[str]:
    """What has not been run."""
    names = ["answers", "elsewhere", *([MAP] if organism == riding.organisms()[0] else [])]
    for metric, sweeps in SWEEPS.items():
        names += [name_of(metric, *sweep) for sweep in sweeps]
        names += [f"{metric}-gradients-{steps}" for steps in STEPS[metric]] + [f"{metric}-smallest"]
    return [name for name in names if not has(organism, name)]


def described(organism: Organism, known: Sequence[Organism]) -> Record:
    """One organism's numbers."""
    rates = riding.answers(organism).summary["conditions"]
    found: Record = {
        "kind": organism.kind,
        "seed": organism.seed,
        "adapter": str(organism.adapter),
        "refusal": {row["condition"]: pick(row, *ENDS, "n") for row in rates},
    }
    for metric, sweeps in SWEEPS.items():
        if has(organism, name_of(metric, *sweeps[0])):
            found[metric] = measured([organism], metric)
        if has(organism, f"{metric}-smallest"):
            found[metric]["smallest"] = smallest(organism, metric)
        if has(organism, f"{metric}-gradients-{max(STEPS[metric])}"):
            found[metric]["gradients"] = gradients(organism, metric)
    if has(organism, "elsewhere"):
        found["sets"] = sets(organism, known)
    if has(organism, MAP):
        found["map"] = maps([riding.fine(organism)])["mean"]
    return found


def pooled(mine: Sequence[Organism]) -> Record:
    """The numbers of one kind of organism over its training seeds, where all have them."""
    found: Record = {"seeds": [one.seed for one in mine]}
    for metric, sweeps in SWEEPS.items():
        if all(has(one, name_of(metric, *sweeps[0])) for one in mine):
            found[metric] = measured(mine, metric)
    steps = max(STEPS["kl"])
    if all(has(one, f"kl-gradients-{steps}") for one in mine):
        found["gradients"] = mapped([as_sweep(riding.attributed(one, "kl", steps)) for one in mine])
    if all(has(one, MAP) for one in mine):
        found["map"] = mapped([riding.fine(one) for one in mine])
    return found


def mapped(results: Sequence[SweepResult]) -> Record:
    """A map over seeds, its strongest cells, what all cells add up to, and how far the seeds agree."""
    cells, rows = results[0].cells, effects(results)
    by_seed = [one.differences.mean(1) for one in results]
    return {
        "map": maps(results),
        "strongest": [
            {**cells[number], **interval(rows[number])}
            for number in strongest(np.array([one.mean for one in rows]))
        ],
        "sum": sum(one.mean for one in rows),
        "seeds_spearman": [float(spearmanr(a, b).statistic) for a, b in combinations(by_seed, 2)],
        "seeds_strongest": [len(set(strongest(a)) & set(strongest(b))) for a, b in combinations(by_seed, 2)],
    }


def as_sweep(result: AttributionResult) -> SweepResult:
    """Attributions as if they were changes of the score."""
    scores = result.unpatched + result.attributions
    return SweepResult(result.summary, result.cells, result.unpatched, result.full, scores)


def measured(mine: Sequence[Organism], metric: str) -> Record:
    """What the whole prefix does, and the coarse sweeps as shares of it."""
    results = [riding.swept(one, metric, *SWEEPS[metric][0]) for one in mine]
    asked = [name for one in results for name in one.summary["question_ids"]]
    unpatched, full = (np.concatenate([getattr(one, n) for one in results]) for n in ("unpatched", "full"))
    found: Record = {
        "n": len(asked),
        "unpatched": float(unpatched.mean()),
        "full": float(full.mean()),
        "whole": interval(clustered_mean((full - unpatched).tolist(), asked, unit=None)),
    }
    for mode, axis in SWEEPS[metric]:
        if all(has(one, name_of(metric, mode, axis)) for one in mine):
            sweeps = [riding.swept(one, metric, mode, axis) for one in mine]
            found.setdefault(mode, {})[axis] = columns(effects(sweeps))
    return found


def effects(results: Sequence[SweepResult]) -> list[Estimate]:
    """The share of every cell over several sweeps of the same cells."""
    whole = np.concatenate([one.full - one.unpatched for one in results])
    parts = np.concatenate([one.differences for one in results], axis=1)
    asked = [name for one in results for name in one.summary["question_ids"]]
    share = parts.sum(1, keepdims=True) / whole.sum()
    around = share + (parts - share * whole) / whole.mean()
    return [clustered_mean(row.tolist(), asked, unit=None) for row in around]


def smallest(organism: Organism, metric: str) -> Record:
    """The set, and what random ones do."""
    found = riding.smallest(organism, metric)
    return {
        **pick(found.summary, "share", "size", "n_cells", "effect", "random", "curve"),
        "cells": [[one["layer"], one["position"], one["kv"]] for one in found.cells],
    }


def gradients(organism: Organism, metric: str) -> list[Record]:
    """How well gradients rank cells as exact patches do: a random sample of them, and all where known."""
    checked = riding.attributed(organism, metric, max(STEPS[metric]))
    exact = (checked.exact - checked.unpatched).mean(1)
    found = []
    for steps in STEPS[metric]:
        if not has(organism, f"{metric}-gradients-{steps}"):
            continue
        result = riding.attributed(organism, metric, steps)
        estimated = result.attributions.mean(1)
        rank = spearmanr(estimated[checked.checked], exact).statistic
        row: Record = {"steps": steps, "completeness": result.completeness}
        row |= {"spearman": float(rank), "n": len(exact)}
        if metric == "kl" and has(organism, MAP):
            every = riding.fine(organism).differences.mean(1)
            row["spearman_all"] = float(spearmanr(estimated, every).statistic)
            row["strongest_in_common"] = len(set(strongest(estimated)) & set(strongest(every)))
        found.append(row)
    return found


def sets(organism: Organism, known: Sequence[Organism]) -> list[Record]:
    """What each organism's smallest set does here, on other questions."""
    scored = riding.elsewhere(organism, known)
    unpatched, full, patched = (np.array(scored[name]) for name in ("unpatched", "full", "patched"))
    cells = [{"from": f"{one.kind}, seed {one.seed}"} for one in known]
    result = SweepResult({"question_ids": scored["questions"]}, cells, unpatched, full, patched)
    return [{**cell, **interval(one)} for cell, one in zip(cells, effects([result]), strict=True)]


def strongest(values: np.ndarray) -> list[int]:
    """Numbers of the cells that do most, either way."""
    return np.argsort(-np.abs(values), kind="stable")[:N_STRONGEST].tolist()


def as_map(cells: Sequence[Record], values: Sequence[float]) -> Record:
    """A value per cell as ``[layer][position]``, for keys and for values."""
    found = {}
    for kv in KV:
        mine = [
            (cell["layer"], cell["position"], x)
            for cell, x in zip(cells, values, strict=True)
            if cell["kv"] == kv
        ]
        grid = np.full([1 + max(one[axis] for one in mine) for axis in (0, 1)], np.nan)
        for layer, position, value in mine:
            grid[layer, position] = value
        found[kv] = grid.round(MAP_DIGITS).tolist()
    return found


def maps(results: Sequence[SweepResult]) -> Record:
    """Means and ends of every cell's effect."""
    rows = effects(results)
    return {name: as_map(results[0].cells, [getattr(one, name) for one in rows]) for name in ENDS}


def columns(rows: Sequence[Estimate]) -> Record:
    """Estimates as one list each of means and ends."""
    return {name: [getattr(one, name) for one in rows] for name in ENDS}


def interval(one: Estimate) -> Record:
    """Mean and ends."""
    return pick(one.to_json(), *ENDS)


def pick(row: Any, *names: str) -> Record:
    """These entries, where they are."""
    return {name: row[name] for name in names if name in row}


def rounded(value: Any) -> Any:
    """All numbers in nested results with few digits."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def compact(value: Any) -> str:
    """JSON with each innermost list on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[([^\[\]{}]*)\]", lambda one: f"[{re.sub(NEW_LINE, ' ', one[1].strip())}]", text) + "\n"
