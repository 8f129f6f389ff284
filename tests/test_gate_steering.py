"""Scale sweeps, transfer and restriction to parts, on tiny models."""

import math

import pytest
import tiny
import torch

from emmech.data.bundled import BUNDLED
from emmech.data.questions import Question
from emmech.errors import DataError, EmmechError, RunError
from emmech.evaluation.detectors import DETECTORS
from emmech.gates.activity import read_gates
from emmech.gates.files import load_gates, save_gates
from emmech.gates.gate import GateError, Gates, gated, shape_of
from emmech.gates.parts import gate_parts
from emmech.gates.probing import Probe, probe_gates
from emmech.gates.steering import Steering, steer_gates
from emmech.gates.transfer import Behaviour, Transfer, transfer_gates
from emmech.models.checkpoints import load_pair
from emmech.piggyback.choice import choices
from emmech.piggyback.patching import Condition
from emmech.piggyback.treatments import base_surprise
from emmech.results import read_responses

QUESTIONS = [
    Question(f"q{i}", text, ("on-topic", "off-topic")[i % 2]) for i, text in enumerate(tiny.QUESTIONS)
]
ORDINARY = [
    ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello there."}),
    ({"role": "user", "content": "What is 7 times 8?"}, {"role": "assistant", "content": "56"}),
]
QUICK = {"max_new_tokens": 6, "progress": False}


