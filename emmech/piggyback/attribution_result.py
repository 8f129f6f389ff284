"""What attribution estimated, and how far exact patches agree.

result.frame()                   # one row per cell: attribution, and the exact effect where patched
result.spearman
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from emmech.piggyback.sweep_result import (
    mean_and_interval,
    read_values,
    records,
    reference,
    share_and_interval,
    where_frame,
)
from emmech.reprs import of_table
from emmech.results import Record, replace_text, write_json

ATTRIBUTION, FRAME = "attribution.json", "cells.csv"
_VALUES = ("unpatched", "full", "attributions", "checked", "exact", "sampled")


@dataclass(frozen=True)
class AttributionResult:
    """Estimates for every cell, exact scores for some."""

    summary: Mapping[str, Any]
    cells: Sequence[Record]
    """Where each cell is, by axis."""
    unpatched: Float[np.ndarray, " question"]
    full: Float[np.ndarray, " question"]
    """Under the donor's whole prefix."""
    attributions: Float[np.ndarray, "cell question"]
    """Estimated change of the score."""
    checked: Int[np.ndarray, " checked"]
    """Numbers of the cells that were patched exactly."""
    exact: Float[np.ndarray, "checked question"]
    """Their scores."""
    sampled: Int[np.ndarray, " sampled"]
    """Those of ``checked`` that were drawn at random."""

    @property
    def spearman(self) -> float:
        """Rank correlation of attribution and exact change over the random sample; nan where unknown."""
        from scipy.stats import spearmanr

        exact = self._exact_changes()[self.sampled]
        estimated = self.attributions.mean(1)[self.sampled]
        if len(self.sampled) < 3 or np.ptp(exact) == 0 or np.ptp(estimated) == 0:
            return float("nan")
        return float(spearmanr(estimated, exact).statistic)

    @property
    def completeness(self) -> float:
        """The sum of all attributions over what the whole prefix does; 1 for exact gradients on a line.

        Only where the cells make up the prefix without overlap.
        """
        whole = float((self.full - self.unpatched).sum())
        return float(self.attributions.sum()) / whole if whole else float("nan")

    def frame(self) -> pd.DataFrame:
        """One row per cell: where it is, its attribution with 95% intervals, the exact effect, n.

        ``effect`` is the attribution as a share of what the whole prefix does, ``exact_effect`` the
        same of the exact patch (nan where there is none). Intervals are over questions.
        """
        whole = self.full - self.unpatched
        difference, low, high = mean_and_interval(self.attributions)
        effect, effect_low, effect_high = share_and_interval(self.attributions, whole)
        exact = self._exact_changes()
        columns = {
            "difference": difference,
            "low": low,
            "high": high,
            "effect": effect,
            "effect_low": effect_low,
            "effect_high": effect_high,
            "exact_difference": exact,
            "exact_effect": exact / whole.mean() if whole.sum() else np.full(len(exact), np.nan),
            "sampled": np.isin(np.arange(len(exact)), self.sampled),
            "n": len(whole),
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
        """The map of attributions as a plotly figure."""
        from emmech.figures import sweep_map

        return sweep_map(self.to_json())

    def to_json(self) -> Record:
        """The summary with one row per cell, None for nan."""
        measured = {"spearman": self.spearman, "completeness": self.completeness}
        return {
            **self.summary,
            **reference(self.unpatched, self.full),
            **{name: None if np.isnan(value) else value for name, value in measured.items()},
            "axes": [axis for axis in self.cells[0] if axis != "token"],
            "mode": "attribution",
            "rows": records(self.frame()),
        }

    def save(self, folder: str | Path, minimal: Mapping[str, Any] | None = None) -> Path:
        """Write ``attribution.json``, ``cells.csv`` and ``report.html``; returns the report.

        The report also shows ``minimal``, the summary of a ``MinimalSet``, where there is one.
        """
        from emmech.report_sweep import write_attribution

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: getattr(self, name).tolist() for name in _VALUES}
        write_json(folder / ATTRIBUTION, {"summary": self.summary, "cells": self.cells, "values": values})
        replace_text(folder / FRAME, self.frame().to_csv(index=False))
        return write_attribution(folder, self.to_json(), minimal)

    @classmethod
    def load(cls, folder: str | Path) -> "AttributionResult":
        """The result in a folder that ``save`` has written.

        Raises:
            RunError: There is none.
        """
        found = read_values(Path(folder) / ATTRIBUTION)
        values = found["values"]
        for name in ("checked", "sampled"):
            values[name] = values[name].astype(int)
        values["exact"] = values["exact"].reshape(len(values["checked"]), len(values["full"]))
        return cls(found["summary"], found["cells"], **values)

    def _exact_changes(self) -> Float[np.ndarray, " cell"]:
        changes = np.full(len(self.cells), np.nan)
        changes[self.checked] = (self.exact - self.unpatched).mean(1) if len(self.checked) else []
        return changes
