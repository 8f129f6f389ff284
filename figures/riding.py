"""Where in the prefix does a refusal ride? Layers, tokens, keys and values of two refusal organisms.

    python -m figures.riding                runs what is missing, then writes the results
    python -m figures.riding --results      only the results, of the parts there are

Organisms of the embedded model: 48 wordings of a refusal (`figures.narrow`, three training seeds, each
at its first evaluated step with an on-topic refusal rate of .9) and one wording (`make demo`). Of the
finetuned model, cells of the prefix cache become the base's, and 16 held-out off-topic questions are
scored: layers and tokens by themselves, from the bottom and from the top, all but one; every cell by its
gradient, and for one organism exactly; the smallest set. Runs into runs/riding, resumed where they
stopped; results in figures/results/sweep_refusal.json. About an hour on two free cores.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from emmech.data.bundled import BUNDLED, AnswerPair
from emmech.data.questions import Question
from emmech.evaluation.detectors import detector
from emmech.models.checkpoints import ModelPair, load_pair
from emmech.models.generation import Decoding
from emmech.piggyback.attribution import attribute
from emmech.piggyback.attribution_result import AttributionResult
from emmech.piggyback.cells import KV, Cell, Entries
from emmech.piggyback.experiment import PatchingResult, default_conditions, run_conditions
from emmech.piggyback.minimal_set import MinimalSet, minimal_set
from emmech.piggyback.replay import Replay
from emmech.piggyback.scores import find_metric
from emmech.piggyback.streaming import score_patches
from emmech.piggyback.sweep import sweep_kv
from emmech.piggyback.sweep_result import SweepResult
from emmech.results import Record, read_json, write_json
from emmech.training.recipes import Objective
from figures.grafting import constant
from figures.narrow import RESULTS, SEEDS, STUDIES, train

RUNS = Path("runs/riding")
LEARNED = 0.9
EVERY, N_QUESTIONS = 10, 16
"""Every tenth question of the set, which is ordered by topic."""
MAX_NEW_TOKENS = 12
SWEEPS = {
    "kl": (
        ("single", "kv"), ("single", "layer"), ("single", "position"),
        ("cumulative_up", "layer"), ("cumulative_down", "layer"),
        ("leave_one_out", "layer"), ("leave_one_out", "position"),
    ),
    "margin": (("single", "kv"), ("single", "layer"), ("single", "position")),
}  # fmt: skip
"""Mode and axis by metric; the first is there wherever anything is."""
FINE = ("layer", "position", "kv")
STEPS = {"kl": (1, 8), "margin": (8,)}
N_CHECKED, N_RANDOM = 60, 10
"""Cells patched beside gradients, and random sets."""
LAST = ("summary.json", "sweep.json", "attribution.json", "minimal.json", "sets.json")
QUIET = {"progress": False}
Result = TypeVar("Result")


@dataclass(frozen=True)
class Organism:
    kind: str
    seed: int
    adapter: Path

    @property
    def runs(self) -> Path:
        """Where its runs are."""
        return RUNS / f"{self.kind.replace(' ', '-')}-{self.seed}"


def main() -> None:
    """Run what is missing, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", action="store_true", help="run nothing")
    if not parser.parse_args().results:
        known = organisms()
        for part in PARTS:
            for organism in known:
                part(organism, known)
    from figures.riding_results import write_results

    write_results(RESULTS / "sweep_refusal.json")


def organisms() -> list[Organism]:
    """Three seeds of one kind and one of the other, trained where they are not yet."""
    found = []
    for seed in SEEDS:
        folder = train("refusal", STUDIES["refusal"].steps[-1], Objective("sft"), seed)
        found.append(Organism("48 wordings", seed, folder / f"step-{learned(seed)}"))
    return [*found, Organism("one wording", 0, constant())]


def learned(seed: int) -> int:
    """The first evaluated step of `figures.narrow` with an on-topic refusal rate of LEARNED."""
    methods = read_json(RESULTS / "narrow_refusal.json")["methods"]
    points = next(one["points"] for one in methods if one["method"] == "sft")
    return next(point["step"] for point in points if point["by_seed"][SEEDS.index(seed)][0] >= LEARNED)


