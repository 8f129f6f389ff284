"""Patches and steering in an nnsight trace: here, as NDIF would run them, or on NDIF.

    view, batch = nnsight_view(pair), make_batch(prompts, device, share_prefix=False)
    with pair.base.active():
        donor = record(view, batch, kv_places(view))
    with pair.finetuned.active():
        edits = kv_edits(view, batch, donor, segments=("prefix",))
        answers = traced_answers(view, batch, edits, max_new_tokens=32)

Everything is an edit of one module's output (or input) by plain tensors, so that a block can be sent
elsewhere: ``remote="local"`` serialises it and runs it here as a server would, ``remote=True`` sends it
to NDIF, where ``view`` is ``nnsight.TransformersModel("hub/name", peft="hub/adapter")`` and no weights are
needed here (nnsight unpickles what comes back: use a host you trust). The patch is the paper's, of
projected keys and values, before any k_norm and RoPE (arXiv 2606.06667). Where a full finetune has changed
its k_norm, that norm acts on the patched keys; the default engine patches cached ones, which have had the
donor's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from emmech.chat import PARTS, Segment
from emmech.errors import EmmechError, PatchError
from emmech.models import hook_points
from emmech.models.generation import Batch
from emmech.models.projections import attention_layers, is_separate
from emmech.steering.states import SITES
from emmech.steering.steer import LAST, Steer

if TYPE_CHECKING:
    from nnsight import TransformersModel

Remote = bool | Literal["local"] | str
"""Run here, here as on a server, on NDIF (True), or on another host that serves its interface."""
Place = str
"""TransformerLens's name of an activation, such as ``blocks.3.hook_resid_post``."""


class EngineError(EmmechError):
    """Another tool, or the server behind it, cannot do what was asked."""


@dataclass(frozen=True)
class Edit:
    """What a trace does to one place: another run's states put in, or a push along a direction."""

    place: Place
    where: Bool[Tensor, "batch slot d_or_1"]
    """Tokens of the prompt, and dimensions where the last axis is not 1."""
    donor: Float[Tensor, "batch slot d"] | None = None
    """Replaces the state; without one the state h becomes h + shift + pull (h·unit) unit."""
    shift: Float[Tensor, " d"] | None = None
    unit: Float[Tensor, " d"] | None = None
    pull: float = 0.0
    on_response: bool = False
    """Also at every token that is generated."""


def kv_places(view: "TransformersModel", layers: Sequence[int] | None = None) -> list[Place]:
    """Where keys and values are projected; in fused models with the queries, in one place per block."""
    chosen = attention_layers(_config(view)) if layers is None else layers
    parts = ("k", "v") if is_separate(view._module) else ("qkv",)
    return [f"blocks.{layer}.attn.{part}.hook_out" for layer in chosen for part in parts]


def kv_edits(
    view: "TransformersModel",
    batch: Batch,
    donor: Mapping[Place, Tensor],
    *,
    segments: Sequence[Segment] = ("prefix",),
    kv_heads: Sequence[int] | None = None,
    key: bool = True,
    value: bool = True,
) -> list[Edit]:
    """The patch of projected keys and values at segments of the prompts.

    Args:
        view: The model that is patched.
        batch: Left-padded prompts, from ``make_batch(..., share_prefix=False)``.
        donor: What ``record`` found at ``kv_places`` of the other model.
        segments: What is patched.
        kv_heads: 0-based heads, all by default.
        key: Patch the keys; ``value`` likewise.
    """
    where = _positions(batch, segments)
    edits = []
    for place, states in donor.items():
        part = place.split(".")[3]
        if {"k": key, "v": value, "qkv": True}[part]:
            columns = _columns(_config(view), part, kv_heads, key=key, value=value)
            edits.append(Edit(place, where & columns.to(where.device), states))
    return edits


def resid_edits(
    batch: Batch, donor: Mapping[Place, Tensor], *, segments: Sequence[Segment] = ("prefix",)
) -> list[Edit]:
    """The patch of recorded states (such as ``blocks.7.hook_resid_post``) at segments of the prompts."""
    where = _positions(batch, segments)
    return [Edit(place, where, states) for place, states in donor.items()]


