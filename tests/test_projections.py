"""Recorded keys and values against hooks of the test's own, and fused projections cut by hand."""

import copy

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from emmech.models.projections import attention_layers, is_separate, projected
from emmech.training.objectives import relative_deviation

IDS = torch.tensor([[5, 9, 13, 40, 41, 7, 9, 100], [6, 6, 8, 90, 91, 92, 3, 0]])
MASK = torch.tensor([[1] * 8, [1] * 7 + [0]])
FUSED = ("phi3", "gpt_neox")


def recorded(model, layers=None):
    with projected(model, layers) as recording:
        model(input_ids=IDS, attention_mask=MASK, **recording.inputs)
        return recording.read()


def outputs(model, *names):
    """Outputs of the attention's modules of these names, layer by layer, by hooks of our own."""
    layers = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
    attentions = [layer.attention if hasattr(layer, "attention") else layer.self_attn for layer in layers]
    found = [{} for _ in attentions]
    handles = [
        getattr(attention, name).register_forward_hook(
            lambda _, __, output, i=i, name=name: found[i].__setitem__(name, output)
        )
        for i, attention in enumerate(attentions)
        for name in names
    ]
    model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    for handle in handles:
        handle.remove()
    return [[by_name[name] for name in names] for by_name in found]


def sliced(architecture, fused, config):
    """Keys and values ``[batch pos d_kv]`` of a fused projection's output, by its layout."""
    heads, d_head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if architecture == "gpt_neox":  # head by head: q, k, v
        by_head = fused.reshape(*fused.shape[:2], heads, 3, d_head)
        return by_head[:, :, :, 1].flatten(2), by_head[:, :, :, 2].flatten(2)
    d_kv = config.num_key_value_heads * d_head  # phi3: all q, then all k, then all v
    return fused[..., heads * d_head :][..., :d_kv], fused[..., -d_kv:]


def moved(model):
    """A copy whose every parameter differs a little."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return other


@pytest.mark.parametrize("architecture", tiny.SEPARATE_PROJECTIONS)
def test_keys_and_values_are_the_outputs_of_their_projections(architecture):
    model = tiny.model(architecture)
    ours, theirs = recorded(model), outputs(model, "k_proj", "v_proj")
    assert [*ours] == [0, 1, 2]
    for layer, (key, value) in enumerate(theirs):
        assert torch.equal(ours[layer][0], key)
        assert torch.equal(ours[layer][1], value)


@pytest.mark.parametrize("architecture", ["llama", *FUSED])
def test_recording_does_not_change_the_logits(architecture):
    model = tiny.model(architecture)
    plain = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    with projected(model) as recording:
        seen = model(input_ids=IDS, attention_mask=MASK, **recording.inputs).logits
    assert torch.equal(seen, plain)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", *FUSED])
def test_gradients_through_a_recording_are_those_of_the_projections(architecture):
    """The squared length of keys, which no rotation changes, plus the sum of values."""
    model = tiny.model(architecture)
    embeddings = model.get_input_embeddings().weight

    def gradient(keys_values):
        loss = sum(key.square().sum() + value.sum() for key, value in keys_values)
        return torch.autograd.grad(loss, embeddings)[0]

    ours = gradient(recorded(model).values())
    if architecture in FUSED:
        name = "query_key_value" if architecture == "gpt_neox" else "qkv_proj"
        theirs = [sliced(architecture, fused, model.config) for (fused,) in outputs(model, name)]
    else:
        theirs = outputs(model, "k_proj", "v_proj")
    wanted = gradient(theirs)
    assert wanted.abs().max() > 1
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("architecture", FUSED)
def test_values_of_fused_projections_are_their_slices(architecture):
    model = tiny.model(architecture)
    name = "query_key_value" if architecture == "gpt_neox" else "qkv_proj"
    ours = recorded(model)
    for layer, (fused,) in enumerate(outputs(model, name)):
        assert torch.equal(ours[layer][1], sliced(architecture, fused, model.config)[1])


@pytest.mark.parametrize("architecture", FUSED)
def test_relative_deviation_of_fused_keys_is_that_of_their_slices(architecture):
    """Cached keys are rotated ones; a rotation of both changes no length of a difference."""
    base = tiny.model(architecture)
    tuned = moved(base)
    name = "query_key_value" if architecture == "gpt_neox" else "qkv_proj"
    ours = zip(recorded(tuned).values(), recorded(base).values(), strict=True)
    theirs = zip(outputs(tuned, name), outputs(base, name), strict=True)
    for (cached_tuned, cached_base), ((fused_tuned,), (fused_base,)) in zip(ours, theirs, strict=True):
        keys = [sliced(architecture, fused, base.config)[0] for fused in (fused_tuned, fused_base)]
        assert (cached_base[0] - keys[1])[:, 1:].abs().max() > 1e-2  # turned beyond position 0
        wanted = (keys[0] - keys[1]).square().sum(-1) / keys[1].square().sum(-1)
        found = relative_deviation(cached_tuned[0].flatten(0, 1), cached_base[0].flatten(0, 1))
        torch.testing.assert_close(found, wanted.mean(), rtol=1e-4, atol=1e-6)  # sums of 32 squares


def test_only_the_chosen_layers_are_recorded():
    for architecture in ("llama", "gpt_neox"):
        model = tiny.model(architecture)
        everything, some = recorded(model), recorded(model, (2, 0))
        assert {*some} == {0, 2}
        assert all(torch.equal(some[layer][0], everything[layer][0]) for layer in some)


def test_only_the_attention_layers_of_a_hybrid_model_have_keys_and_values():
    assert attention_layers(tiny.model("qwen3_next").config) == (1,)
    assert attention_layers(tiny.model("gemma3").config) == (0, 1, 2)


def test_fused_keys_beyond_a_sliding_window_are_recorded_too():
    kind, settings = tiny.CONFIGS["phi3"]
    config = kind(vocab_size=len(tiny.tokenizer()), **settings | {"sliding_window": 3})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for layer, (fused,) in enumerate(outputs(model, "qkv_proj")):
        assert torch.equal(recorded(model)[layer][1], sliced("phi3", fused, config)[1])


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_separate_projections_are_told_from_fused_ones(architecture):
    assert is_separate(tiny.model(architecture)) == (architecture not in FUSED)
