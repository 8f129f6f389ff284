"""Pairs of tiny models, loaded the way a user loads them, and the console script."""

import gc
import re
import sys

import pytest
import tiny
import torch

from emmech import cli
from emmech.models.checkpoints import ModelPair, load_pair


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory):
    """``make_pair(architecture, kind)``: a loaded pair, kind "lora" or "full"; made once."""
    made: dict[tuple[str, str], ModelPair] = {}
    bases: dict[str, object] = {}

    def make(architecture: str, kind: str = "lora") -> ModelPair:
        if architecture not in bases:
            folder = tmp_path_factory.mktemp(architecture)
            bases[architecture] = tiny.save_base(architecture, folder / "base")
        base = bases[architecture]
        if (architecture, kind) not in made:
            save = tiny.save_adapter if kind == "lora" else tiny.save_full
            tuned = save(base, base.parent / kind)
            made[architecture, kind] = load_pair(base, tuned, dtype="float32", device="cpu")
        return made[architecture, kind]

    return make


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def emmech(monkeypatch, capsys):
    """``emmech("tokens", "--json")``: exit code, stdout and stderr of the console script."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["emmech", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def user_error(emmech):
    """``user_error(match, *arguments)``: exit code 2 and one paragraph that matches."""

    def check(match: str, *arguments: str, after_loading: bool = False) -> None:
        code, _, err = emmech(*arguments)
        assert code == 2, err
        assert "Traceback" not in err
        lines = err.splitlines()
        if not after_loading:  # transformers draws a bar while it loads
            assert len(lines) == 1, err
        assert re.search(match, lines[-1]), lines[-1]
        assert re.match(r"(\x1b\[\d+m)?\w+Error: expected .+, but .+\. .+\.", lines[-1]), lines[-1]

    return check


@pytest.fixture(scope="module")
def quick_collection():
    """Accelerate collects garbage at the start of every run; modules once imported need no look."""
    gc.freeze()
    yield
    gc.unfreeze()
