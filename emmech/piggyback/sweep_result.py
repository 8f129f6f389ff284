"""What a sweep found: a score per cell and question, and what they add up to.

    result.frame()                      # one row per cell
    result.scores[cell, question]       # the values behind it

``difference`` is the patched score minus the unpatched one, in the metric's unit. ``effect`` is that as
a share of what the donor's whole prefix does: 0 as unpatched, 1 as fully patched. It is a ratio of means
over questions, never a mean of ratios.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from emmech.errors import RunError
from emmech.evaluation.statistics import Z95
from emmech.reprs import of_table
from emmech.results import Record, read_json, replace_text, write_json

SWEEP, FRAME = "sweep.json", "cells.csv"


@dataclass(frozen=True)
class SweepResult:
    """Scores of every cell on every question."""

    summary: Mapping[str, Any]
    """Metric, mode, direction, prefix tokens, axes, provenance, seconds."""
    cells: Sequence[Record]
    """Where each cell is, by axis."""
    unpatched: Float[np.ndarray, " question"]
    full: Float[np.ndarray, " question"]
    """Under the donor's whole prefix."""
    scores: Float[np.ndarray, "cell question"]

    @property
    def differences(self) -> Float[np.ndarray, "cell question"]:
        """What each cell changes, per question."""
        return self.scores - self.unpatched

    def frame(self) -> pd.DataFrame:
        """One row per cell: where it is, its score, what it changes with 95% intervals, n.

        Intervals are over questions, and not corrected for looking at many cells.
        """
        difference, low, high = mean_and_interval(self.differences)
        effect, effect_low, effect_high = share_and_interval(self.differences, self.full - self.unpatched)
        columns = {
            "score": self.scores.mean(1),
            "difference": difference,
            "low": low,
            "high": high,
            "effect": effect,
            "effect_low": effect_low,
            "effect_high": effect_high,
            "n": self.scores.shape[1],
        }
        return pd.concat([where_frame(self.cells), pd.DataFrame(columns)], axis=1)

    def table(self) -> None:
        """Print the strongest cells."""
        from rich.console import Console

        from emmech.report_sweep import terminal_table

        Console().print(terminal_table(self.to_json()))

    def _repr_html_(self) -> str:
        from emmech.report_sweep import terminal_table

        return of_table(terminal_table(self.to_json()))

    def figure(self) -> Any:
        """The map of effects as a plotly figure."""
        from emmech.figures import sweep_map

        return sweep_map(self.to_json())

    def to_json(self) -> Record:
        """The summary with one row per cell, None for nan."""
        return {
            **self.summary,
            **reference(self.unpatched, self.full),
            "axes": [axis for axis in self.cells[0] if axis != "token"],
            "rows": records(self.frame()),
        }

    def save(self, folder: str | Path, minimal: Mapping[str, Any] | None = None) -> Path:
        """Write ``sweep.json``, ``cells.csv`` and ``report.html``; returns the report.

        The report also shows ``minimal``, the summary of a ``MinimalSet``, where there is one.
        """
        from emmech.report_sweep import write_sweep

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: getattr(self, name).tolist() for name in ("unpatched", "full", "scores")}
        write_json(folder / SWEEP, {"summary": self.summary, "cells": self.cells, "values": values})
        replace_text(folder / FRAME, self.frame().to_csv(index=False))
        return write_sweep(folder, self.to_json(), minimal)

    @classmethod
    def load(cls, folder: str | Path) -> "SweepResult":
        """The result in a folder that ``save`` has written.

        Raises:
            RunError: There is none.
        """
        found = read_values(Path(folder) / SWEEP)
        return cls(found["summary"], found["cells"], **found["values"])


def where_frame(cells: Sequence[Record]) -> pd.DataFrame:
    """Coordinates of cells as columns; None stays None."""
    where = pd.DataFrame(list(cells), dtype=object)
    whole = [axis for axis in where if all(isinstance(at, int) for at in where[axis])]
    return where.astype(dict.fromkeys(whole, int))


def records(frame: pd.DataFrame) -> list[Record]:
    """The rows of a frame, None for nan."""
    rows = frame.astype(object)
    return rows.where(rows.notna(), None).to_dict("records")


def reference(unpatched: Float[np.ndarray, " question"], full: Float[np.ndarray, " question"]) -> Record:
    """What cells are compared with: mean scores, and their difference with its interval."""
    found = (float(one[0]) for one in mean_and_interval((full - unpatched)[None]))
    whole = [None if np.isnan(one) else one for one in found]
    return {
        "unpatched": float(unpatched.mean()),
        "full": float(full.mean()),
        "whole": dict(zip(("mean", "low", "high"), whole, strict=True)),
    }


def read_values(path: Path) -> Record:
    """A saved result, its values as arrays.

    Raises:
        RunError: The file is none.
    """
    found = read_json(path)
    if "values" not in found:
        raise RunError(f"a result in '{path}'", "it holds something else", "Point to a finished run")
    return found | {"values": {name: np.array(value) for name, value in found["values"].items()}}


def mean_and_interval(
    values: Float[np.ndarray, "cell question"],
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Means over questions with 95% intervals, as ``clustered_mean`` of one value per question."""
    mean, n = values.mean(1), values.shape[1]
    half = np.full_like(mean, np.nan) if n < 2 else Z95 * values.std(1, ddof=1) / np.sqrt(n)
    return mean, mean - half, mean + half


def share_and_interval(
    parts: Float[np.ndarray, "cell question"], whole: Float[np.ndarray, " question"]
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Σ parts / Σ whole over questions, with 95% intervals; nan where the whole is 0.

    The interval is that of a ratio of means to first order (Cochran 1977, Sampling Techniques,
    s. 2.11): questions on which the whole prefix does much weigh more, and both are random.
    """
    if whole.sum() == 0:
        unknown = np.full(len(parts), np.nan)
        return unknown, unknown, unknown
    share = parts.sum(1) / whole.sum()
    around = share[:, None] + (parts - share[:, None] * whole) / whole.mean()
    _, low, high = mean_and_interval(around)
    return share, low, high
