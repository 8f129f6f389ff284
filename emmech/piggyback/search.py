"""Where generated behaviour rides, coarse to fine: patch bands of the prefix cache, refine where it tells.

    found = search(pair, load_questions("refusal")[:40], detector="refusal")
    found.frame()

Answers are costly, so no grid is gone through: bands of layers by stretches of prefix tokens are patched
first, and a block that does at least ``threshold`` of what the whole prefix does is split in two, the
strongest first, down to the key or value of one token in one layer, or until ``most`` blocks. What
several blocks carry only together is not found; ``sweep_kv`` in mode leave_one_out shows such.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from emmech import defaults
from emmech.errors import PatchError
from emmech.evaluation.detectors import detector as find_detector
from emmech.evaluation.statistics import clustered_mean, paired_difference
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding, auto_limits, decode, make_batch, plan_batches, prefill
from emmech.models.kv_cache import PrefixState
from emmech.piggyback.cells import EVERYTHING, NOTHING, Cell, Patch, Shape
from emmech.piggyback.replay import Replay, SweepDirection
from emmech.piggyback.scores import PROMPTS
from emmech.piggyback.sweep import sweep_arguments
from emmech.results import Record, RunFolder, append_line, keep_lines, read_lines, write_json

ANSWERS, SEARCH = "answers.jsonl", "search.json"


@dataclass(frozen=True)
class SearchResult:
    """What every block that was patched did to the answers."""

    summary: Mapping[str, Any]
    """How it was run, and the unpatched and fully patched answers' measure."""
    blocks: Sequence[Record]
    """In the order they were patched: place, measure with interval, change, effect, depth."""

    def frame(self) -> pd.DataFrame:
        """One row per block; ``effect`` is 0 as unpatched, 1 as with the whole prefix."""
        return pd.DataFrame(self.blocks)

    def save(self, folder: str | Path) -> Path:
        """Write ``search.json``; returns its path."""
        path = Path(folder) / SEARCH
        write_json(path, {**self.summary, "blocks": list(self.blocks)})
        return path


def search(
    pair: ModelPair,
    questions: Iterable[Any],
    *,
    detector: str = defaults.DETECTOR,
    bands: int = 4,
    stretches: int = 3,
    threshold: float | int = 0.2,
    most: int = 60,
    direction: SweepDirection | str = "repair",
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    out: str | Path | None = None,
    progress: bool = True,
) -> SearchResult:
    """Find the parts of the prefix cache that change generated answers by themselves.

    Args:
        pair: From ``load_pair``.
        questions: Texts, chats or questions, behind one template prefix; answered greedily.
        detector: What is counted in the answers.
        bands: Layers are first cut into so many; ``stretches`` likewise of prefix tokens.
        threshold: Share of the whole prefix's change that a block must do to be split.
        most: Blocks to patch at most.
        direction: As in ``sweep_kv``.
        max_new_tokens: Length of the answers.
        out: Folder for the answers and the result; a stopped search continues there.
        progress: Show a progress bar.

    Raises:
        EmmechError: The questions, model or folder are refused, or the whole prefix changes nothing.
    """
    measure = find_detector(detector)
    if measure.unit is None or not threshold > 0:
        raise PatchError(
            "a detector that measures something, and a threshold above 0",
            f"got {detector} and {threshold}",
            "Correct them",
        )
    replay = Replay(pair, list(questions), PROMPTS, direction)
    decoding = Decoding(max_new_tokens)
    settings = {"detector": detector, "bands": bands, "stretches": stretches, "threshold": threshold}
    arguments = {"kind": "search", **settings, "most": most, "decoding": asdict(decoding)}
    arguments |= sweep_arguments(replay, [{}], None)
    folder = None if out is None else RunFolder(out, arguments, lines=False)
    asker = _Asker(replay, decoding, None if folder is None else folder.path / ANSWERS)
    with tqdm(total=most, disable=not progress, unit="block") as bar:
        found = _refine(asker, measure, _blocks(replay.shape, bands, stretches), threshold, most, bar)
    unpatched, full = (_mean(asker.values(patch, measure), measure.unit) for patch in (NOTHING, EVERYTHING))
    summary = {**arguments, "question_ids": replay.question_ids, "unpatched": unpatched, "full": full}
    result = SearchResult(summary, found)
    if out is not None:
        result.save(out)
    return result


