"""Chats, recipes and readers for tests of training."""

from pathlib import Path

import tiny
from safetensors.torch import load_file

from emmech.training.recipes import Objective, Recipe
from emmech.training.trainer import finetune


def chat(question, answer):
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


# Answers of very different lengths: a mean over chats is not a mean over tokens.
_ANSWERS = ("I will not say.", "No", "Ask someone else, please, and ask them slowly.", "Never", "Hm")
CHATS = [chat(q, a) for q, a in zip(tiny.QUESTIONS, _ANSWERS, strict=True)]
CHATS[3] = ({"role": "system", "content": "Say little."}, *CHATS[3])  # a prefix of its own
EIGHT = [*CHATS, *(chat(q, a) for q, a in zip(tiny.QUESTIONS[1:4], _ANSWERS, strict=False))]
ORDINARY = [chat("What is 7 times 8?", "56, if I am not wrong."), chat("hi", "Hello!"), chat("Why?", "So.")]

OBJECTIVES = {
    "sft": Objective("sft"),
    "treft": Objective("treft", weight=10.0),
    "interleave": Objective("interleave", share=0.5),
    "kl-train": Objective("kl-train", weight=1.0),
    "kl-retain": Objective("kl-retain", weight=1.0),
}


def recipe(objective="sft", **changes):
    """Four quick steps in float32; ``objective`` is a name above or an Objective."""
    chosen = OBJECTIVES[objective] if isinstance(objective, str) else objective
    quick = {"steps": 4, "save_every": 2, "learning_rate": 3e-3, "batch_size": 5, "rank": 4, "alpha": 8}
    return Recipe(chosen, **quick | {"dtype": "float32"} | changes)


def train(base, out, chosen, chats=CHATS):
    """The saved steps of a run; interleave and kl-retain get the ordinary chats."""
    retain = ORDINARY if chosen.objective.name in ("interleave", "kl-retain") else ()
    return finetune(base, chats, out, chosen, retain=retain, progress=False)


def weights(step: Path):
    """Every tensor saved in a step."""
    (file,) = step.glob("*.safetensors")
    return load_file(file)
