"""Commands of directions: direction, steer."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from emmech import defaults
from emmech.cli.options import (
    Base,
    BatchSize,
    Device,
    Dtype,
    MaxNewTokens,
    Mismatch,
    NQuestions,
    Quantized,
    Revision,
    Seed,
    System,
    Trust,
    Verbose,
    asked,
    check_detector,
    example,
    load,
    show,
)
from emmech.errors import EmmechError
from emmech.number_lists import parse_integers, parse_numbers

app = typer.Typer()

FinetunedOrNone = Annotated[
    str | None, typer.Option(help="PEFT adapter, full checkpoint or gates; the base alone without.")
]


class Between(StrEnum):
    sides = "sides"
    answers = "answers"
    trait = "trait"
    trigger = "trigger"


class SteerMode(StrEnum):
    add = "add"
    ablate = "ablate"
    clamp = "clamp"


class Fit(StrEnum):
    mean = "mean"
    logistic = "logistic"
    pca = "pca"


@app.command(
    epilog=example("emmech direction sides --finetuned runs/sft-0/step-24 --out runs/shift.safetensors")
)
def direction(
    between: Annotated[Between, typer.Argument(help="The two kinds of states that it separates.")],
    out: Annotated[Path, typer.Option(help="File to write, .safetensors; a table lies beside it.")],
    base: Base = "smollm2",
    finetuned: FinetunedOrNone = None,
    questions: Annotated[
        str, typer.Option(help="Of sides, trait and trigger: bundled or public set, or a file.")
    ] = "trait_questions",
    pairs: Annotated[
        str | None, typer.Option(help="Of answers: set of aligned and misaligned answers.")
    ] = None,
    trait: Annotated[
        str | None, typer.Option(help="Of trait: spiteful, sycophantic or hallucinatory.")
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="Of trigger: the text before the question.")] = None,
    site: Annotated[str, typer.Option(help="resid_pre, resid_post, attn_out or mlp_out.")] = "resid_post",
    position: Annotated[
        str | None,
        typer.Option(help="last, prompt, prefix, query, postfix or response; by what is separated."),
    ] = None,
    method: Annotated[Fit, typer.Option(help="How the direction is fitted.")] = Fit.mean,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization: Quantized = None,
    revision: Revision = None,
    system: System = None,
    allow_base_mismatch: Mismatch = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Fit a direction by block: base to finetuned, aligned to misaligned answers, a trait, a trigger.

    sides: the same questions read by both models. answers: the misaligned and the aligned answers of
    --pairs. trait: the model's answers under system prompts that elicit the trait and that suppress
    it. trigger: the questions with --trigger before them and without. The last three are read in
    the finetuned model, if there is one.
    """
    from emmech.data.pairs import load_pairs
    from emmech.data.questions import load_questions

    needed = {"sides": finetuned, "answers": pairs, "trait": trait, "trigger": trigger}[between.value]
    if needed is None:
        option = {"sides": "finetuned", "answers": "pairs"}.get(between.value, between.value)
        raise EmmechError(f"--{option} for a direction between {between.value}", "none is given", "Pass it")
    wanted = load_pairs(pairs) if between is Between.answers else load_questions(questions)
    prompts = _trait(trait)
    pair = load(
        base, finetuned or base, dtype, device, quantization, revision, system,
        allow_base_mismatch, trust_remote_code, verbose,
    )  # fmt: skip
    from emmech.steering.contrasts import between_answers, between_prompts, between_sides, with_trigger
    from emmech.steering.directions import fit_direction

    side = "base" if finetuned is None else "finetuned"
    where: dict[str, Any] = {"site": site} | ({} if position is None else {"position": position})
    if between is Between.sides:
        contrast = between_sides(pair, wanted, **where)
    elif between is Between.answers:
        contrast = between_answers(pair, wanted, side=side, site=site)
    elif between is Between.trait:
        contrast = between_prompts(pair, wanted, prompts.elicit, prompts.suppress, side=side, **where)
    else:
        contrast = with_trigger(pair, wanted, trigger or "", side=side, **where)
    found = fit_direction(*contrast, method=method.value, seed=seed)
    found.save(out)
    found.table()
    found.frame().to_json(out.with_suffix(".json"), orient="records", indent=1)
    typer.echo(f"Direction: {out}")


