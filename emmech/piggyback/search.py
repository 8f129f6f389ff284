"""Where generated behaviour rides, coarse to fine: patch bands of the prefix cache, refine where it tells.

    found = search(pair, load_questions("refusal")[:40], "refusal")
    found.frame()

Answers are costly, so no grid is gone through: bands of layers by stretches of prefix tokens are patched
first, and a block that does at least ``threshold`` of what the whole prefix does is split in two, the
strongest first, down to the key or value of one token in one layer, or until ``most`` blocks. What
several blocks carry only together is not found; ``sweep_kv`` in mode leave_one_out shows such.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from emmech import defaults
from emmech.errors import PatchError
from emmech.evaluation.statistics import clustered_mean, paired_difference
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding, auto_limits, decode, make_batch, plan_batches, prefill
from emmech.models.kv_cache import PrefixState
from emmech.piggyback.behaviours import Behaviour, detected
from emmech.piggyback.cells import EVERYTHING, NOTHING, Cell, Patch, Shape
from emmech.piggyback.replay import Replay, SweepDirection
from emmech.piggyback.scores import PROMPTS
from emmech.piggyback.sweep import sweep_arguments
from emmech.results import Record, RunFolder, append_line, keep_lines, read_lines
from emmech.summarised import Summarised

ANSWERS, SEARCH = "answers.jsonl", "search.json"
Values = Sequence[float | int | None]
"""A number for each question's answer; None where there is none."""


class SearchResult(Summarised):
    """What every block that was patched did to the answers.

    The summary says how it was run, and what the unpatched and fully patched answers measure.
    """

    FILE, ROWS = SEARCH, "blocks"

    @property
    def blocks(self) -> Sequence[Record]:
        """In the order they were patched: place, measure with interval, change, effect, depth.

        ``effect`` is 0 as unpatched, 1 as with the whole prefix.
        """
        return self.summary["blocks"]

    def text(self) -> str:
        """A sentence that says what was found."""
        from emmech.report_sweep import search_text

        return search_text(self.summary)

    def figure(self) -> Any:
        """The blocks on the map of layers and tokens, as a plotly figure."""
        from emmech.figures import search_map

        return search_map(self.summary)

    def _table(self) -> Any:
        from emmech.report_sweep import search_table

        return search_table(self.summary)

    def _write_page(self, folder: str | Path) -> Path:
        from emmech.report_sweep import write_search

        return write_search(folder, self.summary)


