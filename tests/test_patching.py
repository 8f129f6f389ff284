"""Identity, causality and parity of every patch, on every architecture, batched and left-padded."""

import pytest
import tiny
import torch

from emmech.errors import PatchError
from emmech.models import hook_points
from emmech.models.generation import make_batch, prefill, run_through
from emmech.models.kv_cache import PatchCache, visible_share
from emmech.piggyback.donors import _permutation, empty_query_donor, noise_like
from emmech.piggyback.patching import (
    Bench,
    Condition,
    KVPatch,
    ResidPatch,
    patch_kv,
    patched_projections,
    refuse_impossible,
    restored_share,
)

SEGMENTS = ("prefix", "query", "postfix")
EACH = [("prefix",), ("query",), ("postfix",), SEGMENTS]
NAMES = [str(number) for number in range(len(tiny.QUESTIONS))]
# Two float32 ways of computing the same attention (other shapes, other order of sums) on these
# models differ by up to 3e-5 in logits of size 5.
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


def prompts(pair):
    return [pair.chat.render(question) for question in tiny.QUESTIONS]


def bench(pair, share_prefix):
    return Bench(pair).batch(prompts(pair), NAMES, share_prefix=share_prefix)


def layouts(architecture):
    """The shared-prefix layout is used only where no window is shorter than the prompt."""
    return (False,) if architecture == "gemma3" else (True, False)


def repair(segments, **settings):
    return Condition("repair", "finetuned", (KVPatch(segments, "base", **settings),))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("architecture", tiny.ATTENTION_ONLY)
def test_a_patch_from_itself_changes_nothing(make_pair, architecture, kind):
    pair = make_pair(architecture, kind)
    for share in layouts(architecture):
        batch = bench(pair, share)
        for side in ("base", "finetuned"):
            plain = batch.prefill(Condition("plain", side))
            for segments in EACH:
                patched = batch.prefill(Condition("self", side, (KVPatch(segments, side),)))
                assert torch.equal(patched.logits, plain.logits), (share, side, segments)
                for mine, theirs in zip(patched.cache.layers, plain.cache.layers, strict=True):
                    assert torch.equal(mine.keys, theirs.keys)
                    assert torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize("architecture", tiny.ATTENTION_ONLY)
def test_positions_before_the_patch_are_untouched_and_later_ones_are_not(make_pair, architecture):
    pair = make_pair(architecture)
    for segments in (("query",), ("postfix",)):
        patched = patch_kv(pair, tiny.QUESTIONS, segments=segments)
        mask = patched.batch.attention_mask.bool()
        inputs = dict(patched.inputs) | {"position_ids": patched.batch.position_ids}
        with pair.finetuned.active() as model, torch.no_grad():
            plain = model(**inputs).logits
            after = model(**inputs, past_key_values=patched.cache()).logits
        first = patched.batch.positions(segments[0]).int().argmax(-1)
        before = mask & (torch.arange(mask.shape[1])[None] < first[:, None])
        assert before.any() and torch.equal(after[before], plain[before])
        changed = (after[:, -1] - plain[:, -1]).abs().amax(-1)
        assert (changed > 1e-3).all(), changed


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("architecture", tiny.ATTENTION_ONLY)
def test_shared_prefix_and_left_padded_layouts_agree(make_pair, architecture, kind):
    if architecture == "gemma3":
        pytest.skip("its window is shorter than the prompts: planned left-padded")
    pair = make_pair(architecture, kind)
    shared, padded = bench(pair, True), bench(pair, False)
    conditions = [Condition("plain", "finetuned"), *map(repair, EACH)]
    conditions += [repair(("postfix",), donor="empty"), repair(("prefix",), donor="shuffled")]
    for condition in conditions:
        one, two = shared.prefill(condition), padded.prefill(condition)
        torch.testing.assert_close(one.logits, two.logits, **CLOSE)
        torch.testing.assert_close(one.last_resid, two.last_resid, **CLOSE)


@pytest.mark.parametrize("architecture", tiny.ATTENTION_ONLY)
def test_a_row_does_not_depend_on_the_rows_beside_it(make_pair, architecture):
    pair = make_pair(architecture)
    for condition in (Condition("plain", "finetuned"), repair(SEGMENTS), repair(("postfix",), donor="empty")):
        together = bench(pair, False).prefill(condition).logits
        for row, prompt in enumerate(prompts(pair)):
            alone = Bench(pair).batch([prompt], [NAMES[row]], share_prefix=False).prefill(condition)
            torch.testing.assert_close(alone.logits[0], together[row], **CLOSE)


