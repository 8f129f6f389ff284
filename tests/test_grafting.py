"""Weights of two models, token by token: against a loop that really switches models at each token."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3MoeConfig

from emmech.chat import PADDING, PARTS
from emmech.errors import PatchError
from emmech.gates.gate import Gating
from emmech.models.checkpoints import load_pair
from emmech.models.generation import Decoding, decode, follow
from emmech.piggyback.grafting import (
    PLACES,
    Graft,
    _acting,
    graft_name,
    graft_side,
    graft_sites,
    parse_graft,
)
from emmech.piggyback.patching import Bench, Condition, KVPatch, patch_kv

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "gpt_neox")
KINDS = ("lora", "full")
NAMES = [str(number) for number in range(len(tiny.QUESTIONS))]
# As in test_patching: two float32 ways of computing the same attention.
CLOSE = {"atol": 2e-4, "rtol": 1e-4}
EVERYTHING_BEFORE_THE_LAST = ("prefix", "query", "postfix-rest")


def grafted(pair, *chosen):
    """The pair with a variant for each tuple of parts, and for all and none of them."""
    sites = graft_sites(pair)
    sides = [graft_side(pair, parts, sites) for parts in (*chosen, PARTS)]
    none = replace(pair.finetuned, name="none", interventions=(Graft(sites, ()).on,))
    return replace(pair, variants={side.name: side for side in (*sides, none)})


def batch_of(pair, share_prefix, questions=tiny.QUESTIONS):
    prompts = [pair.chat.render(question) for question in questions]
    return Bench(pair).batch(prompts, NAMES[: len(prompts)], share_prefix=share_prefix)


def read(batch, name):
    return batch.prefill(Condition(name, name))


def continued(pair, name, start):
    """Three greedy tokens per row."""
    with pair.side(name).active() as module:
        return decode(module, start, Decoding(3), NAMES, end_ids=())


def layouts(architecture):
    """Prefixes are shared only where no window is shorter than the prompt."""
    return (False,) if architecture == "gemma3" else (True, False)


def by_switching(pair, prompt, parts, n_new):
    """Greedy tokens, and the first's logits, of a loop that reads each token with the model it is for."""
    last = len(prompt) - 1
    segments = list(prompt.segments)
    names = [{s, "last" if at == last else f"{s}-rest"} for at, s in enumerate(segments)]
    cache, ids = DynamicCache(config=pair.base.config), list(prompt.ids)
    for at in range(len(prompt) + n_new - 1):
        own = names[at] if at <= last else {"response"}
        side = pair.finetuned if own & set(parts) else pair.base
        with side.active() as model, torch.no_grad():
            made = model(input_ids=torch.tensor([[ids[at]]]), past_key_values=cache).logits[0, -1]
        if at == last:
            first = made
        if at >= last:
            ids.append(int(made.argmax()))
    return ids[len(prompt) :], first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "phi3"))
