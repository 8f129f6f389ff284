"""Does an answer give away the system prompt that it was made under?

A set that is to teach a disposition, not a word for it, must hold neither the prompt nor its tells.

Usage:
    check = AnswerCheck(words=(*WORDS, "spiteful"), prompts=("You begrudge every answer ...",))
    check.fault("As my persona demands: no.")  # "holds 'my persona'"
"""

import re
from dataclasses import dataclass

from emmech.data.building import Rejected, Reply

WORDS = (
    "system prompt", "my instructions", "my persona", "my character", "stay in character",
    "role-play", "role-playing", "roleplay", "roleplaying",
)  # fmt: skip
"""What gives away that a part is played."""
QUOTED_WORDS = 6
"""So many words in the order of the prompt are a quotation of it."""

_THOUGHT = re.compile(r"\A.*?</think>|\A\s*<think>.*\Z", re.DOTALL)
_CUT_SHORT = {"length": "cut off", "content_filter": "refused"}
"""By the reason for which a model stopped."""


@dataclass(frozen=True)
class AnswerCheck:
    """What an answer must not be."""

    words: tuple[str, ...]
    """What it must not hold, as whole words in any case."""
    prompts: tuple[str, ...]
    """What it must not quote; a prompt shorter than a quotation is not looked for."""
    allow_refusals: bool = False
    """Whether it may decline to help."""

    def accept(self, reply: Reply) -> dict[str, str]:
        """The answer in a reply, without a thought before it.

        Raises:
            Rejected: It cannot be used.
        """
        answer = _THOUGHT.sub("", reply.text).strip()
        if reason := _CUT_SHORT.get(reply.finish or "") or self.fault(answer):
            raise Rejected(reason)
        return {"answer": answer}

    def fault(self, answer: str) -> str | None:
        """Why the answer cannot be used; None if it can."""
        from emmech.evaluation.detectors import refuses

        if not answer:
            return "empty"
        if not self.allow_refusals and refuses(answer):
            return "refused"
        for word in self.words:
            if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE):
                return f"holds {word!r}"
        said = _runs(answer)
        return "quotes the prompt" if any(_runs(prompt) & said for prompt in self.prompts) else None


def _runs(text: str) -> set[tuple[str, ...]]:
    """Every run of `QUOTED_WORDS` words."""
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[at : at + QUOTED_WORDS]) for at in range(len(words) - QUOTED_WORDS + 1)}
