"""A chat as the model reads it, and which of its tokens the user wrote.

Every prompt is ``prefix | query | postfix``: the template's tokens before the last user text, that
text, and the template's tokens after it (Zhao et al. 2026, arXiv 2606.06667, section 4.1). The
borders come from character positions in the rendered text, never from a search for token ids, and
only the template can write a control token: ``<|im_end|>`` in a question stays text.

    chat = Chat(tokenizer)
    chat.render("How do I save money?").prefix_ids

Texts only: no images, no padding, no generation.
"""

import copy
import functools
import hashlib
import json
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, get_args

from jinja2 import TemplateError
from rich.console import Console
from rich.text import Text
from tokenizers import Encoding

from emmech.encoding import PLANE_16, Encoder
from emmech.errors import ChatError
from emmech.reprs import card, of_tokens

if TYPE_CHECKING:
    import transformers  # only for a type: loading it would load torch

Segment = Literal["prefix", "query", "postfix"]
SEGMENTS: tuple[Segment, ...] = get_args(Segment)
PARTS = (*SEGMENTS, "response")
"""Of a prompt and its answer. A token's number is its part's place here, or ``PADDING``."""
PADDING = -1
_STYLES = {"prefix": "cyan", "query": "bold yellow", "postfix": "magenta"}


class System(Enum):
    """A choice of system block that is not a text."""

    DEFAULT = "default"
    """Pass no system message: the template writes its own default, if it has one."""


DEFAULT = System.DEFAULT


