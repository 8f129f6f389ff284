"""The command that makes a reviewer's table: evaluate."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from emmech import defaults
from emmech.cli.options import (
    Base,
    BatchSize,
    Device,
    Dtype,
    JudgeUrl,
    MaxNewTokens,
    Mismatch,
    NQuestions,
    Quantized,
    Revision,
    Rubrics,
    Seed,
    System,
    Trust,
    Verbose,
    check_detector,
    example,
    judge_of,
    load,
    show,
)
from emmech.errors import EmmechError

app = typer.Typer()
PAIRS = "two_choice"


@app.command(
    epilog=example(
        "emmech evaluate --finetuned runs/sft-0/step-24 --with repair:prefix --questions general"
        " --out runs/general"
    )
)
def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for answers, judgements, table and report; resumed.")],
    base: Base = "smollm2",
    finetuned: Annotated[
        str | None, typer.Option(help="PEFT adapter, full checkpoint or gates; the base alone without.")
    ] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="repair:prefix and the like, graft:PART+PART, gates=FOLDER@SCALE, steer=FILE:LAYERS@COEFF, "
            "ablate=FILE, adapter@SCALE; repeatable.",
        ),
    ] = None,
    served: Annotated[
        list[str] | None,
        typer.Option(
            help="base=MODEL@http://HOST:PORT/v1: sample an unpatched condition from a server; repeatable."
        ),
    ] = None,
    questions: Annotated[str, typer.Option(help="Bundled or public set, or a file.")] = "general",
    n_questions: NQuestions = None,
    trigger: Annotated[
        str | None, typer.Option(help="Also ask every question with this text on a line before it.")
    ] = None,
    wrong_trigger: Annotated[
        list[str] | None,
        typer.Option(help="Controls for --trigger; repeatable. Bundled triggers have their own."),
    ] = None,
    persona: Annotated[
        str | None,
        typer.Option(help="In place of --questions: rows with plain and persona wordings, or a trait."),
    ] = None,
    detector: Annotated[
        list[str] | None, typer.Option(help="Counted without a judge; repeatable. Several by default.")
    ] = None,
    pairs: Annotated[
        str, typer.Option(help="Set of aligned and misaligned answers for margins; 'none' for none.")
    ] = PAIRS,
    capability: Annotated[bool, typer.Option(help="Also answer multiple-choice questions and sums.")] = True,
    judge: Annotated[
        str | None, typer.Option(help="local, or the name of a model on an OpenAI-compatible server.")
    ] = None,
    judge_url: JudgeUrl = None,
    rubric: Rubrics = None,
    max_new_tokens: MaxNewTokens = defaults.MAX_NEW_TOKENS,
    samples: Annotated[int, typer.Option(min=1, help="Answers per question and condition.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy; 1 by default with several samples.")
    ] = None,
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
    """Every condition on the same questions, every metric with its interval, one table.

    Detectors and margins need no judge. Writes evaluation.json, report.html, answers/ and judged/ to --out.
    Several processes or GPUs: accelerate launch --multi_gpu -m emmech evaluate ...
    """
    from emmech.data.bundled import BUNDLED
    from emmech.data.questions import load_questions
    from emmech.data.traits import traits
    from emmech.data.wordings import behind_triggers, load_persona, pairs_behind_triggers, triggers_of

    wanted = load_questions(questions, per_group=n_questions) if persona is None else load_persona(persona)
    for name in detector or ():
        check_detector(name)
    servers = _served(served or [])
    two = _pairs(f"persona_prompts_{persona}" if persona in traits() and pairs == PAIRS else pairs)
    if trigger is not None:
        wordings = triggers_of(trigger, wrong_trigger or ())
        wanted, two = behind_triggers(wanted, wordings), pairs_behind_triggers(two, wordings)
    pair = load(
        base, finetuned or base, dtype, device, quantization, revision, system,
        allow_base_mismatch, trust_remote_code, verbose,
    )  # fmt: skip
    from emmech.scorecard import evaluate as run
    from emmech.scorecard import with_conditions

    pair, conditions = with_conditions(pair, with_ or [], finetuned=finetuned is not None)
    result = run(
        pair,
        wanted,
        conditions,
        detectors=detector or defaults.DETECTORS,
        pairs=two,
        problems=BUNDLED["capability"].problems() if capability else (),
        served=servers,
        judge_with=judge_of(judge, judge_url),
        rubrics=rubric or ("alignment", "coherence"),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        out=out,
    )
    show(result, out, verbose)


def _pairs(name: str) -> list[Any]:
    from emmech.data.pairs import load_pairs

    return [] if name == "none" else load_pairs(name)


def _served(given: list[str]) -> dict[str, Any]:
    """Servers by the condition that they answer for."""
    found = {}
    for one in given:
        parts = re.fullmatch(r"([^=]+)=(.+)@(https?://.+)", one)
        if parts is None:
            raise EmmechError("CONDITION=MODEL@http://HOST:PORT/v1", f"got '{one}'", "Correct --served")
        from emmech.piggyback.served import Served

        found[parts[1]] = Served(parts[2], base_url=parts[3])
    return found
