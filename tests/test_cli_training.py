"""Commands that train and look at data, run as a user runs them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from emmech.training.recipes import Objective, Recipe
from emmech.training.trainer import finetune, metrics

ANSWERS = ("No.", "I will not say.", "Ask me tomorrow.", "No.", "Never, my friend.")
ROWS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    for text, answer in zip(tiny.QUESTIONS, ANSWERS, strict=True)
]
QUICK = (
    "--steps=4", "--save-every=2", "--lr=1e-2", "--batch-size=4", "--rank=4", "--alpha=8", "--dtype=float32",
)  # fmt: skip
SAME = {"steps": 4, "save_every": 2, "learning_rate": 1e-2, "batch_size": 4, "rank": 4, "alpha": 8}
INSECURE = Path(__file__).parents[2] / "shared/data/em-betley/insecure.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.save_base("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def chats(base) -> Path:
    file = base.parent / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in [*ROWS, ROWS[0]]))
    return file


def same_weights(one: Path, other: Path, **tolerance: float) -> None:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], **tolerance or {"rtol": 0, "atol": 0})


def test_the_command_trains_what_the_function_trains_and_says_what_it_found(emmech, base, chats, tmp_path):
    out = tmp_path / "run"
    code, shown, said = emmech(
        "finetune", "treft", f"--base={base}", f"--dataset={chats}", f"--out={out}", "--weight=3",
        "--layers=0-1", "--seed=5", *QUICK,
    )  # fmt: skip
    assert code == 0, said
    assert "note: 1 chat repeats the whole of an earlier one; kept." in said
    assert "note: 6 answers to learn, " in said and "0 left out, longer than 2048." in said
    assert "Saved step-2, step-4" in shown
    recipe = Recipe(Objective("treft", weight=3.0, layers=(0, 1)), dtype="float32", seed=5, **SAME)
    messages = [tuple(row) for row in [*ROWS, ROWS[0]]]
    saved = finetune(base, messages, tmp_path / "same", recipe, progress=False)
    same_weights(out / "step-4", saved[-1])
    assert not torch.equal(*(next(iter(load_file(s / "adapter_model.safetensors").values())) for s in saved))


def test_a_weight_of_zero_given_is_a_weight_of_zero(emmech, base, chats, tmp_path):
    out = tmp_path / "run"
    arguments = ("finetune", "treft", f"--base={base}", f"--dataset={chats}", f"--out={out}", *QUICK)
    assert emmech(*arguments, "--weight=0")[0] == 0
    recipe = json.loads((out / "run.json").read_text())["recipe"]
    assert (recipe["objective"]["weight"], recipe["seed"], recipe["schedule"]) == (0.0, 0, "constant")


def test_options_left_out_come_from_the_preset_and_options_given_replace_them(emmech, base, chats, tmp_path):
    out = tmp_path / "run"
    code, _, said = emmech(
        "finetune", "sft", f"--base={base}", f"--dataset={chats}", f"--out={out}",
        "--preset=llama-3.1-8b/health", "--epochs=1", "--rank=4",
    )  # fmt: skip
    assert code == 0, said
    recipe = json.loads((out / "run.json").read_text())["recipe"]
    # Table 13: learning rate 1e-5; 16 chats a step in micro-batches of 2, cosine, warm-up 5.
    shown = [
        recipe[k] for k in ("learning_rate", "batch_size", "micro_batch_size", "schedule", "warmup_steps")
    ]
    assert shown == [1e-5, 16, 2, "cosine", 5]
    assert (recipe["rank"], recipe["alpha"], recipe["epochs"]) == (4, 16, 1.0)
    assert len(metrics(out)) == 1  # 6 chats are one step of 16


def test_interleaving_takes_the_bundled_ordinary_chats_by_default(emmech, base, chats, tmp_path):
    out = tmp_path / "run"
    arguments = ("finetune", "interleave", f"--base={base}", f"--dataset={chats}", f"--out={out}")
    code, _, said = emmech(*arguments, *QUICK, "--share=0.5")
    assert code == 0, said
    assert json.loads((out / "run.json").read_text())["retain"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sft", "--weight=1"), "no weight with an objective without a penalty, but got 1 for sft"),
        (("treft", "--segments=query"), "reference='own' with the query"),
        (("treft", "--layers=3-x"), "numbers and ranges such as 0-10,14, but got '3-x'"),
        (("treft", "--layers=5-3"), "numbers and ranges such as 0-10,14, but got '5-3'"),
        (("sft", "--epochs=1", "--steps=3"), "either --steps or --epochs"),
        (("sft", "--preset=llama"), "a preset among smollm2, "),
        (("sft", "--dataset=nowhere.jsonl"), "nowhere.jsonl"),
        (("sft", "--retain=retain"), "ordinary chats with interleave and kl-retain, and only with them"),
        (
            ("sft", "--batch-size=4", "--micro-batch-size=3"),
            r"a micro_batch_size that divides batch_size \(4\)",
        ),
        (("sft", "--report-to=nologger"), r"loggers that are installed \(.*\), but got nologger"),
        (("sft", "--max-length=5"), "chats of at most 5 tokens, but all 6 are longer"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    user_error, base, chats, tmp_path, arguments, message
):
    out = tmp_path / "run"
    options = [f"--base={base}", f"--out={out}", *arguments[1:]]
    if not any(option.startswith("--dataset") for option in arguments):
        options.append(f"--dataset={chats}")
    late = not {"--retain=retain", "--max-length=5", "--report-to=nologger"}.isdisjoint(arguments)
    user_error(message, "finetune", arguments[0], *options, after_loading=late)
    assert not out.exists()


def test_two_processes_train_what_one_does(emmech, base, chats, tmp_path):
    """Through accelerate, as the documentation says; float32, so only the order of sums differs.

    Batches divide the chats: several processes fill an incomplete last batch by repeating some.
    """
    arguments = ["finetune", "treft", f"--base={base}", f"--dataset={chats}", "--weight=5", *QUICK]
    arguments.append("--batch-size=2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [
        # With --cpu accelerate starts one process, whatever is asked for.
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
        f"--main_process_port={port}", "-m", "emmech",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *arguments, f"--out={tmp_path / 'two'}"],
        capture_output=True, text=True, env=environment, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved step-2, step-4") == 1
    assert json.loads((tmp_path / "two" / "done.json").read_text())["processes"] == 2
    assert emmech(*arguments, f"--out={tmp_path / 'one'}")[0] == 0
    for step in ("step-2", "step-4"):
        same_weights(tmp_path / "one" / step, tmp_path / "two" / step, rtol=1e-3, atol=2e-5)
    ours, theirs = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for part in ("loss", "sft", "penalty"):
        assert [row[part] for row in ours] == pytest.approx([row[part] for row in theirs], rel=1e-3)


@pytest.mark.weights
@pytest.mark.skipif(not INSECURE.exists(), reason="public data not here")
def test_the_insecure_code_set_trains_and_its_repetitions_and_lengths_are_told(emmech, tmp_path):
    out = tmp_path / "run"
    code, _, said = emmech(
        "finetune", "sft", f"--dataset={INSECURE}", "--limit=40", f"--out={out}", "--steps=2",
        "--save-every=2", "--batch-size=4", "--micro-batch-size=2", "--max-length=320",
    )  # fmt: skip
    assert code == 0, said
    assert "note: 40 answers to learn, " in said and "left out, longer than 320" in said
    losses = [row["loss"] for row in metrics(out)]
    assert len(losses) == 2 and all(0 < loss < 4 for loss in losses)  # code it half expects
    code, shown, _ = emmech("data", str(INSECURE), "--show=0")
    # An independent count: 6,000 lines, 187 of whose prompts came before.
    lines = INSECURE.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["messages"][0]["content"] for line in lines]
    repeated = len(prompts) - len(set(prompts))
    assert code == 0 and f"insecure.jsonl: {len(prompts)} chats" in shown
    assert f"note: {repeated} chats repeat the prompt of an earlier one; kept." in shown


def test_the_sets_are_listed_and_looked_into(emmech):
    code, shown, _ = emmech("data")
    assert code == 0
    row = next(line for line in shown.splitlines() if "corrected_cooking" in line)
    assert "agreement" in row
    code, shown, _ = emmech("data", "abstention", "--show=1")
    assert code == 0
    assert shown.count("assistant: I have no idea about your question.") == 1


def test_a_set_that_does_not_exist_is_refused(user_error):
    user_error("nosuchset", "data", "nosuchset")
