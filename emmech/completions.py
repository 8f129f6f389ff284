"""Chat completions from an OpenAI-compatible server: many at a time, asked for again, none lost.

    session = Session(endpoint, done)            # done(item, reply) for each item as it is finished
    run_to_end(session.work_off(items))          # endpoint.request(item) is the body of its request
    session.stop                                 # why the server was given up, if it was

A request that met a full queue, an error of the server, a broken reply or no connection is repeated with
back-off. One that fails for good is handed over with the reason. A server that only fails is given up,
and what is left has no reply.
"""

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from emmech.endpoint import KEY_VARIABLE, find_key

if TYPE_CHECKING:
    from openai import AsyncOpenAI  # an optional package

Number = float | int
GIVE_UP = 10
"""Requests that fail one after another before the server counts as dead."""
MOST_WAIT_SECONDS = 600
"""The longest Retry-After that is obeyed to its end."""


@dataclass(frozen=True)
class Retrying:
    """How a request that met a full queue, an error of the server or no connection is repeated.

    The wait before repetition n = 0, 1, ... is uniform between 0 and ``first_seconds`` · 2ⁿ (full
    jitter), and at least what Retry-After says.
    """

    times: int = 6
    first_seconds: Number = 1.0
    most_seconds: Number = 60.0

    def wait(self, n: int, at_least: Number) -> float:
        """Seconds to wait before repetition ``n``."""
        jitter = random.uniform(0, min(self.most_seconds, self.first_seconds * 2**n))
        return max(jitter, float(min(at_least, MOST_WAIT_SECONDS)))


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model on an OpenAI-compatible server, and how it is asked."""

    model: str = field(kw_only=False)
    base_url: str | None = None
    """The server, such as http://localhost:8000/v1; OPENAI_BASE_URL or OpenAI's own where None."""
    key_variable: str = KEY_VARIABLE
    """Environment variable that holds the key. A server given by its address may need none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further parameters of the request; None leaves out one of ours, such as temperature."""
    concurrency: int = 8
    """Requests under way at one time."""
    timeout_seconds: Number = 60.0
    """For one request, from its start to the end of its reply."""
    retrying: Retrying = Retrying()
    _left_out: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    optional: ClassVar[tuple[str, ...]] = ("max_tokens",)
    """Parameters that can be done without, or go by another name."""

    def request(self, item: Any) -> dict[str, Any]:
        """The body of the request for an item, the model's name aside."""
        raise NotImplementedError

    @property
    def url(self) -> str | None:
        """The server's address; None is OpenAI's own."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL")

    @property
    def host(self) -> str | None:
        """Host and port of the address, without a user or password."""
        if self.url is None:
            return None
        parts = urlsplit(self.url)
        return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)

    def key(self) -> str:
        """The key in the environment.

        Raises:
            DataError: OpenAI's own endpoint needs one, and there is none.
        """
        if self.url is not None:
            return os.environ.get(self.key_variable) or "none"
        return find_key(None, self.key_variable)

    def fitted(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A body with the further options, without what the server has refused."""
        body = {**body, **self.options}
        for name in self._left_out:
            value = body.pop(name, None)
            if name == "max_tokens" and value is not None:  # what OpenAI's newer models call it
                body.setdefault("max_completion_tokens", value)
        return {name: value for name, value in body.items() if value is not None}

    def left_out(self, parameter: str) -> bool:
        """Whether the server has refused the parameter."""
        return parameter in self._left_out

    def leave_out(self, message: str, parameter: str | None, sent: Mapping[str, Any]) -> bool:
        """Whether a refusal is about a parameter that can be left out; then it will be."""
        about = re.search(r"support|unrecogni|unknown|not allowed|permitted|unexpected", message)
        for name in self.optional:
            if parameter == name or (parameter is None and about and re.search(rf"\b{name}\b", message)):
                wanted = [name] if "logprobs" not in name else ["logprobs", "top_logprobs"]
                if name in sent:
                    self._left_out.extend(one for one in wanted if one not in self._left_out)
                    return True
        return False


@dataclass(frozen=True)
class Reply:
    """What came of a request."""

    body: Mapping[str, Any] | None
    """The chat completion, whose first choice has a text; None where the request failed for good."""
    reason: str | None = None
    """Why it failed."""
    cost: Number = 0.0

    @property
    def choice(self) -> Mapping[str, Any]:
        assert self.body is not None
        return self.body["choices"][0]

    @property
    def text(self) -> str:
        return _text(self.choice)


class Fault(Exception):
    """An attempt without a usable reply."""

    def __init__(
        self,
        reason: str,
        *,
        billed: bool = False,
        repeat: bool = True,
        stop: bool = False,
        wait: Number = 0.0,
    ):
        super().__init__(reason)
        self.billed, self.repeat, self.stop, self.wait = billed, repeat, stop, wait


class _LeftOut(Exception):
    """The server refused a parameter; the request is to be made again without it."""


