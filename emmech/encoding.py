"""A tokenizer that reads control tokens only where the template wrote them."""

import json
import re
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, Tokenizer

if TYPE_CHECKING:
    import transformers  # only for a type: loading it would load torch

PLANE_16 = 0x100000  # Unicode's last private plane; no icon font lives there


class Encoder:
    """A copy of a backend tokenizer whose control tokens answer to other names.

    Every added token but white space (Gemma's newlines) is renamed, in the added vocabulary and in
    the model, to a stand-in of equal length that no text contains. For the copy ``<|im_end|>`` is
    plain text, and its stand-in, put where the template wrote it, gives its id. The text goes
    through in one piece with its offsets unmoved, so merges, strip flags and a leading ``▁`` are
    the tokenizer's own.
    """

    def __init__(self, tokenizer: "transformers.PreTrainedTokenizerBase"):
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        # The post-processor writes a second BOS and trims blanks off the offsets (Llama 3).
        spec |= {"post_processor": None, "truncation": None, "padding": None}
        added = [t for t in spec["added_tokens"] if t["content"].strip()]
        self.ids = {t["content"]: t["id"] for t in added}
        self.contents = {i: content for content, i in self.ids.items()}
        self.names = {c: chr(PLANE_16 + n) * len(c) for n, c in enumerate(self.ids)}
        self.special = _any_of(t["content"] for t in added if t["special"])
        self.control, self.blots = _any_of(self.ids), _any_of(self.names.values())
        for token in added:
            token["content"] = self.names[token["content"]]
        _rename(spec["model"], self.names)
        self.backend = Tokenizer.from_str(json.dumps(spec))
        moved = [c for c, i in self.ids.items() if self.backend.token_to_id(self.names[c]) != i]
        assert not moved, f"ids changed in the copy: {moved}"
        probe = "".join(f"{c} A probe,\n\n 1" for c in [*self.ids][:100])
        own = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        assert self.encode(probe, probe).ids == own, "the copy of the tokenizer gives other ids"

    def blot(self, content: str, *, special_only: bool = False) -> str:
        """The content with its control strings hidden from a search for them."""
        pattern = self.special if special_only else self.control
        return pattern.sub(lambda found: self.names[found[0]], content)

    def unblot(self, text: str) -> str:
        named = {name: content for content, name in self.names.items()}
        return self.blots.sub(lambda found: named[found[0]], text)

    def encode(self, text: str, masked: str) -> Encoding:
        """Tokens of ``text``, control tokens only where ``masked`` still shows their strings."""
        pieces, done = [], 0
        for found in self.control.finditer(masked):
            pieces += text[done : found.start()], self.names[found[0]]
            done = found.end()
        return self.backend.encode("".join([*pieces, text[done:]]), add_special_tokens=False)


def _any_of(strings: Any) -> re.Pattern[str]:
    """A pattern for the longest of the strings; the look-ahead keeps thousands of them cheap."""
    longest = sorted(strings, key=len, reverse=True)
    if not longest:
        return re.compile("(?!)")
    first = "".join(re.escape(c) for c in sorted({s[0] for s in longest}))
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, longest))})")


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Take the control strings out of a model's vocabulary and merges: no text spells one."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
    if "merges" in model:
        parts = ((a, b, a + b) for a, b in model["merges"])
        model["merges"] = [[a, b] for a, b, ab in parts if not names.keys() & {a, b, ab}]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
