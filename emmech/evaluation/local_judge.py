"""A judge in this process: a chat model's probabilities of the replies that a rubric allows.

Nothing is generated. Each reply allowed (the numbers 0 to 100 and the escapes, or the labels) gets
the probability that the model's reply begins with it and does not go on to a longer one of them, so
that with a tokenizer that splits numbers an 8 does not count for 80 to 89. The value is the mean of
the numbers, renormalised over 0 to 100. Deterministic, with no key and no network; a small model is
a weak judge, and `judge-agreement` says how weak.

Usage:
    LocalJudge()  # the embedded model
    LocalJudge("Qwen/Qwen3-8B", device="cuda:0")
    LocalJudge((module, chat), name="mine")
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emmech.chat import Chat, Prompt
from emmech.errors import ChatError
from emmech.evaluation.replies import MIN_MASS, Asked, Done, JudgeError, Judgement, Number, read_probabilities
from emmech.evaluation.rubrics import Rubric
from emmech.results import Record

if TYPE_CHECKING:  # importing them would load torch
    from emmech.models.generation import Batch, Limits, Prefilled
    from emmech.models.sides import Side

Ids = tuple[int, ...]


@dataclass
class LocalJudge:
    """Judges with a model held here.

    Raises:
        JudgeError: A loaded model comes without a name.
        LoadError: There is no such model.
    """

    model: str | Path | tuple[Any, Chat] = "smollm2"
    """Hub id, folder, the embedded model, or a loaded causal LM with its chat."""
    name: str | None = None
    """Stands for the judge in records; the model's name by default."""
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | None = None
    """Answers per batch; by free memory by default."""
    min_mass: Number | None = None
    """What the replies allowed need together for a judgement to count, 0 to 1. By default a quarter
    for a trait and nothing for the others, as for a forced choice: look at `mass`."""
    _described: Record = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if isinstance(self.model, tuple) and self.name is None:
            raise JudgeError("a name for a loaded model", "there is none", "Pass name=... for the records")

    @cached_property
    def _loaded(self) -> tuple["Side", Chat]:
        from emmech.models.opening import load_side
        from emmech.models.sides import Side

        if isinstance(self.model, tuple):
            module, chat = self.model
            return Side("judge", module), chat
        side, chat, identity = load_side(self.model, dtype=self.dtype, device=self.device)
        self._described = identity
        return side, chat

    @property
    def id(self) -> str:
        side, chat = self._loaded
        print_ = self._described.get("fingerprint")
        name = self.name or (f"{self.model} {print_}" if print_ else str(self.model))
        least = "" if self.min_mass is None else f" mass {self.min_mass}"
        return f"{name} {str(side.dtype).removeprefix('torch.')} {chat.template_hash}{least}"

    def describe(self) -> Record:
        side, chat = self._loaded
        dtype = str(side.dtype).removeprefix("torch.")
        return {"model": dict(self._described), "dtype": dtype, "template_hash": chat.template_hash}

    def estimate(self, asked: Sequence[Asked]) -> Record:
        """Free of charge; the tokens are to be read, none are written."""
        chat = self._loaded[1]
        tokens = chat.tokenizer([one.prompt for one in asked], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return {"input_tokens": sum(map(len, tokens)), "output_tokens": 0, "cost": 0.0}

    def run(self, asked: Sequence[Asked], done: Done, spent: Number) -> None:  # noqa: ARG002 (it is free)
        """Judge all, one rubric after another, in batches of prompts of similar length."""
        for rubric in dict.fromkeys(one.rubric for one in asked):
            self._run([one for one in asked if one.rubric == rubric], done)

    def _run(self, asked: Sequence[Asked], done: Done) -> None:
        from emmech.models.generation import make_batch, plan_batches

        side, chat = self._loaded
        rubric = asked[0].rubric
        tree = _Tree.of(chat, rubric)
        min_mass = self.min_mass
        if min_mass is None:
            min_mass = MIN_MASS if rubric.kind == "trait" else 0.0
        readable, prompts = [], []
        for one in asked:
            prompt = self._prompt(one, tree.longest)
            if isinstance(prompt, str):
                done(one, Judgement("failed", reason=prompt))
            else:
                readable.append(one)
                prompts.append(prompt)
        prompts = _with_common_prefix(prompts)
        for plan in plan_batches(prompts, side.config, self._limits(tree), tree.longest):
            rows = [prompts[row] for row in plan.rows]
            batch = make_batch(rows, side.device, share_prefix=plan.share_prefix)
            for row, found in zip(plan.rows, tree.probabilities(side, batch), strict=True):
                likeliest = max(found, key=lambda reply: found[reply])
                done(readable[row], read_probabilities(rubric, found, likeliest, min_mass=min_mass))

    def _prompt(self, asked: Asked, n_more: int) -> Prompt | str:
        """The prompt, or why the model cannot read it."""
        side, chat = self._loaded
        try:
            prompt = chat.render(asked.prompt)
        except ChatError as error:
            return str(error)
        most = getattr(side.config, "max_position_embeddings", None)
        if most is not None and len(prompt) + n_more > most:
            return f"the prompt has {len(prompt)} tokens, and the model reads {most}"
        return prompt

    def _limits(self, tree: "_Tree") -> "Limits":
        """Each prompt's cache is repeated for every path of the tree."""
        from emmech.models.generation import Limits, auto_limits

        if self.batch_size is not None:
            return Limits(self.batch_size)
        return auto_limits(self._loaded[0], max(1, len(tree.paths)))


def _with_common_prefix(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, what they all begin with (template and instructions) taken for their prefix.

    It is then read once for a whole batch.
    """
    if not prompts:
        return []
    least, most = min(p.ids for p in prompts), max(p.ids for p in prompts)
    pairs = zip(least, most, strict=False)
    n_common = next((n for n, (a, b) in enumerate(pairs) if a != b), len(least))
    longest = min(len(p) - p.n_postfix - 1 for p in prompts)
    n_prefix = min(n_common, longest)
    return [replace(p, n_prefix=n_prefix, n_query=len(p) - p.n_postfix - n_prefix) for p in prompts]


@dataclass(frozen=True)
class _Tree:
    """The replies allowed as token ids, and the paths to run so as to see every branching point."""

    replies: Mapping[str, Ids]
    children: Mapping[Ids, frozenset[int]]
    """By each beginning that goes on: the tokens that lead to a reply."""
    paths: tuple[Ids, ...]
    """Replies whose beginnings hold every branching point."""

    @classmethod
    def of(cls, chat: Chat, rubric: Rubric) -> "_Tree":
        """Tokenised as the template would put them behind a prompt."""
        replies = {}
        for reply in rubric.replies:
            turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": reply}]
            replies[reply] = chat.answered(turns)[1][:-1]  # without the token that ends it
        children: dict[Ids, set[int]] = {}
        for ids in replies.values():
            for n, token in enumerate(ids):
                children.setdefault(ids[:n], set()).add(token)
        inner = sorted(children, key=lambda path: (-len(path), path))
        paths: list[Ids] = []
        for start in inner:
            if not any(path[: len(start)] == start for path in paths):
                paths.append((*start, min(children[start])))
        return cls(replies, {path: frozenset(tokens) for path, tokens in children.items()}, tuple(paths))

    @property
    def longest(self) -> int:
        return max(map(len, self.paths))

    def probabilities(self, side: "Side", batch: "Batch") -> list[dict[str, float]]:
        """For each row of the batch, the probability of each reply."""
        tables = self._log_probabilities(side, batch)
        return [
            {reply: self._probability(ids, table) for reply, ids in self.replies.items()} for table in tables
        ]

    def _probability(self, ids: Ids, table: Mapping[Ids, Mapping[int, float]]) -> float:
        log_p = sum(table[ids[:n]][token] for n, token in enumerate(ids))
        longer = sum(math.exp(p) for p in table[ids].values()) if ids in table else 0.0
        return math.exp(log_p) * max(0.0, 1 - longer)

    def _log_probabilities(self, side: "Side", batch: "Batch") -> list[dict[Ids, dict[int, float]]]:
        """Per row and branching point, the log-probability of each token that leads to a reply."""
        import torch

        from emmech.models.generation import answer_logits

        start = _read(side, batch)
        n_rows, n_paths = len(batch.prompts), len(self.paths)
        if self.longest > 1:
            start = start.take(torch.arange(n_rows, device=side.device).repeat_interleave(n_paths))
        with side.active() as module:
            logits, _, _ = answer_logits(module, start, self.paths * n_rows)
        tables: list[dict[Ids, dict[int, float]]] = [{} for _ in range(n_rows)]
        for number, path in enumerate(self.paths):
            for n in range(len(path)):
                if path[:n] in tables[0]:
                    continue
                tokens = sorted(self.children[path[:n]])
                log_p = logits[number::n_paths, n].double().log_softmax(-1)[:, tokens]
                for table, values in zip(tables, log_p.tolist(), strict=True):
                    table[path[:n]] = dict(zip(tokens, values, strict=True))
        return tables


def _read(side: "Side", batch: "Batch") -> "Prefilled":
    """The model after the batch, its common prefix read once."""
    from emmech.models.generation import make_batch, prefill, run_through
    from emmech.models.kv_cache import PatchCache, prefix_state

    cache, first = PatchCache(side.config), batch.n_shared
    with side.active() as module:
        if first:
            ids = batch.prompts[0].prefix_ids
            alone = make_batch(
                [Prompt("", ids, first, 0, 0, "", ("",) * first)], side.device, share_prefix=False
            )
            recording = PatchCache(side.config, record=True)
            run_through(module, alone, recording)
            cache = prefix_state(recording, first).cache(side.config, len(batch.prompts))
        return prefill(module, batch, cache, first)
