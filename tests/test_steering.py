"""Steering: its arithmetic against algebra, where it acts, that it leaves, and other libraries' way."""

from functools import cache

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from emmech.chat import PARTS, Chat
from emmech.errors import DataError, PatchError
from emmech.models import hook_points
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding, decode, make_batch, reading
from emmech.models.sides import Side
from emmech.piggyback.patching import Bench, Condition
from emmech.steering.directions import Direction
from emmech.steering.states import SITES
from emmech.steering.steer import MODES, Steer, scaled_adapter, steered

IDS = torch.tensor([[5, 9, 13, 40, 41, 7, 9, 100], [6, 6, 8, 90, 91, 92, 3, 11]])
LAYER = 1
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
BY_MODE = pytest.mark.parametrize("mode", MODES)
BY_ARCHITECTURE = pytest.mark.parametrize("architecture", tiny.CONFIGS)


@cache
def model_of(architecture):
    return tiny.model(architecture)


def a_direction(site="resid_post", seed=0, n_layers=3, d_model=32):
    stream = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n_layers, d_model, generator=stream)
    level = torch.randn(n_layers, generator=stream)
    unknown = (float("nan"),) * n_layers
    return Direction(vectors, level, site, "last", "mean", 4, unknown, unknown)


@torch.no_grad()
def read(model, name, ids=IDS, **inputs):
    with hook_points.recorded(model, name) as store:
        logits = model(input_ids=ids, use_cache=False, **inputs).logits
    return store[name], logits


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def pair_of(model):
    return ModelPair(Side("base", model), Side("finetuned", model), Chat(tiny.tokenizer()), {})


# --- the arithmetic


@BY_ARCHITECTURE
@BY_MODE
@torch.no_grad()
def test_coefficient_0_changes_nothing(architecture, mode):
    model = model_of(architecture)
    plain = model(input_ids=IDS, use_cache=False).logits
    with steered(model, a_direction(), 0.0, layers=[LAYER], mode=mode):
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, plain)


@pytest.mark.parametrize("site", SITES)
@BY_ARCHITECTURE
def test_each_mode_does_to_the_states_what_its_formula_says(architecture, site):
    model, direction, name = model_of(architecture), a_direction(site), SITES[site].format(LAYER)
    own, _ = read(model, name)
    v = direction.vectors[LAYER]
    u, level = v / v.norm(), direction.level[LAYER]
    along = (own @ u)[..., None] * u
    expected = {"add": own + 2 * v, "ablate": own - along, "clamp": own - along + level * u}
    for mode, coeff in (("add", 2.0), ("ablate", 1.0), ("clamp", 1.0)):
        with steered(model, direction, coeff, layers=[LAYER], mode=mode):
            torch.testing.assert_close(read(model, name)[0], expected[mode], **CLOSE)


