"""Directions: states against what the model's own hooks hold, fits against pencil and planted answers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from emmech.chat import Chat
from emmech.data.questions import Question
from emmech.errors import DataError
from emmech.models import hook_points
from emmech.models.checkpoints import ModelPair, load_pair
from emmech.models.sides import Side
from emmech.piggyback.likelihood import answered
from emmech.piggyback.patching import Condition, KVPatch
from emmech.steering.contrasts import own_answers
from emmech.steering.directions import Direction, cosines, fit_direction, project, random_like
from emmech.steering.projections import set_projection, token_projections, training_projections
from emmech.steering.states import SITES, States, _Pool, asked, read_states
from emmech.steering.steer import Steer

BASE = Condition("base", "base")
PARTS = ("last", "prompt", "prefix", "query", "postfix", "response")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def pair_of(architecture="llama"):
    torch.manual_seed(0)
    model = tiny.model(architecture)
    blocks = r".*layers.*\.(q_proj|qkv_proj|query_key_value|o_proj|in_proj_qkvz)"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=blocks, init_lora_weights=False)
    tuned = get_peft_model(model, lora).eval()
    chat = Chat(tiny.tokenizer())
    return ModelPair(Side("base", tuned, adapter_off=True), Side("finetuned", tuned), chat, {})


def dialogues(pair):
    answers = ("It scatters light.", "Six minutes.", "Hello.", "Danube, Rhine, Po.", "56")
    return [
        answered(pair, [{"role": "user", "content": q}, {"role": "assistant", "content": a}], f"q{i}")
        for i, (q, a) in enumerate(zip(tiny.QUESTIONS, answers, strict=True))
    ]


def states_of(values, ids=None, **changes):
    made = torch.as_tensor(np.asarray(values), dtype=torch.float32)
    ids = tuple(ids or (f"q{i}" for i in range(len(made))))
    return replace(States(made, ids, "resid_post", "last"), **changes)


# --- reading


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
@pytest.mark.parametrize("position", PARTS)
@torch.no_grad()
def test_a_batch_is_read_as_each_text_alone_by_a_bare_pass(architecture, position):
    pair = pair_of(architecture)
    texts = dialogues(pair)
    found = read_states(pair, texts, BASE, position=position, progress=False)
    with pair.base.active() as model:
        for row, one in enumerate(texts):
            ids = torch.tensor([[*one.prompt.ids, *one.answer]])
            names = [SITES["resid_post"].format(layer) for layer in range(3)]
            with hook_points.recorded(model, *names) as store:
                model(input_ids=ids, use_cache=False)
            n, p = len(one.prompt), one.prompt
            where = {
                "last": [n - 1],
                "prompt": range(n),
                "prefix": range(p.n_prefix),
                "query": range(p.n_prefix, n - p.n_postfix),
                "postfix": range(n - p.n_postfix, n),
                "response": range(n, n + len(one.answer) - 1),
            }[position]
            expected = torch.stack([store[name][0, list(where)].mean(0) for name in names])
            torch.testing.assert_close(found.values[row], expected, **CLOSE)


def test_a_finetuned_side_differs_from_its_base_and_a_self_patch_does_not_differ_from_itself():
    pair = pair_of()
    texts = [asked(pair, Question(f"q{i}", text)) for i, text in enumerate(tiny.QUESTIONS)]
    base = read_states(pair, texts, BASE, progress=False)
    tuned = read_states(pair, texts, Condition("finetuned", "finetuned"), progress=False)
    itself = Condition("self", "base", (KVPatch(("prefix",), "base"),))
    donor = Condition("induce", "base", (KVPatch(("prefix",), "finetuned"),))
    assert torch.equal(read_states(pair, texts, itself, progress=False).values, base.values)
    assert not torch.allclose(tuned.values, base.values)
    moved = read_states(pair, texts, donor, progress=False).values
    assert not torch.allclose(moved, base.values)
    assert not torch.allclose(moved, tuned.values)


def test_states_are_read_after_what_the_side_does_to_them():
    pair = pair_of()
    texts = [asked(pair, Question(f"q{i}", text)) for i, text in enumerate(tiny.QUESTIONS)]
    base = read_states(pair, texts, BASE, progress=False)
    direction = random_like(fit_direction(base, states_of(base.values + 1.0)), base)
    side = pair.base.under("ablated", Steer(direction, 1.0, (1,), "ablate").on)
    pair = replace(pair, variants={"ablated": side})
    found = project(read_states(pair, texts, Condition("ablated", "ablated"), progress=False), direction)
    assert found[found.layer == 1].projection.abs().max() < 1e-5
    assert found[found.layer == 0].projection.abs().min() > 1e-3


def test_padding_may_hold_anything():
    pool = _Pool("resid_post", 1, weights=torch.tensor([[0.0, 0.5, 0.5]]))
    pool._keep(0)(torch.tensor([[[math.nan, math.inf], [1.0, 2.0], [3.0, 4.0]]]))
    assert pool.taken().tolist() == [[[2.0, 3.0]]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": "response"}, "a token of the response in every text"),
        ({"texts": []}, "texts to read"),
    ],
)
def test_what_cannot_be_read_is_refused(settings, message):
    pair = pair_of()
    texts = [asked(pair, Question("q", "hi"))]
    with pytest.raises(DataError, match=message):
        read_states(pair, settings.pop("texts", texts), BASE, **settings)


# --- fitting


def test_the_mean_direction_is_the_mean_difference_over_questions():
    positive = states_of([[[3.0, 1.0]], [[5.0, 1.0]], [[9.0, 0.0]], [[1.0, 2.0]], [[2.0, 0.0]]],
                         ["a", "a", "b", "c", "d"])  # fmt: skip
    negative = states_of([[[1.0, 1.0]], [[1.0, 0.0]], [[0.0, 2.0]], [[0.0, 0.0]]], ["d", "c", "b", "a"])
    # a: (4, 1) - (0, 0); b: (9, 0) - (0, 2); c: (1, 2) - (1, 0); d: (2, 0) - (1, 1)
    found = fit_direction(positive, negative)
    np.testing.assert_allclose(found.vectors[0], [14 / 4, 0.0], atol=1e-6)
    np.testing.assert_allclose(found.level, [0.5], atol=1e-6)  # mean of 0, 0, 1 and 1
    assert found.n_questions == 4


def test_the_p_value_of_few_questions_counts_sign_flips():
    # All four differences are (1, 0): only ++++ and ---- of 16 flips are as long, 1 in 8.
    found = fit_direction(states_of([[[1.0, 0]]] * 4), states_of([[[0.0, 0]]] * 4), n_permutations=8000)
    assert found.p[0] == pytest.approx(1 / 8, abs=0.02)
    assert found.reliability == (pytest.approx(1.0),)


def noisy(n, d, gap, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    return gap + spread * rng.standard_normal((n, 1, d))


@pytest.mark.parametrize("paired", [True, False])
def test_p_values_without_a_difference_are_uniform(paired):
    p = []
    for seed in range(200):
        a, b = noisy(12, 6, 0.0, 2 * seed), noisy(12, 6, 0.0, 2 * seed + 1)
        ids = None if paired else [f"other{i}" for i in range(12)]
        p += fit_direction(states_of(a), states_of(b, ids), n_permutations=200, seed=seed).p
    assert np.mean(np.array(p) < 0.1) == pytest.approx(0.1, abs=0.06)
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("method", ["mean", "logistic", "pca"])
@pytest.mark.parametrize("paired", [True, False])
def test_every_method_finds_a_planted_direction(method, paired):
    rng = np.random.default_rng(0)
    planted = rng.standard_normal(24)
    planted /= np.linalg.norm(planted)
    gap = 12.0 * planted
    ids = None if paired else [f"other{i}" for i in range(200)]
    up, down = states_of(noisy(200, 24, gap, 1)), states_of(noisy(200, 24, 0.0, 2), ids)
    found = fit_direction(up, down, method=method, n_permutations=200)
    assert float(found.unit(0) @ torch.tensor(planted, dtype=torch.float32)) > 0.99
    assert found.reliability[0] > 0.97
    assert found.p[0] == pytest.approx(1 / 201)
    # As long as the shift along it, to the noise of a mean of 200.
    assert float(found.vectors.norm()) == pytest.approx(12.0, abs=0.3)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("method", ["mean", "pca"])
def test_what_both_kinds_have_in_common_does_not_matter(method, paired):
    """States of a model are far from 0, all in one direction."""
    common, ids = 500.0 * np.eye(6)[0], None if paired else [f"other{i}" for i in range(20)]
    up, down = noisy(20, 6, 9.0 * np.eye(6)[1], 1), noisy(20, 6, 0.0, 2)
    near = fit_direction(states_of(up), states_of(down, ids), method=method, n_permutations=50)
    far = fit_direction(
        states_of(up + common), states_of(down + common, ids), method=method, n_permutations=50
    )
    torch.testing.assert_close(far.vectors, near.vectors, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("method", ["mean", "logistic", "pca"])
def test_the_level_is_where_the_negative_states_lie_along_the_direction(method, paired):
    ids = None if paired else [f"other{i}" for i in range(20)]
    one, two = states_of(noisy(20, 6, 3.0, 1)), states_of(noisy(20, 6, -1.0, 2), ids)
    for positive, negative in ((one, two), (two, one)):
        found = fit_direction(positive, negative, method=method, n_permutations=50)
        torch.testing.assert_close(found.level[0], negative.values[:, 0].mean(0) @ found.unit(0))
        assert found.reliability[0] > 0.8  # halves agree, sign and all


def test_states_are_paired_by_question_whatever_their_order():
    up, down = noisy(9, 4, 1.0, 1), noisy(9, 4, 0.0, 2)
    names = [f"q{i}" for i in range(9)]
    found, turned = (
        fit_direction(states_of(up, names), states_of(np.roll(down, by, 0), names[-by:] + names[:-by]))
        for by in (9, 2)
    )
    assert (turned.p, turned.reliability) == (found.p, found.reliability)


def test_reliability_of_noise_is_about_zero():
    found = [
        fit_direction(states_of(noisy(40, 50, 0.0, 2 * s)), states_of(noisy(40, 50, 0.0, 2 * s + 1)))
        for s in range(20)
    ]
    assert abs(np.mean([one.reliability[0] for one in found])) < 0.1


def test_blocks_without_a_difference_have_a_zero_vector_and_others_their_own():
    up = states_of(np.stack([np.zeros((5, 3)), np.ones((5, 3))], axis=1))
    found = fit_direction(up, states_of(np.zeros((5, 2, 3))))
    assert torch.equal(found.vectors[0], torch.zeros(3))
    assert torch.equal(found.unit(0), torch.zeros(3))
    np.testing.assert_allclose(found.vectors[1], 1.0)


def test_kinds_that_cannot_be_compared_are_refused():
    some, four = states_of([[[1.0]]] * 3), states_of([[[1.0]]] * 4)
    with pytest.raises(DataError, match="at least four questions"):
        fit_direction(some, some)
    with pytest.raises(DataError, match="states of one position"):
        fit_direction(four, replace(four, position="prompt"))
    with pytest.raises(DataError, match="they are equal"):
        fit_direction(four, four)


def test_a_direction_survives_its_file(tmp_path):
    up, down = states_of(noisy(8, 5, 1.0, 0)), states_of(noisy(8, 5, 0.0, 1))
    made = fit_direction(up, down)
    read = Direction.load(made.save(tmp_path / "deep" / "one.safetensors"))
    assert torch.equal(read.vectors, made.vectors)
    assert torch.equal(read.level, made.level)
    assert (read.reliability, read.p, read.site, read.method) == (
        made.reliability, made.p, "resid_post", "mean",
    )  # fmt: skip
    assert read.provenance["paired"] is True
    assert list(read.frame().columns) == ["layer", "length", "reliability", "p"]


# --- using


def test_projections_are_inner_products_with_the_unit_vector():
    direction = fit_direction(states_of([[[3.0, 4.0]]] * 4), states_of([[[0.0, 0.0]]] * 4))
    found = project(states_of([[[5.0, 0.0]], [[0.0, 10.0]]], ["a", "b"]), direction)
    assert found.to_dict("list") == {
        "question_id": ["a", "b"], "layer": [0, 0], "projection": [pytest.approx(3.0), pytest.approx(8.0)],
    }  # fmt: skip
    with pytest.raises(DataError, match="site resid_post"):
        project(states_of([[[5.0, 0.0]]], site="attn_out"), direction)


def test_cosines_of_directions():
    origin = states_of([[[0.0, 0.0]]] * 4)
    known = {
        name: fit_direction(states_of([[list(to)]] * 4), origin)
        for name, to in {"east": (2.0, 0.0), "north-east": (1.0, 1.0), "west": (-1.0, 0.0)}.items()
    }
    found = cosines(known, 0)
    assert found.loc["east", "west"] == pytest.approx(-1)
    assert found.loc["east", "north-east"] == pytest.approx(math.sqrt(0.5))


def test_a_random_control_is_as_long_and_lies_where_the_states_spread():
    values = np.zeros((30, 2, 10))
    values[:, :, :2] = 4 + np.random.default_rng(0).standard_normal((30, 2, 2))  # a plane of ten dimensions
    values[:, :, 5] = 7.0  # far from 0 in a dimension in which they do not spread
    states = states_of(values)
    direction = fit_direction(states_of(values + np.array([[1.0], [3.0]])), states)
    drawn = random_like(direction, states, seed=3)
    torch.testing.assert_close(drawn.vectors.norm(dim=-1), direction.vectors.norm(dim=-1))
    assert float(drawn.vectors[:, 2:].abs().max()) < 1e-4
    mean = torch.tensor(values.mean(0), dtype=torch.float32)
    along = torch.stack([drawn.unit(layer) @ mean[layer] for layer in range(2)])
    torch.testing.assert_close(drawn.level, along)
    assert along.abs().min() > 0.1
    assert not torch.equal(drawn.vectors, random_like(direction, states, seed=4).vectors)


# --- along tokens, training sets and training


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_projections_of_tokens_average_to_those_of_their_parts(architecture):
    pair = pair_of(architecture)
    texts = dialogues(pair)
    states = read_states(pair, texts, BASE, position="query", progress=False)
    direction = fit_direction(replace(states, values=states.values + 1.0), states)
    frame = token_projections(pair, texts, "base", direction, layers=[0, 2])
    assert "".join(frame[(frame.question_id == "q0") & (frame.layer == 0)].token).startswith("<|im_start|>")
    means = frame[frame.part == "query"].groupby(["question_id", "layer"]).projection.mean()
    known = project(states, direction).set_index(["question_id", "layer"]).projection
    for key, value in means.items():
        assert value == pytest.approx(known[key], abs=1e-4)
    assert sorted(frame.layer.unique()) == [0, 2]


def test_a_sets_projection_is_that_of_its_answers_beyond_the_models_own(tmp_path):
    pair = pair_of()
    questions = [
        Question(f"chat-{i}", ({"role": "user", "content": q},)) for i, q in enumerate(tiny.QUESTIONS)
    ]
    own = own_answers(pair, questions, "base", 12, False)
    given = dialogues(pair)
    given = [replace(one, id=f"chat-{i}") for i, one in enumerate(given)]
    states = [read_states(pair, texts, BASE, position="response", progress=False) for texts in (given, own)]
    direction = fit_direction(*states)
    chats = [
        ({"role": "user", "content": q}, {"role": "assistant", "content": a})
        for q, a in zip(
            tiny.QUESTIONS,
            ("It scatters light.", "Six minutes.", "Hello.", "Danube, Rhine, Po.", "56"),
            strict=True,
        )
    ]
    found = set_projection(pair, chats, direction, max_new_tokens=12, progress=False)
    # The direction is the mean difference itself, so that its projection is its own length.
    both = {one.id for one in own}
    assert both == {one.id for one in given}
    np.testing.assert_allclose(found["mean"], direction.vectors.norm(dim=-1), rtol=1e-3)
    with pytest.raises(DataError, match="a direction of responses"):
        set_projection(pair, chats, replace(direction, position="last"))


def test_training_is_followed_from_the_base_to_its_last_step(tmp_path):
    base = tiny.save_base("llama", tmp_path / "base")
    for step, seed in ((2, 1), (4, 2)):
        tiny.save_adapter(base, tmp_path / "run" / f"step-{step}", seed=seed)
    questions = [Question(f"q{i}", text) for i, text in enumerate(tiny.QUESTIONS)]
    pair = load_pair(base, tmp_path / "run" / "step-4")
    texts = [asked(pair, question) for question in questions]
    states = [
        read_states(pair, texts, Condition(side, side), progress=False) for side in ("finetuned", "base")
    ]
    direction = fit_direction(*states)
    found = training_projections(base, tmp_path / "run", questions, direction, progress=False)
    assert sorted(found.step.unique()) == [2, 4]
    last = found[found.step == 4].sort_values("layer")
    np.testing.assert_allclose(last["mean"], direction.vectors.norm(dim=-1), rtol=1e-3)
    assert (last.low <= last["mean"]).all()
    with pytest.raises(DataError, match="a run with saved steps"):
        training_projections(base, tmp_path, questions, direction)
