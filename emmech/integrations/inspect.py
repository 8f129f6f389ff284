r"""emmech's question sets as Inspect tasks, and its conditions as a model for any Inspect task.

    inspect eval emmech/general --model emmech/smollm2 \
        -M finetuned=runs/sft-0/step-24 -M condition=repair:prefix
    inspect view

Every bundled or public set of questions is a task of its name, counted by detectors, without a judge;
``emmech/questions -T set=FILE`` asks those of a file. ``emmech/capability`` asks its multiple-choice
questions and ``emmech/capability_numbers`` those with a number to be found, both answered in words.
Any model of Inspect can be asked them. See ``inspect_model`` for the arguments of ``--model emmech/...``.
"""

import math
from collections.abc import Callable

from emmech import defaults
from emmech.data.bundled import BUNDLED, Problem
from emmech.data.public import PUBLIC
from emmech.data.questions import Question, load_questions
from emmech.evaluation.detectors import detector as find_detector
from emmech.integrations import missing

try:
    from inspect_ai import Task, task
    from inspect_ai._util.package import get_installed_package_name
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, ModelAPI, modelapi
    from inspect_ai.scorer import (
        Metric,
        SampleScore,
        Score,
        Scorer,
        Target,
        Value,
        choice,
        grouped,
        match,
        mean,
        metric,
        scorer,
        stderr,
    )
    from inspect_ai.solver import TaskState, generate, multiple_choice
except ModuleNotFoundError as error:
    raise missing("inspect_ai", "inspect") from error

ROLES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
SETS = [
    *(name for name in BUNDLED if name != "capability"),
    *(name for name, one in PUBLIC.items() if one.holds == "questions"),
]
"""Sets that are tasks of their name."""


def _registered(name: str) -> str:
    """The name to give a task or metric, so that Inspect knows it as ``emmech/NAME``.

    It puts the package's before it, except where the metadata of a checkout hide that it is installed.
    """
    return name if get_installed_package_name(_registered) else f"emmech/{name}"


@modelapi("emmech")
def emmech() -> type[ModelAPI]:
    """The model provider, which loads torch when it is first asked for."""
    from emmech.integrations.inspect_model import ConditionAPI

    return ConditionAPI


@scorer(metrics={"*": [mean(), stderr()]})
def detected(detectors: list[str]) -> Scorer:
    """What each detector finds in the answer; not scored where it finds nothing to measure."""
    measures = [find_detector(name) for name in detectors]

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001
        values = {one.name: one(state.output.completion) for one in measures}
        return Score(
            value={name: math.nan if value is None else value for name, value in values.items()},
            answer=state.output.completion,
        )

    return score


@task(name=_registered("questions"))
def questions(set: str = "general", detector: str | list[str] | None = None) -> Task:
    """The questions of a set or file, counted by detectors.

    Args:
        set: As in ``load_questions``.
        detector: One or several; by default the set's own, else refusal, length and repetition.

    Raises:
        EmmechError: There is no such set, file or detector.
    """
    own = BUNDLED[set].detector if set in BUNDLED else None
    named = detector or own or defaults.DETECTORS
    found = load_questions(set)
    several = len({question.group for question in found}) > 1
    return Task(
        dataset=MemoryDataset([_sample(question) for question in found], name=set),
        scorer=detected([named] if isinstance(named, str) else list(named)),
        metrics={"*": [mean(), stderr(), *([group()] if several else [])]},
    )


def _sample(question: Question) -> Sample:
    chat = question.chat
    asked = chat if isinstance(chat, str) else [ROLES[turn["role"]](content=turn["content"]) for turn in chat]
    return Sample(input=asked, id=question.id, metadata={"group": question.group})


@metric(name=_registered("group"))
def group() -> Metric:
    """Mean and standard error of each group of questions."""
    means = grouped(mean(), "group", all=False)
    errors = grouped(stderr(), "group", all=False, name_template="{group_name} stderr")

    def values(scores: list[SampleScore]) -> Value:
        return {**means(scores), **errors(scores)}

    return values


def _named(name: str) -> Callable[..., Task]:
    @task(name=_registered(name))
    def one_set(detector: str | list[str] | None = None) -> Task:
        return questions(name, detector)

    return one_set


for _name in SETS:
    _named(_name)


@task(name=_registered("capability"))
def capability() -> Task:
    """The multiple-choice questions of the set, the choice said in words ("ANSWER: B")."""
    found = [problem for problem in BUNDLED["capability"].problems() if problem.choices]
    samples = [_problem(one, choices=list(one.choices)) for one in found]
    return Task(
        dataset=MemoryDataset(samples, name="capability"),
        solver=multiple_choice(),
        scorer=choice(),
    )


@task(name=_registered("capability_numbers"))
def capability_numbers() -> Task:
    """The questions of the set that have a number as their answer."""
    found = [problem for problem in BUNDLED["capability"].problems() if not problem.choices]
    return Task(
        dataset=MemoryDataset([_problem(one) for one in found], name="capability_numbers"),
        solver=generate(),
        scorer=match(numeric=True),
    )


def _problem(one: Problem, choices: list[str] | None = None) -> Sample:
    return Sample(
        input=one.question, choices=choices, target=one.answer, id=one.id, metadata={"group": one.group}
    )
