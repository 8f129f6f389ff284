"""What this machine has for emmech and what it lacks, on one screen.

    emmech doctor --url http://localhost:8000/v1

Every line is a `Finding`. Only what is *needed* and not there makes the command fail: Python, the
packages that emmech depends on, the embedded model, a cache folder that can be written, and an
endpoint that was named. Nothing is downloaded, and no model is loaded.
"""

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from packaging.requirements import Requirement

from emmech.models import default, known

TIMEOUT_SECONDS = 3.0
HUB = "https://huggingface.co"
SHOWN = ("emmech", "torch", "transformers", "peft", "accelerate", "transformer-lens", "nnsight")


@dataclass(frozen=True)
class Finding:
    topic: str
    """Which part of the screen it is on."""
    name: str
    state: Literal["ok", "absent", "missing"]
    """``absent``: emmech works without it; ``missing``: it does not."""
    detail: str
    fix: str = ""
    """What to do about it, where something can be done."""


def examine(url: str | None = None) -> list[Finding]:
    """Look at everything; a few seconds.

    Args:
        url: OpenAI-compatible endpoint that has to answer; else the one of OPENAI_BASE_URL, if any.
    """
    return [*packages(), *machine(), *extras(), *models(), browser(), *endpoints(url)]


def packages() -> Iterator[Finding]:
    """Python, and the packages that emmech cannot do without."""
    found = platform.python_version()
    is_new = sys.version_info >= (3, 11)
    yield Finding("packages", "python", "ok" if is_new else "missing", found, "" if is_new else "Use 3.11+")
    needed = [one for one in _requirements() if one.marker is None]
    wrong = [text for one in needed if (text := _shortfall(one))]
    shown = ", ".join(f"{name} {version(name)}" for name in SHOWN if _shortfall(Requirement(name)) is None)
    if wrong:
        yield Finding("packages", "needed", "missing", "; ".join(wrong), "Run `make install`")
    yield Finding("packages", "versions", "ok", shown)


def machine() -> Iterator[Finding]:
    """Processor, memory and accelerators; nothing where torch is not installed."""
    if _shortfall(Requirement("torch")) or _shortfall(Requirement("psutil")):
        return
    import psutil
    import torch

    free, total = (_gib(n) for n in (psutil.virtual_memory().available, psutil.virtual_memory().total))
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    detail = f"{cores} cores, {torch.get_num_threads()} threads, {free} of {total} GiB free"
    yield Finding("machine", "processor", "ok", f"{platform.system()} {platform.machine()}, {detail}")
    for number in range(torch.cuda.device_count()):
        free, total = (_gib(n) for n in torch.cuda.mem_get_info(number))
        name = torch.cuda.get_device_name(number)
        yield Finding("machine", f"cuda:{number}", "ok", f"{name}, {free} of {total} GiB free")
    if torch.backends.mps.is_available():
        yield Finding("machine", "mps", "ok", "Apple GPU; pass --device mps")
    elif not torch.cuda.is_available():
        yield Finding("machine", "accelerator", "absent", "none; the embedded model needs none")


def extras() -> Iterator[Finding]:
    """The optional parts, one line each."""
    wanted: dict[str, list[Requirement]] = {}
    for one in _requirements():
        for name in re.findall(r'extra == "([\w-]+)"', str(one.marker or "")):
            wanted.setdefault(name, []).append(one)
    for name, parts in wanted.items():
        wrong = [text for one in parts if one.name != "emmech" and (text := _shortfall(one))]
        fix = f"pip install 'emmech[{name}]'" if wrong else ""
        there = ", ".join(one.name for one in parts if one.name != "emmech")
        yield Finding("extras", name, "absent" if wrong else "ok", "; ".join(wrong) or there, fix)


