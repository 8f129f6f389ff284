"""A PEFT adapter on disk, read before the base's weights are: whose is it, and what did it train?

Switching a LoRA adapter off gives back the base only when it trained nothing else. Trained biases,
resized or fully saved embeddings and other whole weights are told from the adapter's configuration
and weight names; modules in ``modules_to_save`` are not, because PEFT keeps their originals.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emmech.errors import LoadError

ADAPTER_CONFIG = "adapter_config.json"
_LOW_RANK = ("lora_", "lokr_", "hada_", "oft_", "vera_", "ia3_")


@dataclass(frozen=True)
class Adapter:
    """The files of one adapter, each read once."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """``adapter_config.json``."""
        file = self.folder / ADAPTER_CONFIG
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise LoadError(f"JSON in '{file}'", str(error), "Restore the adapter's files") from error

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The adapter's weights by name.

        Raises:
            LoadError: There are none as safetensors, or one is not finite.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.folder / "adapter_model.safetensors"
        try:
            tensors = load_file(file)
        except (FileNotFoundError, SafetensorError) as error:
            raise LoadError(
                f"adapter weights in '{file}'",
                f"they cannot be read ({error})",
                "Save the adapter as safetensors; pickled adapters are never read",
            ) from error
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise LoadError(
                    "finite weights", f"{key} of '{self.folder}' has inf or nan", "Train it again"
                )
        return tensors

    def refuse_foreign(
        self, base: str | Path, base_folder: Path, *, allowed: bool, trust_remote_code: bool
    ) -> None:
        """Refuse when the configuration names another base (unless ``allowed``), or shapes differ.

        Raises:
            LoadError: The adapter was made for another model.
        """
        named = self.config.get("base_model_name_or_path") or ""
        if named and not allowed and not _same_model(named, base, base_folder):
            raise LoadError(
                f"an adapter made for '{base}'",
                f"'{self.folder}' was made for '{named}'",
                "Load that base, or pass allow_base_mismatch=True (--allow-base-mismatch) if it is a copy",
            )
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(base_folder, trust_remote_code=trust_remote_code)
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        modules = dict(skeleton.named_modules())
        for key, tensor in self.tensors.items():
            path, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            axis = {"A.weight": 1, "B.weight": 0}.get(part)
            module = modules.get(path.removesuffix(".base_layer"))
            weight = getattr(module, "weight", None)
            if axis is None or (module is not None and (weight is None or weight.ndim != 2)):
                continue  # no linear layer: experts held as one parameter, embeddings, convolutions
            width = None if weight is None else weight.shape[1 - axis if _is_conv1d(module) else axis]
            if width != tensor.shape[axis]:
                raise LoadError(
                    f"an adapter whose {path} fits '{base}' ({width or 'no such module there'})",
                    f"'{self.folder}' has lora_{part} of shape {tuple(tensor.shape)}",
                    "Load the base that the adapter was trained on",
                )

    def why_off_is_not_base(self) -> list[str]:
        """Reasons that switching this adapter off leaves changes in the model; none is a clean one."""
        reasons = []
        if self.config.get("bias", "none") != "none":
            reasons.append(f"it trained biases in place (bias='{self.config['bias']}')")
        kept_apart = tuple(self.config.get("modules_to_save") or ())  # PEFT keeps the originals
        loose = sorted(
            key
            for key in self.tensors
            if not any(part in key for part in _LOW_RANK) and not any(m in key for m in kept_apart)
        )
        if loose:
            what = "embeddings" if "embed" in loose[0] or "lm_head" in loose[0] else "weights"
            reasons.append(f"it holds full {what} ({loose[0]} and {len(loose) - 1} more)")
        return reasons

    def attach(self, module: nn.Module) -> nn.Module:
        """The module wrapped with this adapter, its embeddings resized to the adapter's if need be.

        Raises:
            LoadError: Part of the module is on disk.
        """
        from peft import PeftModel

        if "disk" in getattr(module, "hf_device_map", {}).values():
            # PEFT would write the base's weights anew, below the working directory or over the base's own.
            raise LoadError(
                "a base that fits on the devices and in memory, for its adapter",
                "part of it was left on disk",
                "Use a smaller dtype or quantization='4bit', or merge the adapter into the base",
            )
        for key, tensor in self.tensors.items():
            grown = len(tensor) != module.get_input_embeddings().num_embeddings
            if key.endswith("embed_tokens.weight") and grown:
                module.resize_token_embeddings(len(tensor), mean_resizing=False)
        device = module.get_input_embeddings().weight.device
        return PeftModel.from_pretrained(module, self.folder, torch_device=str(device)).eval()


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Run float32 LoRA layers as one matrix each inside the ``with`` block, for many passes in a row.

    Saves the two thin products beside every linear layer, which on small models cost as much as the
    layer; results differ by rounding. Weights of fewer bits would lose part of the adapter, and those
    that accelerate keeps elsewhere are not here: both are left as they are. Afterwards the weights are
    the tensors they were, not sums minus a difference. The adapter must stay switched on.
    """
    layers = []
    if hasattr(module, "peft_config"):
        from peft.tuners.lora.layer import Linear

        lora = [part for part in module.modules() if isinstance(part, Linear) and not part.merged]
        layers = [part for part in lora if type(part.base_layer) is nn.Linear]
        layers = [part for part in layers if part.base_layer.weight.dtype == torch.float32]
        layers = [part for part in layers if not part.base_layer.weight.is_meta]
    kept = [(parameter, parameter.data) for layer in layers for parameter in layer.base_layer.parameters()]
    try:
        for layer in layers:
            layer.merge(safe_merge=True)  # into a copy
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
        for layer in layers:
            layer.merged_adapters.clear()


def is_adapter(folder: Path | None) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return folder is not None and (folder / ADAPTER_CONFIG).is_file()


def _is_conv1d(module: nn.Module | None) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2 stores its linear weights transposed


def _same_model(named: str, base: str | Path, folder: Path) -> bool:
    """Whether two names mean one model: equal, the same folder, or equal but for the owner."""

    def short(name: str | Path) -> str:
        return Path(str(name).rstrip("/")).name.lower()

    if named == str(base) or Path(named).expanduser().resolve() == folder:
        return True
    return short(named) in {short(base), short(folder)}
