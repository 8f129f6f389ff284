"""What `make demo` gives, kept: the frontier of its organism.

    make demo
    python -m figures.demo

Writes figures/results/demo.json from runs/demo; without it, the demonstration is run first.
"""

from pathlib import Path

from emmech.demo import run_demo
from emmech.results import write_json

RUNS, RESULT = Path("runs/demo"), Path("figures/results/demo.json")
KEPT = ("frontier", "detector", "unit", "n_questions", "provenance", "versions", "decoding")


def main() -> None:
    """Keep the small part of its summary."""
    summary = run_demo(RUNS).summary
    write_json(RESULT, {key: summary[key] for key in KEPT} | {"command": "python -m figures.demo"})


if __name__ == "__main__":
    main()