def projection_outputs(pair, prompt, side):
    """Outputs of k_proj and v_proj in one unpadded run, by place name."""
    n_layers = side.config.num_hidden_layers
    names = [f"blocks.{layer}.attn.{kv}.hook_out" for layer in range(n_layers) for kv in "kv"]
    batch = make_batch([prompt], side.device, share_prefix=False)
    with side.active() as model, hook_points.recorded(model, *names) as store:
        run_through(model, batch, PatchCache(side.config))
    return store


@pytest.mark.parametrize("segments", [*EACH, "empty"])
@pytest.mark.parametrize("architecture", tiny.SEPARATE_PROJECTIONS)
def test_cache_patch_equals_replaced_projections(make_pair, architecture, segments):
    """The paper's way: overwrite outputs of k_proj and v_proj, before k_norm and RoPE, row by row."""
    pair = make_pair(architecture)
    empty = segments == "empty"
    condition = repair(("postfix",), donor="empty") if empty else repair(segments)
    ours = bench(pair, False).prefill(condition).logits
    for row, prompt in enumerate(prompts(pair)):
        batch = make_batch([prompt], pair.base.device, share_prefix=False)
        if empty:
            template = projection_outputs(pair, prompt.without_query(), pair.base)
            width = len(prompt)
            donor = {
                name: torch.nn.functional.pad(out, (0, 0, width - out.shape[1], 0))
                for name, out in template.items()
            }
            positions = batch.positions("postfix")
        else:
            donor = projection_outputs(pair, prompt, pair.base)
            positions = torch.stack([batch.positions(s) for s in segments]).any(0)
        with patched_projections(pair.finetuned, positions, donor) as model:
            theirs = prefill(model, batch, PatchCache(pair.finetuned.config), 0).logits
        torch.testing.assert_close(ours[row], theirs[0], **CLOSE)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "part",
    [
        {"layers": (1,)},
        {"key": False},
        {"value": False},
        {"kv_heads": (1,)},
        {"layers": (0, 2), "kv_heads": (0,), "key": False},
    ],
)
def test_partial_patches_equal_replaced_projections(make_pair, architecture, part):
    """Layers, heads, K or V alone: what is not patched is recomputed under the patch."""
    pair = make_pair(architecture)
    d_head = pair.base.config.head_dim
    for segments in (("prefix",), ("query", "postfix")):
        patch = KVPatch(segments, "base", **part)
        ours = {
            s: bench(pair, s).prefill(Condition("part", "finetuned", (patch,))).logits for s in (True, False)
        }
        torch.testing.assert_close(ours[True], ours[False], **CLOSE)
        for row, prompt in enumerate(prompts(pair)):
            batch = make_batch([prompt], pair.base.device, share_prefix=False)
            theirs = projection_outputs(pair, prompt, pair.base)
            positions = torch.stack([batch.positions(s) for s in segments]).any(0)
            donor = {}
            for name, out in theirs.items():
                layer, kv = int(name.split(".")[1]), name.split(".")[3]
                if layer not in (patch.layers or range(9)) or not getattr(
                    patch, {"k": "key", "v": "value"}[kv]
                ):
                    continue
                heads = patch.kv_heads or range(out.shape[-1] // d_head)
                keep = torch.zeros(out.shape[-1], dtype=torch.bool)
                for head in heads:
                    keep[head * d_head : (head + 1) * d_head] = True
                donor[name] = torch.where(keep, out, torch.nan)  # nan: the target's own
            with _projections_where_not_nan(pair.finetuned, positions, donor) as model:
                reference = prefill(model, batch, PatchCache(pair.finetuned.config), 0).logits
            torch.testing.assert_close(ours[False][row], reference[0], **CLOSE)


def _projections_where_not_nan(side, positions, donor):
    from contextlib import ExitStack, contextmanager

    @contextmanager
    def patched():
        with ExitStack() as stack:
            model = stack.enter_context(side.active())
            for name, out in donor.items():

                def edit(own, out=out):
                    return torch.where(positions[..., None] & ~out.isnan(), out, own)

                stack.enter_context(hook_points.replaced(model, name, edit))
            yield model

    return patched()


@pytest.mark.parametrize("architecture", tiny.ATTENTION_ONLY)
def test_patching_everything_but_the_last_position_leaves_only_its_own_computation(make_pair, architecture):
    """All prompt K and V from the base in every layer: the target attends to exactly the base's cache."""
    pair = make_pair(architecture)
    patched = patch_kv(pair, tiny.QUESTIONS, segments=SEGMENTS)
    cache = patched.cache()
    with pair.finetuned.active() as model:
        run_through(model, patched.batch, cache)
    donor = PatchCache(pair.base.config)
    with pair.base.active() as model:
        run_through(model, patched.batch, donor)
    for mine, theirs in zip(cache.layers, donor.layers, strict=True):
        rows = patched.batch.attention_mask.bool()[:, -mine.keys.shape[2] :]  # windows keep the end
        assert torch.equal(mine.keys.transpose(1, 2)[rows], theirs.keys.transpose(1, 2)[rows])
        assert torch.equal(mine.values.transpose(1, 2)[rows], theirs.values.transpose(1, 2)[rows])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt_neox", "phi3"])
def test_empty_donor_keys_are_turned_to_the_positions_of_the_test_prompt(make_pair, architecture):
    """A donor run at shifted positions has the values of the unshifted run, and other keys."""
    pair = make_pair(architecture)
    batch = make_batch(prompts(pair), pair.base.device, share_prefix=False)
    donor = empty_query_donor(pair.base, batch)
    for row, prompt in enumerate(prompts(pair)):
        alone = make_batch([prompt.without_query()], pair.base.device, share_prefix=False)
        cache = PatchCache(pair.base.config, record=True)
        with pair.base.active() as model:
            run_through(model, alone, cache)
        for layer, (key, value) in cache.recorded.items():
            width = prompt.n_postfix
            torch.testing.assert_close(donor[layer][1][row, :, -width:], value[0, :, -width:], **CLOSE)
            same = donor[layer][0][row, :, -width:] - key[0, :, -width:]
            assert same.abs().max() > 1e-2  # turned by n_query positions


@pytest.mark.parametrize("architecture", tiny.ATTENTION_ONLY)
def test_noise_has_the_donors_norm_at_every_layer_head_and_position(make_pair, architecture):
    pair = make_pair(architecture)
    donor = Bench(pair).prefix(pair.base, prompts(pair)[0].prefix_ids).keys_values
    noise = noise_like(donor, ["a", "b"], seed=0)
    for layer, keys_values in donor.items():
        for given, made in zip(keys_values, noise[layer], strict=True):
            assert made.shape == (2, *given.shape[1:])
            torch.testing.assert_close(made.norm(dim=-1), given.norm(dim=-1).expand(2, -1, -1))
            assert not torch.allclose(made[0], made[1])
    again = noise_like(donor, ["b"], seed=0)
    assert torch.equal(again[0][0][0], noise[0][0][1])  # a row's noise is its own


@pytest.mark.parametrize("length", [2, 3, 24, 40, 97])
def test_shuffled_positions_are_a_permutation_without_fixed_points(length):
    moved_to = _permutation(length, seed=3)
    assert sorted(moved_to.tolist()) == list(range(length))
    alone = length % 32 == 1  # a last block of one position has nowhere to go
    assert int((moved_to == torch.arange(length)).sum()) == int(alone)


def test_shuffled_prefix_holds_each_content_turned_to_its_new_position(make_pair):
    """Values are the prefix's, permuted; keys equal those of a run at the new position."""
    pair = make_pair("qwen3")
    ids = prompts(pair)[0].prefix_ids
    own, moved = (getattr(Bench(pair), name)(pair.base, ids) for name in ("prefix", "shuffled_prefix"))
    moved_to = _permutation(len(ids), 0)
    for layer, (_, value) in own.keys_values.items():
        torch.testing.assert_close(moved.keys_values[layer][1][:, :, moved_to], value, **CLOSE)
        norms = (k.keys_values[layer][0].norm(dim=-1) for k in (own, moved))
        before, after = norms
        torch.testing.assert_close(after[:, :, moved_to], before, **CLOSE)  # rotations keep norms


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("architecture", tiny.ATTENTION_ONLY)
def test_a_residual_patch_from_itself_changes_nothing(make_pair, architecture, kind):
    pair = make_pair(architecture, kind)
    for share in layouts(architecture):
        batch = bench(pair, share)
        plain = batch.prefill(Condition("plain", "finetuned"))
        for segments in EACH:
            patch = ResidPatch(segments, "finetuned", 1)
            condition = Condition("self", "finetuned", resid=patch)
            same = batch.prefill(condition)
            torch.testing.assert_close(same.logits, plain.logits, atol=0, rtol=0)


@pytest.mark.parametrize("architecture", tiny.ATTENTION_ONLY)
def test_residual_patch_at_the_last_layer_gives_the_sources_last_state(make_pair, architecture):
    """After the last block nothing follows but norm and head: logits of the source's state through them."""
    pair = make_pair(architecture, "full")
    last = pair.base.config.num_hidden_layers - 1
    batch = bench(pair, False)
    patched = batch.prefill(Condition("x", "finetuned", resid=ResidPatch(SEGMENTS, "base", last)))
    with hook_points.recorded(pair.base.module, f"blocks.{last}.hook_resid_post") as store:
        run_through(pair.base.module, batch.batch, PatchCache(pair.base.config))
    plain = batch.prefill(Condition("base", "base"))
    with (
        hook_points.replaced(
            pair.finetuned.module,
            f"blocks.{last}.hook_resid_post",
            lambda _: store[f"blocks.{last}.hook_resid_post"],
        ),
        pair.finetuned.active() as model,
    ):
        reference = prefill(model, batch.batch, PatchCache(pair.finetuned.config), 0)
    assert torch.equal(patched.logits, reference.logits)
    assert plain.logits.shape == patched.logits.shape


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
def test_residual_patches_agree_between_layouts_and_move_later_layers_only(make_pair, architecture):
    pair = make_pair(architecture, "full")
    shared, padded = bench(pair, True), bench(pair, False)
    plain = padded.prefill(Condition("plain", "finetuned"))
    for segments in (("prefix",), ("query",), ("prefix", "postfix")):
        condition = Condition("x", "finetuned", resid=ResidPatch(segments, "base", 1))
        one, two = shared.prefill(condition), padded.prefill(condition)
        torch.testing.assert_close(one.logits, two.logits, **CLOSE)
        assert (two.logits - plain.logits).abs().max() > 1e-2
        # last_resid[0] is after block 0, which comes before the patch.
        assert torch.equal(two.last_resid[0], plain.last_resid[0])


def test_hybrid_prefix_hands_over_recurrent_and_convolution_states(make_pair):
    """Running on from the base's whole prefix state equals the base's own prefix, then the finetuned."""
    pair = make_pair("qwen3_next", "full")
    rendered = prompts(pair)
    for row, prompt in enumerate(rendered):
        batch = Bench(pair).batch([prompt], [NAMES[row]], share_prefix=True)
        patched = batch.prefill(repair(("prefix",)))
        cache = PatchCache(pair.base.config)
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            pair.base.module(ids[:, : prompt.n_prefix], past_key_values=cache, use_cache=True)
            reference = pair.finetuned.module(
                ids[:, prompt.n_prefix :], past_key_values=cache, use_cache=True
            )
        torch.testing.assert_close(patched.logits[0], reference.logits[0, -1], **CLOSE)
        plain = batch.prefill(Condition("plain", "finetuned"))
        assert (patched.logits - plain.logits).abs().max() > 1e-2
        itself = batch.prefill(Condition("self", "finetuned", (KVPatch(("prefix",), "finetuned"),)))
        assert torch.equal(itself.logits, plain.logits)


@pytest.mark.parametrize(
    "patch",
    [
        KVPatch(("query",), "base"),
        KVPatch(("postfix",), "base", "empty"),
        KVPatch(("prefix",), "base", layers=(1,)),
        KVPatch(("prefix",), "base", value=False),
        KVPatch(("prefix",), "base", "noise"),
    ],
)
def test_what_a_hybrid_cannot_patch_whole_is_refused(make_pair, patch):
    pair = make_pair("qwen3_next", "full")
    with pytest.raises(PatchError, match="expected a whole-prefix patch"):
        refuse_impossible(pair, Condition("part", "finetuned", (patch,)))
    refuse_impossible(pair, repair(("prefix",)))


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (KVPatch(("prefix",), "base", layers=(3,)), r"layers among 0\.\.2"),
        (KVPatch(("prefix",), "base", kv_heads=(2,)), r"kv_heads among 0\.\.1"),
        (KVPatch(("prefix",), "base", "empty"), "'empty' donor for the postfix"),
    ],
)
def test_impossible_patches_are_refused(make_pair, patch, message):
    with pytest.raises(PatchError, match=message):
        refuse_impossible(make_pair("llama"), Condition("x", "finetuned", (patch,)))


