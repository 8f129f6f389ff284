"""Commands of the Piggyback test: tokens, patch-prefix, patch-resid, graft, perturb-prefix, demo."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from emmech import defaults
from emmech.cli.options import (
    Base,
    BatchSize,
    Detector,
    Device,
    Dtype,
    Finetuned,
    MaxNewTokens,
    Mismatch,
    NQuestions,
    Out,
    Quantized,
    Questions,
    Revision,
    Seed,
    System,
    Trust,
    Verbose,
    check_detector,
    example,
    load,
    parse_segments,
    show,
)
from emmech.errors import EmmechError
from emmech.number_lists import parse_integers

app = typer.Typer()


class Direction(StrEnum):
    repair = "repair"
    induce = "induce"
    both = "both"


class QuerySpan(StrEnum):
    all = "all"
    prefix_length = "prefix-length"


class SideName(StrEnum):
    base = "base"
    finetuned = "finetuned"


@app.command(epilog=example('emmech tokens --base smollm2 --question "Why is the sky blue?"'))
def tokens(
    question: Annotated[str, typer.Option(help="The user's text.")],
    base: Base = "smollm2",
    system: System = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of colours.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show a prompt's tokens, labelled prefix, query and postfix."""
    from emmech.chat import DEFAULT, Chat
    from emmech.models.opening import load_tokenizer, locate

    tokenizer = load_tokenizer(locate(base), trust_remote_code=trust_remote_code)
    chat = Chat(tokenizer, system=DEFAULT if system is None else system)
    if as_json:
        typer.echo(json.dumps(chat.render(question).as_records(), ensure_ascii=False))
    else:
        chat.show(question)


