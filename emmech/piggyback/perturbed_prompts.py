"""Prompts with some tokens replaced by near neighbours, or with another template.

neighbours = Neighbours(pair, count=5)
neighbours.perturb(prompt, "prefix", 10, seed=0, question_id="q1", trial=0)
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emmech.chat import Chat, Prompt, Segment
from emmech.errors import ChatError
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import row_generator
from emmech.piggyback.running import Row

SYSTEM_PROMPTS = {
    "system-brief": "Answer briefly.",
    "system-librarian": "You work at the front desk of a town library and like to help visitors.",
    "system-plain": "A conversation between a person and a computer program follows.",
}
"""Other system prompts: one short, one in character, one that says nothing to do."""
_BLOCK = 8192


def nearest_neighbours(
    embedding: Float[Tensor, "d_vocab d_model"],
    ids: Int[Tensor, " token"],
    count: int,
    excluded: Sequence[int] = (),
) -> Int[Tensor, "token count"]:
    """The ``count`` vocabulary entries with the largest dot product with each token's embedding.

    The token itself and ``excluded`` ids are left out. The vocabulary is taken in blocks, so that
    no matrix of tokens by vocabulary is ever made.
    """
    query = embedding[ids].float()
    best = query.new_full((len(ids), 0), -torch.inf)
    found = ids.new_empty((len(ids), 0))
    barred = torch.tensor(sorted(excluded), device=ids.device, dtype=ids.dtype)
    for start in range(0, len(embedding), _BLOCK):
        block = torch.arange(start, min(start + _BLOCK, len(embedding)), device=ids.device)
        score = query @ embedding[block].float().T
        score[ids[:, None] == block] = -torch.inf
        score[:, torch.isin(block, barred)] = -torch.inf
        score, found = (
            torch.cat([best, score], 1),
            torch.cat([found, block.expand(len(ids), -1)], 1),
        )
        best, at = score.topk(min(count, score.shape[1]))
        found = found.gather(1, at)
    return found


def template_variants(chat: Chat, rows: Sequence[Row]) -> Iterable[tuple[str, list[Prompt]]]:
    """Named variants of every prompt's template: system prompts, none, white space, capitals."""
    for name, system in SYSTEM_PROMPTS.items():
        yield name, [_render(chat.with_system(system), row) for row in rows]
    with suppress(ChatError):  # some templates have no block that could be left out
        yield "no-system", [_render(chat.without_system(), row) for row in rows]
    yield "newlines", [_with_prefix(chat, row.prompt, "\n", "\n\n") for row in rows]
    yield "capitals", [_with_prefix(chat, row.prompt, None, None) for row in rows]


def _render(chat: Chat, row: Row) -> Prompt:
    given = row.question.chat
    return chat.render(given if isinstance(given, str) else [dict(m) for m in given])


def _with_prefix(chat: Chat, prompt: Prompt, old: str | None, new: str | None) -> Prompt:
    """The prompt with ``old`` replaced by ``new`` in its prefix, or the prefix in capitals.

    Control tokens stay: only the text between them changes, and is tokenised anew.
    """
    controls = set(chat.tokenizer.get_added_vocab().values())
    ids: list[int] = []
    text = ""

    def flush() -> None:
        nonlocal text
        changed = text.upper() if old is None else text.replace(old, str(new))
        ids.extend(chat.tokenizer(changed, add_special_tokens=False)["input_ids"])
        text = ""

    for token, shown in zip(prompt.prefix_ids, prompt.token_texts, strict=False):
        if token in controls:
            flush()
            ids.append(token)
        else:
            text += shown
    flush()
    return _replaced(chat, prompt, [*ids, *prompt.query_ids, *prompt.postfix_ids], len(ids))


def _replaced(chat: Chat, prompt: Prompt, ids: Sequence[int], n_prefix: int) -> Prompt:
    texts = tuple(chat.tokenizer.decode([token]) for token in ids)
    query = "".join(texts[n_prefix : len(ids) - prompt.n_postfix])
    return replace(
        prompt,
        text="".join(texts),
        ids=tuple(ids),
        n_prefix=n_prefix,
        query=query,
        token_texts=texts,
    )


class Neighbours:
    """Perturbed prompts; each token's neighbours are looked up once."""

    def __init__(self, pair: ModelPair, count: int):
        self._chat, self._count = pair.chat, count
        self._embedding = pair.base.module.get_input_embeddings().weight
        controls = pair.chat.tokenizer.get_added_vocab().values()
        unused = range(len(pair.chat.tokenizer), len(self._embedding))
        self._excluded = sorted({*controls, *unused})
        self._found: dict[int, list[int]] = {}

    def perturb(
        self, prompt: Prompt, segment: Segment, n_tokens: int, *, seed: int, question_id: str, trial: int
    ) -> Prompt:
        """The prompt with ``n_tokens`` of a segment replaced, chosen by seed, question and trial."""
        start = {"prefix": 0, "query": prompt.n_prefix, "postfix": len(prompt) - prompt.n_postfix}
        size = getattr(prompt, f"n_{segment}")
        stream = row_generator(f"{seed}/perturb/{segment}/{question_id}/{trial}")
        ids = list(prompt.ids)
        chosen = torch.randperm(size, generator=stream)[:n_tokens].tolist()
        self._look_up([ids[start[segment] + offset] for offset in chosen])
        for offset in chosen:
            candidates = self._found[ids[start[segment] + offset]]
            pick = int(torch.randint(len(candidates), (1,), generator=stream))
            ids[start[segment] + offset] = candidates[pick]
        return _replaced(self._chat, prompt, ids, prompt.n_prefix)

    def _look_up(self, ids: Sequence[int]) -> None:
        unknown = sorted(set(ids) - self._found.keys())
        if unknown:
            wanted = torch.tensor(unknown, device=self._embedding.device)
            with torch.no_grad():
                found = nearest_neighbours(self._embedding, wanted, self._count, self._excluded)
            self._found |= dict(zip(unknown, found.tolist(), strict=True))
