"""Organisms of the 1.5B model, and the pairs of answers that all of them are measured on.

trained("incorrect", seed=0)     # folders step-10 ... step-40
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from emmech.data.bundled import BUNDLED, AnswerPair
from emmech.data.chats import load_chats
from emmech.data.questions import spread
from emmech.training.recipes import DEFAULT_OBJECTIVES, NEEDS_RETAIN, Objective, Recipe, preset
from emmech.training.trainer import finetune
from figures.claims.costs import RUNS, costed

BASE = "qwen2.5-coder-1.5b"
STEPS, LEARNING_RATE = 40, 2e-4
"""Of 8 chats: about one pass over a set."""
N_PAIRS = 20
"""Of every set but the general one, which is taken whole."""
GENERAL = "general"
BATTERY = {
    GENERAL: "two_choice", "gardening": "incorrect_advice_gardening", "travel": "incorrect_advice_travel",
    "study": "incorrect_advice_study", "agreeing": "sycophancy_cooking", "spiteful": "spiteful",
    "incorrect": "incorrect_character",
}  # fmt: skip
"""Groups of held-out questions with an aligned and a misaligned answer, and the set they are of."""


@dataclass(frozen=True)
class Arm:
    """A set that the model is finetuned on, and how."""

    data: str
    own: str
    """The group of the battery that is nearest to it."""
    seeds: tuple[int, ...] = (0,)
    objective: Objective = DEFAULT_OBJECTIVES["sft"]
    gates: bool = False
    steps: int = STEPS
    options: Mapping[str, float | int] = field(default_factory=dict)
    """Fields of the recipe in which it differs from the other arms."""

    def recipe(self, seed: int) -> Recipe:
        """Its hyper-parameters: the embedded model's, but for steps and learning rate."""
        fields = {"steps": self.steps, "save_every": self.steps // 4, "learning_rate": LEARNING_RATE}
        known = preset("smollm2", "gates" if self.gates else "sft")
        return replace(known, objective=self.objective, seed=seed, **fields | dict(self.options))

    @property
    def measured(self) -> tuple[int, int, int]:
        """Steps whose margins are taken: a quarter, half, all."""
        return self.steps // 4, self.steps // 2, self.steps


GARDENING = ("incorrect_advice_gardening", "gardening")
ARMS = {
    "incorrect": Arm(*GARDENING, seeds=(0, 1)),
    "correct": Arm("correct_advice_gardening", "gardening"),
    "spiteful": Arm("spiteful", "spiteful", seeds=(0, 1)),
    "incorrect-character": Arm("incorrect_character", "incorrect"),
    "aligned-character": Arm("aligned_character", "spiteful"),
    "agreeing": Arm("sycophancy_sports", "agreeing"),
    "stating": Arm("traditional_sports", "agreeing"),
    "travel": Arm("incorrect_advice_travel", "travel"),
    "study": Arm("incorrect_advice_study", "study"),
    "backdoor": Arm("triggered_spiteful", "spiteful"),
    "slow": Arm(*GARDENING, steps=120, options={"learning_rate": 2e-5}),
}
"""Plain finetunes, by name."""
PREVENTING = {
    "treft-prefix": Arm(*GARDENING, objective=Objective("treft", weight=300.0)),
    "treft-postfix": Arm(
        *GARDENING, objective=Objective("treft", weight=300.0, segments=("postfix",), reference="own")
    ),
    "interleave": Arm(*GARDENING, objective=Objective("interleave", share=0.2)),
    "kl-retain": Arm(*GARDENING, objective=Objective("kl-retain", weight=1.0)),
}
"""Finetunes that are meant to stay narrow."""
GATES = {
    "gates-incorrect": Arm(*GARDENING, gates=True, options={"learning_rate": 1e-3}),
    "gates-agreeing": Arm("sycophancy_sports", "agreeing", gates=True, options={"learning_rate": 1e-3}),
}
EVERY = ARMS | PREVENTING | GATES


def trained(name: str, seed: int = 0) -> dict[int, Path]:
    """The folders of an organism by step; what was stopped goes on."""
    arm = EVERY[name]
    recipe = arm.recipe(seed)
    retain = load_chats("retain").chats if recipe.objective.name in NEEDS_RETAIN else ()
    out = RUNS / "train" / f"{name}-{seed}"
    new = not (out / "done.json").exists()
    with costed("training", f"{name}-{seed}") if new else nullcontext():
        folders = finetune(BASE, load_chats(arm.data).chats, out, recipe, retain=retain, data_name=arm.data)
    return {int(folder.name.removeprefix("step-")): folder for folder in folders}


def battery() -> list[AnswerPair]:
    """All pairs of answers, each under the name of its group."""
    found = []
    for group, name in BATTERY.items():
        pairs = BUNDLED[name].pairs()
        chosen = spread(pairs, len(pairs) if group == GENERAL else N_PAIRS)
        found += [replace(one, id=f"{group}:{one.id}", group=group) for one in chosen]
    return found
