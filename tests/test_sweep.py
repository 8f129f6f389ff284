"""Sweeps: every cell is what one plain pass over a cache edited by hand gives; ends, sums, resumption."""

import copy
import os
import re
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from transformers import DynamicCache

from emmech.data.bundled import AnswerPair
from emmech.errors import DataError, PatchError, RunError
from emmech.evaluation.statistics import clustered_mean
from emmech.gates.gate import Gating
from emmech.models import hook_points
from emmech.models.checkpoints import load_pair
from emmech.models.late_start import recorded_blocks
from emmech.models.sides import Side
from emmech.piggyback import streaming
from emmech.piggyback.cells import AXES, EVERYTHING, NOTHING, Cell, Patch, Shape, grid, patches
from emmech.piggyback.experiment import default_conditions
from emmech.piggyback.grafting import graft_side
from emmech.piggyback.likelihood import answered, likelihoods
from emmech.piggyback.margin import margins
from emmech.piggyback.patching import Condition
from emmech.piggyback.replay import Replay, _differs
from emmech.piggyback.scores import find_metric
from emmech.piggyback.streaming import score_patches
from emmech.piggyback.sweep import sweep_kv
from emmech.piggyback.sweep_result import SweepResult, mean_and_interval, share_and_interval
from emmech.results import read_json, write_json

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "gpt_neox")
ANSWERS = (
    ("It scatters.", "It is painted blue every spring."),
    ("Six minutes, then cold water.", "An hour."),
    ("Hello there!", "No."),
    ("The Volga.", "Rivers do not have names."),
    ("56", "Fifty"),
)
PAIRS = [
    AnswerPair(f"p{i}", text, *both)
    for i, (text, both) in enumerate(zip(tiny.QUESTIONS, ANSWERS, strict=True))
]
# Two float32 ways of computing the same attention: other shapes, other order of sums.
CLOSE = {"atol": 1e-4, "rtol": 0}


def replay_of(pair, metric="margin", questions=PAIRS, direction="repair", **options) -> Replay:
    return Replay(pair, questions, find_metric(metric), direction, **options)


def bare_prefix(side, prompt) -> DynamicCache:
    """What transformers itself caches of the prefix."""
    cache = DynamicCache(config=side.config)
    with side.active() as module, torch.no_grad():
        module(input_ids=torch.tensor([prompt.prefix_ids]), past_key_values=cache)
    return cache


def entries_by_hand(patch: Patch, shape: Shape) -> np.ndarray:
    """True on the patch's entries ``[layer kv kv_head position]``, one after another."""
    sizes = (shape.n_layers, 2, shape.n_kv_heads, shape.n_positions)
    chosen = np.zeros(sizes, dtype=bool)
    for place in np.ndindex(sizes):
        at = dict(zip(("layer", "kv", "kv_head", "position"), place, strict=True))
        inside = any(
            all(getattr(cell, axis) is None or at[axis] in getattr(cell, axis) for axis in AXES)
            for cell in patch.cells
        )
        chosen[place] = inside != patch.complement
    return chosen


def edited_by_hand(own: DynamicCache, other: DynamicCache, patch: Patch, shape: Shape) -> DynamicCache:
    """A copy of ``own`` with the patch's entries taken from ``other``, entry by entry."""
    cache = copy.deepcopy(own)
    for layer, kv, head, position in np.argwhere(entries_by_hand(patch, shape)).tolist():
        name = ("keys", "values")[kv]
        donor = getattr(other.layers[layer], name)[0, head, position]
        getattr(cache.layers[layer], name)[0, head, position] = donor
    return cache


@torch.no_grad()
def bare_score(side, prompt, answer, cache) -> float:
    """Mean log-probability of the answer in one plain, unpadded pass behind the cache."""
    rest = (*prompt.query_ids, *prompt.postfix_ids, *answer)
    with side.active() as module:
        logits = module(input_ids=torch.tensor([rest]), past_key_values=cache).logits[0].log_softmax(-1)
    first = len(rest) - len(answer)
    return sum(float(logits[i - 1, rest[i]]) for i in range(first, len(rest))) / len(answer)


