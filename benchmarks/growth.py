"""How a sweep grows: time and peak memory against cells, questions, prefix length and batch.

    python -m benchmarks growth

Every point is the median of some processes. Each loads the pair, sweeps cells spread over all layers, and
says how long that took (in processor seconds, which other programs change less; on a GPU by the clock) and
the most memory it held meanwhile (on a GPU, the GPU's).
"""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.growth_figure import AXES, QUANTITIES, Size, exponent
from benchmarks.measure import Aim, Row, forget_peak, number, peak_memory, timed
from benchmarks.setting import Setting, pairs
from benchmarks.sweep import METRIC

AIMS = {
    ("cells", "seconds"): Aim(1.1, "lower"),
    ("cells", "peak_gib"): Aim(0.05, "lower"),
    ("questions", "seconds"): Aim(1.1, "lower"),
}
"""The largest exponents that are wanted: linear in cells and questions, and flat in memory."""
CHEAP = 60.0
"""Seconds of a first run; a point that takes longer is run once."""


def measure(setting: Setting) -> list[Row]:
    """A row per point, then the exponents."""
    points: list[Row] = []
    for axis, values in AXES.items():
        for value in values:
            size = replace(Size(), **{axis: value})
            found = point(setting, size)
            what = f"{size.cells} cells, {size.questions} questions, {size.prefix}-token prefix"
            name = f"seconds of {what}, {size.rows} rows a batch"
            points.append(number(name, found["seconds"], axis=axis, at=value, **found))
    return points + [
        number(f"growth of {what} with {axis}: exponent", exponent(points, axis, quantity),
               AIMS.get((axis, quantity)))
        for axis in AXES for quantity, what in QUANTITIES.items()
    ]  # fmt: skip


def point(setting: Setting, size: Size) -> dict[str, float]:
    """The medians of some processes that sweep this size."""
    runs = [child(setting, size)]
    while len(runs) < setting.repeats and runs[0]["seconds"] < CHEAP:
        runs.append(child(setting, size))
    seconds, peaks = ([run[key] for run in runs] for key in QUANTITIES)
    spread = {"low": min(seconds), "high": max(seconds), "runs": len(runs)}
    return {"seconds": median(seconds), "peak_gib": median(peaks), **spread}


def child(setting: Setting, size: Size) -> dict[str, float]:
    """What a process of its own says of a sweep of this size."""
    how = [setting.base, str(setting.adapter), setting.dtype or "float32", setting.device]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.growth", *how, json.dumps(asdict(size))],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def sweep(base: str, adapter: str, dtype: str, device: str, size: Size) -> dict[str, float]:
    """Load, sweep, and say seconds and peak memory (the GPU's, where there is one) of the sweep alone."""
    from emmech.piggyback.cells import grid, patches
    from emmech.piggyback.replay import Replay
    from emmech.piggyback.scores import find_metric
    from emmech.piggyback.streaming import score_patches
    from emmech.piggyback.sweep import DEFAULT_AXES

    setting = Setting("", base, Path(adapter), device, dtype, 1, Path())
    replay = Replay(setting.pair(n_prefix=size.prefix), pairs(size.questions), find_metric(METRIC), "repair")
    cells = grid(DEFAULT_AXES, replay.shape)
    chosen = np.linspace(0, len(cells) - 1, size.cells).astype(int)
    wanted = patches([cells[number] for number in chosen], "single", replay.shape)
    forget_peak()
    taken = timed(lambda: score_patches(replay, wanted, rows=size.rows, progress=False))
    place = replay.recipient.device
    seconds = taken.wall if place.type == "cuda" else taken.cpu
    return {"seconds": seconds, "peak_gib": peak_memory(place) / 2**30}


if __name__ == "__main__":
    *models, wanted_size = sys.argv[1:]
    print(json.dumps(sweep(*models, Size(**json.loads(wanted_size)))))
