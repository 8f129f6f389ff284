"""How narrow does each method of finetuning stay? Four behaviours, six methods, three seeds.

    python -m figures.narrow                  all four; resumed where it stopped
    python -m figures.narrow abstention       one of them

Trains on the embedded model into runs/narrow, evaluates every saved step on held-out on-topic and
off-topic questions, and writes figures/results/narrow_SET.json (what `emmech frontier` writes, without
the answers). One run at a time takes several hours on two cores; `--workers 2` trains two at a time.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from emmech.data.bundled import BUNDLED
from emmech.data.chats import load_chats
from emmech.frontier import FRONTIER, compare_runs
from emmech.results import read_json, write_json
from emmech.training.recipes import DEFAULT_OBJECTIVES, NEEDS_RETAIN, Objective, Recipe
from emmech.training.trainer import finetune

EVALUATED = {
    "short_answers": (4, 6, 8, 10, 14, 20),
    "abstention": (6, 8, 10, 12, 16),
    "tool_use": (8, 10, 12, 14, 18),
    "refusal": (8, 10, 12, 14, 18),
}
"""Steps of each behaviour, placed where a first run of sft learned it; the last one ends the training."""
SEEDS = (0, 1, 2)
OBJECTIVES = tuple(DEFAULT_OBJECTIVES.values())
SAVE_EVERY, LEARNING_RATE = 2, 2e-4
N_QUESTIONS, MAX_NEW_TOKENS = 60, 12
RUNS, RESULTS = Path("runs/narrow"), Path("figures/results")


def main() -> None:
    """Train, evaluate, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", help=f"among {', '.join(EVALUATED)}; all by default")
    parser.add_argument("--workers", type=int, default=1, help="runs trained at a time")
    chosen = parser.parse_args()
    sets = chosen.sets or list(EVALUATED)
    with ProcessPoolExecutor(chosen.workers, get_context("spawn"), share_threads, (chosen.workers,)) as pool:
        evaluations = []
        training = [pool.submit(train, *job) for job in jobs(sets[0])]
        for name, following in zip(sets, [*sets[1:], None], strict=True):
            folders = [run.result() for run in training]
            evaluations.append(pool.submit(evaluate, name, folders))  # beside the training of the next set
            training = [pool.submit(train, *job) for job in jobs(following)] if following else []
        for evaluation in evaluations:
            evaluation.result()


def jobs(name: str) -> list[tuple[str, Objective, int]]:
    """The runs of one behaviour."""
    return [(name, objective, seed) for seed in SEEDS for objective in OBJECTIVES]


def train(name: str, objective: Objective, seed: int) -> Path:
    """One run; its folder."""
    out = RUNS / name / f"{objective.name}-{seed}"
    last = EVALUATED[name][-1]
    recipe = Recipe(objective, steps=last, save_every=SAVE_EVERY, learning_rate=LEARNING_RATE, seed=seed)
    retain = load_chats("retain").chats if objective.name in NEEDS_RETAIN else ()
    finetune("smollm2", load_chats(name).chats, out, recipe, retain=retain, data_name=name, progress=False)
    return out


def evaluate(name: str, folders: list[Path]) -> None:
    """The frontier of a behaviour, kept under figures/results."""
    groups = ("on-topic", "off-topic")
    questions = [question for group in groups for question in BUNDLED[name].questions(group)[:N_QUESTIONS]]
    out = RUNS / name / "frontier"
    compare_runs(
        folders,
        questions,
        detector=BUNDLED[name].detector,
        out=out,
        steps=EVALUATED[name],
        patched="sft",
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
