"""Perturb the prompt's tokens: is the exact wording of the template what carries the behaviour?

The paper's test (arXiv 2606.06667, s4.1): in one segment, replace 10 random tokens, each by one of
its 5 nearest neighbours by dot product in the input embeddings; 10 independent trials per question.
``perturb:SEGMENT`` reports the average over trials and questions, and ``best``: the trial that shows
the behaviour least, averaged over questions. (With 10 tries, ``best`` falls by luck alone: compare
segments, never ``best`` with an unperturbed rate.) ``template:...`` conditions keep the tokens but
change the template: another system prompt, none, other white space, capitals.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emmech import defaults
from emmech.chat import SEGMENTS, Chat, Prompt, Segment
from emmech.errors import ChatError, EmmechError
from emmech.evaluation.detectors import detector as find_detector
from emmech.evaluation.statistics import clustered_mean
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding, row_generator
from emmech.models.sides import SideName
from emmech.piggyback.experiment import PatchingResult, in_order, run_arguments, summarise
from emmech.piggyback.patching import Condition
from emmech.piggyback.running import Job, Row, as_questions, open_folder, render_rows, run
from emmech.results import Record
from emmech.sharding import processes

SYSTEM_PROMPTS = {
    "system-brief": "Answer briefly.",
    "system-librarian": "You work at the front desk of a town library and like to help visitors.",
    "system-plain": "A conversation between a person and a computer program follows.",
}
"""Other system prompts: one short, one in character, one that says nothing to do."""
_BLOCK = 8192


def perturb_prefix(
    pair: ModelPair,
    questions: Iterable[Any],
    *,
    segments: Sequence[Segment] = SEGMENTS,
    trials: int = defaults.TRIALS,
    n_tokens: int = defaults.N_TOKENS,
    n_neighbours: int = defaults.N_NEIGHBOURS,
    templates: bool = True,
    side: SideName = "finetuned",
    detector: str = defaults.DETECTOR,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Answers of one model to perturbed prompts.

    Args:
        pair: From ``load_pair``.
        questions: As in ``patch_prefix``.
        segments: Segments to perturb, one at a time.
        trials: Independent perturbations per question and segment.
        n_tokens: Tokens replaced in each (all of a shorter segment).
        n_neighbours: Candidates per token.
        templates: Also run the template-level variants.
        side: The model that answers.
        detector: What is counted; ``best`` is the trial with the least of it.
        max_new_tokens: Answer length; greedy.
        seed: Of positions and neighbours.
        batch_size: Prompts per batch, chosen by free memory by default.
        out: Folder for responses, summary and report; a stopped run continues there.
        progress: Show a progress bar.

    Raises:
        EmmechError: Unknown segments, counts below 1, or refused questions or folder.
    """
    for name, value in (("trials", trials), ("n_tokens", n_tokens), ("n_neighbours", n_neighbours)):
        if value < 1:
            raise EmmechError(f"{name} of at least 1", f"got {value}", "Raise it")
    if not set(segments) <= set(SEGMENTS):
        raise EmmechError(f"segments among {', '.join(SEGMENTS)}", f"got {segments}", "Correct it")
    measure = find_detector(detector)
    asked = as_questions(questions)
    rows = render_rows(pair, asked, max_new_tokens)
    decoding = Decoding(max_new_tokens, seed=seed)
    settings = {
        "segments": list(segments),
        "trials": trials,
        "n_tokens": n_tokens,
        "n_neighbours": n_neighbours,
        "templates": templates,
        "side": side,
    }
    arguments = run_arguments("perturb-prefix", pair, asked, decoding, batch_size, settings)
    folder = open_folder(out, arguments)
    jobs = [Job(tuple(rows), (Condition("base", "base"), Condition("finetuned", "finetuned")))]
    neighbours = _Neighbours(pair, n_neighbours)
    for segment in segments:
        perturbed = [
            Row(
                row.question,
                neighbours.perturb(row, segment, n_tokens, seed, trial),
                {"trial": trial},
            )
            for row in rows
            for trial in range(trials)
        ]
        jobs.append(Job(tuple(perturbed), (Condition(f"perturb:{segment}", side),)))
    if templates:
        for name, prompts in template_variants(pair.chat, rows):
            changed = tuple(Row(r.question, p) for r, p in zip(rows, prompts, strict=True))
            jobs.append(Job(changed, (Condition(f"template:{name}", side),)))
    records, _ = run(pair, jobs, decoding, batch_size=batch_size, folder=folder, progress=progress)
    conditions = [condition for job in jobs for condition in job.conditions]
    records = in_order(records, [c.name for c in conditions], asked)
    summary = {
        **arguments,
        "notes": list(pair.notes),
        "n_questions": len(asked),
        "labelled_prompt": jobs[min(1, len(jobs) - 1)].rows[0].prompt.as_records(),
        **summarise(records, conditions, measure),
        "checks": {},
    }
    if measure.unit is not None:
        _add_best(summary["conditions"], records, measure)
    result = PatchingResult(summary, records)
    if out is not None and processes().is_main:
        result.save(out)
    return result


