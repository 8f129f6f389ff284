"""Batched decoding that runs the common prefix once and lets finished rows leave.

Under causal attention the prefix's K and V do not depend on the query, so a batch is laid out as
``[prefix | padding | query and postfix]``: the prefix is run once with one row, its cache expanded,
and only the rest is run per row. Where padding inside a row is not exact (a sliding window shorter
than the text, recurrent layers), rows are left-padded whole, or batched only with rows of their own
length. In float32 the text of a row does not depend on the other rows or on the batch size; in
bfloat16 the kernels round differently for different batch shapes, and greedy text then differs in
some rows. A fixed plan of batches keeps even that reproducible.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import cached_property

import psutil
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from emmech.chat import PADDING, PARTS, SEGMENTS, Prompt, Segment
from emmech.models.kv_cache import PatchCache, is_hybrid, select_rows, window
from emmech.models.sides import Side


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    samples: int = 1
    """Answers per question; they share the question's cache."""
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Prompts as tensors of slots, padded between a common prefix and the rest."""

    prompts: tuple[Prompt, ...]
    n_shared: int
    """Leading slots that hold the same prefix in every row; 0 when rows are left-padded whole."""
    input_ids: Int[Tensor, "batch slot"]
    attention_mask: Int[Tensor, "batch slot"]

    @cached_property
    def position_ids(self) -> Int[Tensor, "batch slot"]:
        """Position of each token in its own row, padding not counted."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    def positions(self, segment: Segment) -> Bool[Tensor, "batch slot"]:
        """True on the slots that hold ``segment``."""
        mask = torch.zeros_like(self.input_ids, dtype=torch.bool)
        width = mask.shape[1]
        for row, prompt in enumerate(self.prompts):
            end = {"postfix": width, "query": width - prompt.n_postfix}.get(segment)
            if end is None:  # the prefix: at the very left, or directly before the query
                end = self.n_shared or width - prompt.n_postfix - prompt.n_query
            size = getattr(prompt, f"n_{segment}")
            mask[row, end - size : end] = True
        return mask

    @cached_property
    def parts(self) -> Int[Tensor, "batch slot"]:
        """The number of each slot's part of the chat, as an index into ``PARTS``, or ``PADDING``."""
        numbers = torch.full_like(self.input_ids, PADDING)
        for number, segment in enumerate(SEGMENTS):
            numbers[self.positions(segment)] = number
        numbers[:, : self.n_shared] = PARTS.index("prefix")  # also where there are no prompts
        return numbers

    def part(self, start: int, stop: int | None = None) -> dict[str, Tensor]:
        """Model inputs for the slots ``start:stop``, with the mask of everything before them."""
        return {
            "input_ids": self.input_ids[:, start:stop],
            "attention_mask": self.attention_mask[:, :stop],
            "position_ids": self.position_ids[:, start:stop],
        }