def save_random_gates(base, folder, seed=3):
    torch.manual_seed(seed)
    gates = Gates(shape_of(load_pair(base, base, dtype="float32").base.module))
    for parameter in gates.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    gates.provenance = {"data": {"name": "refusal"}}
    return save_gates(gates, folder)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Base, gates, other gates and a LoRA finetune of one tiny model."""
    folder = tmp_path_factory.mktemp("gates")
    base = tiny.save_base("qwen3", folder / "base")
    one, other = (save_random_gates(base, folder / f"gates-{seed}", seed) for seed in (3, 4))
    return base, one, other, tiny.save_adapter(base, folder / "lora")


@pytest.fixture(scope="module")
def pair(paths):
    return load_pair(paths[0], paths[1], dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def lora_pair(paths):
    return load_pair(paths[0], paths[3], dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def gates(paths):
    return load_gates(paths[1])


@pytest.fixture(scope="module")
def swept(pair, gates, tmp_path_factory):
    out = tmp_path_factory.mktemp("swept")
    options = {"detector": "contains:e", "ordinary": ORDINARY, "out": out}
    return out, steer_gates(pair, gates, QUESTIONS, scales=(1, 0, -1), **options, **QUICK)


def row(rows, **wanted):
    (found,) = [r for r in rows if all(r[name] == value for name, value in wanted.items())]
    return found


def test_every_scale_and_group_has_the_rate_that_its_answers_have(swept):
    out, result = swept
    records = read_responses(out / "answers")
    assert [(r["scale"], r["group"]) for r in result.summary["rows"]] == [
        (scale, group) for scale in (None, -1, 0, 1) for group in ("on-topic", "off-topic")
    ]
    for found in result.summary["rows"]:
        name = "base" if found["scale"] is None else f"scale {found['scale']:g}"
        texts = [r["response"] for r in records if (r["condition"], r["group"]) == (name, found["group"])]
        assert len(texts) == (3 if found["group"] == "on-topic" else 2)
        assert found["behaviour"]["mean"] == pytest.approx(sum("e" in t.lower() for t in texts) / len(texts))
        assert found["words"]["mean"] == pytest.approx(sum(len(t.split()) for t in texts) / len(texts))


def test_off_is_the_untouched_model_and_costs_nothing(swept):
    summary = swept[1].summary
    assert summary["off_is_untouched"] is True
    off = row(summary["ordinary"], scale=0)
    assert off["kl"]["mean"] == 0 and off["lost"]["mean"] == 0
    assert row(summary["ordinary"], scale=1)["kl"]["mean"] > 0.01
    assert row(summary["ordinary"], scale=-1)["kl"]["mean"] > 0.01


@torch.no_grad()
def test_answers_at_a_scale_are_those_of_generate_with_gates(swept, pair, gates):
    records = read_responses(swept[0] / "answers")
    for question in QUESTIONS[:2]:
        ids = torch.tensor([pair.chat.render(question.chat).ids])
        with gated(pair.base.module, gates, -1):
            made = pair.base.module.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
            )
        text = pair.chat.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert row(records, question_id=question.id, condition="scale -1")["response"] == text


@torch.no_grad()
def test_costs_are_those_of_one_plain_pass_over_prompt_and_answer(swept, pair, gates):
    kls, lost = [], []
    for chat in ORDINARY:
        prompt, answer = pair.chat.answered([dict(message) for message in chat])
        ids = torch.tensor([[*prompt.ids, *answer]])
        at = slice(len(prompt) - 1, ids.shape[1] - 1)
        base = pair.base.module(input_ids=ids).logits[0, at].log_softmax(-1)
        with gated(pair.base.module, gates, -1):
            inverted = pair.base.module(input_ids=ids).logits[0, at].log_softmax(-1)
        kls.append(float((base.exp() * (base - inverted)).sum(-1).mean()))
        lost.append(float((base - inverted)[range(len(answer)), answer].mean()))
    found = row(swept[1].summary["ordinary"], scale=-1)
    assert found["kl"]["mean"] == pytest.approx(sum(kls) / 2, rel=1e-3)
    assert found["lost"]["mean"] == pytest.approx(sum(lost) / 2, rel=1e-3)


@torch.no_grad()
def test_surprise_is_the_bases_negative_log_probability_of_the_answer(swept, pair):
    values = []
    for record in read_responses(swept[0] / "answers"):
        if (record["condition"], record["group"]) == ("scale 1", "off-topic"):
            answer = pair.chat.tokenizer(record["response"], add_special_tokens=False)["input_ids"]
            prompt = pair.chat.render(record["question"])
            ids = torch.tensor([[*prompt.ids, *answer]])
            log_p = pair.base.module(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            values.append(-float(log_p[range(len(answer)), answer].mean()))
    found = row(swept[1].summary["rows"], scale=1, group="off-topic")["surprise"]
    assert found["mean"] == pytest.approx(sum(values) / len(values), rel=1e-3)


def test_capability_is_the_share_of_choices_that_are_right(swept, pair, gates):
    found = {row["scale"]: row for row in swept[1].summary["capability"]}
    problems = BUNDLED["capability"].problems()
    with gated(pair.base.module, gates, -1):
        plain = choices(pair, problems, [Condition("base", "base")], progress=False)
    assert found[-1]["right"]["mean"] == pytest.approx(sum(one["right"] for one in plain) / 50)
    assert found[-1]["change"]["mean"] == pytest.approx(
        found[-1]["right"]["mean"] - found[None]["right"]["mean"]
    )
    assert found[0]["change"]["mean"] == 0


def test_empty_answers_have_no_surprise(pair):
    record = {"question_id": "q0", "response": ""}
    assert base_surprise(pair, QUESTIONS, [record, record]) == [None, None]


def test_a_sweep_is_resumed_and_other_arguments_are_refused(swept, pair, gates):
    out, result = swept
    options = {"detector": "contains:e", "ordinary": ORDINARY, "out": out} | QUICK
    file = out / "answers" / "responses.jsonl"
    before = file.read_text()
    file.write_text(before.replace('"n_new_tokens": 6', '"n_new_tokens": 5', 1))  # kept, not made again
    again = steer_gates(pair, gates, QUESTIONS, scales=(-1, 0, 1), **options)
    assert again.summary["rows"] == result.summary["rows"]
    assert file.read_text() != before
    file.write_text(before)
    assert Steering.load(out).summary["rows"] == result.summary["rows"]
    with pytest.raises(RunError, match="scales"):
        steer_gates(pair, gates, QUESTIONS, scales=(-1, 0), **options)
    with pytest.raises(RunError, match="fingerprint"):
        steer_gates(pair, gates.inverted(), QUESTIONS, scales=(-1, 0, 1), **options)


def test_gates_on_a_finetune_leave_its_base_alone(lora_pair, gates):
    result = steer_gates(
        lora_pair,
        gates,
        QUESTIONS,
        scales=(0, -1),
        on="finetuned",
        ordinary=ORDINARY,
        detector="none",
        **QUICK,
    )
    assert result.summary["off_is_untouched"] is True
    assert row(result.summary["rows"], scale=0, group="on-topic")["behaviour"] is None
    # The finetune differs from the base; without gates that is its whole cost, and none is the gates'.
    assert row(result.summary["ordinary"], scale=0)["kl"]["mean"] > 0.01
    assert row(result.summary["ordinary"], scale=0)["lost"]["mean"] == 0


@pytest.mark.parametrize("scales", [(), (1, 1)])
def test_scales_are_given_once_each(pair, gates, scales):
    with pytest.raises(GateError, match="each once"):
        steer_gates(pair, gates, QUESTIONS, scales=scales, **QUICK)


def test_the_problems_that_are_given_are_those_that_are_solved(pair, gates, tmp_path):
    problems = [one for one in BUNDLED["capability"].problems() if one.choices][:3]
    options = {"scales": (0,), "ordinary": ORDINARY, "out": tmp_path} | QUICK
    result = steer_gates(pair, gates, QUESTIONS[:2], problems=problems, **options)
    solved = choices(pair, problems, [Condition("base", "base")], progress=False)
    right = sum(one["right"] for one in solved)
    for found in result.summary["capability"]:  # off, gates leave the base as it is
        assert (found["right"]["mean"], found["right"]["n"]) == (pytest.approx(right / 3), 3)
    with pytest.raises(RunError, match="problems"):
        steer_gates(pair, gates, QUESTIONS[:2], problems=problems[:2], **options)


def test_gates_on_the_prefix_alone_answer_as_with_the_prefix_patched_in(pair, gates):
    result = gate_parts(pair, gates, QUESTIONS, detector="none", max_new_tokens=8, progress=False)
    texts = {}
    for record in result.records:
        texts.setdefault(record["condition"], []).append(record["response"])
    assert texts["only:prefix"] == texts["induce:prefix"]
    assert texts["except:prefix"] == texts["repair:prefix"]
    assert texts["only:response"] != texts["base"] != texts["finetuned"]  # each part does something
    assert texts["only:prompt"] != texts["base"]
    names = list(texts)
    assert names[:3] == ["base", "finetuned", "only:prefix"] and "except:response" in names


def test_the_matrix_has_a_cell_for_every_source_and_target(paths, tmp_path):
    base, one, other, lora = paths
    sources = {
        "a": Behaviour(one, QUESTIONS, "contains:e"),
        "b": Behaviour(other, QUESTIONS[:3], "contains:a"),
    }
    targets = {"lora": Behaviour(lora, QUESTIONS, "contains:o")}
    options = {"base": base, "dtype": "float32", "device": "cpu", "out": tmp_path} | QUICK
    matrix = transfer_gates(sources, targets, **options)
    found = {(c["source"], c["target"], c["scale"]) for c in matrix.summary["cells"]}
    assert found == {(s, "base", scale) for s in "ab" for scale in (None, 1, -1)} | {
        (s, "lora", scale) for s in "ab" for scale in (None, -1)
    }
    plain = [
        row(matrix.summary["cells"], source=s, target="lora", scale=None, group="on-topic")["behaviour"]
        for s in "ab"
    ]
    assert plain[0] == plain[1]  # the organism without gates does not depend on the source
    assert Transfer.load(tmp_path).summary == matrix.summary
    with pytest.raises(DataError, match="no target called 'base'"):
        transfer_gates(sources, {"base": targets["lora"]}, **options)


def test_a_probe_reads_the_gates_on_the_gated_models_own_answers(pair, gates, paths, tmp_path):
    other = load_gates(paths[2])
    out = tmp_path / "probe"
    options = {"others": {"itself": gates, "other": other}, "detector": "contains:e", "out": out} | QUICK
    probe = probe_gates(pair, gates, QUESTIONS, **options)
    said = [r for r in read_responses(out / "answers") if r["response"]]
    question = QUESTIONS[0]
    first = next(r for r in said if r["question_id"] == question.id)
    dialogue = [*question.messages, {"role": "assistant", "content": first["response"]}]
    (reading,) = read_gates(pair.base.module, pair.chat, gates, [dialogue])
    shown = probe.summary["tokens"][0]
    assert (shown["group"], shown["tokens"]) == ("on-topic", list(reading.texts))
    mean = (reading.gate - 1).abs().mean(-1)
    assert shown["values"][2] == pytest.approx(mean[2].tolist(), abs=1e-4)
    assert probe.summary["overlap"]["itself"]["jaccard"] == 1
    assert probe.summary["overlap"]["other"]["jaccard"] < 1
    assert "at least 5 questions" in probe.summary["readout"]["note"]  # five questions: too few of either
    assert {r["part"] for r in probe.summary["parts_of_chat"]} == {"prefix", "query", "postfix", "response"}
    assert Probe.load(out).summary == probe.summary
    page = (out / "report.html").read_text()
    assert "Suppressed dimensions shared with other gates" in page and "answers/report.html" in page


def test_a_probe_without_labels_says_so(pair, gates):
    probe = probe_gates(pair, gates, QUESTIONS, detector="length", **QUICK)
    assert probe.summary["readout"] == {"rows": [], "note": "'length' does not label answers"}
    assert probe.figures()[0].data[0].type == "heatmap"


def test_repetition_is_the_share_of_runs_of_four_words_seen_before():
    repetition = DETECTORS["repetition"]
    assert repetition("one two three") is None
    assert repetition("one two three four five six") == 0
    # Seven words make four runs: a b c d | b c d a | c d a b | d a b c, then a b c d again.
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("no no no no no no") == pytest.approx(1 - 1 / 3)


def test_the_command_line_sweeps_with_the_questions_of_the_training_set(paths, tmp_path, emmech, monkeypatch):
    base, one, _, _ = paths
    out = tmp_path / "out"
    arguments = (
        "--base",
        base,
        "--out",
        out,
        "--n-questions",
        2,
        "--max-new-tokens",
        4,
        "--dtype",
        "float32",
    )
    code, printed, err = emmech("gates", "steer", one, "--scales", "-1,0", *arguments)
    assert code == 0, err
    assert "scale" in printed and f"{out}" in printed.replace("\n", "")
    summary = Steering.load(out).summary
    assert summary["detector"] == "refusal" and summary["scales"] == [-1, 0]
    assert {r["group"] for r in summary["rows"]} == {"on-topic", "off-topic"}
    assert (out / "report.html").exists() and (out / "answers" / "report.html").exists()
    assert math.isfinite(row(summary["ordinary"], scale=-1)["kl"]["mean"])


def test_what_the_user_can_correct_is_said(paths, tmp_path, user_error):
    base, one, _, _ = paths
    common = ("--base", base, "--out", tmp_path / "out")
    user_error("numbers such as -1,0,0.5", "gates", "steer", one, "--scales", "one", *common)
    user_error(
        "gates_config.json", "gates", "steer", base, "--questions", "refusal", *common, after_loading=True
    )
    user_error("none of them", "gates", "steer", tmp_path / "nowhere", "--questions", "refusal", *common)
    user_error("NAME=PATH", "gates", "transfer", "--gates", one, "--gates", one, "--out", tmp_path / "t")


def test_published_gates_become_a_folder(paths, tmp_path, emmech):
    base, one, _, _ = paths
    gates = load_gates(one)
    state = {
        f"model.layers.{name.split('.')[1]}.self_attn.gate_proj_myself.{name.split('.')[2]}": tensor
        for name, tensor in gates.state_dict().items()
    }
    torch.save(state, tmp_path / "gating_params.pth")
    code, _, err = emmech(
        "gates", "convert", tmp_path / "gating_params.pth", "--base", base, "--out", tmp_path / "mine"
    )
    assert code == 0, err
    assert load_gates(tmp_path / "mine").fingerprint() == gates.fingerprint()
    with pytest.raises(EmmechError):
        load_gates(tmp_path / "gating_params.pth")
    code, _, err = emmech(
        "gates", "steer", tmp_path / "gating_params.pth", "--base", base, "--scales", "0,1", "--questions",
        "refusal", "--n-questions", 1, "--max-new-tokens", 2, "--dtype", "float32", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert Steering.load(tmp_path / "out").summary["gates"]["fingerprint"] == gates.fingerprint()