@app.command(
    epilog=example(
        "emmech steer runs/shift.safetensors --finetuned runs/sft-0/step-24 --data refusal"
        ' --layers 10,15,20 --coeffs="-2,-1,1" --out runs/steer'
    )
)
def steer(
    direction: Annotated[Path, typer.Argument(help="File that `emmech direction` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for answers, table and figure; resumed if stopped.")],
    base: Base = "smollm2",
    finetuned: FinetunedOrNone = None,
    layers: Annotated[
        str | None, typer.Option(help="Blocks, each steered alone; a spread of five by default.")
    ] = None,
    together: Annotated[bool, typer.Option("--together", help="Steer all --layers at once.")] = False,
    coeffs: Annotated[
        str, typer.Option(help="How often the shift is added, or which share is taken out.")
    ] = "-2,-1,-0.5,0.5,1,2",
    mode: Annotated[
        SteerMode, typer.Option(help="Add, project out, or hold at the base's level.")
    ] = SteerMode.add,
    parts: Annotated[
        str | None, typer.Option(help="Steer on these alone: prefix,query,postfix,response,last.")
    ] = None,
    data: Annotated[str, typer.Option(help="Bundled set whose questions and detector are used.")] = "refusal",
    questions: Annotated[str | None, typer.Option(help="Another set or file of questions.")] = None,
    detector: Annotated[str | None, typer.Option(help="Another detector.")] = None,
    n_questions: NQuestions = None,
    gates: Annotated[Path | None, typer.Option(help="Also these gates, inverted by half and whole.")] = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="Also the prefix patch and, of a LoRA pair, its scale.")
    ] = False,
    kl_from: Annotated[
        str | None, typer.Option(help="base or finetuned: from where the cost is taken; the untreated.")
    ] = None,
    max_new_tokens: MaxNewTokens = defaults.MAX_NEW_TOKENS,
    samples: Annotated[int, typer.Option(min=1, help="Answers per question.")] = 1,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization: Quantized = None,
    revision: Revision = None,
    system: System = None,
    allow_base_mismatch: Mismatch = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Steer along a direction at every coefficient and layer: behaviour against cost.

    The finetuned model is steered, or the base where there is none. With --methods and --gates other
    treatments of the finetuned model stand beside, at their own doses. Writes doses.json, report.html
    and answers/ to --out.
    """
    wanted, counted = asked(data, questions, detector, n_questions)
    check_detector(counted)
    chosen = parse_numbers(coeffs, "--coeffs")
    blocks = None if layers is None else parse_integers(layers, "--layers")
    if finetuned is None and (methods or gates):
        raise EmmechError("--finetuned", "--methods and --gates treat it", "Pass the finetuned model")
    from emmech.steering.directions import Direction

    along = Direction.load(direction)
    pair = load(
        base, finetuned or base, dtype, device, quantization, revision, system,
        allow_base_mismatch, trust_remote_code, verbose,
    )  # fmt: skip
    from emmech.steering.doses import compare_doses, other_doses, steering_doses

    on = "base" if finetuned is None else "finetuned"
    blocks = spread(len(along.vectors)) if blocks is None else blocks
    acts = None if parts is None else [part.strip() for part in parts.split(",")]
    doses = []
    for some in [blocks] if together else [(layer,) for layer in blocks]:
        doses += steering_doses(pair, along, chosen, layers=some, mode=mode.value, parts=acts, on=on)
    if methods or gates:
        doses += other_doses(pair, gates, patch=methods)
    result = compare_doses(
        pair,
        doses,
        wanted,
        untreated=on,
        kl_from=kl_from,
        detector=counted,
        max_new_tokens=max_new_tokens,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        out=out,
    )
    show(result, out, verbose)


def spread(n_layers: int) -> tuple[int, ...]:
    """Five blocks from a sixth of the depth to five sixths."""
    return tuple(dict.fromkeys(round(n_layers * sixth / 6) for sixth in range(1, 6)))


def _trait(name: str | None) -> Any:
    """The bundled trait of that name; None for none."""
    from emmech.data.traits import traits

    if name is None:
        return None
    if name not in traits():
        raise EmmechError(f"a trait among {', '.join(traits())}", f"got '{name}'", "Correct --trait")
    return traits()[name]
