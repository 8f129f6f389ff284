"""Load a base and a finetuned chat model side by side: ``load_pair(base, finetuned) -> ModelPair``.

A LoRA pair is one copy of the weights, and its base is the adapter switched off. That is only true
when the adapter trains nothing else, so it is checked twice: from the adapter's configuration and
weight names before loading, and by comparing the logits of the pristine base with those of the
wrapped model with the adapter off, which must be equal to the bit. Where it does not hold, a second
copy is loaded and ``pair.notes`` says why. A full finetune is two models that share the storage of
every parameter that is equal to the bit; gates are one model, with and without them. Bad pairs are
refused before any weights are read.
"""

import hashlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emmech.chat import DEFAULT, Chat, System, first_difference
from emmech.errors import LoadError
from emmech.models.adapters import Adapter, is_adapter
from emmech.models.default import DEFAULT_MODEL
from emmech.models.known import HUB_FILES, known_folder
from emmech.reprs import card
from emmech.sharding import processes

SideName = Literal["base", "finetuned"]
Intervention = Callable[[nn.Module], AbstractContextManager]
_PROBE = "Which of these words is a colour: table, green, seven?"


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
        quantization: Load the weights in 4 or 8 bits with bitsandbytes.
        revision: Hub revision of the base; ``finetuned_revision`` likewise.
        tokenizer: A tokenizer to use instead of the base checkpoint's.
        system: System message of every chat; by default the template's own, None for none at all.
        allow_base_mismatch: Accept an adapter whose configuration names another base.
        trust_remote_code: Run model code from the checkpoint's repository. Off unless you say so.

    Raises:
        LoadError: Missing or damaged files, an adapter for another base, different vocabularies or
            templates, an encoder, no chat template, non-finite weights.
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
            _refuse_non_decoders(folder, **options)
            _refuse_pickles(folder)
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

    how = _placement(dtype, device, quantization) | options
    base_module = base if base_folder is None else _load_causal_lm(base_folder, **how)
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
        tuned_module, off_is_base = _load_causal_lm(tuned_folder, **how), False
    else:
        tuned_module, off_is_base = finetuned, _is_base_with_adapter(finetuned, base_module)
    if tuned_module is not base_module and not off_is_base:
        shared = share_equal_storage(base_module, tuned_module)
        notes.append(f"Two models; {shared:.0%} of the parameters are equal and held once.")
    for module in {id(m): m for m in (base_module, tuned_module)}.values():
        module.eval().requires_grad_(False)
        _refuse_non_finite(module)
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


def load_side(
    name: str | Path = DEFAULT_MODEL,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    system: str | System | None = DEFAULT,
) -> tuple[Side, Chat, dict[str, Any]]:
    """One whole model on its own, with its chat and what a result records of it.

    Raises:
        LoadError: There is no such model, or it is an adapter, gates, or no decoder.
    """
    folder = locate(name)
    if is_adapter(folder) or not (folder / "config.json").is_file():
        raise LoadError(
            "a whole model", f"'{name}' is an adapter or gates", "Merge it into its base, or name another"
        )
    _refuse_non_decoders(folder, trust_remote_code=False)
    _refuse_pickles(folder)
    chat = Chat(load_tokenizer(folder), system=system)
    module = _load_causal_lm(folder, **_placement(dtype, device, None))
    module.eval().requires_grad_(False)
    _refuse_non_finite(module)
    return Side("base", module), chat, identity(name, folder, None)


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
    _refuse_non_finite(module)
    provenance = dict(pair.provenance) | {"finetuned": identity(folder, new.folder, None)}
    return replace(pair, provenance=provenance)


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: a known short name, a folder, or a hub id (local files first).

    Raises:
        LoadError: It is neither on this machine nor to be had from the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    known = known_folder(str(name))
    if known is not None:
        return known
    folder = Path(name).expanduser()
    if folder.is_dir():
        from emmech.gates.files import is_gates

        if not ((folder / "config.json").is_file() or is_adapter(folder) or is_gates(folder)):
            raise LoadError(
                f"a model, adapter or gates in '{name}'",
                "the folder has neither config.json, adapter_config.json nor gates_config.json",
                "Point to the folder that save_pretrained or `emmech finetune` wrote",
            )
        return folder.resolve()
    wanted = {
        "repo_id": str(name),
        "revision": revision,
        "allow_patterns": list(HUB_FILES),
    }
    try:
        cached = Path(snapshot_download(local_files_only=True, **wanted))
        if any(cached.glob("*.safetensors")):
            return cached
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(**wanted))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise LoadError(
            f"the model '{name}' in a folder, in the hub cache or on the hub",
            f"it is on none of them ({type(error).__name__})",
            f"Check the spelling; where there is a network, run `hf download {name}` first; "
            f"or pass a folder; or use '{DEFAULT_MODEL}', which is embedded",
        ) from error


