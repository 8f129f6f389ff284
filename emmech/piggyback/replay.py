"""Run given texts behind one prefix cache, each row with its own part of it taken from the donor.

The recipient's and the donor's prefix are run once, with one row each. After that only what follows
the prefix is run, and of that only the blocks from the lowest patched layer up: below it a row's
states are those of the unpatched run (or of the fully patched one), which are stored. Rows are padded
on the right, where under causal attention no token sees it: positions and sliding windows are exact.

The prefix's own later activations stay the recipient's. A cell is what later tokens read, not what
the prefix would have become: `emmech.patch_prefix` recomputes the prefix under a patch of a part. For
all cells at once the two are the same.

The two answers of a margin stand in one row behind one reading of their question, where the model gives
both as it gives each alone.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emmech.errors import PatchError
from emmech.models.adapters import merged
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import reading
from emmech.models.kv_cache import KeysValues, PrefixCache, is_hybrid
from emmech.models.late_start import decoder_blocks, recorded_blocks, starting_at
from emmech.models.sides import Side, SideName
from emmech.piggyback.cells import EVERYTHING, NOTHING, Entries, Patch, Shape
from emmech.piggyback.donors import prefix_donor
from emmech.piggyback.scores import Metric
from emmech.piggyback.texts import Texts, one_prefix, question_ids, read_only, texts_of

SweepDirection = Literal["repair", "induce"]
_GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"


@dataclass(frozen=True)
class Stored:
    """States of some items in the unpatched and the fully patched run, and their scores there."""

    states: Float[Tensor, "2 block item slot d_model"] | None
    """After each block; None where blocks cannot be left out."""
    scores: Float[Tensor, "2 item"]


class Replay:
    """Items of a metric, the two prefix caches, and passes over any mixture of them."""

    def __init__(
        self,
        pair: ModelPair,
        questions: Sequence[object],
        metric: Metric,
        direction: SweepDirection | str,
        *,
        together: bool = True,
    ):
        """Render the questions and run both prefixes.

        Args:
            together: Whether answers to one question may share its reading.

        Raises:
            PatchError: Recurrent layers, layers of different shapes, or an unknown direction.
            DataError: Questions with different prefixes, or with one id twice.
        """
        if direction not in ("repair", "induce"):
            raise PatchError("direction repair or induce", f"got {direction!r}", "Correct it")
        _refuse_partial(pair)
        target: SideName = "finetuned" if direction == "repair" else "base"
        self.pair, self.metric = pair, metric
        self.recipient, self.donor = pair.side(target), pair.side(pair.other(target))
        self.items = metric.items(pair, questions)
        self.question_ids = question_ids(self.items, len(questions))
        self.prompt = one_prefix(self.items)
        self.own, self.other = (
            prefix_donor(side, self.prompt.prefix_ids).keys_values for side in (self.recipient, self.donor)
        )
        self.shape = _shape(self.own, self.recipient.config.num_hidden_layers)
        self.differs = _differs(self.own, self.other)
        if not (together and self._may_share()):
            self.items = [alone for item in self.items for alone in item.alone()]
        self.texts = texts_of(self.items, self.recipient.device)
        self.blocks = decoder_blocks(self.recipient.module, self.shape.n_layers)
        self.late_start: bool | None = None if self.blocks is not None else False
        """Whether blocks below a patch may be left out; None until ``verify`` has looked."""
        self.reference_logits = None if metric.compared_with is None else self._reference_logits()

    @property
    def width(self) -> int:
        """Slots of the longest row that is run."""
        return self.texts.ids.shape[1]

    def merged(self) -> AbstractContextManager[None]:
        """Many passes of the recipient in a row, its adapter merged where nothing acts on it."""
        side = self.recipient
        return nullcontext() if side.adapter_off or side.interventions else merged(side.module)

    def store(self, items: Int[Tensor, " item"]) -> Stored:
        """Run these items unpatched and fully patched."""
        states, scores = [], []
        for patch in (NOTHING, EVERYTHING):
            edited = self.edited([patch] * len(items), 0)
            if self.blocks is None:
                scores.append(self.scored(items, self.logits(items, edited)))
                continue
            with recorded_blocks(self.blocks) as found:
                scores.append(self.scored(items, self.logits(items, edited)))
            states.append(torch.stack([state.to(self.recipient.device) for state in found]))
        return Stored(torch.stack(states) if states else None, torch.stack(scores))

    def start(self, patch: Patch | Entries) -> tuple[int, int]:
        """The lowest block whose input or cache is not that of a stored run, and which run that is.

        The run is 0 for unpatched, 1 for fully patched. ``n_layers + 1`` means that the patch is one of
        the two.
        """
        none = everything = self.shape.n_layers + 1
        for layer in range(self.shape.n_layers):
            changes = self.differs[layer]
            mask = patch.mask(layer, self.shape)
            inside = np.zeros_like(changes) if mask is None else mask & changes
            if none > layer and inside.any():
                none = layer
            if everything > layer and (inside != changes).any():
                everything = layer
            if max(none, everything) <= layer:
                break
        return (none, 0) if none >= everything else (everything, 1)

    def edited(self, patches: Sequence[Patch | Entries], start: int) -> KeysValues:
        """The prefix cache of one row per patch, at the layers from ``start`` on that any patch changes."""
        found: KeysValues = {}
        for layer in range(start, self.shape.n_layers):
            masks = [patch.mask(layer, self.shape) for patch in patches]
            if all(mask is None for mask in masks):
                continue
            nowhere = np.zeros_like(self.differs[layer])
            rows = torch.from_numpy(np.stack([nowhere if mask is None else mask for mask in masks]))
            found[layer] = self._mixed(layer, rows)
        return found

    def _mixed(
        self, layer: int, masks: Bool[Tensor, "row kv kv_head position"]
    ) -> tuple[Float[Tensor, "row kv_head position d_head"], Float[Tensor, "row kv_head position d_head"]]:
        mixed = []
        for number, (own, other) in enumerate(zip(self.own[layer], self.other[layer], strict=True)):
            mixed.append(torch.where(masks[:, number, ..., None].to(own.device), other.to(own), own))
        return mixed[0], mixed[1]

    def run(
        self,
        patches: Sequence[Patch | Entries],
        items: Int[Tensor, " row"],
        start: int,
        stored: Stored,
        at: tuple[Int[Tensor, " row"], Int[Tensor, " row"]],
    ) -> Float[Tensor, " row"]:
        """The score of each row, a patch and an item.

        Args:
            patches: What is replaced in each row.
            items: Number of the item in each row.
            start: The lowest block to run; above 0 only where ``verify`` has found it right.
            stored: States to start from.
            at: Which run of ``stored``, and which of its items, each row starts from.
        """
        state = None
        if start:
            state = stored.states[:, start - 1, :, : int(self.texts.lengths[items].max())][at]
        return self.scored(items, self.logits(items, self.edited(patches, start), start, state))

    def logits(
        self,
        items: Int[Tensor, " row"],
        edited: KeysValues,
        start: int = 0,
        state: Float[Tensor, "row slot d_model"] | None = None,
    ) -> Float[Tensor, "read d_vocab"]:
        """The recipient's logits at the places that are read, row behind row.

        Args:
            items: Number of the item in each row.
            edited: Per layer, the prefix's K and V of each row; elsewhere they are the recipient's.
            start: Blocks below are left out, and the last of them returns ``state``.
            state: See ``start``.
        """
        return self._run(self.recipient, self.own, self.texts.take(items), edited, start, state)

    def scored(
        self, items: Int[Tensor, " row"], logits: Float[Tensor, "read d_vocab"]
    ) -> Float[Tensor, " row"]:
        """The metric's score of each row, its answers weighted."""
        reference = None
        if self.reference_logits is not None:
            reference = torch.cat([self.reference_logits[item] for item in items.tolist()]).to(logits)
        scores = self.metric.score(self.texts.take(items).read_by(logits, reference))
        weights = [self.items[item].weights for item in items.tolist()]
        return (scores.reshape(len(items), -1) * torch.tensor(weights).to(scores)).sum(1)

    @torch.no_grad()
    def _may_share(self) -> bool:
        """Whether answers behind one reading of their question get the logits that each gets alone."""
        numbers = {len(item.answers) for item in self.items}
        if numbers == {1}:
            return True
        longest = max(len(alone.ids) for item in self.items for alone in item.alone())
        if len(numbers) > 1 or not takes_any_mask(self.recipient, self.shape.n_positions + longest):
            return False
        few = self.items[:2]
        read = []
        for items in (few, [alone for item in few for alone in item.alone()]):
            texts = texts_of(items, self.recipient.device)
            found = texts.read_by(self._run(self.recipient, self.own, texts, {}))
            read.append(found.logits[found.places])
        return agree(*read, ulps=512)  # other shapes, other sums

    def verify(self, items: Int[Tensor, " item"]) -> bool:
        """Whether passes over two of these items may leave out the lower half of the blocks.

        They must give the logits of the full pass, also after a pass with other states: nothing that a
        left-out block would have handed on beside its output may be missed.
        """
        start = self.shape.n_layers // 2
        if self.blocks is None or start == 0:
            return False
        items = items[:2]
        edited, elsewhere = (self.edited([EVERYTHING] * len(items), first) for first in (start, 0))
        with recorded_blocks(self.blocks) as states:
            whole = self.logits(items, edited)
        self.logits(items, elsewhere)
        return agree(whole, self.logits(items, edited, start, states[start - 1]))

    def _run(
        self,
        side: Side,
        prefix: KeysValues,
        texts: Texts,
        edited: KeysValues,
        start: int = 0,
        state: Tensor | None = None,
    ) -> Float[Tensor, "read d_vocab"]:
        first = self.shape.n_positions
        with (
            side.active() as module,
            reading(texts.parts),
            read_only(module, texts.read),
            grouped_attention(self.recipient.device),
            self._from(start, state),
        ):
            output = module(
                input_ids=texts.ids,
                attention_mask=as_read(texts.mask(first), side),
                position_ids=first + texts.positions,
                past_key_values=PrefixCache(side.config, prefix, edited),
                use_cache=True,
            )
        return output.logits[0]

    @contextmanager
    def _from(self, start: int, state: Tensor | None) -> Iterator[None]:
        if start == 0:
            yield
            return
        assert self.blocks is not None, f"{start=}"
        with starting_at(self.blocks, start, state):
            yield

    @torch.no_grad()
    def _reference_logits(self) -> list[Float[Tensor, "read d_vocab"]]:
        """What the model that the metric compares with itself says of each item."""
        side, prefix = self.donor, self.other
        if self.metric.compared_with == "base" and self.recipient is self.pair.base:
            side, prefix = self.recipient, self.own
        found = []
        for item in range(len(self.items)):
            row = torch.tensor([item], device=self.recipient.device)
            found.append(self._run(side, prefix, self.texts.take(row), {}))
        return found


