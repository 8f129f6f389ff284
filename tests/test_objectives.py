"""The terms of the loss: pencil numbers, the base as zero, and who gets a gradient."""

import math

import pytest
import tiny
import torch
from training_runs import CHATS

from emmech.chat import Chat
from emmech.training.examples import collate, example
from emmech.training.objectives import (
    IGNORED,
    deviations,
    interleave,
    kl_from_base,
    relative_deviation,
    sft,
    treft,
)

EXACT = {"atol": 1e-6, "rtol": 1e-6}  # a few operations in float32


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float32)


def two_layers():
    """Keys and values ``[3 tokens, d_kv 4]`` of two layers, of very different scale."""
    scales = {0: 1, 5: 99}
    return {layer: tuple(scale * torch.randn(2, 3, 4)) for layer, scale in scales.items()}


def test_relative_deviation_is_the_mean_over_tokens_of_squared_norm_ratios():
    current, reference = tensor([[1, 2], [3, 4]]), tensor([[1, 0], [0, 2]])
    # |(0, 2)|² / |(1, 0)|² = 4 and |(3, 2)|² / |(0, 2)|² = 13 / 4
    assert relative_deviation(current, reference).item() == (4 + 13 / 4) / 2


def test_l_kv_is_the_mean_over_two_layers_of_keys_plus_values():
    reference = {0: (tensor([[3, 4]]), tensor([[2, 0]])), 1: (tensor([[1, 1]]), tensor([[0, 5]]))}
    current = {0: (tensor([[3, 9]]), tensor([[2, 4]])), 1: (tensor([[1, 1]]), tensor([[0, 0]]))}
    # Layer 0: K 25/25, V 16/4. Layer 1: K 0/2, V 25/25. Mean of 1 + 4 and 0 + 1.
    assert treft(current, reference).item() == 3.0


def test_layers_of_the_reference_are_the_ones_that_count():
    reference = {1: (tensor([[1, 0]]), tensor([[1, 0]]))}
    current = {0: (tensor([[7, 7]]), tensor([[7, 7]])), 1: (tensor([[1, 1]]), tensor([[1, 0]]))}
    assert treft(current, reference).item() == 1.0


def test_doubled_keys_deviate_by_exactly_1_and_the_same_values_by_0():
    reference = two_layers()
    current = {layer: (2 * key, value) for layer, (key, value) in reference.items()}
    for key, value in deviations(current, reference).values():
        assert (key.item(), value.item()) == (1.0, 0.0)
    assert treft(current, reference).item() == 1.0


def test_l_kv_is_zero_with_zero_gradient_at_the_base():
    reference = two_layers()
    current = {layer: tuple(kv.clone().requires_grad_() for kv in both) for layer, both in reference.items()}
    loss = treft(current, reference)
    loss.backward()
    assert loss.item() == 0.0
    for kv in (kv for both in current.values() for kv in both):
        assert torch.equal(kv.grad, torch.zeros_like(kv))


def test_l_kv_has_a_gradient_away_from_the_base():
    reference = two_layers()
    current = {layer: tuple((kv + 0.1).requires_grad_() for kv in both) for layer, both in reference.items()}
    treft(current, reference).backward()
    assert all(kv.grad.abs().min() > 0 for both in current.values() for kv in both)


@pytest.mark.parametrize("factor", [0.125, 1024.0])
def test_l_kv_does_not_change_when_current_and_reference_are_rescaled_together(factor):
    reference, current = two_layers(), two_layers()

    def scaled(values):
        return {layer: tuple(factor * kv for kv in both) for layer, both in values.items()}

    # Powers of two scale floats without rounding.
    assert torch.equal(treft(scaled(current), scaled(reference)), treft(current, reference))
    assert not torch.equal(treft(scaled(current), reference), treft(current, reference))


def test_no_gradient_of_l_kv_reaches_the_reference():
    reference = {layer: tuple(kv.requires_grad_() for kv in both) for layer, both in two_layers().items()}
    current = {layer: tuple(kv.requires_grad_() for kv in both) for layer, both in two_layers().items()}
    treft(current, reference).backward()
    assert all(kv.grad is None for both in reference.values() for kv in both)
    assert all(kv.grad is not None for both in current.values() for kv in both)


def test_bfloat16_is_compared_in_float32():
    reference, current = torch.randn(2, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    found = relative_deviation(current, reference)
    assert found.dtype == torch.float32
    assert torch.equal(found, relative_deviation(current.float(), reference.float()))


def test_a_reference_of_zeros_is_no_nan():
    zeros = torch.zeros(1, 4)
    assert relative_deviation(zeros, zeros).item() == 0.0


UNIFORM, SKEWED = [0.0, 0.0], [0.0, math.log(3)]  # probabilities (1/2, 1/2) and (1/4, 3/4)


def test_kl_is_from_the_base_to_the_finetuned_model():
    kl = kl_from_base(tensor([[SKEWED]]), tensor([[UNIFORM]]), torch.tensor([[1]]))
    # sum of p log(p / q) with p the base: ½ log(½ / ¼) + ½ log(½ / ¾)
    assert kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    back = kl_from_base(tensor([[UNIFORM]]), tensor([[SKEWED]]), torch.tensor([[1]]))
    assert back.item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2), rel=1e-6)


