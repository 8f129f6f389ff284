"""The K/V hook point: a transformers cache that records or overwrites K and V as they are written.

It works for every architecture that writes a cache (grouped heads, k_norm, fused qkv, sliding
windows, a head dimension of its own) without knowing module names. Keys are the *cached* keys, after
any k_norm and RoPE; values are the cached values. The overwrite happens before attention reads
them, so a patched position's own later layers are computed under the patch, and it happens at
prefill only: tokens decoded afterwards lie beyond the overwritten slots.

    cache = PatchCache(model.config, [overwrite])
    model.generate(**inputs, past_key_values=cache)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

KeysValues = dict[int, tuple[Tensor, Tensor]]
"""Per layer, cached keys and values, each ``[batch n_kv_heads slot d_head]``."""


@dataclass(frozen=True)
class Overwrite:
    """Donor keys and values for chosen slots of a batch."""

    positions: Bool[Tensor, "batch slot"]
    """True where the donor's K and V replace the model's own."""
    donor: KeysValues
    """Only these layers are overwritten. Batch size 1 serves every row."""
    start: int = 0
    """Cache slot of the first column of ``positions`` and of the donor."""
    kv_heads: Bool[Tensor, " n_kv_heads"] | None = None
    """Heads to overwrite; None is all of them."""
    key: bool = True
    value: bool = True

    def apply(self, layer: int, key: Tensor, value: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """``key`` and ``value`` as written at cache slots ``slot, slot + 1, ...``, overwritten."""
        first, width = slot - self.start, key.shape[2]
        if layer not in self.donor or first < 0 or first >= self.positions.shape[1]:
            return key, value
        here = slice(first, first + width)
        mask = self.positions[:, None, here, None]
        assert mask.shape[2] == width, f"a chunk ends beyond the prompt: {mask.shape=} {width=}"
        if self.kv_heads is not None:
            mask = mask & self.kv_heads[None, :, None, None]
        mask = mask.to(key.device)
        donor_key, donor_value = (kv[:, :, here].to(key) for kv in self.donor[layer])
        if self.key:
            key = torch.where(mask, donor_key, key)
        if self.value:
            value = torch.where(mask, donor_value, value)
        return key, value


class PatchCache(DynamicCache):
    """A dynamic cache that applies overwrites and, if asked, keeps everything that was written.

    Sliding-window layers drop old keys and values, so a donor must be recorded as it is written:
    ``recorded`` holds the full K and V of every layer, the overwritten ones included.
    """

    def __init__(self, config: Any, overwrites: Sequence[Overwrite] = (), *, record: bool = False):
        super().__init__(config=config)
        self.overwrites = tuple(overwrites)
        self._chunks: dict[int, list[tuple[Tensor, Tensor]]] | None = {} if record else None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        slot = self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0
        for overwrite in self.overwrites:
            key_states, value_states = overwrite.apply(layer_idx, key_states, value_states, slot)
        if self._chunks is not None:
            self._chunks.setdefault(layer_idx, []).append((key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def recorded(self) -> KeysValues:
        """Keys and values written so far, by layer, in slot order."""
        assert self._chunks is not None, "not recording"
        return {
            layer: tuple(torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True))
            for layer, chunks in self._chunks.items()
        }


class PrefixCache(DynamicCache):
    """A prefix that rows may hold different versions of, for one pass over what follows it.

    What the pass writes is handed on to attention and not kept. Layers that are passed over write
    nothing, so the length is the prefix's whatever has been written. Windows need nothing here: the
    whole prefix is handed on, and the model's mask says what is seen of it.
    """

    def __init__(self, config: Any, prefix: KeysValues, edited: KeysValues):
        """``prefix`` has one row that serves all; ``edited`` replaces it at some layers, row by row."""
        super().__init__(config=config)
        self._prefix = prefix | edited
        self._length = next(iter(prefix.values()))[0].shape[2]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        rows = len(key_states)
        before = (kv.to(key_states.device).expand(rows, -1, -1, -1) for kv in self._prefix[layer_idx])
        key, value = (torch.cat(pair, dim=2) for pair in zip(before, new, strict=True))
        return key, value

    def get_seq_length(self, *_: int, **__: int) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, *_: int, **__: int) -> tuple[int, int]:
        return self._length + query_length, 0


@dataclass(frozen=True)
class PrefixState:
    """Everything a model has cached after the prefix: K and V, recurrent and convolution states.

    Batch size 1, or one row for each row of the batch it will serve.
    """

    keys_values: KeysValues
    recurrent: Mapping[int, LinearAttentionCacheLayerMixin]
    """Linear-attention layers of a hybrid model, which have no positions to choose among."""
    length: int

    def cache(
        self,
        config: Any,
        rows: int,
        overwrites: Sequence[Overwrite] = (),
        *,
        record: bool = False,
    ) -> PatchCache:
        """A fresh cache of ``rows`` rows that continues from this state.

        ``overwrites`` and ``record`` concern what is written after the state.
        """
        cache = PatchCache(config)
        for layer, keys_values in self.keys_values.items():
            key, value = (kv.expand(rows, -1, -1, -1) for kv in keys_values)
            cache.update(key, value, layer)
        for layer, state in self.recurrent.items():
            _copy_recurrent(state, cache.layers[layer], rows)
        cache.overwrites = tuple(overwrites)
        cache._chunks = {} if record else None
        return cache


def prefix_state(cache: PatchCache, length: int) -> PrefixState:
    """The state that a recording cache holds after a prefill of ``length`` tokens."""
    recurrent = {
        layer: state
        for layer, state in enumerate(cache.layers)
        if isinstance(state, LinearAttentionCacheLayerMixin)
    }
    return PrefixState(cache.recorded, recurrent, length)


def is_hybrid(config: Any) -> bool:
    """Whether some layers keep a recurrent state instead of, or beside, keys and values."""
    return any(
        isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers
    )


def window(config: Any) -> int | None:
    """Tokens that the narrowest sliding-window layer can see, or None when all layers see all."""
    layers = DynamicCache(config=config).layers
    widths = (layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False))
    return min(widths, default=None)


def select_rows(cache: DynamicCache, rows: Int[Tensor, " row"]) -> None:
    """Keep (or repeat) the given rows of every layer, recurrent states included, in place."""
    cache.reorder_cache(rows)


def clone(cache: DynamicCache, config: Any) -> PatchCache:
    """A cache that can be decoded from without changing this one. Tensors are shared until written."""
    twin = PatchCache(config)
    for layer, mine in enumerate(cache.layers):
        theirs = twin.layers[layer]
        if isinstance(mine, LinearAttentionCacheLayerMixin):
            _copy_recurrent(mine, theirs, None)
        if getattr(mine, "keys", None) is not None:
            theirs.lazy_initialization(mine.keys, mine.values)
            theirs.keys, theirs.values = mine.keys, mine.values  # grown by concatenation only
            if hasattr(mine, "cumulative_length"):
                theirs.cumulative_length = mine.cumulative_length
    return twin


def visible_share(
    cache: DynamicCache, overwrite_positions: Bool[Tensor, "batch slot"], length: int
) -> Float[Tensor, " n_layers"]:
    """Share of the patched slots that each attention layer still holds after ``length`` tokens.

    Below 1 only where a sliding window has moved past them: the patch is then no longer seen there.
    """
    shares = []
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None:
            continue
        first_kept = length - layer.keys.shape[-2]
        patched = overwrite_positions.sum().clamp(min=1)
        shares.append(overwrite_positions[:, max(first_kept, 0) :].sum() / patched)
    return torch.stack(shares).float()


def _copy_recurrent(
    source: LinearAttentionCacheLayerMixin, target: LinearAttentionCacheLayerMixin, rows: int | None
) -> None:
    """Copy (and with ``rows`` repeat) recurrent and convolution states; decoding writes in place."""

    def copy(state: Tensor | None) -> Tensor | None:
        if state is None:
            return None
        return state.clone() if rows is None else state.expand(rows, *state.shape[1:]).clone()

    for name in ("is_conv_states_initialized", "is_recurrent_states_initialized"):
        setattr(target, name, dict(getattr(source, name)))
    target.has_previous_state = dict(source.has_previous_state)
    target.conv_kernel_size = dict(source.conv_kernel_size)
    target.device, target.dtype = source.device, source.dtype
    target.conv_states = {i: copy(state) for i, state in source.conv_states.items()}
    target.recurrent_states = {i: copy(state) for i, state in source.recurrent_states.items()}
