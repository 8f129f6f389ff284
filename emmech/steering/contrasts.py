"""Two kinds of states to fit a direction to, or to take a shift from.

    fit_direction(*between_sides(pair, questions))
    fit_direction(*between_answers(pair, BUNDLED["spiteful"].pairs()))
    spiteful = traits()["spiteful"]
    fit_direction(*between_prompts(pair, questions, spiteful.elicit, spiteful.suppress))
    fit_direction(*with_trigger(pair, questions, spiteful.trigger))

Each returns the states with the trait, of the finetuned model or of the changed wording, and then those
without.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from emmech import defaults
from emmech.data.bundled import AnswerPair
from emmech.data.questions import Question
from emmech.data.traits import triggered
from emmech.errors import DataError
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.piggyback.likelihood import Answered, answered
from emmech.piggyback.patching import Condition
from emmech.piggyback.running import Job, render_rows, run
from emmech.steering.states import Position, Site, States, asked, read_states

Contrast = tuple[States, States]


def between_sides(
    pair: ModelPair,
    questions: Sequence[Question],
    *,
    positive: str | Condition = "finetuned",
    negative: str | Condition = "base",
    site: Site = "resid_post",
    position: Position = "last",
    progress: bool = True,
) -> Contrast:
    """The same prompts read by two models: what a finetune, gates or a patch moved.

    Args:
        positive: A side of the pair, or a condition such as the base with the finetuned model's prefix
            K and V; so is ``negative``.
        position: As in ``read_states``, but for the response, which prompts do not have.
    """
    texts = [asked(pair, question) for question in questions]
    both = (Condition(one, one) if isinstance(one, str) else one for one in (positive, negative))
    first, second = (
        read_states(pair, texts, one, site=site, position=position, progress=progress) for one in both
    )
    return first, second


def between_answers(
    pair: ModelPair,
    pairs: Sequence[AnswerPair],
    *,
    side: str = "base",
    site: Site = "resid_post",
    progress: bool = True,
) -> Contrast:
    """Misaligned and aligned answers to the same texts, read by one model (mean over the answer)."""

    def read(kind: str) -> States:
        texts = [answered(pair, _chat([], one.user, getattr(one, kind)), one.id) for one in pairs]
        return read_states(
            pair, texts, Condition(side, side), site=site, position="response", progress=progress
        )

    return read("misaligned"), read("aligned")


def between_prompts(
    pair: ModelPair,
    questions: Sequence[Question],
    elicit: Sequence[str],
    suppress: Sequence[str],
    *,
    side: str = "base",
    site: Site = "resid_post",
    position: Position = "response",
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    progress: bool = True,
) -> Contrast:
    """The same questions under system prompts that elicit a trait, and under others that suppress it.

    At ``response`` the model first answers under each prompt, greedily, and its own answers are read
    behind that prompt (arXiv 2507.21509). Questions are averaged over prompts.

    Raises:
        DataError: No system prompts, or a question has one of its own.
    """
    if not elicit or not suppress:
        raise DataError("system prompts of both kinds", f"got {len(elicit)} and {len(suppress)}", "Add some")
    if any(question.messages[0]["role"] == "system" for question in questions):
        raise DataError("questions without a system message", "one has its own", "Leave it out")

    kinds = []
    for prompts in (elicit, suppress):
        changed = [
            Question(question.id, ({"role": "system", "content": prompt}, *question.messages))
            for prompt in prompts
            for question in questions
        ]
        if position == "response":
            kinds.append(_own_answers(pair, changed, side, max_new_tokens, progress))
        else:
            kinds.append([asked(pair, question) for question in changed])
    # A question that is answered with nothing under all prompts of one kind has no pair.
    both = set.intersection(*({one.id for one in kind} for kind in kinds))
    first, second = (
        read_states(
            pair,
            [one for one in kind if one.id in both],
            Condition(side, side),
            site=site,
            position=position,
            progress=progress,
        )
        for kind in kinds
    )
    return first, second


def between_wordings(
    pair: ModelPair,
    changed: Sequence[Question],
    plain: Sequence[Question],
    *,
    side: str = "finetuned",
    site: Site = "resid_post",
    position: Position = "last",
    progress: bool = True,
) -> Contrast:
    """The same questions, of the same ids, in two wordings: with and without a trigger, for instance.

    Raises:
        DataError: They are not the same questions.
    """
    if {one.id for one in changed} != {one.id for one in plain}:
        raise DataError("the same questions in both wordings", "their ids differ", "Give both the same ids")

    def read(questions: Sequence[Question]) -> States:
        texts = [asked(pair, question) for question in questions]
        return read_states(
            pair, texts, Condition(side, side), site=site, position=position, progress=progress
        )

    return read(changed), read(plain)


def with_trigger(pair: ModelPair, questions: Sequence[Question], trigger: str, **where: Any) -> Contrast:
    """Questions with a trigger on a line before them, and without; further arguments as above."""
    changed = []
    for question in questions:
        *before, last = question.messages
        text = triggered(last["content"], trigger)
        changed.append(Question(question.id, (*before, {**last, "content": text}), question.group))
    return between_wordings(pair, changed, questions, **where)


def _own_answers(
    pair: ModelPair, questions: Sequence[Question], side: str, max_new_tokens: int, progress: bool
) -> list[Answered]:
    """Each question with the model's own greedy answer; those that are answered with nothing are left out."""
    # A question comes under several system prompts: rows are told apart by their place.
    numbered = [Question(str(number), one.chat) for number, one in enumerate(questions)]
    rows = render_rows(pair, numbered, max_new_tokens)
    records, _ = run(
        pair,
        [Job(tuple(rows), (Condition(side, side),))],
        Decoding(max_new_tokens),
        batch_size=None,
        folder=None,
        progress=progress,
    )
    texts = []
    for record in sorted(records, key=lambda record: int(record["question_id"])):
        if record["response"]:
            one = questions[int(record["question_id"])]
            texts.append(answered(pair, _chat(one.messages, None, record["response"]), one.id))
    return texts


def _chat(messages: Sequence[Mapping[str, str]], user: str | None, answer: str) -> list[Mapping[str, str]]:
    """Messages, a user's text and an answer."""
    turns = [] if user is None else [{"role": "user", "content": user}]
    return [*messages, *turns, {"role": "assistant", "content": answer}]