def search(
    pair: ModelPair,
    questions: Iterable[Any],
    behaviour: str | Behaviour = defaults.DETECTOR,
    *,
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
        behaviour: A detector's name, or what a judge says: ``judged`` of `emmech.piggyback.behaviours`.
        bands: Layers are first cut into so many; ``stretches`` likewise of prefix tokens.
        threshold: Share of the whole prefix's change that a block must do to be split.
        most: Blocks to patch at most.
        direction: As in ``sweep_kv``.
        max_new_tokens: Length of the answers.
        out: Folder for the answers, the result and a report; a stopped search continues there.
        progress: Show a progress bar.

    Raises:
        EmmechError: The questions, model or folder are refused, or the whole prefix changes nothing.
        JudgeError: The judge had to stop; answers and judgements until then are saved.
    """
    measure = detected(behaviour) if isinstance(behaviour, str) else behaviour
    if not threshold > 0:
        raise PatchError("a threshold above 0", f"got {threshold}", "Correct it")
    replay = Replay(pair, list(questions), PROMPTS, direction)
    decoding = Decoding(max_new_tokens)
    settings = {**measure.settings, "bands": bands, "stretches": stretches, "threshold": threshold}
    arguments = {"kind": "search", **settings, "most": most, "decoding": asdict(decoding)}
    arguments |= sweep_arguments(replay, [{}], None)
    folder = None if out is None else RunFolder(out, arguments, lines=False)
    asker = _Asker(replay, decoding, measure, None if folder is None else folder.path / ANSWERS)
    with tqdm(total=most, disable=not progress, unit="block", dynamic_ncols=True) as bar:
        found = _refine(asker, _blocks(replay.shape, bands, stretches), threshold, most, bar)
    unpatched, full = (_mean(asker.values(patch), measure.unit) for patch in (NOTHING, EVERYTHING))
    result = SearchResult(
        {
            **arguments,
            "behaviour": measure.name,
            "tokens": list(replay.prompt.token_texts[: replay.prompt.n_prefix]),
            "question_ids": replay.question_ids,
            "notes": list(pair.notes),
            "unpatched": unpatched,
            "full": full,
            "blocks": found,
        }
    )
    if out is not None:
        result.save(out)
    return result


def _refine(
    asker: "_Asker", first: Sequence[Cell], threshold: float | int, most: int, bar: tqdm
) -> list[Record]:
    """Patch blocks, and the halves of those that tell, the strongest first."""
    unpatched, full = asker.values(NOTHING), asker.values(EVERYTHING)
    whole = paired_difference(full, unpatched, asker.ids).mean
    if whole == 0:
        raise PatchError(
            "a prefix whose patch changes the answers", "this one changes none", "Ask more questions"
        )
    waiting = [(float("-inf"), number, 0, cell) for number, cell in enumerate(first)]
    n_made, found = len(waiting), []
    while waiting and len(found) < most:
        _, _, depth, cell = heapq.heappop(waiting)
        values = asker.values(Patch((cell,)))
        where = {axis: at for axis, at in cell.coordinates().items() if axis != "kv_head"}
        found.append({**where, "depth": depth, **_mean(values, asker.measure.unit)})
        found[-1] |= _change(values, unpatched, asker.ids, whole)
        bar.update()
        effect = found[-1]["effect"]
        for half in _halves(cell) if effect is not None and abs(effect) >= threshold else ():
            heapq.heappush(waiting, (-abs(effect), n_made, depth + 1, half))
            n_made += 1
    return found


def _change(values: Values, unpatched: Values, ids: Sequence[str], whole: float) -> Record:
    """What a patch changes on the questions whose answers have a value with it and without, if any."""
    if all(one is None or other is None for one, other in zip(values, unpatched, strict=True)):
        return {"change": None, "effect": None}
    change = paired_difference(values, unpatched, ids)
    return {"change": change.to_json(), "effect": change.mean / whole}


class _Asker:
    """Greedy answers of the recipient under any patch of its prefix cache, each made and measured once."""

    def __init__(self, replay: Replay, decoding: Decoding, measure: Behaviour, path: Path | None):
        self.replay, self.decoding, self.measure, self.path = replay, decoding, measure, path
        self.ids = list(replay.question_ids)
        self.found: dict[str, list[str]] = {}
        self.measured: dict[str, Values] = {}
        if path is not None:
            keep_lines(path, bool)
            self.found = {line["block"]: line["answers"] for line in read_lines(path)}

    def values(self, patch: Patch) -> Values:
        """What is measured in each answer."""
        name = patch.cells[0].text() if patch.cells else "nothing"
        if name not in self.found:
            self.found[name] = self._answers(patch)
            if self.path is not None:
                append_line(self.path, {"block": name, "answers": self.found[name]})
        if name not in self.measured:
            asked = [
                {"question_id": item.question_id, "question": item.prompt.query, "condition": name}
                for item in self.replay.items
            ]
            answers = zip(asked, self.found[name], strict=True)
            self.measured[name] = self.measure.values([one | {"response": text} for one, text in answers])
        return self.measured[name]

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


def _mean(values: Values, unit: str) -> Record:
    """The mean over the answers that have a value, if any."""
    if all(one is None for one in values):
        return {"mean": None, "low": None, "high": None, "n": 0, "n_missing": len(values)}
    return clustered_mean(values, list(range(len(values))), unit=unit).to_json()