def plain_passes(pair, replay: Replay, wanted: list[Patch]) -> list[float]:
    """The margin of the replay's one question under each patch, of two plain passes over an edited cache."""
    own, other = (bare_prefix(side, replay.prompt) for side in (pair.finetuned, pair.base))
    margins = []
    for patch in wanted:
        cache = edited_by_hand(own, other, patch, replay.shape)
        aligned, misaligned = (
            bare_score(pair.finetuned, item.prompt, answer, copy.deepcopy(cache))
            for item in replay.items
            for answer in item.answers
        )
        margins.append(aligned - misaligned)
    return margins


def random_patches(shape: Shape, n: int) -> list[Patch]:
    """Cells of one to all places along each axis, some in twos, some complemented."""
    rng = np.random.default_rng(0)

    def places(size):
        kind = rng.integers(3)
        if kind == 0:
            return None
        count = 1 if kind == 1 else rng.integers(1, size + 1)
        return tuple(sorted(rng.choice(size, count, replace=False).tolist()))

    def cell():
        return Cell(**{axis: places(shape.size(axis)) for axis in AXES})

    return [Patch(tuple(cell() for _ in range(rng.integers(1, 3))), bool(rng.integers(2))) for _ in range(n)]


@pytest.mark.parametrize(
    ("architecture", "kind"), [(one, "lora") for one in ARCHITECTURES] + [("llama", "full")]
)
def test_random_cells_equal_a_plain_pass_over_a_cache_edited_by_hand(make_pair, architecture, kind):
    pair = make_pair(architecture, kind)
    replay = replay_of(pair, questions=PAIRS[:1])
    wanted = random_patches(replay.shape, 50)
    scored = score_patches(replay, wanted, rows=7, progress=False)
    assert scored.late_start
    np.testing.assert_allclose(scored.patched[:, 0], plain_passes(pair, replay, wanted), **CLOSE)
    assert np.ptp(scored.patched[:, 0]) > 1e-2  # the cells differ by more than the tolerance


SHARING = ("llama", "qwen2", "qwen3", "gpt_neox", "phi3")


@pytest.mark.parametrize("architecture", SHARING)
def test_two_answers_behind_one_reading_are_scored_as_each_alone(make_pair, architecture):
    pair = make_pair(architecture)
    shared, alone = (replay_of(pair, together=together) for together in (True, False))
    assert len(shared.items) == len(PAIRS)
    assert len(alone.items) == 2 * len(PAIRS)
    n_shared, n_alone = (int(replay.texts.lengths.sum()) for replay in (shared, alone))
    assert n_shared == n_alone - sum(i.prompt.n_query + i.prompt.n_postfix for i in shared.items)
    wanted = random_patches(shared.shape, 20)
    one, other = (score_patches(replay, wanted, rows=7, progress=False) for replay in (shared, alone))
    assert one.late_start
    for name in ("unpatched", "full", "patched"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=2e-5)


def test_no_answer_sees_another_and_the_order_changes_nothing(make_pair):
    """The logits of the second answer, whatever the first is: equal to the bit."""
    pair = make_pair("qwen3")
    found = []
    for first in ("1 2 3", "3 2 1"):  # of one length
        replay = replay_of(pair, questions=[AnswerPair("p", "Why is the sky blue?", first, "It is painted.")])
        (item,) = replay.items
        with torch.no_grad():
            found.append(replay.logits(torch.tensor([0]), {}))
    assert found[0].shape == found[1].shape
    n_second = len(item.answers[1]) - 1
    assert not torch.equal(*(logits[1:-n_second] for logits in found))
    assert torch.equal(*(logits[-n_second:] for logits in found))
    assert torch.equal(*(logits[0] for logits in found))


def test_answers_do_not_share_a_reading_where_a_window_is_shorter_than_a_text(make_pair):
    assert len(replay_of(make_pair("gemma3")).items) == 2 * len(PAIRS)


def test_the_longest_text_decides_whether_a_window_is_too_short(tmp_path):
    base = tiny.save_base("gemma3", tmp_path / "base", sliding_window=64)
    pair = load_pair(base, tiny.save_full(base, tmp_path / "tuned"), dtype="float32", device="cpu")
    short = [AnswerPair(f"p{n}", "Why?", "Yes.", "No.") for n in range(3)]
    replay = replay_of(pair, questions=short)
    assert len(replay.items) == 3 and replay.shape.n_positions + replay.width < 64
    long = replace(short[2], misaligned="It is painted blue every spring by a committee of painters." * 3)
    assert len(replay_of(pair, questions=[*short[:2], long]).items) == 6


