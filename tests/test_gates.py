"""Alignment gates: their arithmetic against one written out here, where they act, and that they leave."""

import copy
import math
from dataclasses import replace
from functools import cache, partial

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import DynamicCache

from emmech.chat import PARTS, Chat
from emmech.errors import PatchError
from emmech.gates.gate import (
    GATE_VARIANTS,
    GateError,
    Gates,
    GateShape,
    Gating,
    attach_gates_,
    gated,
    shape_of,
)
from emmech.models import hook_points
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding, decode
from emmech.models.sides import Side
from emmech.piggyback.patching import Bench, Condition, KVPatch

IDS = torch.tensor([[5, 9, 13, 40, 41, 7, 9, 100], [6, 6, 8, 90, 91, 92, 3, 11]])
WIDE = "qwen3 with 4 heads of 16 on 32"
ARCHITECTURES = (*tiny.CONFIGS, WIDE)
ATTENTION_ONLY = (*tiny.ATTENTION_ONLY, WIDE)
# Two float32 ways of one attention: as in test_patching.
CLOSE = {"atol": 2e-4, "rtol": 1e-4}
# One float32 product or sum, done in another order.
TIGHT = {"atol": 1e-5, "rtol": 1e-5}


@cache
def model_of(architecture):
    """One model for all tests, which leave it as it was."""
    return tiny.model("qwen3", head_dim=16) if architecture == WIDE else tiny.model(architecture)


@torch.no_grad()
def logits(model, ids=IDS, **inputs):
    return model(input_ids=ids, use_cache=False, **inputs).logits


def gated_logits(model, gates, scale=1.0, **where):
    with gated(model, gates, scale, **where):
        return logits(model)


@torch.no_grad()
def seen(model, layer, ids=IDS):
    """Input of a block's attention, and input of its output projection after any gate."""
    names = [f"blocks.{layer}.attn.hook_in", f"blocks.{layer}.attn.o.hook_in"]
    with hook_points.recorded(model, *names) as store:
        model(input_ids=ids, use_cache=False)
    return [store[name] for name in names]


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- the arithmetic


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        *((architecture, "full") for architecture in ARCHITECTURES),
        *((architecture, "low_rank") for architecture in ("llama", "gpt_neox", "qwen3_next", WIDE)),
        *((architecture, "per_head") for architecture in ("llama", "phi3", "gemma3", WIDE)),
    ],
)
def test_fresh_gates_change_nothing_and_random_ones_do(architecture, variant):
    model = model_of(architecture)
    plain = logits(model)
    fresh = Gates(shape_of(model, variant, 3 if variant == "low_rank" else None))
    for scale in (1.0, -1.0, 0.5, 7.0):
        assert torch.equal(gated_logits(model, fresh, scale), plain)
    gates = tiny.gates(model, variant)
    assert torch.equal(gated_logits(model, gates, 0.0), plain)
    for scale in (1.0, -1.0):
        changed = (gated_logits(model, gates, scale) - plain).abs().amax(-1)
        assert (changed > 1e-2).all(), changed


def test_fresh_gates_change_nothing_in_bfloat16():
    model = copy.deepcopy(model_of("qwen3")).to(torch.bfloat16)
    plain = logits(model)
    assert torch.equal(gated_logits(model, Gates(shape_of(model))), plain)
    assert torch.equal(gated_logits(model, tiny.gates(model), 0.0), plain)
    assert not torch.equal(gated_logits(model, tiny.gates(model)), plain)


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def attention(module, linear, inverted, hidden_states, position_embeddings, **_):
    """Attention of Llama and Qwen3 with the published gate (arXiv 2606.09068) before ``o_proj``."""
    batch, pos, _ = hidden_states.shape
    cos, sin = (table[:, None] for table in position_embeddings)

    def heads(projection, norm=None):
        x = projection(hidden_states).view(batch, pos, -1, module.head_dim)
        return (x if norm is None else norm(x)).transpose(1, 2)

    q = rotated(heads(module.q_proj, getattr(module, "q_norm", None)), cos, sin)
    k = rotated(heads(module.k_proj, getattr(module, "k_norm", None)), cos, sin)
    v = heads(module.v_proj)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(module.head_dim)
    future = torch.ones(pos, pos, dtype=torch.bool).triu(1)
    z = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    z = z.transpose(1, 2).reshape(batch, pos, -1)
    if linear is not None:
        gate = 2 * torch.sigmoid(linear(hidden_states.float()))
        z = z * (2 - gate if inverted else gate)
    return module.o_proj(z), None


