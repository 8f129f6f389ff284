"""An emmech condition as a model of lm-evaluation-harness.

    model = ConditionLM(pair, Condition("repair:prefix", "finetuned", (KVPatch(("prefix",), "base"),)))
    lm_eval.simple_evaluate(model, tasks=["arc_easy"], apply_chat_template=True)

The harness hands a chat over as text. Here that text is the messages as JSON, so that each request is
rendered by the pair's own ``Chat``, and its prefix, query and postfix are known. What a task writes at
the beginning of an answer (``gen_prefix``) stands behind the postfix and is patched with it.

Log-likelihoods are those of the harness's ``hf`` model but for the white space that ends a template:
``hf`` scores it too, a constant per question (-0.0004 nats on the embedded model).
"""

import copy
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emmech.chat import Prompt
from emmech.errors import DataError
from emmech.integrations import missing
from emmech.integrations.writing import refuse_long, write
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.piggyback.likelihood import Answered, likelihoods
from emmech.piggyback.patching import Bench, Condition, refuse_impossible

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
    raise missing("lm_eval", "harness") from error

MAX_NEW_TOKENS = 256
"""Where a task sets none; the harness's own default."""
KNOWN_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
IDLE_SETTINGS = {"num_beams": 1}
"""Settings that may be there with this value, which changes nothing."""


class ConditionLM(LM):
    """A pair under one condition."""

    def __init__(
        self,
        pair: ModelPair,
        condition: Condition,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ):
        """Further arguments as in ``likelihoods``.

        Raises:
            PatchError: The condition is impossible on this model.
        """
        super().__init__()
        refuse_impossible(pair, condition)
        self.pair, self.condition = pair, condition
        self.batch_size, self.seed, self.progress = batch_size, seed, progress
        self._prompts: dict[str, Prompt] = {}

    def under(self, condition: Condition) -> "ConditionLM":
        """The same under another condition; what was rendered is not rendered again.

        Raises:
            PatchError: The condition is impossible on this model.
        """
        refuse_impossible(self.pair, condition)
        other = copy.copy(self)
        other.condition = condition
        return other

    @property
    def tokenizer_name(self) -> str:
        """The chat's, under which the harness may cache requests."""
        return self.pair.chat.template_hash

    def chat_template(self, chat_template: bool | str = False) -> str:  # noqa: ARG002 (the harness passes it)
        """The template's text; there is one to choose from."""
        return self.pair.chat.template

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,  # noqa: ARG002 (the last role says it)
    ) -> str:
        """The messages as JSON, rendered when the request is run."""
        return json.dumps(chat_history, ensure_ascii=False)

    def check(self, requests: Sequence[Instance]) -> None:
        """Raise what running these requests would raise, before anything is run.

        Raises:
            DataError: Some cannot be run.
            ChatError: Some cannot be rendered.
        """
        by_kind: dict[str, list[Instance]] = {}
        for request in requests:
            by_kind.setdefault(request.request_type, []).append(request)
        for kind, mine in by_kind.items():
            if kind == "loglikelihood":
                self._answered(mine)
            elif kind == "generate_until":
                self._asked(mine)
            else:
                self.loglikelihood_rolling(mine)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Per request, the log-probability of the whole continuation, and whether greedy decoding writes it.

        Raises:
            DataError: Some requests are no chats, too long, or have nothing to score.
            ChatError: Some cannot be rendered.
        """
        options = {"batch_size": self.batch_size, "seed": self.seed, "progress": self.progress}
        found = likelihoods(self.pair, self._answered(requests), [self.condition], **options)
        return [(one["log_probability"] * one["n_tokens"], one["greedy"]) for one in found]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers up to a stop string, the end token or the greatest length.

        Raises:
            DataError: Some requests are no chats, too long, or want a setting that emmech has not.
            ChatError: Some cannot be rendered.
        """
        made: dict[int, str] = {}
        bench = Bench(self.pair, self.seed)
        for (decoding, until), rows in self._asked(requests).items():
            prompts = [self._prompt(requests[row].args[0]) for row in rows]
            names = list(_draw_names(requests[row] for row in rows))
            found = write(
                bench, self.condition, prompts, names, decoding, until=until, batch_size=self.batch_size
            )
            made |= {row: answers[0].text for row, answers in zip(rows, found, strict=True)}
        return [made[row] for row in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:  # noqa: ARG002
        """Refused: a text without a question has no prefix to patch.

        Raises:
            DataError: Always.
        """
        raise DataError(
            "tasks that ask something", "this one scores texts alone", "Leave out tasks of perplexity"
        )

    def _answered(self, requests: Sequence[Instance]) -> list[Answered]:
        """The continuations as token ids behind their prompts."""
        items = []
        for request in requests:
            context, continuation = request.args[:2]
            prompt = self._prompt(context)
            ids = self._written_behind(prompt, continuation)
            if not ids:
                raise DataError(
                    "continuations of a token or more",
                    f"one of task {request.task_name} is {continuation!r}",
                    "Correct the task's choices",
                )
            items.append(Answered(_name(request), prompt, ids))
        refuse_long(self.pair, [len(one.prompt) + len(one.answer) for one in items])
        return items

    def _asked(self, requests: Sequence[Instance]) -> dict[tuple[Decoding, tuple[str, ...]], list[int]]:
        """Numbers of the requests by how they are to be decoded."""
        found: dict[tuple[Decoding, tuple[str, ...]], list[int]] = {}
        for row, request in enumerate(requests):
            found.setdefault(_settings(request.args[1], self.seed), []).append(row)
        for (decoding, _), rows in found.items():
            prompts = [self._prompt(requests[row].args[0]) for row in rows]
            refuse_long(self.pair, [len(prompt) + decoding.max_new_tokens for prompt in prompts])
        return found

    def _prompt(self, context: str) -> Prompt:
        """The prompt of a context that ``apply_chat_template`` made."""
        if context not in self._prompts:
            messages = _messages(context)
            begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
            prompt = self.pair.chat.render(messages)
            if begun:
                ids = self._written_behind(prompt, begun)
                texts = (*prompt.token_texts, begun, *("" for _ in ids[1:]))
                prompt = Prompt(
                    prompt.text + begun, prompt.ids + ids, prompt.n_prefix, prompt.n_query,
                    prompt.n_postfix + len(ids), prompt.query, texts,
                )  # fmt: skip
            self._prompts[context] = prompt
        return self._prompts[context]

    def _written_behind(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """Ids of a text behind a prompt, tokenised with it unless a merge would hide the border."""

        def encode(whole: str) -> tuple[int, ...]:
            return tuple(
                self.pair.chat.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
            )

        ids = encode(prompt.text + text)
        return ids[len(prompt) :] if ids[: len(prompt)] == prompt.ids else encode(text)


def _messages(context: str) -> list[dict[str, str]]:
    """The messages that a context holds.

    Raises:
        DataError: It holds something else.
    """
    try:
        found = json.loads(context)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, dict) and "role" in one for one in found):
        raise DataError(
            "requests made of chat messages",
            f"one begins with {context[:60]!r}",
            "Pass apply_chat_template=True; leave out tasks that score an answer to no question",
        )
    return found


