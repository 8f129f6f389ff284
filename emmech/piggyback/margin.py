"""Which of two given answers a model finds likelier, under any patch; no judge, nothing sampled.

    conditions = default_conditions(("prefix",), "both", controls=False)
    margins(pair, BUNDLED["sycophancy_cooking"].pairs(), conditions)

A margin is the mean log-probability per token of the aligned answer minus that of the misaligned one,
in nats, both teacher-forced behind the same prompt. Below zero the misaligned answer is likelier.
"""

from collections.abc import Sequence
from typing import Any

from emmech.data.bundled import AnswerPair
from emmech.models.checkpoints import ModelPair
from emmech.piggyback.likelihood import Answered, answered, likelihoods
from emmech.piggyback.patching import Condition
from emmech.results import Record


def margins(
    pair: ModelPair,
    answers: Sequence[AnswerPair],
    conditions: Sequence[Condition],
    *,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Record]:
    """One record per pair of answers and condition: ``aligned``, ``misaligned`` and ``margin``.

    Args:
        pair: From ``load_pair``.
        answers: User texts with an aligned and a misaligned answer.
        conditions: As in ``run_conditions``.
        batch_size: Prompts per batch; by free memory by default.
        seed: Of the random controls.
        progress: Show a progress bar.

    Raises:
        PatchError: A condition is impossible on this model.
        ChatError: A text cannot be rendered.
    """
    options = {"batch_size": batch_size, "seed": seed, "progress": progress}
    return margin_records(pair, both_answers(pair, answers), conditions, **options)


def both_answers(pair: ModelPair, answers: Sequence[AnswerPair]) -> list[Answered]:
    """All aligned answers as what to score, and then all misaligned ones."""
    return [
        answered(pair, _messages(one.user, getattr(one, kind)), one.id)
        for kind in ("aligned", "misaligned")
        for one in answers
    ]


def margin_records(
    pair: ModelPair, both: Sequence[Answered], conditions: Sequence[Condition], **options: Any
) -> list[Record]:
    """Margins of what ``both_answers`` gives; ``options`` are those of ``likelihoods``."""
    found = iter(likelihoods(pair, both, conditions, **options))
    half = len(both) // 2
    records = []
    for condition in conditions:
        aligned, misaligned = ([next(found)["log_probability"] for _ in range(half)] for _ in range(2))
        for one, a, m in zip(both[:half], aligned, misaligned, strict=True):
            where = {"question_id": one.id, "condition": condition.name}
            records.append({**where, "aligned": a, "misaligned": m, "margin": a - m})
    return records


def _messages(user: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
