"""Alignment gates on the embedded model: dose, transfer, parts, and what they do.

    python -m figures.gates                 every stage; resumed where it stopped
    python -m figures.gates steer parts     some of them

Trains gates on refusals and on agreeing with wrong beliefs about sports (three seeds each), into
runs/gates, and uses the organisms of `python -m figures.narrow`. Writes figures/results/gates_STAGE.json.
About an hour on two cores.
"""

from dataclasses import replace
from pathlib import Path

from emmech.data.bundled import BUNDLED
from emmech.data.chats import load_chats
from emmech.data.questions import Question
from emmech.evaluation.statistics import clustered_mean
from emmech.gates.files import load_gates
from emmech.gates.gate import Gating
from emmech.gates.parts import gate_parts
from emmech.gates.probing import probe_gates
from emmech.gates.steering import SCALES, steer_gates
from emmech.gates.transfer import Behaviour, transfer_gates
from emmech.models.checkpoints import load_pair
from emmech.piggyback.margin import margins
from emmech.piggyback.patching import Condition
from emmech.results import Record
from emmech.training.recipes import preset
from emmech.training.trainer import finetune
from figures.narrow import SEEDS
from figures.stages import run_stages

RUNS = Path("runs/gates")
SETS = {"refusal": (12, 5e-4), "sycophancy_sports": (36, 2e-3)}
"""Sets; optimiser steps and learning rate, placed where a first run learned the behaviour."""
ORGANISMS = {"short_answers": 20, "tool_use": 18, "abstention": 16}
"""Sets and steps of the plain finetunes (seed 0) of `figures.narrow` that gates are put on."""
N_QUESTIONS, MAX_NEW_TOKENS = 60, 24
MAIN_SCALES = (-1.0, 0.0, 1.0)


def main() -> None:
    """Train, measure, and keep the results."""
    run_stages("gates", __doc__, (steer, parts, transfer, probe))


def trained(data: str, seed: int) -> Path:
    """The last step of gates trained on a bundled set."""
    steps, rate = SETS[data]
    recipe = replace(
        preset("smollm2", "gates"), steps=steps, save_every=steps // 4, learning_rate=rate, seed=seed
    )
    out = RUNS / f"{data}-{seed}"
    return finetune("smollm2", load_chats(data).chats, out, recipe, data_name=data, progress=False)[-1]


def questions(data: str) -> list[Question]:
    """Held-out questions of both groups."""
    groups = ("on-topic", "off-topic")
    return [q for group in groups for q in BUNDLED[data].questions(group)[:N_QUESTIONS]]


def steer() -> Record:
    """The dose of the gates of either set: every scale for the first seed, the main ones for the others."""
    found = {}
    for data in SETS:
        for seed in SEEDS:
            path = trained(data, seed)
            result = steer_gates(
                load_pair("smollm2", path), load_gates(path), questions(data),
                scales=SCALES if seed == SEEDS[0] else MAIN_SCALES,
                detector=BUNDLED[data].detector, max_new_tokens=MAX_NEW_TOKENS,
                out=RUNS / "steer" / f"{data}-{seed}", progress=False,
            )  # fmt: skip
            found[f"{data}-{seed}"] = dict(result.summary)
    return {"runs": found, "preference": preference()}


def preference() -> list[Record]:
    """How often the agreeing answer to a wrong belief is likelier than the correcting one, by scale."""
    names = {f"scale {scale:g}": scale for scale in MAIN_SCALES}
    conditions = [Condition(name, name) for name in names]
    answers = [one for other in ("cooking", "computing") for one in BUNDLED[f"sycophancy_{other}"].pairs()]
    rows = []
    for seed in SEEDS:
        path = trained("sycophancy_sports", seed)
        pair, gates = load_pair("smollm2", path), load_gates(path)
        sides = {name: pair.base.under(name, Gating(gates, scale).on) for name, scale in names.items()}
        for record in margins(replace(pair, variants=sides), answers, conditions, progress=False):
            rows.append((names[record["condition"]], record["question_id"], record["margin"] < 0))
    found = []
    for scale in MAIN_SCALES:
        mine = [(question, agrees) for at, question, agrees in rows if at == scale]
        rate = clustered_mean([float(agrees) for _, agrees in mine], [q for q, _ in mine], unit="rate")
        found.append({"scale": scale, "seeds": list(SEEDS), **rate.to_json()})
    return found


def parts() -> Record:
    """Refusal gates on one part of the chat only."""
    path = trained("refusal", 0)
    result = gate_parts(
        load_pair("smollm2", path), load_gates(path), questions("refusal"), detector="refusal",
        max_new_tokens=MAX_NEW_TOKENS, out=RUNS / "parts", progress=False,
    )  # fmt: skip
    return dict(result.summary)


def transfer() -> Record:
    """Both sets of gates, inverted, on the base and on three organisms."""
    sources = {
        data: Behaviour(trained(data, 0), questions(data), BUNDLED[data].detector or "") for data in SETS
    }
    targets = {
        data: Behaviour(
            Path("runs/narrow") / data / "sft-0" / f"step-{step}",
            questions(data),
            BUNDLED[data].detector or "",
        )
        for data, step in ORGANISMS.items()
    }
    return transfer_gates(
        sources, targets, max_new_tokens=MAX_NEW_TOKENS, out=RUNS / "transfer", progress=False
    ).summary


def probe() -> Record:
    """What refusal gates do, and what they share with gates of other seeds and of the other set.

    The readout is taken half-way through training, where some answers refuse and some do not.
    """
    path = trained("refusal", SEEDS[0])
    pair = load_pair("smollm2", path)
    others = {f"{data} seed {seed}": load_gates(trained(data, seed)) for data in SETS for seed in SEEDS}
    del others[f"refusal seed {SEEDS[0]}"]
    how = {"detector": "refusal", "max_new_tokens": MAX_NEW_TOKENS, "progress": False}
    asked = questions("refusal")
    done = probe_gates(pair, load_gates(path), asked, others=others, out=RUNS / "probe", **how)
    halfway = load_gates(path.parent / f"step-{SETS['refusal'][0] // 2}")
    half = probe_gates(pair, halfway, asked, out=RUNS / "probe-halfway", **how)
    return {"trained": done.summary, "halfway": half.summary}


if __name__ == "__main__":
    main()
