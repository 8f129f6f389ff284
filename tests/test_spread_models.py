"""Sweeps of models that accelerate has spread over devices: hooks around blocks, weights brought when run."""

import numpy as np
import pytest
import tiny
from accelerate import dispatch_model
from test_sweep import PAIRS

from emmech.errors import LoadError
from emmech.models.checkpoints import load_pair
from emmech.piggyback.attribution import attribute
from emmech.piggyback.residual_sweep import sweep_resid
from emmech.piggyback.sweep import sweep_kv

# As device="balanced" does where there is too little memory; without a GPU the second device is the disk.
PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


def maps(pair) -> list[np.ndarray]:
    """The three maps over layers and positions, blocks left out where they may be."""
    options = {"over": ("layer", "position"), "progress": False}
    exact = [sweep_kv(pair, PAIRS, **options), sweep_resid(pair, PAIRS, **options)]
    assert all(one.summary["late_start"] for one in exact)
    estimated = attribute(pair, PAIRS, sample=4, top=1, **options).attributions
    return [*(one.scores for one in exact), estimated]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_spread_model_is_swept_as_a_whole_one(tmp_path, kind):
    base = tiny.save_base("llama", tmp_path / "base")
    tuned = (tiny.save_adapter if kind == "lora" else tiny.save_full)(base, tmp_path / "tuned")
    pair = load_pair(base, tuned, dtype="float32", device="cpu")
    whole = maps(pair)
    modules = {id(side.module): side.module for side in (pair.base, pair.finetuned)}
    for number, module in enumerate(modules.values()):
        inner = module.get_base_model() if kind == "lora" else module
        folder = str(tmp_path / f"weights-{number}")
        dispatch_model(inner, PLACES, main_device="cpu", offload_dir=folder, force_hooks=True)
        assert all(weight.is_meta for weight in inner.model.layers[2].parameters())
    for one, other in zip(whole, maps(pair), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)


@pytest.fixture
def little_memory(monkeypatch):
    """A machine that holds the embeddings and one block of a tiny model; the rest stays on disk."""
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda *_: {"cpu": 150_000})


def test_a_pair_that_does_not_fit_is_loaded_in_parts_and_swept_as_a_whole_one(tmp_path, little_memory):
    base = tiny.save_base("llama", tmp_path / "base")
    tuned = tiny.save_full(base, tmp_path / "tuned")
    whole = maps(load_pair(base, tuned, dtype="float32", device="cpu"))
    pair = load_pair(base, tuned, dtype="float32", device="balanced")
    for side in (pair.base, pair.finetuned):
        assert set(side.module.hf_device_map.values()) == {"cpu", "disk"}
        assert side.module.model.layers[2].mlp.up_proj.weight.is_meta
    for one, other in zip(whole, maps(pair), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)


def test_an_adapter_over_a_base_on_disk_is_refused(tmp_path, little_memory):
    base = tiny.save_base("llama", tmp_path / "base")
    adapter = tiny.save_adapter(base, tmp_path / "adapter")
    with pytest.raises(LoadError, match=r"fits on the devices .*, but part of it was left on disk\. Use a"):
        load_pair(base, adapter, dtype="float32", device="balanced")
