"""Pairs of tiny models, loaded the way a user loads them."""

import pytest
import tiny
import torch

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