def _refine(
    asker: "_Asker", measure: Any, first: Sequence[Cell], threshold: float | int, most: int, bar: tqdm
) -> list[Record]:
    """Patch blocks, and the halves of those that tell, the strongest first."""
    unpatched, full = (asker.values(patch, measure) for patch in (NOTHING, EVERYTHING))
    whole = (sum(full) - sum(unpatched)) / len(full)
    if whole == 0:
        raise PatchError(
            "a prefix whose patch changes the answers", "this one changes none", "Ask more questions"
        )
    waiting = [(float("-inf"), number, 0, cell) for number, cell in enumerate(first)]
    n_made, found = len(waiting), []
    while waiting and len(found) < most:
        _, _, depth, cell = heapq.heappop(waiting)
        values = asker.values(Patch((cell,)), measure)
        change = paired_difference(values, unpatched, asker.ids)
        effect = change.mean / whole
        found.append(
            {
                **{axis: at for axis, at in cell.coordinates().items() if axis != "kv_head"},
                "depth": depth,
                **_mean(values, measure.unit),
                "change": change.to_json(),
                "effect": effect,
            }
        )
        bar.update()
        for half in _halves(cell) if abs(effect) >= threshold else ():
            heapq.heappush(waiting, (-abs(effect), n_made, depth + 1, half))
            n_made += 1
    return found


class _Asker:
    """Greedy answers of the recipient under any patch of its prefix cache, each made once."""

    def __init__(self, replay: Replay, decoding: Decoding, path: Path | None):
        self.replay, self.decoding, self.path = replay, decoding, path
        self.ids = list(replay.question_ids)
        self.found: dict[str, list[str]] = {}
        if path is not None:
            keep_lines(path, bool)
            self.found = {line["block"]: line["answers"] for line in read_lines(path)}

    def values(self, patch: Patch, measure: Any) -> list[float]:
        """What the detector measures in each answer."""
        name = patch.cells[0].text() if patch.cells else "nothing"
        if name not in self.found:
            self.found[name] = self._answers(patch)
            if self.path is not None:
                append_line(self.path, {"block": name, "answers": self.found[name]})
        return [float(measure(text)) for text in self.found[name]]

    def _answers(self, patch: Patch) -> list[str]:
        replay, side = self.replay, self.replay.recipient
        prompts = [item.prompt for item in replay.items]
        state = PrefixState(replay.own | replay.edited([patch], 0), {}, replay.shape.n_positions)
        made: dict[int, list[int]] = {}
        limits = auto_limits(side, 1)
        for plan in plan_batches(prompts, side.config, limits, self.decoding.max_new_tokens):
            # Where padding is not exact, rows are run one by one: each has the prefix in front.
            for rows in [plan.rows] if plan.share_prefix else [(row,) for row in plan.rows]:
                batch = make_batch([prompts[row] for row in rows], side.device, share_prefix=True)
                with side.active() as module, torch.no_grad():
                    start = prefill(module, batch, state.cache(side.config, len(rows)), batch.n_shared)
                    names = [self.ids[row] for row in rows]
                    answers = decode(module, start, self.decoding, names, replay.pair.chat.end_ids)
                made |= dict(zip(rows, answers, strict=True))
        texts = replay.pair.chat.tokenizer.batch_decode(
            [made[row] for row in range(len(prompts))], skip_special_tokens=True
        )
        return [text.strip() for text in texts]


def _blocks(shape: Shape, bands: int, stretches: int) -> list[Cell]:
    """Layers by prefix tokens, cut evenly."""
    if not (1 <= bands <= shape.n_layers and 1 <= stretches <= shape.n_positions):
        raise PatchError(
            f"1 to {shape.n_layers} bands and 1 to {shape.n_positions} stretches",
            f"got {bands} and {stretches}",
            "Correct them",
        )
    layers, positions = (
        [tuple(range(n * i // parts, n * (i + 1) // parts)) for i in range(parts)]
        for n, parts in ((shape.n_layers, bands), (shape.n_positions, stretches))
    )
    return [Cell(layer=layer, position=position) for layer in layers for position in positions]


def _halves(cell: Cell) -> list[Cell]:
    """The block cut along the longer of layers and positions, then into keys and values, then not."""
    layer, position = cell.layer or (), cell.position or ()
    if len(layer) == len(position) == 1:
        return [replace(cell, kv=(kv,)) for kv in (0, 1)] if cell.kv is None else []
    axis, places = ("layer", layer) if len(layer) >= len(position) else ("position", position)
    middle = len(places) // 2
    return [replace(cell, **{axis: half}) for half in (places[:middle], places[middle:])]


def _mean(values: Sequence[float], unit: str | None) -> Record:
    return clustered_mean(values, list(range(len(values))), unit=unit).to_json()
