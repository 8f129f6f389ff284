"""Rendered items as rows of tensors that follow one prefix, and a head that reads only what is asked.

Rows are padded on the right, where under causal attention no token sees it. The answers of an item stand
behind each other in its row, each at the positions that follow the prompt; a mask hides them from one
another, so that the prompt is read once for all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from emmech.chat import PADDING, Prompt
from emmech.errors import DataError
from emmech.piggyback.scores import Item, Read

_READ: ContextVar[Tensor | None] = ContextVar("places that the output head is handed", default=None)


@dataclass(frozen=True)
class Texts:
    """What follows the prefix, padded on the right."""

    ids: Int[Tensor, "row slot"]
    read: Bool[Tensor, "row slot"]
    """True where the logits are read."""
    positions: Int[Tensor, "row slot"]
    """From 0 at the first slot."""
    parts: Int[Tensor, "row slot"]
    """As ``Batch.parts``."""
    answer: Int[Tensor, "row slot"]
    """Of which answer the token is, from 1; 0 for the prompt and padding."""
    predicted: Int[Tensor, "row read 3"]
    """Per token of all answers: where it is predicted (a number among the row's ``read`` slots), which it
    is, and of which answer, from 0; -1 is padding."""
    lengths: Int[Tensor, " row"]
    n_answers: int
    """Of every row."""

    def take(self, rows: Int[Tensor, " row"]) -> "Texts":
        """These rows, as wide as the longest of them needs."""
        width = int(self.lengths[rows].max())
        slots = ("ids", "read", "positions", "parts", "answer")
        cut = {name: getattr(self, name)[rows, :width] for name in slots}
        return replace(self, **cut, predicted=self.predicted[rows], lengths=self.lengths[rows])

    def mask(self, n_before: int) -> Bool[Tensor, "row 1 slot seen"] | None:
        """What each token sees of ``n_before`` tokens and of its row; None where that is all before it."""
        if self.n_answers == 1:
            return None
        slots = torch.arange(self.ids.shape[1], device=self.ids.device)
        own, every = self.answer[:, :, None] == self.answer[:, None], self.answer[:, None] == 0
        seen = (own | every) & (slots[:, None] >= slots)
        return nn.functional.pad(seen, (n_before, 0), value=True)[:, None]

    def read_by(self, logits: Float[Tensor, "place d_vocab"], reference: Tensor | None = None) -> Read:
        """The logits of these rows' ``read`` slots, as a metric reads them."""
        predicted = self.predicted.to(logits.device)
        row, column = (predicted[..., 0] >= 0).nonzero(as_tuple=True)
        place, token, answer = predicted[row, column].unbind(-1)
        counts = self.read.sum(1).to(logits.device)
        first = counts.cumsum(0) - counts
        n_rows = len(predicted) * self.n_answers
        return Read(logits, place + first[row], token, row * self.n_answers + answer, n_rows, reference)


def texts_of(items: Sequence[Item], device: torch.device, *, with_prefix: bool = False) -> Texts:
    """The items as rows, with or without the prefix they share."""
    first = items[0].prompt.n_prefix if with_prefix else 0
    width = first + max(len(item.ids) for item in items)
    (n_answers,) = {len(item.answers) for item in items}
    ids, positions, answer = torch.zeros(3, len(items), width, dtype=torch.long)
    read = torch.zeros(len(items), width, dtype=torch.bool)
    parts = torch.full((len(items), width), PADDING)
    predicted = []
    for row, item in enumerate(items):
        prompt, end = item.prompt, first + len(item.ids)
        ids[row, :end] = torch.tensor(prompt.prefix_ids[:first] + item.ids)
        read[row, end - item.n_read : end] = True
        positions[row, :end] = torch.arange(end)
        said = first + prompt.n_query + prompt.n_postfix  # where the answers begin
        for number, (left, right) in enumerate(pairwise((0, first, first + prompt.n_query, said, end))):
            parts[row, left:right] = number
        at, places = said, []
        for number, tokens in enumerate(item.answers):
            begin, at = at, at + max(0, len(tokens) - 1)
            answer[row, begin:at] = number + 1
            positions[row, begin:at] -= begin - said
            # The first token is predicted by the prompt's last, the others by those before them.
            by = (0, *range(begin - said + 1, at - said + 1))
            places += [(place, token, number) for place, token in zip(by, tokens or (0,), strict=True)]
        predicted.append(torch.tensor(places))
    lengths = torch.tensor([first + len(item.ids) for item in items])
    padded = nn.utils.rnn.pad_sequence(predicted, batch_first=True, padding_value=-1)
    tensors = (part.to(device) for part in (ids, read, positions, parts, answer, padded, lengths))
    return Texts(*tensors, n_answers)


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
