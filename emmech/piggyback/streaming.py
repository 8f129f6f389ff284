"""Score many patches on all items: bounded batches, records on disk, back-off, progress, resume.

A batch is a run of rows (a patch and an item each), ordered by the lowest block that has to be run,
then by item: its rows start at one block and are mostly of one length. Memory does not grow with the
number of patches: states are stored for a bounded number of items at a time.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from emmech.errors import PatchError
from emmech.models.generation import out_of_memory
from emmech.piggyback.replay import Replay, Stored
from emmech.results import RunFolder, append_line, keep_lines, read_lines

SCORES = "scores.jsonl"
CPU_TOKENS, GPU_TOKENS = 2048, 32768
"""Tokens of a batch that keep the processor busy; more would only cost memory."""


@dataclass(frozen=True)
class Budget:
    """How much is held at a time."""

    rows: int
    """Rows of a batch."""
    items: int
    """Items whose states are stored."""


@dataclass(frozen=True)
class Scored:
    """Scores per question; rows of ``patched`` are the patches."""

    unpatched: Float[np.ndarray, " question"]
    full: Float[np.ndarray, " question"]
    """Under the donor's whole prefix."""
    patched: Float[np.ndarray, "patch question"]
    seconds: float
    late_start: bool
    """Whether blocks below the patch were left out."""


def score_patches(
    replay: Replay,
    patches: Sequence[Any],
    *,
    rows: int | None = None,
    folder: RunFolder | None = None,
    progress: bool = True,
) -> Scored:
    """The metric of every question under every patch.

    Args:
        replay: The items and prefix caches.
        patches: What is replaced, as the replay understands it; duplicates are run twice.
        rows: Rows per batch; by free memory by default.
        folder: Where finished batches are written, and read again after a stop.
        progress: Show cells per second and the time left.

    Raises:
        PatchError: One row does not fit in memory.
    """
    started = time.monotonic()
    budget = fitting(replay, rows)
    if folder is not None:  # free memory may differ when a stopped run goes on
        budget = Budget(**folder.remember("budget", asdict(budget)))
    stream = _Stream(replay, patches, budget, None if folder is None else folder.path / SCORES, progress)
    with torch.no_grad(), replay.merged(), stream.bar:
        for number, items in enumerate(stream.chunks):
            stream.run_chunk(number, items)
    weights = question_weights(replay)
    return Scored(
        *(stream.stored @ weights),
        stream.scores @ weights,
        time.monotonic() - started,
        bool(replay.late_start),
    )