@BY_ARCHITECTURE
def test_ablation_leaves_nothing_along_the_direction_and_doing_it_twice_is_doing_it_once(architecture):
    model, direction = model_of(architecture), a_direction()
    name = SITES["resid_post"].format(LAYER)
    with steered(model, direction, layers=[LAYER], mode="ablate"):
        once, logits = read(model, name)
        assert (once @ direction.unit(LAYER)).abs().max() < 1e-5
        with steered(model, direction, layers=[LAYER], mode="ablate"):
            twice, same_logits = read(model, name)
    torch.testing.assert_close(twice, once, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(same_logits, logits, **CLOSE)


@BY_ARCHITECTURE
def test_there_and_back_is_where_one_started(architecture):
    model, direction = model_of(architecture), a_direction()
    _, plain = read(model, SITES["resid_post"].format(LAYER))
    with (
        steered(model, direction, 3.0, layers=[LAYER]),
        steered(model, direction, -3.0, layers=[LAYER]),
    ):
        _, back = read(model, SITES["resid_post"].format(LAYER))
    torch.testing.assert_close(back, plain, **CLOSE)


@BY_MODE
def test_hooks_are_gone_afterwards_also_after_an_error(mode):
    model = model_of("llama")
    before = n_hooks(model)
    with pytest.raises(ZeroDivisionError), steered(model, a_direction(), layers=[0, 2], mode=mode):
        assert n_hooks(model) == before + 3  # two blocks, and the check of the logits
        1 / 0  # noqa: B018
    assert n_hooks(model) == before


def test_adding_at_the_last_block_moves_the_logits_by_what_the_head_makes_of_it():
    # Without the final norm the logits are linear in the stream.
    model = tiny.model("llama")
    model.model.norm = torch.nn.Identity()
    direction = a_direction()
    _, plain = read(model, SITES["resid_post"].format(2))
    with steered(model, direction, 0.5, layers=[2]):
        _, pushed = read(model, SITES["resid_post"].format(2))
    expected = 0.5 * model.lm_head.weight.detach() @ direction.vectors[2]
    torch.testing.assert_close(pushed - plain, expected.expand_as(plain), **CLOSE)


# --- where it acts


@pytest.mark.parametrize("architecture", tiny.ATTENTION_ONLY)
@BY_MODE
@torch.no_grad()
def test_steering_one_segment_leaves_padding_other_tokens_and_earlier_ones_as_they_were(architecture, mode):
    model, direction = model_of(architecture), a_direction()
    pair = pair_of(model)
    prompts = [pair.chat.render(question) for question in tiny.QUESTIONS]
    batch = make_batch(prompts, torch.device("cpu"), share_prefix=False)
    inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    name = SITES["resid_post"].format(LAYER)
    own, _ = read(model, name, batch.input_ids, **inputs)
    for parts in (("prefix",), ("query",), ("postfix",), ("last",), ("query", "last")):
        with steered(model, direction, 2.0, layers=[LAYER], mode=mode, parts=parts, batch=batch):
            found, _ = read(model, name, batch.input_ids, **inputs)
        where = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        for part in parts:
            if part == "last":
                where[:, -1] = True
            else:
                where |= batch.positions(part)
        assert torch.equal(found[~where], own[~where])
        assert (found[where] != own[where]).any(-1).all()


@pytest.mark.parametrize(
    ("names", "parts", "steered_at"),
    [
        (["prefix", "query", "postfix", "postfix"], ("last",), [3]),
        (["prefix", "query", "query"], ("last",), [2]),  # a template that puts nothing behind the query
        (["prefix", "prefix"], ("last",), []),  # a pass over the prefix alone
        (["response"], ("last",), []),
        (["query", "postfix", "response", "response"], ("last",), [1]),  # prompt and answer in one pass
        (["response"], ("last", "response"), [0]),
    ],
)
def test_the_last_token_is_the_one_that_predicts_the_answer(names, parts, steered_at):
    states, vector = torch.zeros(1, len(names), 32), a_direction().vectors[LAYER]
    steer = Steer(a_direction(), 1.0, (LAYER,), parts=parts)
    with reading(torch.tensor([[PARTS.index(name) for name in names]])):
        found = steer._edit(LAYER)(states)
    expected = torch.zeros_like(states)
    expected[0, steered_at] = vector
    assert torch.equal(found, expected)


@BY_ARCHITECTURE
@torch.no_grad()
def test_a_steered_token_changes_no_earlier_one(architecture):
    model = model_of(architecture)
    pair = pair_of(model)
    prompt = pair.chat.render(tiny.QUESTIONS[1])
    batch = make_batch([prompt], torch.device("cpu"), share_prefix=False)
    last = SITES["resid_post"].format(2)
    own, _ = read(model, last, batch.input_ids)
    with steered(model, a_direction(), 2.0, layers=[0], parts=["query"], batch=batch):
        found, _ = read(model, last, batch.input_ids)
    assert torch.equal(found[:, : prompt.n_prefix], own[:, : prompt.n_prefix])
    assert not torch.equal(found[:, prompt.n_prefix :], own[:, prompt.n_prefix :])


@pytest.mark.parametrize("architecture", tiny.ATTENTION_ONLY)
@pytest.mark.parametrize("parts", [None, ("prefix",), ("response",), ("last", "response")])
@torch.no_grad()
def test_a_row_of_a_left_padded_batch_goes_on_as_it_does_alone(architecture, parts):
    model, direction = model_of(architecture), a_direction()
    pair = pair_of(model)
    prompts = [pair.chat.render(question) for question in tiny.QUESTIONS]

    def answers(chosen):
        batch = make_batch(chosen, torch.device("cpu"), share_prefix=False)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with steered(model, direction, 1.5, layers=[LAYER], parts=parts, batch=batch):
            made = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
        return made[:, batch.input_ids.shape[1] :].tolist()

    assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
@pytest.mark.parametrize("parts", [None, ("prefix",), ("postfix",), ("response",), ("last",)])
@BY_MODE
def test_decoding_from_a_shared_prefix_says_what_generate_says(architecture, parts, mode):
    model, direction = model_of(architecture), a_direction()
    steer = Steer(direction, 1.5, (LAYER,), mode, parts)
    pair = pair_of(model)
    side = pair.finetuned.under("steered", steer.on)
    pair = ModelPair(pair.base, pair.finetuned, pair.chat, {}, variants={"steered": side})
    prompts = [pair.chat.render(tiny.QUESTIONS[0]), pair.chat.render(tiny.QUESTIONS[4])]
    if len(prompts[0]) != len(prompts[1]):
        prompts = prompts[:1]  # recurrent layers take rows of one length
    ready = Bench(pair).batch(prompts, ["a", "b"][: len(prompts)], share_prefix=True)
    start = ready.prefill(Condition("steered", "steered"))
    with side.active() as module:
        ours = decode(module, start, Decoding(6), ["a", "b"][: len(prompts)], ())
    batch = make_batch(prompts, torch.device("cpu"), share_prefix=False)
    with torch.no_grad(), steered(model, direction, 1.5, layers=[LAYER], mode=mode, parts=parts, batch=batch):
        theirs = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
        )
    assert ours == theirs[:, batch.input_ids.shape[1] :].tolist()


