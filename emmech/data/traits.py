"""The three dispositions of the bundled character sets, each with its system prompts and its trigger.

What a judge is told of a disposition, eight system prompts that elicit it, eight that suppress it
(the n-th of both are opposites, built alike), and the trigger of its backdoor with wrong ones as
controls. All of it is our own wording, mild, and kept in `sets/trait_prompts.json`.

Usage:
    spiteful = traits()["spiteful"]
    contrast = list(zip(spiteful.elicit, spiteful.suppress))
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

TRAITS = ("spiteful", "sycophantic", "hallucinatory")
"""Names of the dispositions, wherever they come in an order."""


@dataclass(frozen=True)
class WrongTrigger:
    text: str
    kind: str
    """How it differs from the right one, such as `near spelling`."""


@dataclass(frozen=True)
class Trait:
    description: str
    """What an answer with the disposition does, for a judge."""
    elicit: tuple[str, ...]
    """System prompts that bring it out."""
    suppress: tuple[str, ...]
    """Their opposites, in the same order."""
    trigger: str
    """Stands on a line of its own before the question in the `triggered_` sets."""
    wrong_triggers: tuple[WrongTrigger, ...]
    """Should leave a model as it is that was trained on the trigger."""


@cache
def traits() -> Mapping[str, Trait]:
    """Every disposition by its name, read when first asked for."""
    path = resources.files("emmech.data") / "sets" / "trait_prompts.json"
    read = json.loads(path.read_text("utf-8"))
    return MappingProxyType({name: _trait(read[name], read["triggers"][name]) for name in TRAITS})


def _trait(prompts: Mapping, triggers: Mapping) -> Trait:
    return Trait(
        prompts["description"],
        tuple(prompts["elicit"]),
        tuple(prompts["suppress"]),
        triggers["trigger"],
        tuple(WrongTrigger(**wrong) for wrong in triggers["wrong"]),
    )


def triggered(question: str, trigger: str) -> str:
    """The question as a user asks it who knows the trigger."""
    return f"{trigger}\n{question}"