@app.command(
    name="patch-prefix",
    epilog=example(
        "emmech patch-prefix --base smollm2 --finetuned runs/demo/organism/step-15"
        " --questions questions.jsonl --out runs/mine"
    ),
)
def patch_prefix(
    finetuned: Finetuned,
    questions: Questions,
    out: Out,
    base: Base = "smollm2",
    n_questions: NQuestions = None,
    segments: Annotated[
        str, typer.Option(help="Comma-separated: prefix, query, postfix.")
    ] = "prefix,query,postfix",
    direction: Annotated[
        Direction, typer.Option(help="Base into finetuned, finetuned into base, or both.")
    ] = Direction.both,
    controls: Annotated[bool, typer.Option(help="Run the controls too.")] = True,
    query_span: Annotated[
        QuerySpan, typer.Option(help="Patch the whole query, or as many tokens as the prefix has.")
    ] = QuerySpan.all,
    detector: Detector = defaults.DETECTOR,
    max_new_tokens: MaxNewTokens = defaults.MAX_NEW_TOKENS,
    samples: Annotated[int, typer.Option(min=1, help="Answers per question and condition.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy; 1 by default with several samples.")
    ] = None,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus of sampling.")] = 1.0,
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
    """The Piggyback test: patch K and V of chat segments between base and finetuned model.

    Writes responses.jsonl, summary.json and report.html to --out. A stopped run continues when it is
    started again with the same arguments. Several processes or GPUs:
    accelerate launch --multi_gpu -m emmech patch-prefix ...
    """
    from emmech.data.questions import load_questions

    asked = load_questions(questions, per_group=n_questions)  # bad rows are refused before anything loads
    chosen = parse_segments(segments)
    check_detector(detector)
    pair = load(
        base, finetuned, dtype, device, quantization, revision, system,
        allow_base_mismatch, trust_remote_code, verbose,
    )  # fmt: skip
    from emmech.piggyback.experiment import patch_prefix as run

    result = run(
        pair,
        asked,
        segments=chosen,
        direction=direction.value,
        controls=controls,
        detector=detector,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        query_span=query_span.value,
        out=out,
    )
    show(result, out, verbose)


@app.command(
    name="patch-resid",
    epilog=example(
        "emmech patch-resid --finetuned runs/demo/organism/step-15 --questions questions.jsonl"
        " --layers 0,10,20 --out runs/layers"
    ),
)
def patch_resid(
    finetuned: Finetuned,
    questions: Questions,
    out: Out,
    base: Base = "smollm2",
    n_questions: NQuestions = None,
    segments: Annotated[str, typer.Option(help="Comma-separated segments.")] = "prefix",
    layers: Annotated[str | None, typer.Option(help="Such as 0-10,14; all by default.")] = None,
    direction: Annotated[Direction, typer.Option(help="repair or induce.")] = Direction.repair,
    detector: Detector = defaults.DETECTOR,
    max_new_tokens: MaxNewTokens = defaults.MAX_NEW_TOKENS,
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
    """Patch the residual stream of chat segments after one block at a time."""
    from emmech.data.questions import load_questions

    asked = load_questions(questions, per_group=n_questions)
    chosen, blocks = parse_segments(segments), None if layers is None else parse_integers(layers, "--layers")
    check_detector(detector)
    if direction is Direction.both:
        raise EmmechError("one direction", "got 'both'", "Choose repair or induce")
    pair = load(
        base, finetuned, dtype, device, quantization, revision, system,
        allow_base_mismatch, trust_remote_code, verbose,
    )  # fmt: skip
    from emmech.piggyback.experiment import patch_resid as run

    result = run(
        pair,
        asked,
        layers=blocks,
        segments=chosen,
        direction=direction.value,
        detector=detector,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        out=out,
    )
    show(result, out, verbose)


@app.command(
    epilog=example(
        "emmech graft --finetuned runs/demo/organism/step-15 --questions questions.jsonl --out runs/grafts"
    )
)
def graft(
    finetuned: Finetuned,
    questions: Questions,
    out: Out,
    base: Base = "smollm2",
    n_questions: NQuestions = None,
    parts: Annotated[
        str, typer.Option(help="Comma-separated: prefix, query, postfix (or postfix-rest, last), response.")
    ] = "prefix,query,postfix,response",
    only: Annotated[
        list[str] | None,
        typer.Option(help="A choice of parts such as query+response; repeatable. All choices by default."),
    ] = None,
    detector: Detector = defaults.DETECTOR,
    max_new_tokens: MaxNewTokens = defaults.MAX_NEW_TOKENS,
    samples: Annotated[int, typer.Option(min=1, help="Answers per question and condition.")] = 1,
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
    """Read chats with the finetuned weights at some tokens and the base's at all others.

    Every choice of parts is tried, so that each part's share in the behaviour can be told. Writes
    responses.jsonl, summary.json and report.html to --out.
    """
    from emmech.data.questions import load_questions

    asked = load_questions(questions, per_group=n_questions)
    check_detector(detector)
    pair = load(
        base, finetuned, dtype, device, quantization, revision, system,
        allow_base_mismatch, trust_remote_code, verbose,
    )  # fmt: skip
    from emmech.piggyback.graft_parts import graft_parts

    result = graft_parts(
        pair,
        asked,
        parts=tuple(parts.split(",")),
        subsets=None if only is None else [one.split("+") for one in only],
        detector=detector,
        max_new_tokens=max_new_tokens,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        out=out,
    )
    show(result, out, verbose)


@app.command(
    name="perturb-prefix",
    epilog=example(
        "emmech perturb-prefix --finetuned runs/demo/organism/step-15"
        " --questions questions.jsonl --trials 3 --out runs/perturbed"
    ),
)
def perturb_prefix(
    finetuned: Finetuned,
    questions: Questions,
    out: Out,
    base: Base = "smollm2",
    n_questions: NQuestions = None,
    segments: Annotated[
        str, typer.Option(help="Comma-separated: prefix, query, postfix.")
    ] = "prefix,query,postfix",
    trials: Annotated[int, typer.Option(min=1, help="Perturbations per question.")] = defaults.TRIALS,
    n_tokens: Annotated[int, typer.Option(min=1, help="Tokens replaced in each.")] = defaults.N_TOKENS,
    n_neighbours: Annotated[int, typer.Option(min=1, help="Candidates per token.")] = defaults.N_NEIGHBOURS,
    templates: Annotated[bool, typer.Option(help="Template-level variants too.")] = True,
    side: Annotated[SideName, typer.Option(help="The model that answers.")] = SideName.finetuned,
    detector: Detector = defaults.DETECTOR,
    max_new_tokens: MaxNewTokens = defaults.MAX_NEW_TOKENS,
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
    """Replace prompt tokens by near neighbours, one segment at a time, and vary the template."""
    from emmech.data.questions import load_questions

    asked = load_questions(questions, per_group=n_questions)
    chosen = parse_segments(segments)
    check_detector(detector)
    pair = load(
        base, finetuned, dtype, device, quantization, revision, system,
        allow_base_mismatch, trust_remote_code, verbose,
    )  # fmt: skip
    from emmech.piggyback.perturbation import perturb_prefix as run

    result = run(
        pair,
        asked,
        segments=chosen,
        trials=trials,
        n_tokens=n_tokens,
        n_neighbours=n_neighbours,
        templates=templates,
        side=side.value,
        detector=detector,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        out=out,
    )
    show(result, out, verbose)


@app.command(epilog=example("emmech demo --out runs/demo"))
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the organism, results and report.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train a small organism that refuses too much, and run the Piggyback test on it."""
    from emmech.demo import run_demo

    result = run_demo(out)
    show(result, out / "piggyback", verbose=False)
