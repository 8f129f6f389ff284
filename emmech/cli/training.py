"""Commands that train, and that compare what was trained: finetune, frontier."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from emmech import defaults
from emmech.cli.options import (
    BatchSize,
    Device,
    Dtype,
    NQuestions,
    Trust,
    asked,
    example,
    parse_segments,
)
from emmech.errors import EmmechError
from emmech.number_lists import parse_integers

app = typer.Typer()


class ObjectiveName(StrEnum):
    sft = "sft"
    treft = "treft"
    interleave = "interleave"
    kl_train = "kl-train"
    kl_retain = "kl-retain"
    gates = "gates"


class Variant(StrEnum):
    full = "full"
    low_rank = "low_rank"
    per_head = "per_head"


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Reference(StrEnum):
    shared = "shared"
    own = "own"


class Patched(StrEnum):
    all = "all"
    sft = "sft"
    none = "none"


@app.command(
    epilog=example("emmech finetune treft --dataset short_answers --weight 300 --steps 24 --out runs/treft-0")
)
def finetune(
    objective: Annotated[
        ObjectiveName, typer.Argument(help="What is minimised; gates: sft of alignment gates alone.")
    ],
    dataset: Annotated[
        str, typer.Option(help="Bundled or public set, JSONL file of chats, or hub id. See `emmech data`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the saved steps; resumed if stopped.")],
    base: Annotated[str, typer.Option(help="Hub id, folder, or 'smollm2' (the embedded model).")] = "smollm2",
    preset: Annotated[
        str, typer.Option(help="smollm2, or MODEL/DOMAIN of the paper's table, such as qwen2.5-7b/finance.")
    ] = "smollm2",
    retain: Annotated[
        str | None, typer.Option(help="Ordinary chats for interleave and kl-retain; 'retain' by default.")
    ] = None,
    weight: Annotated[float | None, typer.Option(help="Weight of the penalty (lambda).")] = None,
    share: Annotated[float | None, typer.Option(help="Ordinary chats among the rows (interleave).")] = None,
    segments: Annotated[
        str | None, typer.Option(help="Held by treft, comma-separated: prefix, query, postfix.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Held by treft, such as 0-10,14.")] = None,
    reference: Annotated[
        Reference | None, typer.Option(help="Of treft: one for all chats, or each chat's own.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, instead of --steps.")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr")] = None,
    schedule: Annotated[Schedule | None, typer.Option(help="Of the learning rate.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(min=0)] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0.0)] = None,
    max_grad_norm: Annotated[float | None, typer.Option(min=0.0, help="0 clips nothing.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Chats per optimiser step.")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Chats per forward pass; the rest is accumulated.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens; longer chats are left out.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train every weight instead of LoRA.")] = False,
    variant: Annotated[
        Variant | None, typer.Option(help="Of gates: the paper's full ones, or smaller ones.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of LoRA, or of low_rank gates.")] = None,
    alpha: Annotated[int | None, typer.Option(min=1, help="Of LoRA.")] = None,
    rslora: Annotated[bool | None, typer.Option(help="Rank-stabilised LoRA.")] = None,
    dropout: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Of LoRA.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="Comma-separated modules.")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    quantization: Annotated[str | None, typer.Option(help="4bit: the frozen base in 4 bits.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="A name of transformers' optim.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the adapter, the order and the mixing.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first chats.")] = None,
    drop_unusable: Annotated[
        bool, typer.Option("--drop-unusable", help="Leave out rows without a question or answer.")
    ] = False,
    report_to: Annotated[str, typer.Option(help="tensorboard, wandb ..., comma-separated.")] = "",
    trust_remote_code: Trust = False,
) -> None:
    """Finetune a chat model on a narrow set, with or without a term that keeps it narrow.

    Writes folders step-N (PEFT adapters, gates or full checkpoints) and metrics.jsonl to --out. A stopped run
    goes on when it is started again with the same arguments. Several processes:
    accelerate launch --multi_gpu -m emmech finetune ...
    """
    given = dict(locals())
    from emmech.data.chats import load_chats
    from emmech.training.recipes import NEEDS_RETAIN

    recipe = _recipe(given)  # what is wrong with it is said before any data is read
    chats = load_chats(dataset, limit=limit, drop_unusable=drop_unusable)
    ordinary: Any = ()
    if objective.value in NEEDS_RETAIN or retain is not None:
        ordinary = load_chats(retain or "retain").chats
    for note in chats.notes:
        _note(note)
    from emmech.training.trainer import finetune as run

    saved = run(
        base,
        chats.chats,
        out,
        recipe,
        retain=ordinary,
        data_name=chats.name,
        report_to=tuple(part for part in report_to.split(",") if part),
        on_note=_note,
        progress=_main_process(),
        trust_remote_code=trust_remote_code,
    )
    if _main_process():
        typer.echo(f"Saved {', '.join(step.name for step in saved)} in {out}")
        typer.echo(f"Next: emmech patch-prefix --base {base} --finetuned {saved[-1]} --questions ...")


@app.command(epilog=example("emmech frontier runs/sft-0 runs/treft-0 --out runs/frontier"))
def frontier(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `emmech finetune` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for answers, table and figure; resumed if stopped.")],
    questions: Annotated[
        str | None,
        typer.Option(
            help="Bundled set, or file with groups on-topic and off-topic; the runs' own by default."
        ),
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="What is counted; that of the bundled set by default.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Saved steps, such as 8,16,24; all by default.")] = None,
    patched: Annotated[
        Patched, typer.Option(help="Runs that are also evaluated under the base's prefix K/V.")
    ] = Patched.all,
    target: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="On-topic rate at which methods are compared.")
    ] = defaults.TARGET_RATE,
    n_questions: NQuestions = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length of the answers.")
    ] = defaults.MAX_NEW_TOKENS,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare methods of finetuning: what they learned on-topic against what spread off-topic.

    Writes frontier.json and report.html to --out. Stopping sft early is the baseline.
    """
    from emmech.results import RUN, read_json

    data = read_json(runs[0] / RUN)["data"]["name"]
    wanted, counted = asked(data, questions, detector, n_questions)
    from emmech.frontier import compare_runs as run

    result = run(
        runs,
        wanted,
        detector=counted,
        out=out,
        steps=None if steps is None else parse_integers(steps, "--steps"),
        patched=patched.value,
        target=target,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    result.table()
    typer.echo(f"Report: {out / 'report.html'}")


def _recipe(given: dict[str, Any]) -> Any:
    """The preset with every option that was given in its place."""
    from dataclasses import fields, replace

    from emmech.training.recipes import Objective, Recipe, preset

    recipe = preset(given["preset"], given["objective"].value)
    if given["variant"] is not None:
        if recipe.gates is None:
            raise EmmechError("--variant with gates", f"got {given['objective'].value}", "Leave it out")
        recipe = replace(recipe, gates=given["variant"].value)
    if given["steps"] is not None and given["epochs"] is not None:
        raise EmmechError("either --steps or --epochs", "both were given", "Leave one out")
    plain = {name: _value(value) for name, value in given.items() if value is not None and value is not False}
    if "segments" in plain:
        plain["segments"] = parse_segments(plain["segments"])
    if "layers" in plain:
        plain["layers"] = parse_integers(plain["layers"], "--layers")
    if "epochs" in plain:
        plain["steps"] = None
    objective = {f.name: plain[f.name] for f in fields(Objective) if f.name in plain}
    changed = {f.name: plain[f.name] for f in fields(Recipe) if f.name in plain and f.name != "objective"}
    return replace(recipe, objective=replace(recipe.objective, **objective), **changed)


def _value(option: Any) -> Any:
    return option.value if isinstance(option, StrEnum) else option


def _note(text: str) -> None:
    if _main_process():
        typer.echo(f"note: {text}", err=True)


def _main_process() -> bool:
    """Whether this is the process that talks to the user."""
    import os

    return os.environ.get("RANK", "0") == "0"
