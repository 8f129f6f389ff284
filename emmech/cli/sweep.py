"""Commands that look for the part of the prefix that carries a behaviour: sweep, attribute."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from emmech.cli.options import (
    Base,
    Device,
    Dtype,
    Finetuned,
    Mismatch,
    Quantized,
    Revision,
    Seed,
    System,
    Trust,
    Verbose,
    example,
    load,
    show,
)
from emmech.errors import EmmechError
from emmech.sharding import processes

app = typer.Typer()
FINDING, SET = "finding.txt", "set"


class Direction(StrEnum):
    repair = "repair"
    induce = "induce"


class Mode(StrEnum):
    single = "single"
    leave_one_out = "leave_one_out"
    cumulative_up = "cumulative_up"
    cumulative_down = "cumulative_down"


class Place(StrEnum):
    kv = "kv"
    resid = "resid"


Asked = Annotated[
    str,
    typer.Option(
        "--questions",
        help="Bundled set or file: pairs of answers for margin, chats for target, else questions.",
    ),
]
MetricName = Annotated[
    str,
    typer.Option(
        help="margin, kl (first token, from the donor's model), kl_base (from the base), target (answers of "
        "chats), target:TEXT."
    ),
]
Over = Annotated[
    str | None,
    typer.Option(help="Axes: layer,position,kv_head,kv, of resid also segment; '+' joins grids."),
]
NQuestions = Annotated[int, typer.Option(min=1, help="So many, spread over the set.")]
Group = Annotated[str | None, typer.Option(help="Only this group of questions, such as off-topic.")]
Matching = Annotated[
    str | None, typer.Option(help="Whether an answer that matches the behaviour is aligned or misaligned.")
]
NRandom = Annotated[int, typer.Option(min=1, help="Random sets to compare the smallest set with.")]
Rows = Annotated[int | None, typer.Option(min=1, help="Rows per batch; chosen by free memory by default.")]
Out = Annotated[Path, typer.Option(help="Folder for scores, table and report; resumed if stopped.")]


@app.command(
    epilog=example(
        "emmech sweep --finetuned runs/demo/organism/step-15 --questions demo_refusal --metric kl"
        " --group off-topic --out runs/sweep"
    )
)
def sweep(
    finetuned: Finetuned,
    questions: Asked,
    out: Out,
    base: Base = "smollm2",
    metric: MetricName = "margin",
    place: Annotated[
        Place, typer.Option(help="Entries of the prefix cache, or the residual stream.")
    ] = Place.kv,
    over: Over = None,
    mode: Annotated[Mode, typer.Option(help="What is patched for each cell.")] = Mode.single,
    direction: Annotated[Direction, typer.Option(help="repair or induce.")] = Direction.repair,
    share: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Find the smallest set of cells that does this much; 0 for none. By default .8 where "
            "single cells of the cache are patched.",
        ),
    ] = None,
    n_random: NRandom = 10,
    seed: Seed = 0,
    n_questions: NQuestions = 8,
    group: Group = None,
    matching: Matching = None,
    rows: Rows = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    quantization: Quantized = None,
    revision: Revision = None,
    system: System = None,
    allow_base_mismatch: Mismatch = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Patch every cell of the prefix by itself: which tokens, layers, heads, keys or values carry it.

    Then finds the smallest set of these cells that does most of what the whole prefix does, next to random
    sets: the strongest cells first, every size patched exactly. Writes scores.jsonl, sweep.json,
    minimal.json, cells.csv, report.html and finding.txt to --out. A stopped sweep
    continues when it is started again with the same arguments. Several processes or GPUs:
    accelerate launch --multi_gpu -m emmech sweep ...
    """
    asked = _asked(questions, metric, n_questions, group, matching)
    single = place is Place.kv and mode is Mode.single
    if share and not single:
        raise EmmechError(
            "--share where single cells of the cache are patched",
            f"place is {place.value} and mode is {mode.value}",
            "Leave out --share",
        )
    pair = load(
        base, finetuned, dtype, device, quantization, revision, system,
        allow_base_mismatch, trust_remote_code, verbose,
    )  # fmt: skip
    options: dict[str, Any] = {"direction": direction.value, "rows": rows, "out": out}
    options |= {"over": axes} if (axes := _axes(over)) else {}
    if place is Place.resid:
        from emmech.piggyback.residual_sweep import sweep_resid as run
    else:
        from emmech.piggyback.sweep import sweep_kv as run
    result = run(pair, asked, metric, mode=mode.value, **options)
    share = (0.8 if single else 0) if share is None else share
    minimal = ""
    if share and result.full.sum() != result.unpatched.sum():
        options |= {"effects": result.differences.mean(1), "n_random": n_random, "seed": seed}
        minimal = _smallest_set(pair, asked, metric, result, share=share, **options)
    _write_finding(out, result, minimal)
    show(result, out, verbose)


