"""The prefix patch as hooks for TransformerLens, and caches both ways.

    base, tuned = bridge(pair, "base"), bridge(pair, "finetuned")
    batch = make_batch([pair.chat.render(q) for q in questions], device, share_prefix=False)
    hooks = patch_hooks(base, batch, segments=("prefix",))
    logits = tuned.run_with_hooks(batch.input_ids, fwd_hooks=hooks, **masks(batch))

Hooks replace projected keys and values (``hook_k`` and ``hook_v``, before any k_norm and RoPE), which
is what the released code of arXiv 2606.06667 does; a k_norm that a full finetune has changed acts on
patched keys. A bridge also takes the caches of
``emmech.patch_kv`` as they are: ``tuned(inputs, past_key_values=patched.cache())``, with every donor.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from emmech.chat import Segment
from emmech.models.generation import Batch
from emmech.models.kv_cache import KeysValues

if TYPE_CHECKING:
    from transformer_lens import ActivationCache
    from transformer_lens.model_bridge import TransformerBridge

Hooks = list[tuple[str, Callable[..., Tensor]]]
"""As ``run_with_hooks`` and ``hooks`` of a bridge take them."""


def masks(batch: Batch) -> dict[str, Tensor]:
    """What a bridge needs to know of a left-padded batch besides its ids."""
    return {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}


def patch_hooks(
    source: "TransformerBridge",
    batch: Batch,
    *,
    segments: Sequence[Segment] = ("prefix",),
    layers: Sequence[int] | None = None,
    kv_heads: Sequence[int] | None = None,
    key: bool = True,
    value: bool = True,
    positions: Bool[Tensor, "batch slot"] | None = None,
) -> Hooks:
    """Hooks that put the keys and values of ``source`` into another bridge that reads ``batch``.

    They act on the prompt, also inside ``with target.hooks(fwd_hooks=...): target.generate(...)``;
    what is generated keeps its own.

    Args:
        source: The bridge that they come from; it is run once.
        batch: Left-padded prompts, from ``make_batch(..., share_prefix=False)`` or ``patch_kv``.
        segments: What is patched; ``positions`` (over the slots) overrides it.
        layers: 0-based blocks, all by default; ``kv_heads`` likewise.
        key: Patch the keys; ``value`` likewise.
    """
    assert batch.n_shared == 0, "the batch shares its prefix"
    chosen = range(len(source.blocks)) if layers is None else layers
    kinds = [kind for kind, wanted in (("k", key), ("v", value)) if wanted]
    names = [f"blocks.{layer}.attn.hook_{kind}" for layer in chosen for kind in kinds]
    if positions is None:
        positions = torch.stack([batch.positions(segment) for segment in segments]).any(0)
    where = (positions & batch.attention_mask.bool())[..., None, None]
    with torch.no_grad():
        _, cache = source.run_with_cache(batch.input_ids, names_filter=names, **masks(batch))
    if kv_heads is not None:
        heads = torch.zeros(cache[names[0]].shape[2], dtype=torch.bool, device=where.device)
        heads[list(kv_heads)] = True
        where = where & heads[:, None]
    return [(name, partial(_put, cache[name], where)) for name in names]


def _put(donor: Tensor, where: Tensor, own: Float[Tensor, "batch pos n_kv_heads d_head"], **_: Any) -> Tensor:
    """The prompt's slots of an activation replaced; a pass may hold more (or only later) tokens."""
    width = donor.shape[1]
    if own.shape[1] < width:
        return own
    return torch.cat([torch.where(where, donor, own[:, :width]), own[:, width:]], dim=1)


def keys_values(cache: "ActivationCache") -> KeysValues:
    """The keys and values that a run with cache has attended to, as a model's cache holds them.

    For ``PrefixState``, ``Overwrite`` and other donors of the default engine. Needs all activations
    of the attention blocks; where a bridge has no hook after RoPE, it is applied here.
    """
    named = dict(cache.items())
    found: KeysValues = {}
    for layer in sorted({int(name.split(".")[1]) for name in named if name.endswith(".attn.hook_v")}):
        attn = f"blocks.{layer}.attn."
        if attn + "hook_rot_k" in named:
            key = named[attn + "hook_rot_k"]
        else:
            key = _rotated(*(named[attn + part] for part in ("hook_k", "hook_cos", "hook_sin")))
        found[layer] = (key.transpose(1, 2), named[attn + "hook_v"].transpose(1, 2))
    return found


def activation_cache(states: KeysValues, model: "TransformerBridge") -> "ActivationCache":
    """Recorded keys and values under TransformerLens's names, ``hook_rot_k`` and ``hook_v``."""
    from transformer_lens import ActivationCache

    named = {}
    for layer, (key, value) in states.items():
        named[f"blocks.{layer}.attn.hook_rot_k"] = key.transpose(1, 2)
        named[f"blocks.{layer}.attn.hook_v"] = value.transpose(1, 2)
    return ActivationCache(named, model)


def _rotated(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first dimensions of each head, as many as ``cos`` has: k cos + rotate(k) sin."""
    width = cos.shape[-1]
    turned, rest = key[..., :width], key[..., width:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)