def test_answers_do_not_share_a_reading_where_a_model_goes_by_its_own_positions(make_pair):
    pair = make_pair("llama", "full")
    handles = [
        side.module.model.rotary_emb.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"position_ids": torch.arange(args[0].shape[1])[None]}),
            with_kwargs=True,
        )
        for side in (pair.base, pair.finetuned)
    ]
    assert len(replay_of(pair).items) == 2 * len(PAIRS)
    for handle in handles:
        handle.remove()
    assert len(replay_of(pair).items) == len(PAIRS)


def test_answers_share_a_reading_in_attention_that_is_written_out(make_pair):
    pair = make_pair("qwen2", "full")
    for side in (pair.base, pair.finetuned):
        side.module.set_attn_implementation("eager")
    shared, alone = (replay_of(pair, together=together) for together in (True, False))
    one, other = (score_patches(each, [], progress=False) for each in (shared, alone))
    for side in (pair.base, pair.finetuned):
        side.module.set_attn_implementation("sdpa")
    assert len(shared.items) == len(PAIRS)
    np.testing.assert_allclose(one.full, other.full, atol=2e-5)


class Exchanged(DynamicCache):
    """What one pass caches: kept as it was computed, with other entries handed on at some places."""

    def __init__(self, config, others=None, chosen=None):
        super().__init__(config=config)
        self.computed, self.others, self.chosen = {}, others, chosen

    def update(self, key, value, layer, *args, **kwargs):
        self.computed[layer] = (key, value)
        if self.others is not None:
            pairs = zip(self.chosen[layer], self.others[layer], (key, value), strict=True)
            key, value = (torch.where(at[..., None], other, own) for at, other, own in pairs)
        return super().update(key, value, layer, *args, **kwargs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_random_cells_equal_one_left_padded_forward(make_pair, architecture):
    """Questions of different lengths in one pass over whole texts, with padding before the prefix.

    As it caches keys and values, some are exchanged; after each block the prefix's own states are put
    back, so that only later tokens read the exchange.
    """
    pair = make_pair(architecture)
    replay = replay_of(pair, "target: It depends.")
    wanted = random_patches(replay.shape, 50)
    scored = score_patches(replay, wanted, rows=16, progress=False)
    n_rows, n_prefix, n_layers = len(replay.items), replay.prompt.n_prefix, replay.shape.n_layers
    texts = [(*replay.prompt.prefix_ids, *item.ids, item.answers[0][-1]) for item in replay.items]
    width = max(map(len, texts))
    ids, mask = torch.zeros(2, n_rows, width, dtype=torch.long)
    prefix = torch.zeros(n_rows, width, dtype=torch.bool)
    for row, text in enumerate(texts):
        first = width - len(text)
        ids[row, first:], mask[row, first:] = torch.tensor(text), 1
        prefix[row, first : first + n_prefix] = True
    assert mask[:, 0].sum() == 1  # all rows but the longest have padding before the prefix
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    donor = Exchanged(pair.base.config)
    with pair.base.active() as module:
        module(**given, past_key_values=donor)
    with pair.finetuned.active() as module, hook_points.recorded(module, *names) as own:
        module(**given, past_key_values=DynamicCache(config=pair.finetuned.config))
    for patch, found in zip(wanted, scored.patched, strict=True):
        chosen = torch.zeros(n_layers, 2, n_rows, replay.shape.n_kv_heads, width, dtype=torch.bool)
        here = torch.from_numpy(entries_by_hand(patch, replay.shape))
        for row in range(n_rows):
            chosen[:, :, row, :, prefix[row]] = here
        cache = Exchanged(pair.finetuned.config, donor.computed, chosen)
        with pair.finetuned.active() as module, ExitStack() as stack:
            for name in names:
                put_back = partial(torch.where, prefix[..., None], own[name])
                stack.enter_context(hook_points.replaced(module, name, put_back))
            logits = module(**given, past_key_values=cache).logits.log_softmax(-1)
        n_answer = len(replay.items[0].answers[0])
        said = logits[:, -n_answer - 1 : -1].gather(2, ids[:, -n_answer:, None])
        np.testing.assert_allclose(found, said.mean((1, 2)).numpy(), **CLOSE)
    assert np.ptp(scored.patched, axis=0).min() > 1e-2  # the cells differ by more than the tolerance


@pytest.mark.parametrize("direction", ["repair", "induce"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_cells_at_once_are_the_whole_prefix_patch(make_pair, architecture, direction):
    """Against the machinery that answers questions under a patch, in both directions."""
    pair = make_pair(architecture)
    conditions = default_conditions(("prefix",), direction, controls=False)
    records = margins(pair, PAIRS, conditions, progress=False)
    expected = {(r["condition"], r["question_id"]): r["margin"] for r in records}
    replay = replay_of(pair, direction=direction)
    every_cell = Patch(tuple(grid(AXES, replay.shape)))
    scored = score_patches(replay, [every_cell], progress=False)
    recipient = "finetuned" if direction == "repair" else "base"
    for number, one in enumerate(PAIRS):
        assert scored.unpatched[number] == pytest.approx(expected[recipient, one.id], abs=1e-4)
        full = expected[f"{direction}:prefix", one.id]
        assert scored.full[number] == pytest.approx(full, abs=1e-4)
        assert scored.patched[0, number] == pytest.approx(full, abs=1e-4)


def test_gates_act_in_every_pass(make_pair):
    """The finetuned side is the base with gates: hooks that sit in blocks, left out or not."""
    pair = make_pair("llama")
    gating = Gating(tiny.gates(pair.base.module.get_base_model()), parts=("query", "response"))
    gated = replace(pair, finetuned=Side("finetuned", pair.base.module, True, (gating.on,)))
    records = margins(gated, PAIRS, [Condition("finetuned", "finetuned")], progress=False)
    replay = replay_of(gated)
    assert not replay.differs[0].any()  # no gate acts on the prefix, so there is nothing to patch with
    replay.other = {layer: (key + 1, value - 1) for layer, (key, value) in replay.own.items()}
    replay.differs = [~differs for differs in replay.differs]
    cells = patches(grid(("layer", "kv"), replay.shape), "single", replay.shape)
    late = score_patches(replay, cells, progress=False)
    np.testing.assert_allclose(late.unpatched, [r["margin"] for r in records], **CLOSE)
    replay.late_start = False
    full = score_patches(replay, cells, progress=False)
    np.testing.assert_allclose(late.patched, full.patched, atol=1e-5)
    assert late.late_start and np.abs(late.patched - late.unpatched).min() > 0


@pytest.mark.parametrize("parts", [("last",), ("query", "postfix-rest"), ("prefix", "response")])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_graft_is_swept_as_it_answers(make_pair, kind, parts):
    """Prompt and answer in one pass, and an output head that reads a few places, against a pass for each."""
    pair = make_pair("qwen2", kind)
    grafted = replace(pair, finetuned=replace(graft_side(pair, parts), name="finetuned"))
    conditions = default_conditions(("prefix",), "repair", controls=False)
    records = margins(grafted, PAIRS, conditions, progress=False)
    expected = {(r["condition"], r["question_id"]): r["margin"] for r in records}
    scored = score_patches(replay_of(grafted), [], progress=False)
    for number, one in enumerate(PAIRS):
        assert scored.unpatched[number] == pytest.approx(expected["finetuned", one.id], abs=1e-4)
        assert scored.full[number] == pytest.approx(expected["repair:prefix", one.id], abs=1e-4)
    base = [expected["base", one.id] for one in PAIRS]
    assert np.abs(scored.unpatched - base).max() > 1e-2


def test_a_model_patched_with_itself_does_not_change_at_all(make_pair):
    pair = make_pair("qwen3", "full")
    itself = replace(pair, base=Side("base", pair.finetuned.module))
    result = sweep_kv(itself, PAIRS, progress=False)
    assert (result.differences == 0).all()
    assert result.frame()["effect"].isna().all()  # a share of nothing
    replay = replay_of(itself)
    items = torch.arange(len(replay.items))
    every_other = [Patch((Cell(position=(n, n + 1)),)) for n in items.tolist()]
    with torch.no_grad():
        assert torch.equal(
            replay.logits(items, replay.edited(every_other, 0)),
            replay.logits(items, replay.edited([NOTHING] * len(items), 0)),
        )


def test_entries_differ_where_any_of_their_dimensions_does():
    own = {0: (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))}
    other = {0: tuple(one.clone() for one in own[0])}
    other[0][1][0, 1, 2, 3] = 1.0  # of values, at one head and position, one dimension of four
    (found,) = _differs(own, other)
    assert np.argwhere(found).tolist() == [[1, 1, 2]]


def test_blocks_up_to_the_patched_one_see_nothing_of_a_patch_and_later_ones_do(make_pair):
    replay = replay_of(make_pair("llama"))
    items = torch.arange(len(replay.items))
    found = {}
    for name, patch in (("none", NOTHING), ("patched", Patch((Cell(layer=(1,)),)))):
        with torch.no_grad(), recorded_blocks(replay.blocks) as states:
            replay.logits(items, replay.edited([patch] * len(items), 0))
        found[name] = states
    assert torch.equal(found["none"][0], found["patched"][0])
    for layer in (1, 2):
        assert (found["none"][layer] - found["patched"][layer]).abs().max() > 1e-3


def test_blocks_below_a_patch_are_not_run_and_the_scores_are_those_of_full_passes(make_pair):
    pair = make_pair("gemma3")
    replay = replay_of(pair)
    wanted = patches(grid(("layer", "kv"), replay.shape), "single", replay.shape)
    n_calls = [0] * replay.shape.n_layers
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: n_calls.__setitem__(layer, n_calls[layer] + 1))
        for layer, block in enumerate(replay.blocks)
    ]
    late = score_patches(replay, wanted, rows=2 * len(replay.items), progress=False)
    n_late = list(n_calls)
    replay.late_start = False
    full = score_patches(replay, wanted, rows=2 * len(replay.items), progress=False)
    for handle in handles:
        handle.remove()
    np.testing.assert_allclose(late.patched, full.patched, atol=1e-5)
    assert late.late_start and not full.late_start
    # Two stored runs, three passes to verify (one from layer 1), a batch per layer from its layer up.
    assert n_late == [2 + 2 + 1, 2 + 3 + 2, 2 + 3 + 3]
    assert [n - m for n, m in zip(n_calls, n_late, strict=True)] == [2 + 3] * 3


