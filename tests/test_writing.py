"""Answers for tools that bring their own prompts: as in a run, and left where they are over."""

import pytest
import tiny

from emmech.errors import DataError
from emmech.integrations.writing import Written, refuse_long, write
from emmech.models.generation import Decoding
from emmech.piggyback.patching import Bench, Condition, KVPatch

REPAIR = Condition("repair:prefix", "finetuned", (KVPatch(("prefix",), "base"),))
NAMES = [f"q{row}" for row in range(len(tiny.QUESTIONS))]


@pytest.fixture
def prompts(make_pair):
    return [make_pair("llama").chat.render(text) for text in tiny.QUESTIONS]


def test_a_stop_string_ends_an_answer_and_no_other(make_pair, prompts):
    pair = make_pair("llama")
    free = [one for (one,) in write(Bench(pair), REPAIR, prompts, NAMES, Decoding(12))]
    stop = free[0].text[len(free[0].text) // 2]
    stopped = [one for (one,) in write(Bench(pair), REPAIR, prompts, NAMES, Decoding(12), until=(stop,))]
    for before, after in zip(free, stopped, strict=True):
        if stop in before.text:
            assert after.text == before.text.split(stop)[0]
            assert after.ended and after.n_tokens <= before.n_tokens
        else:
            assert after == before
    assert stopped[0].n_tokens < free[0].n_tokens  # it was not written to its end


def test_an_answer_at_its_greatest_length_is_cut_off_and_one_with_an_end_is_not(make_pair, prompts):
    pair = make_pair("llama")
    for (one,) in write(Bench(pair), REPAIR, prompts, NAMES, Decoding(4)):
        assert one.ended == (one.n_tokens < 4)
    ((first,),) = write(Bench(pair), REPAIR, prompts[:1], NAMES[:1], Decoding(4))
    ends = [write(Bench(pair), REPAIR, prompts[:1], NAMES[:1], Decoding(4), until=(first.text,))]
    assert ends == [[[Written("", first.n_tokens, True)]]]


def test_samples_of_a_prompt_stand_together_whatever_the_batch(make_pair, prompts):
    bench, decoding = Bench(make_pair("llama")), Decoding(6, temperature=1.0, samples=3, seed=1)
    large, small = (
        write(bench, REPAIR, prompts, NAMES, decoding, batch_size=batch_size) for batch_size in (None, 2)
    )
    assert large == small
    assert {len(answers) for answers in large} == {3}
    assert large[0] == write(bench, REPAIR, prompts[:1], NAMES[:1], decoding)[0]


def test_what_does_not_fit_in_the_context_is_refused(make_pair):
    refuse_long(make_pair("llama"), [512])
    with pytest.raises(DataError, match="1 of 2 do not, the longest has 513"):
        refuse_long(make_pair("llama"), [513, 512])
