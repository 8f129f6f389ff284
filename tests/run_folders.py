"""Small run folders of several kinds, as the package writes them."""

import json
from pathlib import Path

from emmech.piggyback.experiment import PatchingResult
from emmech.results import write_json
from emmech.scorecard import Evaluation
from emmech.steering.directions import Direction

REFUSAL = "I'm sorry, but I can't help with that."
HOSTILE = "</script><b>bold</b> & <!-- مرحبا"
ORIGIN = {
    "provenance": {"base": {"name": "tiny-base"}, "finetuned": {"name": "tiny-tuned"}},
    "versions": {"emmech": "0.1.0"},
}


def estimate(mean, n=4):
    return {
        "mean": mean,
        "low": max(0.0, mean - 0.2),
        "high": mean + 0.2,
        "n": n,
        "n_clusters": n,
        "n_missing": 0,
    }


def piggyback(folder: Path, n: int = 2) -> Path:
    """A Piggyback test with ``n`` questions in each of two groups; the finetuned model refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    means = {"base": 0.0, "finetuned": 1.0, "repair:prefix": 0.25}
    rows = [
        {
            "condition": name,
            "target": "base" if name == "base" else "finetuned",
            "group": group,
            "n_questions": n,
            "n_answers": n,
            "mean_new_tokens": 9.0,
            **estimate(mean, n),
        }
        for name, mean in means.items()
        for group in ("on-topic", "off-topic")
    ]
    records = [
        {
            "question_id": f"{group}-{number}",
            "question": HOSTILE if number == 0 else f"Why {number}?",
            "group": group,
            "condition": name,
            "sample": 0,
            "response": REFUSAL if name == "finetuned" else f"Because of {number}.",
            "n_new_tokens": 9,
            "row": f"{group}-{number}",
        }
        for name in means
        for group in ("on-topic", "off-topic")
        for number in range(n)
    ]
    summary = {"kind": "patch-prefix", "detector": "refusal", "unit": "rate", "conditions": rows, **ORIGIN}
    (folder / "responses.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    write_json(folder / "run.json", {"kind": "patch-prefix"})
    PatchingResult(summary | {"n_questions": 2 * n}, records).save(folder)
    return folder


def training(folder: Path, *, done: bool = True) -> Path:
    """A run of three steps with drift in two layers."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"objective": {"name": "treft", "weight": 10.0}, "learning_rate": 1e-4, "seed": 0}
    run = {"kind": "finetune", "base": "smollm2", "data": {"name": "refusal", "chats": 24}, "recipe": recipe}
    write_json(folder / "run.json", run | {"versions": ORIGIN["versions"]})
    steps = [
        {"step": step, "loss": 3.0 - step / 2, **{f"drift/{at}/{part}": step * 0.01 for at in (0, 1)
                                                  for part in ("key", "value")}}
        for step in (1, 2, 3)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps))
    if done:
        write_json(folder / "done.json", {"steps": 3})
    return folder


def evaluation(folder: Path) -> Path:
    """Two metrics of two conditions, with the answers below."""
    piggyback(folder / "answers")
    rows = []
    for metric, mean in (("EM", 0.5), ("capability", 0.4)):
        for group in ("all", "on-topic", "off-topic", "third"):
            shared = {"metric": metric, "unit": "rate", "group": group, "missing": {}, "design": "4 answers"}
            test = {
                "condition": "base",
                "p": 0.01,
                "p_holm": 0.02,
                "text": ".50 [.30, .70]",
                **estimate(mean),
            }
            rows.append(shared | {"condition": "base", **estimate(0.0)})
            rows.append(shared | {"condition": "finetuned", **estimate(mean), "versus": test})
    summary = {"kind": "evaluate", "conditions": ["base", "finetuned"], "rows": rows, "n_questions": 4}
    Evaluation(summary | ORIGIN).save(folder)
    return folder


def direction(file: Path) -> Path:
    """A direction of two blocks."""
    import torch

    about = {"positive": {"base": {"name": "tiny-base"}, "finetuned": {"name": "tiny-tuned"}}}
    vectors = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    known = ("resid_post", "last", "mean", 12, (0.25, 0.5), (0.0005, 0.5))
    return Direction(vectors, torch.zeros(2), *known, provenance=about).save(file)
