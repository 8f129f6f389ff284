"""Give chosen tokens the finetuned model's weights, and all others the base's.

    side = graft_side(pair, ("response",))
    with side.active() as model, follow(model, batch):
        model.generate(...)

A patch of keys and values cannot see what rides on the last token of the prompt, which also predicts,
or on the answer itself. Exchanging the weights token by token can (the idea of dynamic weight grafting,
Nief et al. 2026, arXiv 2506.20746). Weights act on one token at a time in every module that holds any,
and tokens meet only in attention, which holds none: so at each module in which the models differ both
outputs are at hand, and each token takes its own. Of LoRA it is enough to silence the adapter's term
where the base acts. Grafted at the prefix alone this is the same intervention as `induce:prefix`, and
everywhere but there the same as `repair:prefix` (tests hold it to that).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from emmech.chat import PARTS
from emmech.errors import PatchError
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import current_parts, prompt_ends
from emmech.models.sides import Side
from emmech.piggyback.texts import read_places

PLACES = ("prefix", "query", "postfix", "postfix-rest", "last", "response")
"""Where weights can be grafted. ``last`` is the last token of the prompt, which predicts the answer's
first; ``postfix-rest`` is the postfix without it."""
GRAFT = "graft:"


@dataclass(frozen=True)
class Site:
    """A module in which the models differ, by its name in the finetuned one."""

    name: str
    twin: nn.Module | None
    """What the base computes there; None where the module's output is what an adapter adds."""
    axis: int
    """Of the positions in the output."""


@dataclass(frozen=True)
class Graft:
    """Finetuned weights at some tokens: ``with Graft(graft_sites(pair), ("query",)).on(model)``."""

    sites: tuple[Site, ...]
    parts: tuple[str, ...]
    """Among ``PLACES``. Bare passes of the model need ``generation.follow`` to know the parts."""

    def __post_init__(self):
        if not set(self.parts) <= set(PLACES):
            raise PatchError(f"parts among {', '.join(PLACES)}", f"got {list(self.parts)}", "Correct them")

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[nn.Module]:
        """Run the finetuned ``model`` inside the ``with`` block with the base's weights elsewhere."""
        acting = _Acting(self.parts)
        with ExitStack() as stack:
            for site in self.sites:
                module, hook = model.get_submodule(site.name), partial(_choose, site, acting)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield model


def graft_side(pair: ModelPair, parts: Sequence[str], sites: tuple[Site, ...] | None = None) -> Side:
    """The finetuned side with its own weights at ``parts`` only, called as in "graft:query+last".

    Args:
        pair: From ``load_pair``.
        parts: Among ``PLACES``.
        sites: From ``graft_sites(pair)``, where several sides are made.

    Raises:
        PatchError: An unknown part, or models that differ in more than what acts token by token.
    """
    graft = Graft(graft_sites(pair) if sites is None else sites, tuple(parts))
    return pair.finetuned.under(graft_name(parts), graft.on)


def graft_name(parts: Sequence[str]) -> str:
    """As in "graft:prefix+query"."""
    return GRAFT + "+".join(parts)


def parse_graft(name: str) -> tuple[str, ...]:
    """The parts of a name such as "graft:prefix+query".

    Raises:
        PatchError: It names none, or an unknown one.
    """
    parts = tuple(name.removeprefix(GRAFT).split("+"))
    if not set(parts) <= set(PLACES):
        raise PatchError(f"graft:PART+PART among {', '.join(PLACES)}", f"got '{name}'", "Correct it")
    return parts


def graft_sites(pair: ModelPair) -> tuple[Site, ...]:
    """Every module in which the models of a pair differ.

    Raises:
        PatchError: They do not differ, or not only in modules that act on each token by itself
            (routed experts, convolutions and recurrent layers do not).
    """
    if pair.finetuned.interventions:
        raise PatchError(
            "models that differ in their weights",
            "the finetuned side is a model with gates or the like",
            "Restrict those to parts: emmech gates parts",
        )
    model, base = pair.finetuned.module, pair.base.module
    found = _adapted(model) if pair.one_copy else _changed(model, base)
    if not found:
        raise PatchError("two models that differ", "all of their weights are equal", "Load a finetuned one")
    axes = _axes(pair.finetuned, [name for name, twin in found.items() if _by_token(twin)])
    bad = [name for name in found if name not in axes]
    if bad:
        raise PatchError(
            "models that differ where each token is computed by itself",
            f"{len(bad)} modules are not of that kind, such as {bad[0]}",
            "Patch keys and values or the residual stream instead",
        )
    return tuple(Site(name, twin, axes[name]) for name, twin in found.items())