def steer_edits(batch: Batch, steer: Steer) -> list[Edit]:
    """A direction at its coefficient, on the tokens and blocks that ``steer`` names."""
    parts = (*PARTS, LAST) if steer.parts is None else steer.parts
    numbers = [PARTS.index(part) for part in parts if part in PARTS]
    where = torch.isin(batch.parts, torch.tensor(numbers, device=batch.parts.device))
    where[:, -1] |= LAST in parts
    edits = []
    for layer in sorted(steer.layers):
        unit, nothing = steer.direction.unit(layer), torch.zeros_like(steer.direction.vectors[layer])
        shift, pull = {
            "add": (steer.coeff * steer.direction.vectors[layer], 0.0),
            "ablate": (nothing, -steer.coeff),
            "clamp": (steer.coeff * steer.direction.level[layer] * unit, -steer.coeff),
        }[steer.mode]
        place = SITES[steer.direction.site].format(layer)
        push = {"shift": shift, "unit": unit, "pull": float(pull)}
        edits.append(Edit(place, where[..., None], **push, on_response="response" in parts))
    return edits


def record(
    view: "TransformersModel", batch: Batch, places: Sequence[Place], *, remote: Remote = False
) -> dict[Place, Tensor]:
    """The states at ``places`` in a pass over ``batch``, in the order of the blocks.

    Raises:
        PatchError: This architecture has no such place.
        EngineError: The remote host has no key, or cannot be reached, or refuses.
    """
    sites, inputs = [_site(view, place) for place in places], _inputs(batch)
    with _answered(view, remote), torch.no_grad(), view.trace(inputs, remote=remote):
        states = []
        for path, at_input in sites:
            own = view.get(path).input if at_input else view.get(path).output
            states.append(own[0] if isinstance(own, tuple) else own)
        kept = states.save()
    return dict(zip(places, kept, strict=True))


def traced_logits(
    view: "TransformersModel", batch: Batch, edits: Sequence[Edit] = (), *, remote: Remote = False
) -> Float[Tensor, "batch slot d_vocab"]:
    """Logits of a pass over ``batch`` with the edits, which are made in the order given.

    Raises:
        PatchError: This architecture has no such place.
        EngineError: The remote host has no key, or cannot be reached, or refuses.
    """
    plan, inputs = [_plain(view, edit) for edit in edits], _inputs(batch)
    with _answered(view, remote), torch.no_grad(), view.trace(inputs, remote=remote):
        for path, at_input, where, donor, shift, unit, pull in plan:
            place = view.get(path)
            own = place.input if at_input else place.output
            state = own[0] if isinstance(own, tuple) else own
            if donor is None:
                h = state.float()
                state = (h + where * (shift + pull * (h @ unit)[..., None] * unit)).to(state.dtype)
            else:
                state = torch.where(where, donor, state)
            new = (state, *own[1:]) if isinstance(own, tuple) else state
            if at_input:
                place.input = new
            else:
                place.output = new
        logits = view.output.logits.save()
    return logits  # noqa: RET504 (the block is run elsewhere, and its names come back)


def traced_answers(
    view: "TransformersModel",
    batch: Batch,
    edits: Sequence[Edit] = (),
    *,
    max_new_tokens: int,
    end_ids: Sequence[int] = (),
    remote: Remote = False,
) -> list[list[int]]:
    """Greedy answers to ``batch`` with the edits, up to the first of ``end_ids``.

    Raises:
        PatchError: This architecture has no such place.
        EngineError: The remote host has no key, or cannot be reached, or refuses.
    """
    prompt = [_plain(view, edit) for edit in edits]
    response = [_plain(view, edit, prompt=False) for edit in edits if edit.on_response]
    n_steps = max_new_tokens if response else 1
    how = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": None, "remote": remote}
    with _answered(view, remote), torch.no_grad(), view.generate(_inputs(batch), **how) as tracer:
        for step in tracer.iter[:n_steps]:
            for path, at_input, where, donor, shift, unit, pull in prompt if step == 0 else response:
                place = view.get(path)
                own = place.input if at_input else place.output
                state = own[0] if isinstance(own, tuple) else own
                if donor is None:
                    h = state.float()
                    state = (h + where * (shift + pull * (h @ unit)[..., None] * unit)).to(state.dtype)
                else:
                    state = torch.where(where, donor, state)
                new = (state, *own[1:]) if isinstance(own, tuple) else state
                if at_input:
                    place.input = new
                else:
                    place.output = new
        ids = tracer.result.save()
    made = ids[:, batch.input_ids.shape[1] :].tolist()
    return [row[: next((at for at, one in enumerate(row) if one in end_ids), None)] for row in made]


