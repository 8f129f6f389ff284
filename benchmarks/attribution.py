"""The same map from gradients: its cost in forward passes, and how well it ranks the cells.

One forward is that of the finetuned model as it was loaded, over all questions and answers behind the
prefix cache, with logits where they are read. The exact map takes minutes once, and is kept.
"""

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.measure import Aim, Row, alternated, number, ratio
from benchmarks.setting import Setting, pairs
from benchmarks.sweep import METRIC, N_QUESTIONS, exact_map
from emmech.piggyback.attribution import cell_attributions, entry_attributions
from emmech.piggyback.cells import grid
from emmech.piggyback.replay import Replay
from emmech.piggyback.scores import find_metric
from emmech.piggyback.streaming import fitting
from emmech.piggyback.sweep import DEFAULT_AXES

STEPS = (1, 8)


def measure(setting: Setting) -> list[Row]:
    """Cost with one gradient, and agreement with the exact map with one and with several."""
    pair = setting.pair("float32")
    replay = Replay(pair, pairs(N_QUESTIONS), find_metric(METRIC), "repair")
    ways = {
        "attribution": lambda: entry_attributions(replay, progress=False),
        "forward": lambda: forward(replay),
    }
    for way in ways.values():
        way()
    times = alternated(ways, 3 * setting.repeats)
    rows = [
        ratio("attribution of all cells / one forward", times["attribution"], times["forward"],
              Aim(3.0, "lower"), questions=N_QUESTIONS)
    ]  # fmt: skip
    exact = exact_map(setting, pair)
    cells = grid(DEFAULT_AXES, replay.shape)
    for steps in STEPS:
        entries = entry_attributions(replay, steps=steps, progress=False)
        estimated = cell_attributions(entries, cells, replay.shape).mean(1)
        found = float(spearmanr(estimated, exact.differences.mean(1)).statistic)
        of_whole = float(estimated.sum() / np.mean(exact.full - exact.unpatched))
        name = f"Spearman with the exact map, {steps} gradient{'s' if steps > 1 else ''}"
        aim = Aim(0.8) if setting.is_embedded else None
        rows.append(number(name, found, aim, cells=len(cells), sum_over_whole=of_whole))
    return rows


@torch.no_grad()
def forward(replay: Replay) -> None:
    """The scores of all items, unpatched, in as few batches as attribution takes."""
    rows = fitting(replay, None, backward=True).rows
    order = torch.argsort(replay.texts.lengths, stable=True)
    for items in order.split(rows):
        replay.scored(items, replay.logits(items, {}))
