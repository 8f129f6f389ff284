"""An emmech condition as a model of Inspect.

    get_model("emmech/smollm2", finetuned="runs/sft-0/step-24", condition="repair:prefix")

The name behind ``emmech/`` is the base: the embedded model, a folder or a hub id. Requests that arrive
together are answered as one batch. Without settings an answer is greedy and at most
``defaults.MAX_NEW_TOKENS`` long; draws come from the seed (0 unless set), and a question that is asked
again, as in another epoch, is drawn anew. Settings that are not known here and would change an answer
are refused, and so are tools and images.
"""

import hashlib
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import anyio

from emmech import defaults
from emmech.chat import DEFAULT, Prompt
from emmech.errors import DataError, EmmechError
from emmech.integrations import missing
from emmech.integrations.writing import Written, refuse_long, write
from emmech.models.checkpoints import load_pair
from emmech.models.generation import Decoding, auto_limits
from emmech.piggyback.patching import Bench, refuse_impossible
from emmech.scorecard import with_conditions

try:
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
    )
    from inspect_ai.tool import ToolChoice, ToolInfo
except ModuleNotFoundError as error:
    raise missing("inspect_ai", "inspect") from error

GATHER_SECONDS = 0.05
"""How long a batch waits for more requests."""
LOADING = (
    "dtype", "device", "quantization", "revision", "finetuned_revision", "allow_base_mismatch",
    "trust_remote_code",
)  # fmt: skip
UNKNOWN_SETTINGS = (
    "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "top_k", "logprobs", "top_logprobs",
    "prompt_logprobs", "response_schema", "modalities",
)  # fmt: skip


@dataclass(eq=False)
class Request:
    """One prompt to answer, and its answers when there are any."""

    prompt: Prompt
    name: str
    decoding: Decoding
    until: tuple[str, ...]
    answers: list[Written] = field(default_factory=list)


class ConditionAPI(ModelAPI):
    """A pair under one condition, loaded once."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        finetuned: str | None = None,
        condition: str | None = None,
        system: str | None = None,
        batch_size: int | None = None,
        **loading: Any,
    ):
        """Load the pair.

        Args:
            model_name: The base, as in ``load_pair``.
            finetuned: As in ``load_pair``; the base alone without.
            condition: ``base``, ``finetuned`` (where there is one, the default), or a name as in
                ``with_conditions``.
            system: System message of chats that have none; the template's own by default.
            batch_size: Requests per batch; by free memory by default.
            loading: Further arguments of ``load_pair``: those in ``LOADING``.

        Raises:
            EmmechError: The models cannot be loaded, or the condition is unknown or impossible.
        """
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        if unknown := loading.keys() - LOADING:
            known = ", ".join(("finetuned", "condition", "system", "batch_size", *LOADING))
            raise EmmechError(f"model arguments among {known}", f"got {', '.join(unknown)}", "Correct -M")
        name = condition or ("base" if finetuned is None else "finetuned")
        pair = load_pair(
            model_name, finetuned or model_name, system=DEFAULT if system is None else system, **loading
        )
        pair, conditions = with_conditions(pair, [name], finetuned=finetuned is not None)
        self.condition = next(one for one in conditions if one.name == name)
        refuse_impossible(pair, self.condition)
        self.pair, self.bench = pair, Bench(pair)
        self.batch_size = batch_size
        self._waiting: list[Request] = []
        self._asked: Counter[str] = Counter()
        self._worker = ThreadPoolExecutor(1, "emmech")

    def max_tokens(self) -> int:
        """Where nobody says otherwise, as in ``evaluate``."""
        return defaults.MAX_NEW_TOKENS

    def max_connections(self) -> int:
        """As many requests at once as one batch holds."""
        return self.batch_size or auto_limits(self.pair.finetuned, 1).rows

    async def count_text_tokens(self, text: str) -> int:
        """By the pair's tokenizer."""
        return len(self.pair.chat.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,  # noqa: ARG002 (there are no tools)
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer one chat, together with others that are asked meanwhile.

        Raises:
            DataError: It has tools, other things than text, unknown settings, or is too long.
            ChatError: It cannot be rendered.
        """
        request = self._request(input, tools, config)
        self._waiting.append(request)
        future = self._worker.submit(self._answer, request)
        while not future.done():
            await anyio.sleep(0.01)
        return self._output(request, future.result())

    def _request(self, messages: list[ChatMessage], tools: list[ToolInfo], config: GenerateConfig) -> Request:
        unknown = [name for name in UNKNOWN_SETTINGS if getattr(config, name) not in (None, False)]
        if unknown:
            raise DataError(
                "settings among max_tokens, temperature, top_p, seed, num_choices and stop_seqs",
                f"{', '.join(unknown)} is set",
                "Leave it out",
            )
        if tools:
            raise DataError("a task without tools", f"it has {len(tools)}", "Use another task or model")
        prompt = self.pair.chat.render([_message(one) for one in messages])
        decoding = Decoding(
            config.max_tokens or self.max_tokens(),
            config.temperature or 0.0,
            1.0 if config.top_p is None else config.top_p,
            config.num_choices or 1,
            config.seed or 0,
        )
        refuse_long(self.pair, [len(prompt) + decoding.max_new_tokens])
        # The same question asked again (an epoch) is drawn anew.
        digest = hashlib.sha256(repr(prompt.ids).encode()).hexdigest()[:16]
        name = f"{digest}/{self._asked[digest]}"
        self._asked[digest] += 1
        return Request(prompt, name, decoding, tuple(config.stop_seqs or ()))

    def _answer(self, request: Request) -> list[Written]:
        """The answers to a request; with them come those to all that wait and are decoded alike."""
        if not request.answers:
            time.sleep(GATHER_SECONDS)
            how = request.decoding, request.until
            batch = [request]
            batch += [o for o in self._waiting if (o.decoding, o.until) == how and o is not request]
            self._waiting = [one for one in self._waiting if one not in batch]
            found = write(
                self.bench,
                self.condition,
                [one.prompt for one in batch],
                [one.name for one in batch],
                request.decoding,
                until=request.until,
                batch_size=self.batch_size,
            )
            for one, answers in zip(batch, found, strict=True):
                one.answers = answers
        return request.answers

    def _output(self, request: Request, answers: list[Written]) -> ModelOutput:
        n_prompt, n_new = len(request.prompt), sum(answer.n_tokens for answer in answers)
        name = f"{self.model_name}, {self.condition.name}"
        return ModelOutput(
            model=name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(content=one.text.strip(), model=name, source="generate"),
                    stop_reason="stop" if one.ended else "max_tokens",
                )
                for one in answers
            ],
            usage=ModelUsage(input_tokens=n_prompt, output_tokens=n_new, total_tokens=n_prompt + n_new),
        )


def _message(message: ChatMessage) -> dict[str, str]:
    """The message as the chat takes it.

    Raises:
        DataError: It is of a tool, or holds something else than text.
    """
    whole = isinstance(message.content, str) or all(part.type == "text" for part in message.content)
    if message.role == "tool" or not whole:
        raise DataError("messages of text", f"one of '{message.role}' is not", "Use another task or model")
    return {"role": message.role, "content": message.text}
