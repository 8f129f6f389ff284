"""Patch keys and values, or the residual stream, of chosen chat segments from one model into another.

The Piggyback test (Zhao et al. 2026, arXiv 2606.06667, s4.2): let the finetuned model attend to the
base model's cached K and V at the template prefix. If a narrow behaviour rides on the template, it
goes away. ``repair`` puts the base into the finetuned model, ``induce`` the finetuned into the base.

    patched = patch_kv(pair, questions, segments=("prefix",))
    with pair.finetuned.active() as model:
        model.generate(**patched.inputs, past_key_values=patched.cache(), max_new_tokens=32)

Patches act at prefill; decoding is untouched. A segment on a layer that keeps a recurrent state can
only be patched whole, as the entire prefix; anything else there is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from emmech.chat import Prompt, Segment
from emmech.errors import PatchError
from emmech.models import hook_points
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Batch, Prefilled, make_batch, prefill, run_through
from emmech.models.kv_cache import (
    KeysValues,
    Overwrite,
    PatchCache,
    PrefixState,
    clone,
    is_hybrid,
    prefix_state,
)
from emmech.models.sides import Side, SideName
from emmech.piggyback.donors import (
    Donor,
    empty_query_donor,
    noise_like,
    prefix_batch,
    prefix_donor,
    shuffled_prefix_donor,
)

QuerySpan = Literal["all", "prefix-length"]


@dataclass(frozen=True)
class KVPatch:
    """Cached K and V of ``source`` in place of the target's own."""

    segments: tuple[Segment, ...]
    source: SideName
    donor: Donor = "same"
    layers: tuple[int, ...] | None = None
    """0-based blocks; None is all of them, like ``kv_heads``."""
    kv_heads: tuple[int, ...] | None = None
    key: bool = True
    value: bool = True
    query_span: QuerySpan = "all"
    """``prefix-length``: only the first query tokens, as many as the prefix has (or all there are)."""

    @property
    def whole(self) -> bool:
        """Whether every layer, head, key and value of the segments is replaced."""
        return self.layers is None and self.kv_heads is None and self.key and self.value


@dataclass(frozen=True)
class ResidPatch:
    """Residual stream of ``source`` after block ``layer``, in place of the target's; later blocks follow."""

    segments: tuple[Segment, ...]
    source: SideName
    layer: int


@dataclass(frozen=True)
class Condition:
    """One row of the experiment: a model and what is patched into it."""

    name: str
    target: str
    """``base``, ``finetuned`` or one of the pair's variants."""
    patches: tuple[KVPatch, ...] = ()
    resid: ResidPatch | None = None

    @property
    def source(self) -> SideName | None:
        """The side that the patches come from, if there are any."""
        return next((p.source for p in (*self.patches, self.resid) if p is not None), None)


def refuse_impossible(pair: ModelPair, condition: Condition) -> None:
    """Raise when a condition cannot be carried out whole on this pair's architecture.

    Raises:
        PatchError: No such layer or head, an ``empty`` donor for anything but
            the postfix, or a part of what a recurrent layer keeps.
    """
    config = pair.base.config
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for patch in condition.patches:
        for what, chosen, count in (
            ("layers", patch.layers, config.num_hidden_layers),
            ("kv_heads", patch.kv_heads, n_heads),
        ):
            if chosen is not None and not all(0 <= one < count for one in chosen):
                raise PatchError(f"{what} among 0..{count - 1}", f"got {chosen}", "Correct them")
        if patch.donor == "empty" and patch.segments != ("postfix",):
            raise PatchError(
                "an 'empty' donor for the postfix alone",
                f"got {patch.segments}",
                "Use donor='same'",
            )
    resid = condition.resid
    if resid is not None and not 0 <= resid.layer < config.num_hidden_layers:
        raise PatchError(
            f"a layer among 0..{config.num_hidden_layers - 1}", f"got {resid.layer}", "Correct it"
        )
    if is_hybrid(config) and not all(
        patch.segments == ("prefix",) and patch.whole and patch.donor == "same" for patch in condition.patches
    ):
        raise PatchError(
            "a whole-prefix patch on a model with recurrent layers",
            f"'{condition.name}' patches part of what they keep",
            "Patch the prefix whole, from donor 'same' (--segments prefix --no-controls)",
        )


