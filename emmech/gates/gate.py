"""Alignment gates: multiply what each attention head passes on, and turn that multiplier up, down or round.

    gates = emmech.load_gates("runs/gates/step-40", model)
    with emmech.gated(model, gates, scale=-1):
        model.generate(...)

From the attention block's normalised input h, gate = 2 sigmoid(W h + b), 1 where W and b are zero, is
multiplied into the concatenated head outputs (``hook_z``) before the output projection (arXiv
2606.09068; its inverted gate, 2 - gate, is scale -1). The dose is 1 + scale (gate - 1): 0 switches the
gates off to the bit, 1 is as trained, above 1 amplifies. The model stays the unmodified Hugging Face
module, with or without a PEFT adapter: gates act through hooks.
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emmech.chat import PARTS
from emmech.errors import EmmechError, PatchError
from emmech.models import hook_points
from emmech.models.generation import current_parts
from emmech.models.projections import attention_layers
from emmech.reprs import card

GateVariant = Literal["full", "low_rank", "per_head"]
GATE_VARIANTS: tuple[GateVariant, ...] = get_args(GateVariant)


class GateError(EmmechError):
    """Gates that do not fit the model, or cannot be read."""


@dataclass(frozen=True)
class GateShape:
    """What a set of gates is made for."""

    layers: tuple[int, ...]
    """Gated blocks, 0-based: those with attention."""
    d_model: int
    n_heads: int
    d_head: int
    variant: GateVariant = "full"
    """``full``: W of every head dimension, as in the paper; ``low_rank``: W = up @ down of ``rank``;
    ``per_head``: one multiplier for each head."""
    rank: int | None = None

    def __post_init__(self):
        if self.variant not in GATE_VARIANTS:
            raise GateError(
                f"a variant among {', '.join(GATE_VARIANTS)}", f"got '{self.variant}'", "Correct it"
            )
        if (self.variant == "low_rank") != (self.rank is not None) or (
            self.rank is not None and self.rank < 1
        ):
            raise GateError(
                "a positive rank with low_rank, and only there",
                f"got rank {self.rank} with {self.variant}",
                "Correct it",
            )
        sizes = (self.d_model, self.n_heads, self.d_head)
        numbers = (*sizes, *(layer + 1 for layer in self.layers))
        if not self.layers or not all(isinstance(number, int) and number > 0 for number in numbers):
            raise GateError("layers and positive sizes", f"got {self.layers} and {sizes}", "Correct them")

    @property
    def d_attn(self) -> int:
        """Width of the concatenated head outputs."""
        return self.n_heads * self.d_head

    def text(self) -> str:
        """As in "30 layers, 576 -> 9 heads of 64"; of a hybrid "layers 3, 7, 11, 512 -> ..."."""
        every = len(self.layers) > 1 and self.layers == tuple(range(len(self.layers)))
        layers = f"{len(self.layers)} layers" if every else f"layers {_ranges(self.layers)}"
        return f"{layers}, {self.d_model} -> {self.n_heads} heads of {self.d_head}"


def shape_of(model: nn.Module, variant: GateVariant = "full", rank: int | None = None) -> GateShape:
    """The shape of gates for every attention block of ``model``.

    Raises:
        PatchError: The architecture's attention blocks cannot be found.
    """
    config = model.config.get_text_config(decoder=True)
    layers = attention_layers(config)
    d_attn = _width(hook_points.resolve(model, heads_out(layers[0]))[0])
    n_heads = config.num_attention_heads
    return GateShape(layers, config.hidden_size, n_heads, d_attn // n_heads, variant, rank)


class Gates(nn.Module):
    """The gates of one model, one linear map per attention block, zero-initialised, in float32."""

    def __init__(self, shape: GateShape):
        super().__init__()
        self.shape = shape
        self.provenance: dict[str, Any] = {}
        """Base, data and recipe that the gates were trained with; saved with them."""
        self.maps = nn.ModuleDict({str(layer): _zero_map(shape) for layer in shape.layers})

    def gate_logit(self, layer: int, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_attn"]:
        """W h + b of a block, in float32; ``h`` is the normalised input of its attention."""
        logit = self.maps[str(layer)](h.float())
        return logit if self.shape.variant != "per_head" else logit.repeat_interleave(self.shape.d_head, -1)

    def forward(self, layer: int, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_attn"]:
        """The gate of each head dimension, 2 sigmoid(gate_logit), in (0, 2)."""
        return 2 * torch.sigmoid(self.gate_logit(layer, h))

    @torch.no_grad()
    def inverted(self) -> "Gates":
        """New gates with 2 - gate in place of gate: the logits negated."""
        other = copy.deepcopy(self)
        other.provenance["inverted"] = not self.provenance.get("inverted", False)
        for one in other.maps.values():
            last = one[-1] if isinstance(one, nn.Sequential) else one
            last.weight.neg_()
            last.bias.neg_()
        return other

    def fingerprint(self) -> str:
        """A hash of every value, which records of runs carry."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _repr_html_(self) -> str:
        base, data = (self.provenance.get(name) or {} for name in ("base", "data"))
        rank = f", rank {self.shape.rank}" if self.shape.rank else ""
        facts = {
            "shape": self.shape.text(),
            "variant": self.shape.variant + rank,
            "base": base.get("name"),
            "data": data.get("name"),
            "inverted": self.provenance.get("inverted"),
            "fingerprint": self.fingerprint(),
        }
        return card("Gates", facts)

    def heads_mask(
        self, layers: Iterable[int] | None = None, heads: Iterable[tuple[int, int]] | None = None
    ) -> Bool[Tensor, "layer head"]:
        """True on the chosen heads of ``shape.layers``: all heads of some layers, or single ones.

        Raises:
            GateError: A layer or head is not among the gated ones.
        """
        shape = self.shape
        where = {layer: row for row, layer in enumerate(shape.layers)}
        chosen = [(layer, head) for layer in layers or () for head in range(shape.n_heads)]
        chosen += list(heads or ())
        mask = torch.zeros(len(shape.layers), shape.n_heads, dtype=torch.bool)
        for layer, head in chosen:
            if layer not in where or not 0 <= head < shape.n_heads:
                raise GateError(
                    f"gated layers {_ranges(shape.layers)} and heads 0..{shape.n_heads - 1}",
                    f"got layer {layer}, head {head}",
                    "Correct them",
                )
            mask[where[layer], head] = True
        return mask if layers is not None or heads is not None else ~mask


