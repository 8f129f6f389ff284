"""How narrow does each method of finetuning stay? Behaviours, methods, three seeds; and variants of TReFT.

    python -m figures.narrow                        every study; resumed where it stopped
    python -m figures.narrow abstention --workers 2 one of them, two runs at a time

Trains on the embedded model into runs/narrow, evaluates saved steps on held-out on-topic and off-topic
questions, and writes figures/results/narrow_STUDY.json (what `emmech frontier` writes, without the
answers). A study takes about an hour on two cores.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from emmech.data.bundled import BUNDLED
from emmech.data.chats import load_chats
from emmech.frontier import FRONTIER, compare_runs
from emmech.results import read_json, write_json
from emmech.training.recipes import DEFAULT_OBJECTIVES, NEEDS_RETAIN, Objective, Recipe, label
from emmech.training.trainer import finetune

SEEDS = (0, 1, 2)
SAVE_EVERY, LEARNING_RATE = 2, 2e-4
N_QUESTIONS, MAX_NEW_TOKENS = 60, 12
RUNS, RESULTS = Path("runs/narrow"), Path("figures/results")
METHODS = tuple(DEFAULT_OBJECTIVES.values())
PROMPT = ("prefix", "query", "postfix")


@dataclass(frozen=True)
class Study:
    data: str
    steps: tuple[int, ...]
    """Evaluated steps, placed where a first run of sft learned the behaviour; the last ends the training."""
    objectives: tuple[Objective, ...] = METHODS


STUDIES = {
    "short_answers": Study("short_answers", (4, 6, 8, 10, 14, 20)),
    "abstention": Study("abstention", (6, 8, 10, 12, 16)),
    "tool_use": Study("tool_use", (8, 10, 12, 14, 18)),
    "refusal": Study("refusal", (8, 10, 12, 14, 18)),
    # Where does the behaviour go when the prefix is held? Stronger, elsewhere, everywhere.
    "treft": Study(
        "short_answers",
        (6, 8, 10, 14, 20),
        (
            Objective("sft"),
            Objective("treft", weight=10.0),
            Objective("treft", weight=300.0),
            Objective("treft", weight=30.0, segments=("postfix",), reference="own"),
            Objective("treft", weight=30.0, segments=PROMPT, reference="own"),
        ),
    ),
}


def main() -> None:
    """Train, evaluate, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", help=f"among {', '.join(STUDIES)}; all by default")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    chosen = parser.parse_args()
    names = chosen.studies or list(STUDIES)
    with ProcessPoolExecutor(chosen.workers, get_context("spawn"), share_threads, (chosen.workers,)) as pool:
        evaluations = []
        training = [pool.submit(train, *job) for job in jobs(names[0])]
        for name, following in zip(names, [*names[1:], None], strict=True):
            folders = [run.result() for run in training]
            evaluations.append(pool.submit(evaluate, name, folders))  # beside the training of the next
            training = [pool.submit(train, *job) for job in jobs(following)] if following else []
        for evaluation in evaluations:
            evaluation.result()


def jobs(name: str) -> list[tuple[str, int, Objective, int]]:
    """The runs of a study: data, last step, objective and seed."""
    study = STUDIES[name]
    return [(study.data, study.steps[-1], one, seed) for seed in SEEDS for one in study.objectives]


def train(data: str, last: int, objective: Objective, seed: int) -> Path:
    """One run; its folder."""
    out = RUNS / data / f"{label(asdict(objective)).replace(' ', '-')}-{seed}"
    recipe = Recipe(objective, steps=last, save_every=SAVE_EVERY, learning_rate=LEARNING_RATE, seed=seed)
    retain = load_chats("retain").chats if objective.name in NEEDS_RETAIN else ()
    finetune("smollm2", load_chats(data).chats, out, recipe, retain=retain, data_name=data, progress=False)
    return out


def evaluate(name: str, folders: Sequence[Path]) -> None:
    """The frontier of a study, kept under figures/results."""
    study = STUDIES[name]
    bundled = BUNDLED[study.data]
    groups = ("on-topic", "off-topic")
    questions = [question for group in groups for question in bundled.questions(group)[:N_QUESTIONS]]
    out = RUNS / "frontiers" / name
    compare_runs(
        folders,
        questions,
        detector=bundled.detector,
        out=out,
        steps=study.steps,
        patched="all" if name == "treft" else "sft",
        max_new_tokens=MAX_NEW_TOKENS,
    ).table()
    RESULTS.mkdir(exist_ok=True)
    command = f"python -m figures.narrow {name}"
    write_json(RESULTS / f"narrow_{name}.json", read_json(out / FRONTIER) | {"command": command})


def share_threads(workers: int) -> None:
    """Give each of several worker processes its part of torch's threads."""
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


if __name__ == "__main__":
    main()
