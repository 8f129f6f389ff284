"""Which part of the prefix cache carries a behaviour: patch every cell of a grid, one at a time.

    result = sweep_kv(pair, load_pairs("sycophancy_sports")[:8], out="runs/sweep")
    result.figure()

Each cell is what later tokens read: the prefix's own later activations stay the recipient's (see
`emmech.piggyback.replay`). Nothing is sampled; use float32, since in bfloat16 single cells drown in
rounding.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from emmech.models.checkpoints import ModelPair
from emmech.piggyback.cells import Mode, grid, patches
from emmech.piggyback.replay import Replay, SweepDirection
from emmech.piggyback.running import open_folder
from emmech.piggyback.scores import MetricLike, find_metric
from emmech.piggyback.streaming import Scored, score_patches
from emmech.piggyback.sweep_result import SweepResult
from emmech.results import Record, fingerprint, versions
from emmech.sharding import processes

DEFAULT_AXES = ("layer", "position", "kv")


def sweep_kv(
    pair: ModelPair,
    questions: Iterable[Any],
    metric: MetricLike = "margin",
    over: Any = DEFAULT_AXES,
    *,
    mode: Mode | str = "single",
    direction: SweepDirection | str = "repair",
    rows: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> SweepResult:
    """Patch the recipient's prefix cache with the donor's, cell by cell, and score given answers.

    Args:
        pair: From ``load_pair``; best in float32.
        questions: Pairs of answers for ``margin``; else texts, chats or questions, behind one prefix.
        metric: ``margin``, ``kl``, ``target:TEXT``, ``target`` (chats that end with the answer), a
            function of the first token's logits, or a ``Metric``; see `emmech.piggyback.scores`.
        over: Axes among layer, position, kv_head and kv, for their product; a list of such tuples, for
            their union; or a list of ``Cell``.
        mode: Replace the cell (``single``), all but it (``leave_one_out``), or it in its layer and all
            below (``cumulative_up``) or above (``cumulative_down``).
        direction: ``repair`` patches the base's entries into the finetuned model, ``induce`` the
            finetuned's into the base.
        rows: Cells times answers in a batch; by free memory by default.
        out: Folder for scores, table and report; a stopped run continues there.
        progress: Show a progress bar.

    Raises:
        EmmechError: The questions, cells, model or folder are refused, before any work.
    """
    replay = Replay(pair, list(questions), find_metric(metric), direction)
    cells = grid(over, replay.shape)
    wanted = patches(cells, mode, replay.shape)
    where = [cell.coordinates() for cell in cells]
    arguments = {"kind": "sweep-kv", "mode": mode, **sweep_arguments(replay, where, rows)}
    folder = open_folder(out, arguments, lines=False)
    scored = score_patches(replay, wanted, rows=rows, folder=folder, progress=progress)
    result = sweep_result(replay, arguments, where, scored)
    if out is not None and processes().is_main:
        result.save(out)
    return result


def sweep_arguments(replay: Replay, where: list[Record], rows: int | None) -> Record:
    """What defines a sweep: recorded with its results, and compared before it is continued."""
    items = [
        [item.question_id, item.prompt.ids, answer, weight]
        for item in replay.items
        for answer, weight in zip(item.answers, item.weights, strict=True)
    ]
    return {
        "metric": replay.metric.name,
        "target": replay.recipient.name,
        "source": replay.donor.name,
        "grid": fingerprint(where),
        "n_cells": len(where),
        "questions": fingerprint(items),
        "rows": rows or "auto",
        "provenance": dict(replay.pair.provenance),
        "versions": versions(),
    }


def sweep_result(replay: Replay, arguments: Record, where: list[Record], scored: Scored) -> SweepResult:
    """The result of a finished sweep."""
    summary = run_summary(replay, arguments, scored)
    return SweepResult(summary, labelled(replay, where), scored.unpatched, scored.full, scored.patched)


def labelled(replay: Replay, where: list[Record]) -> list[Record]:
    """Coordinates along the axes that are used, and the text of the token at a position."""
    used = [axis for axis in where[0] if any(cell[axis] is not None for cell in where)]
    cells = [{axis: cell[axis] for axis in used} for cell in where]
    if "position" in used:
        for cell in cells:
            at = cell["position"]
            cell["token"] = replay.prompt.token_texts[at] if isinstance(at, int) else None
    return cells


def run_summary(replay: Replay, arguments: Record, scored: Scored) -> Record:
    """What a result says of its run."""
    notes = list(replay.pair.notes)
    if replay.recipient.dtype.itemsize < 4:
        dtype = str(replay.recipient.dtype).removeprefix("torch.")
        notes.append(f"Scores are in {dtype}: small effects are its rounding. Load the pair in float32.")
    return {
        **arguments,
        "tokens": list(replay.prompt.token_texts[: replay.prompt.n_prefix]),
        "question_ids": replay.question_ids,
        "notes": notes,
        "seconds": scored.seconds,
        "late_start": scored.late_start,
    }