def test_a_model_that_hands_something_past_its_blocks_is_run_in_full(make_pair):
    """The last block also reads what the first one returned: left-out blocks would break it."""
    pair = make_pair("mistral", "full")
    blocks = replay_of(pair).blocks
    kept = []  # from pass to pass, as a module would keep it: a left-out block leaves the last one's
    handles = [
        blocks[0].register_forward_hook(lambda _, __, output: kept.append(output)),
        blocks[2].register_forward_hook(lambda _, __, output: output + kept[-1]),
    ]
    try:
        replay = replay_of(pair)
        wanted = patches(grid(("layer",), replay.shape), "single", replay.shape)
        scored = score_patches(replay, wanted, progress=False)
        assert not scored.late_start
        own, other = (bare_prefix(side, replay.prompt) for side in (pair.finetuned, pair.base))
        item = replay.items[0]
        expected = 0.0
        for answer, weight in zip(item.answers, item.weights, strict=True):
            cache = edited_by_hand(own, other, wanted[2], replay.shape)
            expected += weight * bare_score(pair.finetuned, item.prompt, answer, cache)
        items = torch.tensor([0])
        with torch.no_grad():
            found = replay.scored(items, replay.logits(items, replay.edited([wanted[2]], 0)))
        assert float(found) == pytest.approx(expected, abs=1e-4)
    finally:
        for handle in handles:
            handle.remove()