@dataclass
class Bench:
    """A pair with everything about prefixes that needs computing only once."""

    pair: ModelPair
    seed: int = 0
    _states: dict[Any, PrefixState] = field(default_factory=dict)

    def prefix(self, side: Side, ids: tuple[int, ...]) -> PrefixState:
        """What ``side`` caches after the prefix ``ids``."""
        return self._once((side.name, ids), lambda: prefix_donor(side, ids))

    def shuffled_prefix(self, side: Side, ids: tuple[int, ...]) -> PrefixState:
        """The same contents at permuted positions."""
        return self._once(
            (side.name, ids, "shuffled"),
            lambda: PrefixState(shuffled_prefix_donor(side, ids, self.seed), {}, len(ids)),
        )

    def _once(self, key: Any, make: Any) -> PrefixState:
        if key not in self._states:
            if len(self._states) > 64:  # chats with histories have as many prefixes as rows
                self._states.clear()
            self._states[key] = make()
        return self._states[key]

    def batch(
        self, prompts: Sequence[Prompt], row_names: Sequence[str], *, share_prefix: bool
    ) -> "PatchedBatch":
        """The prompts, ready to be run under any number of conditions."""
        batch = make_batch(prompts, self.pair.base.device, share_prefix=share_prefix)
        return PatchedBatch(self, batch, tuple(row_names))


@dataclass
class PatchedBatch:
    """One batch under many conditions; the unpatched runs of both sides are done once."""

    bench: Bench
    batch: Batch
    row_names: tuple[str, ...]
    _plain: dict[str, tuple[Prefilled, KeysValues]] = field(default_factory=dict)

    def prefill(self, condition: Condition) -> Prefilled:
        """The target's state and next-token logits after it has read the batch under ``condition``."""
        target = self.bench.pair.side(condition.target)
        if not condition.patches and condition.resid is None:
            start, _ = self.plain(target)
            return replace(start, cache=clone(start.cache, target.config))
        first = self.batch.n_shared
        overwrites = [o for patch in condition.patches if (o := self.overwrite(patch)) is not None]
        if first:
            state = self._patched_prefix(target, condition)
            cache = state.cache(target.config, len(self.row_names), overwrites)
        else:
            cache = PatchCache(target.config, overwrites)
        with self._resid_patched(condition.resid, target, first), target.active() as module:
            return prefill(module, self.batch, cache, first)

    def plain(self, side: Side) -> tuple[Prefilled, KeysValues]:
        """The unpatched run of ``side``, and the K and V it wrote from slot ``n_shared`` on."""
        if side.name not in self._plain:
            first = self.batch.n_shared
            if first:
                state = self.bench.prefix(side, self.batch.prompts[0].prefix_ids)
                cache = state.cache(side.config, len(self.row_names), record=True)
            else:
                cache = PatchCache(side.config, record=True)
            with side.active() as module:
                self._plain[side.name] = prefill(module, self.batch, cache, first), cache.recorded
        return self._plain[side.name]

    def overwrite(self, patch: KVPatch) -> Overwrite | None:
        """The slots and donor of ``patch`` from slot ``n_shared`` on; None when it has none there."""
        start = self.batch.n_shared
        segments = [s for s in patch.segments if not (start and s == "prefix")]
        if not segments:
            return None
        positions = torch.stack([self._positions(s, patch) for s in segments]).any(0)[:, start:]
        source = self.bench.pair.side(patch.source)
        if patch.donor == "empty":
            donor = _aligned_right(empty_query_donor(source, self.batch), positions.shape[1])
        elif patch.donor == "shuffled":
            donor = self._shuffled_rows(source)
        else:
            donor = self.plain(source)[1]
            if patch.donor == "noise":
                donor = noise_like(donor, self.row_names, self.bench.seed)
        return _overwrite(patch, positions, donor, start)

    def patched_positions(self, condition: Condition) -> Bool[Tensor, "batch slot"]:
        """All slots that ``condition`` patches, the shared prefix's included."""
        masks = [self._positions(s, patch) for patch in condition.patches for s in patch.segments]
        if condition.resid is not None:
            masks += [self.batch.positions(s) for s in condition.resid.segments]
        return torch.stack(masks).any(0)

    def _positions(self, segment: Segment, patch: KVPatch) -> Bool[Tensor, "batch slot"]:
        mask = self.batch.positions(segment)
        if segment == "query" and patch.query_span == "prefix-length":
            limit = torch.tensor([p.n_prefix for p in self.batch.prompts], device=mask.device)
            mask = mask & (mask.cumsum(-1) <= limit[:, None])
        return mask

    def _patched_prefix(self, target: Side, condition: Condition) -> PrefixState:
        """The target's cache after the shared prefix, with the prefix patched."""
        ids = self.batch.prompts[0].prefix_ids
        patch = next((p for p in condition.patches if "prefix" in p.segments), None)
        resid = condition.resid
        if patch is None and (resid is None or "prefix" not in resid.segments):
            return self.bench.prefix(target, ids)
        prefix_only = prefix_batch(ids, target)
        if patch is None:
            assert resid is not None
            cache = PatchCache(target.config, record=True)
            donor = _resid_of(self.bench.pair.side(resid.source), prefix_only, None, resid.layer)
            everywhere = torch.ones_like(prefix_only.input_ids, dtype=torch.bool)
            with (
                _resid_replaced(target, resid.layer, everywhere, donor),
                target.active() as module,
            ):
                run_through(module, prefix_only, cache)
            return prefix_state(cache, len(ids))
        source = self.bench.pair.side(patch.source)
        if patch.donor == "shuffled":
            state = self.bench.shuffled_prefix(source, ids)
        else:
            state = self.bench.prefix(source, ids)
        if patch.donor == "noise":
            keys_values = noise_like(state.keys_values, self.row_names, self.bench.seed)
            state = PrefixState(keys_values, {}, len(ids))
        if patch.whole:
            return state
        # The prefix's own later layers must see what was patched below them: run it under the patch.
        rows = next(iter(state.keys_values.values()))[0].shape[0]
        everywhere = torch.ones(rows, len(ids), dtype=torch.bool, device=target.device)
        cache = PatchCache(target.config, [_overwrite(patch, everywhere, state.keys_values, 0)], record=True)
        with target.active() as module:
            run_through(module, prefix_batch(ids, target, rows), cache)
        return prefix_state(cache, len(ids))

    def _shuffled_rows(self, source: Side) -> KeysValues:
        """Shuffled prefixes where rows are left-padded whole: each at its own row's offset."""
        like = self.plain(source)[1]
        donor = {layer: (key.clone(), value.clone()) for layer, (key, value) in like.items()}
        where = self.batch.positions("prefix")
        for row, prompt in enumerate(self.batch.prompts):
            state = self.bench.shuffled_prefix(source, prompt.prefix_ids)
            for layer, keys_values in state.keys_values.items():
                for mine, theirs in zip(donor[layer], keys_values, strict=True):
                    mine[row, :, where[row]] = theirs[0]
        return donor

    @contextmanager
    def _resid_patched(self, resid: ResidPatch | None, target: Side, first: int) -> Iterator[None]:
        """The residual patch on the slots from ``first`` on, if it reaches them."""
        segments = [] if resid is None else [s for s in resid.segments if not (first and s == "prefix")]
        if resid is None or not segments:
            yield
            return
        source = self.bench.pair.side(resid.source)
        positions = torch.stack([self.batch.positions(s) for s in segments]).any(0)[:, first:]
        state = self.bench.prefix(source, self.batch.prompts[0].prefix_ids) if first else None
        donor = _resid_of(source, self.batch, state, resid.layer)
        with _resid_replaced(target, resid.layer, positions, donor):
            yield


