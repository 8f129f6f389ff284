"""One model on its own: found by name, refused where it cannot be used, opened, and named in results.

    side, chat, provenance = load_side("smollm2")
    folder = locate("smollm2")

Whatever can be refused from configurations and file names is refused before any weights are read.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from emmech.chat import DEFAULT, Chat, System
from emmech.errors import LoadError
from emmech.models.adapters import is_adapter
from emmech.models.default import DEFAULT_MODEL
from emmech.models.known import HUB_FILES, known_folder
from emmech.models.sides import Side
from emmech.sharding import processes


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
    refuse_unfit(folder, trust_remote_code=False)
    chat = Chat(load_tokenizer(folder), system=system)
    module = load_causal_lm(folder, **placement(dtype, device, None))
    module.eval().requires_grad_(False)
    refuse_non_finite(module)
    return Side("base", module), chat, identity(name, folder, None)


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


def refuse_unfit(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a folder whose configuration is no decoder's, or that has no safetensors weights.

    Raises:
        LoadError: It is unfit.
    """
    _refuse_non_decoders(folder, trust_remote_code)
    _refuse_pickles(folder)


def _refuse_non_decoders(folder: Path, trust_remote_code: bool) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"a readable model configuration in '{folder}'",
            str(error).splitlines()[0],
            "Check the folder; a model with code of its own needs trust_remote_code",
        ) from error
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or trust_remote_code
    if config.is_encoder_decoder or encoder or not causal:
        raise LoadError(
            "a decoder-only chat model",
            f"'{folder.name}' is of type {config.model_type}, which is not one",
            "Use a causal language model with a chat template",
        )


def _refuse_pickles(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise LoadError(
            f"safetensors weights in '{folder}'",
            "there are none (pickled weights are never read)",
            "Convert them: load once where you trust the file, then save_pretrained",
        )


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


def load_causal_lm(folder: Path, **how: Any) -> nn.Module:
    """The model in a folder, from safetensors only; `placement` says how."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **how)


def refuse_non_finite(*modules: nn.Module) -> None:
    """Refuse weights with inf or nan; those that accelerate keeps on disk are not read.

    Raises:
        LoadError: A parameter has them.
    """
    every = {
        id(parameter): (name, parameter) for one in modules for name, parameter in one.named_parameters()
    }
    for name, parameter in every.values():
        if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel():
            continue
        ends = torch.stack(
            torch.aminmax(parameter)
        )  # nan passes into both, and no copy of the weights is made
        if not ends.isfinite().all():
            raise LoadError("finite weights", f"{name} has inf or nan", "Restore the checkpoint")


def placement(dtype: str | torch.dtype, device: str, quantization: str | None) -> dict[str, Any]:
    """Arguments of `load_causal_lm` for a dtype, a device and a quantisation as `load_pair` takes them.

    Raises:
        LoadError: torch has no such dtype, this machine no such device, or bitsandbytes is missing.
    """
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


def auto_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs and on CPUs that multiply it natively, else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    can = torch.cpu.get_capabilities()
    return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32


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