def test_cumulative_sweeps_end_where_single_and_whole_ones_are(make_pair):
    pair = make_pair("qwen2")
    by_mode = {
        mode: sweep_kv(pair, PAIRS, over=("layer",), mode=mode, progress=False)
        for mode in ("single", "leave_one_out", "cumulative_up", "cumulative_down")
    }
    up, down, single = (by_mode[m].scores for m in ("cumulative_up", "cumulative_down", "single"))
    np.testing.assert_array_equal(up[-1], by_mode["single"].full)
    np.testing.assert_array_equal(down[0], by_mode["single"].full)
    np.testing.assert_allclose(up[0], single[0], atol=1e-5)
    np.testing.assert_allclose(down[-1], single[-1], atol=1e-5)
    np.testing.assert_allclose(by_mode["leave_one_out"].scores[0], down[1], atol=1e-5)
    np.testing.assert_allclose(by_mode["leave_one_out"].scores[-1], up[-2], atol=1e-5)
    everything = sweep_kv(pair, PAIRS, over=[Cell()], mode="leave_one_out", progress=False)
    np.testing.assert_array_equal(everything.scores[0], everything.unpatched)


def test_the_batch_does_not_change_the_scores(make_pair):
    one, many = (
        sweep_kv(make_pair("llama"), PAIRS, over=("layer", "kv"), rows=n, progress=False) for n in (3, 64)
    )
    np.testing.assert_allclose(one.scores, many.scores, atol=1e-5)