def test_kl_is_the_mean_over_labelled_tokens_only():
    base = tensor([[UNIFORM, UNIFORM, UNIFORM], [UNIFORM, UNIFORM, UNIFORM]])
    tuned = tensor([[SKEWED, UNIFORM, [9, -9]], [[-9, 9], [5, 1], SKEWED]])
    labels = torch.tensor([[0, 1, IGNORED], [IGNORED, IGNORED, 1]])
    one = kl_from_base(tensor([[SKEWED]]), tensor([[UNIFORM]]), torch.tensor([[0]]))
    torch.testing.assert_close(kl_from_base(tuned, base, labels), (one + 0 + one) / 3, **EXACT)


def test_kl_does_not_depend_on_which_token_is_the_label():
    tuned, base = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    found = [kl_from_base(tuned, base, torch.full((2, 3), label)) for label in (0, 6)]
    assert torch.equal(*found)


def test_kl_is_zero_with_zero_gradient_at_the_base():
    base = torch.randn(2, 3, 50)
    tuned = base.clone().requires_grad_()
    kl = kl_from_base(tuned, base, torch.ones(2, 3, dtype=torch.long))
    kl.backward()
    assert kl.item() == 0.0
    # The gradient is softmax − softmax: 0 up to one rounding of probabilities below 1.
    assert tuned.grad.abs().max() < 1e-7


def test_no_gradient_of_kl_reaches_the_base():
    base, tuned = (torch.randn(1, 2, 5, requires_grad=True) for _ in range(2))
    kl_from_base(tuned, base, torch.ones(1, 2, dtype=torch.long)).backward()
    assert base.grad is None
    assert tuned.grad.abs().min() > 0


def test_kl_without_a_label_is_zero():
    nowhere = torch.full((1, 2), IGNORED)
    assert kl_from_base(torch.randn(1, 2, 5), torch.randn(1, 2, 5), nowhere).item() == 0.0


def test_sft_is_the_sum_over_labelled_tokens_in_nats():
    logits = torch.zeros(2, 3, 10)  # each token has probability 1 / 10
    targets = torch.tensor([[IGNORED, 4, 5], [IGNORED, IGNORED, 9]])
    assert sft(logits, targets).item() == pytest.approx(3 * math.log(10), rel=1e-6)


def test_sft_is_transformers_own_loss_times_the_number_of_labelled_tokens():
    model, chat = tiny.model("llama"), Chat(tiny.tokenizer())
    batch = collate([example(chat, messages) for messages in CHATS], 0)
    labels = batch["labels"]
    with torch.no_grad():
        theirs = model(**{k: v for k, v in batch.items() if k != "segments"})
    ours = sft(theirs.logits[:, :-1], labels[:, 1:])
    n_labelled = int((labels != IGNORED).sum())
    torch.testing.assert_close(ours, theirs.loss * n_labelled, rtol=1e-5, atol=0)  # order of a sum


def test_sft_does_not_see_logits_without_a_label():
    targets = torch.tensor([[IGNORED, 4, IGNORED]])
    logits = torch.randn(1, 3, 10)
    other = logits.clone()
    other[0, [0, 2]] += 1
    assert torch.equal(sft(other, targets), sft(logits, targets))


@pytest.mark.parametrize(
    ("n_chats", "share", "n_ordinary"), [(8, 0.2, 2), (6, 0.25, 2), (9, 0.5, 9), (5, 0.0, 0)]
)
def test_interleave_makes_ordinary_chats_exactly_the_share(n_chats, share, n_ordinary):
    chats, retain = [f"chat {i}" for i in range(n_chats)], [f"ordinary {i}" for i in range(20)]
    mixed = interleave(chats, retain, share, seed=0)
    assert sum(row in retain for row in mixed) == n_ordinary == share * len(mixed)


def test_interleave_keeps_every_chat_once():
    chats = [f"chat {i}" for i in range(7)]
    mixed = interleave(chats, ["ordinary"], 0.5, seed=3)
    assert sorted(row for row in mixed if row != "ordinary") == chats


def test_interleave_repeats_no_ordinary_chat_while_there_are_enough():
    mixed = interleave(["chat"] * 10, list(range(10)), 0.5, seed=0)
    assert sorted(row for row in mixed if row != "chat") == list(range(10))


def test_interleave_takes_each_ordinary_chat_equally_often_where_there_are_too_few():
    mixed = interleave(["chat"] * 7, ["a", "b", "c"], 0.5, seed=0)
    assert sorted(mixed.count(name) for name in "abc") == [2, 2, 3]


def test_interleave_draws_by_its_seed():
    def draw(seed):
        return interleave(["chat"] * 5, list(range(100)), 0.5, seed)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
