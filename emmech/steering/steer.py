"""Push a model along a direction, take the direction out, or hold it at the base's level.

    with emmech.steered(model, direction, coeff=2, layers=[14]):
        model.generate(...)

``add``: h + c v, the coefficient c in units of the shift that the direction was fitted to. ``ablate``:
h - c (h·u) u with u = v / |v|; c = 1 takes the whole component out. ``clamp``: the component is moved
by the share c towards the level of the states that the direction starts from (the base's). Everything
at the site of the direction, in the blocks and on the tokens that are chosen.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from emmech.chat import PARTS
from emmech.errors import PatchError
from emmech.models import hook_points
from emmech.models.generation import Batch, current_parts, follow, prompt_ends
from emmech.steering.directions import Direction
from emmech.steering.states import SITES

Mode = Literal["add", "ablate", "clamp"]
MODES: tuple[Mode, ...] = get_args(Mode)
LAST = "last"
TOKENS = (*PARTS, LAST)
"""Parts of the chat to steer on; ``last`` is the last token of the prompt."""


@dataclass(frozen=True)
class Steer:
    """A direction at a coefficient, and where it acts: ``with Steer(direction, 2, (14,)).on(model)``."""

    direction: Direction
    coeff: float | int
    layers: tuple[int, ...]
    """0-based blocks."""
    mode: Mode = "add"
    parts: tuple[str, ...] | None = None
    """Among ``TOKENS``; None is every token. Parts need a run that knows them: see ``steered``."""

    def __post_init__(self):
        if self.mode not in MODES:
            raise PatchError(f"a mode among {', '.join(MODES)}", f"got '{self.mode}'", "Correct it")
        if not abs(self.coeff) <= torch.finfo(torch.float32).max:
            raise PatchError("a finite coefficient", f"got {self.coeff}", "Correct it")
        n_layers = len(self.direction.vectors)
        if not self.layers or not all(0 <= layer < n_layers for layer in self.layers):
            raise PatchError(f"layers among 0..{n_layers - 1}", f"got {list(self.layers)}", "Correct them")
        if self.parts is not None and not (self.parts and set(self.parts) <= set(TOKENS)):
            raise PatchError(f"parts among {', '.join(TOKENS)}", f"got {list(self.parts)}", "Correct them")

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[nn.Module]:
        """Run ``model`` steered inside the ``with`` block.

        Raises:
            PatchError: The direction was fitted to a model of another shape.
        """
        config = model.config.get_text_config(decoder=True)
        own = (config.num_hidden_layers, config.hidden_size)
        if own != tuple(self.direction.vectors.shape):
            raise PatchError(
                "a direction for this model ({} blocks, d_model {})".format(*own),
                "it was fitted to {} blocks, d_model {}".format(*self.direction.vectors.shape),
                "Fit it to this model, or load the one it was fitted to",
            )
        cause, fix = f"when steered by {self.coeff:g}", "Choose a coefficient nearer to 0"
        with ExitStack() as stack:
            stack.callback(hook_points.refuse_non_finite(model, cause, fix).remove)
            for layer in self.layers:
                name = SITES[self.direction.site].format(layer)
                stack.enter_context(hook_points.replaced(model, name, self._edit(layer)))
            yield model

    def _edit(self, layer: int) -> hook_points.Edit:
        vector, unit = self.direction.vectors[layer], self.direction.unit(layer)
        level = float(self.direction.level[layer])

        def edit(h: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
            u = unit.to(h.device)
            if self.mode == "add":
                change = self.coeff * vector.to(h.device)
            else:
                target = 0.0 if self.mode == "ablate" else level
                change = self.coeff * (target - h.float() @ u)[..., None] * u
            if self.parts is not None:
                change = torch.where(self._acts(h)[..., None], change, 0.0)
            return (h.float() + change).to(h.dtype)

        return edit

    def _acts(self, h: Tensor) -> Bool[Tensor, "batch pos"]:
        """True on the tokens of this pass that are steered."""
        numbers = current_parts()
        if numbers is None:
            raise PatchError(
                "a run that knows the parts of its chats",
                "steering restricted to parts was used in a bare pass of the model",
                "Pass batch=... to steered, or leave parts out",
            )
        assert self.parts is not None
        numbers = numbers.to(h.device).expand(h.shape[:2])
        wanted = torch.tensor([PARTS.index(part) for part in self.parts if part != LAST], device=h.device)
        acts = torch.isin(numbers, wanted)
        return acts | prompt_ends(numbers) if LAST in self.parts else acts


@contextmanager
def steered(
    model: nn.Module,
    direction: Direction,
    coeff: float | int = 1.0,
    *,
    layers: Sequence[int] | None = None,
    mode: Mode = "add",
    parts: Sequence[str] | None = None,
    batch: Batch | None = None,
) -> Iterator[nn.Module]:
    """A ``with`` block in which any Hugging Face causal LM runs steered, ``generate`` included.

    Args:
        model: A decoder, with or without a PEFT adapter.
        direction: From ``fit_direction`` or ``Direction.load``.
        coeff: ``add``: how many times the shift is added, negative to go back. ``ablate`` and
            ``clamp``: which share of the component is removed, or moved to the base's level.
        layers: Blocks. ``ablate`` acts on all by default, the others need them.
        mode: ``add``, ``ablate`` or ``clamp``.
        parts: Tokens: prefix, query, postfix, response or last (of the prompt); all by default. In
            bare passes of the model this needs ``batch``.
        batch: The left-padded batch that ``model`` will read, from ``make_batch`` or ``patch_kv``.

    Raises:
        PatchError: The direction does not fit the model, or layers, mode or parts are unknown.
    """
    if layers is None and mode != "ablate":
        raise PatchError("layers to steer", "there are none", "Pass layers=[...]")
    chosen = tuple(range(len(direction.vectors))) if layers is None else tuple(layers)
    steer = Steer(direction, coeff, chosen, mode, None if parts is None else tuple(parts))
    with ExitStack() as stack:
        stack.enter_context(steer.on(model))
        if batch is not None:
            stack.enter_context(follow(model, batch))
        yield model


@contextmanager
def scaled_adapter(model: nn.Module, scale: float | int) -> Iterator[nn.Module]:
    """Run a LoRA model with its adapter's update times ``scale``: 0 off, 1 as trained, -1 negated.

    Raises:
        PatchError: The model has no LoRA adapter.
    """
    from peft.helpers import rescale_adapter_scale
    from peft.tuners.lora import LoraLayer

    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        raise PatchError(
            "a model with a LoRA adapter to scale",
            f"{type(model).__name__} has none",
            "Pass a LoRA pair",
        )
    with rescale_adapter_scale(model, scale):
        yield model
