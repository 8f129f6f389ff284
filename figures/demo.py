"""What `make demo` gives: the frontier of its organism, and what it takes.

    python -m figures.demo

Runs the demonstration into runs/demo, or reads it from there, and writes figures/results/demo.json. Time and
memory are kept from a run that did everything.
"""

import os
import resource
import time
from pathlib import Path

from emmech.demo import run_demo
from emmech.results import read_json, write_json

RUNS, RESULT = Path("runs/demo"), Path("figures/results/demo.json")
KEPT = ("frontier", "detector", "unit", "n_questions", "provenance", "versions", "decoding")


def main() -> None:
    """Run it, and keep the small part of its summary."""
    fresh, started = not RUNS.exists(), time.monotonic()
    summary = run_demo(RUNS).summary
    cost = read_json(RESULT)["cost"] if RESULT.exists() else None
    if fresh:
        used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cost = {
            "seconds": round(time.monotonic() - started),
            "cores": os.cpu_count(),
            "peak_gib": round(max(used) / 2**20, 2),
        }
    kept = {key: summary[key] for key in KEPT if key in summary}
    write_json(RESULT, kept | {"cost": cost, "command": "python -m figures.demo"})


if __name__ == "__main__":
    main()
