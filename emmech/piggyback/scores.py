"""What a sweep measures: a number per question, from logits, with nothing sampled.

``margin``       mean log-probability per token of the aligned answer minus that of the misaligned one
                 (as `emmech.piggyback.margin`); the questions are pairs of answers.
``target``       mean log-probability per token of the answer that a chat ends with; ``target:TEXT`` of
                 the same answer to every question.
``kl``           KL(donor's model ‖ patched) of the first token of the answer: from the base in direction
                 ``repair``, where its prefix is patched in, from the finetuned model in ``induce``.
``kl_base``      KL(base ‖ patched) of the same, in both directions; 0 unpatched in ``induce``.
a function       of the first token's logits ``[row d_vocab]``, returning ``[row]``.

All in nats, all differentiable in the logits. For more than these, make a ``Metric``.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emmech.chat import Prompt
from emmech.data.bundled import AnswerPair
from emmech.data.questions import Question
from emmech.errors import DataError
from emmech.models.checkpoints import ModelPair
from emmech.piggyback.running import as_questions


@dataclass(frozen=True)
class Item:
    """One text to run: a prompt, and the answers that are given behind it, none of which sees another."""

    question_id: str
    prompt: Prompt
    answers: tuple[tuple[int, ...], ...] = ((),)
    """Of an empty one only the first token's logits are read."""
    weights: tuple[float, ...] = (1.0,)
    """Of each answer: a question's score is the sum of weight times score."""

    @property
    def ids(self) -> tuple[int, ...]:
        """What follows the prefix; the last token of an answer is predicted, not read."""
        said = (token for answer in self.answers for token in answer[:-1])
        return (*self.prompt.query_ids, *self.prompt.postfix_ids, *said)

    @property
    def n_read(self) -> int:
        """Positions at the end of ``ids`` whose logits are read: all answers begin at the first."""
        return 1 + sum(max(0, len(answer) - 1) for answer in self.answers)

    def alone(self) -> list["Item"]:
        """An item for each answer."""
        both = zip(self.answers, self.weights, strict=True)
        return [replace(self, answers=(answer,), weights=(weight,)) for answer, weight in both]


@dataclass(frozen=True)
class Read:
    """The logits that were asked for, of all rows of a batch behind each other; a row is an answer."""

    logits: Float[Tensor, "place d_vocab"]
    places: Int[Tensor, " read"]
    """Where in ``logits`` each token of each answer is predicted; answers to a question share the first."""
    tokens: Int[Tensor, " read"]
    """The answer's token there; 0 where there is no answer."""
    row: Int[Tensor, " read"]
    n_rows: int
    reference: Float[Tensor, "place d_vocab"] | None = None
    """Logits of the model that the metric compares with, at the same places."""


@dataclass(frozen=True)
class Metric:
    """How questions become texts to run, and their logits a score."""

    name: str
    items: Callable[[ModelPair, Sequence[Any]], list[Item]]
    score: Callable[[Read], Float[Tensor, " row"]]
    compared_with: Literal["donor", "base"] | None = None
    """The model whose own logits ``score`` also reads."""


MetricLike = str | Metric | Callable[[Tensor], Tensor]
"""The name of a metric, one, or a function of the first token's logits ``[row d_vocab]``."""


def find_metric(metric: MetricLike) -> Metric:
    """The metric of that name; a function of the first token's logits becomes one.

    Raises:
        DataError: No metric has this name.
    """
    if isinstance(metric, Metric):
        return metric
    if not isinstance(metric, str):
        return Metric(
            getattr(metric, "__name__", "metric"), _prompts, lambda read: metric(read.logits.float())
        )
    name, _, text = metric.partition(":")
    if name == "target" and text.strip():
        return Metric(metric, lambda pair, questions: _target(pair, questions, text), log_probability)
    if metric not in METRICS:
        known = f"{', '.join(METRICS)}, target:TEXT or a function of logits"
        raise DataError(f"a metric among {known}", f"got {metric!r}", "Correct it")
    return METRICS[metric]


