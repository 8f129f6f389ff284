"""Every layer x position x {K, V} cell of the prefix: against one forward per cell, and the bare cost.

A sample of cells is timed in turn with each tool and scaled to one cell; all tools must give the same
scores first. ``bare`` is the blocks' cost of as many tokens as are run here behind the prefix, in full
batches, with no prefix and no logits.
"""

import shutil
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.measure import Aim, Row, alternated, middle, number, ratio
from benchmarks.peers import with_nnsight, with_transformer_lens
from benchmarks.setting import REFUSAL, Setting, questions
from emmech.models.views import plain_copy
from emmech.piggyback.cells import grid, patches
from emmech.piggyback.replay import Replay
from emmech.piggyback.scores import find_metric
from emmech.piggyback.streaming import fitting, score_patches
from emmech.piggyback.sweep import DEFAULT_AXES, sweep_kv
from emmech.piggyback.sweep_result import SweepResult

METRIC = f"target:{REFUSAL}"
N_QUESTIONS, N_POSITIONS, N_PEER_CELLS, LONG = 8, 4, 12, 256
MAP = "sweep"


def measure(setting: Setting) -> list[Row]:
    """Rows at the template's own prefix and at a long one, and the whole map."""
    bench = Bench(setting, None)
    rows, seconds_per_cell = bench.rows(Aim(4.0))
    rows.append(whole_map(setting, bench, seconds_per_cell))
    del bench
    long, _ = Bench(setting, LONG).rows(Aim(20.0))
    return rows + long


class Bench:
    """One prefix: the cells of the sample, and each way to run them."""

    def __init__(self, setting: Setting, n_prefix: int | None):
        self.setting, self.pair = setting, setting.pair("float32", n_prefix=n_prefix)
        self.replay = Replay(self.pair, questions(N_QUESTIONS), find_metric(METRIC), "repair")
        shape = self.replay.shape
        positions = np.linspace(0, shape.n_positions - 1, N_POSITIONS).astype(int).tolist()
        self.cells = [cell for cell in grid(DEFAULT_AXES, shape) if cell.position[0] in positions]
        # Cells of one forward each cost the same at every layer: fewer will do.
        step = len(self.cells) // N_PEER_CELLS
        self.peer_cells = self.cells[step // 2 :: step + 1]
        self.bare = BareRun(self)
        self.peers = {
            "TransformerLens": with_transformer_lens(self.replay),
            "nnsight": with_nnsight(self.replay),
        }

    def rows(self, aim: Aim) -> tuple[list[Row], float]:
        """The ratios, and our seconds per cell in the sample."""
        self.check()
        ways = {name: lambda cells=scores: self.one_by_one(cells) for name, scores in self.peers.items()}
        times = alternated(ways | {"bare": self.bare.run, "ours": self.ours}, self.setting.repeats)
        per_cell = len(self.cells) / len(self.peer_cells)
        where = f"{self.replay.shape.n_positions}-token prefix"
        facts = {"cells": len(self.cells), "peer_cells": len(self.peer_cells), "questions": N_QUESTIONS}
        found = [
            ratio(f"sweep, {where}: {name}, one forward per cell / ours", times[name], times["ours"], aim,
                  scale=per_cell, seconds_per_cell=middle(times[name]) / len(self.peer_cells), **facts)
            for name in self.peers
        ]  # fmt: skip
        ours = middle(times["ours"]) / len(self.cells)
        found.append(
            ratio(f"sweep, {where}: ours / as many tokens through all blocks", times["ours"], times["bare"],
                  Aim(0.6, "lower") if self.replay.shape.n_positions != LONG else None,
                  seconds_per_cell=ours, **facts)
        )  # fmt: skip
        return found, ours

    def ours(self) -> np.ndarray:
        """Scores of the sample, by cell and question."""
        wanted = patches(self.cells, "single", self.replay.shape)
        return score_patches(self.replay, wanted, progress=False).patched

    def one_by_one(self, scores) -> np.ndarray:
        """Scores of the peers' cells, each by a forward of all questions."""
        return np.stack([scores(cell).double().cpu().numpy() for cell in self.peer_cells])

    def check(self) -> None:
        """All tools must find the same, and the cells must do something."""
        mine = self.ours()[[self.cells.index(cell) for cell in self.peer_cells]]
        with torch.no_grad():
            every = torch.arange(len(self.replay.items), device=self.replay.recipient.device)
            plain = self.replay.store(every).scores[0].double().cpu().numpy()
        assert np.abs(mine - plain).max() > 0, "no cell changes anything"
        tolerance = 1e-3 if self.replay.recipient.dtype == torch.float32 else 0.1
        for name, scores in self.peers.items():
            off = float(np.abs(self.one_by_one(scores) - mine).max())
            assert off < tolerance, f"{name} differs by {off:.1e}"


@dataclass
class BareRun:
    """The blocks of the finetuned model, adapter merged, over as many tokens as the sample has."""

    bench: Bench

    def __post_init__(self):
        replay = self.bench.replay
        self.module = plain_copy(replay.recipient).get_decoder()
        lengths = replay.texts.lengths.float()
        width = round(float(lengths.mean()))
        rows = fitting(replay, None).rows
        n_batches = round(len(self.bench.cells) * float(lengths.sum()) / (rows * width))
        self.batches = [replay.texts.ids[:1, :1].repeat(rows, width) for _ in range(max(1, n_batches))]

    @torch.no_grad()
    def run(self) -> None:
        """One pass per batch."""
        for ids in self.batches:
            self.module(input_ids=ids, use_cache=False)


def whole_map(setting: Setting, bench: Bench, seconds_per_cell: float) -> Row:
    """The sweep of all cells with its files, kept for the benchmark of attribution."""
    shutil.rmtree(setting.folder / MAP, ignore_errors=True)
    result = exact_map(setting, bench.pair)
    n_cells = len(result.cells)
    name = f"sweep of all {n_cells} cells / its sample, scaled"
    seconds = result.summary["seconds"]
    return number(name, seconds / n_cells / seconds_per_cell, cells=n_cells, seconds=seconds)


def exact_map(setting: Setting, pair) -> SweepResult:
    """The sweep of all cells, from the last time where it is there."""
    return sweep_kv(pair, questions(N_QUESTIONS), METRIC, out=setting.folder / MAP)
