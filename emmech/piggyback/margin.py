"""Which of two given answers a model finds likelier, under any patch; no judge, nothing sampled.

    conditions = default_conditions(("prefix",), "both", controls=False)
    margins(pair, BUNDLED["sycophancy_cooking"].pairs(), conditions)

A margin is the mean log-probability per token of the aligned answer minus that of the misaligned one,
in nats, both teacher-forced behind the same prompt. Below zero the misaligned answer is likelier.
"""

from collections.abc import Sequence

from tqdm.auto import tqdm

from emmech.data.bundled import AnswerPair
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Limits, answer_log_probability, auto_limits, plan_batches
from emmech.piggyback.patching import Bench, Condition, refuse_impossible
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
    for condition in conditions:
        refuse_impossible(pair, condition)
    rendered = [
        [
            pair.chat.answered(
                [{"role": "user", "content": one.user}, {"role": "assistant", "content": text}]
            )
            for text in (one.aligned, one.misaligned)
        ]
        for one in answers
    ]
    longest = max(len(ids) for both in rendered for _, ids in both)
    limits = auto_limits(pair.finetuned, 1) if batch_size is None else Limits(batch_size)
    plans = plan_batches([both[0][0] for both in rendered], pair.base.config, limits, longest)
    bench, made = Bench(pair, seed), {}
    with tqdm(total=len(answers) * len(conditions), disable=not progress, unit="pair") as bar:
        for plan in plans:
            names = [answers[row].id for row in plan.rows]
            batch = bench.batch(
                [rendered[row][0][0] for row in plan.rows], names, share_prefix=plan.share_prefix
            )
            for condition in conditions:
                values = []
                for kind in (0, 1):
                    start = batch.prefill(condition)
                    with pair.side(condition.target).active() as module:
                        ids = [rendered[row][kind][1] for row in plan.rows]
                        values.append(answer_log_probability(module, start, ids).tolist())
                for row, aligned, misaligned in zip(plan.rows, *values, strict=True):
                    made[condition.name, row] = {
                        "question_id": answers[row].id,
                        "condition": condition.name,
                        "aligned": aligned,
                        "misaligned": misaligned,
                        "margin": aligned - misaligned,
                    }
                bar.update(len(plan.rows))
    return [made[condition.name, row] for condition in conditions for row in range(len(answers))]
