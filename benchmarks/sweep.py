"""Every layer x position x {K, V} cell of the prefix: against one forward per cell, and the bare cost.

A sample of cells is timed in turn with those of each tool, and all is scaled to the whole map; all tools
must give the same scores first. Our cost of a cell is linear in the blocks from its own up, so the sample
is from the middle blocks, where it is the mean; what is done once is timed apart, and not scaled. The
metric is the margin of a refusal, two answers to a question.

``bare`` and the other tools read each answer behind its question, by itself; here both answers share a
reading of their question, so fewer tokens are run. ``bare`` passes its tokens through all blocks, in full
batches without a prefix; once without logits, once with as many as are read. The last row takes both costs
per token that each has run, padding not counted.
"""

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.measure import (
    Aim,
    Row,
    Seconds,
    alternated,
    middle,
    not_measured,
    ratio,
    release,
    why_not,
)
from benchmarks.peers import PEERS, CellScores
from benchmarks.setting import Setting, pairs
from emmech.models.checkpoints import ModelPair
from emmech.models.views import plain_copy
from emmech.piggyback.cells import Cell, grid, patches
from emmech.piggyback.replay import Replay
from emmech.piggyback.scores import find_metric
from emmech.piggyback.streaming import fitting, question_weights, score_patches
from emmech.piggyback.sweep import DEFAULT_AXES, sweep_kv
from emmech.piggyback.sweep_result import SweepResult
from emmech.results import fingerprint, versions

METRIC = "margin"
N_QUESTIONS, N_POSITIONS, N_PEER_CELLS = 8, 24, 6
BARE_SHARE = 8
"""Of the tokens, the bare passes run one in so many: their cost is that many times larger."""


def measure(setting: Setting) -> list[Row]:
    """Rows at the template's own prefix."""
    return Bench(setting, None).rows(Aim(4.0))