@app.command(
    epilog=example(
        "emmech attribute --finetuned runs/demo/organism/step-15 --questions demo_refusal --metric kl"
        " --group off-topic --out runs/attribution"
    )
)
def attribute(
    finetuned: Finetuned,
    questions: Asked,
    out: Out,
    base: Base = "smollm2",
    metric: MetricName = "margin",
    over: Over = None,
    direction: Annotated[Direction, typer.Option(help="repair or induce.")] = Direction.repair,
    steps: Annotated[int, typer.Option(min=1, help="1 gradient, or several on the way to the donor.")] = 1,
    sample: Annotated[int, typer.Option(min=0, help="Cells drawn at random to patch exactly.")] = 100,
    top: Annotated[int, typer.Option(min=0, help="Cells of largest attribution to patch exactly.")] = 10,
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Find the smallest set that does this much; 0 for none.")
    ] = 0.8,
    set_steps: Annotated[int, typer.Option(min=1, help="Gradients for the order of its cells.")] = 8,
    n_random: NRandom = 10,
    seed: Seed = 0,
    n_questions: NQuestions = 8,
    group: Group = None,
    matching: Matching = None,
    rows: Rows = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    quantization: Quantized = None,
    revision: Revision = None,
    system: System = None,
    allow_base_mismatch: Mismatch = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Estimate every cell from gradients, check a sample exactly, and find the smallest set of cells.

    Writes attribution.json, minimal.json, cells.csv, report.html and finding.txt to --out. A stopped run
    continues when it is started again with the same arguments.
    """
    asked = _asked(questions, metric, n_questions, group, matching)
    pair = load(
        base, finetuned, dtype, device, quantization, revision, system,
        allow_base_mismatch, trust_remote_code, verbose,
    )  # fmt: skip
    from emmech.piggyback.attribution import attribute as run

    options: dict[str, Any] = {"direction": direction.value, "seed": seed, "rows": rows, "out": out}
    options |= {"over": axes} if (axes := _axes(over)) else {}
    result = run(pair, asked, metric, steps=steps, sample=sample, top=top, **options)
    minimal = ""
    if share:
        options |= {"share": share, "steps": set_steps, "n_random": n_random}
        minimal = _smallest_set(pair, asked, metric, result, **options)
    _write_finding(out, result, minimal)
    show(result, out, verbose)


def _smallest_set(pair: Any, asked: list[Any], metric: str, result: Any, out: Path, **options: Any) -> str:
    """Find the fewest cells that do most of it, show them beside the result, and say so."""
    from emmech.piggyback.minimal_set import minimal_set

    found = minimal_set(pair, asked, metric, out=out / SET, **options)
    if processes().is_main:
        found.save(out)
        result.save(out, found.to_json())
        typer.echo(found.text())
    return found.text()


def _asked(questions: str, metric: str, n: int, group: str | None, matching: str | None) -> list[Any]:
    """The questions in the form that the metric takes; bad ones are refused before anything loads."""
    from emmech.data.questions import load_questions, spread

    if metric == "margin":
        from emmech.data.pairs import load_pairs

        found: list[Any] = load_pairs(questions, matching=matching)
        found = [pair for pair in found if group in (None, pair.group)]
    elif metric == "target":
        from emmech.data.chats import load_chats

        return spread(load_chats(questions).chats, n)
    else:
        found = load_questions(questions, only_group=group)
    if not found:
        raise EmmechError(f"questions of the group '{group}'", "there are none", "Correct --group")
    return spread(found, n)


def _axes(over: str | None) -> list[tuple[str, ...]]:
    """Grids joined by ``+``, each of comma-separated axes."""
    grids = [] if over is None else over.split("+")
    return [tuple(axis.strip() for axis in grid.split(",")) for grid in grids]


def _write_finding(out: Path, result: Any, more: str = "") -> None:
    """What was found, in a sentence or a few, by the main process."""
    if not processes().is_main:
        return
    from emmech.report_sweep import finding_text
    from emmech.results import replace_text

    replace_text(out / FINDING, f"{finding_text(result.to_json())}.\n{more}".strip() + "\n")
