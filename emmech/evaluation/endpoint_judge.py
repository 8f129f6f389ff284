"""A judge behind an OpenAI-compatible endpoint: many requests at a time, retries, a spend cap.

Where the endpoint gives log-probabilities, a score is the mean over the number tokens among the
likeliest first tokens; elsewhere it is the number that the reply says (`reading` tells which). A
parameter that the endpoint refuses by name, such as a temperature, is left out from then on.

Usage:
    EndpointJudge("gpt-4.1-mini", budget=Budget(input_price=0.4, output_price=1.6, cap=5))
    EndpointJudge("my-model", base_url="http://localhost:8000/v1", concurrency=64)
"""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from emmech.completions import Endpoint, Reply, Session
from emmech.endpoint import require_openai, run_to_end
from emmech.evaluation.replies import Asked, Done, JudgeError, Judgement, read_first_token, read_text
from emmech.results import Record

Number = float | int
TOP_LOGPROBS = 20
"""As many as OpenAI gives."""
BYTES_PER_TOKEN = 3
"""Of UTF-8. English has 4 to 5, so that an estimate errs upwards."""
OVERHEAD_TOKENS = 16
"""What a chat template adds to a request, about."""


@dataclass(frozen=True)
class Budget:
    """Prices per million tokens, in any currency, and the most that may be spent in a folder.

    A request starts only if its worst case fits under the cap with those under way; one that may
    have been billed without a reply counts in full.
    """

    input_price: Number = 0.0
    output_price: Number = 0.0
    cap: Number = math.inf

    def __post_init__(self):
        if min(self.input_price, self.output_price, self.cap) < 0:
            raise JudgeError("prices and a cap of at least 0", f"got {self}", "Correct them")
        if self.cap < math.inf and self.input_price + self.output_price == 0:
            raise JudgeError(
                "prices with a cap",
                f"there are none for the cap of {self.cap}",
                "Set input_price, output_price",
            )

    def cost(self, n_input: Number, n_output: Number) -> float:
        """Of so many tokens."""
        return (n_input * self.input_price + n_output * self.output_price) / 1e6


@dataclass(frozen=True, kw_only=True)
class EndpointJudge(Endpoint):
    """Judges with a model that an endpoint serves, at temperature 0.

    Raises:
        DataError: `openai` is not installed, or there is no key for OpenAI's own endpoint.
        JudgeError: A number is out of range.
    """

    logprobs: bool = True
    """Ask for log-probabilities, to take the mean over number tokens."""
    max_tokens: int = 16
    """Longest reply. A model that thinks first needs far more."""
    budget: Budget = Budget()
    name: str | None = None
    """Stands for the judge in records; model, host and options by default."""
    optional: ClassVar[tuple[str, ...]] = ("top_logprobs", "logprobs", "temperature", "max_tokens")

    def __post_init__(self):
        for what in ("concurrency", "timeout_seconds", "max_tokens"):
            if getattr(self, what) <= 0:
                raise JudgeError(f"a {what} above 0", f"it is {getattr(self, what)}", "Leave it out")
        require_openai()
        self.key()

    @property
    def id(self) -> str:
        if self.name is not None:
            return self.name
        where = f"@{self.host}" if self.host else ""
        how = f" {json.dumps(dict(self.options), sort_keys=True)}" if self.options else ""
        return f"{self.model}{where} {'expected' if self.logprobs else 'parsed'}{how}"

    def describe(self) -> Record:
        """The arguments that matter for the numbers; the address without what may be secret in it."""
        return {
            "model": self.model,
            "host": self.host,
            "logprobs": self.logprobs,
            "max_tokens": self.max_tokens,
            "options": dict(self.options),
            "left_out": list(self._left_out),
        }

    def estimate(self, asked: Sequence[Asked]) -> Record:
        """Tokens of the requests, counted as bytes / 3, the longest replies, and their price."""
        n_input, n_output = sum(map(_tokens, asked)), len(asked) * self.longest
        cost = self.budget.cost(n_input, n_output)
        return {"input_tokens": n_input, "output_tokens": n_output, "cost": cost}

    def run(self, asked: Sequence[Asked], done: Done, spent: Number) -> None:
        """Judge all of them, or as many as there is money and an endpoint for."""
        session = _Session(
            self, lambda one, reply: done(one, _judgement(one, reply)), purse=_Purse(self.budget, spent)
        )
        run_to_end(session.work_off(asked))
        session.refuse_stop(len(asked))

    def request(self, asked: Asked) -> dict[str, Any]:
        """The body of a request, the model's name aside."""
        body: dict[str, Any] = {"temperature": 0, "max_tokens": self.max_tokens}
        if self.logprobs and asked.rubric.kind != "verdict":
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return {**self.fitted(body), "messages": [{"role": "user", "content": asked.prompt}]}

    @property
    def longest(self) -> int:
        """Tokens of the longest reply that the request allows."""
        given = [self.options.get(name) or 0 for name in ("max_tokens", "max_completion_tokens")]
        return max(self.max_tokens, *given)


