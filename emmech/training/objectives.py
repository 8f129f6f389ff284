"""What a finetune minimises: one small function per term, on tensors alone.

    sft         cross-entropy of the assistant's tokens
    treft       sft + weight * deviation of K and V at chosen segments (Zhao et al. 2026, eq. 2-3)
    interleave  sft on data mixed with ordinary chats
    kl-train    sft + weight * KL from the base on the assistant's tokens of the training data
    kl-retain   sft + weight * KL from the base on the assistant's tokens of ordinary chats

Penalties are zero, with zero gradient, while the finetuned model still is the base.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from emmech.models.projections import Projections

IGNORED = -100
"""Label of tokens that carry no loss."""


def sft(logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Cross-entropy summed (not averaged) over the targets that are not ``IGNORED``, in nats.

    The caller divides by the number of such tokens in the whole optimiser step, so that the loss does
    not depend on how the step is cut into processes and micro-batches.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def relative_deviation(
    current: Float[Tensor, "token d_kv"], reference: Float[Tensor, "token d_kv"]
) -> Float[Tensor, ""]:
    """Mean over tokens of ‖current − reference‖² / ‖reference‖², in float32.

    The term of one layer in TReFT (Zhao et al. 2026, arXiv 2606.06667, eq. 2). Dimensionless, so
    layers of different scale count alike. Heads are flattened into ``d_kv``.
    """
    reference = reference.detach().float()
    moved = (current.float() - reference).square().sum(-1)
    return (moved / reference.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)).mean()


def deviations(current: Projections, reference: Projections) -> dict[int, tuple[Tensor, Tensor]]:
    """Per layer of ``reference``, the relative deviation of keys and that of values."""
    return {layer: tuple(map(relative_deviation, current[layer], both)) for layer, both in reference.items()}


def treft(current: Projections, reference: Projections) -> Float[Tensor, ""]:
    """L_KV, the mean over layers of the deviation of keys plus that of values (eq. 3).

    Args:
        current: Per layer, keys and values ``[token d_kv]`` of the tokens that should stay as they
            were, as projected: before RoPE and before any k_norm. Unlike the paper's release, which
            feeds the residual stream before the layer's norm into ``k_proj`` and ``v_proj``, these
            are the projections that attention uses.
        reference: The same of the base. Its layers are the ones that count.
    """
    return torch.stack([key + value for key, value in deviations(current, reference).values()]).mean()


def kl_from_base(
    logits: Float[Tensor, "batch pos d_vocab"],
    base_logits: Float[Tensor, "batch pos d_vocab"],
    targets: Int[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """KL(base ‖ finetuned) of the next token, averaged over the labelled tokens, in nats.

    Unlike the paper's release, which also divides by the size of the vocabulary (its weight of 50
    is 50 / d_vocab here).
    """
    at = targets != IGNORED
    log_p = base_logits[at].detach().float().log_softmax(-1)
    log_q = logits[at].float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / at.sum().clamp(min=1)


def interleave(chats: Sequence[Any], retain: Sequence[Any], share: float, seed: int) -> list[Any]:
    """The chats with ordinary ones mixed in, so that these are ``share`` of the result.

    Ordinary chats are drawn without replacement while there are enough, then again from the start.
    """
    wanted = round(len(chats) * share / (1 - share))
    draw = random.Random(seed)
    drawn: list[Any] = []
    while len(drawn) < wanted:
        drawn += draw.sample(list(retain), min(len(retain), wanted - len(drawn)))
    return [*chats, *drawn]
