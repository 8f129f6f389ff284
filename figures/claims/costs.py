"""Wall time and peak memory of every step of the study, as it was done.

with costed("margins", "incorrect-0/step-40 repair:prefix"): ...
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.measure import forget_peak, peak_memory
from emmech.results import Record, append_line, read_lines

RUNS = Path("runs/claims")
"""Adapters, and what else is large; remade by the commands."""
KEPT = Path(__file__).with_name("kept")
"""Recipes, losses, margins, answers and costs: what every result is made of, without a model."""
COSTS = "costs.jsonl"


@contextmanager
def costed(what: str, of: str) -> Iterator[None]:
    """Write down what is done inside, unless it fails."""
    forget_peak()
    started = time.monotonic()
    yield
    cost = {"what": what, "of": of, "seconds": time.monotonic() - started}
    KEPT.mkdir(parents=True, exist_ok=True)
    append_line(KEPT / COSTS, cost | {"peak_mb": peak_memory() / 2**20, "threads": torch.get_num_threads()})


def costs() -> Record:
    """Every kind of step: how often it was done, how long all and the longest took, the most memory."""
    found: dict[str, list[Record]] = {}
    for line in read_lines(KEPT / COSTS):
        found.setdefault(line["what"], []).append(line)
    return {
        "rows": [
            {
                "rule": what,
                "jobs": len(lines),
                "seconds": round(sum(line["seconds"] for line in lines), 3),
                "longest_seconds": round(max(line["seconds"] for line in lines), 3),
                "peak_mb": round(max(line["peak_mb"] for line in lines), 1),
            }
            for what, lines in found.items()
        ]
    }
