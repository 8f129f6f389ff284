"""Start a pass at a later block, from states that an earlier pass has stored.

Where an intervention acts in block 20, the states that enter block 20 are those of the run without
it. So they are stored once, and the blocks below are left out:

    with recorded_blocks(blocks) as states:
        module(**inputs)                      # states[l] is what block l returned
    with starting_at(blocks, 20, states[19]):
        module(**inputs)                      # runs blocks 20 and up

The model's own code runs (masks, positions, norm, head); only the modules in its list of blocks are
exchanged for the time of the pass. Whether that is right for a model (one that hands something else
than the residual stream from block to block breaks it) is for the caller to check against a full pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def decoder_blocks(module: nn.Module, n_layers: int) -> nn.ModuleList | None:
    """The list that holds the decoder's blocks in order, or None where there is no such list."""
    lists = (part for part in module.modules() if isinstance(part, nn.ModuleList))
    return next((part for part in lists if len(part) == n_layers), None)


@contextmanager
def recorded_blocks(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """The residual stream after each block of the pass inside the ``with`` block."""
    states: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def starting_at(
    blocks: nn.ModuleList, start: int, state: Float[Tensor, "batch pos d_model"] | None
) -> Iterator[None]:
    """Leave out the blocks before ``start``: ``state`` is what the last of them returns."""
    if start == 0:
        yield
        return
    assert state is not None, f"{start=}"
    own = list(blocks)
    for layer in range(start):
        blocks[layer] = _StandIn(own[layer], state if layer == start - 1 else None)
    try:
        yield
    finally:
        for layer in range(start):
            blocks[layer] = own[layer]


class _StandIn(nn.Module):
    """In the place of a block: returns ``state``, or what comes in. Has the block's attributes."""

    def __init__(self, block: nn.Module, state: Tensor | None):
        super().__init__()
        self.__dict__["block"] = block  # not as a submodule
        self.__dict__["state"] = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        state = self.__dict__["state"]
        return hidden_states if state is None else state


@contextmanager
def exchanged_after(
    block: nn.Module, where: Bool[Tensor, "batch pos"], state: Callable[[], Tensor]
) -> Iterator[None]:
    """Put what ``state()`` returns in the place of what ``block`` does, where ``where`` is true.

    It is ``[batch pos d_model]``, and asked for when the block has run: of several blocks, the states of one
    are there at a time.
    """

    def exchange(_: nn.Module, __: Any, output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        new = torch.where(where[..., None].to(own.device), state().to(own), own)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = block.register_forward_hook(exchange)
    try:
        yield
    finally:
        handle.remove()