def make_batch(
    prompts: Sequence[Prompt], device: torch.device, *, share_prefix: bool, pad_id: int = 0
) -> Batch:
    """The prompts as one batch; with ``share_prefix`` all must begin with the same prefix."""
    n_shared = prompts[0].n_prefix if share_prefix else 0
    assert not share_prefix or len({p.prefix_ids for p in prompts}) == 1, "prefixes differ"
    rest = [prompt.ids[n_shared:] for prompt in prompts]
    width = max(map(len, rest))
    ids = torch.full((len(prompts), n_shared + width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, :n_shared] = torch.tensor(prompt.ids[:n_shared])
        mask[row, :n_shared] = 1
        ids[row, ids.shape[1] - len(rest[row]) :] = torch.tensor(rest[row])
        mask[row, ids.shape[1] - len(rest[row]) :] = 1
    return Batch(tuple(prompts), n_shared, ids.to(device), mask.to(device))


@dataclass(frozen=True)
class Plan:
    """Which prompts form a batch, and how it is laid out."""

    rows: tuple[int, ...]
    share_prefix: bool


def plan_batches(
    prompts: Sequence[Prompt], config: object, limits: "Limits", max_new_tokens: int
) -> list[Plan]:
    """A deterministic partition of the prompts into batches of similar lengths.

    Rows that share their prefix with at least a few others run from one prefix state; hybrid models
    additionally need rows of one length, because padding would pass through their recurrent state.
    """
    hybrid, seen = is_hybrid(config), window(config)
    slots = [len(prompt) + max_new_tokens for prompt in prompts]
    groups: dict[object, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault((prompt.prefix_ids, len(prompt) if hybrid else None), []).append(row)
    plans: list[Plan] = []
    loners: list[int] = []
    for rows in groups.values():
        longest = max(slots[row] for row in rows)
        if hybrid or (len(rows) >= 4 and (seen is None or longest < seen)):
            plans += [Plan(part, True) for part in _split(rows, slots, limits)]
        else:
            loners += rows
    return plans + [Plan(part, False) for part in _split(loners, slots, limits)]


def _split(rows: list[int], slots: Sequence[int], limits: "Limits") -> list[tuple[int, ...]]:
    """Even batches of falling length, each within the limits and with no row mostly padding."""
    parts: list[list[int]] = []
    most = -(-len(rows) // -(-len(rows) // limits.rows)) if rows else 0  # 80 by 64 is 40 and 40
    for row in sorted(rows, key=lambda row: (-slots[row], row)):
        longest = slots[parts[-1][0]] if parts else 0
        full = not parts or len(parts[-1]) == most or (len(parts[-1]) + 1) * longest > limits.slots
        if full or slots[row] + 64 < longest // 2:
            parts.append([])
        parts[-1].append(row)
    return [tuple(part) for part in parts]


@dataclass(frozen=True)
class Limits:
    """How large a batch may be."""

    rows: int
    slots: int = 2**62
    """Rows times the longest row, answer included."""


def auto_limits(side: Side, samples: int) -> Limits:
    """Batches that fit in half of the free memory, at most 128 rows (64 on a CPU).

    A slot costs its cache three times (own, donor, and growth by concatenation) and activations.
    """
    config = side.config
    n_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = 6 * config.num_hidden_layers * n_kv_heads * d_head + 16 * config.hidden_size
    if side.device.type == "cuda":
        free, most = torch.cuda.mem_get_info(side.device)[0], 128
    else:
        free, most = psutil.virtual_memory().available, 64
    slots = int(0.5 * free // (width * side.dtype.itemsize * samples))
    return Limits(max(1, most // samples), slots)


@contextmanager
def contiguous_head(module: nn.Module) -> Iterator[None]:
    """Hand the output head a contiguous input.

    A slice of the hidden states makes the head a batched product, which on CPU copies its weights
    once per row and costs more than the rest of the model.
    """
    head = module.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


_PARTS: ContextVar[Tensor | None] = ContextVar("parts of the tokens that are being read", default=None)


def current_parts() -> Int[Tensor, "batch pos"] | None:
    """During a pass of this module's functions, the number of each token's part (see ``Batch.parts``).

    One row and column where all tokens are of one part; None in a bare pass of the model.
    """
    return _PARTS.get()


@contextmanager
def reading(parts: Tensor) -> Iterator[None]:
    """Say of which parts the tokens of the passes inside the ``with`` block are."""
    token = _PARTS.set(parts)
    try:
        yield
    finally:
        _PARTS.reset(token)


def prompt_ends(parts: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """True on the last token of each prompt: of query or postfix, with neither behind it."""
    inside = torch.isin(
        parts, torch.tensor([PARTS.index("query"), PARTS.index("postfix")], device=parts.device)
    )
    goes_on = torch.zeros_like(inside)
    goes_on[:, :-1] = inside[:, 1:]
    return inside & ~goes_on


@contextmanager
def follow(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Let bare passes of ``model`` over ``batch``, and a ``generate`` that begins with it, know their parts.

    Rows that ``generate`` repeats, for several samples of a prompt, follow one another.
    """
    tokens: list[Token] = []

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        ids, cache = kwargs["input_ids"] if "input_ids" in kwargs else args[0], kwargs.get("past_key_values")
        start = 0 if cache is None else cache.get_seq_length()
        own = batch.parts[:, start : start + ids.shape[1]].repeat_interleave(len(ids) // len(batch.parts), 0)
        later = own.new_full((len(ids), ids.shape[1] - own.shape[1]), PARTS.index("response"))
        tokens.append(_PARTS.set(torch.cat([own, later], dim=1)))

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # as PEFT's generate calls
    handles = [
        inner.register_forward_pre_hook(before, with_kwargs=True),
        inner.register_forward_hook(lambda *_: _PARTS.reset(tokens.pop()), always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_RESPONSE = torch.tensor([[PARTS.index("response")]])


@dataclass
class Prefilled:
    """A model that has read a batch: its cache, and the logits of each row's next token."""

    cache: PatchCache
    logits: Float[Tensor, "batch d_vocab"]
    attention_mask: Int[Tensor, "batch slot"]
    last_resid: Float[Tensor, "layer batch d_model"]
    """Residual stream at the last prompt token, after each block but the last, in float32."""

    def take(self, rows: Int[Tensor, " row"]) -> "Prefilled":
        """The given rows, each as often as it is named; the cache of this one is used up."""
        self.cache.overwrites = ()
        select_rows(self.cache, rows)
        return Prefilled(self.cache, self.logits[rows], self.attention_mask[rows], self.last_resid[:, rows])


@torch.no_grad()
def prefill(module: nn.Module, batch: Batch, cache: PatchCache, start: int) -> Prefilled:
    """Run the batch's slots from ``start`` on (those before are in ``cache``)."""
    with contiguous_head(module), reading(batch.parts[:, start:]):
        output = module(
            **batch.part(start),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=True,
        )
    # hidden_states[0] is the embedding and the last one has been through the final norm.
    resid = torch.stack([hidden[:, -1].float() for hidden in output.hidden_states[1:-1]])
    return Prefilled(cache, output.logits[:, -1], batch.attention_mask, resid)


@torch.no_grad()
def run_through(
    module: nn.Module, batch: Batch, cache: PatchCache, shift: Int[Tensor, " batch"] | None = None
) -> None:
    """Fill ``cache`` with a whole batch, its positions moved by ``shift``; no logits are wanted."""
    inputs = batch.part(0)
    if shift is not None:
        inputs["position_ids"] = inputs["position_ids"] + shift[:, None]
    with contiguous_head(module), reading(batch.parts):
        module(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def decode(
    module: nn.Module,
    start: Prefilled,
    decoding: Decoding,
    row_names: Sequence[str],
    end_ids: Sequence[int],
    on_token: Callable[[int], None] = lambda _: None,
    is_over: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue every row; returns ``len(row_names) * samples`` answers, samples of a row together.

    Args:
        module: The model, active as the side that is decoded.
        start: Its prefill; the cache is used up.
        decoding: Length, temperature, samples, seed.
        row_names: A name per row that seeds its draws, so that they do not depend on the batch.
        end_ids: Tokens that end an answer (not part of it).
        on_token: Called with the number of tokens made in each step.
        is_over: Says of an answer so far whether to leave it there, as a stop string does.
    """
    start.cache.overwrites = ()
    if decoding.samples > 1:
        rows = torch.arange(len(row_names), device=start.logits.device)
        start = start.take(rows.repeat_interleave(decoding.samples))
    cache, logits, mask = start.cache, start.logits, start.attention_mask
    position = mask.sum(-1)
    draws = _uniforms(row_names, decoding)
    answers: list[list[int]] = [[] for _ in range(len(logits))]
    alive = torch.arange(len(logits))
    ends = torch.tensor(sorted(end_ids))
    for step in range(decoding.max_new_tokens):
        token = choose(logits, decoding, None if draws is None else draws[alive, step]).cpu()
        going = ~torch.isin(token, ends)
        for row, chosen in zip(alive[going].tolist(), token[going].tolist(), strict=True):
            answers[row].append(chosen)
        on_token(int(going.sum()))
        if is_over is not None:
            going &= ~torch.tensor([is_over(answers[row]) for row in alive.tolist()])
        if step + 1 == decoding.max_new_tokens or not going.any():
            break
        if not going.all():
            keep = going.nonzero().squeeze(1)
            alive, token = alive[keep], token[keep]
            keep = keep.to(mask.device)
            select_rows(cache, keep)
            mask, position = mask[keep], position[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        with reading(_RESPONSE):
            logits = module(
                input_ids=token[:, None].to(mask.device),
                attention_mask=mask,
                position_ids=position[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        position = position + 1
    return answers


@torch.no_grad()
def answer_logits(
    module: nn.Module, start: Prefilled, answers: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "batch pos d_vocab"], Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Teacher-forced logits before each token of one given answer per row.

    Returns them with the answers' tokens and a mask of the slots that hold one. The cache of ``start``
    is used up.
    """
    device, width = start.attention_mask.device, max(map(len, answers))
    tokens = torch.tensor([[*answer, *[0] * (width - len(answer))] for answer in answers], device=device)
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    asked = torch.arange(width, device=device) < lengths[:, None]
    logits = start.logits[:, None]
    if width > 1:
        start.cache.overwrites = ()
        given = asked[:, 1:].to(start.attention_mask)  # the last token of an answer is not read
        first = start.attention_mask.sum(-1, keepdim=True)
        with reading(_RESPONSE):
            later = module(
                input_ids=tokens[:, :-1],
                attention_mask=torch.cat([start.attention_mask, given], dim=1),
                position_ids=first + torch.arange(width - 1, device=device),
                past_key_values=start.cache,
                use_cache=True,
            ).logits
        logits = torch.cat([logits, later], dim=1)
    return logits, tokens, asked


def choose(
    logits: Float[Tensor, "batch d_vocab"], decoding: Decoding, uniform: Tensor | None
) -> Int[Tensor, " batch"]:
    """The next token of each row: the argmax, or the inverse distribution function at ``uniform``.

    Tokens are ordered by probability, so ``top_p`` is a bound on the uniform number and a rounding
    difference can only swap neighbours.
    """
    if decoding.temperature == 0:
        return logits.max(-1).indices  # twice as quick as argmax in bfloat16 on a CPU
    assert uniform is not None
    probability = (logits.double() / decoding.temperature).softmax(-1)
    probability, token = probability.sort(dim=-1, descending=True, stable=True)
    cumulative = probability.cumsum(-1)
    # The nucleus is the smallest set whose mass reaches top_p: its own mass bounds the draw.
    size = (cumulative < decoding.top_p).sum(-1, keepdim=True).clamp(max=cumulative.shape[1] - 1)
    mass = cumulative.gather(1, size)
    rank = torch.searchsorted(cumulative, uniform.to(cumulative)[:, None] * mass, right=True)
    return token.gather(1, rank.clamp(max=size)).squeeze(1)


def _uniforms(row_names: Sequence[str], decoding: Decoding) -> Tensor | None:
    """One stream of draws per row and sample, seeded by the row's name."""
    if decoding.temperature == 0:
        return None
    streams = []
    for name in row_names:
        for sample in range(decoding.samples):
            stream = row_generator(f"{decoding.seed}/{name}/{sample}")
            streams.append(torch.rand(decoding.max_new_tokens, generator=stream, dtype=torch.double))
    return torch.stack(streams)


def row_generator(name: str) -> torch.Generator:
    """A random generator seeded by ``name``, so that a row's draws do not depend on its batch."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether ``error`` says that memory ran out, on a GPU or in the CPU allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