def models() -> Iterator[Finding]:
    """Models with a short name, and the folders where models are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, model in known.KNOWN.items():
        folder = known.on_disk(model)
        if folder is not None:
            yield Finding("models", name, "ok", f"{_home(folder)} ({_size(folder)})")
        elif name != default.DEFAULT_MODEL:
            yield Finding("models", name, "absent", "not fetched", f"emmech models get {name}")
        elif carrier := default.embedded_file():
            detail = f"installed ({_size(carrier)}); converted when first used"
            yield Finding("models", name, "ok", detail)
        else:
            yield Finding("models", name, "missing", "not installed", "Run `make install`")
    cache = default.cache_folder()
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    can_write = os.access(nearest, os.W_OK)
    detail = f"{_home(cache)}, {_gib(shutil.disk_usage(nearest).free)} GiB free on its disk"
    fix = "" if can_write else "Make it writable, or set XDG_CACHE_HOME"
    yield Finding("models", "cache", "ok" if can_write else "missing", detail, fix)
    hub = Path(HF_HUB_CACHE)
    held = len(list(hub.glob("models--*")))
    yield Finding("models", "hub cache", "ok" if held else "absent", f"{_home(hub)}, {held} models")


def browser() -> Finding:
    """Chrome or Chromium, which draws figures as PNG, SVG and PDF."""
    if importlib.util.find_spec("choreographer") is None:
        fix = "pip install 'emmech[images]'"
        return Finding("images", "browser", "absent", "kaleido is not installed", fix)
    from choreographer.browsers.chromium import Chromium

    found = Chromium.find_browser(skip_local=False)
    if found is None:
        fix = "Install Chrome or Chromium; HTML figures need none"
        return Finding("images", "browser", "absent", "no Chrome or Chromium", fix)
    return Finding("images", "browser", "ok", _home(Path(found)))


def endpoints(url: str | None) -> Iterator[Finding]:
    """Whether the judge's or server's endpoint and the hub answer."""
    named = url or os.environ.get("OPENAI_BASE_URL")
    has_key = bool(os.environ.get("OPENAI_API_KEY"))
    if named:
        state, said = _ask(f"{named.rstrip('/')}/models", os.environ.get("OPENAI_API_KEY"))
        if state == "absent" and url:
            state = "missing"
        fix = "" if state == "ok" else "Start the server, or correct the address (it ends in /v1)"
        yield Finding("endpoints", "OpenAI-compatible", state, f"{_bare(named)}: {said}", fix)
    else:
        said = "no --url and no OPENAI_BASE_URL; " + ("a key is set" if has_key else "no OPENAI_API_KEY")
        yield Finding("endpoints", "OpenAI-compatible", "ok" if has_key else "absent", said)
    hub = os.environ.get("HF_ENDPOINT", HUB)
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield Finding("endpoints", "model hub", "absent", "HF_HUB_OFFLINE is set")
        return
    state, said = _ask(f"{hub.rstrip('/')}/api/models?limit=1", None)
    fix = "" if state == "ok" else "Folders and the embedded model work without it"
    yield Finding("endpoints", "model hub", state, f"{_bare(hub)}: {said}", fix)


def _ask(address: str, key: str | None) -> tuple[Literal["ok", "absent"], str]:
    """Whether a server answers, and what it says about being asked."""
    request = Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urlopen(request, timeout=TIMEOUT_SECONDS):
            return "ok", "answers"
    except HTTPError as error:
        if error.code in (401, 403):
            return "ok", f"answers, but wants another key ({error.code})"
        return "absent", f"answers {error.code} to {address.removeprefix(_origin(address))}"
    except (URLError, TimeoutError, OSError, ValueError) as error:
        return "absent", f"no answer ({getattr(error, 'reason', error)})"


def _origin(address: str) -> str:
    return re.match(r"(\w+://[^/]*)?", address)[0]


def _bare(address: str) -> str:
    """An address without a user's name, password and query."""
    return re.sub(r"\?.*", "", re.sub(r"//[^/@]*@", "//", address))


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in requires("emmech") or ()]


def _shortfall(one: Requirement) -> str | None:
    """What is wrong with an installed package, or None."""
    try:
        found = version(one.name)
    except PackageNotFoundError:
        return f"{one.name} is not installed"
    return None if one.specifier.contains(found, prereleases=True) else f"{one} wanted, {found} is there"


def _home(path: Path) -> str:
    """A path with the home folder written ``~``."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 2**20:.0f} MiB"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f}"