@dataclass(frozen=True)
class PatchedInputs:
    """A left-padded batch and the cache that patches it: for ``generate`` or a plain forward pass."""

    inputs: Mapping[str, Tensor]
    batch: Batch
    overwrite: Overwrite
    config: Any

    def cache(self) -> PatchCache:
        """A fresh cache; each forward pass or ``generate`` call needs its own."""
        return PatchCache(self.config, [self.overwrite])


def patch_kv(
    pair: ModelPair,
    questions: Sequence[Any],
    *,
    segments: Sequence[Segment] = ("prefix",),
    source: SideName = "base",
    donor: Donor = "same",
    layers: Sequence[int] | None = None,
    kv_heads: Sequence[int] | None = None,
    key: bool = True,
    value: bool = True,
    query_span: QuerySpan = "all",
    positions: Bool[Tensor, "batch slot"] | None = None,
    seed: int = 0,
) -> PatchedInputs:
    """Inputs and a cache that let the other side of the pair attend to the K and V of ``source``.

    Args:
        pair: The models; the target is the side that is not ``source``.
        questions: Texts or chats, or prompts that ``pair.chat.render`` made.
        segments: What is patched; ``positions`` (over the left-padded slots) overrides it.
        source: Side that the K and V come from.
        donor: See ``emmech.piggyback.donors``.
        layers: 0-based blocks, all by default; ``kv_heads`` likewise.
        key: Patch the keys; ``value`` likewise.
        query_span: All query tokens, or as many as the prefix has.
        seed: Of the ``noise`` and ``shuffled`` donors.

    Raises:
        PatchError: What is asked for cannot be patched whole on this architecture.
    """
    if is_hybrid(pair.base.config):
        raise PatchError(
            "a model without recurrent layers for patched inputs",
            "this one keeps recurrent states, which a cache of positions cannot overwrite",
            "Use emmech.patch_prefix, which hands the whole prefix state over",
        )
    patch = KVPatch(
        tuple(segments),
        source,
        donor,
        None if layers is None else tuple(layers),
        None if kv_heads is None else tuple(kv_heads),
        key,
        value,
        query_span,
    )
    refuse_impossible(pair, Condition("patch_kv", pair.other(source), (patch,)))
    prompts = [q if isinstance(q, Prompt) else pair.chat.render(q) for q in questions]
    names = [str(row) for row in range(len(prompts))]
    run = Bench(pair, seed).batch(prompts, names, share_prefix=False)
    overwrite = run.overwrite(patch)
    assert overwrite is not None
    if positions is not None:
        overwrite = replace(overwrite, positions=positions & run.batch.attention_mask.bool())
    inputs = {"input_ids": run.batch.input_ids, "attention_mask": run.batch.attention_mask}
    return PatchedInputs(inputs, run.batch, overwrite, pair.side(pair.other(source)).config)