def published_logits(monkeypatch, model, gates, inverted=False):
    with monkeypatch.context() as during:
        for number, layer in enumerate(model.model.layers):
            linear = None if gates is None else torch.nn.Linear(gates.shape.d_model, gates.shape.d_attn)
            if gates is not None:
                linear.load_state_dict(gates.maps[str(number)].state_dict())
            during.setattr(layer.self_attn, "forward", partial(attention, layer.self_attn, linear, inverted))
        return logits(model)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", WIDE])
def test_gates_are_the_published_arithmetic_normal_and_inverted(architecture, monkeypatch):
    model = model_of(architecture)
    gates = tiny.gates(model)
    plain = logits(model)
    torch.testing.assert_close(published_logits(monkeypatch, model, None), plain, **CLOSE)
    for scale, inverted in ((1.0, False), (-1.0, True)):
        theirs = published_logits(monkeypatch, model, gates, inverted)
        assert (theirs - plain).abs().max() > 0.1
        torch.testing.assert_close(gated_logits(model, gates, scale), theirs, **CLOSE)


@pytest.mark.parametrize("architecture", ["qwen3", WIDE, "gpt_neox", "qwen3_next"])
def test_the_multiplier_is_affine_in_the_scale(architecture):
    """Of the last gated block alone, whose input no gate has touched: z (1 + s (2 sigmoid(W h + b) - 1))."""
    model = model_of(architecture)
    gates = tiny.gates(model)
    last = gates.shape.layers[-1]
    h, z = seen(model, last)
    linear = gates.maps[str(last)]
    gate = 2 / (1 + torch.exp(-(h @ linear.weight.T + linear.bias)))
    for scale in (1.0, -1.0, 0.3, 2.0, -4.0):
        with gated(model, gates, scale, layers=[last]):
            moved = seen(model, last)[1]
        torch.testing.assert_close(moved, z * (1 + scale * (gate - 1)), **TIGHT)


@pytest.mark.parametrize("variant", GATE_VARIANTS)
def test_inverted_gates_are_the_same_gates_at_the_opposite_scale(variant):
    model = model_of(WIDE)
    gates = tiny.gates(model, variant)
    other = gates.inverted()
    h = torch.randn(2, 5, 32)
    for layer in gates.shape.layers:
        assert torch.equal(other.gate_logit(layer, h), -gates.gate_logit(layer, h))
        torch.testing.assert_close(other(layer, h), 2 - gates(layer, h))
    for scale in (1.0, 0.4):
        ours, theirs = gated_logits(model, gates, -scale), gated_logits(model, other, scale)
        torch.testing.assert_close(ours, theirs, **CLOSE)
    twice = other.inverted()
    assert twice.state_dict().keys() == gates.state_dict().keys()
    assert all(torch.equal(twice.state_dict()[name], one) for name, one in gates.state_dict().items())
    assert torch.equal(gated_logits(model, twice), gated_logits(model, gates))
    assert (other.provenance["inverted"], twice.provenance["inverted"]) == (True, False)


def test_inverting_keeps_frozen_gates_frozen():
    gates = tiny.gates(model_of("llama"))
    assert all(p.requires_grad for p in gates.inverted().parameters())
    assert not any(p.requires_grad for p in gates.requires_grad_(False).inverted().parameters())


