"""A merged adapter gives the same logits, and is taken out again to the bit."""

import pytest
import tiny
import torch
from torch import nn

from emmech.models.adapters import merged
from emmech.models.checkpoints import load_pair


def logits(module):
    with torch.no_grad():
        return module(input_ids=torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("stop", [False, True])
def test_logits_stay_and_the_weights_come_back_as_they_were(make_pair, stop):
    pair = make_pair("llama")
    module = pair.finetuned.module
    before, weights = logits(module), {n: (p.data_ptr(), p.clone()) for n, p in module.named_parameters()}
    called = []
    handles = [
        part.register_forward_hook(lambda *_: called.append(1))
        for name, part in module.named_modules()
        if name.endswith("lora_A.default")
    ]
    try:
        with merged(module):
            torch.testing.assert_close(logits(module), before, atol=1e-4, rtol=0)
            assert not called  # the thin products were left out
            if stop:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert stop
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(module), before)
    for name, parameter in module.named_parameters():
        assert parameter.data_ptr() == weights[name][0]
        assert torch.equal(parameter, weights[name][1])
    with pair.base.active():
        assert not torch.allclose(logits(module), before)  # it can still be switched off


def test_weights_of_fewer_bits_and_plain_models_are_left_as_they_are(tmp_path):
    base = tiny.save_base("llama", tmp_path / "base")
    pair = load_pair(base, tiny.save_adapter(base, tmp_path / "lora"), dtype="bfloat16", device="cpu")
    for module in (pair.finetuned.module, nn.Linear(2, 2)):
        weights = [p.data_ptr() for p in module.parameters()]
        with merged(module):
            assert [p.data_ptr() for p in module.parameters()] == weights