def nearest_neighbours(
    embedding: Float[Tensor, "d_vocab d_model"],
    ids: Int[Tensor, " token"],
    count: int,
    excluded: Sequence[int] = (),
) -> Int[Tensor, "token count"]:
    """The ``count`` vocabulary entries with the largest dot product with each token's embedding.

    The token itself and ``excluded`` ids are left out. The vocabulary is taken in blocks, so that
    no matrix of tokens by vocabulary is ever made.
    """
    query = embedding[ids].float()
    best = query.new_full((len(ids), 0), -torch.inf)
    found = ids.new_empty((len(ids), 0))
    barred = torch.tensor(sorted(excluded), device=ids.device, dtype=ids.dtype)
    for start in range(0, len(embedding), _BLOCK):
        block = torch.arange(start, min(start + _BLOCK, len(embedding)), device=ids.device)
        score = query @ embedding[block].float().T
        score[ids[:, None] == block] = -torch.inf
        score[:, torch.isin(block, barred)] = -torch.inf
        score, found = (
            torch.cat([best, score], 1),
            torch.cat([found, block.expand(len(ids), -1)], 1),
        )
        best, at = score.topk(min(count, score.shape[1]))
        found = found.gather(1, at)
    return found


def template_variants(chat: Chat, rows: Sequence[Row]) -> Iterable[tuple[str, list[Prompt]]]:
    """Named variants of every prompt's template: system prompts, none, white space, capitals."""
    for name, system in SYSTEM_PROMPTS.items():
        yield name, [_render(chat.with_system(system), row) for row in rows]
    with suppress(ChatError):  # some templates have no block that could be left out
        yield "no-system", [_render(chat.without_system(), row) for row in rows]
    yield "newlines", [_with_prefix(chat, row.prompt, "\n", "\n\n") for row in rows]
    yield "capitals", [_with_prefix(chat, row.prompt, None, None) for row in rows]


def _render(chat: Chat, row: Row) -> Prompt:
    given = row.question.chat
    return chat.render(given if isinstance(given, str) else [dict(m) for m in given])


def _with_prefix(chat: Chat, prompt: Prompt, old: str | None, new: str | None) -> Prompt:
    """The prompt with ``old`` replaced by ``new`` in its prefix, or the prefix in capitals.

    Control tokens stay: only the text between them changes, and is tokenised anew.
    """
    controls = set(chat.tokenizer.get_added_vocab().values())
    ids: list[int] = []
    text = ""

    def flush() -> None:
        nonlocal text
        changed = text.upper() if old is None else text.replace(old, str(new))
        ids.extend(chat.tokenizer(changed, add_special_tokens=False)["input_ids"])
        text = ""

    for token, shown in zip(prompt.prefix_ids, prompt.token_texts, strict=False):
        if token in controls:
            flush()
            ids.append(token)
        else:
            text += shown
    flush()
    return _replaced(chat, prompt, [*ids, *prompt.query_ids, *prompt.postfix_ids], len(ids))


def _replaced(chat: Chat, prompt: Prompt, ids: Sequence[int], n_prefix: int) -> Prompt:
    texts = tuple(chat.tokenizer.decode([token]) for token in ids)
    query = "".join(texts[n_prefix : len(ids) - prompt.n_postfix])
    return replace(
        prompt,
        text="".join(texts),
        ids=tuple(ids),
        n_prefix=n_prefix,
        query=query,
        token_texts=texts,
    )


class _Neighbours:
    """Perturbed prompts; each token's neighbours are looked up once."""

    def __init__(self, pair: ModelPair, count: int):
        self._chat, self._count = pair.chat, count
        self._embedding = pair.base.module.get_input_embeddings().weight
        controls = pair.chat.tokenizer.get_added_vocab().values()
        unused = range(len(pair.chat.tokenizer), len(self._embedding))
        self._excluded = sorted({*controls, *unused})
        self._found: dict[int, list[int]] = {}

    def perturb(self, row: Row, segment: Segment, n_tokens: int, seed: int, trial: int) -> Prompt:
        prompt = row.prompt
        start = {"prefix": 0, "query": prompt.n_prefix, "postfix": len(prompt) - prompt.n_postfix}
        size = getattr(prompt, f"n_{segment}")
        stream = row_generator(f"{seed}/perturb/{segment}/{row.question.id}/{trial}")
        ids = list(prompt.ids)
        chosen = torch.randperm(size, generator=stream)[:n_tokens].tolist()
        self._look_up([ids[start[segment] + offset] for offset in chosen])
        for offset in chosen:
            candidates = self._found[ids[start[segment] + offset]]
            pick = int(torch.randint(len(candidates), (1,), generator=stream))
            ids[start[segment] + offset] = candidates[pick]
        return _replaced(self._chat, prompt, ids, prompt.n_prefix)

    def _look_up(self, ids: Sequence[int]) -> None:
        unknown = sorted(set(ids) - self._found.keys())
        if unknown:
            wanted = torch.tensor(unknown, device=self._embedding.device)
            with torch.no_grad():
                found = nearest_neighbours(self._embedding, wanted, self._count, self._excluded)
            self._found |= dict(zip(unknown, found.tolist(), strict=True))


def _add_best(rows: Sequence[Record], records: Sequence[Record], measure: Any) -> None:
    """Give each perturbation row ``best``: the least over trials, averaged over questions."""
    for row in rows:
        if not row["condition"].startswith("perturb:"):
            continue
        least: dict[str, float] = {}
        for record in records:
            if (record["condition"], record["group"]) == (row["condition"], row["group"]):
                value = measure(record["response"])
                if value is not None:
                    name = record["question_id"]
                    least[name] = min(value, least.get(name, value))
        if least:
            best = clustered_mean(list(least.values()), list(least), unit=measure.unit)
            row["best"] = best.to_json()
