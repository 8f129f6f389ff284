"""Decoding: independent of order, batch size and layout; equal to ``generate``; samples by row."""

import pytest
import tiny
import torch

from emmech.data.questions import Question
from emmech.models import generation
from emmech.models.generation import (
    Decoding,
    Limits,
    choose,
    decode,
    make_batch,
    plan_batches,
    prefill,
)
from emmech.models.kv_cache import PatchCache, is_hybrid, window
from emmech.piggyback.patching import Bench, Condition, KVPatch
from emmech.piggyback.running import Job, as_questions, render_rows, run

ALL = tuple(tiny.CONFIGS)
REPAIR = Condition("repair:prefix", "finetuned", (KVPatch(("prefix",), "base"),))
PLAIN = Condition("finetuned", "finetuned")


def answers(pair, questions, conditions, decoding, batch_size):
    rows = render_rows(pair, as_questions(questions), decoding.max_new_tokens)
    job = Job(tuple(rows), tuple(conditions))
    records, _ = run(pair, [job], decoding, batch_size=batch_size, folder=None, progress=False)
    return {(r["question"], r["condition"], r["sample"]): r["response"] for r in records}


@pytest.mark.parametrize("architecture", ALL)
def test_our_decoding_equals_generate_row_by_row(make_pair, architecture):
    """Greedy, unpadded ``generate`` of transformers is the reference, on every architecture."""
    pair = make_pair(architecture, "full")
    ours = answers(pair, tiny.QUESTIONS, [PLAIN], Decoding(8), batch_size=4)
    for question in tiny.QUESTIONS:
        prompt = pair.chat.render(question)
        with pair.finetuned.active() as model:
            ids = model.generate(
                input_ids=torch.tensor([prompt.ids]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=list(pair.chat.end_ids),
            )[0, len(prompt) :]
        text = pair.chat.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert ours[question, "finetuned", 0] == text


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "qwen3_next"])
def test_answers_do_not_depend_on_order_or_batch_size(make_pair, architecture, kind):
    pair = make_pair(architecture, kind if architecture != "qwen3_next" else "full")
    decoding = Decoding(6, temperature=1.0, samples=3, seed=5)
    reference = answers(pair, tiny.QUESTIONS, [PLAIN, REPAIR], decoding, batch_size=1)
    for questions, size in ((tiny.QUESTIONS, 2), (tiny.QUESTIONS[::-1], 5), (tiny.QUESTIONS[2:], 3)):
        # Draws are seeded by id, so each question keeps the one it had.
        given = [Question(f"q{tiny.QUESTIONS.index(q) + 1:04d}", q) for q in questions]
        rows = render_rows(pair, given, 6)
        made, _ = run(
            pair, [Job(tuple(rows), (PLAIN, REPAIR))], decoding, batch_size=size, folder=None, progress=False
        )
        for record in made:
            key = (record["question"], record["condition"], record["sample"])
            assert record["response"] == reference[key], (size, key)


def test_samples_of_a_row_differ_and_seeds_matter(make_pair):
    pair = make_pair("llama")
    one = answers(pair, tiny.QUESTIONS, [PLAIN], Decoding(8, 1.0, samples=4, seed=0), batch_size=5)
    two = answers(pair, tiny.QUESTIONS, [PLAIN], Decoding(8, 1.0, samples=4, seed=1), batch_size=5)
    question = tiny.QUESTIONS[0]
    assert len({one[question, "finetuned", s] for s in range(4)}) > 1
    assert one != two


def test_sampled_tokens_have_the_models_distribution():
    """Inverse-distribution sampling on a grid of uniform numbers gives each token its probability."""
    probability = torch.tensor([0.5, 0.1, 0.25, 0.15])
    uniform = (torch.arange(1000, dtype=torch.double) + 0.5) / 1000
    logits = probability.log().expand(1000, 4)
    drawn = choose(logits, Decoding(1, temperature=1.0), uniform)
    assert torch.bincount(drawn, minlength=4).tolist() == [500, 100, 250, 150]
    # top_p 0.7 keeps .5 and .25, renormalised to 2/3 and 1/3.
    drawn = choose(logits, Decoding(1, temperature=1.0, top_p=0.7), uniform)
    assert torch.bincount(drawn, minlength=4).tolist() == [667, 0, 333, 0]
    # Temperature 1/2 squares the odds: .25, .01, .0625, .0225 of .345.
    drawn = choose(logits, Decoding(1, temperature=0.5), uniform)
    assert torch.bincount(drawn, minlength=4).tolist() == [725, 29, 181, 65]