@pytest.mark.parametrize("architecture", tiny.ATTENTION_ONLY)
def test_patch_kv_works_through_generate_and_leaves_decoding_alone(make_pair, architecture):
    """``generate`` from the patched cache gives the tokens of our own decoding of the same patch."""
    from emmech.models.generation import Decoding, decode

    pair = make_pair(architecture)
    patched = patch_kv(pair, tiny.QUESTIONS, segments=("prefix",))
    with pair.finetuned.active() as model:
        theirs = model.generate(
            **patched.inputs,
            past_key_values=patched.cache(),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
        )[:, patched.batch.input_ids.shape[1] :]
    start = bench(pair, False).prefill(repair(("prefix",)))
    with pair.finetuned.active() as model:
        ours = decode(model, start, Decoding(6), NAMES, end_ids=())
    assert theirs.tolist() == ours


def test_patch_kv_takes_any_position_mask(make_pair):
    pair = make_pair("llama")
    whole = patch_kv(pair, tiny.QUESTIONS, segments=("prefix",))
    asked = patch_kv(pair, tiny.QUESTIONS, segments=("query",), positions=whole.batch.positions("prefix"))
    assert torch.equal(asked.overwrite.positions, whole.overwrite.positions)
    padding = torch.ones_like(asked.overwrite.positions)
    covered = patch_kv(pair, tiny.QUESTIONS, positions=padding).overwrite.positions
    assert torch.equal(covered, whole.batch.attention_mask.bool())  # padding is never patched


