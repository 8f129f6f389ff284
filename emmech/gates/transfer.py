"""Do gates trained on one narrow set undo finetunes on others? A source x target matrix.

Sources are gates. Targets are the base itself, asked each source's own questions with the gates as
trained and at the scale, and organisms: finetuned models that the gates never saw, each asked the
questions of its own set. In every cell the behaviour before and after, how the answers read, and the
cost on ordinary answers (arXiv 2606.09068, which reports inverted medical gates on four organisms).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emmech import defaults
from emmech.data.bundled import Problem
from emmech.data.chat_rows import Messages
from emmech.data.questions import Question
from emmech.errors import DataError
from emmech.gates.files import load_gates
from emmech.gates.steering import steer_gates
from emmech.models.checkpoints import load_pair
from emmech.models.default import DEFAULT_MODEL
from emmech.results import Record
from emmech.summarised import Summarised

TRANSFER = "transfer.json"
BASE = "base"


@dataclass(frozen=True)
class Behaviour:
    """A finetuned model or a set of gates, with the questions and the detector of what it was taught."""

    path: str | Path
    questions: Sequence[Question]
    detector: str


@dataclass(frozen=True)
class Transfer(Summarised):
    """The matrix: one row per source, target and group of questions."""

    FILE = TRANSFER
    ROWS = "cells"

    def figure(self) -> Any:
        """Behaviour before and after, one panel per group."""
        from emmech.figures import transfer_matrix

        return transfer_matrix(self.summary)

    def _table(self) -> Any:
        from emmech.report_gates import transfer_table

        return transfer_table(self.summary)

    def _write_page(self, folder: str | Path) -> Path:
        from emmech.report_gates import write_transfer

        return write_transfer(folder, self.summary)


def transfer_gates(
    sources: Mapping[str, Behaviour],
    targets: Mapping[str, Behaviour],
    *,
    base: str | Path = DEFAULT_MODEL,
    scale: float | int = -1.0,
    ordinary: Sequence[Messages] | None = None,
    problems: Sequence[Problem] | None = None,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    out: str | Path,
    progress: bool = True,
) -> Transfer:
    """Put each set of gates, at ``scale``, on the base and on each finetuned model.

    Args:
        sources: Gates by name.
        targets: Finetuned models over the same base by name; each is asked its own questions.
        base: Hub id, folder or ``"smollm2"``.
        scale: -1 is the paper's inversion.
        out: Folder with one subfolder per cell, each as of ``steer_gates``; a stopped run continues.
        device: As in ``load_pair``; so is ``dtype``. Further arguments as in ``steer_gates``.

    Raises:
        GateError: Gates that do not fit the base.
        DataError: No source, or a target called "base".
    """
    if not sources or BASE in targets:
        raise DataError(
            f"at least one set of gates, and no target called '{BASE}'",
            f"got {len(sources)} and {', '.join(targets) or 'none'}",
            "Correct the names",
        )
    folder, cells = Path(out), []
    gates = {name: load_gates(source.path) for name, source in sources.items()}
    how: dict[str, Any] = {
        "ordinary": ordinary,
        "problems": problems,
        "max_new_tokens": max_new_tokens,
        "samples": samples,
        "seed": seed,
        "batch_size": batch_size,
        "progress": progress,
    }
    provenance = {}
    for name, source in sources.items():
        pair = load_pair(base, source.path, device=device, dtype=dtype)
        provenance[name] = pair.provenance["finetuned"]
        result = steer_gates(
            pair, gates[name], source.questions, scales=sorted({scale, 1.0}), detector=source.detector,
            out=folder / BASE / name, **how,
        )  # fmt: skip
        cells += _cells(result.summary, name, BASE)
    for target, organism in targets.items():
        pair = load_pair(base, organism.path, device=device, dtype=dtype)
        provenance[target] = pair.provenance["finetuned"]
        for name in sources:
            result = steer_gates(
                pair, gates[name], organism.questions, scales=[scale], on="finetuned",
                detector=organism.detector, out=folder / target / name, **how,
            )  # fmt: skip
            cells += _cells(result.summary, name, target)
    summary = {
        "kind": "gates-transfer",
        "scale": scale,
        "sources": list(sources),
        "targets": [BASE, *targets],
        "detectors": {BASE: {name: one.detector for name, one in sources.items()}}
        | {name: one.detector for name, one in targets.items()},
        "cells": cells,
        "decoding": result.summary["decoding"],
        "provenance": {"base": pair.provenance["base"]} | provenance,
        "versions": result.summary["versions"],
    }
    matrix = Transfer(summary)
    matrix.save(folder)
    return matrix


def _cells(steering: Record, source: str, target: str) -> list[Record]:
    """The rows of one source and target: without gates (scale None) and at each scale."""
    costs = {row["scale"]: row for row in steering["ordinary"]}
    solved = {row["scale"]: row for row in steering["capability"]}
    return [
        {
            "source": source,
            "target": target,
            **row,
            "ordinary": costs.get(row["scale"]),
            "capability": solved[row["scale"]],
        }
        for row in steering["rows"]
    ]
