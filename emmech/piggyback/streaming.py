"""Score many patches on all items: bounded batches, records on disk, back-off, progress, resume.

A batch is a run of rows (a patch and an item each), ordered by the lowest block that has to be run,
then by item: its rows start at one block and are mostly of one length. Memory does not grow with the
number of patches: states are stored for a bounded number of items at a time. Of several processes,
each runs its share of the batches and writes a file of its own; at the end there is one.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, pairwise
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
from emmech.results import RunFolder, append_line, fingerprint, read_lines
from emmech.sharding import Processes, processes

SCORES = "scores.jsonl"
Key = tuple[int, int]
"""Which batch: its chunk, and its number there."""
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
    file: str = SCORES,
    progress: bool = True,
) -> Scored:
    """The metric of every question under every patch.

    Args:
        replay: The items and prefix caches.
        patches: What is replaced, as the replay understands it; duplicates are run twice.
        rows: Rows per batch; by free memory by default.
        folder: Where finished batches are written, and read again after a stop.
        file: Their name there: other patches in one folder need another.
        progress: Show cells per second and the time left.

    Raises:
        PatchError: One row does not fit in memory, or another version of emmech began in this folder.
    """
    started = time.monotonic()
    choose = partial(_chosen, processes(), folder)
    with torch.no_grad(), replay.merged():
        budget = Budget(**choose("budget", lambda: asdict(fitting(replay, rows))))
        if replay.late_start is None:
            replay.late_start = choose("late_start", lambda: replay.verify(shortest(replay)[:2]))
        stream = _Stream(replay, patches, budget, folder, file, progress)
        stream.run()
    weights = question_weights(replay)
    return Scored(
        *(stream.stored @ weights),
        stream.scores @ weights,
        time.monotonic() - started,
        bool(replay.late_start),
    )


def _chosen(ours: Processes, folder: RunFolder | None, name: str, make: Callable[[], Any]) -> Any:
    """What the main process makes of it, the same in every process and when a stopped run goes on."""
    return ours.from_main(lambda: make() if folder is None else folder.remember(name, make()))


class _Stream:
    """Batches of rows, by chunk of items and number in it; -1 is the one that stores a chunk's states."""

    def __init__(
        self,
        replay: Replay,
        patches: Sequence[Any],
        budget: Budget,
        folder: RunFolder | None,
        file: str,
        progress: bool,
    ):
        self.replay, self.patches, self.budget = replay, patches, budget
        self.ours, self.folder, self.file = processes(), folder, file
        found = [replay.start(patch) for patch in patches]
        self.starts, self.runs = np.array(found, dtype=int).reshape(-1, 2).T
        order = shortest(replay).cpu().numpy()
        self.chunks = [order[i : i + budget.items] for i in range(0, len(order), budget.items)]
        self._refuse_other_batches()
        self.stored = np.zeros((2, len(order)))
        self.scores = np.zeros((len(patches), len(order)))
        self.sizes = {key: n for number in range(len(self.chunks)) for key, n in self._sizes(number)}
        self.done: dict[Key, np.ndarray] = {}
        if folder is not None:
            self.done = self.ours.from_main(lambda: _written(folder, file))
        self.mine = self.ours.share([key for key in self.sizes if key not in self.done])
        here = sum(self.sizes[key] for key in [*self.done, *self.mine])
        self.bar = tqdm(
            total=math.ceil(here / len(order)),
            disable=not (progress and self.ours.is_main),
            unit="cell",
            dynamic_ncols=True,
        )
        self._rows_done = 0

    def _refuse_other_batches(self) -> None:
        """Refuse records whose rows another version put in another order."""
        rows = [part.tolist() for items in self.chunks for batch in self._batches(items) for part in batch]
        plan = fingerprint(rows)
        name = "batches" if self.file == SCORES else f"batches of {self.file}"
        if _chosen(self.ours, self.folder, name, lambda: plan) != plan:
            raise PatchError(
                "a sweep begun by this version of emmech",
                f"'{self.folder and self.folder.path}' was begun by one that cut its batches in another way",
                "Delete that folder, or name another",
            )

    def run(self) -> None:
        """Run the batches of this process, and bring those of all together."""
        made: dict[Key, np.ndarray] = {}
        with self.bar:
            self._advance(sum(self.sizes[key] for key in self.done))
            for chunk, keys in groupby(self.mine, lambda key: key[0]):
                made |= self._run_chunk(self.chunks[chunk], list(keys))
        self.done |= self.ours.together(made)
        if self.folder is not None:
            self.ours.from_main(lambda: _put_together(self.folder, self.file, self.done))
        for chunk, items in enumerate(self.chunks):
            self._fill(chunk, items)

    def _run_chunk(self, items: Int[np.ndarray, " item"], keys: Sequence[Key]) -> dict[Key, np.ndarray]:
        stored, batches = self._store(items), self._batches(items)
        made = {}
        for chunk, number in keys:
            if number < 0:
                scores = stored.scores.double().numpy()
            else:
                scores = np.array(self._score(stored, items, *batches[number]))
            made[chunk, number] = scores
            if self.folder is not None:
                record = {"chunk": chunk, "batch": number, "scores": scores.tolist()}
                append_line(self.folder.file(self.file), record)
            self._advance(self.sizes[chunk, number])
        return made

    def _fill(self, chunk: int, items: Int[np.ndarray, " item"]) -> None:
        """Put the scores of a chunk in their places."""
        self.stored[:, items] = self.done[chunk, -1]
        for number, (patch, item) in enumerate(self._batches(items)):
            self.scores[patch, items[item]] = self.done[chunk, number]
        same = np.flatnonzero(self.starts > self.replay.shape.n_layers)
        self.scores[np.ix_(same, items)] = self.stored[np.ix_(self.runs[same], items)]

    def _sizes(self, chunk: int) -> Iterator[tuple[Key, int]]:
        """The batches of a chunk, and how many rows of the result each brings."""
        items = self.chunks[chunk]
        sizes = [len(patch) for patch, _ in self._batches(items)]
        yield (chunk, -1), len(self.patches) * len(items) - sum(sizes)
        yield from (((chunk, number), size) for number, size in enumerate(sizes))

    def _batches(
        self, items: Int[np.ndarray, " item"]
    ) -> list[tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]]:
        """The patch and the item (its place in the chunk) of each row, batch by batch."""
        to_run = np.flatnonzero(self.starts <= self.replay.shape.n_layers)
        patch, item = (grid.ravel() for grid in np.meshgrid(to_run, np.arange(len(items)), indexing="ij"))
        order = np.lexsort((patch, item, self.starts[patch]))  # items of a chunk are sorted by length
        patch, item = patch[order], item[order]
        same = np.stack([self.starts[patch], self.replay.texts.lengths.cpu().numpy()[items[item]]])
        cuts = batch_ends(same, self.budget.rows)
        return [(patch[i:j], item[i:j]) for i, j in pairwise([0, *cuts])]

    def _store(self, items: Int[np.ndarray, " item"]) -> Stored:
        """The stored runs of a chunk."""
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
        return Stored(states, scores)

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

    def _advance(self, rows: int) -> None:
        """Move the bar by whole cells."""
        before, self._rows_done = self._rows_done, self._rows_done + rows
        n = len(self.replay.items)
        self.bar.update(self._rows_done // n - before // n)


def batch_ends(kinds: Int[np.ndarray, "kind row"], size: int) -> list[int]:
    """Where batches of at most ``size`` rows end: between rows of two kinds, if that half fills a batch.

    Rows of one start and one length need no padding, and no block that only some of them have to run.
    """
    borders = np.flatnonzero((kinds[:, 1:] != kinds[:, :-1]).any(0)) + 1
    ends, n_rows = [0], kinds.shape[1]
    while ends[-1] < n_rows:
        last = min(ends[-1] + size, n_rows)
        before = np.searchsorted(borders, last, side="right") - 1
        half_full = before >= 0 and borders[before] >= ends[-1] + size / 2
        ends.append(int(borders[before]) if last < n_rows and half_full else last)
    return ends[1:]


def shortest(replay: Replay) -> Int[Tensor, " item"]:
    """The numbers of the items, short ones first."""
    lengths = np.array([len(item.ids) for item in replay.items])
    return torch.from_numpy(np.argsort(lengths, kind="stable")).to(replay.recipient.device)


def _written(folder: RunFolder, name: str) -> dict[Key, np.ndarray]:
    """The whole batches in the files of all processes, put into one file."""
    lines = [line for file in folder.files(name) for line in read_lines(file)]
    done = {(line["chunk"], line["batch"]): np.array(line["scores"]) for line in lines}
    _put_together(folder, name, done)
    return done


def _put_together(folder: RunFolder, name: str, done: Mapping[Key, np.ndarray]) -> None:
    """One file of batches in their order, as one process that is not stopped writes it."""
    lines = ({"chunk": key[0], "batch": key[1], "scores": done[key].tolist()} for key in sorted(done))
    folder.replace(name, lines)


def fitting(replay: Replay, rows: int | None, *, backward: bool = False) -> Budget:
    """Batches that keep the processor busy within a quarter of the free memory; states within another.

    ``backward`` keeps what every block computes until the gradient has come back through it.
    """
    side, config = replay.recipient, replay.recipient.config
    n_read = max(item.n_read for item in replay.items)
    if side.device.type == "cuda":
        free, tokens = torch.cuda.mem_get_info(side.device)[0], GPU_TOKENS
    else:
        free, tokens = psutil.virtual_memory().available // processes().count, CPU_TOKENS
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
    """1 where an item is of a question: its score is the sum of theirs."""
    weights = np.zeros((len(replay.items), len(replay.question_ids)))
    place = {name: number for number, name in enumerate(replay.question_ids)}
    for number, item in enumerate(replay.items):
        weights[number, place[item.question_id]] = 1
    return weights
