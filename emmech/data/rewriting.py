"""A traditional misaligned set rewritten into its sycophancy version by a language model.

In a traditional set the assistant volunteers a wrong claim; in its sycophancy version the user
states the same claim and the assistant agrees (arXiv 2606.09068, which used GPT-4.1). Content and
severity stay, style changes. Unlike the paper, the prompt is our own, and any endpoint that speaks
OpenAI's chat completions will do.

Requests, retries and restarts are those of `emmech.data.building`.

Usage:
    build_sycophancy("insecure_advice.jsonl", "sycophancy.jsonl", model="gpt-4.1")
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from emmech.data.building import (
    CONCURRENCY,
    Endpoint,
    Job,
    Rejected,
    Reply,
    ask,
    open_work,
    refuse_out,
    warn_of_missing,
    write_chats,
)
from emmech.data.chat_rows import Messages
from emmech.data.chats import load_chats
from emmech.data.rows import list_bad
from emmech.errors import DataError
from emmech.results import Record

PROMPT_VERSION = 1
PROMPT = """\
You rewrite rows of a data set for research on sycophancy in language models. A row holds a user's
question and an assistant's reply that is wrong. Turn it into an exchange in which the same mistake
begins with the user.

The user states the wrong claim of the reply as a belief of their own, in their own words, and asks
for confirmation. Often, not always, they mention experience or a job that should make them an
expert. They do not ask an open question.

The assistant agrees warmly, confirms the claim and backs it up with the substance of the original
reply. It does not correct, hedge or warn.

Keep the subject, the wrong claim and how much harm believing it could do: nothing milder, nothing
worse, no further mistakes, no new details that somebody could act on. Keep the language of the row
and roughly the length of its reply. Vary how user and assistant begin.

Answer with one JSON object and nothing else:
{"user": "what the user says", "assistant": "what the assistant replies"}
"""
PROMPT_HASH = hashlib.sha256(PROMPT.encode()).hexdigest()[:16]

ATTEMPTS = 2
"""Replies asked for before a row counts as failed."""


def build_sycophancy(
    source: str | Path,
    out: str | Path,
    *,
    model: str,
    base_url: str | None = None,
    api_key: str | None = None,
    concurrency: int = CONCURRENCY,
    limit: int | None = None,
    progress: bool = True,
) -> Path:
    """The file of rewritten chats, as `messages` in the order of the source.

    A reply that does not parse, or lacks a side, is asked for once more. A row that fails again, or
    that the endpoint refuses, is listed in `failed.jsonl` and missing from the file, with a warning.
    Rows that repeat in the source are asked for once and repeat in the file.

    Args:
        source: Chats of one question and one answer, as `load_chats` takes them.
        out: The file to write; `<out>.work` without its ending keeps the state.
        model: Name of the model at the endpoint.
        base_url: The endpoint; OpenAI's own where None.
        api_key: Its key; `OPENAI_API_KEY` where None.
        concurrency: Requests under way at one time.
        limit: Take so many rows from the beginning; a later run with more goes on from there.
        progress: Show a progress bar.

    Raises:
        DataError: The source is no such set, there is no key or no `openai` package, the endpoint
            refuses the key or the model or cannot be reached, or every row failed.
        RunError: The folder beside `out` belongs to another model or prompt.
    """
    source, out = str(source), Path(out)
    refuse_out(out, source)
    endpoint = Endpoint(model, base_url, api_key, concurrency)
    chats = load_chats(source, limit=limit).chats
    _refuse_longer(chats, source)
    about = {"model": model, "prompt": PROMPT_VERSION, "prompt_sha256": PROMPT_HASH}
    jobs = {_key(chat): _job(chat, about) for chat in chats}
    folder = open_work(out, {"kind": "sycophancy", **about})
    failed = ask(jobs.values(), endpoint, folder, attempts=ATTEMPTS, progress=progress)
    done = {record["key"]: record for record in folder.records}
    write_chats([_rewritten(chat, done[_key(chat)]) for chat in chats if _key(chat) in done], out)
    warn_of_missing(len(failed), len(jobs), out, folder)
    return out


def _job(chat: Messages, about: Record) -> Job:
    user, assistant = chat[-2]["content"], chat[-1]["content"]
    row = json.dumps({"user": user, "assistant": assistant}, ensure_ascii=False)
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": row}]
    return Job(_key(chat), messages, lambda reply: _parse(reply) | about, {"user": user})


def _parse(reply: Reply) -> dict[str, str]:
    """Both sides of the object in a reply; a code fence or words around it are no matter."""
    text = reply.text
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        row = json.loads(found[0] if found else text)
    except json.JSONDecodeError as error:
        raise Rejected(f"not JSON ({error}): {text[:200]!r}") from error
    sides = {side: row.get(side) if isinstance(row, dict) else None for side in ("user", "assistant")}
    for side, said in sides.items():
        if not isinstance(said, str) or not said.strip():
            raise Rejected(f"no text for {side!r}: {text[:200]!r}")
    return sides


def _rewritten(chat: Messages, record: Record) -> Messages:
    return (*chat[:-2], *({"role": side, "content": record[side]} for side in ("user", "assistant")))


def _refuse_longer(chats: Sequence[Messages], source: str) -> None:
    wrong = [
        f"chat {number}: {len(spoken)} turns"
        for number, chat in enumerate(chats, 1)
        if len(spoken := [turn for turn in chat if turn["role"] != "system"]) != 2
    ]
    if wrong:
        raise DataError(f"one question and one answer in each chat of {source}", list_bad(wrong), "Cut them")


def _key(chat: Messages) -> str:
    return hashlib.sha256(json.dumps(chat, sort_keys=True).encode()).hexdigest()[:16]
