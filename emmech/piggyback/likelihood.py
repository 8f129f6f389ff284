"""How likely given answers are under any condition, and how far the next-token distribution has moved.

Teacher-forced: nothing is sampled, no judge is needed. The same numbers serve as a margin between two
answers, as the perplexity of generated answers under the base (a check of coherence), and as the cost
of an intervention on ordinary answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from emmech.chat import Prompt
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Limits, answer_logits, auto_limits, plan_batches
from emmech.piggyback.patching import Bench, Condition, PatchedBatch, refuse_impossible
from emmech.results import Record
from emmech.sharding import processes


@dataclass(frozen=True)
class Answered:
    """An answer to score behind its prompt; its name seeds the random controls."""

    id: str
    prompt: Prompt
    answer: tuple[int, ...]


def answered(pair: ModelPair, messages: Sequence[Mapping[str, str]], name: str) -> Answered:
    """A chat that ends with an answer, and the token that ends it, as what to score.

    Raises:
        ChatError: It cannot be rendered.
    """
    return Answered(name, *pair.chat.answered([dict(message) for message in messages]))


def likelihoods(
    pair: ModelPair,
    answers: Sequence[Answered],
    conditions: Sequence[Condition],
    *,
    kl: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Record]:
    """One record per condition and answer, in that order: ``log_probability`` and, asked for, ``kl``.

    Args:
        pair: The models.
        answers: Prompts and the token ids of an answer to each, at least one token long.
        conditions: As in ``run_conditions``.
        kl: Also KL(base ‖ condition) of the next token, in nats, the mean over the answer's tokens.
        batch_size: Answers per batch; by free memory by default.
        seed: Of the random controls.
        progress: Show a progress bar.

    ``log_probability`` is the mean over the answer's tokens, in nats.

    Raises:
        PatchError: A condition is impossible on this model.
    """
    for condition in conditions:
        refuse_impossible(pair, condition)
    if not answers:
        return []
    ours = processes()
    longest = max(len(one.answer) for one in answers)
    limits = ours.from_main(lambda: Limits(batch_size) if batch_size else auto_limits(pair.finetuned, 1))
    # Logits over the vocabulary, in float32, a few times over: at most about 2 GiB.
    most = 2**29 // (4 * longest * pair.base.config.vocab_size)
    limits = Limits(max(1, min(limits.rows, most)), limits.slots)
    plans = plan_batches([one.prompt for one in answers], pair.base.config, limits, longest)
    plans = ours.share(plans)
    bench, made = Bench(pair, seed), {}
    total = sum(len(plan.rows) for plan in plans) * len(conditions)
    with tqdm(total=total, disable=not (progress and ours.is_main), unit="answer") as bar:
        for plan in plans:
            rows = [answers[row] for row in plan.rows]
            ids = [one.answer for one in rows]
            batch = bench.batch(
                [one.prompt for one in rows], [one.id for one in rows], share_prefix=plan.share_prefix
            )

            base = _log_softmax(batch, Condition("base", "base"), ids)[0] if kl else None
            for condition in conditions:
                log_q, tokens, asked = _log_softmax(batch, condition, ids)
                n_tokens = asked.sum(-1)
                chosen = log_q.gather(-1, tokens[..., None]).squeeze(-1)
                scores = {"log_probability": (chosen * asked).sum(-1) / n_tokens}
                if base is not None:
                    moved = (base.exp() * (base - log_q)).sum(-1)
                    scores["kl"] = (moved * asked).sum(-1) / n_tokens
                for place, row in enumerate(plan.rows):
                    made[condition.name, row] = {
                        "id": answers[row].id,
                        "condition": condition.name,
                        "n_tokens": int(n_tokens[place]),
                        **{name: float(values[place]) for name, values in scores.items()},
                    }
                bar.update(len(rows))
    made = ours.together(made)
    return [made[condition.name, row] for condition in conditions for row in range(len(answers))]


def _log_softmax(
    batch: PatchedBatch, condition: Condition, answers: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "batch pos d_vocab"], Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Log-probabilities of each next token, the answers' tokens, and where there is one."""
    start = batch.prefill(condition)
    with batch.bench.pair.side(condition.target).active() as module:
        logits, tokens, asked = answer_logits(module, start, answers)
    return logits.float().log_softmax(-1), tokens, asked