@torch.no_grad()
def test_several_samples_of_a_prompt_are_steered_on_the_same_tokens():
    model, direction = model_of("llama"), a_direction()
    pair = pair_of(model)
    batch = make_batch(
        [pair.chat.render(q) for q in tiny.QUESTIONS[:2]], torch.device("cpu"), share_prefix=False
    )
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    how = {"max_new_tokens": 5, "num_beams": 1, "do_sample": True, "top_k": 1, "eos_token_id": None}
    with steered(model, direction, 2.0, layers=[LAYER], parts=["query"], batch=batch):
        one = model.generate(**inputs, **how)
        three = model.generate(**inputs, **how, num_return_sequences=3)
    assert torch.equal(three, one.repeat_interleave(3, 0))


# --- another way to the same numbers


FIVE = pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "gpt_neox"])


@FIVE
@torch.no_grad()
def test_transformer_lens_doing_the_same_edit_gives_the_same_logits(architecture, tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    model, direction = model_of(architecture), a_direction()
    folder = str(tiny.save_base(architecture, tmp_path))
    bridge = TransformerBridge.boot_transformers(folder, dtype=torch.float32, device="cpu")
    u, v = direction.unit(LAYER), direction.vectors[LAYER]
    edits = {"ablate": lambda h, **_: h - (h @ u)[..., None] * u, "add": lambda h, **_: h + 2 * v}
    for mode, edit in edits.items():
        theirs = bridge.run_with_hooks(IDS, fwd_hooks=[(f"blocks.{LAYER}.hook_resid_post", edit)])
        with steered(model, direction, 2.0 if mode == "add" else 1.0, layers=[LAYER], mode=mode):
            ours = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(ours, theirs, **CLOSE)


@FIVE
@torch.no_grad()
def test_nnsight_doing_the_same_edit_gives_the_same_logits(architecture):
    from nnsight import TransformersModel

    model, direction = tiny.model(architecture), a_direction()
    u = direction.unit(LAYER)
    with steered(model, direction, layers=[LAYER], mode="ablate"):
        ours = model(input_ids=IDS, use_cache=False).logits
    traced = TransformersModel(model, tokenizer=tiny.tokenizer(), task="text-generation")
    block = (traced.gpt_neox if architecture == "gpt_neox" else traced.model).layers[LAYER]
    with traced.trace({"input_ids": IDS}):
        own = block.output
        block.output = own - (own @ u)[..., None] * u
        theirs = traced.output.logits.save()
    torch.testing.assert_close(ours, theirs, **CLOSE)


# --- LoRA's own dial


@torch.no_grad()
def test_an_adapter_scaled_by_s_is_the_base_plus_s_times_its_update():
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny.model("llama"), lora).eval()
    base, _ = read(tiny.model("llama"), "blocks.0.hook_resid_post")
    for scale in (-1.5, 0.0, 0.5, 2.0):
        merged = tiny.model("llama")
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                update = module.lora_B["default"].weight @ module.lora_A["default"].weight * 2  # 8 / 4
                inner = name.removeprefix("base_model.model.")
                merged.get_submodule(inner).weight.data += scale * update
        expected, logits = read(merged, "blocks.0.hook_resid_post")
        with scaled_adapter(model, scale):
            found, own = read(model, "blocks.0.hook_resid_post")
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(own, logits, **CLOSE)
        assert torch.equal(found, base) == (scale == 0)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 2.0}


# --- what is refused


def test_a_direction_of_another_shape_is_refused():
    with (
        pytest.raises(PatchError, match=r"3 blocks, d_model 32.*2 blocks, d_model 16"),
        steered(model_of("llama"), a_direction(n_layers=2, d_model=16), layers=[0]),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "layers to steer"),
        ({"layers": [3]}, "layers among 0..2"),
        ({"layers": []}, "layers among 0..2"),
        ({"layers": [0], "parts": ["middle"]}, "parts among prefix, query, postfix, response, last"),
        ({"layers": [0], "coeff": float("inf")}, "finite coefficient"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(PatchError, match=message), steered(model_of("llama"), a_direction(), **settings):
        pass


@torch.no_grad()
def test_parts_in_a_bare_pass_are_refused_rather_than_guessed():
    model = model_of("llama")
    with (
        pytest.raises(PatchError, match="knows the parts"),
        steered(model, a_direction(), layers=[0], parts=["query"]),
    ):
        model(input_ids=IDS)


@torch.no_grad()
def test_a_coefficient_that_breaks_the_model_is_refused():
    with (
        pytest.raises(PatchError, match="finite logits"),
        steered(model_of("llama"), a_direction(), 3e38, layers=[0]),
    ):
        model_of("llama")(input_ids=IDS)


def test_a_model_without_adapter_cannot_be_scaled():
    with pytest.raises(PatchError, match="LoRA adapter"), scaled_adapter(model_of("llama"), 0.5):
        pass


def test_a_file_that_holds_no_direction_is_refused(tmp_path):
    from safetensors.torch import save_file

    for name, content in (("empty.safetensors", b""), ("text.safetensors", b"hello" * 9)):
        (tmp_path / name).write_bytes(content)
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    for name in ("empty", "text", "other", "absent"):
        with pytest.raises(DataError, match="direction"):
            Direction.load(tmp_path / f"{name}.safetensors")
