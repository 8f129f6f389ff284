"""A 4-bit pair is loaded, and swept as plain passes over the same 4-bit weights score it; on a CPU."""

import numpy as np
import pytest
import tiny
from test_sweep import CLOSE, PAIRS, plain_passes, random_patches, replay_of

from emmech.models.checkpoints import load_pair
from emmech.piggyback.streaming import score_patches

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # bitsandbytes takes blocks of 64


@pytest.fixture
def float32_kernels(monkeypatch):
    """A CPU without the instructions for which bitsandbytes computes in bfloat16, whatever is asked for."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


def test_cells_of_a_four_bit_pair_equal_plain_passes_over_its_own_weights(tmp_path, float32_kernels):
    base = tiny.save_base("llama", tmp_path / "base", **WIDE)
    adapter = tiny.save_adapter(base, tmp_path / "adapter")
    whole, pair = (
        load_pair(base, adapter, dtype="float32", device="cpu", quantization=bits) for bits in (None, "4bit")
    )
    assert pair.one_copy
    inner = pair.base.module.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert isinstance(inner, bitsandbytes.nn.Linear4bit)
    replay = replay_of(pair, questions=PAIRS[:1])
    wanted = random_patches(replay.shape, 20)
    found = score_patches(replay, wanted, rows=7, progress=False).patched[:, 0]
    np.testing.assert_allclose(found, plain_passes(pair, replay, wanted), **CLOSE)
    of_whole = score_patches(replay_of(whole, questions=PAIRS[:1]), wanted, progress=False).patched[:, 0]
    assert np.abs(found - of_whole).min() > 1e-3  # the weights are others