@dataclass(frozen=True)
class Attached:
    """Hooks that were put into a model."""

    handles: Sequence[RemovableHandle]

    def remove(self) -> None:
        """Take them out again."""
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True)
class Gating:
    """Gates at a dose, and where they act: ``with Gating(gates, scale=-1).on(model): ...``."""

    gates: Gates
    scale: float | int = 1.0
    """0 is off, 1 as trained, -1 inverted: the multiplier is 1 + scale (gate - 1)."""
    layers: tuple[int, ...] | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    """(layer, head) pairs, besides ``layers``; every gated head where neither is given."""
    parts: tuple[str, ...] | None = None
    """Tokens that the gates act on: among prefix, query, postfix and response; None is all. Only runs
    that know the parts of their chats (emmech's own) can be restricted."""

    def __post_init__(self):
        if not abs(self.scale) <= torch.finfo(torch.float32).max:
            raise GateError("a finite scale", f"got {self.scale}", "Correct it")
        if self.parts is not None and not set(self.parts) <= set(PARTS):
            raise GateError(f"parts among {', '.join(PARTS)}", f"got {self.parts}", "Correct them")
        self.gates.heads_mask(self.layers, self.heads)  # refuses what is not there

    def attach(self, model: nn.Module) -> "Attached":
        """Gate ``model`` until the handle's ``remove()``.

        Raises:
            GateError: The gates were made for another shape of model.
        """
        refuse_other_shape(self.gates.shape, model)
        mask = self.gates.heads_mask(self.layers, self.heads)
        cause = f"at gate scale {self.scale:g}"
        handles = [hook_points.refuse_non_finite(model, cause, "Choose a scale nearer to 0")]
        try:
            for layer, heads in zip(self.gates.shape.layers, mask, strict=True):
                if heads.any():
                    dims = None if heads.all() else heads.repeat_interleave(self.gates.shape.d_head)
                    self._attach(model, layer, dims, handles)
        except PatchError:
            Attached(handles).remove()
            raise
        return Attached(handles)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[nn.Module]:
        """Run ``model`` with the gates inside the ``with`` block.

        Raises:
            GateError: The gates were made for another shape of model.
            PatchError: The model's logits are not finite at this scale.
        """
        attached = self.attach(model)
        try:
            yield model
        finally:
            attached.remove()

    def _attach(
        self, model: nn.Module, layer: int, dims: Tensor | None, handles: list[RemovableHandle]
    ) -> None:
        """Two hooks of a block: read its normalised input, multiply its heads; ``dims`` None is all."""
        device = hook_points.resolve(model, heads_out(layer))[0].weight.device
        self.gates.maps[str(layer)].to(device)
        dims = None if dims is None else dims.to(device)
        held: list[Tensor] = []

        def read(h: Tensor) -> Tensor:
            held[:] = [self.gates(layer, h)]
            return h

        def multiply(z: Tensor) -> Tensor:
            dose = _dose(held.pop(), self.scale)
            if dims is not None:
                dose = torch.where(dims, dose, 1.0)
            if self.parts is not None:
                dose = torch.where(self._acts(z)[..., None], dose, 1.0)
            return (z.float() * dose).to(z.dtype)

        handles.append(hook_points.attach(model, normalised_input(layer), read))
        handles.append(hook_points.attach(model, heads_out(layer), multiply))

    def _acts(self, z: Tensor) -> Bool[Tensor, "batch pos"]:
        """True on the tokens of this pass that the gates act on."""
        numbers = current_parts()
        if numbers is None:
            raise PatchError(
                "a run that knows the parts of its chats",
                "gates restricted to parts were used in a bare pass of the model",
                "Use steer_gates or gate_parts, or leave parts out",
            )
        wanted = torch.tensor([PARTS.index(part) for part in self.parts or ()], device=z.device)
        return torch.isin(numbers.to(z.device), wanted).expand(z.shape[:2])