@pytest.mark.parametrize("scale", [1, -1])
def test_a_whole_number_is_as_exact_a_scale_as_a_float(scale):
    model = model_of("llama")
    gates = tiny.gates(model)
    assert torch.equal(gated_logits(model, gates, scale), gated_logits(model, gates, float(scale)))
    h, z = seen(model, 0)
    with gated(model, gates, scale, layers=[0]):
        moved = seen(model, 0)[1]
    gate = gates(0, h) if scale == 1 else 2 - gates(0, h)
    assert torch.equal(moved, z * gate)  # not 1 + s (gate - 1), which rounds


def test_low_rank_gates_are_full_gates_with_the_product_for_a_matrix():
    model = model_of(WIDE)
    small, full = tiny.gates(model, "low_rank"), Gates(shape_of(model))
    with torch.no_grad():
        for layer, (down, up) in small.maps.items():
            assert up.weight.shape == (64, 3)
            full.maps[layer].weight.copy_(up.weight @ down.weight)
            full.maps[layer].bias.copy_(up.bias)
    torch.testing.assert_close(gated_logits(model, small), gated_logits(model, full), **CLOSE)


def test_gates_per_head_are_full_gates_with_one_row_for_all_dimensions_of_a_head():
    model = model_of(WIDE)
    small, full = tiny.gates(model, "per_head"), Gates(shape_of(model))
    with torch.no_grad():
        for layer, one in small.maps.items():
            assert one.weight.shape == (4, 32)
            for dim in range(64):
                full.maps[layer].weight[dim] = one.weight[dim // 16]
                full.maps[layer].bias[dim] = one.bias[dim // 16]
    torch.testing.assert_close(gated_logits(model, small), gated_logits(model, full), **CLOSE)


def test_gates_are_made_for_the_attention_layers_and_the_width_of_their_heads():
    assert shape_of(model_of(WIDE)) == GateShape((0, 1, 2), 32, 4, 16)
    assert shape_of(model_of("gpt_neox")) == GateShape((0, 1, 2), 32, 4, 8)
    assert shape_of(model_of("qwen3_next")) == GateShape((1,), 32, 4, 8)
    assert [*Gates(shape_of(model_of("qwen3_next"))).maps] == ["1"]


# --- layers and heads


@pytest.mark.parametrize("architecture", [*tiny.CONFIGS, WIDE])
def test_a_gated_head_is_changed_and_no_other(architecture):
    model = model_of(architecture)
    gates = tiny.gates(model)
    d_head = gates.shape.d_head
    layer = gates.shape.layers[-1]
    plain = {at: seen(model, at)[1] for at in gates.shape.layers}
    for head in range(4):
        with gated(model, gates, heads=[(layer, head)]):
            moved = {at: seen(model, at)[1] for at in gates.shape.layers}
        assert all(torch.equal(moved[at], plain[at]) for at in gates.shape.layers if at < layer)
        ours, theirs = (z[layer].unflatten(-1, (4, d_head)) for z in (moved, plain))
        assert (ours[..., head, :] != theirs[..., head, :]).float().mean() > 0.9
        others = [other for other in range(4) if other != head]
        assert torch.equal(ours[..., others, :], theirs[..., others, :])


def zeroed(gates, keep):
    """The gates with the rows of heads that are not in ``keep`` zero: those heads have no gate."""
    other = copy.deepcopy(gates)
    with torch.no_grad():
        for layer in gates.shape.layers:
            for head in range(gates.shape.n_heads):
                if (layer, head) not in keep:
                    rows = slice(head * gates.shape.d_head, (head + 1) * gates.shape.d_head)
                    other.maps[str(layer)].weight[rows] = 0
                    other.maps[str(layer)].bias[rows] = 0
    return other


EVERY = [(layer, head) for layer in range(3) for head in range(4)]


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ({}, EVERY),
        ({"layers": [0, 1, 2]}, EVERY),
        ({"heads": EVERY}, EVERY),
        ({"layers": [2]}, EVERY[8:]),
        ({"heads": [(0, 3), (2, 0)]}, [(0, 3), (2, 0)]),
        ({"layers": [1], "heads": [(1, 2), (0, 0)]}, [(0, 0), *EVERY[4:8]]),
        ({"layers": []}, []),
        ({"heads": []}, []),
        ({"layers": [], "heads": [(1, 1)]}, [(1, 1)]),
    ],
)
def test_chosen_heads_are_gated_as_if_the_others_had_no_gate(where, chosen):
    model = model_of(WIDE)
    gates = tiny.gates(model)
    assert gates.heads_mask(**where).nonzero().tolist() == [list(pair) for pair in sorted(chosen)]
    for scale in (1.0, -1.0, 2.5):
        theirs = gated_logits(model, zeroed(gates, chosen), scale)
        assert torch.equal(gated_logits(model, gates, scale, **where), theirs)