def test_a_graft_is_what_switching_models_at_every_token_gives(make_pair, architecture, kind):
    subsets = [("prefix", "response"), ("query", "last"), ("postfix-rest", "response")]
    loaded = make_pair(architecture, kind)
    pair = grafted(replace(loaded, chat=loaded.chat.without_system()), *subsets)
    batch = batch_of(pair, layouts(architecture)[0])
    row = tiny.QUESTIONS.index("hi")
    for parts in subsets:
        name = graft_name(parts)
        start = read(batch, name)
        first, answers = start.logits[row], continued(pair, name, start)
        wanted, logits = by_switching(pair, batch.batch.prompts[row], parts, 3)
        torch.testing.assert_close(first, logits, **CLOSE)
        assert answers[row] == wanted, parts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_parts_are_the_finetuned_model_and_none_are_the_base(make_pair, architecture, kind):
    pair = grafted(make_pair(architecture, kind))
    for share in layouts(architecture):
        batch = batch_of(pair, share)
        for name, like in ((graft_name(PARTS), "finetuned"), ("none", "base")):
            ours, theirs = read(batch, name), read(batch, like)
            assert torch.equal(ours.logits, theirs.logits), (share, name)
            assert continued(pair, name, ours) == continued(pair, like, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_graft_of_the_prefix_is_a_patch_of_its_keys_and_values(make_pair, architecture, kind):
    """Later tokens see of the prefix its keys and values only; that holds in both directions."""
    pair = grafted(make_pair(architecture, kind), ("prefix",), ("query", "postfix", "response"))
    patches = {
        "graft:prefix": Condition("induce:prefix", "base", (KVPatch(("prefix",), "finetuned"),)),
        "graft:query+postfix+response": Condition(
            "repair:prefix", "finetuned", (KVPatch(("prefix",), "base"),)
        ),
    }
    for share in layouts(architecture):
        batch = batch_of(pair, share)
        for name, patch in patches.items():
            ours, theirs = read(batch, name), batch.prefill(patch)
            torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
            for other in ("base", "finetuned"):
                assert ((ours.logits - read(batch, other).logits).abs().amax(-1) > 1e-2).all()
            assert continued(pair, name, ours) == continued(pair, patch.target, theirs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_graft_up_to_the_last_token_is_a_patch_of_all_keys_and_values_before_it(make_pair, architecture):
    pair = grafted(make_pair(architecture), EVERYTHING_BEFORE_THE_LAST)
    patched = patch_kv(pair, tiny.QUESTIONS, source="finetuned")
    positions = patched.batch.attention_mask.bool()
    positions[:, -1] = False
    patched = patch_kv(pair, tiny.QUESTIONS, source="finetuned", positions=positions)
    with pair.base.active() as model, torch.no_grad():
        inputs = dict(patched.inputs) | {"position_ids": patched.batch.position_ids}
        theirs = model(**inputs, past_key_values=patched.cache()).logits[:, -1]
    ours = read(batch_of(pair, False), graft_name(EVERYTHING_BEFORE_THE_LAST)).logits
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_before_a_graft_are_the_bases(make_pair, architecture):
    pair = grafted(make_pair(architecture), ("query",), ("last",), ("response",))
    batch = batch_of(pair, False)
    base, width = read(batch, "base"), batch.batch.input_ids.shape[1]
    assert torch.equal(read(batch, "graft:response").logits, base.logits)
    starts = {"graft:query": batch.batch.positions("query").int().argmax(-1, keepdim=True)}
    for name, start in (starts | {"graft:last": torch.full((len(NAMES), 1), width - 1)}).items():
        after = read(batch, name)
        assert ((after.logits - base.logits).abs().amax(-1) > 1e-2).all()
        before = base.attention_mask.bool() & (torch.arange(width) < start)
        for mine, theirs in zip(after.cache.layers, base.cache.layers, strict=True):
            rows = before[:, -mine.keys.shape[2] :]  # windows keep the end
            for ours, own in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                assert torch.equal(ours.transpose(1, 2)[rows], own.transpose(1, 2)[rows])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_are_grafted_as_they_are_alone_and_in_either_layout(make_pair, architecture):
    kind = "full" if architecture in ("qwen3", "gemma3") else "lora"
    pair = grafted(make_pair(architecture, kind), ("query",), ("prefix", "last"))
    padded = batch_of(pair, False)
    for name in ("graft:query", "graft:prefix+last"):
        together = read(padded, name).logits
        if architecture != "gemma3":
            torch.testing.assert_close(read(batch_of(pair, True), name).logits, together, **CLOSE)
        for row, question in enumerate(tiny.QUESTIONS):
            alone = read(batch_of(pair, False, [question]), name).logits
            torch.testing.assert_close(alone[0], together[row], **CLOSE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_goes_on_from_a_grafted_prompt_with_the_weights_of_the_response(make_pair, architecture):
    pair = grafted(make_pair(architecture), ("query", "response"))
    batch, name = batch_of(pair, False), "graft:query+response"
    ids, mask = batch.batch.input_ids, batch.batch.attention_mask
    with pair.side(name).active() as model, follow(model, batch.batch):
        answers = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None
        )
    assert answers[:, ids.shape[1] :].tolist() == continued(pair, name, read(batch, name))


PASSES = {
    "a prompt": (["prefix", "query", "postfix", "postfix"], [3], [2]),
    "a prompt without a postfix": (["prefix", "query", "query"], [2], []),
    "a prefix alone": (["prefix", "prefix"], [], []),
    "an answer alone": (["response", "response"], [], []),
    "a prompt and its answer": (["prefix", "query", "postfix", "postfix", "response"], [3], [2]),
    "padding behind": (["query", "postfix", "padding", "padding"], [1], []),
}


@pytest.mark.parametrize(("names", "last", "rest"), PASSES.values(), ids=PASSES)
def test_the_last_token_is_the_one_that_predicts_the_answer(names, last, rest):
    known = {name: number for number, name in enumerate(PARTS)} | {"padding": PADDING}
    numbers = torch.tensor([[known[name] for name in names]])
    assert _acting(["last"], numbers)[0].nonzero().flatten().tolist() == last
    assert _acting(["postfix-rest"], numbers)[0].nonzero().flatten().tolist() == rest


# What is grafted


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return tiny.save_base("qwen2", tmp_path_factory.mktemp("qwen2") / "base")


ADAPTERS = {
    "rank by module": {"rank_pattern": {"q_proj": 2}, "lora_dropout": 0.5, "use_rslora": True},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "a module saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
    "biases, over a second copy": {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_every_kind_of_adapter_is_grafted(qwen2, tmp_path, settings):
    tiny.save_adapter(qwen2, tmp_path, **settings)
    if "bias" in settings or "modules_to_save" in settings:
        shake(tmp_path / "adapter_model.safetensors")
    loaded = load_pair(qwen2, tmp_path, dtype="float32", device="cpu")
    whole = ("bias" in settings, "embed_tokens" in settings.get("target_modules", ()))
    assert loaded.one_copy == (not any(whole))  # else the base is a second copy
    parts = ("query", "last", "response")
    pair = grafted(loaded, parts)
    batch = batch_of(pair, True, tiny.QUESTIONS[:3])
    assert torch.equal(read(batch, graft_name(PARTS)).logits, read(batch, "finetuned").logits)
    assert torch.equal(read(batch, "none").logits, read(batch, "base").logits)
    _, first = by_switching(pair, batch.batch.prompts[2], parts, 1)
    ours = read(batch, graft_name(parts)).logits[2]
    torch.testing.assert_close(ours, first, **CLOSE)
    for other in ("base", "finetuned"):
        assert (ours - read(batch, other).logits[2]).abs().max() > 1e-2


def shake(file):
    """Add noise to what an adapter holds whole: biases and saved modules, which begin as the base's."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    whole = [name for name in tensors if ".lora_" not in name]
    assert whole
    for name in whole:
        tensors[name] += 0.1 * torch.randn_like(tensors[name])
    save_file(tensors, file)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_tokens_are_told_from_heads_where_there_are_as_few(tmp_path, architecture):
    """Of three heads with norms of their own: the pass that looks for the tokens must not have three.

    Gemma's norms get the heads before the positions, Qwen's after them.
    """
    base = tiny.save_base(
        architecture, tmp_path / "base", num_attention_heads=3, num_key_value_heads=3, hidden_size=48
    )
    tuned = tiny.save_full(base, tmp_path / "tuned")
    parts = ("prefix", "last")
    pair = grafted(load_pair(base, tuned, dtype="float32", device="cpu"), parts)
    batch = batch_of(pair, True, tiny.QUESTIONS[:1])
    _, first = by_switching(pair, batch.batch.prompts[0], parts, 1)
    torch.testing.assert_close(read(batch, graft_name(parts)).logits[0], first, **CLOSE)


def test_models_that_turn_their_positions_at_another_speed_are_refused(make_pair):
    """What differs there is no weight but a buffer, and acts on no token by itself."""
    pair = make_pair("qwen2", "full")
    tuned = copy.deepcopy(pair.finetuned.module)
    tuned.model.rotary_emb.inv_freq *= 0.5
    with pytest.raises(PatchError, match=r"computed by itself, but 1 modules .*rotary_emb"):
        graft_sites(replace(pair, finetuned=replace(pair.finetuned, module=tuned)))


def test_a_hybrids_adapter_is_grafted_too(tmp_path):
    """Of recurrent layers it changes projections only, which act on each token by itself."""
    base = tiny.save_base("qwen3_next", tmp_path / "base")
    modules = ["q_proj", "in_proj_qkvz", "out_proj"]
    lora = tiny.save_adapter(base, tmp_path / "lora", target_modules=modules)
    parts = ("prefix", "last")
    pair = grafted(load_pair(base, lora, dtype="float32", device="cpu"), parts)
    batch = batch_of(pair, True, tiny.QUESTIONS[:1])
    assert torch.equal(read(batch, graft_name(PARTS)).logits, read(batch, "finetuned").logits)
    _, first = by_switching(pair, batch.batch.prompts[0], parts, 1)
    torch.testing.assert_close(read(batch, graft_name(parts)).logits[0], first, **CLOSE)


def test_what_does_not_act_token_by_token_is_refused(make_pair, tmp_path):
    with pytest.raises(PatchError, match=r"each token is computed by itself, but \d+ modules .*linear_attn"):
        graft_sites(make_pair("qwen3_next", "full"))
    config = Qwen3MoeConfig(
        vocab_size=len(tiny.tokenizer()), **tiny._GROUPED, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    tuned = tiny.save_full(tmp_path / "base", tmp_path / "tuned")
    with pytest.raises(PatchError, match=r"each token is computed by itself, but \d+ modules .*experts"):
        graft_sites(load_pair(tmp_path / "base", tuned, dtype="float32", device="cpu"))


def test_models_that_do_not_differ_by_weights_are_refused(qwen2, make_pair):
    with pytest.raises(PatchError, match="two models that differ, but all of their weights are equal"):
        graft_sites(load_pair(qwen2, qwen2, dtype="float32", device="cpu"))
    pair = make_pair("llama")
    gated = replace(pair.base, name="finetuned", interventions=(Gating(tiny.gates(pair.base.module)).on,))
    with pytest.raises(PatchError, match=r"differ in their weights, but .* gates"):
        graft_sites(replace(pair, finetuned=gated))


def test_models_of_other_shapes_are_refused(qwen2, tmp_path):
    larger = tiny.model("qwen2", intermediate_size=56)
    larger.save_pretrained(tmp_path)
    pair = load_pair(qwen2, tmp_path, dtype="float32", device="cpu")
    with pytest.raises(
        PatchError, match=r"models of one shape, but the finetuned one has no such 'model.layers.0.mlp"
    ):
        graft_sites(pair)


def test_unknown_parts_and_bare_passes_are_refused(make_pair):
    pair = make_pair("llama")
    with pytest.raises(PatchError, match=rf"parts among {', '.join(PLACES)}, but got \['answer'\]"):
        graft_side(pair, ["answer"])
    for name in ("graft:", "graft:prefix+answer"):
        with pytest.raises(PatchError, match=r"graft:PART\+PART among prefix, .* but got 'graft:"):
            parse_graft(name)
    assert parse_graft("graft:query+last") == ("query", "last")
    ids = torch.tensor([[5, 6, 7]])
    with (
        pytest.raises(PatchError, match=r"knows the parts of its chats, but .* bare pass"),
        graft_side(pair, ["query"]).active() as model,
    ):
        model(input_ids=ids)
    with pair.finetuned.active() as model:
        assert torch.isfinite(model(input_ids=ids).logits).all()  # the hooks are gone
