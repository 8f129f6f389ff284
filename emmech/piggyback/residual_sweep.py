"""Where along layers and tokens the residual stream carries a behaviour: patch one place at a time.

    sweep_resid(pair, questions, over=("layer", "position"))     # prefix tokens
    sweep_resid(pair, questions, over=("layer", "segment"))      # prefix, query, postfix

After a block, the recipient's residual stream at some tokens becomes the donor's on the same text, and
everything after follows: later blocks of those tokens, and what later tokens read of them. An effect is
still a share of what the donor's whole prefix cache does, so that maps of both kinds compare.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from emmech.piggyback.cells import EVERYTHING
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


def sweep_resid(
    pair: ModelPair,
    questions: Iterable[Any],
    metric: MetricLike = "margin",
    over: Sequence[str] = ("layer", "position"),
    *,
    direction: SweepDirection | str = "repair",
    rows: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> SweepResult:
    """Patch the residual stream after each block with the donor's, place by place, and score answers.

    Args and raises as in ``sweep_kv``; ``over`` is ``("layer", "position")``, ``("layer", "segment")``
    or ``("layer",)`` for the whole prompt.
    """
    replay = ResidReplay(pair, list(questions), find_metric(metric), direction)
    cells = _grid(tuple(over), replay)
    where = [cell.coordinates() for cell in cells]
    arguments = {"kind": "sweep-resid", "mode": "single", **sweep_arguments(replay, where, rows)}
    folder = open_folder(out, arguments, lines=False)
    scored = score_patches(replay, cells, rows=rows, folder=folder, progress=progress)
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

    def start(self, patch: ResidCell) -> tuple[int, int]:
        """The block after the patched one, from the unpatched run."""
        return patch.layer + 1, 0

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
        patches: Sequence[ResidCell],
        items: Int[Tensor, " row"],
        _: int,
        stored: Stored,
        at: tuple[Int[Tensor, " row"], Int[Tensor, " row"]],
    ) -> Float[Tensor, " row"]:
        """The score of each row; rows of one layer are run together."""
        scores = torch.zeros(len(items), device=self.recipient.device)
        for layer in sorted({patch.layer for patch in patches}):
            mine = [row for row, patch in enumerate(patches) if patch.layer == layer]
            rows = torch.tensor(mine, device=items.device)
            logits = self._patched([patches[row] for row in mine], items[rows], stored, at[1][rows])
            scores[rows] = self.scored(items[rows], logits).to(scores)
        return scores

    def _patched(
        self,
        patches: Sequence[ResidCell],
        items: Int[Tensor, " row"],
        stored: Stored,
        place: Int[Tensor, " row"],
    ) -> Float[Tensor, "read d_vocab"]:
        """Logits of rows that are patched after one block."""
        layer = patches[0].layer
        parts = self.whole.take(items).parts
        own, other = (run[layer, :, : parts.shape[1]][place] for run in stored.states)
        where = torch.stack([_places(patch, row) for patch, row in zip(patches, parts, strict=True)])
        if self.late_start:
            state = torch.where(where[..., None], other, own)
            return self._whole(self.recipient, items, layer + 1, state)
        with exchanged_after(self.blocks[layer], where, other):
            return self._whole(self.recipient, items)

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


def _places(patch: ResidCell, parts: Int[Tensor, " slot"]) -> Bool[Tensor, " slot"]:
    """True on the slots of one row that a patch replaces."""
    if patch.position is not None:
        return torch.arange(len(parts), device=parts.device) == patch.position
    if patch.segment is not None:
        return parts == PARTS.index(patch.segment)
    return (parts >= 0) & (parts < len(SEGMENTS))


def _grid(over: tuple[str, ...], replay: ResidReplay) -> list[ResidCell]:
    layers = range(replay.shape.n_layers)
    if set(over) == {"layer", "position"}:
        return [ResidCell(layer, at) for layer in layers for at in range(replay.shape.n_positions)]
    if set(over) == {"layer", "segment"}:
        return [ResidCell(layer, None, segment) for layer in layers for segment in SEGMENTS]
    if over == ("layer",):
        return [ResidCell(layer) for layer in layers]
    raise PatchError(
        "over ('layer', 'position'), ('layer', 'segment') or ('layer',)", f"got {over}", "Correct it"
    )