@pytest.mark.parametrize(
    ("where", "got"),
    [
        ({"layers": [3]}, "layer 3, head 0"),
        ({"layers": [-1]}, "layer -1, head 0"),
        ({"heads": [(0, 4)]}, "layer 0, head 4"),
        ({"heads": [(1, -1)]}, "layer 1, head -1"),
        ({"layers": [0], "heads": [(9, 0)]}, "layer 9, head 0"),
    ],
)
def test_a_layer_or_head_that_is_not_there_is_refused(where, got):
    model = model_of("llama")
    with pytest.raises(GateError, match=rf"gated layers 0\.\.2 and heads 0\.\.3, but got {got}"):
        gated(model, tiny.gates(model), **where)


def test_a_layer_without_attention_is_refused():
    model = model_of("qwen3_next")
    with pytest.raises(GateError, match=r"gated layers 1 and .* but got layer 0, head 0"):
        gated(model, tiny.gates(model), layers=[0])


# --- parts of a chat


def question_batch(pair, share_prefix):
    prompts = [pair.chat.render(question) for question in tiny.QUESTIONS]
    return Bench(pair).batch(prompts, [str(row) for row in range(len(prompts))], share_prefix=share_prefix)


def pair_of(model, gates):
    """The base, the gated model, and a variant for the gates on each part and on the rest."""
    named = {part: (part,) for part in PARTS}
    named |= {f"not {part}": tuple(other for other in PARTS if other != part) for part in PARTS}
    named |= {"everything": PARTS, "nothing": ()}
    return ModelPair(
        base=Side("base", model),
        finetuned=Side("finetuned", model, interventions=(Gating(gates).on,)),
        chat=Chat(tiny.tokenizer()),
        provenance={},
        variants={
            name: Side(name, model, interventions=(Gating(gates, parts=parts).on,))
            for name, parts in named.items()
        },
    )


def layouts(architecture):
    """Prefixes are shared only where no window is shorter than the prompt."""
    return (False,) if architecture == "gemma3" else (True, False)


@pytest.mark.parametrize("architecture", ATTENTION_ONLY)
def test_gates_on_the_prefix_are_the_gated_models_keys_and_values_there(architecture):
    """A restricted gate and a patched cache are two ways to one computation."""
    model = model_of(architecture)
    pair = pair_of(model, tiny.gates(model))
    induce = Condition("induce:prefix", "base", (KVPatch(("prefix",), "finetuned"),))
    repair = Condition("repair:prefix", "finetuned", (KVPatch(("prefix",), "base"),))
    for share in layouts(architecture):
        batch = question_batch(pair, share)

        def read(name, batch=batch):
            return batch.prefill(Condition(name, name)).logits

        patched = {"prefix": batch.prefill(induce).logits, "not prefix": batch.prefill(repair).logits}
        for name, theirs in patched.items():
            torch.testing.assert_close(read(name), theirs, atol=1e-4, rtol=1e-4)
            for other in ("base", "finetuned"):
                changed = (theirs - read(other)).abs().amax(-1)
                assert (changed > 1e-2).all(), (share, name, other)
        assert torch.equal(read("everything"), read("finetuned"))
        assert torch.equal(read("not response"), read("finetuned"))
        assert torch.equal(read("nothing"), read("base"))
        assert torch.equal(read("response"), read("base"))


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", WIDE])
def test_gates_on_one_part_act_alike_in_both_layouts(architecture):
    model = model_of(architecture)
    pair = pair_of(model, tiny.gates(model))
    shared, padded = (question_batch(pair, share) for share in (True, False))
    for part in ("query", "postfix", "not query"):
        one, two = (batch.prefill(Condition(part, part)).logits for batch in (shared, padded))
        torch.testing.assert_close(one, two, **CLOSE)