def _plain(view: "TransformersModel", edit: Edit, *, prompt: bool = True) -> tuple:
    """The edit as a path and tensors, which is all that a server needs to know."""
    where = edit.where if prompt else edit.where.new_ones(1, 1, 1)
    states = (None if one is None else one.to(where.device) for one in (edit.donor, edit.shift, edit.unit))
    return (*_site(view, edit.place), where, *states, edit.pull)


def _site(view: "TransformersModel", place: Place) -> tuple[str, bool]:
    """The path of the module that computes a place, and whether it is that module's input."""
    module, at_input = hook_points.resolve(view._module, place)
    paths = {id(one): path for path, one in view._module.named_modules()}
    return paths[id(module)], at_input


def _inputs(batch: Batch) -> dict[str, Tensor]:
    assert batch.n_shared == 0, "the batch shares its prefix"
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def _positions(batch: Batch, segments: Sequence[Segment]) -> Bool[Tensor, "batch slot 1"]:
    return torch.stack([batch.positions(segment) for segment in segments]).any(0)[..., None]


def _config(view: "TransformersModel") -> Any:
    return view._module.config.get_text_config(decoder=True)


def _columns(
    config: Any, part: str, kv_heads: Sequence[int] | None, *, key: bool, value: bool
) -> Bool[Tensor, " d"]:
    """Which dimensions of a projection are keys or values of these heads; one for all of a separate one.

    Raises:
        PatchError: The layout of this architecture's fused projection is not known here.
    """
    n_heads = config.num_attention_heads
    n_kv = getattr(config, "num_key_value_heads", None) or n_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    mine = torch.full((n_kv,), kv_heads is None)
    mine[list(kv_heads or ())] = True
    if part != "qkv":
        return mine.new_ones(1) if kv_heads is None else mine.repeat_interleave(d_head)
    if config.model_type == "gpt_neox":  # query, key and value of one head after the other
        return (mine[:, None] & torch.tensor([False, key, value])).flatten().repeat_interleave(d_head)
    if config.model_type == "phi3":  # all queries, all keys, all values
        return torch.cat([mine.new_zeros(n_heads), mine & key, mine & value]).repeat_interleave(d_head)
    raise PatchError(
        "projections of keys and values (k_proj, v_proj), or the fused one of gpt_neox or phi3",
        f"{config.model_type} has another",
        "Patch the residual stream, or use the default engine",
    )


@contextmanager
def _answered(view: "TransformersModel", remote: Remote) -> Iterator[None]:
    """Say what is missing when a request cannot be sent to a remote host, or is refused there."""
    if remote in (False, "local"):
        yield
        return
    from httpx import HTTPError
    from nnsight.intervention.backends.remote import RemoteError
    from nnsight.schema.config import CONFIG
    from websocket import WebSocketException

    if remote is True and not CONFIG.API.APIKEY:
        raise EngineError(
            "a key of NDIF",
            "there is none",
            "Set NDIF_API_KEY (see login.ndif.us), or run with remote='local' or remote=False",
        )
    if Path(view.repo_id).is_dir():
        raise EngineError(
            "a model that a remote host can load from the hub",
            f"'{view.repo_id}' is a folder here",
            "Pass nnsight.TransformersModel('owner/name', peft='owner/adapter')",
        )
    host = CONFIG.API.HOST if remote is True else remote
    try:
        yield
    except (OSError, HTTPError, WebSocketException, RemoteError) as error:
        raise EngineError(
            f"an answer from '{host}'",
            f"there was none ({type(error).__name__}: {str(error).splitlines()[0]})",
            "Check the network and NDIF_HOST, and with nnsight.status() that the model is deployed",
        ) from error
