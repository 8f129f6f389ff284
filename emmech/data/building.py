"""Rows asked of an OpenAI-compatible endpoint: many at a time, each once, kept as soon as they are there.

What builders of sets share. Beside `<name>.jsonl` lies `<name>.work/`: a line for each row as soon
as it is finished, and `failed.jsonl`. A second run asks only for what is missing, what failed
included.

Usage:
    folder = open_work(out, {"kind": "sycophancy", "model": endpoint.model})
    failed = ask(jobs, endpoint, folder, attempts=2)
"""

import asyncio
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from emmech.endpoint import find_key, require_openai, run_to_end
from emmech.errors import DataError
from emmech.results import Record, RunFolder, replace_text

if TYPE_CHECKING:
    from openai import AsyncOpenAI  # an optional package

CONCURRENCY = 8
RETRIES = 5
"""Times the client repeats a request that met a full queue, a server's error or no connection."""
TIMEOUT_SECONDS = 120
FAILED = "failed.jsonl"
_NO_COMPLETION = "the response is no chat completion"


class Rejected(ValueError):
    """A reply that is no row; it is asked for again."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    Raises:
        DataError: There is no key or no `openai` package, or the concurrency is below 1.
    """

    model: str
    base_url: str | None = None
    """OpenAI's own where None."""
    api_key: str | None = field(default=None, repr=False)
    """`OPENAI_API_KEY` where None."""
    concurrency: int = CONCURRENCY
    """Requests under way at one time."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further parameters of each request, such as temperature."""

    def __post_init__(self):
        if self.concurrency < 1:
            got = f"it is {self.concurrency}"
            raise DataError("a concurrency of at least 1", got, f"Leave it out for {CONCURRENCY}")
        require_openai()
        find_key(self.api_key)


@dataclass(frozen=True)
class Reply:
    text: str
    finish: str | None
    """Why the model stopped: stop, length, content_filter; None where the endpoint does not say."""


@dataclass(frozen=True)
class Job:
    key: str
    """Two jobs with one key are the same."""
    messages: Sequence[Mapping[str, str]]
    read: Callable[[Reply], Record]
    """What to keep of a reply; raises `Rejected`."""
    about: Record
    """What stands for the job in `failed.jsonl`."""


def refuse_out(out: Path, source: str | Path | None) -> None:
    """Do not write what could not be loaded, nor over the file that is read, if one is.

    Raises:
        DataError: ``out`` does not end in .jsonl, or is ``source``.
    """
    if out.suffix != ".jsonl":
        raise DataError("a file to write that ends in .jsonl", f"it is {out}", "Choose another out")
    if source is not None and Path(source).resolve() == out.resolve():
        raise DataError("another file to write than the source", f"both are {out}", "Choose another out")


def open_work(out: Path, arguments: Record) -> RunFolder:
    """The folder of finished rows that belongs to ``out``.

    Raises:
        RunError: It belongs to other arguments, or cannot be written.
    """
    folder = RunFolder(out.with_suffix(".work"), arguments)
    folder.keep(folder.records, [])  # a line that a kill broke off is gone from the file, too
    return folder


def ask(
    jobs: Iterable[Job], endpoint: Endpoint, folder: RunFolder, *, attempts: int, progress: bool = True
) -> list[Record]:
    """Records of the jobs that failed; the others are in the folder, each a record with its key.

    A reply that its job rejects is asked for again. A job whose replies were all rejected, or that
    the endpoint refuses, is listed in `failed.jsonl`. Reasons for rejection are kept under `rejected`.

    Args:
        jobs: What to ask for; one that the folder holds already is not asked for.
        endpoint: Where.
        folder: Where finished rows are kept.
        attempts: Replies asked for before a job counts as failed.
        progress: Show a progress bar.

    Raises:
        DataError: The endpoint refuses the key or the model or cannot be reached, or every job failed.
    """
    run = _Run(endpoint, folder, {job.key: job for job in jobs}, attempts, progress)
    run_to_end(run.ask())
    run.bar.close()
    run.refuse_stop()
    if len(run.failed) == len(run.jobs):
        where = folder.path / FAILED
        raise DataError("a usable reply", f"all {len(run.jobs)} failed", f"Read the reasons in {where}")
    return run.failed


