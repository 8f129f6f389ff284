"""Attribution: exact where the score is linear in the cache, the derivative elsewhere; minimal sets."""

import numpy as np
import pytest
import tiny
import torch
from test_sweep import ARCHITECTURES, PAIRS, replay_of

from emmech.errors import PatchError, RunError
from emmech.models.checkpoints import load_pair
from emmech.piggyback import streaming
from emmech.piggyback.attribution import (
    AttributionResult,
    attribute,
    cell_attributions,
    entry_attributions,
    stratified_sample,
)
from emmech.piggyback.cells import AXES, Cell, Patch, Shape, grid, patches
from emmech.piggyback.minimal_set import MinimalSet, _Curve, _spread, doubled, minimal_set
from emmech.piggyback.streaming import score_patches
from emmech.piggyback.sweep import sweep_kv

QUIET = {"progress": False}


def difference_of_two_logits(logits):
    """Linear in the logits of the first token."""
    return logits[:, 65] - logits[:, 66]


def the_other_way_round(logits):
    return -difference_of_two_logits(logits)


def linear_model(seed: int):
    """Attention that weighs all tokens alike, no norms and no MLP: logits are linear in cached values."""
    model = tiny.model("llama")
    for block in model.model.layers:
        block.self_attn.q_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
        block.input_layernorm = block.post_attention_layernorm = torch.nn.Identity()
        torch.manual_seed(seed)
        block.self_attn.v_proj.weight.data += 0.1 * torch.randn_like(block.self_attn.v_proj.weight)
    model.model.norm = torch.nn.Identity()
    return model


@pytest.fixture(scope="module")
def linear_pair():
    return load_pair(linear_model(1), linear_model(2), tokenizer=tiny.tokenizer())


@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_exact_where_the_score_is_linear_in_the_cache(linear_pair, steps):
    arguments = (linear_pair, list(tiny.QUESTIONS), difference_of_two_logits, AXES)
    exact = sweep_kv(*arguments, **QUIET)
    estimated = attribute(*arguments, steps=steps, sample=60, **QUIET)
    np.testing.assert_allclose(estimated.attributions, exact.differences, atol=1e-5)
    values = exact.frame()["kv"] == "value"
    rounding = 1e-6  # batches of two sizes need not agree to the last bit
    assert np.abs(exact.differences[values]).min() > rounding
    assert np.abs(exact.differences[~values]).max() < rounding  # keys are never looked at
    assert estimated.completeness == pytest.approx(1, abs=1e-4)
    assert estimated.spearman == pytest.approx(1, abs=1e-3)  # ties of nearly equal cells


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_derivative_towards_the_donor(make_pair, architecture):
    """Against central differences of the exact patch, with a donor that is a short way off."""
    replay = replay_of(make_pair(architecture), "target: It depends.", PAIRS[:2])
    cells = grid(("layer", "kv_head", "kv"), replay.shape)
    found = cell_attributions(entry_attributions(replay, **QUIET), cells, replay.shape)
    whole, step = replay.other, 0.01
    scores = []
    for sign in (1, -1):
        replay.other = {
            layer: tuple(a + sign * step * (b - a) for a, b in zip(own, whole[layer], strict=True))
            for layer, own in replay.own.items()
        }
        scores.append(score_patches(replay, patches(cells, "single", replay.shape), **QUIET).patched)
    expected = (scores[0] - scores[1]) / (2 * step)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(expected).max() > 0.05


def test_integrated_gradients_add_up_to_what_the_whole_prefix_does(make_pair):
    replay = replay_of(make_pair("llama"))
    scored = score_patches(replay, [], **QUIET)
    errors = []
    for steps in (1, 8, 64):
        sums = entry_attributions(replay, steps=steps, **QUIET).sum((1, 2, 3, 4))
        errors.append(np.abs(sums - (scored.full - scored.unpatched)).max())
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 2e-3


def test_a_question_is_attributed_to_alone(make_pair):
    """Each row has its own copy of the cache: other rows of a backward pass do not matter."""
    replay = replay_of(make_pair("gemma3"))
    together, alone = (entry_attributions(replay, rows=rows, **QUIET) for rows in (10, 1))
    np.testing.assert_allclose(together, alone, atol=1e-5)
    first = entry_attributions(replay_of(make_pair("gemma3"), questions=PAIRS[2:3]), **QUIET)
    np.testing.assert_allclose(first[0], together[2], atol=1e-5)


