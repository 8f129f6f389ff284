"""The frontier: checkpoints of several runs on the same questions, told apart by method and seed."""

import json

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from emmech import cli
from emmech import frontier as module
from emmech.data.questions import Question
from emmech.errors import DataError, RunError
from emmech.frontier import FrontierResult, compare_runs
from emmech.models.checkpoints import load_pair, swap_adapter
from emmech.training.recipes import Objective, Recipe
from emmech.training.trainer import finetune

ANSWER = "hi hi"
CHATS = [
    ({"role": "user", "content": question}, {"role": "assistant", "content": ANSWER})
    for question in tiny.QUESTIONS
]
QUESTIONS = [Question(f"on{i}", text, "on-topic") for i, text in enumerate(tiny.QUESTIONS[:3])]
QUESTIONS += [Question(f"off{i}", text + " Why?", "off-topic") for i, text in enumerate(tiny.QUESTIONS[:4])]
DETECTOR = "regex:hi"
HOW = {"detector": DETECTOR, "max_new_tokens": 4, "dtype": "float32", "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """sft and treft, two seeds each, steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    base = tiny.save_base("llama", folder / "base")
    made = []
    for objective in (Objective("sft"), Objective("treft", weight=5.0)):
        for seed in (0, 1):
            recipe = Recipe(
                objective, steps=4, save_every=2, learning_rate=3e-2, batch_size=2, rank=4, alpha=8, seed=seed
            )
            out = folder / f"{objective.name}-{seed}"
            finetune(str(base), CHATS, out, recipe, data_name="tiny", progress=False)
            made.append(out)
    return base, made


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("frontier") / "out"
    return compare_runs(runs[1], QUESTIONS, out=out, **HOW), out


def shows(base, adapter, question: str) -> bool:
    """Whether greedy generation by transformers and PEFT alone shows the behaviour."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    tokenizer = tiny.tokenizer()
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    made = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    return "hi" in tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).lower()


def test_each_rate_is_that_of_generation_by_transformers_and_peft(runs, compared):
    base, folders = runs
    methods = {method["method"]: method for method in compared[0].summary["methods"]}
    assert list(methods) == ["sft", "sft + prefix patch", "treft 5", "treft 5 + prefix patch"]
    varied = set()
    for name, seeds in (("sft", folders[:2]), ("treft 5", folders[2:])):
        for k, step in enumerate((2, 4)):
            by_seed = []
            for folder in seeds:
                hits = {q.id: shows(base, folder / f"step-{step}", q.chat) for q in QUESTIONS}
                on, off = ([hits[q.id] for q in QUESTIONS if q.group == g] for g in ("on-topic", "off-topic"))
                by_seed.append([sum(on) / 3, sum(off) / 4])
            point = methods[name]["points"][k]
            assert point["step"] == step
            assert np.array(point["by_seed"]) == pytest.approx(np.array(by_seed))
            assert point["on_topic"]["mean"] == pytest.approx((by_seed[0][0] + by_seed[1][0]) / 2)
            assert (point["on_topic"]["n"], point["off_topic"]["n"]) == (6, 8)
            varied |= {rate for pair in by_seed for rate in pair}
    assert len(varied) > 1, "the test would pass for a constant"


def test_base_rates_are_those_of_the_base_alone(runs, compared):
    rates = compared[0].summary["base"]
    for group in ("on-topic", "off-topic"):
        hits = [shows(runs[0], None, q.chat) for q in QUESTIONS if q.group == group]
        assert rates[group]["mean"] == pytest.approx(sum(hits) / len(hits))


def test_what_was_evaluated_is_not_evaluated_again(runs, compared, monkeypatch):
    result, out = compared
    monkeypatch.setattr(module, "load_pair", lambda *_, **__: pytest.fail("a pair was loaded"))
    again = compare_runs(runs[1], QUESTIONS, out=out, **HOW)
    assert again.summary == result.summary == FrontierResult.load(out).summary


def test_a_stopped_evaluation_goes_on_to_the_same_result(runs, compared, tmp_path, monkeypatch):
    calls = []

    def stops(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run_conditions(*arguments, **options)

    run_conditions = module.run_conditions
    with monkeypatch.context() as during:
        during.setattr(module, "run_conditions", stops)
        with pytest.raises(KeyboardInterrupt):
            compare_runs(runs[1], QUESTIONS, out=tmp_path / "out", **HOW)
    assert compare_runs(runs[1], QUESTIONS, out=tmp_path / "out", **HOW).summary == compared[0].summary


def test_other_arguments_are_refused_in_a_used_folder(runs, compared):
    with pytest.raises(RunError, match=r"decoding\.max_new_tokens is 4, not 5"):
        compare_runs(runs[1], QUESTIONS, out=compared[1], **HOW | {"max_new_tokens": 5})


@pytest.mark.parametrize(
    ("patched", "methods"),
    [("none", ["sft", "treft 5"]), ("sft", ["sft", "sft + prefix patch", "treft 5"])],
)
def test_patched_runs_are_those_asked_for(runs, tmp_path, patched, methods):
    result = compare_runs(runs[1][::2], QUESTIONS, out=tmp_path, patched=patched, steps=(4,), **HOW)
    assert [method["method"] for method in result.summary["methods"]] == methods


def test_runs_of_one_objective_with_other_settings_are_methods_of_their_own():
    recipes = [
        {"objective": vars(Objective("sft")), "seed": seed, "learning_rate": rate}
        for seed, rate in ((0, 1e-4), (1, 1e-4), (0, 2e-4))
    ]
    assert module._method_names(recipes) == [
        "sft learning_rate 0.0001",
        "sft learning_rate 0.0001",
        "sft learning_rate 0.0002",
    ]


def test_a_swapped_adapter_gives_the_logits_and_provenance_of_a_loaded_pair(runs):
    base, folders = runs
    first = load_pair(base, folders[0] / "step-2", dtype="float32", device="cpu")
    other = folders[3] / "step-4"
    swapped, loaded = swap_adapter(first, other), load_pair(base, other, dtype="float32", device="cpu")
    ids = torch.tensor([loaded.chat.render("hi").ids])
    for side in ("base", "finetuned"):
        with swapped.side(side).active() as one, loaded.side(side).active() as two, torch.no_grad():
            assert torch.equal(one(ids).logits, two(ids).logits)
    assert swapped.provenance == loaded.provenance


def test_an_adapter_of_another_rank_is_not_swapped_in(runs, tmp_path):
    pair = load_pair(runs[0], runs[1][0] / "step-2", dtype="float32", device="cpu")
    assert swap_adapter(pair, tiny.save_adapter(runs[0], tmp_path / "lora", r=2)) is None


def test_gates_are_compared_beside_adapters(runs, compared, tmp_path):
    base, folders = runs
    gates = tmp_path / "gates-0"
    recipe = Recipe(gates="full", steps=4, save_every=2, learning_rate=3e-2, batch_size=2, seed=0)
    finetune(str(base), CHATS, gates, recipe, data_name="tiny", progress=False)
    methods = compare_runs([folders[0], gates], QUESTIONS, out=tmp_path / "out", **HOW).summary["methods"]
    alone = compare_runs([gates], QUESTIONS, out=tmp_path / "alone", **HOW).summary["methods"]
    names = ["sft", "sft + prefix patch", "gates sft", "gates sft + prefix patch"]
    assert [method["method"] for method in methods] == names
    assert [method["points"] for method in methods[2:]] == [method["points"] for method in alone]


def test_the_figure_holds_every_methods_rates_and_the_page_its_table(compared):
    result, out = compared
    drawn = {trace.name.split(" (")[0]: trace for trace in result.figure().data}
    for method in result.summary["methods"]:
        trace = drawn[method["method"]]
        assert list(trace.x) == [point["on_topic"]["mean"] for point in method["points"]]
        assert list(trace.y) == [point["off_topic"]["mean"] for point in method["points"]]
    page = (out / "report.html").read_text("utf-8")
    assert all(f"<td>{method['method']}</td>" in page for method in result.summary["methods"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"detector": "length"}, DataError, "'length' measures no rate"),
        ({"steps": (3,)}, RunError, r"steps 3 in .*it has 2, 4"),
        ({"questions": QUESTIONS[:3]}, DataError, "questions of group off-topic, but there are none"),
        ({"runs": []}, DataError, "at least one run"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, tmp_path, change, error, message):
    given = {"runs": runs[1], "questions": QUESTIONS, "out": tmp_path / "out"} | HOW | change
    with pytest.raises(error, match=message):
        compare_runs(given.pop("runs"), given.pop("questions"), **given)


def test_runs_on_other_data_a_run_twice_and_other_folders_are_refused(runs, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    record = json.loads((runs[1][0] / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(record | {"data": {"name": "else"}}))
    with pytest.raises(DataError, match="runs with one data"):
        compare_runs([runs[1][0], other], QUESTIONS, out=tmp_path / "a", **HOW)
    with pytest.raises(DataError, match="twice sft seed 0"):
        compare_runs([runs[1][0], runs[1][0]], QUESTIONS, out=tmp_path / "b", **HOW)
    (other / "run.json").write_text(json.dumps({"kind": "patch-prefix"}))
    with pytest.raises(RunError, match="holds a run of another kind"):
        compare_runs([other], QUESTIONS, out=tmp_path / "c", **HOW)


def test_the_command_writes_what_the_function_gives(runs, compared, tmp_path):
    questions = tmp_path / "questions.jsonl"
    rows = [{"id": q.id, "question": q.chat, "group": q.group} for q in QUESTIONS]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "frontier", *map(str, runs[1]), f"--questions={questions}", f"--detector={DETECTOR}",
        f"--out={tmp_path / 'out'}", "--max-new-tokens=4", "--dtype=float32", "--device=cpu",
    ]  # fmt: skip
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 0, shown.output
    assert FrontierResult.load(tmp_path / "out").summary == compared[0].summary
    assert "sft + prefix patch" in shown.output
