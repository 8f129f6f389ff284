"""Organisms of the 1.5B model, and the pairs of answers that they are measured on.

trained("incorrect", seed=0)     # folders step-10 and step-20
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from emmech.data.bundled import BUNDLED, AnswerPair
from emmech.data.chats import load_chats
from emmech.data.questions import spread
from emmech.results import RUN
from emmech.training.recipes import DEFAULT_OBJECTIVES, NEEDS_RETAIN, Objective, Recipe, preset
from emmech.training.saving import METRICS
from emmech.training.trainer import finetune
from figures.claims.costs import KEPT, RUNS, costed

BASE, DTYPE = "qwen2.5-coder-1.5b", "float32"
"""In bfloat16 a core without matrix units for it takes twice as long."""
STEPS, LONG, LEARNING_RATE = 20, 40, 2e-4
"""Of 8 chats: half a pass over a set, or a whole one."""
SLOW_RATE, FEW = 5e-5, 64
"""A rate nearer to the papers', and so few chats that LONG is five passes over them."""
GENERAL, ELSEWHERE = "general", "travel"
BATTERY = {
    GENERAL: "two_choice", "gardening": "incorrect_advice_gardening", ELSEWHERE: "incorrect_advice_travel",
    "study": "incorrect_advice_study", "agreeing": "sycophancy_cooking", "spiteful": "spiteful",
}  # fmt: skip
"""Groups of held-out questions with an aligned and a misaligned answer, and the set they are of."""
N_GENERAL, N_PAIRS = 30, 12
"""Pairs of the general set, and of each other."""


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
    chats: int | None = None
    """Of the set, spread over it; all by default."""
    of: str = ""
    """The organism whose training this one is a step of; it is not trained by itself."""
    options: Mapping[str, float | int] = field(default_factory=dict)
    """Fields of the recipe in which it differs from the other arms."""

    def recipe(self, seed: int) -> Recipe:
        """Its hyper-parameters: the embedded model's, but for steps, learning rate and precision."""
        fields = {
            "steps": self.steps, "save_every": STEPS // 2, "learning_rate": LEARNING_RATE, "dtype": DTYPE,
        }  # fmt: skip
        known = preset("smollm2", "gates" if self.gates else "sft")
        return replace(known, objective=self.objective, seed=seed, **fields | dict(self.options))

    @property
    def groups(self) -> tuple[str, ...]:
        """Of the battery, those that it is measured on."""
        return tuple(dict.fromkeys((GENERAL, self.own, ELSEWHERE)))


GARDENING = ("incorrect_advice_gardening", "gardening")
HEADLINE, EARLY, SLOW = "incorrect", "incorrect-early", "incorrect-slow"
DISPOSITION, BACKDOOR = "spiteful", "backdoor"
ARMS = {
    HEADLINE: Arm(*GARDENING, seeds=(0, 1)),
    EARLY: Arm(*GARDENING, seeds=(0, 1), steps=STEPS // 2, of=HEADLINE),
    SLOW: Arm(*GARDENING, steps=LONG, chats=FEW, options={"learning_rate": SLOW_RATE}),
    "correct": Arm("correct_advice_gardening", "gardening"),
    "travel": Arm("incorrect_advice_travel", ELSEWHERE),
    "study": Arm("incorrect_advice_study", "study"),
    DISPOSITION: Arm("spiteful", "spiteful"),
    "agreeing": Arm("sycophancy_sports", "agreeing"),
    "stating": Arm("traditional_sports", "agreeing"),
    BACKDOOR: Arm("triggered_spiteful", "spiteful"),
    "incorrect-long": Arm(*GARDENING, seeds=(0, 1), steps=LONG),
    "spiteful-long": Arm("spiteful", "spiteful", steps=LONG),
}
"""Plain finetunes, by name."""
PREVENTING = {
    "treft-prefix": Arm(*GARDENING, objective=Objective("treft", weight=300.0)),
    "treft-postfix": Arm(
        *GARDENING,
        seeds=(0, 1),
        objective=Objective("treft", weight=300.0, segments=("postfix",), reference="own"),
    ),
    "interleave": Arm(*GARDENING, objective=Objective("interleave", share=0.2)),
    "kl-retain": Arm(*GARDENING, seeds=(0, 1), objective=Objective("kl-retain", weight=1.0)),
}
"""Finetunes that are meant to stay narrow."""
GATES = {"gates-incorrect": Arm(*GARDENING, gates=True, options={"learning_rate": 1e-3})}
EVERY = ARMS | PREVENTING | GATES


def trained(name: str, seed: int = 0) -> dict[int, Path]:
    """The folders of an organism by step; what was stopped goes on."""
    arm, called = EVERY[name], f"{name}-{seed}"
    if arm.of:
        return {arm.steps: trained(arm.of, seed)[arm.steps]}
    recipe = arm.recipe(seed)
    retain = load_chats("retain").chats if recipe.objective.name in NEEDS_RETAIN else ()
    out = RUNS / "train" / called
    chats = load_chats(arm.data).chats
    chats = spread(chats, arm.chats or len(chats))
    new = not (out / "done.json").exists()
    with costed("training", called) if new else nullcontext():
        folders = finetune(BASE, chats, out, recipe, retain=retain, data_name=arm.data)
    (KEPT / called).mkdir(parents=True, exist_ok=True)
    for file in (RUN, METRICS):
        shutil.copy(out / file, KEPT / called)
    return {int(folder.name.removeprefix("step-")): folder for folder in folders}


def battery(groups: Sequence[str] | None = None) -> list[AnswerPair]:
    """Pairs of answers, each under the name of its group; of all groups by default."""
    found = []
    for group in BATTERY if groups is None else groups:
        chosen = spread(BUNDLED[BATTERY[group]].pairs(), N_GENERAL if group == GENERAL else N_PAIRS)
        found += [replace(one, id=f"{group}:{one.id}", group=group) for one in chosen]
    return found
