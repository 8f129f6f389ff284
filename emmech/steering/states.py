"""Read one vector per text and block: the states that directions are fitted to and measured on.

    texts = [asked(pair, question) for question in load_questions("general")]
    states = read_states(pair, texts, Condition("base", "base"), position="last")

Any condition can be read: an unpatched model, one with gates or steering, or a patched one, such as the
base with the finetuned model's prefix K and V. What a hook of the condition changes is read changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from emmech.chat import SEGMENTS
from emmech.data.questions import Question
from emmech.errors import DataError
from emmech.models import hook_points
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Batch, Limits, answer_logits, auto_limits, plan_batches
from emmech.piggyback.likelihood import Answered
from emmech.piggyback.patching import Bench, Condition, refuse_impossible

Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]
SITES: dict[str, str] = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.attn.hook_out",
    "mlp_out": "blocks.{}.mlp.hook_out",
}
"""Where in a block a state is read or steered: TransformerLens's names, by block."""
Position = Literal["last", "prompt", "prefix", "query", "postfix", "response"]
"""The last prompt token, or the mean over the tokens of the prompt, one of its segments or the answer."""


@dataclass(frozen=True, eq=False)
class States:
    """One state per text and block, on the CPU in float32."""

    values: Float[Tensor, "text layer d_model"]
    ids: tuple[str, ...]
    """The question of each text; several texts may share one."""
    site: Site
    position: Position
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """The pair that was read, and the condition."""

    def by_question(self) -> Float[Tensor, "question layer d_model"]:
        """Means over the texts of each question, in the order in which the questions first appear."""
        order = list(dict.fromkeys(self.ids))
        index = torch.tensor([order.index(one) for one in self.ids])
        sums = torch.zeros(len(order), *self.values.shape[1:]).index_add_(0, index, self.values)
        return sums / index.bincount(minlength=len(order))[:, None, None]


def asked(pair: ModelPair, question: Question) -> Answered:
    """A question without an answer, as a text to read.

    Raises:
        ChatError: It cannot be rendered.
    """
    return Answered(question.id, pair.chat.render(question.messages), ())


def read_states(
    pair: ModelPair,
    texts: Sequence[Answered],
    condition: Condition,
    *,
    site: Site = "resid_post",
    position: Position = "last",
    batch_size: int | None = None,
    progress: bool = True,
) -> States:
    """The states of ``texts`` in every block under ``condition``.

    Args:
        pair: From ``load_pair``.
        texts: From ``asked``, or from ``emmech.piggyback.likelihood.answered`` with their answers.
        condition: What is read; ``Condition("base", "base")`` is the untouched base.
        site: Where in each block.
        position: Which tokens; of ``response`` the last, which no later token follows, is left out.
        batch_size: Texts per batch; by free memory by default.
        progress: Show a progress bar.

    Raises:
        DataError: No texts, or some without a token at this position; the site or position is unknown.
        PatchError: The condition, or the site, does not exist on this model.
    """
    _refuse(texts, site, position)
    refuse_impossible(pair, condition)
    side = pair.side(condition.target)
    pool = _Pool(site, side.config.num_hidden_layers)
    # Under a name of its own, and with the reading hooks put in last, so that they see what others change.
    observed = side.under(f"{side.name}, read", pool.on)
    pair = replace(pair, variants=dict(pair.variants) | {observed.name: observed})
    condition = replace(condition, target=observed.name)
    limits = Limits(batch_size) if batch_size else auto_limits(side, 1)
    longest = max(len(one.answer) for one in texts)
    found: list[Tensor | None] = [None] * len(texts)
    bench = Bench(pair)
    with tqdm(total=len(texts), disable=not progress, unit="text") as bar:
        for plan in plan_batches([one.prompt for one in texts], side.config, limits, longest):
            rows = [texts[row] for row in plan.rows]
            # Whole rows, also of one prefix: every token of the prompt may be read.
            ready = bench.batch([one.prompt for one in rows], [one.id for one in rows], share_prefix=False)
            pool.weights = None if position == "response" else _weights(ready.batch, position)
            start = ready.prefill(condition)
            if position == "response":
                pool.weights = _answer_weights([one.answer for one in rows]).to(side.device)
                with observed.active() as module:
                    answer_logits(module, start, [one.answer for one in rows])
            for row, state in zip(plan.rows, pool.taken(), strict=True):
                found[row] = state
            bar.update(len(rows))
    values = torch.stack([state for state in found if state is not None])
    provenance = {**pair.provenance, "condition": condition.name}
    return States(values, tuple(one.id for one in texts), site, position, provenance)


@dataclass
class _Pool:
    """Hooks on every block that keep the weighted mean over the tokens of a pass."""

    site: Site
    n_layers: int
    weights: Float[Tensor, "batch pos"] | None = None
    """None while nothing is to be read."""
    states: dict[int, Float[Tensor, "batch d_model"]] = field(default_factory=dict)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        handles = [
            hook_points.attach(model, SITES[self.site].format(layer), self._keep(layer))
            for layer in range(self.n_layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, layer: int) -> hook_points.Edit:
        def keep(activation: Tensor) -> Tensor:
            if self.weights is not None:
                weights = self.weights.to(activation.device)
                # where, not a product with 0: padding may hold anything, even nan
                kept = torch.where(weights[..., None] > 0, activation.float(), 0.0)
                self.states[layer] = torch.einsum("bp,bpd->bd", weights, kept).cpu()
            return activation

        return keep

    def taken(self) -> Float[Tensor, "batch layer d_model"]:
        """What was kept, once."""
        states, self.states = self.states, {}
        return torch.stack([states[layer] for layer in range(self.n_layers)], dim=1)


def _weights(batch: Batch, position: Position) -> Float[Tensor, "batch slot"]:
    """The weight of each slot in the mean of its row."""
    if position == "last":
        weights = torch.zeros_like(batch.input_ids, dtype=torch.float)
        weights[:, -1] = 1.0
        return weights
    chosen = batch.attention_mask.bool() if position == "prompt" else batch.positions(position)
    return chosen / chosen.sum(-1, keepdim=True)


def _answer_weights(answers: Sequence[Sequence[int]]) -> Float[Tensor, "batch pos"]:
    """Equal weights on the tokens of each answer that are read: all but its last."""
    read = torch.tensor([len(answer) - 1 for answer in answers])
    chosen = torch.arange(int(read.max())) < read[:, None]
    return chosen / read[:, None]


def _refuse(texts: Sequence[Answered], site: str, position: str) -> None:
    if site not in SITES:
        raise DataError(f"a site among {', '.join(SITES)}", f"got '{site}'", "Correct it")
    if position not in get_args(Position):
        raise DataError(
            f"a position among {', '.join(get_args(Position))}", f"got '{position}'", "Correct it"
        )
    if not texts:
        raise DataError("texts to read", "there are none", "Pass some")
    if position == "response":
        bad = [one.id for one in texts if len(one.answer) < 2]
    elif position in SEGMENTS:
        bad = [one.id for one in texts if not getattr(one.prompt, f"n_{position}")]
    else:
        bad = []
    if bad:
        raise DataError(
            f"a token of the {position} in every text",
            f"{len(bad)} have none, first '{bad[0]}'",
            "Leave them out, or choose another position",
        )
