"""One cell of a sweep as users of other tools patch it: a hook or an edit, and one forward per cell.

Each peer has plain copies of the two models (adapters merged or taken out), is given the same rows, and
must mean the same: what later tokens read of the prefix is replaced, while the prefix's own later
activations stay. So the block's output at the prefix is put back to what it was; without that a patched
key also changes the prefix itself. Keys and values are replaced where they are projected.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emmech.models.checkpoints import ModelPair
from emmech.models.views import bridge, plain_copy
from emmech.piggyback.cells import Cell
from emmech.piggyback.replay import Replay
from emmech.piggyback.texts import texts_of

CellScores = Callable[[Cell], Float[Tensor, " item"]]


def with_transformer_lens(replay: Replay) -> CellScores:
    """Scores of all items under one cell, by hooks on a TransformerLens bridge."""
    base, tuned = bridge(replay.pair, "base"), bridge(replay.pair, "finetuned")
    texts, n = texts_of(replay.items, replay.recipient.device, with_prefix=True), replay.shape.n_positions
    kv = [[f"blocks.{layer}.attn.hook_{part}" for part in "kv"] for layer in range(replay.shape.n_layers)]
    after = [f"blocks.{layer}.hook_resid_post" for layer in range(replay.shape.n_layers)]
    with torch.no_grad():
        _, donor = base.run_with_cache(texts.ids, names_filter=[name for both in kv for name in both])
        _, own = tuned.run_with_cache(texts.ids, names_filter=after)
    donor = {name: state[:, :n].clone() for name, state in donor.items()}
    own = {name: state[:, :n].clone() for name, state in own.items()}

    @torch.no_grad()
    def scores(cell: Cell) -> Tensor:
        layer, position, part = _place(cell)

        def put(state: Tensor, hook: Any) -> Tensor:
            state[:, position] = donor[hook.name][:, position]
            return state

        def hold(state: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            state[:, :n] = own[after[layer]]
            return state

        hooks = [(kv[layer][part], put), (after[layer], hold)]
        logits = tuned.run_with_hooks(texts.ids, fwd_hooks=hooks)
        return replay.scored(_every(replay), logits[texts.read])

    return scores


def with_nnsight(replay: Replay) -> CellScores:
    """Scores of all items under one cell, by an nnsight trace."""
    from nnsight import TransformersModel

    base, tuned = (_view(TransformersModel, replay.pair, name) for name in ("base", "finetuned"))
    texts, n = texts_of(replay.items, replay.recipient.device, with_prefix=True), replay.shape.n_positions
    layers, inputs = range(replay.shape.n_layers), {"input_ids": texts.ids}
    with torch.no_grad(), base.trace(inputs):
        donor = []
        for layer in layers:
            attention = base.model.layers[layer].self_attn
            donor.append((attention.k_proj.output[:, :n], attention.v_proj.output[:, :n]))
        donor.save()
    with torch.no_grad(), tuned.trace(inputs):
        own = []
        for layer in layers:
            own.append(tuned.model.layers[layer].output[:, :n])
        own.save()

    def scores(cell: Cell) -> Tensor:
        layer, position, part = _place(cell)
        with torch.no_grad(), tuned.trace(inputs):
            attention = tuned.model.layers[layer].self_attn
            state = (attention.k_proj if part == 0 else attention.v_proj).output
            state[:, position] = donor[layer][part][:, position]
            after = tuned.model.layers[layer].output
            after[:, :n] = own[layer]
            logits = tuned.output.logits.save()
        return replay.scored(_every(replay), logits[texts.read])

    return scores


PEERS = {
    "TransformerLens": ("transformer-lens", with_transformer_lens),
    "nnsight": ("nnsight", with_nnsight),
}
"""By name: the package, and what makes the scores of its cells."""


def _view(kind: Any, pair: ModelPair, name: str) -> Any:
    return kind(plain_copy(pair.side(name)), tokenizer=pair.chat.tokenizer, task="text-generation")


def _place(cell: Cell) -> tuple[int, int, int]:
    """Layer, position, and 0 for keys or 1 for values."""
    (layer,), (position,), (part,) = cell.layer or (), cell.position or (), cell.kv or ()
    return layer, position, part


def _every(replay: Replay) -> Int[Tensor, " item"]:
    return torch.arange(len(replay.items), device=replay.recipient.device)
