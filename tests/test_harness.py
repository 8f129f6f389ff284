"""lm-evaluation-harness on intervened models: its own numbers where nothing is patched, and ours beside."""

import json
import math
import sys

import numpy as np
import pytest
import tiny
import torch
from harness_tasks import N_DOCUMENTS, save_tasks
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from emmech.errors import ChatError, DataError, PatchError, RunError
from emmech.evaluation.significance import sign_flip_p
from emmech.integrations.harness import CELLS, HarnessResult, run_harness
from emmech.integrations.harness_model import ConditionLM
from emmech.integrations.harness_tasks import load_tasks, prepare
from emmech.models.checkpoints import load_pair
from emmech.piggyback.experiment import patch_prefix
from emmech.piggyback.patching import Condition, KVPatch, patch_kv
from emmech.results import read_lines
from emmech.scorecard import with_conditions

BASE = Condition("base", "base")
REPAIR = Condition("repair:prefix", "finetuned", (KVPatch(("prefix",), "base"),))
QUESTION = [{"role": "user", "content": "What is 7 times 8?"}]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    base = tiny.save_base("llama", folder / "base", max_position_embeddings=2048)
    return base, tiny.save_adapter(base, folder / "lora"), save_tasks(folder / "tasks")


@pytest.fixture(scope="module")
def lab(paths):
    """A pair and its conditions."""
    loaded = load_pair(*paths[:2], dtype="float32", device="cpu")
    return with_conditions(loaded, ["repair:prefix", "control:self"])


@pytest.fixture(scope="module")
def done(lab, paths, tmp_path_factory):
    """A finished run of a group of two tasks, and its folder."""
    out = tmp_path_factory.mktemp("done")
    return run_harness(*lab, ["own"], include_path=paths[2], out=out, progress=False), out


def requests(kind, *arguments, task="t"):
    return [Instance(kind, {}, one, 0, (task, row, 1)) for row, one in enumerate(arguments)]


def chat(*messages):
    return json.dumps(messages)


def row(result, **wanted):
    (found,) = [r for r in result.summary["rows"] if all(r[key] == value for key, value in wanted.items())]
    return found


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_log_likelihoods_of_the_unpatched_base_are_those_of_the_harness(lab, paths, num_fewshot):
    task = load_tasks(["grammar"], paths[2], num_fewshot).tasks["grammar"]
    plain = HFLM(AutoModelForCausalLM.from_pretrained(paths[0]), tokenizer=tiny.tokenizer(), batch_size=4)
    ours, theirs = (
        [sample["resps"] for sample in _evaluated(lm, task)["samples"]["grammar"]]
        for lm in (ConditionLM(lab[0], BASE, progress=False), plain)
    )
    # The harness scores the line break that ends the template as if it were the answer's.
    contexts = [request.args[0] for request in task.instances[::4]]
    ends = plain.loglikelihood(requests("loglikelihood", *((one.rstrip(), "\n") for one in contexts)))
    assert len(ours) == len(ends) == N_DOCUMENTS
    for mine, other, (end, _) in zip(ours, theirs, ends, strict=True):
        assert [choice[0][0] + end for choice in mine] == pytest.approx([c[0][0] for c in other], abs=1e-4)


def _evaluated(lm, task):
    prepare(task)
    return evaluate(
        lm, {"tasks": {task.task_name: task}}, apply_chat_template=True, fewshot_as_multiturn=True
    )


def test_a_patched_log_likelihood_is_that_of_a_pass_with_the_patched_cache(lab):
    (found,) = ConditionLM(lab[0], REPAIR, progress=False).loglikelihood(
        requests("loglikelihood", (chat(*QUESTION), "It is 56."))
    )
    (plain,) = ConditionLM(lab[0], Condition("finetuned", "finetuned"), progress=False).loglikelihood(
        requests("loglikelihood", (chat(*QUESTION), "It is 56."))
    )
    assert found[0] == pytest.approx(_by_hand(lab[0], "It is 56."), abs=1e-4)
    assert abs(found[0] - plain[0]) > 0.01


def _by_hand(pair, answer):
    """Of the answer behind the question, with the base's K and V at the prefix."""
    patched = patch_kv(pair, [QUESTION])
    ids = tiny.tokenizer()(answer, add_special_tokens=False)["input_ids"]
    tokens = torch.cat([patched.inputs["input_ids"], torch.tensor([ids])], dim=1)
    with pair.finetuned.active() as module, torch.no_grad():
        cache, n = patched.cache(), patched.inputs["input_ids"].shape[1]
        start = module(**patched.inputs, past_key_values=cache).logits[0, -1:]
        cache.overwrites = ()
        rest = module(input_ids=tokens[:, n:], past_key_values=cache).logits[0, :-1]
    log_p = torch.cat([start, rest]).log_softmax(-1)
    return float(log_p[range(len(ids)), ids].sum())


