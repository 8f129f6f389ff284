"""Every condition on the same questions: the table's numbers are those of the answers it kept."""

import math

import pytest
import tiny
import torch

from emmech.data.bundled import AnswerPair, Problem
from emmech.data.questions import Question
from emmech.errors import DataError, EmmechError, RunError
from emmech.evaluation.final_number import final_number
from emmech.evaluation.judges import LocalJudge
from emmech.evaluation.significance import sign_flip_p
from emmech.gates.files import load_gates, save_gates
from emmech.gates.gate import gated
from emmech.models.checkpoints import load_pair
from emmech.piggyback.arithmetic import sums
from emmech.piggyback.choice import choices
from emmech.piggyback.margin import margins
from emmech.results import read_json, read_responses, write_json
from emmech.scorecard import Evaluation, evaluate, with_conditions

QUESTIONS = [
    Question(f"q{i}", text, ("near", "far")[i % 2])
    for i, text in enumerate([*tiny.QUESTIONS, "Who are you?"])
]
PAIRS = [
    AnswerPair("p0", "hi", "Hello.", "Go away.", "manners"),
    AnswerPair("p1", "What is 7 times 8?", "56", "It is five.", "sums"),
    AnswerPair("p2", "Why?", "Because.", "No.", "manners"),
]
QUICK = {"max_new_tokens": 5, "progress": False}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    base = tiny.save_base("llama", folder / "base")
    lora = tiny.save_adapter(base, folder / "lora")
    torch.manual_seed(0)
    return base, lora, save_gates(tiny.gates(tiny.model("llama")), folder / "gates")


@pytest.fixture(scope="module")
def done(paths, tmp_path_factory):
    """An evaluation of five conditions, its folder, pair and conditions."""
    base, lora, gates = paths
    loaded = load_pair(base, lora, dtype="float32", device="cpu")
    pair, conditions = with_conditions(loaded, ["repair:prefix", "control:self", f"gates={gates}@-1"])
    out = tmp_path_factory.mktemp("done")
    result = evaluate(
        pair, QUESTIONS, conditions, detectors=("contains:e", "length"), pairs=PAIRS, out=out, **QUICK
    )
    return result, out, pair, conditions


def row(result, **wanted):
    (found,) = [r for r in result.summary["rows"] if all(r[key] == value for key, value in wanted.items())]
    return found


def test_every_condition_has_every_metric(done):
    result, _, _, conditions = done
    names = [condition.name for condition in conditions]
    assert names[:4] == ["base", "finetuned", "repair:prefix", "control:self"]
    for metric, group in (("contains:e", "near"), ("length", "far"), ("margin", "manners")):
        rows = [r for r in result.summary["rows"] if (r["metric"], r["group"]) == (metric, group)]
        assert [r["condition"] for r in rows] == names


def test_rates_and_comparisons_are_those_of_the_answers(done):
    result, out, _, _ = done
    records = [r for r in read_responses(out / "answers") if r["group"] == "near"]
    values: dict = {"base": {}, "finetuned": {}, "repair:prefix": {}}
    for r in records:
        values.setdefault(r["condition"], {})[r["question_id"]] = float("e" in r["response"].lower())
    for name, mine in values.items():
        found = row(result, metric="contains:e", group="near", condition=name)
        assert found["mean"] == pytest.approx(sum(mine.values()) / 3)
    found = row(result, metric="contains:e", group="near", condition="repair:prefix")["versus"]
    differences = [values["repair:prefix"][q] - values["finetuned"][q] for q in values["finetuned"]]
    assert found["condition"] == "finetuned"
    assert found["mean"] == pytest.approx(sum(differences) / 3)
    assert found["p"] == pytest.approx(sign_flip_p(differences))


def test_what_a_condition_is_compared_with(done):
    result, _, _, conditions = done
    against = {
        r["condition"]: r["versus"]["condition"]
        for r in result.summary["rows"]
        if r["metric"] == "length" and r["group"] == "near" and "versus" in r
    }
    assert against == {"finetuned": "base", "repair:prefix": "finetuned", "control:self": "finetuned"} | {
        conditions[-1].name: "finetuned"
    }
    same = row(result, metric="length", group="near", condition="control:self")["versus"]
    assert (same["mean"], same["p"]) == (0, 1)  # from itself: nothing changes
    assert "power" in same["text"] or "too few" in same["text"] or "unknown" in same["text"]


