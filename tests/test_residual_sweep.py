"""Residual sweeps: every place is what one plain pass with hooks after its blocks gives."""

from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from test_sweep import ARCHITECTURES, CLOSE, PAIRS

from emmech.errors import PatchError
from emmech.models import hook_points
from emmech.piggyback.cells import MODES
from emmech.piggyback.patching import Bench, Condition, ResidPatch
from emmech.piggyback.residual_sweep import ResidCell, ResidReplay, exchanges, resid_grid, sweep_resid
from emmech.piggyback.scores import find_metric
from emmech.piggyback.streaming import score_patches
from emmech.piggyback.sweep import sweep_kv

SEGMENTS = ("prefix", "query", "postfix")


@torch.no_grad()
def bare_margin(pair, item_pair, places) -> float:
    """Two plain, unpadded passes with the residual stream exchanged at some slots after some blocks."""
    scores = []
    for text in (item_pair.aligned, item_pair.misaligned):
        turns = [{"role": "user", "content": item_pair.user}, {"role": "assistant", "content": text}]
        prompt, answer = pair.chat.answered(turns)
        ids = torch.tensor([[*prompt.ids, *answer]])
        names = {layer: f"blocks.{layer}.hook_resid_post" for layer in places}
        with pair.base.active() as module, hook_points.recorded(module, *names.values()) as store:
            module(input_ids=ids)
        with pair.finetuned.active() as module, ExitStack() as stack:
            for layer, name in names.items():
                exchange = partial(with_slots, list(places[layer]), store[name])
                stack.enter_context(hook_points.replaced(module, name, exchange))
            logits = module(input_ids=ids).logits[0].log_softmax(-1)
        at = range(len(prompt) - 1, ids.shape[1] - 1)
        scores.append(np.mean([float(logits[i, ids[0, i + 1]]) for i in at]))
    return scores[0] - scores[1]


def with_slots(slots, donor, own):
    new = own.clone()
    new[0, slots] = donor[0, slots]
    return new


def slots_of(row, prompt) -> set[int]:
    """The slots of a row of the frame: one prefix token, or a segment."""
    if row["position"] is not None:
        return {row["position"]}
    ends = np.cumsum([0, prompt.n_prefix, prompt.n_query, prompt.n_postfix])
    number = SEGMENTS.index(row["segment"])
    return set(range(ends[number], ends[number + 1]))


def patched_by_hand(mode, row, rows, prompt) -> dict[int, set[int]]:
    """The slots that are exchanged after each of the three blocks."""
    mine, layer = slots_of(row, prompt), row["layer"]
    if mode == "leave_one_out":
        found = {at: set() for at in range(3)}
        for one in rows:
            found[one["layer"]] |= slots_of(one, prompt)
        found[layer] -= mine
        return found
    layers = {"single": [layer], "cumulative_up": range(layer + 1), "cumulative_down": range(layer, 3)}[mode]
    return dict.fromkeys(layers, mine)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_place_equals_a_plain_pass_with_hooks(make_pair, architecture, mode):
    """Of a union of two grids: one prefix token after a block, one segment after a block."""
    pair = make_pair(architecture)
    over = [("layer", "position"), ("layer", "segment")]
    result = sweep_resid(pair, PAIRS[:2], over=over, mode=mode, progress=False)
    rows = result.cells
    assert result.summary["late_start"] and len(rows) == 3 * 16 + 3 * 3
    for number in range(0, len(rows), 5):
        for question, one in enumerate(PAIRS[:2]):
            places = patched_by_hand(mode, rows[number], rows, pair.chat.render(one.user))
            expected = bare_margin(pair, one, places)
            np.testing.assert_allclose(result.scores[number, question], expected, **CLOSE)
    assert np.ptp(result.scores[:, 0]) > 1e-2


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_cumulative_patches_of_whole_prompts_are_single_ones_for_the_first_token_alone(
    make_pair, architecture
):
    """The last block of a patch decides the stream of its tokens; only other tokens read the earlier ones."""
    pair = make_pair(architecture)
    modes = ("single", "cumulative_up", "cumulative_down", "leave_one_out")

    def scores(metric, over):
        return {
            mode: sweep_resid(pair, PAIRS, metric, over, mode=mode, progress=False).scores for mode in modes
        }

    first = scores("kl", ("layer",))
    np.testing.assert_allclose(first["cumulative_up"], first["single"], **CLOSE)
    # The donor's stream after the last block, and the head that both share; or all but that block.
    np.testing.assert_allclose(first["cumulative_down"], 0 * first["single"], **CLOSE)
    np.testing.assert_allclose(first["leave_one_out"][:-1], 0 * first["single"][:-1], **CLOSE)
    np.testing.assert_allclose(first["leave_one_out"][-1], first["single"][-2], **CLOSE)
    assert first["single"][:-1].min() > 1e-3
    for metric, over in (("margin", ("layer",)), ("kl", ("layer", "segment"))):  # others read the patched
        found = scores(metric, over)
        assert np.abs(found["cumulative_up"] - found["single"]).max() > 1e-3