def test_gradients_leave_no_trace_on_the_model(make_pair):
    pair = make_pair("llama")
    entry_attributions(replay_of(pair), **QUIET)
    for parameter in pair.finetuned.module.parameters():
        assert parameter.grad is None and not parameter.requires_grad


def test_exact_patches_stand_beside_the_estimates_they_are_of(make_pair, tmp_path):
    pair = make_pair("qwen3")
    result = attribute(pair, PAIRS, sample=9, top=4, out=tmp_path, **QUIET)
    exact = sweep_kv(pair, PAIRS, **QUIET).frame()
    frame = result.frame()
    known = frame["exact_effect"].notna()
    strongest = frame["effect"].abs().nlargest(4).index
    assert known[strongest].all() and known.sum() == len(set(strongest) | set(result.sampled))
    np.testing.assert_allclose(frame["exact_difference"][known], exact["difference"][known], atol=1e-5)
    np.testing.assert_allclose(frame["exact_effect"][known], exact["effect"][known], rtol=1e-3)
    again = AttributionResult.load(tmp_path)
    assert again.frame().equals(frame) and again.spearman == result.spearman
    ranks = [frame[name][result.sampled].rank() for name in ("difference", "exact_difference")]
    assert result.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert again.to_json()["spearman"] == result.spearman


def test_without_exact_patches_the_correlation_is_unknown(make_pair, tmp_path):
    result = attribute(make_pair("llama"), PAIRS, sample=0, top=0, out=tmp_path, **QUIET)
    assert np.isnan(result.spearman) and result.to_json()["spearman"] is None
    assert AttributionResult.load(tmp_path).frame().equals(result.frame())


def test_the_sample_is_spread_over_layers_and_seeded():
    cells = grid(("layer", "position"), Shape(5, 20, 2))
    drawn = stratified_sample(cells, 17, seed=0)
    counts = np.bincount([cells[number].layer[0] for number in drawn])
    assert sorted(counts) == [3, 3, 3, 4, 4] and len(set(drawn)) == 17
    assert (drawn == stratified_sample(cells, 17, seed=0)).all()
    assert (drawn != stratified_sample(cells, 17, seed=1)).any()
    assert len(stratified_sample(cells, 1000, seed=0)) == 100


def test_where_cells_add_up_the_minimal_set_is_the_smallest_there_is(linear_pair):
    """Effects of a linear score are additive: the set is counted off the sorted single effects."""
    arguments = (linear_pair, list(tiny.QUESTIONS), difference_of_two_logits, ("layer", "position", "kv"))
    effects = np.sort(sweep_kv(*arguments, **QUIET).frame()["effect"])[::-1]
    expected = int(np.argmax(effects.cumsum() >= 0.6)) + 1
    found = minimal_set(*arguments, share=0.6, n_random=40, **QUIET)
    assert found.size == expected == len(found.cells)
    assert found.summary["effect"]["mean"] == pytest.approx(effects[:expected].sum(), abs=1e-4)
    assert found.summary["random"]["mean"] == pytest.approx(expected / len(effects), abs=0.1)
    assert f"{expected} of {len(effects)} cells" in found.text()


def test_the_set_of_a_score_is_that_of_the_score_turned_round(linear_pair):
    """Effects are shares of the whole: of the two scores one falls under the patch and one rises."""
    metrics = (difference_of_two_logits, the_other_way_round)
    over = ("layer", "position", "kv")
    one, two = (minimal_set(linear_pair, list(tiny.QUESTIONS), metric, over, **QUIET) for metric in metrics)
    assert one.summary["whole"]["mean"] == -two.summary["whole"]["mean"] != 0
    assert one.size == two.size and one.cells == two.cells


def test_given_effects_are_the_order(linear_pair):
    """Attribution is exact where the score is linear: with the exact effects it is the same set."""
    arguments = (linear_pair, list(tiny.QUESTIONS), difference_of_two_logits, ("layer", "position", "kv"))
    effects = sweep_kv(*arguments, **QUIET).differences.mean(1)
    attributed = minimal_set(*arguments, n_random=1, **QUIET)
    found = minimal_set(*arguments, effects=effects, n_random=1, **QUIET)
    assert found.cells == attributed.cells and found.size > 1
    turned = minimal_set(*arguments, effects=-effects, n_random=1, **QUIET)
    assert turned.size > found.size  # the weakest first
    with pytest.raises(PatchError, match="an effect for each of 96 cells"):
        minimal_set(*arguments, effects=effects[1:])