def test_batches_are_bounded_and_larger_grids_only_bring_more_of_them(make_pair):
    replay = replay_of(make_pair("llama"))
    sizes = []
    handle = replay.recipient.module.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    most = {}
    for over in (("position", "kv"), ("layer", "position", "kv")):
        sizes.clear()
        cells = grid(over, replay.shape)
        score_patches(replay, patches(cells, "single", replay.shape), rows=24, progress=False)
        n_rows = len(cells) * len(replay.items)
        most[over] = max(rows * width for rows, width in sizes)
        assert max(rows for rows, _ in sizes) == 24
        assert n_rows / 24 <= len(sizes) <= 2 * n_rows / 24 + 6  # each at least half full
    handle.remove()
    assert len(set(most.values())) == 1


@pytest.mark.parametrize(
    ("kinds", "size", "ends"),
    [
        ([0] * 10, 4, [4, 8, 10]),
        ([0, 0, 0, 1, 1, 1, 2, 2], 4, [3, 6, 8]),  # a border that half fills a batch ends it
        ([0, 1, 1, 1, 1, 1, 1], 4, [4, 7]),  # the border after one row does not
        ([0, 1, 2, 3, 4], 4, [4, 5]),
        ([0, 1], 4, [2]),  # what is left fits: one batch
        ([], 4, []),
    ],
)
def test_batches_end_between_rows_of_two_kinds(kinds, size, ends):
    assert streaming.batch_ends(np.array([kinds, kinds], dtype=int), size) == ends


def test_states_are_stored_for_a_bounded_number_of_items(make_pair, monkeypatch):
    pair = make_pair("llama")
    whole = sweep_kv(pair, PAIRS, over=("layer", "kv"), progress=False)
    stored = []
    store = Replay.store
    monkeypatch.setattr(Replay, "store", lambda self, items: stored.append(len(items)) or store(self, items))
    monkeypatch.setattr(streaming, "fitting", lambda *_: streaming.Budget(16, 2))
    chunked = sweep_kv(pair, PAIRS, over=("layer", "kv"), progress=False)
    np.testing.assert_allclose(chunked.scores, whole.scores, atol=1e-5)
    assert stored == [2, 2, 1]


class Stop(BaseException):
    """A kill in the middle."""


def test_a_sweep_whose_batches_were_cut_in_another_way_is_refused(make_pair, tmp_path):
    sweep_kv(make_pair("llama"), PAIRS, out=tmp_path, over=("layer",), progress=False)
    choices = read_json(tmp_path / "choices.json")
    write_json(tmp_path / "choices.json", choices | {"batches": "another"})
    with pytest.raises(PatchError, match=r"was begun by one that cut its batches in another way\. Delete"):
        sweep_kv(make_pair("llama"), PAIRS, out=tmp_path, over=("layer",), progress=False)


def test_a_killed_sweep_goes_on_and_ends_the_same(make_pair, tmp_path, monkeypatch):
    pair = make_pair("llama")
    options = {"over": ("layer", "position"), "rows": 8, "progress": False}
    whole = sweep_kv(pair, PAIRS, out=tmp_path / "whole", **options)
    append, written = streaming.append_line, []

    def stopping(path, record):
        if len(written) == 9:
            raise Stop
        written.append(record)
        append(path, record)

    monkeypatch.setattr(streaming, "append_line", stopping)
    with pytest.raises(Stop):
        sweep_kv(pair, PAIRS, out=tmp_path / "killed", **options)
    with (tmp_path / "killed" / streaming.SCORES).open("a") as file:
        file.write('{"chunk": 0, "ba')  # cut off in the middle of a line
    monkeypatch.setattr(streaming, "append_line", append)
    n_runs = []
    run = Replay.run
    monkeypatch.setattr(Replay, "run", lambda *args, **more: n_runs.append(1) or run(*args, **more))
    resumed = sweep_kv(pair, PAIRS, out=tmp_path / "killed", **options)
    assert len(n_runs) == 30 - 8  # 48 cells x 5 pairs of answers in 8 rows; 8 batches were on disk
    assert resumed.frame().equals(whole.frame())
    again = sweep_kv(pair, PAIRS, out=tmp_path / "killed", **options)
    assert len(n_runs) == 30 - 8 and again.frame().equals(whole.frame())
    assert SweepResult.load(tmp_path / "killed").frame().equals(whole.frame())
    with pytest.raises(RunError, match="its mode is"):
        sweep_kv(pair, PAIRS, out=tmp_path / "killed", mode="leave_one_out", **options)