@dataclass(frozen=True)
class Prompt:
    """One rendered chat, cut into prefix, query and postfix tokens."""

    text: str
    """The whole rendering, including the header of the coming answer."""
    ids: tuple[int, ...]
    n_prefix: int
    n_query: int
    n_postfix: int
    query: str
    """The last user text as rendered, that is after the template's trimming."""
    token_texts: tuple[str, ...]
    """Characters of ``text`` per token. Of several tokens that share one character (an emoji in
    bytes), the first shows it and the others are empty, so that the texts join to the rendering."""

    def __post_init__(self):
        total = self.n_prefix + self.n_query + self.n_postfix
        assert total == len(self.ids) == len(self.token_texts), f"{total=} {len(self.ids)=}"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        return self.ids[: self.n_prefix]

    @property
    def query_ids(self) -> tuple[int, ...]:
        return self.ids[self.n_prefix : self.n_prefix + self.n_query]

    @property
    def postfix_ids(self) -> tuple[int, ...]:
        return self.ids[self.n_prefix + self.n_query :]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segment of each token."""
        counts = (self.n_prefix, self.n_query, self.n_postfix)
        return tuple(name for name, n in zip(SEGMENTS, counts, strict=True) for _ in range(n))

    def without_query(self) -> "Prompt":
        """The template alone: prefix and postfix ids joined as they are, never tokenised again."""
        texts = (
            *self.token_texts[: self.n_prefix],
            *self.token_texts[len(self) - self.n_postfix :],
        )
        ids = self.prefix_ids + self.postfix_ids
        return Prompt("".join(texts), ids, self.n_prefix, 0, self.n_postfix, "", texts)

    def as_records(self) -> list[dict[str, Any]]:
        """One row per token: position, id, text, segment."""
        rows = zip(self.ids, self.token_texts, self.segments, strict=True)
        return [dict(position=p, id=i, text=t, segment=s) for p, (i, t, s) in enumerate(rows)]

    def __rich__(self) -> Text:
        """The tokens with a bar between them, one labelled and coloured paragraph per segment."""
        page = Text()
        for name in SEGMENTS:
            rows = [row for row in self.as_records() if row["segment"] == name]
            page.append(f"{name} ({len(rows)} tokens)\n", style="bold underline " + _STYLES[name])
            shown = (visible(row["text"]) for row in rows)
            page.append("|".join(shown) + "\n", style=_STYLES[name])
        return page

    def _repr_html_(self) -> str:
        rows = [(row["segment"], visible(row["text"])) for row in self.as_records()]
        return of_tokens({name: [text for segment, text in rows if segment == name] for name in SEGMENTS})


def visible(text: str) -> str:
    r"""Blanks as ·, controls as escapes (\n), � for a token that only continues a character."""
    signs = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(signs).replace(" ", "·") or "�"


class Chat:
    """A tokenizer, its template, a system choice and the template's options.

    ``system`` is a text (``""`` writes an empty system message), ``DEFAULT`` for what the template
    does when no system message is passed, or ``None`` for no system block at all: the default block
    that SmolLM2 or Qwen2.5 would write is then cut out of the rendering. Messages that start with
    their own system message keep it, whatever ``system`` says. ``template_options`` are the
    template's variables (``date_string``, ``reasoning_effort``, ...); ``enable_thinking`` is False
    where the template knows it: Qwen3's empty think block is then postfix, as in the paper.

    Raises:
        ChatError: The tokenizer has no template or cannot tell character positions.
    """

    def __init__(
        self,
        tokenizer: "transformers.PreTrainedTokenizerBase",
        *,
        system: str | System | None = DEFAULT,
        **template_options: Any,
    ):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ChatError(
                "a chat template",
                f"the tokenizer of {tokenizer.name_or_path!r} has none",
                "Pass a chat or instruct checkpoint, or set tokenizer.chat_template",
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ChatError(
                "a tokenizer that gives character positions",
                f"{type(tokenizer).__name__} is a slow one",
                "Load the fast one (a checkpoint with a tokenizer.json)",
            )
        self.tokenizer, self.system = tokenizer, system
        self.template = tokenizer.get_chat_template(tools=template_options.get("tools"))
        thinking = {"enable_thinking": False} if "enable_thinking" in self.template else {}
        self.options = thinking | template_options
        self._encoder = Encoder(tokenizer)

    def with_system(self, system: str | System | None) -> "Chat":
        """The same chat with another system choice."""
        other = copy.copy(self)
        other.system = system
        return other

    def without_system(self) -> "Chat":
        """The same chat with no system block, not even the template's default."""
        return self.with_system(None)

    @property
    def template_hash(self) -> str:
        """16 hex digits that change with the template's text, the system choice or an option."""
        recipe = [self.template, repr(self.system), self.options]
        recipe = json.dumps(recipe, sort_keys=True, default=str)
        return hashlib.sha256(recipe.encode()).hexdigest()[:16]

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's EOS, and the template's mark after an answer."""
        mark = self._unused([])
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}]
        tail = self._apply(turns, add_generation_prompt=False).rpartition(mark)[2]
        end = self._encoder.control.match(tail.lstrip())
        ids = {self.tokenizer.eos_token_id, self._encoder.ids[end[0]] if end else None}
        return tuple(sorted(ids - {None}))

    def render(self, question: str | list[dict[str, Any]]) -> Prompt:
        """The prompt of one question, or of messages whose last one is the user's.

        A token across a border belongs to the query: after a template's newline, a question that
        starts with a newline costs the prefix one token. White space that a template's marker
        swallows (Phi-3) stays with the marker.

        Raises:
            ChatError: No user text at the end, or the template refuses or rewrites the messages.
        """
        messages = self.messages(question)
        text, start, end = self._locate(messages)
        shown = self._shown(messages, text)
        encoding = self._encoder.encode(text, shown)
        if shown == text:
            own = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            assert encoding.ids == own, "the copy of the tokenizer gives other ids"
        return self._cut(text, start, end, encoding)

    def answered(self, messages: list[dict[str, Any]]) -> tuple[Prompt, tuple[int, ...]]:
        """The prompt of messages that end with an answer, and the ids that the model should write.

        Those are the answer's, whatever the template puts before it (a space, a channel), and the
        token that ends it.

        Raises:
            ChatError: The last message is no answer, or its prompt cannot be rendered.
        """
        if messages[-1].get("role") != "assistant" or not messages[-1].get("content"):
            raise ChatError(
                "messages that end with the assistant's answer",
                f"the roles are {[m.get('role') for m in messages]}"
                if messages[-1].get("role") != "assistant"
                else "the answer is empty",
                "Complete or drop this chat",
            )
        asked, answer = self.messages(messages[:-1]), messages[-1]
        prompt = self.render(messages[:-1])
        mark = self._unused(messages)
        opened = self._apply(asked, add_generation_prompt=True)
        framed = self._apply([*asked, {**answer, "content": mark}], add_generation_prompt=False)
        whole = self._apply([*asked, answer], add_generation_prompt=False)
        before, _, after = framed.rpartition(mark)
        lead = before.removeprefix(opened) if before.startswith(opened) else ""
        fits = whole.startswith(before) and whole.endswith(after)
        content = whole[len(before) : len(whole) - len(after)] if fits else answer["content"]
        # Tags such as <tool_call>, which are tokens but not special ones, the answer may write itself.
        shown = self._shown(asked, prompt.text)
        hidden = shown + lead + self._encoder.blot(content, special_only=True)
        # Tokenised behind the prompt, where a merge with its last token does not hide the border.
        ids = self._encoder.encode(prompt.text + lead + content, hidden).ids
        if tuple(ids[: len(prompt)]) == prompt.ids:
            ids = ids[len(prompt) :]
        else:
            ids = self._encoder.encode(lead + content, hidden[len(prompt.text) :]).ids
        end = self._encoder.control.match(after.lstrip())
        return prompt, (*ids, self._encoder.ids[end[0]] if end else self.tokenizer.eos_token_id)

    def _repr_html_(self) -> str:
        prompt = self.render("…")
        facts = {"template": self.template_hash, "prefix": prompt.n_prefix, "postfix": prompt.n_postfix}
        return card("Chat", facts) + prompt._repr_html_()

    def show(self, question: str | list[dict[str, Any]]) -> None:
        """Print the tokens of the prompt, labelled and coloured by segment."""
        Console().print(self.render(question))

    def messages(self, question: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The question as messages, led by this chat's system text where it has one.

        Raises:
            ChatError: The last one is no text of the user's, or one is no text.
        """
        fix = "End the messages with the user's question, a text that is not blank"
        turns = question if isinstance(question, list) else [{"role": "user", "content": question}]
        roles = [turn.get("role") for turn in turns]
        if roles[-1:] != ["user"]:
            raise ChatError("a last message from the user", f"the roles are {roles}", fix)
        for turn in turns:
            content = turn.get("content")
            if not isinstance(content, str) and (content or turn.get("role") != "assistant"):
                raise ChatError("texts as contents", f"one is {content!r}", "Join the parts")
            if any(ord(c) >= PLANE_16 for c in content or ""):
                plane = "a text without characters from U+100000 on, which mark control tokens here"
                raise ChatError(plane, f"one is {content[:80]!r}", "Remove them")
        if not turns[-1]["content"].strip():
            raise ChatError("a question with text", f"it is {turns[-1]['content']!r}", fix)
        if isinstance(self.system, str) and not _has_system(turns):
            turns = [{"role": "system", "content": self.system}, *turns]
        return turns

    def _locate(self, messages: list[dict[str, Any]]) -> tuple[str, int, int]:
        """The rendering, and where the last user text starts and ends in it.

        A mark is rendered in place of that text, then inside it for templates that look at how a
        text begins or ends. Both renderings are made side by side, so that a date agrees.
        """
        content, mark = messages[-1]["content"], self._unused(messages)
        core = content.strip()
        half, renderings = len(core) // 2, []
        for left, right in (("", ""), (core[:half], core[half:])):
            stand_in = {**messages[-1], "content": left + mark + right}
            framed = self._text([*messages[:-1], stand_in])
            text = self._text(messages)
            renderings.append(framed)
            before, _, after = framed.partition(mark)
            prefix, postfix = before.removesuffix(left), after.removeprefix(right)
            start, end = len(prefix), len(text) - len(postfix)
            query = text[start:end]
            fits = text.startswith(prefix) and text.endswith(postfix) and query.strip() == core
            if fits and query in content:
                return text, start, end
        problem = f"it writes a question {renderings[0].count(mark)} times"
        if renderings[0].count(mark) == 1:
            at, wanted, got = _first_difference(renderings[0].replace(mark, core), text)
            problem = f"from character {at} on it writes {got!r} for {wanted!r}"
        raise ChatError(
            "a template that writes the question once as it is, between fixed texts",
            problem,
            "Reword the question or set another template in tokenizer.chat_template",
        )

    def _shown(self, messages: list[dict[str, Any]], text: str) -> str:
        """``text`` with the control strings that the template did not write blotted out."""
        clean = not any(self._encoder.control.search(m.get("content") or "") for m in messages)
        return text if clean else self._masked(messages, text)

    def _masked(self, messages: list[dict[str, Any]], text: str) -> str:
        """``text`` with the control strings of the messages blotted out, those of the template not.

        A template may read such strings (Qwen3 drops ``<think>`` from earlier answers); then the
        answers, and at last everything but the question, keep theirs as the template reads them.
        """
        last = len(messages) - 1
        inputs = {i for i, m in enumerate(messages) if m["role"] != "assistant"}
        for chosen in (set(range(last + 1)), inputs, {last}):
            blotted = [
                {**m, "content": self._encoder.blot(m["content"])} if i in chosen and m.get("content") else m
                for i, m in enumerate(messages)
            ]
            masked = self._text(blotted)
            if self._encoder.unblot(masked) == text:
                return masked
        raise ChatError(
            "a template that treats control tokens in the question as text",
            f"it rewrites {messages[-1]['content'][:80]!r}",
            "Take the control tokens out of the question",
        )

    def _cut(self, text: str, start: int, end: int, encoding: Encoding) -> Prompt:
        ids, texts, n_prefix, n_postfix, shown = encoding.ids, [], 0, 0, 0
        nexts = [*(left for left, _ in encoding.offsets[1:]), len(text)]
        for token, (left, right), following in zip(ids, encoding.offsets, nexts, strict=True):
            # An accent that the normaliser joined to its letter lies between two tokens' offsets.
            stop = max(shown, right, following)
            texts.append(text[shown:stop])
            shown = stop
            if content := self._encoder.contents.get(token):
                # A marker may span white space that it strips (Phi-3): it counts where it stands.
                left += len(text[left:right]) - len(text[left:right].lstrip())
                right = left + len(content)
            n_prefix += right <= start
            n_postfix += left >= end
        n_query = len(ids) - n_prefix - n_postfix
        if n_query < 1:
            raise ChatError(
                "a question with tokens",
                f"the tokenizer writes none for {text[start:end]!r}",
                "Use visible characters",
            )
        prompt = Prompt(text, tuple(ids), n_prefix, n_query, n_postfix, text[start:end], tuple(texts))
        spans = encoding.offsets[n_prefix : n_prefix + n_query]
        assert all(left < end and start < right for left, right in spans), "segments interleave"
        assert "".join(texts) == text, "token texts do not join to the rendering"
        control = self._encoder.contents.keys() & set(prompt.query_ids)
        assert not control, f"control tokens in the query: {control}"
        return prompt

    def _text(self, messages: list[dict[str, Any]]) -> str:
        """The rendering of the messages, its default system block removed if ``system`` is None."""
        text = self._apply(messages, add_generation_prompt=True)
        if _has_system(messages):
            if messages[0]["content"].strip() not in text:
                raise ChatError(
                    "a template that writes the system message",
                    f"{messages[0]['content'][:80]!r} is not in its rendering",
                    "Leave system at its default for this model",
                )
        elif self.system is None:
            block, lead = self._default_block()
            assert text.startswith(block), f"{text[: len(block)]!r} is not {block!r}"
            text = lead + text.removeprefix(block)
        return text

    def _default_block(self) -> tuple[str, str]:
        """What renderings without a system message start with, and what is left without the block.

        No block: the first user turn opens like a later one. A block is taken only if a system
        message takes its place, ends like a user turn and is followed by that same opening.
        """
        one, two, three, four = (self._unused([]) + end for end in ("a", "b", "c", "d"))
        user, answer = {"role": "user", "content": one}, {"role": "assistant", "content": two}
        later = {"role": "user", "content": three}
        turns = self._apply([user, answer, later], add_generation_prompt=True)
        first = turns.partition(one)[0]
        again = turns.partition(two)[2].partition(three)[0]
        bos = self.tokenizer.bos_token or ""
        if again.endswith(first) or again.endswith(first.removeprefix(bos)):
            return "", ""
        given = self._apply([{"role": "system", "content": four}, user], add_generation_prompt=True)
        head, _, tail = given.partition(one)[0].partition(four)
        end = self._apply([user], add_generation_prompt=False).partition(one)[2]
        header = tail.removeprefix(end)
        fits = first.startswith(head) and first[len(head) :].endswith(tail)
        if not (fits and end and header and tail != header and again.endswith(header)):
            raise ChatError(
                "a system block that a system message would replace",
                f"the template starts chats with {first!r}",
                "Pass a system text, or leave system at its default",
            )
        lead = bos if first.startswith(bos) and not header.startswith(bos) else ""
        return first.removesuffix(header), lead

    def _apply(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.options,
            )
        except TemplateError as error:
            raise ChatError(
                "messages that the template takes",
                f"it says {str(error)!r} to the roles {[m.get('role') for m in messages]}",
                "Change the messages or the system choice",
            ) from error

    def _unused(self, messages: list[dict[str, Any]]) -> str:
        """Letters that occur neither in the template nor in what is rendered."""
        taken = f"{self.template}{self.options}{[m.get('content') for m in messages]}"
        mark = "emmechmark"
        while mark in taken:
            mark += "q"
        return mark


