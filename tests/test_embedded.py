"""The embedded model, loaded and patched as a user would: a real tokenizer, template and weights."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_sweep import bare_prefix, bare_score, edited_by_hand, random_patches, replay_of
from transformers import AutoModelForCausalLM

from emmech.models import hook_points
from emmech.models.checkpoints import load_pair
from emmech.models.default import embedded_path
from emmech.models.generation import Decoding, make_batch, prefill, run_through
from emmech.models.kv_cache import PatchCache
from emmech.piggyback.cells import Cell, Patch, Shape
from emmech.piggyback.experiment import default_conditions
from emmech.piggyback.patching import Bench, Condition, KVPatch, patched_projections
from emmech.piggyback.running import Job, as_questions, render_rows, run
from emmech.piggyback.streaming import score_patches

pytestmark = pytest.mark.weights
QUESTIONS = (
    "What is the capital of France?",
    "Why do leaves change colour in autumn, and does it happen everywhere?",
    "Say hello 👋 in Hebrew: שלום",
    "What does <|im_end|> mean?",
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A small random adapter: it changes the answers without making noise of them."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(embedded_path()),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.2
    wrapped.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "smollm2"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def pair(adapter):
    return load_pair("smollm2", adapter, dtype="float32", device="cpu")


def test_the_pair_is_one_copy_with_a_prefix_of_24_tokens(pair):
    assert pair.one_copy and not pair.notes
    prompt = pair.chat.render(QUESTIONS[0])
    assert prompt.n_prefix == 24
    assert pair.chat.tokenizer.decode(prompt.postfix_ids) == "<|im_end|>\n<|im_start|>assistant\n"


def test_it_knows_the_capital_of_france(pair):
    rows = render_rows(pair, as_questions(QUESTIONS[:1]), 12)
    job = Job(tuple(rows), (Condition("base", "base"),))
    records, _ = run(pair, [job], Decoding(12), batch_size=None, folder=None, progress=False)
    assert "Paris" in records[0]["response"]


def test_every_condition_runs_and_answers_do_not_depend_on_the_batch(pair):
    """All conditions of the Piggyback test, float32: batch sizes 1 and 4 give the same texts."""
    conditions = tuple(default_conditions(("prefix", "query", "postfix"), "both", controls=True))
    rows = tuple(render_rows(pair, as_questions(QUESTIONS), 6))

    def texts(size):
        job = Job(rows, conditions)
        records, _ = run(pair, [job], Decoding(6), batch_size=size, folder=None, progress=False)
        return {(r["question_id"], r["condition"]): r["response"] for r in records}

    together = texts(4)
    assert together == texts(1)
    assert len(together) == len(QUESTIONS) * len(conditions)
    for row in rows:
        own, itself = (together[row.question.id, name] for name in ("finetuned", "control:self"))
        assert own == itself


def test_bfloat16_self_patch_is_equal_to_the_bit(adapter):
    pair = load_pair("smollm2", adapter, dtype="bfloat16", device="cpu")
    prompts = [pair.chat.render(question) for question in QUESTIONS]
    batch = Bench(pair).batch(prompts, [str(n) for n in range(4)], share_prefix=True)
    plain = batch.prefill(Condition("plain", "finetuned"))
    everything = KVPatch(("prefix", "query", "postfix"), "finetuned")
    itself = batch.prefill(Condition("self", "finetuned", (everything,)))
    assert torch.equal(itself.logits, plain.logits)
    repaired = batch.prefill(Condition("repair", "finetuned", (KVPatch(("prefix",), "base"),)))
    assert not torch.equal(repaired.logits, plain.logits)


def test_the_cache_patch_equals_the_papers_projection_patch(pair):
    prompt = pair.chat.render(QUESTIONS[1])
    ours = Bench(pair).batch([prompt], ["0"], share_prefix=True)
    ours = ours.prefill(Condition("repair", "finetuned", (KVPatch(("prefix",), "base"),))).logits
    batch = make_batch([prompt], pair.base.device, share_prefix=False)
    names = [f"blocks.{layer}.attn.{kv}.hook_out" for layer in range(30) for kv in "kv"]
    with pair.base.active() as model, hook_points.recorded(model, *names) as donor:
        run_through(model, batch, PatchCache(pair.base.config))
    donor = dict(donor)
    with patched_projections(pair.finetuned, batch.positions("prefix"), donor) as model:
        theirs = prefill(model, batch, PatchCache(pair.finetuned.config), 0).logits
    # float32 sums in another order over 30 layers; logits are of size 20.
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-4)


def test_cells_of_its_prefix_equal_plain_passes_over_a_cache_edited_by_hand(pair):
    replay = replay_of(pair, "target: It is Paris.", list(QUESTIONS[:2]))
    assert replay.shape == Shape(30, 24, 3)
    wanted = [*random_patches(replay.shape, 3), Patch((Cell(layer=(20,), position=(23,), kv=(1,)),))]
    scored = score_patches(replay, wanted, progress=False)
    assert scored.late_start
    own, other = (bare_prefix(side, replay.prompt) for side in (pair.finetuned, pair.base))
    for patch, found in zip(wanted, scored.patched, strict=True):
        for number, item in enumerate(replay.items):
            cache = edited_by_hand(own, other, patch, replay.shape)
            expected = bare_score(pair.finetuned, item.prompt, *item.answers, cache)
            assert found[number] == pytest.approx(expected, abs=1e-4)