def _settings(given: Mapping[str, Any], seed: int) -> tuple[Decoding, tuple[str, ...]]:
    """How to decode, and the strings to stop at.

    Raises:
        DataError: A setting is unknown here.
    """
    asked = normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS)
    unknown = {
        name: value
        for name, value in asked.items()
        if name not in KNOWN_SETTINGS and value not in (None, IDLE_SETTINGS.get(name))
    }
    if unknown:
        raise DataError(
            f"settings of generation among {', '.join(sorted(KNOWN_SETTINGS))}",
            f"a task sets {unknown}",
            "Change its generation_kwargs, or leave it out",
        )
    temperature = float(asked.get("temperature") or 0.0) if asked["do_sample"] else 0.0
    top_p = asked.get("top_p")
    decoding = Decoding(asked["max_gen_toks"], temperature, 1.0 if top_p is None else float(top_p), seed=seed)
    return decoding, tuple(stop for stop in asked["until"] if stop)


def _name(request: Instance) -> str:
    """A document's name, which seeds the random controls."""
    return f"{request.task_name}/{request.doc_id}"


def _draw_names(requests: Iterable[Instance]) -> Iterable[str]:
    """Names that also tell repetitions of a request apart, so that they are drawn apart."""
    seen: Counter[str] = Counter()
    for request in requests:
        name = _name(request)
        yield f"{name}/{seen[name]}" if seen[name] else name
        seen[name] += 1
