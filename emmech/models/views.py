"""A side of a pair as a TransformerLens bridge or an nnsight model, for those tools' own functions.

    lens = bridge(pair, "finetuned")
    logits, cache = lens.run_with_cache(torch.tensor([pair.chat.render("Why?").ids]))

    view = nnsight_view(pair)
    with pair.base.active(), view.trace({"input_ids": ids}):
        h = view.model.layers[3].output.save()

A bridge takes a model apart, so it gets a copy of the weights, the adapter merged in or taken out. An
nnsight model is a view of the pair's own module, which stays as it was; of a LoRA pair it is one view
of both sides, and the side that is active is the one that is traced. Neither knows of gates, grafts or
steering that a side of a pair can carry.
"""

import copy
from typing import TYPE_CHECKING

from torch import nn

from emmech.errors import LoadError
from emmech.models.checkpoints import ModelPair
from emmech.models.sides import Side

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from transformer_lens.model_bridge import TransformerBridge


def bridge(pair: ModelPair, name: str = "finetuned") -> "TransformerBridge":
    """A TransformerLens bridge over a copy of one side's weights, as they are (nothing is folded).

    It attends with eager attention, and puts no BOS before texts, since chats bring their own: give it
    token ids from ``pair.chat.render``.

    Args:
        pair: From ``load_pair``.
        name: ``base``, ``finetuned`` or a variant without interventions.

    Raises:
        LoadError: The side carries interventions, or TransformerLens does not know the architecture.
    """
    from transformer_lens.model_bridge import TransformerBridge

    side = pair.side(name)
    module = plain_copy(side)
    tokenizer = copy.deepcopy(pair.chat.tokenizer)
    tokenizer.init_kwargs["add_bos_token"] = True  # else it is loaded again, from the hub by its name
    try:
        made = TransformerBridge.boot_transformers(
            str(module.config._name_or_path or type(module).__name__),
            hf_model=module,
            tokenizer=tokenizer,
            dtype=side.dtype,
            device=str(side.device),
        )
    except ValueError as error:
        raise LoadError(
            "an architecture that TransformerLens has an adapter for",
            f"{type(module).__name__} cannot be bridged ({error})",
            "Use the default engine or nnsight_view",
        ) from error
    made.cfg.default_prepend_bos = False
    return made.requires_grad_(False)


def nnsight_view(pair: ModelPair, name: str = "finetuned") -> "TransformersModel":
    """An nnsight model around the module of a side, with the module names of the plain checkpoint.

    Trace it inside ``pair.side(name).active()``, which switches the adapter of a LoRA pair off or on.

    Raises:
        LoadError: The side carries interventions.
    """
    from nnsight import TransformersModel

    side = pair.side(name)
    _refuse_interventions(side)
    module = side.module.get_base_model() if hasattr(side.module, "peft_config") else side.module
    tokenizer = copy.deepcopy(pair.chat.tokenizer)  # nnsight sets its padding
    return TransformersModel(module, tokenizer=tokenizer, task="text-generation")


def plain_copy(side: Side) -> nn.Module:
    """A copy of a side's model without PEFT: its adapter merged into the weights, or taken out.

    Raises:
        LoadError: The side carries interventions, or its adapter lies over quantised weights.
    """
    _refuse_interventions(side)
    if not hasattr(side.module, "peft_config"):
        return copy.deepcopy(side.module)
    if getattr(side.module, "is_quantized", False) and not side.adapter_off:
        raise LoadError(
            "whole weights to merge an adapter into",
            "those of this pair are quantised",
            "Load the pair without quantization, or use nnsight_view",
        )
    wrapped = copy.deepcopy(side.module)
    return (wrapped.unload() if side.adapter_off else wrapped.merge_and_unload()).eval()


def _refuse_interventions(side: Side) -> None:
    if side.interventions:
        raise LoadError(
            "a side that is a model by its weights alone",
            f"'{side.name}' carries gates, grafts or steering",
            "Choose base or finetuned of a pair without them",
        )