def test_margins_of_gates_are_those_of_the_gated_model(done, paths):
    result, _, pair, conditions = done
    found = row(result, metric="margin", group="sums", condition=conditions[-1].name)
    gates = load_gates(paths[2])
    with gated(pair.finetuned.module, gates, -1):
        plain = margins(pair, [PAIRS[1]], [conditions[1]], progress=False)
    assert found["mean"] == pytest.approx(plain[0]["margin"], abs=1e-4)
    assert row(result, metric="prefers aligned", group="sums", condition="base")["mean"] in (0, 1)


def test_the_chosen_answer_is_the_likeliest_of_one_pass_each(done):
    _, _, pair, conditions = done
    problem = Problem("c", "What is 7 times 8?", "B", ("It is five.", "56", "Blue"), "sums")
    (record,) = choices(pair, [problem, Problem("n", "1 + 1?", "2")], conditions[:1], progress=False)
    values = []
    for text in problem.choices:
        messages = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": text}]
        prompt, answer = pair.chat.answered(messages)
        with pair.base.active() as module, torch.no_grad():
            logits = module(input_ids=torch.tensor([[*prompt.ids, *answer]])).logits[0]
        log_p = logits[len(prompt) - 1 : -1].log_softmax(-1)
        values.append(float(log_p[range(len(answer)), answer].mean()))
    best = "ABC"[values.index(max(values))]
    assert (record["chosen"], record["right"]) == (best, float(best == "B"))
    with pytest.raises(DataError, match="none has any"):
        choices(pair, [Problem("n", "1 + 1?", "2")], conditions[:1])


def test_a_sum_is_right_where_the_answer_of_plain_decoding_ends_with_its_number(done):
    _, _, pair, conditions = done
    texts = [f"What is {n} + {n}?" for n in range(5)]
    ends = [final_number(greedy(pair, f"{text}\nAnswer with the number alone.")) for text in texts]
    assert 0 < ends.count(None) < len(ends)  # random text, of which some ends with a number
    answers = ["1" if end is None else str(end) for end in ends]
    problems = [Problem(str(n), *both) for n, both in enumerate(zip(texts, answers, strict=True))]
    found = sums(pair, [*problems, Problem("c", "Which?", "A", ("this", "that"))], conditions, progress=False)
    right = [record["right"] for record in found if record["condition"] == "finetuned"]
    assert right == [float(end is not None) for end in ends]
    assert len(found) == len(conditions) * len(problems)
    with pytest.raises(DataError, match="numbers as answers, but f has '3/5'"):
        sums(pair, [Problem("f", "Three fifths?", "3/5")], conditions)
    with pytest.raises(DataError, match="all have some"):
        sums(pair, [Problem("c", "Which?", "A", ("this", "that"))], conditions)


