"""What is put in: the keys and values of another run, and the controls that look like them.

``same``      the other model's K and V for the very same prompt.
``empty``     the other model's postfix K and V from a prompt without a query, so that nothing of the
              query leaks into them, with the test prompt's positions re-applied (the paper's postfix
              arm, arXiv 2606.06667 s4.3).
``noise``     Gaussian noise with the norm of ``same`` at every layer, head and position.
``shuffled``  the contents of ``same`` at each other's positions.

Positions are re-applied by running the donor at shifted position ids: rotary attention depends on
relative positions only, so its activations stay and its cached keys come out turned to where they
are needed, whatever the rotary variant. A model without rotary positions is not shifted.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from emmech.chat import Prompt
from emmech.models.generation import Batch, make_batch, row_generator, run_through
from emmech.models.kv_cache import KeysValues, PatchCache, PrefixState, prefix_state
from emmech.models.sides import Side

Donor = Literal["same", "empty", "noise", "shuffled"]
_SHUFFLE_BLOCK = 32
"""Contents move at most this far, which bounds the number of shifted donor runs."""


def prefix_donor(side: Side, prefix_ids: Sequence[int]) -> PrefixState:
    """What ``side`` has cached after the prefix: one row, the same for every query."""
    batch = prefix_batch(prefix_ids, side)
    cache = PatchCache(side.config, record=True)
    with side.active() as module:
        run_through(module, batch, cache)
    return prefix_state(cache, len(prefix_ids))


def shuffled_prefix_donor(side: Side, prefix_ids: Sequence[int], seed: int) -> KeysValues:
    """The prefix's contents at permuted positions, each key turned to its new position."""
    length = len(prefix_ids)
    moved_to = _permutation(length, seed)
    shifts, row = torch.unique(moved_to - torch.arange(length), return_inverse=True)
    batch = prefix_batch(prefix_ids, side, rows=len(shifts))
    cache = PatchCache(side.config, record=True)
    with side.active() as module:
        run_through(module, batch, cache, _usable(shifts, side))
    content = torch.empty_like(moved_to)
    content[moved_to] = torch.arange(length)  # which content each position receives
    row, content = row[content].to(side.device), content.to(side.device)
    return {
        layer: tuple(kv[row, :, content].transpose(0, 1)[None] for kv in keys_values)
        for layer, keys_values in cache.recorded.items()
    }


def empty_query_donor(side: Side, batch: Batch) -> KeysValues:
    """Postfix K and V from each prompt without its query, in the last slots of ``batch``.

    The result has as many slots as the longest query-less prompt, aligned with the batch's end.
    """
    keys = [(p.prefix_ids, p.postfix_ids, p.n_query) for p in batch.prompts]
    distinct = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    first = [keys.index(key) for key in distinct]
    prompts: list[Prompt] = [batch.prompts[row].without_query() for row in first]
    queryless = make_batch(prompts, side.device, share_prefix=False)
    cache = PatchCache(side.config, record=True)
    with side.active() as module:
        shift = torch.tensor([batch.prompts[row].n_query for row in first])
        run_through(module, queryless, cache, _usable(shift, side))
    rows = torch.tensor([distinct[key] for key in keys], device=side.device)
    return {
        layer: tuple(kv[rows.to(kv.device)] for kv in keys_values)
        for layer, keys_values in cache.recorded.items()
    }


def noise_like(donor: KeysValues, row_names: Sequence[str], seed: int) -> KeysValues:
    """Gaussian K and V, one draw per row, with the donor's norm at each layer, head and position."""
    streams = [row_generator(f"{seed}/noise/{name}") for name in row_names]

    def match(kv: Tensor) -> Tensor:
        draws = torch.stack([torch.randn(kv.shape[1:], generator=stream) for stream in streams])
        draws = draws.to(kv.device) / draws.norm(dim=-1, keepdim=True).to(kv.device)
        return (draws * kv.float().norm(dim=-1, keepdim=True)).to(kv.dtype)

    return {layer: (match(key), match(value)) for layer, (key, value) in donor.items()}


def prefix_batch(prefix_ids: Sequence[int], side: Side, rows: int = 1) -> Batch:
    """The prefix alone, ``rows`` times."""
    ids = torch.tensor(prefix_ids, device=side.device).expand(rows, -1)
    return Batch((), len(prefix_ids), ids, torch.ones_like(ids))


def _usable(shift: Int[Tensor, " batch"], side: Side) -> Int[Tensor, " batch"] | None:
    rotary = getattr(side.config, "rope_parameters", None)
    return shift.to(side.device) if rotary else None


def _permutation(length: int, seed: int) -> Int[Tensor, " pos"]:
    """A random permutation within blocks of positions, with no fixed point in blocks of two or more."""
    stream = torch.Generator().manual_seed(seed)
    moved_to = torch.arange(length)
    for start in range(0, length, _SHUFFLE_BLOCK):
        block = torch.arange(start, min(start + _SHUFFLE_BLOCK, length))
        cycle = block[torch.randperm(len(block), generator=stream)]
        moved_to[cycle] = cycle.roll(-1)  # one cycle through the block: nothing stays
    return moved_to