def gated(
    model: nn.Module,
    gates: Gates,
    scale: float | int = 1.0,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
) -> AbstractContextManager[nn.Module]:
    """A ``with`` block in which any Hugging Face causal LM runs with gates.

    Args:
        model: A decoder, with or without a PEFT adapter.
        gates: From ``load_gates``.
        scale: 0 off, 1 as trained, -1 inverted, in between and beyond.
        layers: Blocks whose heads are gated; ``heads`` adds single (layer, head) pairs. All by default.

    Raises:
        GateError: The gates do not fit the model, or there is no such layer or head.
    """
    return Gating(
        gates,
        scale,
        None if layers is None else tuple(layers),
        None if heads is None else tuple(heads),
    ).on(model)


def attach_gates_(model: nn.Module, gates: Gates) -> None:
    """Make zero-initialised ``gates`` a part of ``model``, to be trained: ``model.alignment_gates``."""
    model.alignment_gates = gates
    Gating(gates).attach(model)


def refuse_other_shape(shape: GateShape, model: nn.Module) -> None:
    """Refuse gates made for another shape of model.

    Raises:
        GateError: Names both shapes.
    """
    own = shape_of(model)
    if replace(shape, variant="full", rank=None) != own:
        raise GateError(
            f"gates for this model ({own.text()})",
            f"they were made for another ({shape.text()})",
            "Load the base that the gates were trained on",
        )


def _dose(gate: Tensor, scale: float | int) -> Tensor:
    if abs(scale) == 1:  # as the paper writes them, to the last bit
        return gate if scale == 1 else 2 - gate
    return 1 + scale * (gate - 1)


def _zero_map(shape: GateShape) -> nn.Module:
    """W and b of one block, zero; of ``low_rank`` only up and b are, so that it can learn."""
    if shape.rank is not None:
        last = nn.Linear(shape.rank, shape.d_attn)
        made: nn.Module = nn.Sequential(nn.Linear(shape.d_model, shape.rank, bias=False), last)
    else:
        made = last = nn.Linear(shape.d_model, shape.n_heads if shape.variant == "per_head" else shape.d_attn)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return made


def normalised_input(layer: int) -> str:
    """Name of the place that a gate is computed from."""
    return f"blocks.{layer}.attn.hook_in"


def heads_out(layer: int) -> str:
    """Name of the place that it multiplies: the concatenated head outputs (``hook_z``)."""
    return f"blocks.{layer}.attn.o.hook_in"


def _width(module: nn.Module) -> int:
    """Inputs of the output projection."""
    if hasattr(module, "in_features"):
        return module.in_features
    return module.weight.shape[0]  # Conv1D of GPT-2


def _ranges(layers: tuple[int, ...]) -> str:
    """As in "0..29" or "3, 7, 11"."""
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}..{layers[-1]}"
    return ", ".join(map(str, layers))
