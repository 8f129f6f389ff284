"""Numbers that define an experiment when nobody says otherwise: the same from Python and the shell."""

DETECTOR = "refusal"
DETECTORS = ("refusal", "length", "repetition")
"""What an evaluation counts without a judge."""
MAX_NEW_TOKENS = 64
TRIALS, N_TOKENS, N_NEIGHBOURS = 10, 10, 5
"""Perturbations per question, tokens replaced in each, candidates per token (arXiv 2606.06667, s4.1)."""
TARGET_RATE = 0.9
"""On-topic rate at which methods of finetuning are compared."""


def temperature(given: float | None, samples: int) -> float:
    """The temperature asked for; else 1 where several samples must differ, and greedy for one."""
    if given is not None:
        return given
    return 1.0 if samples > 1 else 0.0
