"""How likely given answers are under any condition, and how far the next-token distribution has moved.

Teacher-forced: nothing is sampled, no judge is needed. The same numbers serve as a margin between two
answers, as the perplexity of generated answers under the base (a check of coherence), and as the cost
of an intervention on ordinary answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from emmech.chat import Prompt
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Limits, answer_logits, auto_limits, plan_batches
from emmech.piggyback.patching import Bench, Condition, PatchedBatch, refuse_impossible
from emmech.results import Record
from emmech.sharding import processes

TOGETHER = 8
"""Most answers to one prompt that are scored from one reading of it."""


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
    kl_from: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Record]:
    """One record per condition and answer: ``log_probability``, ``greedy`` and, with ``kl_from``, ``kl``.

    Args:
        pair: The models.
        answers: Prompts and the token ids of an answer to each, at least one token long.
        conditions: As in ``run_conditions``.
        kl_from: Name of an unpatched side: also KL(side ‖ condition) of the next token, in nats, the
            mean over the answer's tokens.
        batch_size: Answers per batch; by free memory by default.
        seed: Of the random controls.
        progress: Show a progress bar.

    ``log_probability`` is the mean over the answer's ``n_tokens``, in nats; ``greedy`` says whether each
    of them is the likeliest in its place. Answers that share id and prompt share one reading of it.

    Raises:
        PatchError: A condition is impossible on this model.
    """
    for condition in conditions:
        refuse_impossible(pair, condition)
    if not answers:
        return []
    groups = _by_prompt(answers)
    together = max(map(len, groups))
    ours = processes()
    longest = max(len(one.answer) for one in answers)
    limits = ours.from_main(lambda: Limits(batch_size) if batch_size else auto_limits(pair.finetuned, 1))
    # Logits over the vocabulary, in float32, a few times over: at most about 2 GiB.
    most = 2**29 // (4 * longest * pair.base.config.vocab_size)
    limits = Limits(max(1, min(limits.rows, most) // together), max(1, limits.slots // together))
    plans = plan_batches([group[0][1].prompt for group in groups], pair.base.config, limits, longest)
    plans = ours.share(plans)
    bench, made = Bench(pair, seed), {}
    total = sum(len(groups[number]) for plan in plans for number in plan.rows) * len(conditions)
    with tqdm(total=total, disable=not (progress and ours.is_main), unit="answer") as bar:
        for plan in plans:
            chosen = [groups[number] for number in plan.rows]
            rows = [row for group in chosen for row, _ in group]
            firsts = [group[0][1] for group in chosen]
            batch = bench.batch(
                [one.prompt for one in firsts], [one.id for one in firsts], share_prefix=plan.share_prefix
            )
            ids = [[one.answer for _, one in group] for group in chosen]
            plain = None if kl_from is None else _log_softmax(batch, Condition(kl_from, kl_from), ids)[0]
            for condition in conditions:
                scores = _scores(*_log_softmax(batch, condition, ids), plain)
                for row, score in zip(rows, scores, strict=True):
                    made[condition.name, row] = {"id": answers[row].id, "condition": condition.name, **score}
                bar.update(len(rows))
    made = ours.together(made)
    return [made[condition.name, row] for condition in conditions for row in range(len(answers))]


def _by_prompt(answers: Sequence[Answered]) -> list[list[tuple[int, Answered]]]:
    """The answers with their places, those to one prompt together, at most ``TOGETHER`` of them."""
    found: dict[tuple[str, tuple[int, ...]], list[tuple[int, Answered]]] = {}
    for row, one in enumerate(answers):
        found.setdefault((one.id, one.prompt.ids), []).append((row, one))
    return [
        group[start : start + TOGETHER]
        for group in found.values()
        for start in range(0, len(group), TOGETHER)
    ]


def _log_softmax(
    batch: PatchedBatch, condition: Condition, answers: Sequence[Sequence[Sequence[int]]]
) -> tuple[Float[Tensor, "answer pos d_vocab"], Int[Tensor, "answer pos"], Bool[Tensor, "answer pos"]]:
    """Log-probabilities of each next token of each row's answers, their tokens, and where there is one."""
    start = batch.prefill(condition)
    if any(len(mine) > 1 for mine in answers):
        counts = torch.tensor([len(mine) for mine in answers], device=start.logits.device)
        start = start.take(torch.arange(len(answers), device=counts.device).repeat_interleave(counts))
    with batch.bench.pair.side(condition.target).active() as module:
        logits, tokens, asked = answer_logits(module, start, [one for mine in answers for one in mine])
    return logits.float().log_softmax(-1), tokens, asked


def _scores(
    log_q: Float[Tensor, "answer pos d_vocab"],
    tokens: Int[Tensor, "answer pos"],
    asked: Bool[Tensor, "answer pos"],
    plain: Float[Tensor, "answer pos d_vocab"] | None,
) -> list[Record]:
    """What a record says of each answer, given the log-probabilities that KL is taken from."""
    n_tokens = asked.sum(-1)
    chosen = log_q.gather(-1, tokens[..., None]).squeeze(-1)
    columns = {
        "n_tokens": n_tokens,
        "log_probability": (chosen * asked).sum(-1) / n_tokens,
        "greedy": ((log_q.argmax(-1) == tokens) | ~asked).all(-1),
    }
    if plain is not None:
        moved = (plain.exp() * (plain - log_q)).sum(-1)
        columns["kl"] = (moved * asked).sum(-1) / n_tokens
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]