class Bench:
    """One prefix: the cells of the sample, and each way to run them."""

    def __init__(self, setting: Setting, n_prefix: int | None, of: str = METRIC):
        self.setting, self.pair = setting, setting.pair("float32", n_prefix=n_prefix)
        asked, metric = pairs(N_QUESTIONS), find_metric(of)
        self.replay = Replay(self.pair, asked, metric, "repair")
        self.alone = Replay(self.pair, asked, metric, "repair", together=False)
        shape = self.replay.shape
        layers = sorted({(shape.n_layers - 1) // 2, shape.n_layers // 2})
        positions = spread(shape.n_positions, N_POSITIONS)
        self.cells = grid(
            [Cell((i,), (at,), None, (kv,)) for i in layers for at in positions for kv in (0, 1)], shape
        )
        self.peer_cells = [self.cells[number] for number in spread(len(self.cells), N_PEER_CELLS)]
        self.n_cells = len(grid(DEFAULT_AXES, shape))
        self.share = self.n_cells / len(self.cells)

    def rows(self, aim: Aim) -> list[Row]:
        """The ratios; ``aim`` is that of other tools' time over ours."""
        mine = self.ours()[[self.cells.index(cell) for cell in self.peer_cells]]
        with torch.no_grad():
            every = torch.arange(len(self.replay.items), device=self.replay.recipient.device)
            plain = self.replay.store(every).scores[0].double().cpu().numpy()
        assert np.abs(mine - plain).max() > 0, "no cell changes anything"
        found = []
        for name in PEERS:
            found.append(self.against(name, mine, aim))
            release()
        return found + self.over_bare()

    def against(self, name: str, mine: np.ndarray, aim: Aim) -> Row:
        """Another tool over ours; it must find the scores that are ``mine``."""
        title = self.title(f"{name}, one forward per cell / ours")
        package, make = PEERS[name]
        if obstacle := why_not(package, self.pair.base.module):
            return not_measured(title, obstacle)
        scores = make(self.alone)
        off = float(np.abs(self.one_by_one(scores) - mine).max())
        assert off < (1e-3 if self.pair.base.dtype == torch.float32 else 0.1), f"{name} differs by {off:.1e}"
        theirs, ours = self.in_turn({name: lambda: self.one_by_one(scores)})
        scale = self.n_cells / len(self.peer_cells)
        return ratio(title, theirs, ours, aim, scale=scale, **self.facts(ours))

    def over_bare(self) -> list[Row]:
        """Ours over a model's bare passes."""
        bare = BareRun(self)
        blocks, logits, ours = self.in_turn({"blocks": bare.run, "logits": lambda: bare.run(logits=True)})
        facts, scale = self.facts(ours), 1 / (BARE_SHARE * self.share)
        own_tokens = int(self.replay.texts.lengths.sum())
        kinds = {
            "ours / bare, each answer by itself": (blocks, scale),
            "ours / bare with the same logits": (logits, scale),
            "ours / bare, per token run": (blocks, scale * bare.n_tokens / own_tokens),
        }
        facts |= {"tokens_of_a_cell": own_tokens, "tokens_of_bare": bare.n_tokens}
        return [
            ratio(self.title(what), ours, taken, Aim(0.6, "lower"), scale=by, **facts)
            for what, (taken, by) in kinds.items()
        ]

    def in_turn(self, ways: dict[str, Callable[[], object]]) -> list[list[Seconds]]:
        """The times of each way, and last those of ours for the whole map."""
        for way in ways.values():
            way()
        once = {"ours": self.ours, "once": lambda: score_patches(self.replay, [], progress=False)}
        *others, sample, fixed = alternated(ways | once, self.setting.repeats).values()
        return [*others, [whole(*taken, self.share) for taken in zip(sample, fixed, strict=True)]]

    def title(self, what: str) -> str:
        n_answers = len(self.alone.items) // N_QUESTIONS
        answers = "one answer" if n_answers == 1 else f"{n_answers} answers"
        return f"sweep of {answers}, {self.replay.shape.n_positions}-token prefix: {what}"

    def facts(self, ours: list[Seconds]) -> Row:
        return {
            "cells": self.n_cells,
            "of_which_timed": len(self.cells),
            "by_peers": len(self.peer_cells),
            "questions": N_QUESTIONS,
            "our_minutes_for_all": middle(ours) / 60,
        }

    def ours(self) -> np.ndarray:
        """Scores of the sample, by cell and question."""
        wanted = patches(self.cells, "single", self.replay.shape)
        return score_patches(self.replay, wanted, progress=False).patched

    def one_by_one(self, scores: CellScores) -> np.ndarray:
        """Scores of the peers' cells, each by a forward of all questions and answers."""
        found = np.stack([scores(cell).double().cpu().numpy() for cell in self.peer_cells])
        return found @ question_weights(self.alone)


class BareRun:
    """The finetuned model, adapter merged, over a part of as many tokens as the sample has."""

    def __init__(self, bench: Bench):
        replay = bench.alone
        model = plain_copy(replay.recipient)
        self.blocks, self.head = model.get_decoder(), model.get_output_embeddings()
        width = round(float(replay.texts.lengths.float().mean()))
        rows = fitting(replay, None).rows
        n_rows = len(bench.cells) * len(replay.items) // BARE_SHARE
        self.batches = [
            replay.texts.ids[:1, :1].repeat(min(rows, n_rows - first), width)
            for first in range(0, n_rows, rows)
        ]
        self.n_tokens = round(BARE_SHARE * sum(ids.numel() for ids in self.batches) / len(bench.cells))
        """To a cell."""
        self.n_read = round(np.mean([item.n_read for item in replay.items]))

    @torch.no_grad()
    def run(self, *, logits: bool = False) -> None:
        """One pass per batch."""
        for ids in self.batches:
            states = self.blocks(input_ids=ids, use_cache=False)[0]
            if logits:
                self.head(states[:, -self.n_read :].flatten(0, 1))


def whole(sample: Seconds, once: Seconds, share: float) -> Seconds:
    """The time of ``share`` times as many cells, what is done once counted once."""
    return Seconds(*(fixed + share * (all_of - fixed) for all_of, fixed in zip(sample, once, strict=True)))


def spread(n: int, wanted: int) -> list[int]:
    """``wanted`` of the numbers below ``n`` (all, where there are fewer), evenly placed."""
    wanted = min(n, wanted)
    return [int((place + 0.5) * n / wanted) for place in range(wanted)]


def exact_map(setting: Setting, pair: ModelPair) -> SweepResult:
    """The sweep of all cells, kept from the last time where the same was swept."""
    what = fingerprint([METRIC, N_QUESTIONS, dict(pair.provenance), versions()])
    return sweep_kv(pair, pairs(N_QUESTIONS), METRIC, out=setting.folder / f"map-{setting.name}-{what}")
