"""The command line: parse, call one function, save. Nothing heavy is imported before it is needed."""

import json
import os
import sys
import time
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from emmech import defaults
from emmech.errors import EmmechError

app = typer.Typer(
    name="emmech",
    help="Find where a narrow finetune of a chat model carries its behaviour, and take it out again.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Direction(StrEnum):
    repair = "repair"
    induce = "induce"
    both = "both"


class QuerySpan(StrEnum):
    all = "all"
    prefix_length = "prefix-length"


class Quantization(StrEnum):
    four = "4bit"
    eight = "8bit"


class SideName(StrEnum):
    base = "base"
    finetuned = "finetuned"


Base = Annotated[
    str, typer.Option(help="Hub id, folder, or 'smollm2' (the embedded model).", show_default=True)
]
Finetuned = Annotated[str, typer.Option(help="PEFT adapter or full checkpoint: hub id or folder.")]
Questions = Annotated[
    Path,
    typer.Option(help="JSONL, JSON, YAML, CSV or plain lines; an optional 'group' splits tables."),
]
Out = Annotated[Path, typer.Option(help="Folder for responses, summary and report; resumed if stopped.")]
Detector = Annotated[
    str,
    typer.Option(help="refusal, abstention, tool_call, contains:TEXT, regex:PATTERN, length or none."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length of the answers.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling and of the random controls.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Questions per batch; chosen by free memory by default.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda:0, or a device_map such as 'balanced'.")]
Quantized = Annotated[Quantization | None, typer.Option(help="Load the weights in 4 or 8 bits.")]
Revision = Annotated[str | None, typer.Option(help="Hub revision of the base.")]
System = Annotated[
    str | None, typer.Option(help="System message of every chat; the template's own by default.")
]
Mismatch = Annotated[
    bool,
    typer.Option("--allow-base-mismatch", help="Accept an adapter that names another base."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code from the checkpoint's repository.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print loading time and peak memory.")]


def _example(command: str) -> str:
    return f"[bold]Example:[/bold] {command}"


@app.command(epilog=_example('emmech tokens --base smollm2 --question "Why is the sky blue?"'))
def tokens(
    question: Annotated[str, typer.Option(help="The user's text.")],
    base: Base = "smollm2",
    system: System = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of colours.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show a prompt's tokens, labelled prefix, query and postfix."""
    from emmech.chat import DEFAULT, Chat
    from emmech.models.checkpoints import load_tokenizer, locate

    tokenizer = load_tokenizer(locate(base), trust_remote_code=trust_remote_code)
    chat = Chat(tokenizer, system=DEFAULT if system is None else system)
    if as_json:
        typer.echo(json.dumps(chat.render(question).as_records(), ensure_ascii=False))
    else:
        chat.show(question)


@app.command(
    name="patch-prefix",
    epilog=_example(
        "emmech patch-prefix --base smollm2 --finetuned runs/demo/organism/step-15"
        " --questions questions.jsonl --out runs/mine"
    ),
)
def patch_prefix(
    finetuned: Finetuned,
    questions: Questions,
    out: Out,
    base: Base = "smollm2",
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
    started again with the same arguments.
    """
    from emmech.data.questions import load_questions

    asked = load_questions(questions)  # bad rows are refused before anything loads
    chosen = _segments(segments)
    _check(detector)
    pair = _load(
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
    _show(result, out, verbose)


@app.command(
    name="patch-resid",
    epilog=_example(
        "emmech patch-resid --finetuned runs/demo/organism/step-15 --questions questions.jsonl"
        " --layers 0,10,20 --out runs/layers"
    ),
)
def patch_resid(
    finetuned: Finetuned,
    questions: Questions,
    out: Out,
    base: Base = "smollm2",
    segments: Annotated[str, typer.Option(help="Comma-separated segments.")] = "prefix",
    layers: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
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

    asked = load_questions(questions)
    chosen, blocks = _segments(segments), None if layers is None else _integers(layers)
    _check(detector)
    if direction is Direction.both:
        raise EmmechError("one direction", "got 'both'", "Choose repair or induce")
    pair = _load(
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
    _show(result, out, verbose)


@app.command(
    name="perturb-prefix",
    epilog=_example(
        "emmech perturb-prefix --finetuned runs/demo/organism/step-15"
        " --questions questions.jsonl --trials 3 --out runs/perturbed"
    ),
)
def perturb_prefix(
    finetuned: Finetuned,
    questions: Questions,
    out: Out,
    base: Base = "smollm2",
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

    asked = load_questions(questions)
    chosen = _segments(segments)
    _check(detector)
    pair = _load(
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
    _show(result, out, verbose)


@app.command(epilog=_example("emmech demo --out runs/demo"))
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the organism, results and report.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train a small organism that refuses too much, and run the Piggyback test on it."""
    from emmech.demo import run_demo

    result = run_demo(out)
    _show(result, out / "piggyback", verbose=False)


def main() -> None:
    """Run a command; what the user can fix is one paragraph and exit code 2."""
    # Threads that spin for long while they wait slow a busy machine down many times over. Read
    # when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    warnings.filterwarnings("ignore", category=FutureWarning)  # between third parties, not for users
    try:
        code = app(standalone_mode=False) or 0  # typer returns what it makes of Exit and Ctrl-C
    except EmmechError as error:
        typer.secho(f"{type(error).__name__}: {error}", err=True, fg="red")
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except _usage_error() as error:
        error.show()
        sys.exit(2)
    if code == 130:
        typer.echo("Stopped. Start again with the same arguments to go on.", err=True)
    sys.exit(code)


def _usage_error() -> type[Exception]:
    """Typer's base of usage errors: click's, or that of the copy of click inside newer typers."""
    return next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _segments(text: str) -> tuple[Any, ...]:
    from emmech.chat import SEGMENTS

    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    if not chosen or not set(chosen) <= set(SEGMENTS):
        raise EmmechError(f"segments among {', '.join(SEGMENTS)}", f"got '{text}'", "Correct --segments")
    return chosen


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise EmmechError("comma-separated layers", f"got '{text}'", "Write --layers 0,5,10") from error


def _check(detector: str) -> None:
    from emmech.evaluation.detectors import detector as find

    find(detector)


def _load(
    base: str,
    finetuned: str,
    dtype: str,
    device: str,
    quantization: Quantization | None,
    revision: str | None,
    system: str | None,
    allow_base_mismatch: bool,
    trust_remote_code: bool,
    verbose: bool,
) -> Any:
    from emmech.chat import DEFAULT
    from emmech.models.checkpoints import load_pair

    started = time.monotonic()
    pair = load_pair(
        base,
        finetuned,
        dtype=dtype,
        device=device,
        quantization=None if quantization is None else quantization.value,
        revision=revision,
        system=DEFAULT if system is None else system,
        allow_base_mismatch=allow_base_mismatch,
        trust_remote_code=trust_remote_code,
    )
    for note in pair.notes:
        typer.echo(f"note: {note}", err=True)
    if verbose:
        typer.echo(f"loaded in {time.monotonic() - started:.1f} s, peak {_peak_memory()}", err=True)
    return pair


def _peak_memory() -> str:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 2**30:.2f} GiB resident"


def _show(result: Any, out: Path, verbose: bool) -> None:
    result.table()
    if verbose:
        typer.echo(f"peak {_peak_memory()}", err=True)
    typer.echo(f"Report: {out / 'report.html'}")


if __name__ == "__main__":
    main()
