"""The first-order map of a sweep from one backward pass per batch of questions.

    result = attribute(pair, load_pairs("sycophancy_sports")[:8], out="runs/attribution")
    result.spearman          # with exact patches of a random sample of cells

An entry's attribution is the gradient of the score at the recipient's prefix cache times (donor -
recipient); a cell's is the sum over its entries. With several ``steps`` the gradient is averaged along
the straight line from the recipient's cache to the donor's (integrated gradients, Sundararajan et al.
2017, arXiv 1703.01365, by the midpoint rule), and all cells sum to what the whole prefix does. Either is
an estimate: a sample of cells and the top ones are patched exactly beside it.
"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from emmech.errors import PatchError
from emmech.models.checkpoints import ModelPair
from emmech.models.kv_cache import KeysValues
from emmech.piggyback.attribution_result import AttributionResult
from emmech.piggyback.cells import Cell, Patch, Shape, grid
from emmech.piggyback.replay import Replay, SweepDirection
from emmech.piggyback.running import open_folder
from emmech.piggyback.scores import MetricLike, find_metric
from emmech.piggyback.streaming import fitting, question_weights, score_patches
from emmech.piggyback.sweep import DEFAULT_AXES, labelled, run_summary, sweep_arguments
from emmech.sharding import processes


def attribute(
    pair: ModelPair,
    questions: Iterable[Any],
    metric: MetricLike = "margin",
    over: Any = DEFAULT_AXES,
    *,
    direction: SweepDirection | str = "repair",
    steps: int = 1,
    sample: int = 100,
    top: int = 10,
    seed: int = 0,
    rows: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> AttributionResult:
    """Estimate what every cell does from gradients, and patch some of them exactly.

    Args:
        pair: From ``load_pair``; best in float32.
        questions: As in ``sweep_kv``, like ``metric``, ``over`` and ``direction``.
        steps: 1 takes the gradient at the recipient's cache; more average it on the way to the donor's.
        sample: Cells to patch exactly, spread over the layers and drawn at random within them.
        top: Cells with the largest attribution to patch exactly as well.
        seed: Of the sample.
        rows: Cells times answers in a batch of exact patches; by free memory by default.
        out: Folder for the table and report; exact patches continue there after a stop.
        progress: Show a progress bar.

    Raises:
        EmmechError: The questions, cells, model or folder are refused, before any work.
    """
    if steps < 1 or sample < 0 or top < 0:
        raise PatchError(
            "at least one step, and no negative counts", f"got {steps=} {sample=} {top=}", "Correct them"
        )
    replay = Replay(pair, list(questions), find_metric(metric), direction)
    cells = grid(over, replay.shape)
    where = [cell.coordinates() for cell in cells]
    arguments = {
        "kind": "attribute",
        **{"steps": steps, "sample": sample, "top": top, "seed": seed},
        **sweep_arguments(replay, where, rows),
    }
    folder = open_folder(out, arguments, lines=False)
    started = time.monotonic()
    # Little of the work: of several processes one does it, so that all go on with the same order.
    entries = processes().from_main(lambda: entry_attributions(replay, steps=steps, progress=progress))
    seconds = time.monotonic() - started
    estimates = cell_attributions(entries, cells, replay.shape)
    sampled = stratified_sample(cells, sample, seed)
    strongest = np.argsort(-np.abs(estimates.mean(1)), kind="stable")[:top]
    checked = np.union1d(sampled, strongest).astype(int)
    if folder is not None:  # a restart may round gradients differently
        remembered = processes().from_main(lambda: folder.remember("checked", checked.tolist()))
        checked = np.array(remembered, dtype=int)
    patches = [Patch((cells[number],)) for number in checked]
    scored = score_patches(replay, patches, rows=rows, folder=folder, progress=progress)
    summary = run_summary(replay, arguments, scored) | {"seconds_gradient": seconds}
    result = AttributionResult(
        summary,
        labelled(replay, where),
        scored.unpatched,
        scored.full,
        estimates,
        checked,
        scored.patched,
        sampled,
    )
    if out is not None and processes().is_main:
        result.save(out)
    return result


def entry_attributions(
    replay: Replay, *, steps: int = 1, rows: int | None = None, progress: bool = True
) -> Float[np.ndarray, "question layer kv kv_head position"]:
    """Gradient times (donor - recipient) of every entry of the prefix cache, per question.

    Args:
        replay: The items and prefix caches.
        steps: Points on the line between the caches at which the gradient is taken.
        rows: Items per backward pass; by free memory by default.
        progress: Show a progress bar.
    """
    size = fitting(replay, rows, backward=True).rows
    lengths = np.array([len(item.ids) for item in replay.items])
    order = torch.from_numpy(np.argsort(lengths, kind="stable")).to(replay.recipient.device)
    weights, shape = question_weights(replay), replay.shape
    found = np.zeros((weights.shape[1], shape.n_layers, 2, shape.n_kv_heads, shape.n_positions))
    # The midpoint rule; one step is the gradient where the recipient is.
    points = [0.0] if steps == 1 else [(step + 0.5) / steps for step in range(steps)]
    with replay.merged(), tqdm(total=len(lengths) * steps, disable=not progress, unit="backward") as bar:
        for point in points:
            for items in order.split(size):
                mine = _of_items(replay, items, point) / len(points)
                found += np.einsum("iq,ilkhp->qlkhp", weights[items.cpu().numpy()], mine)
                bar.update(len(items))
    return found


def _of_items(
    replay: Replay, items: Int[Tensor, " item"], point: float
) -> Float[np.ndarray, "item layer kv kv_head position"]:
    """One backward pass: each item has its own copy of the cache, so its gradient is its own."""
    leaves: KeysValues = {}
    differences = []
    for layer in range(replay.shape.n_layers):
        own, other = (torch.stack(cache[layer]) for cache in (replay.own, replay.other))
        differences.append(other.to(own) - own)
        here = (own + point * differences[-1]).expand(-1, len(items), -1, -1, -1)
        key, value = (kv.clone().requires_grad_() for kv in here)
        leaves[layer] = (key, value)
    with torch.enable_grad():
        total = replay.scored(items, replay.logits(items, leaves)).sum()
        flat = [kv for keys_values in leaves.values() for kv in keys_values]
        gradients = torch.autograd.grad(total, flat)
    products = []
    for layer, difference in enumerate(differences):
        gradient = torch.stack(gradients[2 * layer : 2 * layer + 2])
        products.append((gradient.float() * difference.float()).sum(-1).cpu())
    return torch.stack(products).permute(2, 0, 1, 3, 4).double().numpy()


def cell_attributions(
    entries: Float[np.ndarray, "question layer kv kv_head position"], cells: Sequence[Cell], shape: Shape
) -> Float[np.ndarray, "cell question"]:
    """Sums over the entries of each cell."""
    found = np.zeros((len(cells), len(entries)))
    for number, cell in enumerate(cells):
        chosen = (cell.layer, cell.kv, cell.kv_head, cell.position)
        sizes = (shape.n_layers, 2, shape.n_kv_heads, shape.n_positions)
        places = np.ix_(*(range(n) if at is None else at for at, n in zip(chosen, sizes, strict=True)))
        found[number] = entries[(slice(None), *places)].sum(axis=(1, 2, 3, 4))
    return found


def stratified_sample(cells: Sequence[Cell], size: int, seed: int) -> Int[np.ndarray, " cell"]:
    """Numbers of cells drawn at random, as many from each layer as can be."""
    rng = np.random.default_rng(seed)
    strata: dict[Any, list[int]] = {}
    for number in rng.permutation(len(cells)).tolist():
        strata.setdefault(cells[number].layer, []).append(number)
    rank = {number: place for stratum in strata.values() for place, number in enumerate(stratum)}
    shuffled = rng.permutation(len(cells)).tolist()  # which layers give the last ones
    return np.array(sorted(sorted(shuffled, key=rank.__getitem__)[:size]), dtype=int)