def test_finished_rows_leave_and_others_go_on(make_pair):
    """With an end token that some rows produce early, the rest is as if they were alone."""
    pair = make_pair("llama")
    prompts = [pair.chat.render(q) for q in tiny.QUESTIONS]
    names = [str(n) for n in range(len(prompts))]

    def tokens(rows, end_ids):
        batch = make_batch([prompts[r] for r in rows], pair.base.device, share_prefix=True)
        run_ = Bench(pair).batch(batch.prompts, [names[r] for r in rows], share_prefix=True)
        start = run_.prefill(PLAIN)
        with pair.finetuned.active() as model:
            return decode(model, start, Decoding(10), [names[r] for r in rows], end_ids)

    free = tokens(range(5), ())
    end = free[0][3]  # row 0 ends after three tokens
    cut = tokens(range(5), (end,))
    for row in range(5):
        stop = free[row].index(end) if end in free[row] else 10
        assert cut[row] == free[row][:stop]
    assert len(cut[0]) <= 3


@pytest.mark.parametrize("architecture", ALL)
def test_plans_cover_every_row_once_and_pad_only_where_exact(make_pair, architecture):
    pair = make_pair(architecture, "full")
    prompts = [pair.chat.render(q) for q in (*tiny.QUESTIONS, "\nhello there")]
    plans = plan_batches(prompts, pair.base.config, Limits(3), max_new_tokens=4)
    assert sorted(row for plan in plans for row in plan.rows) == list(range(len(prompts)))
    for plan in plans:
        lengths = {len(prompts[row]) for row in plan.rows}
        if is_hybrid(pair.base.config):
            assert len(lengths) == 1
        if plan.share_prefix:
            assert len({prompts[row].prefix_ids for row in plan.rows}) == 1
            seen = window(pair.base.config)
            assert seen is None or max(lengths) + 4 < seen


def test_one_long_row_does_not_pad_the_others():
    """5,000 tokens beside 20: alone in its batch; slots bound rows times the longest."""
    plans = generation._split(list(range(9)), [20, 22, 5000, 21, 40, 20, 20, 30, 20], Limits(64))
    assert plans[0] == (2,) and sorted(plans[1]) == [0, 1, 3, 4, 5, 6, 7, 8]
    bounded = generation._split(list(range(6)), [10] * 6, Limits(64, slots=30))
    assert [len(part) for part in bounded] == [3, 3]
    even = generation._split(list(range(80)), [10] * 80, Limits(64))
    assert [len(part) for part in even] == [40, 40]
    too_long = generation._split([0, 1], [100, 10], Limits(64, slots=30))
    assert sorted(too_long) == [(0,), (1,)]  # a row that alone exceeds the bound still runs


def test_running_out_of_memory_halves_the_batch_and_changes_no_answer(make_pair, monkeypatch):
    pair = make_pair("llama")
    reference = answers(pair, tiny.QUESTIONS, [PLAIN, REPAIR], Decoding(5), batch_size=5)
    calls = []

    def scarce(module, batch, cache, start):
        calls.append(len(batch.input_ids))
        if len(batch.input_ids) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
        return prefill(module, batch, cache, start)

    monkeypatch.setattr("emmech.piggyback.patching.prefill", scarce)
    assert answers(pair, tiny.QUESTIONS, [PLAIN, REPAIR], Decoding(5), batch_size=5) == reference
    assert calls[0] == 5 and max(calls[-3:]) <= 2


def test_other_runtime_errors_are_not_taken_for_lack_of_memory(make_pair, monkeypatch):
    def broken(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr("emmech.piggyback.patching.prefill", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        answers(make_pair("llama"), tiny.QUESTIONS, [PLAIN], Decoding(5), batch_size=5)


def test_recording_writes_what_a_plain_cache_holds(make_pair):
    pair = make_pair("qwen3", "full")
    batch = make_batch([pair.chat.render(q) for q in tiny.QUESTIONS], pair.base.device, share_prefix=False)
    cache = PatchCache(pair.base.config, record=True)
    generation.run_through(pair.base.module, batch, cache)
    for layer, (key, value) in cache.recorded.items():
        assert torch.equal(key, cache.layers[layer].keys)
        assert torch.equal(value, cache.layers[layer].values)