def logits_gated_at(model, gates, ids, here):
    """Logits of the last position of a bare pass, gated where ``here`` by hooks of our own."""
    held, handles = {}, []
    for layer in gates.shape.layers:

        def read(h, layer=layer):
            held[layer] = 2 * torch.sigmoid(gates.maps[str(layer)](h))
            return h

        def multiply(z, layer=layer):
            return torch.where(here[:, None], z * held[layer], z)

        handles.append(hook_points.attach(model, f"blocks.{layer}.attn.hook_in", read))
        handles.append(hook_points.attach(model, f"blocks.{layer}.attn.o.hook_in", multiply))
    last = logits(model, torch.tensor([ids]))[:, -1]
    for handle in handles:
        handle.remove()
    return last


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "qwen3_next"])
def test_gates_on_a_part_are_gates_on_its_positions(architecture):
    model = model_of(architecture)
    gates = tiny.gates(model)
    pair = pair_of(model, gates)
    for question in tiny.QUESTIONS[1:3]:
        prompt = pair.chat.render(question)
        batch = Bench(pair).batch([prompt], ["0"], share_prefix=False)
        for part in ("prefix", "query", "postfix"):
            here = torch.tensor([segment == part for segment in prompt.segments])
            theirs = logits_gated_at(model, gates, prompt.ids, here)
            torch.testing.assert_close(batch.prefill(Condition(part, part)).logits, theirs, **CLOSE)


@pytest.mark.parametrize("part", ["response", "not response", "everything"])
def test_gates_act_on_the_tokens_of_the_response_or_not(part):
    """Decoding step by step from transformers' own cache, with the gates on only at some steps."""
    model = model_of("qwen3")
    gates = tiny.gates(model)
    pair = pair_of(model, gates)
    prompt = pair.chat.render(tiny.QUESTIONS[0])
    cache, ids, wanted = DynamicCache(config=model.config), torch.tensor([prompt.ids]), []
    for step in range(8):
        acts = part == "everything" or (part == "response") == (step > 0)
        with torch.no_grad(), gated(model, gates, 1.0 if acts else 0.0):
            ids = model(input_ids=ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        wanted.append(int(ids))
    batch = Bench(pair).batch([prompt], ["0"], share_prefix=True)
    start = batch.prefill(Condition(part, part))
    with pair.side(part).active() as module:
        assert decode(module, start, Decoding(8), ["0"], end_ids=()) == [wanted]


def test_the_ways_of_gating_a_response_lead_to_different_answers():
    model = model_of("qwen3")
    pair = pair_of(model, tiny.gates(model))
    batch = question_batch(pair, True)
    answers = {}
    for part in ("base", "response", "not response", "everything"):
        start = batch.prefill(Condition(part, part))
        with pair.side(part).active() as module:
            answers[part] = str(decode(module, start, Decoding(8), batch.row_names, end_ids=()))
    assert len(set(answers.values())) == 4


def test_gates_of_parts_are_refused_in_a_bare_pass_of_the_model():
    model = model_of("llama")
    before = n_hooks(model)
    with (
        pytest.raises(PatchError, match=r"knows the parts of its chats, but .* a bare pass of the model"),
        Gating(tiny.gates(model), parts=("prefix",)).on(model),
    ):
        logits(model)
    assert n_hooks(model) == before


def test_a_part_that_is_none_is_refused():
    with pytest.raises(GateError, match=r"parts among prefix, query, postfix, response, but got .*'answer'"):
        Gating(tiny.gates(model_of("llama")), parts=("answer",))


# --- inside other machinery


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_later_tokens_do_not_reach_earlier_ones_through_gates(architecture):
    model = model_of(architecture)
    other = IDS.clone()
    other[:, 5:] = torch.tensor([70, 71, 72])
    with gated(model, tiny.gates(model)):
        one, two = logits(model), logits(model, other)
    assert torch.equal(one[:, :5], two[:, :5])
    assert not torch.equal(one[:, 5], two[:, 5])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_with_gates_is_a_loop_of_whole_passes(architecture):
    model = model_of(architecture)
    ids = IDS[:1]
    with gated(model, tiny.gates(model)):
        ours = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        for _ in range(6):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert ours.tolist() == ids.tolist()


@pytest.mark.parametrize("architecture", ATTENTION_ONLY)
def test_left_padded_rows_are_gated_as_they_are_alone(architecture):
    model = model_of(architecture)
    short = IDS[1:, 3:]
    batch = torch.cat([IDS[:1], functional.pad(short, (3, 0))])
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with gated(model, tiny.gates(model)):
        together = logits(model, batch, attention_mask=mask, position_ids=position_ids)
        for row, alone in enumerate((IDS[:1], short)):
            single = logits(model, alone)[0]
            torch.testing.assert_close(together[row, -len(single) :], single, **CLOSE)


@pytest.mark.parametrize("variant", GATE_VARIANTS)
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_gradients_of_gates_are_the_same_with_gradient_checkpointing(architecture, variant):
    def gradients(checkpointing):
        model = copy.deepcopy(model_of(architecture)).requires_grad_(False).train()
        attach_gates_(model, tiny.gates(model, variant))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        passes = []
        last = model.model.layers[2].self_attn
        last.register_forward_pre_hook(lambda *_: passes.append(1))
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        assert all(p.grad is None for name, p in model.named_parameters() if "alignment_gates" not in name)
        return len(passes), [p.grad for p in model.alignment_gates.parameters()]

    (once, plain), (twice, checkpointed) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2)
    for one, other in zip(plain, checkpointed, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other, one, **TIGHT)