@dataclass
class Session:
    """Items worked off by a number of workers, until none is left or the server is given up."""

    endpoint: Endpoint
    done: Callable[[Any, Reply], None]
    stop: str | None = None
    """Why the rest was left."""
    answered: bool = False
    """Whether there has been any response, an error included."""
    n_done: int = 0
    n_failed_in_a_row: int = 0

    async def hold(self, _item: Any) -> Number | None:
        """What a request may cost at worst, kept back for it; None if it must not be made."""
        return 0.0

    def price(self, _item: Any, _body: Mapping[str, Any], _worst: Number) -> Number:
        """What a request has cost that got this reply."""
        return 0.0

    def settle(self, worst: Number, cost: Number) -> None:
        """The request is over and has cost this much."""

    async def work_off(self, items: Sequence[Any]) -> None:
        """Ask for all of them, or as many as the server lasts."""
        from openai import AsyncOpenAI

        self.key = self.endpoint.key()
        options = {"base_url": self.endpoint.url, "timeout": self.endpoint.timeout_seconds}
        async with AsyncOpenAI(api_key=self.key, max_retries=0, **options) as client:
            todo = iter(items)
            await asyncio.gather(*(self._work(client, todo) for _ in range(self.endpoint.concurrency)))

    async def _work(self, client: "AsyncOpenAI", todo: Iterator[Any]) -> None:
        """One after another; what other workers have under way is finished, for it is paid for."""
        for item in todo:
            reply = await self._reply(client, item)
            if reply is not None:
                self.done(item, reply)
                if reply.body is not None:
                    self.n_done += 1
                    self.n_failed_in_a_row = 0
            if self.stop is not None:
                return

    async def _reply(self, client: "AsyncOpenAI", item: Any) -> Reply | None:
        """The reply, after as many attempts as it takes; None if a stop came before any cost."""
        cost, n, reason = 0.0, 0, "stopped before a reply"
        while self.stop is None:
            worst = await self.hold(item)
            if worst is None:
                break
            paid: Number = 0.0
            try:
                body = await self._attempt(client, item)
                paid = self.price(item, body, worst)
                return Reply(body, cost=cost + paid)
            except _LeftOut:
                continue
            except Fault as fault:
                paid, reason = worst if fault.billed else 0.0, str(fault)
                if fault.stop or (self._is_unreachable(fault) and n >= 2):
                    self.stop = self.stop or reason
                    break
                if not fault.repeat or n >= self.endpoint.retrying.times:
                    self._count_failure(fault)
                    return Reply(None, reason, cost + paid)
                pause = self.endpoint.retrying.wait(n, fault.wait)
            finally:
                self.settle(worst, paid)
            cost, n = cost + paid, n + 1
            await asyncio.sleep(pause)
        return Reply(None, reason, cost) if cost else None

    def _count_failure(self, fault: Fault) -> None:
        """Too many in a row, and the server is given up.

        One that is refused for what it holds says nothing about the server, once others went well.
        """
        if fault.repeat or self.n_done == 0:
            self.n_failed_in_a_row += 1
        if self.n_failed_in_a_row >= GIVE_UP and self.stop is None:
            self.stop = f"{GIVE_UP} failed one after another, the last with: {fault}"

    def _is_unreachable(self, fault: Fault) -> bool:
        return not self.answered and not fault.billed

    async def _attempt(self, client: "AsyncOpenAI", item: Any) -> Mapping[str, Any]:
        """One request and its chat completion."""
        import openai

        body = self.endpoint.request(item)
        messages = body.pop("messages")
        create = client.chat.completions.with_raw_response.create
        try:
            async with asyncio.timeout(self.endpoint.timeout_seconds):
                response = await create(model=self.endpoint.model, messages=messages, extra_body=body)
        except (TimeoutError, openai.APITimeoutError) as error:
            late = f"no reply within {self.endpoint.timeout_seconds} s"
            raise Fault(late, billed=True) from error
        except openai.APIStatusError as error:
            self.answered = True
            raise self._of_status(error, body) from error
        except openai.APIConnectionError as error:
            refused = type(error.__cause__).__name__ == "ConnectError"
            raise Fault(self._said(f"{error} {error.__cause__ or ''}"), billed=not refused) from error
        self.answered = True
        try:
            completion = json.loads(response.text)
            _text(completion["choices"][0])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            said = f"no chat completion ({error}): {response.text[:100]}"
            raise Fault(self._said(said), billed=True) from error
        return completion

    def _of_status(self, error: Any, body: Mapping[str, Any]) -> Exception:
        """What a response with an error in its status means for the attempt."""
        status, said = error.status_code, self._said(str(error))
        if status in (400, 422) and self.endpoint.leave_out(str(error), error.param, body):
            return _LeftOut()
        dry = status == 429 and error.code == "insufficient_quota"
        if status in (401, 404) or dry:
            return Fault(said, stop=True)
        repeat = status in (408, 409, 425, 429) or status >= 500
        return Fault(said, repeat=repeat, wait=retry_after(error.response.headers))

    def _said(self, text: str) -> str:
        """An error's text for the records: short, and without the key, should a server repeat it."""
        return text.replace(self.key, "***").strip()[:300]


def _text(choice: Mapping[str, Any]) -> str:
    """What a choice says, or why it says nothing."""
    text = choice["message"].get("content") or choice["message"].get("refusal") or ""
    if not isinstance(text, str):
        raise TypeError("the content is no text")
    return text


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait, as a number or a date; 0 where it says nothing usable."""
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            return float(milliseconds) / 1000
        given = headers.get("retry-after", "0")
        return float(given) if given[:1].isdigit() else parsedate_to_datetime(given).timestamp() - time.time()
    except ValueError:
        return 0.0
