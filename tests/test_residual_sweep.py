"""Residual sweeps: every place is what one plain pass with a hook after that block gives."""

from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import torch
from test_sweep import PAIRS

from emmech.errors import PatchError
from emmech.models import hook_points
from emmech.piggyback.patching import Bench, Condition, ResidPatch
from emmech.piggyback.residual_sweep import ResidReplay, _grid, sweep_resid
from emmech.piggyback.scores import find_metric
from emmech.piggyback.streaming import score_patches
from emmech.piggyback.sweep import sweep_kv

SEGMENTS = ("prefix", "query", "postfix")


@contextmanager
def side_place(side, name, edit):
    with side.active() as module, hook_points.replaced(module, name, edit):
        yield module


@torch.no_grad()
def bare_margin(pair, item_pair, layer, position) -> float:
    """Two plain, unpadded passes with some tokens' residual stream exchanged after one block."""
    scores, name = [], f"blocks.{layer}.hook_resid_post"
    for text in (item_pair.aligned, item_pair.misaligned):
        turns = [{"role": "user", "content": item_pair.user}, {"role": "assistant", "content": text}]
        prompt, answer = pair.chat.answered(turns)
        ids = torch.tensor([[*prompt.ids, *answer]])
        with pair.base.active() as module, hook_points.recorded(module, name) as store:
            module(input_ids=ids)
        donor = store[name]

        def exchange(own, donor=donor):
            new = own.clone()
            new[0, position] = donor[0, position]
            return new

        with side_place(pair.finetuned, name, exchange) as module:
            logits = module(input_ids=ids).logits[0].log_softmax(-1)
        at = range(len(prompt) - 1, ids.shape[1] - 1)
        scores.append(np.mean([float(logits[i, ids[0, i + 1]]) for i in at]))
    return scores[0] - scores[1]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_every_place_equals_a_plain_pass_with_a_hook(make_pair, architecture):
    pair = make_pair(architecture)
    result = sweep_resid(pair, PAIRS[:2], progress=False)
    frame = result.frame()
    assert result.summary["late_start"]
    for row in range(0, len(frame), 7):
        layer, position = int(frame["layer"][row]), int(frame["position"][row])
        for number, one in enumerate(PAIRS[:2]):
            expected = bare_margin(pair, one, layer, position)
            assert result.scores[row, number] == pytest.approx(expected, abs=1e-4)
    assert np.ptp(result.scores[:, 0]) > 1e-2


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_segments_equal_the_patched_prompts_that_are_answered_from(make_pair, kind):
    pair = make_pair("qwen3", kind)
    questions = list(tiny.QUESTIONS)
    result = sweep_resid(pair, questions, lambda logits: logits[:, 65], ("layer", "segment"), progress=False)
    batch = Bench(pair).batch([pair.chat.render(q) for q in questions], questions, share_prefix=False)
    for row, (layer, segment) in enumerate(
        zip(*(result.frame()[a] for a in ("layer", "segment")), strict=True)
    ):
        patch = ResidPatch((segment,), "base", layer)
        expected = batch.prefill(Condition("x", "finetuned", resid=patch)).logits[:, 65]
        np.testing.assert_allclose(result.scores[row], expected.numpy(), atol=1e-4)


def test_the_whole_prompt_is_its_segments_together_and_its_own_kind_of_whole(make_pair):
    pair = make_pair("llama")
    resid = sweep_resid(pair, PAIRS, over=("layer",), progress=False)
    kv = sweep_kv(pair, PAIRS, over=("layer",), progress=False)
    np.testing.assert_allclose(resid.full, kv.full, atol=1e-5)  # the same whole: maps of both compare
    np.testing.assert_allclose(resid.unpatched, kv.unpatched, atol=1e-5)
    assert not np.allclose(resid.scores, kv.scores, atol=1e-3)
    for layer in range(2):
        for number in (1, 2):
            prompt = slice(len(pair.chat.render(PAIRS[number].user)))  # and nothing of the answer
            expected = bare_margin(pair, PAIRS[number], layer, prompt)
            assert resid.scores[layer, number] == pytest.approx(expected, abs=1e-4)


def test_left_out_blocks_and_hooks_give_the_same_scores(make_pair):
    scores = []
    for late in (None, False):
        replay = ResidReplay(make_pair("qwen2"), PAIRS, find_metric("margin"), "induce")
        replay.late_start = late
        scored = score_patches(replay, _grid(("layer", "segment"), replay), rows=7, progress=False)
        assert scored.late_start == (late is None)
        scores.append(scored.patched)
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_after_the_last_block_only_tokens_whose_logits_are_read_matter(make_pair):
    result = sweep_resid(make_pair("llama"), PAIRS, over=("layer", "segment"), progress=False)
    last = result.frame()["layer"] == 2
    differences = dict(zip(result.frame()["segment"][last], result.differences[last], strict=True))
    assert (differences["prefix"] == 0).all() and (differences["query"] == 0).all()
    assert (differences["postfix"] != 0).all()


def test_other_axes_are_refused(make_pair):
    with pytest.raises(PatchError, match=r"over \('layer', 'position'\)"):
        sweep_resid(make_pair("llama"), PAIRS, over=("position",))
