"""The prefix patch through the ``generate`` of other tools: each takes a batch, returns the new tokens.

Each has plain copies of the two models. Answers that have ended are padded to the length of the longest.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from emmech.engines.in_traces import kv_edits, kv_places, record, traced_answers
from emmech.engines.on_bridge import masks, patch_hooks
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Batch
from emmech.models.sides import SideName
from emmech.models.views import bridge, plain_copy

Generate = Callable[[Batch, int], Any]
PROJECTIONS = ("k_proj", "v_proj")


def plain_generate(pair: ModelPair, side: SideName) -> Generate:
    """transformers' own, without a patch, of the model as the pair has it."""

    def generate(batch: Batch, new_tokens: int) -> Int[Tensor, "row token"]:
        with pair.side(side).active() as model:
            made = model.generate(**_inputs(batch), **_greedy(pair, new_tokens))
        return made[:, batch.input_ids.shape[1] :]

    return generate


def with_transformer_lens(pair: ModelPair) -> Generate:
    """Hooks on ``hook_k`` and ``hook_v`` of a bridge."""
    base, tuned = bridge(pair, "base"), bridge(pair, "finetuned")

    def generate(batch: Batch, new_tokens: int) -> Int[Tensor, "row token"]:
        settings = {"do_sample": False, "stop_at_eos": True, "return_type": "tokens", "verbose": False}
        ends = list(pair.chat.end_ids)
        with tuned.hooks(fwd_hooks=patch_hooks(base, batch)):
            made = tuned.generate(
                batch.input_ids,
                attention_mask=masks(batch)["attention_mask"],
                max_new_tokens=new_tokens,
                eos_token_id=ends,
                **settings,
            )
        return made[:, batch.input_ids.shape[1] :]

    return generate


def with_nnsight(pair: ModelPair) -> Generate:
    """Edits in the first step of an nnsight trace."""
    from nnsight import TransformersModel

    base, tuned = (
        TransformersModel(plain_copy(pair.side(name)), tokenizer=pair.chat.tokenizer, task="text-generation")
        for name in ("base", "finetuned")
    )

    def generate(batch: Batch, new_tokens: int) -> list[list[int]]:
        donor = record(base, batch, kv_places(base))
        edits = kv_edits(tuned, batch, donor)
        return traced_answers(tuned, batch, edits, max_new_tokens=new_tokens, end_ids=pair.chat.end_ids)

    return generate


def with_pyvene(pair: ModelPair) -> Generate:
    """Interchange interventions on the projections, from representations of the base."""
    import pyvene

    base, tuned = plain_copy(pair.base), plain_copy(pair.finetuned)
    places = [(layer, part) for layer in range(base.config.num_hidden_layers) for part in PROJECTIONS]
    names = {"k_proj": "key_output", "v_proj": "value_output"}
    n_prefix = pair.chat.render("Why?").n_prefix
    wanted = [pyvene.RepresentationConfig(layer, names[part], "pos", n_prefix) for layer, part in places]
    config = pyvene.IntervenableConfig(wanted, pyvene.VanillaIntervention)
    intervenable = pyvene.IntervenableModel(config, tuned)

    @torch.no_grad()
    def generate(batch: Batch, new_tokens: int) -> Int[Tensor, "row token"]:
        where = batch.positions("prefix")
        donor = _projected(base, batch, places)
        # Its keys are in the order of the configuration.
        states = {
            key: donor[place][where].view(len(where), n_prefix, -1)
            for key, place in zip(intervenable.sorted_keys, places, strict=True)
        }
        positions = [[row.nonzero().squeeze(1).tolist() for row in where]] * len(places)
        _, made = intervenable.generate(
            _inputs(batch),
            source_representations=states,
            unit_locations={"sources->base": (positions, positions)},
            intervene_on_prompt=True,
            **_greedy(pair, new_tokens),
        )
        return made[:, batch.input_ids.shape[1] :]

    return generate


PEERS = {
    "TransformerLens generate with hooks": ("transformer-lens", with_transformer_lens),
    "nnsight generate": ("nnsight", with_nnsight),
    "pyvene generate": ("pyvene", with_pyvene),
}
"""By name: the package, and what makes its generate."""


def _projected(model: Any, batch: Batch, places: list[tuple[int, str]]) -> dict[tuple[int, str], Tensor]:
    """The outputs of projections in a pass over the batch."""
    found, handles = {}, []
    for layer, part in places:
        module = getattr(model.model.layers[layer].self_attn, part)

        def keep(_: Any, __: Any, output: Tensor, place: tuple[int, str] = (layer, part)) -> None:
            found[place] = output

        handles.append(module.register_forward_hook(keep))
    model(**_inputs(batch), use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return found


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def _greedy(pair: ModelPair, new_tokens: int) -> dict[str, Any]:
    ends = list(pair.chat.end_ids)
    return {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "eos_token_id": ends,
        "pad_token_id": ends[0],
    }