def test_patches_of_several_blocks_end_where_single_ones_are(make_pair):
    pair = make_pair("qwen2")
    up, down, single, without = (
        sweep_resid(pair, PAIRS, over=("layer",), mode=mode, progress=False).scores
        for mode in ("cumulative_up", "cumulative_down", "single", "leave_one_out")
    )
    np.testing.assert_allclose(up[0], single[0], **CLOSE)
    np.testing.assert_allclose(down[-1], single[-1], **CLOSE)
    np.testing.assert_allclose(up[-1], down[0], **CLOSE)
    np.testing.assert_allclose(without[0], down[1], **CLOSE)
    np.testing.assert_allclose(without[-1], up[-2], **CLOSE)


def test_cells_of_ones_own_are_swept(make_pair):
    pair = make_pair("llama")
    cells = [ResidCell(1, 3), ResidCell(2, None, "query")]
    result = sweep_resid(pair, PAIRS, over=cells, progress=False)
    assert result.cells[0] | {"token": ""} == {"layer": 1, "position": 3, "segment": None, "token": ""}
    alone = sweep_resid(pair, PAIRS, progress=False)
    np.testing.assert_allclose(result.scores[0], alone.scores[16 + 3], **CLOSE)


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
            prompt = range(len(pair.chat.render(PAIRS[number].user)))  # and nothing of the answer
            expected = bare_margin(pair, PAIRS[number], {layer: prompt})
            assert resid.scores[layer, number] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_left_out_blocks_and_hooks_give_the_same_scores(make_pair, mode):
    scores = []
    for late in (None, False):
        replay = ResidReplay(make_pair("qwen2"), PAIRS, find_metric("margin"), "induce")
        replay.late_start = late
        wanted = exchanges(resid_grid(("layer", "segment"), replay.shape), mode, replay.shape.n_layers)
        scored = score_patches(replay, wanted, rows=7, progress=False)
        assert scored.late_start == (late is None)
        scores.append(scored.patched)
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_after_the_last_block_only_tokens_whose_logits_are_read_matter(make_pair):
    result = sweep_resid(make_pair("llama"), PAIRS, over=("layer", "segment"), progress=False)
    last = result.frame()["layer"] == 2
    differences = dict(zip(result.frame()["segment"][last], result.differences[last], strict=True))
    assert (differences["prefix"] == 0).all() and (differences["query"] == 0).all()
    assert (differences["postfix"] != 0).all()


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        (r"over \('layer', 'position'\)", {"over": ("position",)}),
        (r"over \('layer', 'position'\)", {"over": []}),
        ("layers 0..2 and positions 0..15", {"over": [ResidCell(0, 16)]}),
        ("a mode among single", {"mode": "all"}),
    ],
)
def test_other_axes_cells_and_modes_are_refused(make_pair, match, arguments):
    with pytest.raises(PatchError, match=match):
        sweep_resid(make_pair("llama"), PAIRS, **arguments)
