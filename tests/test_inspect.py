"""Inspect: the question sets as tasks, and a patched pair as the model that answers them."""

import sys
import tomllib
from importlib import import_module
from pathlib import Path

import anyio
import inspect_ai
import pytest
import tiny
from inspect_ai._util.registry import registry_lookup
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    ModelOutput,
    ModelUsage,
    get_model,
)
from inspect_ai.tool import ToolInfo

from emmech.data.bundled import BUNDLED
from emmech.data.questions import load_questions
from emmech.errors import ChatError, DataError, EmmechError
from emmech.integrations import inspect as tasks
from emmech.integrations.inspect_model import ConditionAPI
from emmech.models.checkpoints import load_pair
from emmech.piggyback.experiment import patch_prefix

ASKED = [ChatMessageUser(content="What is 7 times 8?")]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    base = tiny.save_base("llama", folder / "base")
    questions = folder / "questions.txt"
    questions.write_text("\n".join(tiny.QUESTIONS))
    return base, tiny.save_adapter(base, folder / "lora"), questions


@pytest.fixture(scope="module")
def patched(paths):
    """A patched pair as an Inspect model."""
    return ConditionAPI(str(paths[0]), finetuned=str(paths[1]), condition="repair:prefix", dtype="float32")


def speaking(*texts):
    """Inspect's own model of given answers, one after the other."""
    outputs = [
        ModelOutput.from_content("mockllm", text).model_copy(update={"usage": ModelUsage()}) for text in texts
    ]  # without usage it would count tokens, with a tokenizer that it downloads
    return get_model("mockllm/model", custom_outputs=outputs)


def run(task, model, folder, **options):
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(folder), display="none", **options)
    assert log.status == "success", log.error
    return read_eval_log(log.location)


def generate(api, *chats, **config):
    """Answers to chats that are asked at once."""
    found = [None] * len(chats)

    async def one(row, chat):
        found[row] = await api.generate(chat, [], "none", GenerateConfig(**config))

    async def every():
        async with anyio.create_task_group() as group:
            for row, chat in enumerate(chats):
                group.start_soon(one, row, list(chat))

    anyio.run(every)
    return found


def test_answers_and_scores_are_those_of_emmech(paths, tmp_path):
    base, lora, file = paths
    log = run(
        tasks.questions(str(file), detector=["length", "contains:e"]),
        f"emmech/{base}",
        tmp_path,
        model_args={"finetuned": str(lora), "condition": "repair:prefix", "dtype": "float32"},
        max_tokens=6,
    )
    records = patch_prefix(
        load_pair(base, lora, dtype="float32"), load_questions(file), segments=("prefix",),
        direction="repair", controls=False, detector="length", max_new_tokens=6, progress=False,
    ).records  # fmt: skip
    expected = {r["question_id"]: r["response"] for r in records if r["condition"] == "repair:prefix"}
    plain = {r["question_id"]: r["response"] for r in records if r["condition"] == "finetuned"}
    assert {sample.id: sample.output.completion for sample in log.samples} == expected != plain
    scores = {score.name: score.metrics["mean"].value for score in log.results.scores}
    assert scores == {
        "length": pytest.approx(sum(len(text.split()) for text in expected.values()) / len(expected)),
        "contains:e": pytest.approx(sum("e" in text.lower() for text in expected.values()) / len(expected)),
    }
    assert log.eval.model_args["condition"] == "repair:prefix"
    assert log.samples[0].output.usage.output_tokens <= 6


def test_requests_that_come_together_are_one_batch(patched):
    rows = []
    module = patched.pair.finetuned.module
    handle = module.register_forward_pre_hook(
        lambda *given: rows.append(len(given[-1]["input_ids"])), with_kwargs=True
    )
    try:
        together = generate(patched, *([ChatMessageUser(content=q)] for q in tiny.QUESTIONS), max_tokens=4)
    finally:
        handle.remove()
    assert max(rows) == len(tiny.QUESTIONS) and len(rows) <= 6  # two prefixes, the rest, three tokens
    alone = [generate(patched, [ChatMessageUser(content=q)], max_tokens=4)[0] for q in tiny.QUESTIONS]
    assert [one.completion for one in together] == [one.completion for one in alone]


