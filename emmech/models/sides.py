"""One model of a pair, and what acts on it: ``with side.active() as module: module(ids)``."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

SideName = Literal["base", "finetuned"]
Intervention = Callable[[nn.Module], AbstractContextManager]


@dataclass(frozen=True)
class Side:
    """One model of a pair. For a LoRA pair both sides hold the same module."""

    name: str
    module: nn.Module
    adapter_off: bool = False
    interventions: tuple[Intervention, ...] = ()
    """What acts on the module while it is this side, such as ``Gating(gates).on``."""

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The module, behaving as this side inside the ``with`` block."""
        with ExitStack() as stack, self._adapter():
            for intervention in self.interventions:
                stack.enter_context(intervention(self.module))
            yield self.module

    def under(self, name: str, *interventions: Intervention) -> "Side":
        """This side with further interventions, under a name of its own."""
        return replace(self, name=name, interventions=(*self.interventions, *interventions))

    @contextmanager
    def _adapter(self) -> Iterator[None]:
        if not self.adapter_off:
            yield
            return
        tuner = self.module.base_model
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            tuner.enable_adapter_layers()
            self.module.requires_grad_(False)  # PEFT switches training on again with the adapter

    @property
    def config(self) -> Any:
        """The text decoder's transformers configuration."""
        return self.module.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where the token ids go."""
        return self.module.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings, which is that of the residual stream."""
        return self.module.get_input_embeddings().weight.dtype