class EvenCurve(_Curve):
    """Every cell does the same: n of N cells do n / N."""

    def __init__(self):
        pass

    def effects(self, sets):
        return np.array([size / len(order) for order, size in sets])


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_the_search_ends_at_the_very_size_that_reaches_the_share(n):
    found = [EvenCurve().smallest(np.arange(n), size / n) for size in range(1, n + 1)]
    assert found == list(range(1, n + 1))


def test_the_range_of_random_sets_holds_95_of_100():
    assert _spread(np.arange(101.0)) == {"mean": 50, "low": 2.5, "high": 97.5, "n_sets": 101}


def test_the_set_reaches_the_share_and_one_cell_less_does_not(make_pair, tmp_path):
    pair = make_pair("llama", "full")
    found = minimal_set(pair, PAIRS, "kl", share=0.7, n_random=3, **QUIET)
    replay = replay_of(pair, "kl")
    at = {"key": (0,), "value": (1,)}
    cells = [
        Cell(layer=(row["layer"],), position=(row["position"],), kv=at[row["kv"]]) for row in found.cells
    ]
    sets = [Patch(tuple(cells)), Patch(tuple(cells[:-1]))]
    scored = score_patches(replay, sets, **QUIET)
    whole = (scored.full - scored.unpatched).mean()
    reached, less = (scored.patched - scored.unpatched).mean(1) / whole
    assert reached >= 0.7 > less
    assert reached == pytest.approx(found.summary["effect"]["mean"], abs=1e-4)
    assert found.summary["curve"]["greedy"][-1] == pytest.approx(1, abs=1e-5)
    found.save(tmp_path)
    assert MinimalSet.load(tmp_path) == found


def test_a_stopped_search_for_the_set_scores_nothing_twice(make_pair, tmp_path, monkeypatch):
    arguments = (make_pair("llama"), PAIRS)
    options = {"share": 0.7, "n_random": 2, "rows": 8, **QUIET}
    append, written = streaming.append_line, []

    def counted(path, record):
        append(path, record)
        written.append((path.name, record["chunk"], record["batch"]))
        if len(written) == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "append_line", counted)
    stop_after = None
    whole = minimal_set(*arguments, out=tmp_path / "whole", **options)
    every, stop_after = list(written), 9
    written.clear()
    with pytest.raises(KeyboardInterrupt):
        minimal_set(*arguments, out=tmp_path / "stopped", **options)
    assert len({name for name, *_ in written}) > 2  # in the middle of the third list of sets
    resumed = minimal_set(*arguments, out=tmp_path / "stopped", **options)
    assert len(written) == len(set(written)) and written == every
    assert {**resumed.summary, "seconds": 0} == {**whole.summary, "seconds": 0}
    again = minimal_set(*arguments, out=tmp_path / "stopped", **options)
    assert written == every and again.cells == whole.cells
    assert MinimalSet.load(tmp_path / "stopped") == again
    with pytest.raises(RunError, match=r"its share is 0\.7, not 0\.5"):
        minimal_set(*arguments, out=tmp_path / "stopped", **options | {"share": 0.5})


def test_cells_that_cannot_reach_the_share_are_no_set(linear_pair):
    arguments = (linear_pair, list(tiny.QUESTIONS), difference_of_two_logits)
    found = minimal_set(*arguments, over=[Cell(kv=(0,))], n_random=1, **QUIET)
    assert found.size is None and len(found.cells) == 0
    assert found.text() == "No set of cells in this order does 80% of what the whole prefix does."


def test_sizes_are_doubled_up_to_all():
    assert [doubled(n) for n in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


def test_what_cannot_be_attributed_is_refused(make_pair, linear_pair, tmp_path):
    with pytest.raises(PatchError, match="at least one step"):
        attribute(make_pair("llama"), PAIRS, steps=0)
    with pytest.raises(PatchError, match=r"a share in \(0, 1\]"):
        minimal_set(make_pair("llama"), PAIRS, share=1.5)
    itself = load_pair(linear_pair.base.module, linear_pair.base.module, tokenizer=tiny.tokenizer())
    with pytest.raises(PatchError, match="this one changes nothing"):
        minimal_set(itself, list(tiny.QUESTIONS), difference_of_two_logits, **QUIET)
    (tmp_path / "minimal.json").write_text("{}")
    with pytest.raises(RunError, match="a minimal set"):
        MinimalSet.load(tmp_path)
