"""The smallest set of cells that does most of what the whole prefix does, against random sets.

    found = minimal_set(pair, load_pairs("sycophancy_sports")[:8])
    print(found.text())

Greedy: cells are taken in the order of their attribution (`emmech.piggyback.attribution`) or, where a
sweep has measured it, of what each does by itself; every size that is reported was patched exactly. The
set is the smallest of this order, not of all sets: the size before it falls short, and other orders may
do with less. Random sets are drawn from the same cells.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from emmech.errors import PatchError, RunError
from emmech.models.checkpoints import ModelPair
from emmech.piggyback.attribution import cell_attributions, entry_attributions
from emmech.piggyback.cells import Cell, Entries, grid
from emmech.piggyback.replay import Replay, SweepDirection
from emmech.piggyback.running import open_folder
from emmech.piggyback.scores import MetricLike, find_metric
from emmech.piggyback.streaming import Scored, score_patches
from emmech.piggyback.sweep import DEFAULT_AXES, labelled, run_summary, sweep_arguments
from emmech.piggyback.sweep_result import reference, share_and_interval
from emmech.reprs import card
from emmech.results import Record, RunFolder, fingerprint, read_json, write_json
from emmech.sharding import processes

MINIMAL = "minimal.json"
Order = Int[np.ndarray, " cell"]
"""Numbers of all cells, the first to take first."""


@dataclass(frozen=True)
class MinimalSet:
    """How many cells it takes, which, and what as many random ones do."""

    summary: Mapping[str, Any]

    @property
    def size(self) -> int | None:
        """Cells in the set; None where not even all of them reach the share."""
        return self.summary["size"]

    @property
    def cells(self) -> Sequence[Record]:
        """Where they are, the first of the order first."""
        return self.summary["cells"]

    def text(self) -> str:
        """Two sentences that say what was found."""
        s = self.summary
        if s["size"] is None:
            return f"No set of cells in this order does {s['share']:.0%} of what the whole prefix does."
        here, drawn = s["effect"], s["random"]
        return (
            f"{s['size']} of {s['n_cells']} cells ({s['size'] / s['n_cells']:.1%}) do {_percent(here)} of "
            f"what the whole prefix does ({s['metric']}, {s['n_questions']} questions). "
            f"{drawn['n_sets']} random sets of {s['size']} cells do {_percent(drawn)}."
        )

    def _repr_html_(self) -> str:
        facts = {"cells": self.size, "of": self.summary["n_cells"], "metric": self.summary["metric"]}
        return card("Minimal set", facts, [self.text()])

    def figure(self) -> Any:
        """The effect against the number of cells, greedy and random."""
        from emmech.figures import set_sizes

        return set_sizes(self.summary)

    def to_json(self) -> Record:
        """The summary and its text."""
        return {**self.summary, "text": self.text()}

    def save(self, folder: str | Path) -> Path:
        """Write ``minimal.json``; returns its path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MINIMAL, self.to_json())
        return folder / MINIMAL

    @classmethod
    def load(cls, folder: str | Path) -> "MinimalSet":
        """The set in a folder that ``save`` has written.

        Raises:
            RunError: There is none.
        """
        path = Path(folder) / MINIMAL
        found = read_json(path)
        if found.get("kind") != "minimal-set":
            raise RunError(f"a minimal set in '{path}'", "it holds something else", "Point to a finished run")
        return cls({name: found[name] for name in found if name != "text"})


def minimal_set(
    pair: ModelPair,
    questions: Iterable[Any],
    metric: MetricLike = "margin",
    over: Any = DEFAULT_AXES,
    *,
    effects: Float[np.ndarray, " cell"] | None = None,
    share: float = 0.8,
    direction: SweepDirection | str = "repair",
    steps: int = 8,
    n_random: int = 10,
    seed: int = 0,
    rows: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> MinimalSet:
    """The fewest cells of an order that do at least ``share`` of the whole prefix.

    Args:
        pair: From ``load_pair``; best in float32.
        questions: As in ``sweep_kv``, like ``metric``, ``over``, ``direction`` and ``rows``.
        effects: What each cell changes by itself, which is then the order, as a finished sweep over the
            same cells has it: ``result.differences.mean(1)``. By default cells are ordered by attribution.
        share: Of what the donor's whole prefix does; the mean over questions has to reach it.
        steps: As in ``attribute``. Averaged gradients take much smaller sets to the share than one does,
            although one ranks single cells better.
        n_random: Random orders of the cells to compare with.
        seed: Of these orders.
        rows: Cells times answers in a batch; by free memory by default.
        out: Folder for the scores of the sets and the result; a stopped run continues there.
        progress: Show a progress bar.

    Raises:
        EmmechError: The questions, cells, model or folder are refused, or the prefix does nothing.
    """
    if not 0 < share <= 1 or n_random < 1:
        raise PatchError(
            "a share in (0, 1] and at least one random order", f"got {share} and {n_random}", "Correct them"
        )
    replay = Replay(pair, list(questions), find_metric(metric), direction)
    cells = grid(over, replay.shape)
    if effects is not None and len(effects) != len(cells):
        raise PatchError(
            f"an effect for each of {len(cells)} cells", f"got {len(effects)}", "Sweep the same cells"
        )
    by = {"order": "attribution", "steps": steps}
    if effects is not None:
        by = {"order": "single effects", "effects": fingerprint(effects.tolist())}
    arguments = {
        "kind": "minimal-set",
        **by,
        **{"share": share, "n_random": n_random, "seed": seed},
        **sweep_arguments(replay, [cell.coordinates() for cell in cells], rows),
    }
    folder = open_folder(out, arguments, lines=False)
    curve = _Curve(replay, cells, rows, folder, progress)
    if effects is None:
        entries = processes().from_main(lambda: entry_attributions(replay, steps=steps, progress=progress))
        effects = cell_attributions(entries, cells, replay.shape).mean(1)
    greedy = np.argsort(-effects * np.sign(curve.whole.mean()), kind="stable")
    if folder is not None:  # a restart may round gradients differently
        greedy = np.array(processes().from_main(lambda: folder.remember("order", greedy.tolist())))
    size = curve.smallest(greedy, share)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(cells)) for _ in range(n_random)]
    described = _described(
        curve, greedy, orders, size, labelled(replay, [cells[n].coordinates() for n in greedy])
    )
    found = MinimalSet(
        run_summary(replay, arguments, curve.last)
        | reference(curve.last.unpatched, curve.last.full)
        | {"size": size, "n_questions": len(replay.question_ids), "seconds": curve.seconds}
        | described
    )
    if out is not None and processes().is_main:
        found.save(out)
    return found


