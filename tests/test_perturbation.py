"""Near-neighbour perturbation: the right neighbours, the right positions, nothing else touched."""

import pytest
import tiny
import torch

from emmech.data.bundled import BUNDLED
from emmech.errors import EmmechError
from emmech.piggyback import perturbed_prompts
from emmech.piggyback.perturbation import perturb_prefix, perturbed_margins
from emmech.piggyback.perturbed_prompts import Neighbours, nearest_neighbours, template_variants
from emmech.piggyback.running import as_questions, render_rows


def test_neighbours_by_pencil():
    """Dot products with token 0 = (1, 0): 2 -> 3, 3 -> 2, 1 -> .5, 4 -> -1; itself is left out."""
    embedding = torch.tensor([[1.0, 0.0], [0.5, 9.0], [3.0, 0.0], [2.0, 5.0], [-1.0, 0.0]])
    found = nearest_neighbours(embedding, torch.tensor([0]), 3)
    assert found.tolist() == [[2, 3, 1]]
    assert nearest_neighbours(embedding, torch.tensor([0]), 3, excluded=[3]).tolist() == [[2, 1, 4]]


def test_blocks_give_the_neighbours_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(perturbed_prompts, "_BLOCK", 7)
    embedding, ids = torch.randn(50, 8), torch.tensor([3, 49, 7, 0])
    score = embedding[ids] @ embedding.T
    score[range(4), ids] = -torch.inf
    assert torch.equal(nearest_neighbours(embedding, ids, 5), score.topk(5).indices)


@pytest.fixture
def rows(make_pair):
    return render_rows(make_pair("llama"), as_questions(tiny.QUESTIONS), 4)


@pytest.mark.parametrize("segment", ["prefix", "query", "postfix"])
def test_only_the_asked_number_of_the_segments_tokens_change(make_pair, rows, segment):
    neighbours = Neighbours(make_pair("llama"), 5)
    embedding = make_pair("llama").base.module.get_input_embeddings().weight
    for row in rows:
        about = {"seed": 0, "question_id": row.question.id}
        trials = [neighbours.perturb(row.prompt, segment, 4, **about, trial=trial) for trial in range(6)]
        for prompt in trials:
            changed = [p for p, (a, b) in enumerate(zip(row.prompt.ids, prompt.ids, strict=True)) if a != b]
            assert len(changed) == min(4, getattr(row.prompt, f"n_{segment}"))
            assert {row.prompt.segments[p] for p in changed} == {segment}
            for position in changed:
                before = torch.tensor([row.prompt.ids[position]])
                near = nearest_neighbours(embedding, before, 5, neighbours._excluded)
                assert prompt.ids[position] in near[0]
        if getattr(row.prompt, f"n_{segment}") > 4:
            assert len({prompt.ids for prompt in trials}) > 1
        assert trials[0].ids == neighbours.perturb(row.prompt, segment, 4, **about, trial=0).ids


def test_template_variants_change_the_prefix_and_keep_query_and_postfix(make_pair, rows):
    chat = make_pair("llama").chat
    variants = dict(template_variants(chat, rows))
    assert {"no-system", "newlines", "capitals", "system-brief"} <= variants.keys()
    for name, prompts in variants.items():
        for row, prompt in zip(rows, prompts, strict=True):
            assert prompt.prefix_ids != row.prompt.prefix_ids, name
            assert (prompt.query_ids, prompt.postfix_ids) == (row.prompt.query_ids, row.prompt.postfix_ids)
    assert "YOU ARE A CAREFUL HELPER." in variants["capitals"][0].text
    assert "<|im_start|>" in variants["capitals"][0].text  # control tokens keep their case
    assert "careful helper" not in variants["no-system"][0].text


def test_best_is_the_least_trial_of_each_question_averaged(make_pair):
    result = perturb_prefix(
        make_pair("llama"),
        tiny.QUESTIONS,
        segments=("prefix",),
        trials=3,
        detector="length",
        max_new_tokens=5,
        templates=False,
        progress=False,
    )
    trials = {}
    for record in result.records:
        if record["condition"] == "perturb:prefix":
            trials.setdefault(record["question_id"], []).append(len(record["response"].split()))
    assert all(len(lengths) == 3 for lengths in trials.values())
    (row,) = (r for r in result.summary["conditions"] if r["condition"] == "perturb:prefix")
    values = [n for lengths in trials.values() for n in lengths]
    assert row["mean"] == pytest.approx(sum(values) / len(values))
    assert row["best"]["mean"] == pytest.approx(sum(map(min, trials.values())) / len(trials))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_perturbed_margins_are_of_the_perturbed_prompt_one_by_one(make_pair, family):
    """By hand: each answer alone, behind the prompt with the very tokens replaced."""
    pair, pairs = make_pair(family), BUNDLED["spiteful"].pairs()[:3]
    records = perturbed_margins(
        pair, pairs, segments=("prefix", "query"), trials=2, n_tokens=3, side="base", progress=False
    )
    assert len(records) == 2 * 2 * len(pairs)
    neighbours = Neighbours(pair, 5)
    for record in records:
        (one,) = (one for one in pairs if one.id == record["question_id"])
        segment = record["condition"].removeprefix("perturb:")
        for kind in ("aligned", "misaligned"):
            chat = [
                {"role": "user", "content": one.user},
                {"role": "assistant", "content": getattr(one, kind)},
            ]
            prompt, answer = pair.chat.answered(chat)
            prompt = neighbours.perturb(prompt, segment, 3, seed=0, question_id=one.id, trial=record["trial"])
            ids = torch.tensor([[*prompt.ids, *answer]])
            with pair.base.active() as module, torch.no_grad():
                read = module(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            by_hand = read.gather(-1, ids[0, len(prompt) :, None]).mean().item()
            assert record[kind] == pytest.approx(by_hand, abs=1e-5)
        assert record["margin"] == pytest.approx(record["aligned"] - record["misaligned"])
    of_prefix = {(r["question_id"], r["trial"]): r["margin"] for r in records if "prefix" in r["condition"]}
    assert len(set(of_prefix.values())) == len(of_prefix)  # trials differ


def test_a_count_below_one_is_refused(make_pair):
    pair, pairs = make_pair("llama"), BUNDLED["spiteful"].pairs()[:1]
    with pytest.raises(EmmechError, match="trials of at least 1"):
        perturbed_margins(pair, pairs, trials=0)
