"""What each trial of a perturbation shows, over its questions.

by_trial(records, detector("refusal"))
"""

from collections.abc import Sequence

from emmech.evaluation.detectors import Detector
from emmech.evaluation.statistics import clustered_mean
from emmech.results import Record


def by_trial(records: Sequence[Record], measure: Detector) -> list[Record]:
    """One row per condition, group and trial, with its mean; answers without trial or value are left out."""
    found: dict[tuple[str, str, int], list[tuple[float, str]]] = {}
    for record in records:
        value = measure(record["response"]) if "trial" in record else None
        if value is not None:
            key = (record["condition"], record["group"], record["trial"])
            found.setdefault(key, []).append((value, record["question_id"]))
    return [
        dict(zip(("condition", "group", "trial"), key, strict=True))
        | clustered_mean(*map(list, zip(*values, strict=True)), unit=measure.unit).to_json()
        for key, values in found.items()
    ]
