"""Load a base and a finetuned chat model side by side: ``load_pair(base, finetuned) -> ModelPair``.

A LoRA pair is one copy of the weights, and its base is the adapter switched off. That is only true
when the adapter trains nothing else, so it is checked twice: from the adapter's configuration and
weight names before loading, and by comparing the logits of the pristine base with those of the
wrapped model with the adapter off, which must be equal to the bit. Where it does not hold, a second
copy is loaded and ``pair.notes`` says why. A full finetune is two models that share the storage of
every parameter that is equal to the bit; gates are one model, with and without them. Bad pairs are
refused before any weights are read.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emmech.chat import DEFAULT, Chat, System, first_difference
from emmech.errors import LoadError
from emmech.models.adapters import Adapter, is_adapter
from emmech.models.default import DEFAULT_MODEL
from emmech.models.opening import (
    identity,
    load_causal_lm,
    load_tokenizer,
    locate,
    placement,
    refuse_non_finite,
    refuse_unfit,
)
from emmech.models.sides import Intervention, Side, SideName
from emmech.reprs import card

_PROBE = "Which of these words is a colour: table, green, seven?"


@dataclass(frozen=True)
class ModelPair:
    """A base and a finetuned model over one vocabulary and one chat template."""

    base: Side
    finetuned: Side
    chat: Chat
    provenance: Mapping[str, Any]
    """Names, revisions, fingerprints, dtype and device: what a result must record."""
    notes: tuple[str, ...] = ()
    """What the loader decided and the user should know, one sentence each."""
    load_seconds: float = field(default=0.0, compare=False)
    variants: Mapping[str, Side] = field(default_factory=dict)
    """Further sides by name, such as one of the models with gates at some scale."""

    @property
    def one_copy(self) -> bool:
        """Whether base and finetuned are one set of weights, the adapter off and on."""
        return self.base.module is self.finetuned.module

    def side(self, name: str) -> Side:
        """The side called ``name``: base, finetuned or a variant."""
        return ({"base": self.base, "finetuned": self.finetuned} | dict(self.variants))[name]

    def other(self, name: SideName) -> SideName:
        """The name of the side that ``name`` is compared with."""
        return "finetuned" if name == "base" else "base"

    def _repr_html_(self) -> str:
        names = {side: self.provenance.get(side) or {} for side in ("base", "finetuned")}
        config = self.base.config
        facts = {
            **{side: known.get("name") for side, known in names.items()},
            "architecture": f"{config.model_type}, {config.num_hidden_layers} blocks of {config.hidden_size}",
            "weights": "one copy, the adapter off and on" if self.one_copy else "two models",
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "device": str(self.base.device),
            "variants": ", ".join(self.variants) or None,
        }
        return card("ModelPair", facts, self.notes)


def load_pair(
    base: str | Path | nn.Module = DEFAULT_MODEL,
    finetuned: str | Path | nn.Module = "",
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    quantization: Literal["4bit", "8bit"] | None = None,
    revision: str | None = None,
    finetuned_revision: str | None = None,
    tokenizer: Any = None,
    system: str | System | None = DEFAULT,
    allow_base_mismatch: bool = False,
    trust_remote_code: bool = False,
) -> ModelPair:
    """The base and finetuned model, checked to fit together.

    Args:
        base: Hub id, folder, ``"smollm2"`` (the embedded default) or a loaded causal LM (then give
            ``tokenizer``).
        finetuned: PEFT adapter or full checkpoint (hub id or folder), gates (folder), or a loaded
            module.
        dtype: ``"auto"`` is bfloat16 where the hardware multiplies it natively, else float32.
        device: ``"auto"`` is the first GPU when there is one, and the process's own under ``accelerate
            launch``; ``"balanced"`` and the other values of transformers' ``device_map`` spread a large
            model.
        quantization: Load the weights in 4 or 8 bits with bitsandbytes, which on CPUs with AVX512-BF16
            computes 4-bit layers in bfloat16 whatever the dtype.
        revision: Hub revision of the base; ``finetuned_revision`` likewise.
        tokenizer: A tokenizer to use instead of the base checkpoint's.
        system: System message of every chat; by default the template's own, None for none at all.
        allow_base_mismatch: Accept an adapter whose configuration names another base.
        trust_remote_code: Run model code from the checkpoint's repository. Off unless you say so.

    Raises:
        LoadError: Missing or damaged files, an adapter for another base, different vocabularies or
            templates, an encoder, no chat template, non-finite weights, an adapter whose base does not fit.
    """
    started = time.monotonic()
    if not isinstance(finetuned, nn.Module) and not str(finetuned):
        raise LoadError(
            "a finetuned model", "none was given", "Pass an adapter or checkpoint folder or hub id"
        )
    from emmech.gates.files import is_gates, load_gates
    from emmech.gates.gate import Gating

    options = {"trust_remote_code": trust_remote_code}
    base_folder = None if isinstance(base, nn.Module) else locate(base, revision)
    tuned_folder = None if isinstance(finetuned, nn.Module) else locate(finetuned, finetuned_revision)
    adapter = Adapter(tuned_folder) if is_adapter(tuned_folder) else None
    gated = is_gates(tuned_folder)

    # Everything that can be refused from configurations and tokenizers alone comes first.
    for folder in (base_folder, None if adapter or gated else tuned_folder):
        if folder is not None:
            refuse_unfit(folder, **options)
    chat = _shared_chat(base_folder, tuned_folder, tokenizer, system, **options)
    reasons = [] if adapter is None else adapter.why_off_is_not_base()
    if adapter is not None and base_folder is not None:
        adapter.refuse_foreign(base, base_folder, allowed=allow_base_mismatch, **options)
    elif reasons:  # loading it would change the user's module for good
        raise LoadError(
            "an adapter that can be switched off, with base as a loaded module",
            "; ".join(reasons),
            "Pass the base's folder or hub id as base",
        )

    how = placement(dtype, device, quantization) | options
    base_module = base if base_folder is None else load_causal_lm(base_folder, **how)
    notes: list[str] = []
    interventions: tuple[Intervention, ...] = ()
    if gated:
        tuned_module, off_is_base = base_module, False
        interventions = (Gating(load_gates(tuned_folder, base_module)).on,)
    elif adapter is not None:
        tuned_module, off_is_base = _attach(adapter, base_module, chat, bool(reasons))
        if not off_is_base:
            reasons = reasons or ["its logits with the adapter off differ from the base's"]
            notes.append(
                "Loaded a second copy of the base: adapter off is not the base, "
                f"because {'; '.join(reasons)}."
            )
            base_module = _second_copy(base_folder, how)
    elif tuned_folder is not None and tuned_folder == base_folder:
        tuned_module, off_is_base = base_module, False  # one model, to be looked at alone
    elif tuned_folder is not None:
        tuned_module, off_is_base = load_causal_lm(tuned_folder, **how), False
    else:
        tuned_module, off_is_base = finetuned, _is_base_with_adapter(finetuned, base_module)
    if tuned_module is not base_module and not off_is_base:
        shared = share_equal_storage(base_module, tuned_module)
        notes.append(f"Two models; {shared:.0%} of the parameters are equal and held once.")
    for module in (base_module, tuned_module):
        module.eval().requires_grad_(False)
    refuse_non_finite(base_module, tuned_module)
    base_side = Side("base", tuned_module if off_is_base else base_module, adapter_off=off_is_base)
    provenance = {
        "base": identity(base, base_folder, revision),
        "finetuned": identity(finetuned, tuned_folder, finetuned_revision),
        "template_hash": chat.template_hash,
        "dtype": str(base_side.dtype).removeprefix("torch."),
        "device": str(base_side.device),
        "quantization": quantization,
        "attention": base_side.module.config._attn_implementation,
    }
    return ModelPair(
        base=base_side,
        finetuned=Side("finetuned", tuned_module, interventions=interventions),
        chat=chat,
        provenance=provenance,
        notes=tuple(notes),
        load_seconds=time.monotonic() - started,
    )


def swap_adapter(pair: ModelPair, folder: str | Path) -> ModelPair | None:
    """The pair with another adapter of the same configuration in place of its own, or None.

    Quicker than loading a pair, because base and tokenizer stay; the pair given changes with it. None
    where that is not possible: two models, gates, or an adapter of another kind.
    """
    from peft import set_peft_model_state_dict

    module, found = pair.finetuned.module, locate(folder)
    if not pair.one_copy or not hasattr(module, "peft_config") or not is_adapter(found):
        return None
    new = Adapter(found)
    if new.why_off_is_not_base():
        return None
    saved = module.peft_config["default"].to_dict()
    same = all(
        saved.get(key) == new.config.get(key) for key in ("r", "lora_alpha", "use_rslora", "peft_type")
    )
    mine = {name for name, _ in module.named_parameters() if ".lora_" in name}
    if not same or {key.replace(".weight", ".default.weight") for key in new.tensors} != mine:
        return None
    set_peft_model_state_dict(module, new.tensors)
    refuse_non_finite(module)
    provenance = dict(pair.provenance) | {"finetuned": identity(folder, new.folder, None)}
    return replace(pair, provenance=provenance)


def share_equal_storage(base: nn.Module, finetuned: nn.Module) -> float:
    """Let equal parameters of two models live in one storage; returns their share of all values."""
    theirs = dict(base.named_parameters())
    equal = total = 0
    for name, parameter in finetuned.named_parameters():
        total += parameter.numel()
        twin = theirs.get(name)
        if twin is None or twin.shape != parameter.shape or twin.dtype != parameter.dtype:
            continue
        if parameter.is_meta:  # on disk
            continue
        if twin.device == parameter.device and torch.equal(twin, parameter):
            parameter.data = twin.data
            equal += parameter.numel()
    return equal / max(total, 1)


def _shared_chat(
    base_folder: Path | None,
    tuned_folder: Path | None,
    tokenizer: Any,
    system: str | System | None,
    **options: Any,
) -> Chat:
    """The pair's chat, after checking that both checkpoints tokenise and render alike."""
    if tokenizer is None:
        if base_folder is None:
            raise LoadError("a tokenizer", "base is a loaded module", "Pass tokenizer=... with a module")
        tokenizer = load_tokenizer(base_folder, **options)
    chat = Chat(tokenizer, system=system)
    if tuned_folder is not None and (tuned_folder / "tokenizer_config.json").is_file():
        theirs = load_tokenizer(tuned_folder, **options)
        if theirs.chat_template is None:
            theirs.chat_template = tokenizer.chat_template
        difference = first_difference(chat, Chat(theirs, system=system))
        if difference:
            raise LoadError(
                "one vocabulary and one chat template for base and finetuned",
                f"they differ: {difference}",
                "Use the tokenizer the finetune was made with for both, or another base",
            )
    return chat