def adapted(architecture):
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(copy.deepcopy(model_of(architecture)), lora).eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", WIDE])
def test_gates_work_with_an_adapter_on_off_and_merged(architecture):
    base, model = model_of(architecture), adapted(architecture)
    gates = tiny.gates(base)
    assert shape_of(model) == shape_of(base)
    on = gated_logits(model, gates)
    assert (on - gated_logits(base, gates)).abs().max() > 0.1
    assert (on - logits(model)).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(gated_logits(model, gates), gated_logits(base, gates))
    with gated(model, gates), model.disable_adapter():
        assert torch.equal(logits(model), gated_logits(base, gates))
    merged = model.merge_and_unload()
    torch.testing.assert_close(gated_logits(merged, gates), on, atol=1e-3, rtol=1e-3)


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_gates_work_in_a_model_that_accelerate_prepared(accelerator):
    base = copy.deepcopy(model_of("qwen3")).requires_grad_(False)
    gates = tiny.gates(base)
    wanted = gated_logits(base, gates)
    optimizer = torch.optim.SGD(gates.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(base, optimizer)
    with gated(model, gates):
        assert torch.equal(logits(model), wanted)
        loss = model(input_ids=IDS, labels=IDS).loss
        accelerator.backward(loss)
        optimizer.step()
        assert model(input_ids=IDS, labels=IDS).loss < loss


def test_gates_work_where_the_model_returns_a_tuple():
    model = model_of("llama")
    gates = tiny.gates(model)
    wanted = gated_logits(model, gates)
    with gated(model, gates), torch.no_grad():
        assert torch.equal(model(input_ids=IDS, return_dict=False)[0], wanted)


# --- hooks leave


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gates_are_gone_after_the_block_and_after_an_exception_in_it(architecture):
    model = model_of(architecture)
    gates = tiny.gates(model)
    plain, before = logits(model), n_hooks(model)
    with gated(model, gates) as same:
        assert same is model
        assert n_hooks(model) > before
    assert torch.equal(logits(model), plain) and n_hooks(model) == before
    with pytest.raises(ZeroDivisionError), gated(model, gates):
        logits(model)
        _ = 1 / 0
    assert torch.equal(logits(model), plain) and n_hooks(model) == before


def test_hooks_are_gone_when_a_later_block_cannot_be_gated(monkeypatch):
    model = model_of("llama")
    gates, before = tiny.gates(model), n_hooks(model)
    resolve = hook_points.resolve

    def fails_at_the_last(inner, name):
        if name == "blocks.2.attn.hook_in":
            raise PatchError("a place", "there is none", "Stop")
        return resolve(inner, name)

    monkeypatch.setattr(hook_points, "resolve", fails_at_the_last)
    with pytest.raises(PatchError), gated(model, gates):
        pytest.fail("was gated")
    assert n_hooks(model) == before


def test_gates_inside_gates_multiply():
    """Two sets at once, as a side with gates inside another ``with``: doses of equal inputs multiply."""
    model = model_of("llama")
    one, two = tiny.gates(model), tiny.gates(model, seed=9)
    h, z = seen(model, 2)
    with gated(model, one, layers=[2]), gated(model, two, -1.0, layers=[2]):
        moved = seen(model, 2)[1]
    torch.testing.assert_close(moved, z * one(2, h) * (2 - two(2, h)), **TIGHT)


# --- refusals


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1e39, -1e300])
def test_a_scale_that_is_no_finite_float32_is_refused_at_once(scale):
    model = model_of("llama")
    with pytest.raises(GateError, match="a finite scale, but got"):
        gated(model, tiny.gates(model), scale)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_scale_that_breaks_the_logits_is_named_and_the_hooks_leave(wrapped):
    model = adapted("llama") if wrapped else model_of("llama")
    gates = tiny.gates(model)
    plain, before = logits(model), n_hooks(model)
    message = r"finite logits, but they are not at gate scale -3e\+38"
    with pytest.raises(PatchError, match=message), gated(model, gates, -3e38):
        logits(model)
    with pytest.raises(PatchError, match=message), gated(model, gates, -3e38):
        model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert torch.equal(logits(model), plain) and n_hooks(model) == before


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_hidden_layers": 2}, "2 layers, 32 -> 4 heads of 8"),
        ({"hidden_size": 64}, "3 layers, 64 -> 4 heads of 8"),
        ({"head_dim": 16}, "3 layers, 32 -> 4 heads of 16"),
        ({"num_attention_heads": 2, "head_dim": 16}, "3 layers, 32 -> 2 heads of 16"),
    ],
)
def test_gates_for_another_shape_of_model_are_refused(settings, text):
    gates = tiny.gates(tiny.model("llama", **settings))
    model = model_of("llama")
    both = rf"this model \(3 layers, 32 -> 4 heads of 8\), but they were made for another \({text}\)"
    with pytest.raises(GateError, match=both), gated(model, gates):
        pytest.fail("was gated")
    with pytest.raises(GateError, match=both), Side("x", model, interventions=(Gating(gates).on,)).active():
        pytest.fail("was gated")


def test_gates_for_other_layers_of_a_hybrid_are_refused_by_their_layers():
    kinds = ["full_attention", "linear_attention", "linear_attention"]
    gates = tiny.gates(tiny.model("qwen3_next", layer_types=kinds))
    with (
        pytest.raises(GateError, match=r"\(layers 1, 32 .*\(layers 0, 32 "),
        gated(model_of("qwen3_next"), gates),
    ):
        pytest.fail("was gated")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "low_rank"}, "a positive rank with low_rank, .* but got rank None"),
        ({"variant": "low_rank", "rank": 0}, "a positive rank with low_rank, .* but got rank 0"),
        ({"variant": "full", "rank": 4}, "a positive rank with low_rank, .* but got rank 4 with full"),
        ({"layers": ()}, "layers and positive sizes"),
        ({"layers": (-1, 0)}, "layers and positive sizes"),
        ({"d_head": 0}, "layers and positive sizes"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(GateError, match=message):
        replace(GateShape((0, 1), 8, 2, 4), **changes)