@contextmanager
def grouped_attention(device: torch.device) -> Iterator[None]:
    """Let attention on a CPU read the keys and values of a group as they are, not copied for every head.

    The same bits at half the cost. transformers is asked by a variable of the environment; with a mask it
    copies by default, since kernels of other devices want it so.
    """
    before = os.environ.get(_GROUPED)
    if device.type == "cpu":
        os.environ[_GROUPED] = "1"
    try:
        yield
    finally:
        os.environ.pop(_GROUPED, None)
        if before is not None:
            os.environ[_GROUPED] = before


def takes_any_mask(side: Side, longest: int) -> bool:
    """Whether attention can be told what each token sees, and each token's position.

    No sliding window may be shorter than the ``longest`` text: a mask of one's own replaces it.
    """
    config = side.config
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    return (
        getattr(config, "rope_parameters", None) is not None
        and config._attn_implementation in ("sdpa", "eager")
        and kinds <= {"full_attention", "sliding_attention"}
        and (window is None or longest <= window)
    )


def as_read(mask: Bool[Tensor, "row 1 slot seen"] | None, side: Side) -> Tensor | None:
    """The mask as the model's attention wants it: added to its scores where it is written out."""
    if mask is None or side.config._attn_implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=side.dtype).masked_fill(~mask, torch.finfo(side.dtype).min)


