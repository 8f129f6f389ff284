"""A pair as TransformerLens bridges: the same logits, the same patches, caches there and back."""

from dataclasses import replace

import pytest
import tiny
import torch

from emmech.engines.on_bridge import activation_cache, keys_values, masks, patch_hooks
from emmech.errors import LoadError
from emmech.gates.gate import Gating
from emmech.models.generation import Decoding, decode, make_batch, run_through
from emmech.models.kv_cache import Overwrite, PatchCache
from emmech.models.views import bridge
from emmech.piggyback.patching import Bench, Condition, KVPatch, patch_kv

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "gpt_neox", "phi3")
NAMES = [str(number) for number in range(len(tiny.QUESTIONS))]
# Eager attention against the default's, in float32, on logits of size 5.
CLOSE = {"atol": 1e-4, "rtol": 0}


def batch_of(pair):
    prompts = [pair.chat.render(question) for question in tiny.QUESTIONS]
    return make_batch(prompts, pair.base.device, share_prefix=False)


@pytest.fixture(scope="module")
def bridged(make_pair):
    """``bridged(architecture, kind)``: the pair, and bridges of its base and finetuned side."""
    made = {}

    def make(architecture, kind="lora"):
        if (architecture, kind) not in made:
            pair = make_pair(architecture, kind)
            made[architecture, kind] = pair, bridge(pair, "base"), bridge(pair)
        return made[architecture, kind]

    return make


@pytest.mark.parametrize(
    ("architecture", "kind"), [*((one, "lora") for one in ARCHITECTURES), ("llama", "full"), ("phi3", "full")]
)
def test_a_bridge_computes_what_its_side_does_and_leaves_the_pair_alone(make_pair, architecture, kind):
    pair = make_pair(architecture, kind)
    batch = batch_of(pair)
    inputs = batch.part(0)
    rows = batch.attention_mask.bool()
    for name in ("base", "finetuned"):
        side = pair.side(name)
        with torch.no_grad(), side.active() as model:
            before = model(**inputs).logits
        names = [path for path, _ in side.module.named_modules()]
        lens = bridge(pair, name)
        with torch.no_grad():
            logits = lens(batch.input_ids, **masks(batch))
        torch.testing.assert_close(logits[rows], before[rows], **CLOSE)
        with torch.no_grad(), side.active() as model:
            assert torch.equal(model(**inputs).logits, before)
        assert [path for path, _ in side.module.named_modules()] == names
        assert side.module.config._attn_implementation == "sdpa"
        assert not any(parameter.requires_grad for parameter in lens.parameters())


PATCHES = [
    {"segments": ("prefix",)},
    {"segments": ("query", "postfix"), "layers": (0, 2), "value": False},
    {"segments": ("prefix", "postfix"), "kv_heads": (1,), "key": False},
]


@pytest.mark.parametrize("settings", PATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hooks_are_the_patch_of_the_default_engine(bridged, architecture, settings):
    pair, base, tuned = bridged(architecture)
    run = Bench(pair).batch([pair.chat.render(q) for q in tiny.QUESTIONS], NAMES, share_prefix=False)
    patch = KVPatch(settings["segments"], "base", **{k: v for k, v in settings.items() if k != "segments"})
    ours = run.prefill(Condition("repair", "finetuned", (patch,))).logits
    hooks = patch_hooks(base, run.batch, **settings)
    with torch.no_grad():
        theirs = tuned.run_with_hooks(run.batch.input_ids, fwd_hooks=hooks, **masks(run.batch))[:, -1]
        plain = tuned(run.batch.input_ids, **masks(run.batch))[:, -1]
    torch.testing.assert_close(theirs, ours, **CLOSE)
    assert ((theirs - plain).abs().amax(-1) > 1e-2).all()  # and the hooks are gone


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hooks_go_through_generate(bridged, architecture):
    pair, base, tuned = bridged(architecture)
    run = Bench(pair).batch([pair.chat.render(q) for q in tiny.QUESTIONS], NAMES, share_prefix=False)
    start = run.prefill(Condition("repair", "finetuned", (KVPatch(("prefix",), "base"),)))
    with pair.finetuned.active() as model:
        ours = decode(model, start, Decoding(5), NAMES, end_ids=())
    ids = run.batch.input_ids
    for cached in (True, False):
        with tuned.hooks(fwd_hooks=patch_hooks(base, run.batch)):
            made = tuned.generate(
                ids, attention_mask=run.batch.attention_mask, max_new_tokens=5, do_sample=False,
                stop_at_eos=False, use_past_kv_cache=cached, return_type="tokens", verbose=False,
            )  # fmt: skip
        assert made[:, -5:].tolist() == ours


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bridge_takes_the_caches_of_patch_kv(bridged, architecture):
    pair, _, tuned = bridged(architecture)
    for settings in ({"segments": ("prefix",)}, {"segments": ("postfix",), "donor": "empty"}):
        patched = patch_kv(pair, tiny.QUESTIONS, **settings)
        inputs = patched.batch.part(0)
        with torch.no_grad(), pair.finetuned.active() as model:
            ours = model(**inputs, past_key_values=patched.cache()).logits[:, -1]
        with torch.no_grad():
            ids = patched.batch.input_ids
            theirs = tuned(ids, past_key_values=patched.cache(), **masks(patched.batch))[:, -1]
        torch.testing.assert_close(theirs, ours, **CLOSE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_caches_go_both_ways(bridged, architecture):
    """What a bridge attended to is what the model's cache holds, and it serves as a donor."""
    pair, base, _ = bridged(architecture)
    batch = batch_of(pair)
    with torch.no_grad():
        _, theirs = base.run_with_cache(batch.input_ids, **masks(batch))
    cache = PatchCache(pair.base.config, record=True)
    with pair.base.active() as model:
        run_through(model, batch, cache)
    rows, found = batch.attention_mask.bool(), keys_values(theirs)
    assert found.keys() == cache.recorded.keys()
    for layer, ours in cache.recorded.items():
        for mine, other in zip(ours, found[layer], strict=True):
            torch.testing.assert_close(other.transpose(1, 2)[rows], mine.transpose(1, 2)[rows], **CLOSE)
    again = keys_values(activation_cache(cache.recorded, base))
    for layer, ours in cache.recorded.items():
        assert all(torch.equal(mine, other) for mine, other in zip(ours, again[layer], strict=True))
    donated = PatchCache(pair.finetuned.config, [Overwrite(batch.positions("prefix"), found)])
    patched = patch_kv(pair, tiny.QUESTIONS)
    with torch.no_grad(), pair.finetuned.active() as model:
        got, wanted = (model(**batch.part(0), past_key_values=c).logits for c in (donated, patched.cache()))
    torch.testing.assert_close(got[:, -1], wanted[:, -1], **CLOSE)


def test_text_goes_into_a_bridge_without_a_second_bos(bridged):
    pair, base, _ = bridged("llama")
    prompt = pair.chat.render("hi")
    assert base.to_tokens(prompt.text).tolist() == [list(prompt.ids)]


def test_sides_that_are_not_their_weights_alone_are_refused(make_pair):
    pair = make_pair("llama")
    gated = pair.base.under("gated", Gating(tiny.gates(pair.base.module)).on)
    with pytest.raises(LoadError, match=r"by its weights alone, but 'gated' carries gates"):
        bridge(replace(pair, variants={"gated": gated}), "gated")
