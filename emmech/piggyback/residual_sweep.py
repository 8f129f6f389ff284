"""Where along layers and tokens the residual stream carries a behaviour: patch one place at a time.

    sweep_resid(pair, questions, over=("layer", "position"))     # prefix tokens
    sweep_resid(pair, questions, over=("layer", "segment"))      # prefix, query, postfix
    sweep_resid(pair, questions, over=("layer", "segment"), mode="cumulative_down")

After a block, the recipient's residual stream at some tokens becomes the donor's on the same text, and
everything after follows: later blocks of those tokens, and what later tokens read of them. An effect is
still a share of what the donor's whole prefix cache does, so that maps of both kinds compare.

Patches of several blocks. At the tokens of a patch the last block decides what the stream is from there on:
a patch of blocks 0 to l leaves the same stream after l as one of l alone. What earlier patches add is what
other tokens read in blocks up to l, from the keys and values of the patched ones. Hence:

- ``cumulative_up`` of the whole prompt is ``single`` wherever only the first token of the answer is
  scored, since no other token reads it; with longer answers, which read the prompt, it is not.
- ``leave_one_out`` says little. A block that is left out has the donor's stream put in after the next one,
  so only what later tokens read in that one block changes; but for the last block, which has no next.
- ``cumulative_down`` holds the stream at the donor's from block l to the last: later tokens read keys and
  values that the recipient's weights make of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emmech.chat import PARTS, SEGMENTS, Segment
from emmech.errors import PatchError
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import reading
from emmech.models.late_start import decoder_blocks, exchanged_after, recorded_blocks, starting_at
from emmech.models.sides import Side
from emmech.piggyback.cells import EVERYTHING, MODES, Mode, Shape
from emmech.piggyback.replay import Replay, Stored, SweepDirection, agree, as_read
from emmech.piggyback.running import open_folder
from emmech.piggyback.scores import Metric, MetricLike, find_metric
from emmech.piggyback.streaming import score_patches
from emmech.piggyback.sweep import sweep_arguments, sweep_result
from emmech.piggyback.sweep_result import SweepResult
from emmech.piggyback.texts import read_only, texts_of
from emmech.sharding import processes

RESID_AXES = ("layer", "position", "segment")


@dataclass(frozen=True)
class ResidCell:
    """The residual stream after one block, at one prefix token or one segment, or at the whole prompt."""

    layer: int
    position: int | None = None
    segment: Segment | None = None

    def coordinates(self) -> dict[str, Any]:
        """Where the cell is, by axis; None for all."""
        return {axis: getattr(self, axis) for axis in RESID_AXES}


@dataclass(frozen=True)
class Exchange:
    """The tokens whose residual stream becomes the donor's after each of some blocks."""

    after: Mapping[int, tuple[ResidCell, ...]]
    """By block, the cells whose tokens they are."""
    but: ResidCell | None = None
    """After its block, not its tokens."""

    @property
    def first(self) -> int:
        """The first of the blocks."""
        return min(self.after)

    def places(self, layer: int, parts: Int[Tensor, " slot"]) -> Bool[Tensor, " slot"]:
        """True on the slots of one row that are exchanged after a block."""
        chosen = _slots(self.after.get(layer, ()), parts)
        return chosen & ~_slots((self.but,), parts) if self.but and self.but.layer == layer else chosen