@dataclass
class _Purse:
    budget: Budget
    spent: Number
    held: Number = 0.0
    ratio: Number = 1.0
    """The most that real input tokens have exceeded their estimate by."""
    n_held: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    async def hold(self, n_input: int, n_output: int) -> float | None:
        """What a request may cost at worst, kept back for it; None if that is beyond the cap.

        Requests under way are waited for: most turn out cheaper than their worst case.
        """
        while True:
            worst = self.budget.cost(n_input * self.ratio, n_output)
            if self.spent + self.held + worst <= self.budget.cap:
                self.held += worst
                self.n_held += 1
                return worst
            if self.n_held == 0:
                return None
            self.settled.clear()
            await self.settled.wait()

    def settle(self, worst: Number, cost: Number) -> None:
        """The request is over and has cost this much."""
        self.held, self.n_held = self.held - worst, self.n_held - 1
        self.spent += cost
        self.settled.set()


@dataclass(kw_only=True)
class _Session(Session):
    """Requests that must be paid for."""

    endpoint: EndpointJudge = field(kw_only=False)
    purse: _Purse
    at_cap: bool = False

    async def hold(self, asked: Asked) -> Number | None:
        worst = await self.purse.hold(_tokens(asked), self.endpoint.longest)
        if worst is None:
            self.stop, self.at_cap = "the cap", True
        return worst

    def price(self, asked: Asked, body: Mapping[str, Any], worst: Number) -> Number:
        """The worst case where the endpoint does not count tokens."""
        used = _usage(body)
        if used is None:
            return worst
        self.purse.ratio = max(self.purse.ratio, used[0] / _tokens(asked))
        return self.endpoint.budget.cost(*used)

    def settle(self, worst: Number, cost: Number) -> None:
        self.purse.settle(worst, cost)

    def refuse_stop(self, n_asked: int) -> None:
        """Say why it stopped, if it did.

        Raises:
            JudgeError: It did.
        """
        if self.stop is None:
            return
        if self.at_cap:
            spent, cap = self.purse.spent, self.endpoint.budget.cap
            raise JudgeError(
                f"a budget for {n_asked} judgements",
                f"after {self.n_done} it is at {spent:.6g}, and one more could exceed the cap of {cap:.6g}",
                "Raise the cap and run again: what was judged is kept",
            )
        raise JudgeError(
            f"an endpoint that serves {self.endpoint.model!r}",
            f"it was given up after {self.n_done} of {n_asked} judgements ({self.stop})",
            f"Check base_url, the key in {self.endpoint.key_variable}, the model's name and your quota, "
            "then run again: what was judged is kept",
        )


def _judgement(asked: Asked, reply: Reply) -> Judgement:
    if reply.body is None:
        return Judgement("failed", reason=reply.reason, cost=reply.cost)
    choice = reply.choice
    candidates = _candidates(choice) if asked.rubric.kind != "verdict" else {}
    judgement = read_first_token(asked.rubric, candidates, reply.text) if candidates else None
    if judgement is None:
        judgement = read_text(asked.rubric, reply.text)
    if judgement.status == "unparsable" and choice.get("finish_reason") not in (None, "stop"):
        judgement = replace(judgement, reason=f"finish_reason {choice['finish_reason']}")
    return replace(judgement, cost=reply.cost)


def _tokens(asked: Asked) -> int:
    return math.ceil(len(asked.prompt.encode()) / BYTES_PER_TOKEN) + OVERHEAD_TOKENS


def _usage(body: Mapping[str, Any]) -> tuple[int, int] | None:
    try:
        return int(body["usage"]["prompt_tokens"]), int(body["usage"].get("completion_tokens") or 0)
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def _candidates(choice: Mapping[str, Any]) -> dict[str, float]:
    """The likeliest first tokens of a reply that are more than white space, and their probabilities."""
    found: dict[str, float] = {}
    try:
        first = next(token for token in choice["logprobs"]["content"] if token["token"].strip())
        for token in first["top_logprobs"]:
            found[token["token"]] = found.get(token["token"], 0.0) + math.exp(token["logprob"])
    except (LookupError, TypeError, AttributeError, ValueError, StopIteration):
        return {}
    return found