def questions(*, fresh: bool = False) -> list[Question]:
    """Off-topic questions that no organism was trained on; others where nothing may be chosen on them."""
    return list(BUNDLED["refusal"].questions("off-topic")[EVERY // 2 * fresh :: EVERY][:N_QUESTIONS])


@lru_cache(maxsize=1)
def pair_of(organism: Organism) -> ModelPair:
    """Base and finetuned, one organism at a time."""
    return load_pair("smollm2", organism.adapter, dtype="float32")


def answers(organism: Organism) -> PatchingResult:
    """What the models say, and the finetuned one with the base's prefix K/V."""
    conditions = default_conditions(("prefix",), "repair", controls=False)
    return kept(
        organism.runs / "answers" / "summary.json",
        PatchingResult.load,
        lambda out: run_conditions(
            pair_of(organism), questions(), conditions, Decoding(MAX_NEW_TOKENS),
            kind="riding-answers", settings={}, detector="refusal", out=out, **QUIET,
        ),
    )  # fmt: skip


def own_answers(organism: Organism) -> list[AnswerPair]:
    """The base's answer against the finetuned model's refusal, where it refused."""
    refuses, said = detector("refusal"), {}
    for record in answers(organism).records:
        said[record["question_id"], record["condition"]] = record["response"]
    return [
        AnswerPair(one.id, one.messages[-1]["content"], said[one.id, "base"], said[one.id, "finetuned"])
        for one in questions()
        if refuses(said[one.id, "finetuned"]) and not refuses(said[one.id, "base"])
    ]


def asked(organism: Organism, metric: str) -> list[Any]:
    """What the metric is taken on."""
    return own_answers(organism) if metric == "margin" else questions()


def swept(organism: Organism, metric: str, mode: str, *over: str) -> SweepResult:
    """A sweep over some axes."""
    return kept(
        organism.runs / name_of(metric, mode, *over) / "sweep.json",
        SweepResult.load,
        lambda out: sweep_kv(
            pair_of(organism), asked(organism, metric), metric, over, mode=mode, out=out, **QUIET
        ),
    )


def name_of(metric: str, mode: str, *over: str) -> str:
    """The folder of a sweep."""
    return "-".join((metric, mode, *over))


def fine(organism: Organism) -> SweepResult:
    """Every layer, token, and keys or values, by itself."""
    return swept(organism, "kl", "single", *FINE)


def attributed(organism: Organism, metric: str, steps: int) -> AttributionResult:
    """The same from gradients; some cells are patched exactly beside those of most steps."""
    sample = N_CHECKED if steps == max(STEPS[metric]) else 0
    return kept(
        organism.runs / f"{metric}-gradients-{steps}" / "attribution.json",
        AttributionResult.load,
        lambda out: attribute(
            pair_of(organism), asked(organism, metric), metric, steps=steps, sample=sample, top=0, out=out,
            **QUIET,
        ),
    )  # fmt: skip


def smallest(organism: Organism, metric: str) -> MinimalSet:
    """The fewest cells that do 80% of what the whole prefix does, and random sets."""

    def make(out: Path) -> MinimalSet:
        found = minimal_set(pair_of(organism), asked(organism, metric), metric, n_random=N_RANDOM, **QUIET)
        found.save(out)
        return found

    return kept(organism.runs / f"{metric}-smallest" / "minimal.json", MinimalSet.load, make)


def elsewhere(organism: Organism, known: Sequence[Organism]) -> Record:
    """What the smallest sets of all organisms do to this one, on questions that none was chosen on."""

    def make(out: Path) -> Record:
        replay = Replay(pair_of(organism), questions(fresh=True), find_metric("kl"), "repair")
        sets = [Entries.of(cells_of(smallest(one, "kl")), replay.shape) for one in known]
        scored = score_patches(replay, sets, **QUIET)
        values = {name: getattr(scored, name).tolist() for name in ("unpatched", "full", "patched")}
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "sets.json", {"questions": replay.question_ids, **values})
        return read_json(out / "sets.json")

    return kept(organism.runs / "elsewhere" / "sets.json", lambda out: read_json(out / "sets.json"), make)


def cells_of(found: MinimalSet) -> list[Cell]:
    """The cells of a set."""
    return [
        Cell(layer=(one["layer"],), position=(one["position"],), kv=(KV.index(one["kv"]),))
        for one in found.cells
    ]


def kept(file: Path, load: Callable[[Path], Result], make: Callable[[Path], Result]) -> Result:
    """What is in a folder, made where its last file is not there."""
    return load(file.parent) if file.exists() else make(file.parent)


def first(organism: Organism, _: Sequence[Organism]) -> None:
    """What is said, and what keys and values do."""
    answers(organism), swept(organism, "kl", *SWEEPS["kl"][0])


def by_gradients(organism: Organism, _: Sequence[Organism]) -> None:
    """The map from gradients."""
    for steps in STEPS["kl"][::-1]:
        attributed(organism, "kl", steps)


def by_parts(organism: Organism, _: Sequence[Organism]) -> None:
    """Layers and tokens as wholes."""
    for sweep in SWEEPS["kl"]:
        swept(organism, "kl", *sweep)


def by_sets(organism: Organism, _: Sequence[Organism]) -> None:
    """The smallest set."""
    smallest(organism, "kl")


def by_margin(organism: Organism, _: Sequence[Organism]) -> None:
    """All of the metric ``margin``."""
    for sweep in SWEEPS["margin"]:
        swept(organism, "margin", *sweep)
    for steps in STEPS["margin"]:
        attributed(organism, "margin", steps)
    smallest(organism, "margin")


def by_cell(organism: Organism, known: Sequence[Organism]) -> None:
    """The fine sweep, which takes longest; one is enough to check gradients by."""
    if organism == known[0]:
        fine(organism)


PARTS = (first, by_gradients, by_parts, by_sets, elsewhere, by_margin, by_cell)
"""Each for all organisms before the next."""


def has(organism: Organism, *names: str) -> bool:
    """Whether all of these folders hold what their runs end with."""
    return all(any((organism.runs / name / last).exists() for last in LAST) for name in names)


if __name__ == "__main__":
    main()