def test_gradients_flow_through_an_overwrite(make_pair):
    """The donor's gradient is that of the patched positions; elsewhere it is zero."""
    pair = make_pair("llama", "full")
    patched = patch_kv(pair, tiny.QUESTIONS[:1], segments=("prefix",))
    key = patched.overwrite.donor[0][0].clone().requires_grad_()
    donor = patched.overwrite.donor | {0: (key, patched.overwrite.donor[0][1])}
    from dataclasses import replace

    cache = PatchCache(patched.config, [replace(patched.overwrite, donor=donor)])
    logits = pair.finetuned.module(**patched.inputs, past_key_values=cache).logits
    logits[0, -1].max().backward()
    positions = patched.overwrite.positions[0]
    assert key.grad[0, :, positions].abs().sum() > 0
    assert key.grad[0, :, ~positions].abs().sum() == 0


def test_a_merged_border_token_shortens_the_prefix_of_its_row_only(make_pair):
    """A question that begins with a newline takes the header's last token with it."""
    pair = make_pair("llama")
    merged = pair.chat.render("\nWhy is the sky blue?")
    usual = pair.chat.render("Why is the sky blue?")
    assert merged.prefix_ids == usual.prefix_ids[: merged.n_prefix]
    batch = Bench(pair).batch([merged, usual], ["0", "1"], share_prefix=False)
    together = batch.prefill(repair(("prefix",))).logits
    for row, prompt in enumerate((merged, usual)):
        alone = Bench(pair).batch([prompt], [str(row)], share_prefix=True).prefill(repair(("prefix",)))
        torch.testing.assert_close(alone.logits[0], together[row], **CLOSE)


