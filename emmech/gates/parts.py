"""Where do gates act: what is left of their effect when they may touch one part of the chat only?

A gate at one token reaches later tokens through that token's keys and values alone. Restricted to the
prefix, gates are therefore the same intervention as patching the gated model's prefix K and V into the
base, and withheld from the prefix, the same as patching the base's in (a test holds both to that). Of
the postfix this is not true: its last token also predicts the answer's first.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from emmech import defaults
from emmech.chat import PARTS, SEGMENTS
from emmech.gates.gate import Gates, Gating
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.piggyback.experiment import PatchingResult, default_conditions, run_conditions
from emmech.piggyback.patching import Condition


def gate_parts(
    pair: ModelPair,
    gates: Gates,
    questions: Iterable[Any],
    *,
    scale: float | int = 1.0,
    detector: str = defaults.DETECTOR,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> PatchingResult:
    """The base with gates on one part of the chat (``only:PART``), on all others (``except:PART``), and
    the Piggyback test of the gated model, all on the same questions.

    Args:
        pair: Any pair over the gates' base; its own finetuned side is not used.
        gates: From ``load_gates``; they act at ``scale``.
        questions: And all further arguments as in ``patch_prefix``.

    Raises:
        EmmechError: Gates, questions or folder are refused, before any work.
    """
    restricted = {f"only:{part}": (part,) for part in PARTS}
    restricted["only:prompt"] = SEGMENTS
    restricted |= {f"except:{part}": tuple(p for p in PARTS if p != part) for part in PARTS}
    gated = Gating(gates, scale)
    sides = [pair.base.under(name, replace(gated, parts=parts).on) for name, parts in restricted.items()]
    provenance = {"name": "gates", "fingerprint": gates.fingerprint(), **gates.provenance}
    pair = replace(
        pair,
        finetuned=pair.base.under("finetuned", gated.on),
        variants={side.name: side for side in sides},
        provenance=dict(pair.provenance) | {"finetuned": provenance},
    )
    patches = default_conditions(SEGMENTS, "both", controls=False)
    return run_conditions(
        pair,
        questions,
        [*patches[:2], *(Condition(name, name) for name in restricted), *patches[2:]],
        Decoding(max_new_tokens, defaults.temperature(None, samples), samples=samples, seed=seed),
        kind="gates-parts",
        settings={"scale": scale},
        detector=detector,
        batch_size=batch_size,
        out=out,
        progress=progress,
    )
