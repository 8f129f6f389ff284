"""A GGUF file as a folder of safetensors that transformers, PEFT and TransformerLens read.

Weights are dequantised to bfloat16 once; what quantisation rounded away stays away.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

from emmech.errors import LoadError


def refuse_damaged(file: Path, sha256: str, instead: str) -> None:
    """Refuse a file whose bytes are not the ones that were published.

    Raises:
        LoadError: The checksum differs; ``instead`` says what to do.
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != sha256:
        raise LoadError(f"{file.name} with sha256 {sha256[:12]}...", f"{file} has {digest[:12]}...", instead)


def convert(gguf: Path, folder: Path, hub_name: str) -> None:
    """Write the model and its tokenizer into ``folder``, whole or not at all; ``hub_name`` is recorded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,  # what the original checkpoints are published in
        quantization_config=GgufConfig(dequantize=True),
    )
    # A GGUF-loaded model refuses save_pretrained until it forgets where it came from.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.config._name_or_path = tokenizer.name_or_path = hub_name

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
