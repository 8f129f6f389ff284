"""What a finetuned model is held to: the base's K and V, and the base's logits."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from emmech.chat import SEGMENTS
from emmech.errors import DataError
from emmech.models.projections import Projections, is_separate, projected
from emmech.training.examples import Example, collate, positions_of
from emmech.training.recipes import Objective


class FrozenBase:
    """The base of a model in training: its adapter switched off, or a copy made before training."""

    def __init__(self, model: nn.Module, *, copied: bool):
        self._copy = copy.deepcopy(model).eval().requires_grad_(False) if copied else None

    @contextmanager
    def active(self, model: nn.Module, unwrapped: nn.Module) -> Iterator[nn.Module]:
        """The base, without gradients; ``model`` may be wrapped for several processes."""
        with torch.no_grad():
            if self._copy is not None:
                yield self._copy
            elif hasattr(unwrapped, "disable_adapter"):
                with unwrapped.disable_adapter():
                    yield model
            else:  # a full finetune before its first step
                yield model


class SharedReference:
    """K and V of the base at prefix and postfix tokens, computed once before training.

    The prefix's do not depend on the question. The postfix's do, and are those of the first training
    chat for all, as in the release of Zhao et al. 2026 (arXiv 2606.06667: those of a random one).
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, rows: Sequence[Example], objective: Objective):
        """Compute it with ``model``, which must still be the base."""
        self._by_prefix: dict[tuple[int, ...], Projections] = {}
        device = model.get_input_embeddings().weight.device
        postfix: Projections | None = None
        if "postfix" in objective.segments:
            if not is_separate(model):
                raise DataError(
                    "separate key projections for a postfix reference that chats share",
                    f"{type(model).__name__} has them fused, and cached keys depend on their position",
                    "Pass reference='own' (--reference own)",
                )
            _same_postfix(rows)
            postfix = _values(model, collate(rows[:1], 0), ("postfix",), objective.layers, device)
        for row in rows:
            key = _prefix(row)
            if key in self._by_prefix:
                continue
            parts = [postfix] if postfix else []
            if "prefix" in objective.segments:
                parts.insert(0, _values(model, collate([row], 0), ("prefix",), objective.layers, device))
            self._by_prefix[key] = _joined(parts)

    def __call__(self, batch: Mapping[str, Tensor]) -> Projections:
        """The reference of each chosen token of the batch, row after row."""
        prefix = SEGMENTS.index("prefix")
        sizes = (batch["segments"] == prefix).sum(1).tolist()
        keys = [tuple(ids[:size].tolist()) for ids, size in zip(batch["input_ids"], sizes, strict=True)]
        return _joined([self._by_prefix[key] for key in keys])


def _values(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    segments: Sequence[str],
    layers: tuple[int, ...] | None,
    device: torch.device,
) -> Projections:
    """Keys and values ``[token d_kv]`` at the segments, in one pass of the model as it is."""
    with projected(model, layers) as recording:
        model(input_ids=batch["input_ids"].to(device), **recording.inputs)
        return select(recording.read(), positions_of(batch, segments))


def select(values: Projections, positions: Tensor) -> Projections:
    """The chosen tokens ``[token d_kv]`` of keys and values ``[batch pos d_kv]``."""
    return {layer: tuple(kv[positions.to(kv.device)] for kv in both) for layer, both in values.items()}


def _joined(parts: Sequence[Projections]) -> Projections:
    return {layer: tuple(torch.cat([part[layer][i] for part in parts]) for i in (0, 1)) for layer in parts[0]}


def _prefix(row: Example) -> tuple[int, ...]:
    return tuple(row["input_ids"][: row["segments"].count(SEGMENTS.index("prefix"))])


def _same_postfix(rows: Sequence[Example]) -> None:
    number = SEGMENTS.index("postfix")
    postfixes = {
        tuple(i for i, s in zip(row["input_ids"], row["segments"], strict=True) if s == number)
        for row in rows
    }
    if len(postfixes) > 1:
        raise DataError(
            "one postfix in all chats",
            f"the template writes {len(postfixes)} different ones",
            "Pass reference='own' (--reference own)",
        )