@contextmanager
def patched_projections(
    target: Side, positions: Bool[Tensor, "batch slot"], donor: Mapping[str, Tensor]
) -> Iterator[nn.Module]:
    """The paper's own way, kept as an independent check: replace outputs of ``k_proj`` and ``v_proj``.

    ``donor`` maps ``blocks.L.attn.k.hook_out`` (and ``.v.``) to ``[batch slot d_kv]``, before k_norm
    and RoPE. Only for architectures with separate projections. Acts on a pass over the whole batch.
    """

    def put(name: str) -> hook_points.Edit:
        def edit(own: Tensor) -> Tensor:
            if own.shape[1] != positions.shape[1]:
                return own  # decoding
            return torch.where(positions[..., None], donor[name], own)

        return edit

    with ExitStack() as stack:
        module = stack.enter_context(target.active())
        for name in donor:
            stack.enter_context(hook_points.replaced(module, name, put(name)))
        yield module


def restored_share(
    patched: Float[Tensor, "layer batch d_model"],
    target: Float[Tensor, "layer batch d_model"],
    source: Float[Tensor, "layer batch d_model"],
) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
    """How far a patch moved the last prompt token from the target's state towards the source's.

    Numerator and denominator, summed over the batch, of
    <patched - target, source - target> / |source - target|^2: 0 nothing arrived, 1 as in the source.
    """
    toward = source - target
    return ((patched - target) * toward).sum((1, 2)), (toward * toward).sum((1, 2))


def _overwrite(patch: KVPatch, positions: Tensor, donor: KeysValues, start: int) -> Overwrite:
    heads = None
    if patch.kv_heads is not None:
        n_heads = next(iter(donor.values()))[0].shape[1]
        heads = torch.zeros(n_heads, dtype=torch.bool, device=positions.device)
        heads[list(patch.kv_heads)] = True
    if patch.layers is not None:
        donor = {layer: kv for layer, kv in donor.items() if layer in patch.layers}
    return Overwrite(positions, donor, start, heads, patch.key, patch.value)


def _aligned_right(donor: KeysValues, width: int) -> KeysValues:
    """Cut or zero-pad the donor on the left to ``width`` slots."""

    def align(kv: Tensor) -> Tensor:
        return nn.functional.pad(kv, (0, 0, width - kv.shape[2], 0))

    return {layer: (align(key), align(value)) for layer, (key, value) in donor.items()}


def _resid_of(
    side: Side, batch: Batch, state: PrefixState | None, layer: int
) -> Float[Tensor, "batch slot d_model"]:
    """The residual stream of ``side`` after block ``layer`` on the batch (from ``state`` on)."""
    name = f"blocks.{layer}.hook_resid_post"
    rows = len(batch.input_ids)
    with side.active() as module, hook_points.recorded(module, name) as store:
        if state is None:
            run_through(module, batch, PatchCache(side.config))
        else:
            prefill(module, batch, state.cache(side.config, rows), batch.n_shared)
    return store[name]


def _resid_replaced(target: Side, layer: int, positions: Bool[Tensor, "batch slot"], donor: Tensor) -> Any:
    def edit(own: Tensor) -> Tensor:
        return torch.where(positions[..., None], donor, own)

    if not positions.any():
        return nullcontext()
    return hook_points.replaced(target.module, f"blocks.{layer}.hook_resid_post", edit)
