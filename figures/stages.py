"""Stages of a study, run by name: each makes one kept result.

run_stages("gates", __doc__, (steer, parts, transfer, probe))     # python -m figures.gates steer parts
"""

import argparse
from collections.abc import Callable, Sequence

from emmech.results import Record, versions, write_json
from figures.narrow import RESULTS


def run_stages(study: str, about: str, stages: Sequence[Callable[[], Record]]) -> None:
    """Run the stages that the command line names, all by default; each writes STUDY_STAGE.json."""
    known = {stage.__name__: stage for stage in stages}
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"among {', '.join(known)}; all by default")
    chosen = parser.parse_args().stages or list(known)
    if unknown := set(chosen) - set(known):  # before any work
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in chosen:
        result = {"command": f"python -m figures.{study} {name}"} | small(known[name]())
        write_json(RESULTS / f"{study}_{name}.json", {"versions": versions()} | result)


def small(result: Record) -> Record:
    """A result without what only its own page shows."""
    kept = {key: value for key, value in result.items() if key not in ("labelled_prompt", "heads", "tokens")}
    return {key: small(value) if isinstance(value, dict) else value for key, value in kept.items()}
