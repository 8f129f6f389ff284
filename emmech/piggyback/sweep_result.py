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
        where = pd.DataFrame(list(self.cells), dtype=object)  # in which None stays None
        whole = [axis for axis in where if all(isinstance(at, int) for at in where[axis])]
        where = where.astype(dict.fromkeys(whole, int))
        return pd.concat([where, pd.DataFrame(columns)], axis=1)

    def figure(self) -> Any:
        """The map of effects as a plotly figure."""
        from emmech.figures import sweep_map

        return sweep_map(self.to_json())

    def to_json(self) -> Record:
        """The summary with one row per cell, None for nan."""
        rows = self.frame().astype(object)
        rows = rows.where(rows.notna(), None).to_dict("records")
        whole = dict(zip(("mean", "low", "high"), _column(self.full - self.unpatched), strict=True))
        return {
            **self.summary,
            "unpatched": float(self.unpatched.mean()),
            "full": float(self.full.mean()),
            "whole": whole,
            "rows": rows,
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``sweep.json``, ``cells.csv`` and ``report.html``; returns the report."""
        from emmech.report_sweep import write_sweep

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: getattr(self, name).tolist() for name in ("unpatched", "full", "scores")}
        write_json(folder / SWEEP, {**self.to_json(), "values": values})
        replace_text(folder / FRAME, self.frame().to_csv(index=False))
        return write_sweep(folder, self.to_json())

    @classmethod
    def load(cls, folder: str | Path) -> "SweepResult":
        """The result in a folder that ``save`` has written.

        Raises:
            RunError: There is none.
        """
        path = Path(folder) / SWEEP
        found = read_json(path)
        if "values" not in found:
            raise RunError(f"a sweep in '{path}'", "it holds something else", "Point to a finished sweep")
        values = {name: np.array(value) for name, value in found.pop("values").items()}
        rows = found.pop("rows")
        cells = [{name: row[name] for name in row if name not in _ESTIMATES} for row in rows]
        summary = {name: found[name] for name in found if name not in ("unpatched", "full", "whole")}
        return cls(summary, cells, **values)


_ESTIMATES = ("score", "difference", "low", "high", "effect", "effect_low", "effect_high", "n")


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


def _column(values: Float[np.ndarray, " question"]) -> list[float | None]:
    """Mean, low and high of one row of values; None for nan."""
    found = (float(one[0]) for one in mean_and_interval(values[None]))
    return [None if np.isnan(one) else one for one in found]