def agree(one: Tensor, two: Tensor, ulps: int = 16) -> bool:
    """Whether two results differ by no more than rounding; the default is for equal shapes."""
    tolerance = ulps * torch.finfo(one.dtype).eps * float(one.abs().max())
    return float((one - two).abs().max()) <= tolerance


def _refuse_partial(pair: ModelPair) -> None:
    if is_hybrid(pair.base.config):
        raise PatchError(
            "a model without recurrent layers for a sweep",
            "this one keeps recurrent states, which have no positions",
            "Use emmech.patch_prefix, which hands the whole prefix over",
        )


def _shape(cache: KeysValues, n_layers: int) -> Shape:
    """The shape of a prefix cache, where every layer has one of its own and all are alike."""
    shapes = {(*keys_values[0].shape[1:3],) for keys_values in cache.values()}
    if set(cache) != set(range(n_layers)) or len(shapes) > 1:
        raise PatchError(
            f"keys and values of as many heads in each of {n_layers} layers",
            f"{len(cache)} layers have some, of {len(shapes)} shapes",
            "Use emmech.patch_prefix, which hands the whole prefix over",
        )
    ((n_heads, n_positions),) = shapes
    return Shape(n_layers, n_positions, n_heads)


def _differs(own: KeysValues, other: KeysValues) -> list[Bool[np.ndarray, "kv kv_head position"]]:
    """Per layer, the entries at which the two caches are not equal to the bit."""
    return [
        np.stack([(a[0] != b[0].to(a)).any(-1).cpu().numpy() for a, b in zip(own[n], other[n], strict=True)])
        for n in range(len(own))
    ]