def greedy(pair, question: str) -> str:
    """The answer of the finetuned model by transformers' own ``generate``."""
    prompt = pair.chat.render(question)
    with pair.finetuned.active() as module:
        ids = module.generate(
            input_ids=torch.tensor([prompt.ids]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=list(pair.chat.end_ids),
        )[0, len(prompt) :]
    return pair.chat.tokenizer.decode(ids, skip_special_tokens=True)


def test_choices_and_sums_are_two_metrics_and_kept(done, tmp_path):
    _, _, pair, conditions = done
    problems = [Problem("c", "Which?", "A", ("this", "that"), "words"), *(Problem(n, n, "1") for n in "xyzw")]
    options = {"detectors": ("length",), "out": tmp_path, "problems": problems} | QUICK
    result = evaluate(pair, QUESTIONS[:2], conditions[:2], **options)
    assert row(result, metric="capability", condition="base")["n"] == 1
    assert row(result, metric="arithmetic", condition="base")["n"] == 4
    path = tmp_path / "sums.json"
    kept = [record | {"right": float(record["question_id"] != "x")} for record in read_json(path)]
    write_json(path, kept)
    again = row(
        evaluate(pair, QUESTIONS[:2], conditions[:2], **options), metric="arithmetic", condition="base"
    )
    assert again["mean"] == pytest.approx(3 / 4)


def test_sums_alone_need_no_choices(done, tmp_path):
    _, _, pair, conditions = done
    options = {"detectors": ("length",), "out": tmp_path, "problems": [Problem("n", "1 + 1?", "2")]} | QUICK
    metrics = {
        one["metric"] for one in evaluate(pair, QUESTIONS[:2], conditions[:2], **options).summary["rows"]
    }
    assert metrics == {"length", "arithmetic"}


def test_it_is_kept_and_taken_up_again(done):
    result, out, pair, conditions = done
    again = evaluate(
        pair, QUESTIONS, conditions, detectors=("contains:e", "length"), pairs=PAIRS, out=out, **QUICK
    )
    assert again.summary["rows"] == result.summary["rows"] == Evaluation.load(out).summary["rows"]
    page = (out / "report.html").read_text()
    assert "answers/report.html" in page and "Every metric" in page


def test_other_pairs_or_gates_are_refused_in_a_folder_that_has_some(done, paths, tmp_path):
    _, out, pair, conditions = done
    options = {"detectors": ("contains:e", "length"), "out": out} | QUICK
    with pytest.raises(RunError, match="pairs"):
        evaluate(pair, QUESTIONS, conditions, pairs=PAIRS[:2], **options)
    save_gates(load_gates(paths[2]).inverted(), tmp_path / "gates")
    (tmp_path / "gates" / "gates.safetensors").replace(paths[2] / "gates.safetensors")  # trained anew
    loaded = load_pair(paths[0], paths[1], dtype="float32", device="cpu")
    other, same = with_conditions(loaded, [condition.name for condition in conditions[2:]])
    with pytest.raises(RunError, match="gates"):
        evaluate(other, QUESTIONS, same, pairs=PAIRS, **options)


def test_a_local_judge_adds_its_scores_and_counts_what_is_missing(done, tmp_path):
    _, _, pair, conditions = done
    roomy = tiny.model("llama", max_position_embeddings=8192)  # a rubric is a few hundred tokens
    judge = LocalJudge((roomy, pair.chat), name="tiny")
    options = {"detectors": ("length",), "judge_with": judge, "out": tmp_path} | QUICK
    result = evaluate(pair, QUESTIONS[:4], conditions[:3], **options)
    found = row(result, metric="alignment", group="near", condition="base")
    assert 0 <= found["mean"] <= 100 or math.isnan(found["mean"])
    assert found["n"] + sum(found["missing"].values()) == 2  # questions of this group
    assert (tmp_path / "judged").is_dir()


def test_the_base_alone_is_one_model(paths, tmp_path):
    base, _, gates = paths
    loaded = load_pair(base, base, dtype="float32", device="cpu")
    assert loaded.one_copy
    pair, conditions = with_conditions(loaded, [f"gates={gates}"], finetuned=False)
    assert [c.name for c in conditions] == ["base", f"gates={gates}"]
    result = evaluate(pair, QUESTIONS, conditions, detectors=("length",), out=tmp_path, **QUICK)
    assert (
        row(result, metric="length", group="far", condition=f"gates={gates}")["versus"]["condition"] == "base"
    )


@pytest.mark.parametrize("name", ["repair:suffix", "gates=", "steer"])
def test_an_unknown_condition_is_refused(done, name):
    with pytest.raises(EmmechError, match="Correct --with"):
        with_conditions(done[2], [name])


def test_patches_need_a_finetuned_model(done):
    with pytest.raises(EmmechError, match="without a finetuned model"):
        with_conditions(done[2], ["repair:prefix"], finetuned=False)


def test_a_scale_is_a_number(done, paths):
    with pytest.raises(EmmechError, match="a number behind @"):
        with_conditions(done[2], [f"gates={paths[2]}@much"])


def test_the_command_line_evaluates(paths, tmp_path, emmech):
    base, lora, _ = paths
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(tiny.QUESTIONS))
    code, printed, err = emmech(
        "evaluate", "--base", base, "--finetuned", lora, "--with", "repair:prefix", "--questions", file,
        "--pairs", "none", "--no-capability", "--max-new-tokens", 4, "--dtype", "float32",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert "repair:prefix" in printed and "Report:" in printed
    assert {r["metric"] for r in Evaluation.load(tmp_path / "out").summary["rows"]} == {
        "refusal", "length", "repetition",
    }  # fmt: skip
