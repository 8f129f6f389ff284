"""Name a place in the model, record it, replace it; nothing else in emmech touches module hooks.

Places carry TransformerLens's names (``blocks.3.hook_resid_post``, ``blocks.3.attn.k.hook_out``) and
are resolved to modules of the unmodified Hugging Face model by TransformerLens's architecture
adapters, without booting a bridge. Cached keys and values are not here: they are patched where the
cache is written (``kv_cache``), which also works where q, k and v are one fused projection.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emmech.errors import PatchError

Edit = Callable[[Tensor], Tensor]
"""From an activation ``[batch pos d]`` to the one that replaces it."""


def attach(model: nn.Module, name: str, edit: Edit) -> RemovableHandle:
    """Pass the activation called ``name`` through ``edit`` until the handle's ``remove()``.

    Raises:
        PatchError: This architecture has no such place.
    """
    module, at_input = resolve(model, name)

    def on_input(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}

    def on_output(_: nn.Module, __: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    if at_input:
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


@contextmanager
def replaced(model: nn.Module, name: str, edit: Edit) -> Iterator[None]:
    """Run ``model`` with the activation called ``name`` passed through ``edit``.

    Raises:
        PatchError: This architecture has no such place.
    """
    handle = attach(model, name, edit)
    try:
        yield
    finally:
        handle.remove()


def refuse_non_finite(model: nn.Module, cause: str, fix: str) -> RemovableHandle:
    """Let a pass in evaluation whose logits are not finite raise, until the handle's ``remove()``.

    The pass raises a ``PatchError`` that names ``cause`` (as in "at gate scale 9") and ``fix``.
    """

    def check(module: nn.Module, _: Any, output: Any) -> None:
        last = output.logits[:, -1] if hasattr(output, "logits") else output[0]  # of return_dict=False
        if not module.training and not torch.isfinite(last).all():
            raise PatchError("finite logits", f"they are not {cause}", fix)

    # generate of a PEFT model calls the inner one
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.register_forward_hook(check)


@contextmanager
def recorded(model: nn.Module, *names: str) -> Iterator[dict[str, Tensor]]:
    """A dictionary that each forward pass fills with the named activations."""
    store: dict[str, Tensor] = {}

    def keep(name: str) -> Edit:
        def edit(activation: Tensor) -> Tensor:
            store[name] = activation
            return activation

        return edit

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(replaced(model, name, keep(name)))
        yield store


def resolve(model: nn.Module, name: str) -> tuple[nn.Module, bool]:
    """The module that computes ``name``, and whether the place is its input (else its output)."""
    path, _, hook = name.rpartition(".")
    if hook not in ("hook_resid_pre", "hook_resid_post", "hook_in", "hook_out"):
        raise PatchError(
            "a place named blocks.L.hook_resid_pre, blocks.L.hook_resid_post or COMPONENT.hook_out",
            f"got '{name}'",
            "Correct the name",
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        module = inner.get_submodule(_translate(_Architecture(inner), path))
    except (ValueError, AttributeError) as error:
        raise PatchError(
            f"a model with the place '{name}'",
            f"{type(inner).__name__} has none ({error})",
            "Patch cached keys and values instead, which needs no module names",
        ) from error
    return module, hook in ("hook_resid_pre", "hook_in")


class _Architecture:
    """A model class and configuration, hashed by identity of the configuration."""

    def __init__(self, model: nn.Module):
        self.name, self.config = type(model).__name__, model.config

    def __hash__(self) -> int:
        return hash((self.name, id(self.config)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Architecture) and self.config is other.config


@lru_cache(maxsize=4096)
def _translate(architecture: _Architecture, path: str) -> str:
    return _adapter(architecture).translate_transformer_lens_path(path)


@lru_cache(maxsize=8)
def _adapter(architecture: _Architecture) -> Any:
    import inspect

    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._hf_format import map_default_transformer_lens_config

    known = inspect.signature(TransformerBridgeConfig.__init__).parameters
    mapped = map_default_transformer_lens_config(architecture.config).to_dict()
    fields = {name: value for name, value in mapped.items() if name in known}
    config = TransformerBridgeConfig(**fields | {"architecture": architecture.name})
    return ArchitectureAdapterFactory.select_architecture_adapter(config)
