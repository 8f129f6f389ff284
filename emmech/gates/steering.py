"""Turn gates up, down and round: what the dose does to a behaviour, and what it costs.

    pair = load_pair("smollm2", "runs/gates/step-40")
    result = steer_gates(pair, load_gates("runs/gates/step-40"), BUNDLED["refusal"].questions())
    result.table()

Every batch of questions is answered at every scale; what is measured is said in
``emmech.piggyback.treatments``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emmech import defaults
from emmech.data.bundled import Problem
from emmech.data.chat_rows import Messages
from emmech.gates.gate import GateError, Gates, Gating
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.models.sides import SideName
from emmech.piggyback.patching import Condition
from emmech.piggyback.treatments import compare_treatments
from emmech.results import Record
from emmech.summarised import Summarised

SCALES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
STEERING = "steering.json"


@dataclass(frozen=True)
class Steering(Summarised):
    """What each scale does: one row per scale and group of questions."""

    FILE = STEERING

    def figure(self) -> Any:
        """Behaviour, coherence and cost against the scale."""
        from emmech.figures import dose_response

        return dose_response(self.summary)

    def _table(self) -> Any:
        from emmech.report_gates import steering_table

        return steering_table(self.summary)

    def _write_page(self, folder: str | Path) -> Path:
        from emmech.report_gates import write_steering

        return write_steering(folder, self.summary)


def steer_gates(
    pair: ModelPair,
    gates: Gates,
    questions: Iterable[Any],
    *,
    scales: Sequence[float | int] = SCALES,
    on: SideName = "base",
    parts: Sequence[str] | None = None,
    detector: str = defaults.DETECTOR,
    ordinary: Sequence[Messages] | None = None,
    problems: Sequence[Problem] | None = None,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Steering:
    """Answers, their coherence and the cost on ordinary chats at every scale of the gates.

    Args:
        pair: From ``load_pair``: of the gates themselves, or of a finetuned organism to treat.
        gates: From ``load_gates``.
        questions: As in ``patch_prefix``.
        scales: 0 off, 1 as trained, -1 inverted.
        on: The side that gets the gates: the base, or a finetuned model that they never saw.
        parts: Restrict the gates to tokens of prefix, query, postfix or response.
        detector: The behaviour that is counted.
        ordinary: Chats whose last answer the gates should leave alone; the bundled retain set by
            default.
        problems: Multiple-choice questions that it should still solve; the bundled set by default.
        max_new_tokens: Answer length; ``samples`` and ``seed`` as in ``patch_prefix``.
        batch_size: Questions per batch; by free memory by default.
        out: Folder for answers, table and figure; a stopped run continues there.
        progress: Show progress bars.

    Raises:
        GateError: The gates do not fit the model, or no scale is given.
        EmmechError: Questions or folder are refused, before any work.
    """
    if not scales or len(set(scales)) < len(scales):
        raise GateError("scales, each once", f"got {list(scales)}", "Correct them")
    plain = pair.side(on)
    names = {float(scale): f"scale {scale:g}" for scale in sorted(scales)}
    sides = [
        plain.under(name, Gating(gates, scale, parts=None if parts is None else tuple(parts)).on)
        for scale, name in names.items()
    ]
    settings = {
        "gates": {"fingerprint": gates.fingerprint(), **gates.provenance},
        "scales": list(names),
        "on": on,
        "parts": None if parts is None else list(parts),
    }
    summary, records = compare_treatments(
        replace(pair, variants={side.name: side for side in sides}),
        questions,
        [Condition(name, name) for name in names.values()],
        on,
        kind="gates-steer",
        settings=settings,
        detector=detector,
        decoding=Decoding(max_new_tokens, defaults.temperature(None, samples), samples=samples, seed=seed),
        kl_from="base",
        ordinary=ordinary,
        problems=problems,
        batch_size=batch_size,
        out=out,
        progress=progress,
    )
    scale_of = {name: scale for scale, name in names.items()}
    for part in ("rows", "ordinary", "capability"):
        summary[part] = [{"scale": scale_of.get(row.pop("condition")), **row} for row in summary[part]]
    summary["off_is_untouched"] = _off_is_untouched(records, on, names.get(0.0))
    result = Steering(summary)
    if out is not None:
        result.save(out)
    return result


def _off_is_untouched(records: Sequence[Record], on: str, off: str | None) -> bool | None:
    """Whether the answers at scale 0 are those of the ungated side; None where 0 was not asked for."""
    if off is None:
        return None
    plain, same = (
        {(r["row"], r["sample"]): r["response"] for r in records if r["condition"] == name}
        for name in (on, off)
    )
    return plain == same