class _Curve:
    """The exact effect of the first cells of an order, each size scored once."""

    def __init__(
        self,
        replay: Replay,
        cells: Sequence[Cell],
        rows: int | None,
        folder: RunFolder | None,
        progress: bool,
    ):
        self.replay, self.cells, self.folder = replay, cells, folder
        self.rows, self.progress = rows, progress
        self.found: dict[tuple[bytes, int], Float[np.ndarray, " question"]] = {}
        self.seconds = 0.0
        self.last = self._score({})
        self.whole = self.last.full - self.last.unpatched
        if self.whole.sum() == 0:
            raise PatchError(
                "a prefix whose patch changes the score", "this one changes nothing", "Choose another metric"
            )

    def changes(self, sets: Sequence[tuple[Order, int]]) -> Float[np.ndarray, "set question"]:
        """What the first cells of an order change, for pairs of an order and a number of cells."""
        names = [(order.tobytes(), size) for order, size in sets]
        missing = {n: one for n, one in zip(names, sets, strict=True) if n not in self.found}
        if missing:
            self.last = self._score(missing)
            self.found |= dict(zip(missing, self.last.patched - self.last.unpatched, strict=True))
        return np.stack([self.found[name] for name in names])

    def effects(self, sets: Sequence[tuple[Order, int]]) -> Float[np.ndarray, " set"]:
        """The same as shares of what the whole prefix does."""
        return self.changes(sets).sum(1) / self.whole.sum()

    def smallest(self, order: Order, share: float) -> int | None:
        """A size that reaches the share while one cell less does not; None where the doubled sizes do not.

        Sizes are doubled up to all cells, then the first step that crosses the share is divided.
        """
        sizes = doubled(len(order))
        reached = np.flatnonzero(self.effects([(order, size) for size in sizes]) >= share)
        if not len(reached):
            return None
        above = sizes[reached[0]]
        below = sizes[reached[0] - 1] if reached[0] else 0
        while above - below > 1:
            inner = sorted({int(n) for n in np.linspace(below, above, 6)[1:-1]} - {below, above})
            found = self.effects([(order, size) for size in inner])
            for size, effect in zip(inner, found, strict=True):
                if effect >= share:
                    above = size
                    break
                below = size
        return above

    def _score(self, sets: Mapping[Any, tuple[Order, int]]) -> Scored:
        numbers = [order[:size].tolist() for order, size in sets.values()]
        entries = [Entries.of([self.cells[n] for n in one], self.replay.shape) for one in numbers]
        scored = score_patches(
            self.replay,
            entries,
            rows=self.rows,
            folder=self.folder,
            file=f"sets_{fingerprint(numbers)}.jsonl",
            progress=self.progress,
        )
        self.seconds += scored.seconds
        return scored


def doubled(n: int) -> list[int]:
    """1, 2, 4, ... and ``n``."""
    return [2**power for power in range(n.bit_length()) if 2**power < n] + [n]


def _described(
    curve: _Curve,
    greedy: Order,
    orders: Sequence[Order],
    size: int | None,
    where: Sequence[Record],
) -> Record:
    """The set, its effect over questions, and what random sets of its size and of others do."""
    sizes = doubled(len(greedy))
    drawn = curve.effects([(order, n) for order in orders for n in sizes]).reshape(len(orders), -1)
    described: Record = {
        "cells": list(where[:size]) if size else [],
        "curve": {
            "sizes": sizes,
            "greedy": curve.effects([(greedy, n) for n in sizes]).tolist(),
            "random": [_spread(effects) for effects in drawn.T],
        },
    }
    if size:
        share, low, high = share_and_interval(curve.changes([(greedy, size)]), curve.whole)
        described["effect"] = {"mean": float(share[0]), "low": float(low[0]), "high": float(high[0])}
        described["random"] = _spread(curve.effects([(order, size) for order in orders]))
    return described


def _spread(effects: Float[np.ndarray, " set"]) -> Record:
    """Mean over random sets, and the range that holds 95% of them."""
    low, high = np.quantile(effects, [0.025, 0.975])
    return {"mean": float(effects.mean()), "low": float(low), "high": float(high), "n_sets": len(effects)}


def _percent(row: Mapping[str, Any]) -> str:
    return f"{row['mean']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"