def test_what_a_task_begins_the_answer_with_is_read_and_not_scored(lab, paths):
    task = load_tasks(["begun"], paths[2]).tasks["begun"]
    (sample, *_) = _evaluated(ConditionLM(lab[0], BASE, progress=False), task)["samples"]["begun"]
    prompt = lab[0].chat.render(json.loads(sample["arguments"][0][0])[:-1])
    assert sample["arguments"][0][1] == " A"
    encode = tiny.tokenizer()
    begun, answer = (encode(t, add_special_tokens=False)["input_ids"] for t in ("The answer is", " A"))
    with lab[0].base.active() as module, torch.no_grad():
        logits = module(input_ids=torch.tensor([[*prompt.ids, *begun, *answer]])).logits[0]
    log_p = logits[-len(answer) - 1 : -1].log_softmax(-1)
    expected = float(log_p[range(len(answer)), answer].sum())
    assert sample["resps"][0][0][0] == pytest.approx(expected, abs=1e-4)


def test_answers_are_those_of_the_piggyback_test_and_stop_at_a_string(lab):
    model = ConditionLM(lab[0], REPAIR, progress=False)
    contexts = [chat({"role": "user", "content": text}) for text in tiny.QUESTIONS]
    texts = model.generate_until(requests("generate_until", *((c, {"max_gen_toks": 12}) for c in contexts)))
    records = patch_prefix(
        lab[0], tiny.QUESTIONS, segments=("prefix",), direction="repair", controls=False,
        max_new_tokens=12, progress=False,
    ).records  # fmt: skip
    expected = [r["response"] for r in records if r["condition"] == "repair:prefix"]
    assert [text.strip() for text in texts] == expected
    stop = texts[0][len(texts[0]) // 2]
    how = {"max_gen_toks": 12, "until": [stop], "do_sample": False, "temperature": 1.0}
    stopped = model.generate_until(requests("generate_until", *((c, how) for c in contexts)))
    assert stopped == [text.split(stop)[0] for text in texts]
    assert stopped[0] != texts[0]


def test_repetitions_are_drawn_apart_and_again_the_same(lab):
    model = ConditionLM(lab[0], BASE, progress=False)
    (once,) = requests(
        "generate_until", (chat(*QUESTION), {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0})
    )
    first = model.generate_until([once, once])
    assert first[0] != first[1]
    assert model.generate_until([once, once]) == first


def test_every_task_has_the_harness_value_under_every_condition(done, lab):
    result, out = done
    names = [condition.name for condition in lab[1]]
    assert result.summary["shown"] == ["own"]
    assert [r["condition"] for r in result.summary["rows"] if r["task"] == "own"] == names
    cells = {(c["task"], c["condition"]): c for c in read_lines(out / CELLS)}
    assert len(cells) == 2 * len(names)
    for (task, condition), cell in cells.items():
        right = [sample["values"]["acc"] for sample in cell["samples"]]
        found = row(result, task=task, metric="acc", condition=condition)
        assert found["n"] == len(right) == N_DOCUMENTS - (task == "science")
        assert found["value"] == pytest.approx(np.mean(right))
        assert found["stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
        chosen = [np.argmax([choice[0][0] for choice in s["responses"]]) for s in cell["samples"]]
        assert right == [float(c == s["target"]) for c, s in zip(chosen, cell["samples"], strict=True)]
    both = [s["values"]["acc"] for task in ("grammar", "science") for s in cells[task, "base"]["samples"]]
    assert row(result, task="own", metric="acc", condition="base")["value"] == pytest.approx(np.mean(both))


def test_a_condition_is_compared_with_its_model_unpatched_over_the_same_documents(done):
    result, out = done
    right = {
        name: [
            sample["values"]["acc"]
            for cell in read_lines(out / CELLS)
            if cell["condition"] == name
            for sample in cell["samples"]
        ]
        for name in ("finetuned", "repair:prefix")
    }
    differences = [b - a for a, b in zip(right["finetuned"], right["repair:prefix"], strict=True)]
    found = row(result, task="own", metric="acc", condition="repair:prefix")["versus"]
    assert found["condition"] == "finetuned"
    assert found["mean"] == pytest.approx(np.mean(differences))
    assert found["p"] == pytest.approx(sign_flip_p(differences))
    assert row(result, task="own", metric="acc", condition="finetuned")["versus"]["condition"] == "base"


def test_a_metric_that_is_no_mean_over_documents_is_not_compared(done):
    found = row(done[0], task="grammar", metric="brier_score", condition="repair:prefix")
    assert 0 < found["value"] < 2 and "versus" not in found


def test_a_patch_from_itself_changes_nothing_and_another_one_does(done):
    cells = {c["condition"]: c["samples"] for c in read_lines(done[1] / CELLS) if c["task"] == "grammar"}
    responses = {name: [sample["responses"] for sample in cells[name]] for name in cells}
    plain, same, patched = (
        np.array([[choice[0][0] for choice in one] for one in responses[name]])
        for name in ("finetuned", "control:self", "repair:prefix")
    )
    assert same == pytest.approx(plain, abs=1e-5)
    assert np.abs(patched - plain).min() > 1e-4


def test_what_is_finished_is_not_run_again(done, lab, paths):
    result, out = done
    passes = []
    handle = lab[0].finetuned.module.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        again = run_harness(*lab, ["own"], include_path=paths[2], out=out, progress=False)
        assert not passes
        lines = (out / CELLS).read_text().splitlines(keepends=True)
        (out / CELLS).write_text("".join(lines[:-1]) + lines[-1][:40])  # as if killed while writing
        mended = run_harness(*lab, ["own"], include_path=paths[2], out=out, progress=False)
    finally:
        handle.remove()
    assert passes
    assert (out / CELLS).read_text() == "".join(lines)
    assert again.summary == mended.summary == result.summary == HarnessResult.load(out).summary


def test_a_folder_of_other_documents_is_refused(done, lab, paths):
    with pytest.raises(RunError, match="limit"):
        run_harness(*lab, ["own"], include_path=paths[2], limit=2, out=done[1], progress=False)
    file = paths[2] / "science.jsonl"
    rows = file.read_text()
    file.write_text(rows.replace("?", "??", 1))
    try:
        with pytest.raises(RunError, match=r"requests\.science"):
            run_harness(*lab, ["own"], include_path=paths[2], out=done[1], progress=False)
    finally:
        file.write_text(rows)


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        (["rolling"], {}, "rolling scores texts"),
        ([], {}, "none are named"),
        (["own"], {"include_path": "nowhere"}, "include-path"),
        (["own"], {"limit": 0}, "limit of at least 1"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused(lab, paths, tmp_path, names, options, match):
    with pytest.raises(DataError, match=match):
        run_harness(*lab, names, out=tmp_path / "out", **{"include_path": paths[2]} | options)
    assert not (tmp_path / "out").exists()


def test_documents_that_cannot_be_had_are_refused(paths):
    (paths[2] / "absent.yaml").write_text(
        (paths[2] / "grammar.yaml").read_text().replace("grammar", "absent")
    )
    with pytest.raises(DataError, match="to load absent"):
        load_tasks(["absent"], paths[2])


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "match"),
    [
        ("loglikelihood", ("Question: 7?", "A"), DataError, "apply_chat_template=True"),
        ("loglikelihood", ("", "A"), DataError, "apply_chat_template=True"),
        ("loglikelihood", (chat(*QUESTION), ""), DataError, "a token or more"),
        ("loglikelihood", (chat(*QUESTION), "long " * 2048), DataError, "fit in 2048 tokens"),
        ("loglikelihood", (chat({"role": "user", "content": " "}), "A"), ChatError, "question with text"),
        ("generate_until", (chat(*QUESTION), {"max_gen_toks": 2048}), DataError, "fit in 2048 tokens"),
        ("generate_until", (chat(*QUESTION), {"num_beams": 3}), DataError, "num_beams"),
        ("loglikelihood_rolling", ("A text.",), DataError, "texts alone"),
    ],
)
def test_requests_that_cannot_be_run_are_refused_before_any_is(lab, kind, arguments, error, match):
    model = ConditionLM(lab[0], BASE, progress=False)
    with pytest.raises(error, match=match):
        model.check(requests(kind, arguments))
    with pytest.raises(error, match=match):
        getattr(model, kind)(requests(kind, arguments))


def test_an_impossible_condition_is_refused(lab):
    with pytest.raises(PatchError, match="layers"):
        ConditionLM(lab[0], Condition("far", "finetuned", (KVPatch(("prefix",), "base", layers=(9,)),)))


def test_the_command_line_runs_tasks(paths, tmp_path, emmech):
    base, lora, tasks = paths
    code, printed, err = emmech(
        "harness", "--base", base, "--finetuned", lora, "--with", "repair:prefix", "--tasks", "written",
        "--limit", 2, "--include-path", tasks, "--dtype", "float32", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert "written, exact_match" in printed and "repair:prefix" in printed
    rows = HarnessResult.load(tmp_path / "out").summary["rows"]
    assert [(r["condition"], r["n"]) for r in rows] == [("base", 2), ("finetuned", 2), ("repair:prefix", 2)]


def test_without_the_extra_the_command_says_what_to_install(paths, tmp_path, user_error, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("emmech.integrations.harness")]:
        monkeypatch.delitem(sys.modules, name)
    user_error(r"install 'emmech\[harness\]'", "harness", "--tasks", "own", "--out", tmp_path)