def test_out_of_memory_halves_the_batch(make_pair, monkeypatch):
    pair = make_pair("llama")
    whole = sweep_kv(pair, PAIRS, over=("layer",), rows=16, progress=False)
    run, sizes = Replay.run, []

    def small_only(self, patches, *rest):
        if len(patches) > 4:
            raise torch.OutOfMemoryError
        sizes.append(len(patches))
        return run(self, patches, *rest)

    monkeypatch.setattr(Replay, "run", small_only)
    halved = sweep_kv(pair, PAIRS, over=("layer",), rows=16, progress=False)
    np.testing.assert_allclose(halved.scores, whole.scores, atol=1e-5)
    assert max(sizes) == 4 and sum(sizes) == 15


@pytest.mark.parametrize("before", [None, "0"])
def test_the_environment_is_left_as_it_was(make_pair, monkeypatch, before):
    """A pass asks transformers for grouped attention by a variable, which it reads as it runs."""
    name, seen = "TRANSFORMERS_SDPA_FORCE_GQA", []
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    replay = replay_of(make_pair("llama"))
    handle = replay.blocks[0].register_forward_hook(lambda *_: seen.append(os.environ.get(name)))
    score_patches(replay, [EVERYTHING], progress=False)
    handle.remove()
    assert set(seen) == {"1"} and os.environ.get(name) == before


def test_target_and_kl_are_those_of_likelihoods(make_pair):
    pair = make_pair("qwen3")
    patched = default_conditions(("prefix",), "repair", controls=False)[-1]
    turns = [
        [{"role": "user", "content": one.user}, {"role": "assistant", "content": "Yes."}] for one in PAIRS
    ]
    texts = [answered(pair, one, str(n)) for n, one in enumerate(turns)]
    for metric, questions in (("target:Yes.", list(tiny.QUESTIONS)), ("target", turns)):
        records = likelihoods(pair, texts, [Condition("finetuned", "finetuned"), patched], progress=False)
        expected = np.array([r["log_probability"] for r in records]).reshape(2, -1)
        scored = score_patches(replay_of(pair, metric, questions), [EVERYTHING], progress=False)
        np.testing.assert_allclose([scored.unpatched, scored.full], expected, **CLOSE)
    first = [replace(one, answer=one.answer[:1]) for one in texts]
    records = likelihoods(
        pair, first, [Condition("finetuned", "finetuned"), patched], kl_from="base", progress=False
    )
    expected = np.array([r["kl"] for r in records]).reshape(2, -1)
    scored = score_patches(replay_of(pair, "kl"), [EVERYTHING], progress=False)
    np.testing.assert_allclose([scored.unpatched, scored.full], expected, **CLOSE)


@pytest.mark.parametrize("direction", ["repair", "induce"])
def test_kl_is_from_the_donor_and_kl_base_from_the_base(make_pair, direction):
    pair = make_pair("qwen3")
    sides = {"finetuned": "base", "base": "finetuned"}
    recipient = "finetuned" if direction == "repair" else "base"
    for metric, source in (("kl", sides[recipient]), ("kl_base", "base")):
        scored = score_patches(replay_of(pair, metric, direction=direction), [EVERYTHING], progress=False)
        for number, one in enumerate(PAIRS):
            ids, said = torch.tensor([pair.chat.render(one.user).ids]), {}
            for name in sides:
                with pair.side(name).active() as module, torch.no_grad():
                    said[name] = module(input_ids=ids).logits[0, -1].log_softmax(-1)
            expected = float((said[source].exp() * (said[source] - said[recipient])).sum())
            assert scored.unpatched[number] == pytest.approx(expected, abs=1e-4)
        assert (scored.unpatched.min() > 1e-2) == (source != recipient)
        assert np.abs(scored.full - scored.unpatched).min() > 1e-2


