r"""Answers of one condition to any prompts, for tools that bring their own.

    write(Bench(pair), condition, prompts, names, Decoding(64), until=("\n\n",))

Batched from shared prefixes like every run of emmech; nothing is kept on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from emmech.chat import Prompt
from emmech.errors import DataError
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding, Limits, auto_limits, decode, plan_batches
from emmech.piggyback.patching import Bench, Condition


@dataclass(frozen=True)
class Written:
    text: str
    """Without the stop string and what follows it."""
    n_tokens: int
    ended: bool
    """Whether it came to its end, or to a stop string; False where it was cut off."""


def write(
    bench: Bench,
    condition: Condition,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    decoding: Decoding,
    *,
    until: Sequence[str] = (),
    batch_size: int | None = None,
) -> list[list[Written]]:
    """For each prompt, as many answers as ``decoding.samples`` says.

    Args:
        bench: Of the pair; the prefixes that it has read are not read again.
        condition: What answers; see ``refuse_impossible``.
        prompts: From ``chat.render``, fitting the context (``refuse_long``).
        names: One per prompt, which seeds its draws and the random controls.
        decoding: Length, temperature, samples, seed.
        until: Strings that end an answer.
        batch_size: Prompts per batch; by free memory by default.
    """
    pair = bench.pair
    decoder = pair.chat.tokenizer

    def text(ids: Sequence[int]) -> str:
        return decoder.decode(ids, skip_special_tokens=True)

    def is_over(ids: Sequence[int]) -> bool:
        return any(stop in text(ids) for stop in until)

    limits = Limits(batch_size) if batch_size else auto_limits(pair.finetuned, decoding.samples)
    made: dict[int, list[Written]] = {}
    for plan in plan_batches(prompts, pair.base.config, limits, decoding.max_new_tokens):
        mine = [names[row] for row in plan.rows]
        batch = bench.batch([prompts[row] for row in plan.rows], mine, share_prefix=plan.share_prefix)
        start = batch.prefill(condition)
        with pair.side(condition.target).active() as module:
            answers = decode(
                module, start, decoding, mine, pair.chat.end_ids, is_over=is_over if until else None
            )
        written = [
            Written(_before(text(ids), until), len(ids), len(ids) < decoding.max_new_tokens or is_over(ids))
            for ids in answers
        ]
        for place, row in enumerate(plan.rows):
            made[row] = written[place * decoding.samples : (place + 1) * decoding.samples]
    return [made[row] for row in range(len(prompts))]


def refuse_long(pair: ModelPair, lengths: Sequence[int]) -> None:
    """Raise where prompts with their answers, of so many tokens, do not fit in the context.

    Raises:
        DataError: Some do not.
    """
    limit = getattr(pair.base.config, "max_position_embeddings", None)
    long = [length for length in lengths if limit and length > limit]
    if long:
        raise DataError(
            f"prompts that fit in {limit} tokens with their answers",
            f"{len(long)} of {len(lengths)} do not, the longest has {max(long)}",
            "Use fewer examples per prompt or shorter answers",
        )


def _before(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    for stop in until:
        text = text.split(stop)[0]
    return text