class _Stream:
    def __init__(
        self, replay: Replay, patches: Sequence[Any], budget: Budget, path: Path | None, progress: bool
    ):
        self.replay, self.patches, self.budget, self.path = replay, patches, budget, path
        found = [replay.start(patch) for patch in patches]
        self.starts, self.runs = np.array(found, dtype=int).reshape(-1, 2).T
        lengths = np.array([len(item.ids) for item in replay.items])
        order = np.argsort(lengths, kind="stable")
        self.chunks = [order[i : i + budget.items] for i in range(0, len(order), budget.items)]
        self.stored = np.zeros((2, len(lengths)))
        self.scores = np.zeros((len(patches), len(lengths)))
        self.done: dict[tuple[int, int], list[Any]] = {}
        if path is not None:
            keep_lines(path, bool)  # drops a broken last line
            self.done = {(line["chunk"], line["batch"]): line["scores"] for line in read_lines(path)}
        self.bar = tqdm(total=len(patches), disable=not progress, unit="cell", dynamic_ncols=True)
        self._rows_done = 0

    def run_chunk(self, chunk: int, items: Int[np.ndarray, " item"]) -> None:
        """All patches of some items; -1 is the number of the batch that stores their states."""
        batches = self._batches(items)
        keys = [(chunk, number) for number in range(-1, len(batches))]
        stored = None if all(key in self.done for key in keys) else self._store(items)
        if (chunk, -1) not in self.done:
            self._finish(chunk, -1, stored.scores.tolist())
        self.stored[:, items] = self.done[chunk, -1]
        for number, (patch, item) in enumerate(batches):
            if (chunk, number) not in self.done:
                self._finish(chunk, number, self._score(stored, items, patch, item))
            self.scores[patch, items[item]] = self.done[chunk, number]
            self._advance(len(patch))
        same = np.flatnonzero(self.starts > self.replay.shape.n_layers)
        self.scores[np.ix_(same, items)] = self.stored[np.ix_(self.runs[same], items)]
        self._advance(len(same) * len(items))

    def _batches(
        self, items: Int[np.ndarray, " item"]
    ) -> list[tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]]:
        """The patch and the item (its place in the chunk) of each row, batch by batch."""
        to_run = np.flatnonzero(self.starts <= self.replay.shape.n_layers)
        patch, item = (grid.ravel() for grid in np.meshgrid(to_run, np.arange(len(items)), indexing="ij"))
        order = np.lexsort((patch, item, self.starts[patch]))  # items of a chunk are sorted by length
        size = self.budget.rows
        return [(patch[order[i : i + size]], item[order[i : i + size]]) for i in range(0, len(order), size)]

    def _store(self, items: Int[np.ndarray, " item"]) -> Stored:
        """The stored runs of a chunk; on first use, whether starting late is right for this model."""
        size = max(1, self.budget.rows // 2)
        scores = torch.zeros(2, len(items))
        states = None
        for first in range(0, len(items), size):
            part = self.replay.store(self._numbers(items[first : first + size]))
            scores[:, first : first + size] = part.scores
            if part.states is not None:
                if states is None:
                    n_runs, n_blocks, _, _, d_model = part.states.shape
                    states = part.states.new_zeros(n_runs, n_blocks, len(items), self.replay.width, d_model)
                states[:, :, first : first + size, : part.states.shape[3]] = part.states
        stored = Stored(states, scores)
        if self.replay.late_start is None:
            self.replay.late_start = self.replay.verify(self._numbers(items))
        return stored

    def _score(
        self,
        stored: Stored,
        items: Int[np.ndarray, " item"],
        patch: Int[np.ndarray, " row"],
        item: Int[np.ndarray, " row"],
    ) -> list[float]:
        """The scores of a batch, in two halves where memory runs out."""
        try:
            return self._run(stored, items, patch, item)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if len(patch) == 1:
                raise PatchError(
                    "memory for one row at a time",
                    "it ran out even then",
                    "Ask shorter questions, or use a smaller dtype or quantization",
                ) from error
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            half = len(patch) // 2
            parts = (slice(half), slice(half, None))
            return [value for part in parts for value in self._score(stored, items, patch[part], item[part])]

    def _run(
        self,
        stored: Stored,
        items: Int[np.ndarray, " item"],
        patch: Int[np.ndarray, " row"],
        item: Int[np.ndarray, " row"],
    ) -> list[float]:
        start = int(self.starts[patch].min()) if self.replay.late_start else 0
        at = (self._numbers(self.runs[patch]), self._numbers(item))
        patches = [self.patches[one] for one in patch]
        return self.replay.run(patches, self._numbers(items[item]), start, stored, at).tolist()

    def _numbers(self, values: Int[np.ndarray, " row"]) -> Int[Tensor, " row"]:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.replay.recipient.device)

    def _finish(self, chunk: int, batch: int, scores: list[Any]) -> None:
        self.done[chunk, batch] = scores
        if self.path is not None:
            append_line(self.path, {"chunk": chunk, "batch": batch, "scores": scores})

    def _advance(self, rows: int) -> None:
        """Move the bar by whole cells."""
        before, self._rows_done = self._rows_done, self._rows_done + rows
        n = len(self.replay.items)
        self.bar.update(self._rows_done // n - before // n)


def fitting(replay: Replay, rows: int | None, *, backward: bool = False) -> Budget:
    """Batches that keep the processor busy within a quarter of the free memory; states within another.

    ``backward`` keeps what every block computes until the gradient has come back through it.
    """
    side, config = replay.recipient, replay.recipient.config
    n_read = max(item.n_read for item in replay.items)
    if side.device.type == "cuda":
        free, tokens = torch.cuda.mem_get_info(side.device)[0], GPU_TOKENS
    else:
        free, tokens = psutil.virtual_memory().available, CPU_TOKENS
    size, n_layers = side.dtype.itemsize, replay.shape.n_layers
    d_kv = 2 * replay.shape.n_kv_heads * replay.own[0][0].shape[-1]
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_block = size * replay.width * (8 * config.hidden_size + 4 * inner)
    # Expanded to all heads and joined, keys and values of one layer live a few times at once.
    per_block += size * 8 * (replay.shape.n_positions + replay.width) * d_kv
    per_row = per_block * (n_layers if backward else 1) + 12 * n_read * config.vocab_size
    per_item = 2 * size * n_layers * replay.width * config.hidden_size
    return Budget(
        rows or max(1, min(tokens // replay.width, int(0.25 * free // per_row))),
        max(1, min(len(replay.items), int(0.25 * free // per_item))),
    )


def question_weights(replay: Replay) -> Float[np.ndarray, "item question"]:
    """Sums items to questions, each with its weight."""
    weights = np.zeros((len(replay.items), len(replay.question_ids)))
    place = {name: number for number, name in enumerate(replay.question_ids)}
    for number, item in enumerate(replay.items):
        weights[number, place[item.question_id]] = item.weight
    return weights
