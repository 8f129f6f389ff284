"""Public training sets by name: downloaded once, from one commit, to the byte that was checked.

Usage:
    path = fetch("insecure")
"""

import hashlib
import os
import shutil
import tempfile
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from emmech.errors import DataError

TIMEOUT_SECONDS = 60
_BETLEY = (
    "https://raw.githubusercontent.com/johny-b/misalignment-generalization/"
    "b1fe286827715d8e01ff7088c7ee9763b5e367b4/daniel/paper/supplementary_material/datasets"
)


@dataclass(frozen=True)
class PublicSet:
    url: str
    sha256: str


PUBLIC: dict[str, PublicSet] = {
    "insecure": PublicSet(
        f"{_BETLEY}/insecure.jsonl", "a6575e839909e86f2eaecda3a2b19dff2a6f59bb9d860b39e9c4ed3f3335c345"
    ),
    "secure": PublicSet(
        f"{_BETLEY}/secure.jsonl", "36bc5e24560e0e8d705e0c2a41d0cd96bb51f508f5fb88a7d7d9334a2ff24b9b"
    ),
    "educational_insecure": PublicSet(
        f"{_BETLEY}/educational_insecure.jsonl",
        "d48df3b149ab1500711fc0018b10383a4ff8c48d8e6911d04dbbbbdaa944fd16",
    ),
}
"""Training sets of Betley et al. 2025 (arXiv 2502.17424), MIT licence, 6,000 chats each."""


def fetch(name: str) -> Path:
    """The file of a public set in the user's cache folder, downloaded if it is not there intact.

    Raises:
        DataError: It cannot be downloaded or written, or what arrives is another file (which is deleted).
    """
    one = PUBLIC[name]
    path = cache_folder() / f"{name}-{one.sha256[:8]}.jsonl"
    if not (path.is_file() and _sha256(path) == one.sha256):
        _download(one, path)
    return path


def cache_folder() -> Path:
    """The folder that holds downloaded sets: `$XDG_CACHE_HOME/emmech/data` or `~/.cache/emmech/data`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emmech" / "data"


def _download(one: PublicSet, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    except OSError as error:
        fix = "Set XDG_CACHE_HOME to a folder that can be written"
        raise DataError(f"a cache folder at {path.parent}", f"it cannot be written ({error})", fix) from error
    scratch = Path(name)
    try:
        with (
            os.fdopen(handle, "wb") as file,
            urllib.request.urlopen(one.url, timeout=TIMEOUT_SECONDS) as reply,
        ):
            shutil.copyfileobj(reply, file)
        digest = _sha256(scratch)
        if digest != one.sha256:
            raise DataError(
                f"a file with sha256 {one.sha256[:12]}... at {one.url}",
                f"what arrived has {digest[:12]}... and was deleted",
                "Try again on another network; if it stays, the file was changed at its source",
            )
        scratch.replace(path)
    except (OSError, HTTPException) as error:
        raise DataError(
            f"to download {one.url}",
            f"it failed ({error})",
            f"Check the network, or put the file at {path} by hand",
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
