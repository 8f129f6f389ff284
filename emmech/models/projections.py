"""Projected keys and values of a forward pass, with their gradients.

Projected is before any k_norm and before RoPE: the outputs of ``k_proj`` and ``v_proj``. Where q, k
and v are one fused projection they are taken from the cache instead, after RoPE. A rotation keeps
lengths, so between two models at equal positions their relative deviation is the same, as long as no
k_norm comes between.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from emmech.errors import PatchError
from emmech.models import hook_points
from emmech.models.kv_cache import PatchCache

Projections = dict[int, tuple[Tensor, Tensor]]
"""Per attention layer, keys and values ``[batch pos d_kv]``."""


@dataclass
class Recording:
    """What to pass to the model, and after the pass its keys and values."""

    inputs: dict[str, Any]
    _outputs: dict[str, Tensor] = field(default_factory=dict)
    _cache: PatchCache | None = None
    _layers: tuple[int, ...] = ()

    def read(self) -> Projections:
        """Keys and values of the last forward pass."""
        if self._cache is not None:
            written = self._cache.recorded
            return {
                layer: tuple(kv.transpose(1, 2).flatten(2) for kv in written[layer]) for layer in self._layers
            }
        return {layer: tuple(self._outputs[_name(layer, part)] for part in "kv") for layer in self._layers}


@contextmanager
def projected(model: nn.Module, layers: tuple[int, ...] | None = None) -> Iterator[Recording]:
    """Record the keys and values of a pass made inside the ``with`` block with ``recording.inputs``."""
    config = _text_config(model)
    chosen = attention_layers(config) if layers is None else layers
    if not is_separate(model):
        cache = PatchCache(config, record=True)
        yield Recording({"past_key_values": cache, "use_cache": True}, _cache=cache, _layers=chosen)
        return
    names = [_name(layer, part) for layer in chosen for part in "kv"]
    with hook_points.recorded(model, *names) as outputs:
        yield Recording({"use_cache": False}, outputs, _layers=chosen)


def attention_layers(config: Any) -> tuple[int, ...]:
    """Layers that have keys and values."""
    layers = enumerate(DynamicCache(config=config).layers)
    return tuple(i for i, layer in layers if not isinstance(layer, LinearAttentionCacheLayerMixin))


def is_separate(model: nn.Module) -> bool:
    """Whether keys and values have projections of their own."""
    first = attention_layers(_text_config(model))[0]
    try:
        for part in "kv":
            hook_points.resolve(model, _name(first, part))
    except PatchError:
        return False
    return True


def _name(layer: int, part: str) -> str:
    return f"blocks.{layer}.attn.{part}.hook_out"


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config(decoder=True)
