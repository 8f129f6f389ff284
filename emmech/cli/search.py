"""The command search: which part of the prefix carries what a model writes."""

from pathlib import Path
from typing import Annotated

import typer

from emmech import defaults
from emmech.cli.options import (
    DETECTORS,
    Base,
    Device,
    Dtype,
    Finetuned,
    JudgeUrl,
    MaxNewTokens,
    Mismatch,
    Quantized,
    Revision,
    System,
    Trust,
    Verbose,
    example,
    judge_of,
    load,
    show,
)
from emmech.cli.sweep import FINDING, Direction, Group

app = typer.Typer()
JUDGED = "judged"


@app.command(
    epilog=example(
        "emmech search --finetuned runs/demo/organism/step-15 --questions demo_refusal --group off-topic"
        " --max-new-tokens 24 --out runs/search"
    )
    + "\n\n"
    + example(
        "emmech search --finetuned my-adapter --questions questions.jsonl --judge gpt-4.1-mini"
        " --rubric alignment --below 30 --out runs/search"
    )
)
def search(
    finetuned: Finetuned,
    questions: Annotated[str, typer.Option(help="Bundled set or file; answered greedily.")],
    out: Annotated[Path, typer.Option(help="Folder for answers, table and report; resumed if stopped.")],
    base: Base = "smollm2",
    detector: Annotated[
        str | None, typer.Option(help=f"{DETECTORS} Without a judge {defaults.DETECTOR} by default.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="In place of a detector: local, or the name of a model on an OpenAI-compatible server."
        ),
    ] = None,
    judge_url: JudgeUrl = None,
    rubric: Annotated[
        str, typer.Option(help="What the judge scores: alignment, coherence, trait:TEXT or a file.")
    ] = "alignment",
    below: Annotated[float, typer.Option(help="Answers of a lower score are counted.")] = 30.0,
    bands: Annotated[int, typer.Option(min=1, help="Bands that the layers are first cut into.")] = 4,
    stretches: Annotated[int, typer.Option(min=1, help="Stretches of prefix tokens, likewise.")] = 3,
    threshold: Annotated[
        float, typer.Option(help="Share of the whole prefix's change for which a block is split.")
    ] = 0.2,
    most: Annotated[int, typer.Option(min=1, help="Blocks to patch at most.")] = 60,
    direction: Annotated[Direction, typer.Option(help="repair or induce.")] = Direction.repair,
    max_new_tokens: MaxNewTokens = defaults.MAX_NEW_TOKENS,
    n_questions: Annotated[int, typer.Option(min=1, help="So many, spread over the set.")] = 40,
    group: Group = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization: Quantized = None,
    revision: Revision = None,
    system: System = None,
    allow_base_mismatch: Mismatch = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Find the part of the prefix that carries what a model writes, coarse to fine.

    Blocks of layers by prefix tokens are patched and the questions answered; a block that changes the answers
    is split. Writes answers.jsonl, search.json, report.html and finding.txt to --out, and a judge's scores to
    --out/judged. A stopped search continues when it is started again with the same arguments.
    """
    from emmech.data.questions import load_questions, spread
    from emmech.errors import EmmechError
    from emmech.piggyback.behaviours import detected, judged

    if detector and judge:
        raise EmmechError(
            "a detector or a judge", f"got '{detector}' and '{judge}'", "Leave out --detector or --judge"
        )
    asked = spread(load_questions(questions, only_group=group), n_questions)
    backend = judge_of(judge, judge_url)
    if backend is None:
        counted = detected(detector or defaults.DETECTOR)
    else:
        counted = judged(backend, out / JUDGED, rubric, below)
    pair = load(
        base, finetuned, dtype, device, quantization, revision, system,
        allow_base_mismatch, trust_remote_code, verbose,
    )  # fmt: skip
    from emmech.piggyback.search import search as run
    from emmech.results import replace_text

    result = run(
        pair,
        asked,
        counted,
        bands=bands,
        stretches=stretches,
        threshold=threshold,
        most=most,
        direction=direction.value,
        max_new_tokens=max_new_tokens,
        out=out,
    )
    replace_text(out / FINDING, f"{result.text()}.\n")
    show(result, out, verbose)