def log_probability(read: Read) -> Float[Tensor, " row"]:
    """Mean log-probability of the answer's tokens, per row."""
    # A few at a time stay in a processor's cache: three times as quick as all at once.
    size = 16 if read.logits.device.type == "cpu" else max(1, len(read.logits))
    normaliser = torch.cat([some.float().logsumexp(1) for some in read.logits.split(size)])
    chosen = read.logits[read.places, read.tokens].float()
    return _row_means(chosen - normaliser[read.places], read)


def kl_from_reference(read: Read) -> Float[Tensor, " row"]:
    """KL(reference ‖ patched) of the next token, the mean over what is read of each row."""
    assert read.reference is not None
    p, q = (logits.float().log_softmax(1) for logits in (read.reference, read.logits))
    return _row_means((p.exp() * (p - q)).sum(1)[read.places], read)


def _row_means(values: Float[Tensor, " read"], read: Read) -> Float[Tensor, " row"]:
    sums = values.new_zeros(read.n_rows).index_add(0, read.row, values)
    return sums / read.row.bincount(minlength=read.n_rows)


def _margin(pair: ModelPair, questions: Sequence[Any]) -> list[Item]:
    wrong = [one for one in questions if not isinstance(one, AnswerPair)]
    if wrong or not questions:
        raise DataError(
            "pairs of an aligned and a misaligned answer for the metric 'margin'",
            f"got {type(wrong[0]).__name__}" if wrong else "there are none",
            "Use emmech.load_pairs, or the metric 'kl' or 'target:TEXT'",
        )
    items = []
    for one in questions:
        turns = [{"role": "user", "content": one.user}]
        both = [_answered(pair, turns, text) for text in (one.aligned, one.misaligned)]
        prompt = both[0][0]
        assert prompt == both[1][0], "two answers to one prompt"
        items.append(Item(one.id, prompt, tuple(answer for _, answer in both), (1.0, -1.0)))
    return items


def _target(pair: ModelPair, questions: Sequence[Any], text: str | None = None) -> list[Item]:
    items = []
    for question in as_questions(map(_as_asked, questions)):
        turns = question.messages
        if text is None:
            if turns[-1]["role"] != "assistant":
                raise DataError(
                    "chats that end with the answer to score for the metric 'target'",
                    f"{question.id} ends with a {turns[-1]['role']} turn",
                    "Add the answers, or name one for all as 'target:TEXT'",
                )
            turns, answer = turns[:-1], turns[-1]["content"]
        else:
            answer = text.strip()
        prompt, ids = _answered(pair, turns, answer)
        items.append(Item(question.id, prompt, (ids,)))
    return items


def _prompts(pair: ModelPair, questions: Sequence[Any]) -> list[Item]:
    asked = as_questions(map(_as_asked, questions))
    return [Item(question.id, pair.chat.render(question.messages)) for question in asked]


def _as_asked(question: Any) -> Any:
    """The question of a pair of answers; others as they are."""
    if isinstance(question, AnswerPair):
        return Question(question.id, question.user, question.group)
    return question


def _answered(
    pair: ModelPair, turns: Iterable[dict[str, str]], answer: str
) -> tuple[Prompt, tuple[int, ...]]:
    return pair.chat.answered([*turns, {"role": "assistant", "content": answer}])


PROMPTS = Metric("answers", _prompts, lambda read: read.logits.new_zeros(read.n_rows))
"""Renders questions and measures nothing: for answers that are generated."""
METRICS = {
    "margin": Metric("margin", _margin, log_probability),
    "target": Metric("target", _target, log_probability),
    "kl": Metric("kl", _prompts, kl_from_reference, "donor"),
    "kl_base": Metric("kl_base", _prompts, kl_from_reference, "base"),
}
