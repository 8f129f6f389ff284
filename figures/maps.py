"""Kept maps of the prefix cache."""

from emmech.piggyback.cells import KV
from emmech.results import Record


def map_of(found: Record, kl: Record, ends: Record, mode: str) -> Record:
    """A map as a summary that ``emmech.figures.sweep_map`` draws; ``ends`` are its means, and their ends."""
    rows = []
    for kv in KV:
        for layer, means in enumerate(ends["mean"][kv]):
            for position, mean in enumerate(means):
                low, high = (
                    ends[end][kv][layer][position] if end in ends else None for end in ("low", "high")
                )
                row = {"layer": layer, "position": position, "kv": kv, "token": found["tokens"][position]}
                row |= {"effect": mean, "effect_low": low, "effect_high": high, "n": kl["n"]}
                rows.append(row | {"difference": mean * kl["whole"]["mean"]})
    return {
        "kind": "sweep-kv", "metric": "kl", "mode": mode, "target": "finetuned", "source": "base",
        "axes": ["layer", "position", "kv"], "tokens": found["tokens"], "rows": rows,
        "unpatched": kl["unpatched"], "full": kl["full"],
    }  # fmt: skip