def _attach(adapter: Adapter, module: nn.Module, chat: Chat, known_impure: bool) -> tuple[nn.Module, bool]:
    """The wrapped model, and whether switching its adapter off gives back the base to the bit."""
    if known_impure:
        return adapter.attach(module), False
    before = _probe_logits(module, chat)
    wrapped = adapter.attach(module)
    with Side("base", wrapped, adapter_off=True).active():
        after = _probe_logits(wrapped, chat)
    return wrapped, torch.equal(before, after)


@torch.no_grad()
def _probe_logits(module: nn.Module, chat: Chat) -> Tensor:
    device = module.get_input_embeddings().weight.device
    ids = torch.tensor([chat.render(_PROBE).ids], device=device)
    return module.eval()(input_ids=ids, use_cache=False).logits


def _second_copy(base_folder: Path | None, how: Mapping[str, Any]) -> nn.Module:
    if base_folder is None:
        raise LoadError(
            "an adapter that can be switched off", "base is a module, now changed", "Pass a folder"
        )
    return load_causal_lm(base_folder, **how)


def _is_base_with_adapter(tuned: nn.Module, base: nn.Module) -> bool:
    """Whether ``tuned`` is a PEFT model around ``base`` itself, whose adapter can be switched off."""
    if not hasattr(tuned, "peft_config") or base not in (tuned, tuned.get_base_model()):
        return False
    for config in tuned.peft_config.values():
        if (bias := getattr(config, "bias", "none")) != "none":
            raise LoadError(
                "an adapter that can be switched off, with base as its own module",
                f"it trained biases in place (bias='{bias}')",
                "Pass the base's folder or another module as base",
            )
    return True