def test_settings_reach_the_answers(patched):
    (free,) = generate(patched, ASKED, max_tokens=8)
    assert free.usage.input_tokens == len(patched.pair.chat.render("What is 7 times 8?"))
    stop = free.completion[len(free.completion) // 2]
    (stopped,) = generate(patched, ASKED, max_tokens=8, stop_seqs=[stop])
    assert stopped.completion == free.completion.split(stop)[0].strip()
    assert (free.stop_reason, stopped.stop_reason) == ("max_tokens", "stop")
    drawn = generate(patched, ASKED, ASKED, max_tokens=8, temperature=1.0, num_choices=2, seed=3)
    texts = [choice.message.text for one in drawn for choice in one.choices]
    assert len(set(texts)) == 4  # choices, and the same question asked again, are drawn apart


def test_the_same_questions_are_drawn_alike_in_another_run(paths):
    options = {"max_tokens": 8, "temperature": 1.0}
    first, second = (
        [one.completion for one in generate(ConditionAPI(str(paths[0]), dtype="float32"), ASKED, **options)]
        for _ in range(2)
    )
    assert first == second


def test_chats_keep_their_system_and_earlier_turns(patched):
    chat = [ChatMessageSystem(content="Be brief."), *ASKED, ChatMessageAssistant(content="56"), *ASKED]
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": r, "content": m.text} for r, m in zip(roles, chat, strict=True)]
    (found,) = generate(patched, chat, max_tokens=2)
    assert found.usage.input_tokens == len(patched.pair.chat.render(messages))
    ids = tiny.tokenizer()("Be brief.", add_special_tokens=False)["input_ids"]
    assert anyio.run(patched.count_text_tokens, "Be brief.") == len(ids)


def test_the_condition_is_the_finetuned_model_where_none_is_named(paths):
    assert ConditionAPI(str(paths[0])).condition.name == "base"
    assert ConditionAPI(str(paths[0]), finetuned=str(paths[1])).condition.name == "finetuned"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"condition": "repair:suffix"}, "Correct --with"),
        ({"condition": "repair:prefix", "finetuned": ""}, "without a finetuned model"),
        ({"fine_tuned": "x"}, "model arguments among .* got fine_tuned"),
    ],
)
def test_models_that_cannot_be_made_are_refused(paths, arguments, match):
    wanted = {"finetuned": str(paths[1])} | arguments
    wanted = {name: value for name, value in wanted.items() if value}
    with pytest.raises(EmmechError, match=match):
        ConditionAPI(str(paths[0]), **wanted)


@pytest.mark.parametrize(
    ("chat", "tools", "config", "error", "match"),
    [
        (ASKED, [ToolInfo(name="search", description="Search.")], {}, DataError, "without tools"),
        (ASKED, [], {"top_k": 5}, DataError, "top_k is set"),
        (ASKED, [], {"max_tokens": 600}, DataError, "fit in 512 tokens"),
        ([ChatMessageUser(content=[ContentImage(image="x.png")])], [], {}, DataError, "messages of text"),
        ([*ASKED, ChatMessageTool(content="56")], [], {}, DataError, "one of 'tool'"),
        ([ChatMessageAssistant(content="56")], [], {}, ChatError, "last message from the user"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(patched, chat, tools, config, error, match):
    with pytest.raises(error, match=match):
        anyio.run(patched.generate, chat, tools, "none", GenerateConfig(**config))


def test_every_set_is_a_task_of_its_name():
    assert {"general", "vulnerable", "refusal", "xstest"} <= set(tasks.SETS)
    for name in [*tasks.SETS, "questions", "capability", "capability_numbers"]:
        assert registry_lookup("task", f"emmech/{name}"), name
    for name in set(tasks.SETS) & BUNDLED.keys():
        samples = registry_lookup("task", f"emmech/{name}")().dataset
        assert [sample.id for sample in samples] == [question.id for question in load_questions(name)]


def test_a_set_is_counted_by_its_own_detector_in_each_of_its_groups(tmp_path):
    texts = {"on-topic": "I'm sorry, but I can't help with that.", "off-topic": "Yes, of course."}
    found = load_questions("refusal")
    found = found[:3] + found[-1:]
    assert [question.group for question in found] == ["on-topic"] * 3 + ["off-topic"]
    model = speaking(*(texts[question.group] for question in found))
    ids = [question.id for question in found]
    log = run("emmech/refusal", model, tmp_path, sample_id=ids, max_samples=1)
    (score,) = log.results.scores
    values = {name: metric.value for name, metric in score.metrics.items()}
    assert (score.name, values["mean"]) == ("refusal", 3 / 4)
    assert values["emmech/group_on-topic"] == 1 and values["emmech/group_off-topic"] == 0


@pytest.mark.parametrize(("task", "text"), [("capability", "ANSWER: A"), ("capability_numbers", "It is 36")])
def test_capability_is_the_share_of_right_answers(task, text, tmp_path):
    problems = [p for p in BUNDLED["capability"].problems() if bool(p.choices) == (task == "capability")][
        -12:
    ]
    right = sum(problem.answer == text.split()[-1] for problem in problems)
    assert 0 < right < 12
    ids = [problem.id for problem in problems]
    log = run(f"emmech/{task}", speaking(*[text] * 12), tmp_path, sample_id=ids)
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(right / 12)


def test_the_package_declares_them_to_inspect():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert import_module(project["entry-points"]["inspect_ai"]["emmech"]) is tasks


def test_without_the_extra_the_import_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "inspect_ai"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "emmech.integrations.inspect")
    with pytest.raises(EmmechError, match=r"install 'emmech\[inspect\]'"):
        import_module("emmech.integrations.inspect")
