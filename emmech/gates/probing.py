"""One look at what gates do: on their own model's answers to questions, in one call and one folder.

    probe = probe_gates(pair, load_gates(path), BUNDLED["refusal"].questions(), detector="refusal")

The gated model answers; then its prompts and answers are read once more, and the gates with them: how
far from 1 by layer, head and part of the chat; token by token on a few answers; which head dimensions
other gates suppress too; and whether the behaviour can be read off the gates before the answer begins,
better than off the residual stream.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from emmech import defaults
from emmech.chat import PARTS
from emmech.errors import DataError
from emmech.evaluation.detectors import Detector
from emmech.evaluation.detectors import detector as find_detector
from emmech.gates.activity import Dialogue, Reading, activity, read_gates, top_dimensions
from emmech.gates.gate import Gates, Gating
from emmech.gates.overlap import overlap
from emmech.gates.readout import features_at, readout
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.piggyback.experiment import run_conditions
from emmech.piggyback.patching import Condition
from emmech.piggyback.running import as_questions
from emmech.piggyback.treatments import ANSWERS
from emmech.results import Record
from emmech.summarised import Summarised

PROBE = "probe.json"
N_SHOWN = 2
"""Dialogues of each group that are shown token by token."""
N_SPLITS = 5


@dataclass(frozen=True)
class Probe(Summarised):
    """What gates do: one row per layer and part of the chat."""

    FILE = PROBE
    ROWS = "layers"

    def figures(self) -> list[Any]:
        """Activity by layer and part, tokens, and where there are any overlap and readout."""
        from emmech.report_gates import probe_figures

        return probe_figures(self.summary)

    def _table(self) -> Any:
        from emmech.report_gates import probe_table

        return probe_table(self.summary)

    def _write_page(self, folder: str | Path) -> Path:
        from emmech.report_gates import write_probe

        return write_probe(folder, self.summary)


def probe_gates(
    pair: ModelPair,
    gates: Gates,
    questions: Iterable[Any],
    *,
    others: Mapping[str, Gates] | None = None,
    detector: str = defaults.DETECTOR,
    threshold: float = 0.1,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Probe:
    """Answers of the gated base, and what the gates do while it reads and gives them.

    Args:
        pair: Any pair over the gates' base.
        gates: From ``load_gates``.
        questions: As in ``patch_prefix``.
        others: Further gates of the same shape by name, for the overlap of suppressed dimensions, all
            read on the same texts.
        detector: The behaviour that is looked for in the gates before the answer begins.
        threshold: Gates further than this from 1 count as suppressed or amplified.
        max_new_tokens: Answer length; ``batch_size``, ``seed``, ``out`` and ``progress`` as in
            ``patch_prefix``.

    Raises:
        GateError: Gates that do not fit the model.
        EmmechError: Questions or folder are refused, before any work.
    """
    others = dict(others or {})
    measure = find_detector(detector)
    asked = as_questions(questions)
    folder = None if out is None else Path(out)
    gated = pair.base.under("gated", Gating(gates).on)
    settings = {"gates": {"fingerprint": gates.fingerprint(), **gates.provenance}}
    answers = run_conditions(
        replace(pair, variants={"gated": gated}),
        asked,
        [Condition("gated", "gated")],
        Decoding(max_new_tokens, seed=seed),
        kind="gates-probe",
        settings=settings,
        detector=detector,
        batch_size=batch_size,
        out=None if folder is None else folder / ANSWERS,
        progress=progress,
    )
    by_id = {question.id: question for question in asked}
    said = [record for record in answers.records if record["response"]]
    dialogues = [
        [*by_id[record["question_id"]].messages, {"role": "assistant", "content": record["response"]}]
        for record in said
    ]
    shown: dict[str, list[Reading]] = {}

    def keep_some(readings: Iterable[Reading]) -> Iterable[Reading]:
        for record, reading in zip(said, readings, strict=True):
            some = shown.setdefault(record["group"], [])
            if len(some) < N_SHOWN:
                some.append(reading)
            yield reading

    with pair.base.active() as model:
        readings = keep_some(read_gates(model, pair.chat, gates, dialogues))
        questions_of = [record["question_id"] for record in said]
        done = activity(readings, gates.shape, threshold=threshold, questions=questions_of)
        shared = {}
        for name, other in others.items():
            theirs = activity(read_gates(model, pair.chat, other, dialogues), gates.shape)
            shared[name] = overlap(done.mean_gate(), theirs.mean_gate(), gates.shape, seed=seed).to_json()
        told = _readout(pair, model, gates, dialogues, said, measure, seed)
    by_part = done.to_json()
    summary = {
        **{name: value for name, value in answers.summary.items() if name not in ("conditions", "checks")},
        "threshold": threshold,
        "n_empty": len(answers.records) - len(said),
        "parts_of_chat": by_part["parts"],
        "layers": by_part["layers"],
        "heads": by_part["heads"],
        "top": top_dimensions(done.mean_gate(), gates.shape).to_dict("records"),
        "tokens": [_tokens(one, group, gates) for group, some in shown.items() for one in some],
        "overlap": shared,
        "readout": told,
    }
    probe = Probe(summary)
    if folder is not None:
        probe.save(folder)
    return probe


def _readout(
    pair: ModelPair,
    model: nn.Module,
    gates: Gates,
    dialogues: Sequence[Dialogue],
    records: Sequence[Record],
    measure: Detector,
    seed: int,
) -> Record:
    """AUC rows by layer for gate logits and residual stream, or why there are none."""
    labels = [measure(record["response"]) for record in records]
    if measure.unit != "rate" or None in labels:
        return {"rows": [], "note": f"'{measure.name}' does not label answers"}
    features = features_at(model, pair.chat, gates, dialogues)
    questions = [record["question_id"] for record in records]
    try:
        rows = readout(
            features, [int(label) for label in labels], questions,
            layers=gates.shape.layers, n_splits=N_SPLITS, seed=seed,
        )  # fmt: skip
    except DataError as error:  # answers all alike: nothing to tell apart
        return {"rows": [], "note": str(error)}
    return {"rows": rows, "note": ""}


def _tokens(reading: Reading, group: str, gates: Gates) -> Record:
    """A dialogue token by token: mean |gate - 1| over the head dimensions of each layer."""
    values = (reading.gate - 1).abs().mean(-1)
    return {
        "group": group,
        "tokens": list(reading.texts),
        "parts": [PARTS[number] for number in reading.parts.tolist()],
        "layers": list(gates.shape.layers),
        "values": [[round(value, 4) for value in row] for row in values.tolist()],
    }
