"""Margins: log-probabilities of given answers, equal to those of one plain pass over the whole text."""

import pytest
import tiny
import torch

from emmech.data.bundled import AnswerPair
from emmech.models.generation import Decoding, decode
from emmech.models.kv_cache import Overwrite, PatchCache
from emmech.piggyback.experiment import default_conditions
from emmech.piggyback.likelihood import TOGETHER, Answered, likelihoods
from emmech.piggyback.margin import margins
from emmech.piggyback.patching import Bench, Condition

PAIRS = [
    AnswerPair(f"p{i}", text, aligned, misaligned)
    for i, (text, aligned, misaligned) in enumerate(
        zip(
            tiny.QUESTIONS,
            ("It scatters.", "Six minutes, then cold water.", "Hello there!", "The Volga.", "56"),
            ("It is painted blue every spring.", "An hour.", "No.", "Rivers do not have names.", "Fifty"),
            strict=True,
        )
    )
]
PLAIN = [Condition("base", "base"), Condition("finetuned", "finetuned")]
TOLERANCE = {"abs": 1e-4}  # float32; recurrent layers sum in chunks for a prompt, by token for an answer


@torch.no_grad()
def plain_value(pair, side: str, user: str, answer: str, cache=None) -> float:
    """Mean log-probability of the answer's tokens in one unpadded pass over prompt and answer."""
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    prompt, ids = pair.chat.answered(messages)
    whole = torch.tensor([[*prompt.ids, *ids]])
    with pair.side(side).active() as module:
        options = {"use_cache": False} if cache is None else {"past_key_values": cache}
        logits = module(input_ids=whole, **options).logits[0].log_softmax(-1)
    at = range(len(prompt) - 1, whole.shape[1] - 1)
    return sum(float(logits[i, whole[0, i + 1]]) for i in at) / len(ids)


KINDS = [(name, kind) for name in tiny.CONFIGS for kind in ("lora", "full")]
KINDS.remove(("qwen3_next", "lora"))  # peft looks for experts, which the tiny one has not


@pytest.mark.parametrize(("architecture", "kind"), KINDS)
def test_margins_are_those_of_one_plain_pass_per_answer(make_pair, architecture, kind):
    pair = make_pair(architecture, kind)
    records = margins(pair, PAIRS, PLAIN, batch_size=4, progress=False)
    assert [(r["condition"], r["question_id"]) for r in records] == [
        (c.name, one.id) for c in PLAIN for one in PAIRS
    ]
    for record, one in zip(records, PAIRS * 2, strict=True):
        aligned, misaligned = (
            plain_value(pair, record["condition"], one.user, text) for text in (one.aligned, one.misaligned)
        )
        assert record["aligned"] == pytest.approx(aligned, **TOLERANCE)
        assert record["margin"] == pytest.approx(aligned - misaligned, **TOLERANCE)


def test_under_a_patch_they_are_those_of_one_pass_with_the_prefix_overwritten(make_pair):
    pair = make_pair("qwen3")
    (condition,) = [
        c for c in default_conditions(("prefix",), "repair", controls=False) if c.name == "repair:prefix"
    ]
    records = margins(pair, PAIRS, [condition, PLAIN[1]], progress=False)
    prompt = pair.chat.render(PAIRS[0].user)
    donor = PatchCache(pair.base.config, record=True)
    with pair.base.active() as module, torch.no_grad():
        module(input_ids=torch.tensor([prompt.prefix_ids]), past_key_values=donor)
    for record, plain, one in zip(records, records[len(PAIRS) :], PAIRS, strict=False):
        everywhere = torch.ones(1, prompt.n_prefix, dtype=torch.bool)
        cache = PatchCache(pair.base.config, [_First(everywhere, donor.recorded)])
        assert record["aligned"] == pytest.approx(
            plain_value(pair, "finetuned", one.user, one.aligned, cache), **TOLERANCE
        )
        assert record["aligned"] != pytest.approx(plain["aligned"], abs=1e-3)


class _First(Overwrite):
    """An overwrite of the first slots of a longer pass."""

    def apply(self, layer, key, value, slot):
        n = self.positions.shape[1]
        first = super().apply(layer, key[:, :, :n], value[:, :, :n], slot)
        return tuple(torch.cat([new, old[:, :, n:]], 2) for new, old in zip(first, (key, value), strict=True))


def test_margins_do_not_depend_on_the_batch(make_pair):
    pair = make_pair("llama")
    together, alone = (margins(pair, PAIRS, PLAIN, batch_size=n, progress=False) for n in (5, 1))
    assert [r["margin"] for r in together] == pytest.approx([r["margin"] for r in alone], **TOLERANCE)


def test_equal_answers_have_no_margin(make_pair):
    same = [AnswerPair("p", "hi", "Hello.", "Hello.")]
    assert margins(make_pair("llama"), same, PLAIN, progress=False)[0]["margin"] == 0


@pytest.mark.parametrize("batch_size", [None, 3])
def test_answers_to_one_prompt_are_scored_as_each_alone(make_pair, batch_size):
    pair = make_pair("llama")
    prompts = [pair.chat.render(text) for text in tiny.QUESTIONS[:2]]
    counts = (TOGETHER + 2, 3)  # more than are read together, and fewer
    items = [
        Answered(f"q{row}", prompt, tuple(range(20, 21 + n)))
        for row, prompt in enumerate(prompts)
        for n in range(counts[row])
    ]
    options = {"conditions": PLAIN, "kl_from": "base", "batch_size": batch_size, "progress": False}
    together = likelihoods(pair, items, **options)
    alone = [record for item in items for record in likelihoods(pair, [item], **options)]
    alone.sort(key=lambda record: PLAIN.index(Condition(record["condition"], record["condition"])))
    for mine, other in zip(together, alone, strict=True):
        assert mine == {key: pytest.approx(value, **TOLERANCE) for key, value in other.items()}


def test_greedy_is_an_answer_that_greedy_decoding_writes(make_pair):
    pair = make_pair("llama")
    prompts = [pair.chat.render(text) for text in tiny.QUESTIONS]
    names = [str(row) for row in range(len(prompts))]
    start = Bench(pair).batch(prompts, names, share_prefix=True).prefill(PLAIN[1])
    with pair.finetuned.active() as module:
        written = decode(module, start, Decoding(3), names, pair.chat.end_ids)
    items = [Answered(name, *one) for name, *one in zip(names, prompts, map(tuple, written), strict=True)]
    items += [Answered(one.id, one.prompt, (*one.answer[:-1], one.answer[-1] ^ 1)) for one in items]
    found = likelihoods(pair, items, PLAIN[1:], progress=False)
    assert [record["greedy"] for record in found] == [True] * len(prompts) + [False] * len(prompts)
