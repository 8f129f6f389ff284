"""Options that commands share, and what they do with them."""

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from emmech.errors import EmmechError
from emmech.sharding import processes


class Quantization(StrEnum):
    four = "4bit"
    eight = "8bit"


Base = Annotated[
    str, typer.Option(help="Hub id, folder, or 'smollm2' (the embedded model).", show_default=True)
]
Finetuned = Annotated[str, typer.Option(help="PEFT adapter or full checkpoint: hub id or folder.")]
Questions = Annotated[
    Path,
    typer.Option(help="Bundled set, or JSONL, JSON, YAML, CSV, plain lines; a 'group' splits tables."),
]
NQuestions = Annotated[
    int | None, typer.Option(min=1, help="Of each group, spread over the set; all by default.")
]
Out = Annotated[Path, typer.Option(help="Folder for responses, summary and report; resumed if stopped.")]
DETECTORS = (
    "refusal, abstention, tool_call, agreement, short, length, spiteful, sycophantic, "
    "hallucinatory, contains:TEXT, regex:PATTERN. Unusual wordings are missed: "
    "emmech.evaluation.detectors says how many."
)
Detector = Annotated[str, typer.Option(help=DETECTORS)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length of the answers.")]
JudgeUrl = Annotated[str | None, typer.Option(help="Address of the judge's server; OpenAI's by default.")]
Rubrics = Annotated[
    list[str] | None,
    typer.Option(help="alignment, coherence, compliance, trait:TEXT or a file; repeatable."),
]
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


def example(command: str) -> str:
    """The last line of a command's help."""
    return f"[bold]Example:[/bold] {command}"


def parse_segments(text: str) -> tuple[Any, ...]:
    """Comma-separated chat segments.

    Raises:
        EmmechError: There are none, or one is unknown.
    """
    from emmech.chat import SEGMENTS

    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    if not chosen or not set(chosen) <= set(SEGMENTS):
        raise EmmechError(f"segments among {', '.join(SEGMENTS)}", f"got '{text}'", "Correct --segments")
    return chosen


def asked(
    data: str, questions: str | None, detector: str | None, n_questions: int | None
) -> tuple[list[Any], str]:
    """The questions and the detector that were given, or those of the bundled set ``data``.

    Raises:
        EmmechError: ``data`` has none of its own, or those given cannot be used.
    """
    from emmech.data.bundled import BUNDLED
    from emmech.data.questions import load_questions

    chosen = questions or data
    if questions is None and data not in BUNDLED:
        raise EmmechError("questions", f"the training set '{data}' has none of its own", "Pass --questions")
    counted = detector or (BUNDLED[chosen].detector if chosen in BUNDLED else None)
    if counted is None:
        raise EmmechError("a detector", f"'{chosen}' has none of its own", "Pass --detector")
    check_detector(counted)
    return load_questions(chosen, per_group=n_questions), counted


def check_detector(detector: str) -> None:
    """Refuse an unknown detector before anything loads."""
    from emmech.evaluation.detectors import detector as find

    find(detector)


def judge_of(name: str | None, url: str | None) -> Any:
    """The judge that is asked for; None where there is none."""
    if name is None:
        return None
    from emmech.evaluation.judges import EndpointJudge, LocalJudge

    return LocalJudge() if name == "local" else EndpointJudge(name, base_url=url)


def load(
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
    """The pair that the options choose; what the loader decided goes to stderr."""
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
    is_main = processes().is_main
    for note in pair.notes if is_main else ():
        typer.echo(f"note: {note}", err=True)
    if verbose and is_main:
        typer.echo(f"loaded in {time.monotonic() - started:.1f} s, peak {peak_memory()}", err=True)
    return pair


def peak_memory() -> str:
    """The most memory that this process has held, in words."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 2**30:.2f} GiB resident"


def show(result: Any, out: Path, verbose: bool) -> None:
    """Print a result's table, and where its report is."""
    if not processes().is_main:
        return
    result.table()
    if verbose:
        typer.echo(f"peak {peak_memory()}", err=True)
    typer.echo(f"Report: {out / 'report.html'}")