def test_a_query_span_of_prefix_length_is_the_first_query_tokens_as_many_as_the_prefix_has(make_pair):
    pair = make_pair("llama")
    for share in (True, False):
        batch = bench(pair, share)
        chosen = batch.patched_positions(repair(("query",), query_span="prefix-length"))
        whole = batch.patched_positions(repair(("query",)))
        for row, prompt in enumerate(batch.batch.prompts):
            start = int(whole[row].nonzero()[0])
            wanted = range(start, start + min(prompt.n_query, prompt.n_prefix))
            assert chosen[row].nonzero().squeeze(1).tolist() == list(wanted)
        sizes = [(prompt.n_query, prompt.n_prefix) for prompt in batch.batch.prompts]
        assert any(query > prefix for query, prefix in sizes) and any(q < p for q, p in sizes)


def test_the_restored_share_is_the_projection_on_the_way_to_the_source():
    target = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])  # two layers, one prompt
    source = torch.tensor([[[3.0, 0.0]], [[0.0, 2.0]]])
    patched = torch.tensor([[[2.0, 5.0]], [[0.0, -1.0]]])
    # <(1, 5), (2, 0)> / 4 = 1/2 whatever happens across; <(0, -1), (0, 2)> / 4 = -1/2.
    numerator, denominator = restored_share(patched, target, source)
    assert (numerator / denominator).tolist() == [0.5, -0.5]
    numerator, denominator = restored_share(source, target, source)
    assert (numerator / denominator).tolist() == [1.0, 1.0]


def test_the_visible_share_is_that_of_patched_slots_a_window_still_holds():
    config = tiny.model("gemma3").config  # windows of 24 on layers 0 and 2, full attention on 1
    cache = PatchCache(config)
    for layer in range(3):
        cache.update(torch.ones(1, 2, 40, 8), torch.ones(1, 2, 40, 8), layer)
    patched = torch.zeros(1, 40, dtype=torch.bool)
    patched[0, 10:20] = True
    # A window of 24 keeps the last 23 for the next token: slots 17 to 39, three of the ten.
    assert visible_share(cache, patched, 40).tolist() == pytest.approx([0.3, 1.0, 0.3])