def sweep_resid(
    pair: ModelPair,
    questions: Iterable[Any],
    metric: MetricLike = "margin",
    over: Any = ("layer", "position"),
    *,
    mode: Mode | str = "single",
    direction: SweepDirection | str = "repair",
    rows: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> SweepResult:
    """Patch the residual stream after each block with the donor's, place by place, and score answers.

    Args and raises as in ``sweep_kv``; ``over`` is ``("layer", "position")``, ``("layer", "segment")``,
    ``("layer",)`` for the whole prompt, a list of such tuples for their union, or of ``ResidCell``. Under
    ``mode="leave_one_out"`` all other places of the grid are patched.
    """
    replay = ResidReplay(pair, list(questions), find_metric(metric), direction)
    cells = resid_grid(over, replay.shape)
    wanted = exchanges(cells, mode, replay.shape.n_layers)
    where = [cell.coordinates() for cell in cells]
    arguments = {"kind": "sweep-resid", "mode": mode, **sweep_arguments(replay, where, rows)}
    folder = open_folder(out, arguments, lines=False)
    scored = score_patches(replay, wanted, rows=rows, folder=folder, progress=progress)
    result = sweep_result(replay, arguments, where, scored)
    if out is not None and processes().is_main:
        result.save(out)
    return result


class ResidReplay(Replay):
    """Passes over whole texts that continue from a mixture of two residual streams."""

    def __init__(
        self, pair: ModelPair, questions: Sequence[object], metric: Metric, direction: SweepDirection | str
    ):
        super().__init__(pair, questions, metric, direction)
        if self.blocks is None:
            raise PatchError(
                "a model whose blocks are in one list", "this one has none", "Use emmech.patch_resid"
            )
        self.whole = texts_of(self.items, self.recipient.device, with_prefix=True)

    @property
    def width(self) -> int:
        return self.whole.ids.shape[1]

    def merged(self) -> AbstractContextManager[None]:
        """Nothing: the other side is run in between, which may be the same module."""
        return nullcontext()

    def start(self, patch: Exchange) -> tuple[int, int]:
        """The block after the first patched one, from the unpatched run."""
        return patch.first + 1, 0

    def store(self, items: Int[Tensor, " item"]) -> Stored:
        """States of both models on the items; scores of the recipient unpatched and with the whole cache."""
        states = []
        for side in (self.recipient, self.donor):
            with recorded_blocks(decoder_blocks(side.module, self.shape.n_layers)) as found:
                logits = self._whole(side, items)
            states.append(torch.stack([state.to(self.recipient.device) for state in found]))
            if side is self.recipient:
                unpatched = self.scored(items, logits)
        full = self.scored(items, self.logits(items, self.edited([EVERYTHING] * len(items), 0)))
        return Stored(torch.stack(states), torch.stack([unpatched, full]))

    def verify(self, items: Int[Tensor, " item"]) -> bool:
        """Whether passes over two of these items may leave out the lower half of the blocks."""
        items, layer = items[:2], self.shape.n_layers // 2
        with recorded_blocks(self.blocks) as states:
            whole = self._whole(self.recipient, items)
        self._whole(self.donor, items)
        return agree(whole, self._whole(self.recipient, items, layer + 1, states[layer]))

    def run(
        self,
        patches: Sequence[Exchange],
        items: Int[Tensor, " row"],
        _: int,
        stored: Stored,
        at: tuple[Int[Tensor, " row"], Int[Tensor, " row"]],
    ) -> Float[Tensor, " row"]:
        """The score of each row; rows that are patched from one block on are run together."""
        scores = torch.zeros(len(items), device=self.recipient.device)
        for first in sorted({patch.first for patch in patches}):
            mine = [row for row, patch in enumerate(patches) if patch.first == first]
            rows = torch.tensor(mine, device=items.device)
            logits = self._patched([patches[row] for row in mine], items[rows], stored, at[1][rows])
            scores[rows] = self.scored(items[rows], logits).to(scores)
        return scores

    def _patched(
        self,
        patches: Sequence[Exchange],
        items: Int[Tensor, " row"],
        stored: Stored,
        place: Int[Tensor, " row"],
    ) -> Float[Tensor, "read d_vocab"]:
        """Logits of rows that are patched after the same first block, and after any later ones."""
        first = patches[0].first
        parts = self.whole.take(items).parts
        own, other = stored.states[:, :, :, : parts.shape[1]]
        where = {
            layer: torch.stack([patch.places(layer, row) for patch, row in zip(patches, parts, strict=True)])
            for layer in sorted({layer for patch in patches for layer in patch.after})
        }
        start, state = 0, None
        if self.late_start:
            start = first + 1
            state = torch.where(where.pop(first)[..., None], other[first][place], own[first][place])
        with ExitStack() as stack:
            for layer, here in where.items():
                donor = partial(other[layer].index_select, 0, place)
                stack.enter_context(exchanged_after(self.blocks[layer], here, donor))
            return self._whole(self.recipient, items, start, state)

    def _whole(
        self, side: Side, items: Int[Tensor, " row"], start: int = 0, state: Tensor | None = None
    ) -> Float[Tensor, "read d_vocab"]:
        """Logits at the places that are read of passes over the whole texts."""
        texts = self.whole.take(items)
        late = starting_at(self.blocks, start, state) if start else nullcontext()
        given = {"input_ids": texts.ids, "use_cache": False}
        if texts.n_answers > 1:
            given |= {"attention_mask": as_read(texts.mask(0), side), "position_ids": texts.positions}
        with side.active() as module, reading(texts.parts), read_only(module, texts.read), late:
            return module(**given).logits[0]


def resid_grid(over: Any, shape: Shape) -> list[ResidCell]:
    """The cells that ``over`` names: axes for their product, several such for a union, or cells.

    Raises:
        PatchError: Other axes, a cell outside the stream, or nothing at all.
    """
    over = tuple(over)
    layers = range(shape.n_layers)
    if over and all(isinstance(one, ResidCell) for one in over):
        cells = list(over)
    elif over and not any(isinstance(one, str | ResidCell) for one in over):
        cells = [cell for one in over for cell in resid_grid(one, shape)]
    elif set(over) == {"layer", "position"}:
        cells = [ResidCell(layer, at) for layer in layers for at in range(shape.n_positions)]
    elif set(over) == {"layer", "segment"}:
        cells = [ResidCell(layer, None, segment) for layer in layers for segment in SEGMENTS]
    elif over == ("layer",):
        cells = [ResidCell(layer) for layer in layers]
    else:
        raise PatchError(
            "over ('layer', 'position'), ('layer', 'segment') or ('layer',)", f"got {over}", "Correct it"
        )
    for cell in cells:
        if cell.layer not in layers or cell.position not in (None, *range(shape.n_positions)):
            known = f"layers 0..{shape.n_layers - 1} and positions 0..{shape.n_positions - 1}"
            raise PatchError(known, f"got {cell}", "Correct the cell")
    return cells


def exchanges(cells: Sequence[ResidCell], mode: Mode | str, n_layers: int) -> list[Exchange]:
    """What is exchanged for each cell of a grid under a mode; see the module.

    Raises:
        PatchError: An unknown mode.
    """
    if mode not in MODES:
        raise PatchError(f"a mode among {', '.join(MODES)}", f"got {mode!r}", "Correct it")
    if mode == "leave_one_out":
        after = {layer: tuple(c for c in cells if c.layer == layer) for layer in {c.layer for c in cells}}
        return [Exchange(after, cell) for cell in cells]
    spans = {
        "single": lambda layer: (layer,),
        "cumulative_up": lambda layer: range(layer + 1),
        "cumulative_down": lambda layer: range(layer, n_layers),
    }
    return [Exchange({at: (cell,) for at in spans[mode](cell.layer)}) for cell in cells]


def _slots(cells: Sequence[ResidCell], parts: Int[Tensor, " slot"]) -> Bool[Tensor, " slot"]:
    """True on the slots of one row that are of any of these cells."""
    positions = [cell.position for cell in cells if cell.position is not None]
    segments = {cell.segment for cell in cells if cell.position is None}
    numbers = range(len(SEGMENTS)) if None in segments else [PARTS.index(one) for one in segments]
    chosen = torch.isin(parts, torch.tensor([*numbers], dtype=parts.dtype, device=parts.device))
    chosen[positions] = True
    return chosen