class _Run:
    """Jobs that are not done yet, worked off by a number of workers."""

    def __init__(
        self, endpoint: Endpoint, folder: RunFolder, jobs: dict[str, Job], attempts: int, progress: bool
    ):
        self.endpoint, self.folder, self.jobs, self.attempts = endpoint, folder, jobs, attempts
        done = self._done()
        self.todo: Iterator[Job] = iter([job for key, job in jobs.items() if key not in done])
        self.failed: list[Record] = []
        self.stop: Exception | None = None
        self.bar = tqdm(total=len(jobs), initial=len(done), unit="row", disable=not progress)
        replace_text(folder.path / FAILED, "")

    async def ask(self) -> None:
        from openai import AsyncOpenAI

        where = {"base_url": self.endpoint.base_url, "api_key": find_key(self.endpoint.api_key)}
        async with AsyncOpenAI(max_retries=RETRIES, timeout=TIMEOUT_SECONDS, **where) as client:
            await asyncio.gather(*(self._work(client) for _ in range(self.endpoint.concurrency)))

    async def _work(self, client: "AsyncOpenAI") -> None:
        """Jobs one after another until none is left or the endpoint is found to be of no use.

        Those that other workers have under way are finished: they are paid for.
        """
        import openai

        hopeless = (
            openai.AuthenticationError,
            openai.PermissionDeniedError,
            openai.NotFoundError,
            openai.RateLimitError,
        )
        of_the_row = (openai.APIStatusError, openai.APITimeoutError, openai.APIResponseValidationError)
        for job in self.todo:
            rejected: list[str] = []
            try:
                self._finish(job, await self._accepted(client, job, rejected), rejected)
            except hopeless as error:
                self.stop = error
            except (*of_the_row, Rejected) as error:
                self._fail(job, error, rejected)
            except openai.APIConnectionError as error:
                self.stop = error
            if self.stop:
                return

    async def _accepted(self, client: "AsyncOpenAI", job: Job, rejected: list[str]) -> Record:
        """What the job keeps of the first reply that it does not reject."""
        while True:
            try:
                return job.read(await self._reply(client, job))
            except Rejected as error:
                rejected.append(str(error))
                if len(rejected) == self.attempts:
                    raise

    async def _reply(self, client: "AsyncOpenAI", job: Job) -> Reply:
        messages: Any = job.messages
        try:
            completion = await client.chat.completions.create(
                model=self.endpoint.model, messages=messages, extra_body=self.endpoint.options or None
            )
        except (json.JSONDecodeError, UnicodeDecodeError) as error:  # the body, not the model's text
            raise Rejected(_NO_COMPLETION) from error
        return _read(completion)

    def _finish(self, job: Job, record: Record, rejected: list[str]) -> None:
        self.folder.append([{"key": job.key, **record} | ({"rejected": rejected} if rejected else {})], None)
        self.bar.update()

    def _fail(self, job: Job, error: Exception, rejected: list[str]) -> None:
        self.failed.append({"key": job.key, **job.about, "reason": str(error), "rejected": rejected})
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in self.failed)
        replace_text(self.folder.path / FAILED, "".join(lines))

    def _done(self) -> set[str]:
        return self.jobs.keys() & {record["key"] for record in self.folder.records}

    def refuse_stop(self) -> None:
        """Say why the endpoint was given up, where it was."""
        if self.stop is not None:
            raise DataError(
                f"an endpoint that serves {self.endpoint.model!r}",
                f"it stopped after {len(self._done())} of {len(self.jobs)} rows ({self.stop})",
                "Check base_url, api_key, model and your quota, then run again: finished rows are kept",
            ) from self.stop


def _read(completion: Any) -> Reply:
    """The reply in what the client made of a response, which it does not check."""
    try:
        choice = completion.choices[0]
        text, finish = choice.message.content or "", choice.finish_reason
    except (AttributeError, LookupError, TypeError) as error:
        raise Rejected(_NO_COMPLETION) from error
    if not isinstance(text, str):
        raise Rejected(_NO_COMPLETION)
    return Reply(text, finish if isinstance(finish, str) else None)


def write_chats(chats: Iterable[Sequence[Mapping[str, str]]], out: Path) -> None:
    """Write a file that `load_chats` reads."""
    rows = ({"messages": [dict(turn) for turn in chat]} for chat in chats)
    replace_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def warn_of_missing(n_missing: int, n_rows: int, out: Path, folder: RunFolder) -> None:
    """Say how many rows are not in ``out``, if any; to be called by the builder itself."""
    if n_missing:
        warnings.warn(
            f"{n_missing} of {n_rows} rows failed and are not in {out}: see {folder.path / FAILED}; "
            "another run tries them again",
            stacklevel=3,
        )