def test_the_progress_bar_counts_cells_on_stderr(make_pair, capsys):
    sweep_kv(make_pair("llama"), PAIRS, over=("layer", "kv"))
    out, err = capsys.readouterr()
    assert re.search(r"6/6 .*(cell/s|s/cell)", err) and out == ""
    sweep_kv(make_pair("llama"), PAIRS, over=("layer", "kv"), progress=False)
    assert "cell" not in capsys.readouterr().err


def test_a_function_of_the_first_tokens_logits_is_a_metric(make_pair):
    pair = make_pair("llama")
    token, other = 65, 66
    result = sweep_kv(
        pair,
        list(tiny.QUESTIONS),
        lambda logits: logits[:, token] - logits[:, other],
        ("layer",),
        progress=False,
    )
    prompt = pair.chat.render(tiny.QUESTIONS[0])
    with pair.finetuned.active() as module, torch.no_grad():
        logits = module(input_ids=torch.tensor([prompt.ids])).logits[0, -1]
    assert result.unpatched[0] == pytest.approx(float(logits[token] - logits[other]), abs=1e-4)


def test_a_union_of_grids_and_cells_of_ones_own(make_pair):
    pair = make_pair("llama")
    cells = [Cell(layer=(0, 1), kv=(1,)), Cell(position=(3,))]
    result = sweep_kv(pair, PAIRS, over=[("layer", "kv"), cells], progress=False)
    frame = result.frame()
    assert frame["layer"].tolist() == [0, 0, 1, 1, 2, 2, "0-1", None]
    assert frame["kv"].tolist() == ["key", "value"] * 3 + ["value", None]
    alone = sweep_kv(pair, PAIRS, over=("position",), progress=False)
    np.testing.assert_allclose(result.scores[-1], alone.scores[3], atol=1e-5)


def test_tokens_label_the_positions_they_are_at(make_pair):
    pair = make_pair("llama")
    result = sweep_kv(pair, PAIRS, over=("position",), progress=False)
    prompt = pair.chat.render(PAIRS[0].user)
    assert result.frame()["token"].tolist() == list(prompt.token_texts[: prompt.n_prefix])


def test_intervals_are_clustered_means_and_ratios_of_means():
    rng = np.random.default_rng(0)
    whole, noise = rng.normal(2, 1, 12), rng.normal(0, 0.3, 12)
    mean, low, high = (float(one[0]) for one in mean_and_interval(whole[None]))
    expected = clustered_mean(whole.tolist(), list(range(12)), unit="nats")
    assert (mean, low, high) == pytest.approx((expected.mean, expected.low, expected.high))
    parts = np.stack([whole / 4, whole / 4 + noise])
    share, low, high = share_and_interval(parts, whole)
    assert share[0] == low[0] == high[0] == pytest.approx(0.25)  # no spread where all shares agree
    draws = rng.integers(12, size=(4000, 12))
    ratios = parts[1][draws].sum(1) / whole[draws].sum(1)
    assert high[1] - low[1] == pytest.approx(np.subtract(*np.quantile(ratios, [0.975, 0.025])), rel=0.15)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (PatchError, "different axes among", {"over": ("layer", "head")}),
        (PatchError, "layer among 0..2, but got \\(3,\\)", {"over": [Cell(layer=(3,))]}),
        (PatchError, "there are none", {"over": []}),
        (PatchError, "a mode among", {"mode": "all"}),
        (PatchError, "cells of one layer each", {"over": ("kv",), "mode": "cumulative_up"}),
        (PatchError, "direction repair or induce", {"direction": "both"}),
        (DataError, "a metric among", {"metric": "accuracy"}),
        (DataError, "chats that end with the answer", {"metric": "target"}),
        (DataError, "pairs of an aligned", {"questions": ["Why?"]}),
        (DataError, "questions with an id each", {"questions": [PAIRS[0], PAIRS[0]]}),
        (
            DataError,
            "behind one template prefix",
            {
                "questions": [
                    PAIRS[0],
                    [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
                ],
                "metric": "kl",
            },
        ),
    ],
)
def test_what_cannot_be_swept_is_refused(make_pair, error, match, arguments):
    with pytest.raises(error, match=match):
        sweep_kv(make_pair("llama"), **({"questions": PAIRS, "progress": False} | arguments))


def test_recurrent_layers_are_refused(make_pair):
    with pytest.raises(PatchError, match="without recurrent layers"):
        sweep_kv(make_pair("qwen3_next", "full"), PAIRS)
