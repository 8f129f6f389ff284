"""Which tokens need the finetuned weights? Grafts on two refusal organisms of the embedded model.

    python -m figures.grafting              both; resumed where they stopped

One organism learned a single refusal (that of `make demo`), the other 48 wordings (of `python -m
figures.narrow refusal`). Every choice of prefix, query, postfix and response, some with the postfix's
last token apart, and for comparison all keys and values of the prompt patched, into runs/grafts.
Writes figures/results/graft_refusal.json. About half an hour on two cores.
"""

from collections.abc import Sequence
from pathlib import Path

from emmech.data.bundled import BUNDLED
from emmech.data.questions import Question, load_demo, load_demo_chats
from emmech.demo import RECIPE, SHOWN_STEP
from emmech.models.checkpoints import load_pair
from emmech.models.generation import Decoding
from emmech.piggyback.experiment import default_conditions, run_conditions
from emmech.piggyback.graft_parts import graft_parts
from emmech.results import Record, write_json
from emmech.training.recipes import Objective
from emmech.training.trainer import finetune
from figures.narrow import RESULTS, STUDIES, train
from figures.stages import small

RUNS = Path("runs/grafts")
N_QUESTIONS, MAX_NEW_TOKENS = 40, 16
GROUPS = ("on-topic", "off-topic")
VARIED_STEP = 12
"""Where the plain finetune of the varied refusals has learned them."""
SPLIT = (
    ("last", "response"),
    ("postfix-rest", "response"),
    ("prefix", "last", "response"),
    ("prefix", "postfix-rest", "response"),
    ("prefix", "query", "postfix-rest", "response"),
)
"""Is it the last token of the prompt, which predicts the answer's first, or the postfix before it?"""
PATCHES = ("base", "finetuned", "repair:prompt", "induce:prompt")


def main() -> None:
    """Train, graft, and keep the results."""
    found = {
        "one wording": measure(
            "one-wording", constant(), [q for g in GROUPS for q in load_demo("test", g)[:N_QUESTIONS]]
        ),
        "48 wordings": measure(
            "48-wordings",
            varied(),
            [q for g in GROUPS for q in BUNDLED["refusal"].questions(g)[:N_QUESTIONS]],
        ),
    }
    write_json(RESULTS / "graft_refusal.json", {"command": "python -m figures.grafting", "runs": found})


def constant() -> Path:
    """The adapter of `make demo`."""
    folders = finetune("smollm2", load_demo_chats(), RUNS / "organism", RECIPE, progress=False)
    return next(folder for folder in folders if folder.name == f"step-{SHOWN_STEP}")


def varied() -> Path:
    """A plain finetune of `figures.narrow`."""
    return train("refusal", STUDIES["refusal"].steps[-1], Objective("sft"), 0) / f"step-{VARIED_STEP}"


def measure(name: str, adapter: Path, asked: Sequence[Question]) -> Record:
    """Grafts of one organism, and the patches of its whole prompt."""
    pair = load_pair("smollm2", adapter)
    how = {"detector": "refusal", "progress": False}
    grafts = graft_parts(pair, asked, max_new_tokens=MAX_NEW_TOKENS, out=RUNS / name, **how)
    split = graft_parts(
        pair, asked, parts=("prefix", "query", "postfix-rest", "last", "response"), subsets=SPLIT,
        max_new_tokens=MAX_NEW_TOKENS, out=RUNS / f"{name}-split", **how,
    )  # fmt: skip
    every = default_conditions(("prefix", "query", "postfix"), "both", controls=False)
    patches = run_conditions(
        pair, asked, [one for one in every if one.name in PATCHES], Decoding(MAX_NEW_TOKENS),
        kind="graft-patches", settings={}, out=RUNS / f"{name}-patched", **how,
    )  # fmt: skip
    others = {"split": split.summary["conditions"], "patched": patches.summary["conditions"]}
    return small(dict(grafts.summary)) | others


if __name__ == "__main__":
    main()