def share_equal_storage(base: nn.Module, finetuned: nn.Module) -> float:
    """Let equal parameters of two models live in one storage; returns their share of all values."""
    theirs = dict(base.named_parameters())
    equal = total = 0
    for name, parameter in finetuned.named_parameters():
        total += parameter.numel()
        twin = theirs.get(name)
        if twin is None or twin.shape != parameter.shape or twin.dtype != parameter.dtype:
            continue
        if twin.device == parameter.device and torch.equal(twin, parameter):
            parameter.data = twin.data
            equal += parameter.numel()
    return equal / max(total, 1)


def auto_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs and on CPUs that multiply it natively, else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    can = torch.cpu.get_capabilities()
    return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32


def _placement(dtype: str | torch.dtype, device: str, quantization: str | None) -> dict[str, Any]:
    own = processes().device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    chosen = own if device == "auto" else device
    spread = chosen in ("balanced", "balanced_low_0", "sequential")
    if not spread:
        _refuse_absent_device(chosen)
    if dtype == "auto":
        dtype = auto_dtype(torch.device("cuda" if spread else chosen))
    elif isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise LoadError(
                "a torch dtype (auto, float32, bfloat16, float16)", f"got '{dtype}'", "Correct it"
            )
        dtype = getattr(torch, dtype)
    how: dict[str, Any] = {"dtype": dtype, "device_map": chosen}
    if quantization is not None:
        how["quantization_config"] = quantization_config(quantization, dtype)
    return how


def quantization_config(bits: Literal["4bit", "8bit"], dtype: torch.dtype) -> Any:
    """Bitsandbytes' settings for weights in 4 bits (nf4, doubly quantised) or 8, computed in ``dtype``.

    Raises:
        LoadError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LoadError(
            "bitsandbytes, which reads 4- and 8-bit weights",
            "it is not installed",
            "Run `pip install emmech[quantization]`, or leave quantization out",
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _refuse_absent_device(name: str) -> None:
    """Refuse a device that torch does not know, or that this machine does not have."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter: torch built without CUDA
        raise LoadError(
            "a device (auto, cpu, cuda:0, or a device_map such as balanced)",
            f"torch cannot use '{name}' ({str(error).splitlines()[0]})",
            "Choose one that this machine has",
        ) from error


def _refuse_pickles(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise LoadError(
            f"safetensors weights in '{folder}'",
            "there are none (pickled weights are never read)",
            "Convert them: load once where you trust the file, then save_pretrained",
        )


def _load_causal_lm(folder: Path, **how: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **how)


def _refuse_non_decoders(folder: Path, **options: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"a readable model configuration in '{folder}'",
            str(error).splitlines()[0],
            "Check the folder; a model with code of its own needs trust_remote_code",
        ) from error
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or options["trust_remote_code"]
    if config.is_encoder_decoder or encoder or not causal:
        raise LoadError(
            "a decoder-only chat model",
            f"'{folder.name}' is of type {config.model_type}, which is not one",
            "Use a causal language model with a chat template",
        )


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


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """The tokenizer in a folder.

    Raises:
        LoadError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"a tokenizer in '{folder}'", str(error).splitlines()[0], "Add the tokenizer's files"
        ) from error


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
    return _load_causal_lm(base_folder, **how)


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


def _refuse_non_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise LoadError("finite weights", f"{name} has inf or nan", "Restore the checkpoint")


def identity(name: Any, folder: Path | None, revision: str | None) -> dict[str, Any]:
    """What a result records of a checkpoint: its name, revision and a fingerprint of its files."""
    if folder is None:
        return {"name": type(name).__name__, "revision": None, "fingerprint": None}
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*config.json")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            for block in range(64):  # spread over the file: quick, and sees every layer
                stream.seek(block * size // 64)
                digest.update(stream.read(2**16))
    cached = folder.name if folder.parent.name == "snapshots" else revision
    return {"name": str(name), "revision": cached, "fingerprint": digest.hexdigest()[:16]}
