"""Do finetunes, triggers and persona prompts move a model along one direction? Cosines with a null.

    shifts = {"organism": shift(tuned, base), "trigger": shift(triggered, plain)}
    shared_structure(shifts, reference=base).table()

A shift is the mean, over questions, of the difference of two states. Two shifts share structure when
their cosine is larger than between a shift and a random direction that spreads as the model's own
states do: hidden states lie in few dimensions, where cosines between any two directions are large.
Noise lowers a cosine: the reliability of each shift (cosine of random halves) bounds what can be seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from emmech.errors import DataError
from emmech.results import Record, versions
from emmech.steering.directions import lengths_of, mean_cosine, random_halves
from emmech.steering.states import States
from emmech.summarised import Summarised

SHARED = "shared.json"
N_SPLITS = 200


@dataclass(frozen=True, eq=False)
class Shift:
    """How two states of the same questions differ."""

    differences: Float[np.ndarray, "question layer d_model"]
    ids: tuple[str, ...]


def shift(positive: States, negative: States) -> Shift:
    """The differences from ``negative`` to ``positive``, question by question.

    Raises:
        DataError: They are of different questions, sites or positions, or of fewer than four questions.
    """
    if (positive.site, positive.position) != (negative.site, negative.position):
        raise DataError(
            "states of one site and position",
            f"got {positive.site} {positive.position} and {negative.site} {negative.position}",
            "Read both alike",
        )
    ids_a, ids_b = (list(dict.fromkeys(states.ids)) for states in (positive, negative))
    if set(ids_a) != set(ids_b) or len(ids_a) < 4:
        raise DataError(
            "states of the same questions, at least four",
            f"got {len(ids_a)} and {len(ids_b)}, {len(set(ids_a) & set(ids_b))} in common",
            "Read the same questions",
        )
    a, b = (states.by_question().double().numpy() for states in (positive, negative))
    return Shift(a - b[[ids_b.index(one) for one in ids_a]], tuple(ids_a))


@dataclass(frozen=True)
class SharedStructure(Summarised):
    """Every pair of shifts in every block: one row per block and pair, the cosine with its interval and
    the 95th percentile of its size under the null.
    """

    FILE = SHARED

    def table(self, layer: int | None = None) -> None:
        """Print the pairs in one block, the middle one by default."""
        from rich.console import Console

        Console().print(self._table(layer))

    def matrix(self, layer: int) -> pd.DataFrame:
        """Cosines in one block; on the diagonal the reliability of each shift."""
        names = list(self.summary["shifts"])
        found = pd.DataFrame(np.nan, index=names, columns=names)
        for row in self.summary["rows"]:
            if row["layer"] == layer:
                found.loc[row["a"], row["b"]] = found.loc[row["b"], row["a"]] = row["cosine"]
        for name in names:
            found.loc[name, name] = self.summary["shifts"][name]["reliability"][layer]
        return found

    def figure(self, layer: int | None = None) -> Any:
        """The matrix in one block, and the cosines by block."""
        from emmech.figures import shared_matrix

        return shared_matrix(self.summary, layer)

    def _table(self, layer: int | None = None) -> Any:
        from emmech.report_steering import shared_table

        return shared_table(self.summary, layer)

    def _write_page(self, folder: str | Path) -> Path:
        from emmech.report_steering import write_shared

        return write_shared(folder, self.summary)


def shared_structure(
    shifts: Mapping[str, Shift],
    reference: States,
    *,
    controls: tuple[str, ...] = (),
    n_resamples: int = 1000,
    n_null: int = 1000,
    seed: int = 0,
) -> SharedStructure:
    """Cosines between the mean shifts, by block, with intervals and a null.

    Args:
        shifts: By name, from ``shift``, all of one model shape, site and position.
        reference: States of the base, whose covariance the random directions have.
        controls: Names of shifts that should share nothing, such as unrelated finetunes; marked.
        n_resamples: Resamples of questions; shifts over the same questions are resampled together.
        n_null: Random directions.
        seed: Of resamples, halves and random directions.

    Raises:
        DataError: Fewer than two shifts, or of different shapes.
    """
    if len(shifts) < 2 or not set(controls) <= set(shifts):
        raise DataError(
            "at least two shifts, the controls among them",
            f"got {', '.join(shifts) or 'none'}; controls {', '.join(controls) or 'none'}",
            "Pass them by name",
        )
    shapes = {one.differences.shape[1:] for one in shifts.values()} | {tuple(reference.values.shape[1:])}
    if len(shapes) > 1:
        raise DataError("shifts of one model shape", f"got {sorted(shapes)}", "Read one model")
    rng = np.random.default_rng(seed)
    centred = reference.by_question().double().numpy()
    centred = centred - centred.mean(0)
    drawn = rng.standard_normal((n_null, len(centred)))
    resampled = _resamples(shifts, n_resamples, rng)
    n_layers = centred.shape[1]
    null = {
        name: [_null(one.differences[:, layer], centred[:, layer], drawn) for layer in range(n_layers)]
        for name, one in shifts.items()
    }
    reliability = {name: _reliability(one, rng) for name, one in shifts.items()}
    rows = []
    for layer in range(n_layers):
        for a, b in combinations(shifts, 2):
            x, y = shifts[a].differences[:, layer], shifts[b].differences[:, layer]
            cosine = float(_cosines(x, y, *(np.full((1, len(one)), 1 / len(one)) for one in (x, y)))[0])
            low, high = _interval(cosine, _cosines(x, y, resampled[a], resampled[b]))
            bound = max(null[a][layer], null[b][layer])
            row: Record = {"layer": layer, "a": a, "b": b, "cosine": cosine, "low": low, "high": high}
            row |= {"null": bound, "beyond_null": low > bound or high < -bound}
            rows.append(row | {"control": a in controls or b in controls})
    summary = {
        "kind": "shared-structure",
        "site": reference.site,
        "position": reference.position,
        "shifts": {
            name: {"n_questions": len(one.ids), "reliability": reliability[name], "control": name in controls}
            for name, one in shifts.items()
        },
        "rows": rows,
        "provenance": dict(reference.provenance),
        "versions": versions(),
    }
    return SharedStructure(summary)


def _resamples(
    shifts: Mapping[str, Shift], n_resamples: int, rng: np.random.Generator
) -> dict[str, Float[np.ndarray, "draw question"]]:
    """Weights of the questions in each resample, the same for shifts over the same questions."""
    drawn: dict[tuple[str, ...], np.ndarray] = {}
    for one in shifts.values():
        if one.ids not in drawn:
            n = len(one.ids)
            drawn[one.ids] = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples) / n
    return {name: drawn[one.ids] for name, one in shifts.items()}


def _reliability(one: Shift, rng: np.random.Generator) -> list[float]:
    """By block, the mean cosine between the shifts of random halves of the questions."""
    first = random_halves(rng, N_SPLITS, len(one.ids))
    weights = [half / half.sum(-1, keepdims=True) for half in (first, ~first)]
    return [mean_cosine(rows, *weights) for rows in one.differences.swapaxes(0, 1)]


def _interval(cosine: float, resampled: np.ndarray) -> tuple[float, float]:
    """The basic bootstrap's 95% interval, in [-1, 1].

    Noise pulls a cosine of means towards 0, and a resampled one twice; mirrored at the estimate the
    pull cancels to first order. The cosine itself is always inside.
    """
    high, low = 2 * cosine - np.nanquantile(resampled, [0.025, 0.975])
    return max(-1.0, min(cosine, float(low))), min(1.0, max(cosine, float(high)))


def _cosines(
    x: np.ndarray, y: np.ndarray, weights_x: np.ndarray, weights_y: np.ndarray
) -> Float[np.ndarray, " draw"]:
    """Cosines between weighted means of the rows of ``x`` and of ``y``; nan where one is zero."""
    across = np.einsum("dr,rs,ds->d", weights_x, x @ y.T, weights_y, optimize=True)
    sizes = lengths_of(x, weights_x) * lengths_of(y, weights_y)
    return np.divide(across, sizes, out=np.full(len(across), np.nan), where=sizes > 0)


def _null(differences: np.ndarray, centred: np.ndarray, drawn: np.ndarray) -> float:
    """95th percentile of |cosine| between the mean shift and directions of the states' covariance."""
    mean = np.full((len(drawn), len(differences)), 1 / len(differences))
    return float(np.nanquantile(np.abs(_cosines(differences, centred, mean, drawn)), 0.95))