def _adapted(model: nn.Module) -> dict[str, nn.Module | None]:
    """What an adapter computes, by name, and what the model computes there without it."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    found: dict[str, nn.Module | None] = {}
    for name, module in model.named_modules():
        plain = isinstance(module, LoraLayer) and not module.lora_variant
        if plain and any(isinstance(one, nn.Linear) for one in module.lora_B.values()):
            found |= {f"{name}.lora_B.{one}": None for one in module.active_adapters if one in module.lora_B}
        elif isinstance(module, BaseTunerLayer):
            found[name] = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            found[name] = module.original_module
    return found


def _changed(model: nn.Module, base: nn.Module) -> dict[str, nn.Module | None]:
    """Modules whose own weights or buffers differ from those of the same module of ``base``."""
    prefix = "base_model.model." if hasattr(model, "peft_config") else ""
    ours = dict(model.named_modules())
    found: dict[str, nn.Module | None] = {}
    for name, twin in base.named_modules():
        path = (prefix + name).rstrip(".")
        own = ours.get(path)
        shapes = [getattr(getattr(one, "weight", None), "shape", None) for one in (own, twin)]
        if own is None or shapes[0] != shapes[1]:
            raise PatchError(
                "two models of one shape",
                f"the finetuned one has no such '{name}'",
                "Load a finetuned model that kept the base's configuration and vocabulary",
            )
        if not _equal(_held(own), _held(twin)):
            found[path] = twin
    return found


def _held(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of the module itself."""
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name].to(tensor.device)) for name, tensor in ours.items()
    )


def _by_token(twin: nn.Module | None) -> bool:
    """Whether a kind of module computes each token from that token's input alone."""
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    return twin is None or isinstance(twin, kinds) or type(twin).__name__.endswith("Norm")


@torch.no_grad()
def _axes(side: Side, names: Sequence[str]) -> dict[str, int]:
    """The axis of positions in each module's output; none for one that is not run once per token.

    Found with a pass over as many tokens as there are neither heads nor key-value heads: norms of
    heads get the positions before or after the heads.
    """
    config = side.config
    heads = {config.num_attention_heads, getattr(config, "num_key_value_heads", None)}
    n_tokens = next(n for n in (3, 5, 7) if n not in heads)
    found: dict[str, int] = {}
    with ExitStack() as stack:
        model = stack.enter_context(side.active())
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(partial(_note, found, name, n_tokens))
            stack.callback(handle.remove)
        ids = torch.zeros(2, n_tokens, dtype=torch.long, device=side.device)
        model(input_ids=ids, use_cache=False)
    return found


def _note(found: dict[str, int], name: str, n_tokens: int, _: nn.Module, __: tuple, output: Tensor) -> None:
    """A forward hook that puts the axis of positions into ``found``."""
    for axis in (2, 1):
        if output.ndim > axis + 1 and output.shape[0] == 2 and output.shape[axis] == n_tokens:
            found[name] = axis


@dataclass
class _Acting:
    """Which tokens of the pass that is being made have the finetuned weights; found once per pass."""

    parts: tuple[str, ...]
    _numbers: Tensor | None = None
    _acts: Tensor = field(default_factory=lambda: torch.zeros(0))
    _all: bool = False

    def now(self) -> tuple[Bool[Tensor, "batch pos"], bool]:
        """Where they act, and whether that is everywhere."""
        numbers = current_parts()
        if numbers is None:
            raise PatchError(
                "a run that knows the parts of its chats",
                "a graft was used in a bare pass of the model",
                "Use graft_parts or evaluate, or tell them: emmech.models.generation.follow(model, batch)",
            )
        if numbers is not self._numbers:
            self._numbers, self._acts = numbers, _acting(self.parts, numbers)
            self._all = bool(self._acts.all())
        return self._acts, self._all


def _acting(parts: Sequence[str], numbers: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """True on the tokens that belong to one of ``parts``."""
    last = prompt_ends(numbers)
    of = {name: numbers == PARTS.index(name) for name in PARTS}
    of |= {"last": last, "postfix-rest": of["postfix"] & ~last}
    acts = torch.zeros_like(last)
    for part in parts:
        acts |= of[part]
    return acts


def _choose(
    site: Site, acting: _Acting, _: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """A forward hook that gives each token the output of the model whose weights act on it."""
    acts, everywhere = acting.now()
    if everywhere:
        return output
    read = read_places()
    if read is not None and (len(output), output.shape[site.axis]) != acts.shape:
        acts = acts[read.to(acts.device)][None]  # of the output head, which is handed these places alone
    # It may also be asked for the last positions.
    acts = acts[:, -output.shape[site.axis] :].to(output.device)
    shape = [1] * output.ndim
    shape[0], shape[site.axis] = acts.shape
    other = 0.0 if site.twin is None else site.twin(*args, **kwargs).to(output.device)
    return torch.where(acts.view(shape), output, other)