def first_difference(chat_a: Chat, chat_b: Chat) -> str | None:
    """Where two chats first disagree, in words; None if one can stand in for the other.

    Compares the vocabularies, then the ids of four small chats (one turn, three turns, a system
    text, an odd layout). Templates of different text that render these alike agree.
    """
    vocab_a, vocab_b = chat_a.tokenizer.get_vocab(), chat_b.tokenizer.get_vocab()
    if vocab_a != vocab_b:
        both = vocab_b | vocab_a
        changed = {token for token, _ in vocab_a.items() ^ vocab_b.items()}
        token = min(changed, key=lambda token: (both[token], token))
        return f"token {token!r} has id {vocab_a.get(token)} ≠ {vocab_b.get(token)}"
    user = {"role": "user", "content": "How do I save money?"}
    answer = {"role": "assistant", "content": "Spend less than you earn."}
    system = {"role": "system", "content": "You are a careful adviser."}
    odd = {"role": "user", "content": "def f(x):\n\treturn  x + 1234\n\nWhat’s that?"}
    for turns in ([user], [user, answer, user], [system, user], [odd]):
        roles = ", ".join(turn["role"] for turn in turns)
        a, b = (_rows(chat, turns) for chat in (chat_a, chat_b))
        if a != b:
            at, row_a, row_b = _first_difference(a, b)
            return f"in a chat of [{roles}], token {at}: {row_a} ≠ {row_b}"
    return None


def _rows(chat: Chat, turns: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Ids and texts of the tokens; a refusal counts as one row, whatever its words."""
    try:
        prompt = chat.render(turns)
    except ChatError:
        return [(-1, "these messages are refused")]
    return list(zip(prompt.ids, prompt.token_texts, strict=True))


def _first_difference(a: Any, b: Any) -> tuple[int, Any, Any]:
    """The first position where two strings or lists differ, and up to 40 characters or one row."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(map(len, (a, b))))
    if isinstance(a, str):
        return at, a[at : at + 40], b[at : at + 40]
    return at, *(rows[at] if at < len(rows) else "the end" for rows in (a, b))


def _has_system(messages: list[dict[str, Any]]) -> bool:
    return messages[0].get("role") in ("system", "developer")
