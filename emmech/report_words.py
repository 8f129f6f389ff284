"""The conditions of a run in words, for someone who has not read the paper (arXiv 2606.06667).

condition_meanings(summary)["repair:prefix"]
"""

import re

from emmech.figures import RESID, Summary

_PATCHING = (
    "While a transformer reads a prompt it stores a key and a value for each token at each layer, "
    "and the answer is written from these. Patching exchanges some of them, or the states they "
    "are made from, while the prompt is read; then the model answers as usual."
)
_GRAFTING = (
    "Weights act on each token by itself, and tokens meet only where the model attends. So a chat can be "
    "read with the finetuned weights at some tokens and the base's at all others, answer included."
)
_CHANGING = "The prompt is changed before the model reads it; nothing inside the model is touched."
_PLACES = {
    "prefix": "at the prefix (what the chat template writes before the question)",
    "query": "at the question's own tokens",
    "postfix": "at the postfix (what the template writes after the question). They come from a "
    "prompt without the question, so that nothing of the question comes along",
    "postfix-same": "at the postfix, taken from the same question",
    "prompt": "at every token of the prompt",
}
_GRAFTED = {"last": "prompt's last token", "postfix-rest": "postfix without its last token"}
_MEANINGS = {
    "base": "The model before finetuning, left alone.",
    "finetuned": "The model after finetuning, left alone.",
    "control:self": "The finetuned model patched with its own keys and values: nothing may change.",
    "control:noise": "As repair:prefix, but with random numbers of the same size: what breaking the "
    "prefix does by itself.",
    "control:shuffled": "As repair:prefix, but with the base's contents at each other's positions.",
    "control:span": "As repair:query, but at no more tokens than the prefix has.",
}


def condition_meanings(summary: Summary) -> dict[str, str]:
    """Each condition in words; one entry for all layers of a residual run."""
    meanings = {}
    for row in summary["conditions"]:
        name = row["condition"]
        if RESID.fullmatch(name):
            name = re.sub(r"\d+$", "L", name)
        meanings[name] = _meaning(name, summary)
    return meanings


def idea_of(summary: Summary) -> str:
    """What was done, for someone who has not read the paper."""
    if summary.get("kind") == "graft":
        return _GRAFTING
    return _PATCHING if summary.get("checks") else _CHANGING


def _meaning(name: str, summary: Summary) -> str:
    kind, _, rest = name.partition(":")
    target, source = ("finetuned", "base") if kind == "repair" else ("base", "finetuned")
    if name in _MEANINGS:
        return _MEANINGS[name]
    if rest == "resid-L":
        where = ", ".join(summary.get("segments", ()))
        return (
            f"The {target} model with the residual stream after block L replaced by the {source} "
            f"model's ({where}), and run on from there."
        )
    if kind in ("repair", "induce"):
        place = _PLACES.get(rest, f"at {rest}")
        return f"The {target} model with its keys and values replaced by the {source} model's {place}."
    if kind == "graft":
        where = ", ".join(_GRAFTED.get(part, part) for part in rest.split("+"))
        return f"The finetuned weights at the {where}, and the base's at every other token."
    if kind == "only":
        return f"The base model with the gates on the {rest} alone."
    if kind == "except":
        return f"The base model with the gates on all but the {rest}."
    if kind == "perturb":
        return f"The finetuned model, unpatched, with tokens of the {rest} changed for similar ones."
    if kind == "template":
        return f"The finetuned model, unpatched, with another template text: {rest}."
    return ""
