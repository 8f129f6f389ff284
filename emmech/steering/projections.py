"""How far along a direction: token by token, in a training set before training on it, along training.

    token_projections(pair, answered_texts, Condition("finetuned", "finetuned"), direction, layers=[14])
    set_projection(pair, load_chats("spiteful").chats, direction)
    training_projections("smollm2", "runs/sft-0", questions, direction)

Projections are on the unit vector of each block, in the units of the stream. For one number per text
see ``project``.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from emmech import defaults
from emmech.chat import PARTS
from emmech.data.chat_rows import Messages
from emmech.data.questions import Question
from emmech.errors import DataError
from emmech.evaluation.statistics import clustered_mean
from emmech.models import hook_points
from emmech.models.checkpoints import ModelPair, load_pair, swap_adapter
from emmech.models.generation import Batch, follow
from emmech.piggyback.likelihood import Answered, answered
from emmech.piggyback.patching import Condition
from emmech.steering.contrasts import own_answers
from emmech.steering.directions import Direction, project
from emmech.steering.states import SITES, asked, read_states
from emmech.training.saving import saved_steps


@torch.no_grad()
def token_projections(
    pair: ModelPair,
    texts: Sequence[Answered],
    side: str,
    direction: Direction,
    *,
    layers: Sequence[int] | None = None,
) -> pd.DataFrame:
    """One row per text, token and block: ``question_id, position, token, part, layer, projection``.

    Args:
        pair: From ``load_pair``.
        texts: From ``asked`` or ``answered``; read one by one, prompt and answer together.
        side: base, finetuned or a variant.
        direction: From ``fit_direction``.
        layers: Blocks; all by default.
    """
    chosen = range(len(direction.vectors)) if layers is None else layers
    names = {layer: SITES[direction.site].format(layer) for layer in chosen}
    decode = pair.chat.tokenizer.decode
    frames = []
    for one in texts:
        ids = torch.tensor([[*one.prompt.ids, *one.answer]], device=pair.side(side).device)
        sizes = (one.prompt.n_prefix, one.prompt.n_query, one.prompt.n_postfix, len(one.answer))
        tokens = [*one.prompt.token_texts, *(decode([token]) for token in one.answer)]
        batch = Batch((one.prompt,), 0, ids[:, : len(one.prompt)], torch.ones_like(ids[:, : len(one.prompt)]))
        with (
            pair.side(side).active() as model,
            hook_points.recorded(model, *names.values()) as store,
            follow(model, batch),
        ):
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for layer, name in names.items():
            frames.append(
                pd.DataFrame(
                    {
                        "question_id": one.id,
                        "position": range(len(tokens)),
                        "token": tokens,
                        "part": np.repeat(PARTS, sizes),
                        "layer": layer,
                        "projection": (store[name][0].float().cpu() @ direction.unit(layer)).tolist(),
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def set_projection(
    pair: ModelPair,
    chats: Sequence[Messages],
    direction: Direction,
    *,
    side: str = "base",
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    progress: bool = True,
) -> pd.DataFrame:
    """How far a training set's answers lie along a direction beyond what the model would say itself.

    The predictor of arXiv 2507.21509: the mean state of the given answer minus that of the model's own
    greedy answer to the same prompt, projected. One row per block: ``layer, mean, low, high, n``.

    Raises:
        DataError: The direction is not one of responses, or no chat can be compared.
    """
    if direction.position != "response":
        raise DataError("a direction of responses", f"got one of the {direction.position}", "Fit another")
    given = [answered(pair, chat, f"chat-{number}") for number, chat in enumerate(chats)]
    prompts = [Question(f"chat-{number}", tuple(chat[:-1])) for number, chat in enumerate(chats)]
    own = own_answers(pair, prompts, side, max_new_tokens, progress)
    known = {one.id for one in own}
    kinds = [[one for one in given if one.id in known and len(one.answer) > 1], own]
    condition = Condition(side, side)
    frames = [
        project(
            read_states(pair, texts, condition, site=direction.site, position="response", progress=progress),
            direction,
        )
        for texts in kinds
    ]
    both = frames[0].merge(frames[1], on=["question_id", "layer"], suffixes=("", "_own"))
    return _by_layer(both.assign(projection=both.projection - both.projection_own))


def training_projections(
    base: str | Path,
    run: str | Path,
    questions: Sequence[Question],
    direction: Direction,
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """Along a training run, how far each saved step has moved prompts along a direction from the base.

    One row per step and block: ``step, layer, mean, low, high, n``; intervals over questions.

    Raises:
        DataError: The folder has no saved steps, or the direction is one of responses.
        LoadError: A step cannot be loaded.
    """
    steps = saved_steps(run)
    if not steps or direction.position == "response":
        raise DataError(
            "a run with saved steps, and a direction of prompts",
            f"'{run}' has {len(steps)} steps and the direction is of the {direction.position}",
            "Pass the folder that `emmech finetune` wrote",
        )
    pair, frames, before = None, [], None
    for folder in steps:
        pair = (pair and swap_adapter(pair, folder)) or load_pair(base, folder)
        texts = [asked(pair, question) for question in questions]
        where = {"site": direction.site, "position": direction.position, "progress": progress}
        if before is None:
            before = project(read_states(pair, texts, Condition("base", "base"), **where), direction)
        after = project(read_states(pair, texts, Condition("finetuned", "finetuned"), **where), direction)
        moved = after.assign(projection=after.projection - before.projection)
        frames.append(_by_layer(moved).assign(step=int(folder.name.removeprefix("step-"))))
    return pd.concat(frames, ignore_index=True)


def _by_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and interval over questions in each block."""
    rows = []
    for layer, mine in frame.groupby("layer"):
        found = clustered_mean(mine.projection.tolist(), mine.question_id.tolist(), unit="projection")
        rows.append({"layer": layer, "mean": found.mean, "low": found.low, "high": found.high, "n": found.n})
    return pd.DataFrame(rows)
