"""Rendered items as rows of tensors that follow one prefix, and a head that reads only what is asked.

Rows are padded on the right, where under causal attention no token sees it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from emmech.chat import PADDING, Prompt
from emmech.errors import DataError
from emmech.piggyback.scores import Item

_READ: ContextVar[Tensor | None] = ContextVar("places that the output head is handed", default=None)


@dataclass(frozen=True)
class Texts:
    """What follows the prefix, padded on the right."""

    ids: Int[Tensor, "row slot"]
    read: Bool[Tensor, "row slot"]
    """True where the logits are read."""
    answer: Int[Tensor, "row slot"]
    """The answer's token that is predicted there, or 0."""
    parts: Int[Tensor, "row slot"]
    """As ``Batch.parts``."""
    lengths: Int[Tensor, " row"]

    def take(self, rows: Int[Tensor, " row"]) -> "Texts":
        """These rows, as wide as the longest of them needs."""
        width = int(self.lengths[rows].max())
        cut = (part[rows, :width] for part in (self.ids, self.read, self.answer, self.parts))
        return Texts(*cut, self.lengths[rows])


def texts_of(items: Sequence[Item], device: torch.device, *, with_prefix: bool = False) -> Texts:
    """The items as rows, with or without the prefix they share."""
    first = items[0].prompt.n_prefix if with_prefix else 0
    width = first + max(len(item.ids) for item in items)
    ids, answer = torch.zeros(2, len(items), width, dtype=torch.long)
    read = torch.zeros(len(items), width, dtype=torch.bool)
    parts = torch.full((len(items), width), PADDING)
    for row, item in enumerate(items):
        prompt, end = item.prompt, first + len(item.ids)
        ids[row, :end] = torch.tensor(prompt.prefix_ids[:first] + item.ids)
        read[row, end - item.n_read : end] = True
        answer[row, end - len(item.answer) : end] = torch.tensor(item.answer, dtype=torch.long)
        borders = (0, first, first + prompt.n_query, first + prompt.n_query + prompt.n_postfix, end)
        for number, (left, right) in enumerate(pairwise(borders)):
            parts[row, left:right] = number
    lengths = torch.tensor([first + len(item.ids) for item in items])
    return Texts(*(part.to(device) for part in (ids, read, answer, parts, lengths)))


def one_prefix(items: Sequence[Item]) -> Prompt:
    """The first prompt, after checking that all start with its prefix.

    Raises:
        DataError: Prefixes differ, or there is none.
    """
    first = items[0].prompt
    other = next((item for item in items if item.prompt.prefix_ids != first.prefix_ids), None)
    if other is not None:
        raise DataError(
            "questions behind one template prefix",
            f"that of {other.question_id} differs from that of {items[0].question_id}",
            "Ask single questions under one system message",
        )
    if first.n_prefix == 0:
        raise DataError(
            "a template with a prefix", "this one starts with the question", "Set a system message"
        )
    return first


def question_ids(items: Sequence[Item], n_questions: int) -> list[str]:
    """The questions in order.

    Raises:
        DataError: Two have one id.
    """
    found = list(dict.fromkeys(item.question_id for item in items))
    if len(found) != n_questions:
        raise DataError(
            "questions with an id each", f"{n_questions} questions have {len(found)} ids", "Rename them"
        )
    return found


@contextmanager
def read_only(module: nn.Module, read: Bool[Tensor, "row slot"]) -> Iterator[None]:
    """Hand the output head these places only, as one contiguous row."""
    head = module.get_output_embeddings()
    token = _READ.set(read)

    def choose(_: nn.Module, args: tuple) -> tuple:
        return (args[0][read.to(args[0].device)][None], *args[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
        _READ.reset(token)


def read_places() -> Bool[Tensor, "row slot"] | None:
    """The places that the output head is handed in the pass that is being made; None where it is all."""
    return _READ.get()
