"""Commands of alignment gates: gates steer, parts, transfer, probe, convert."""

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
    NQuestions,
    Seed,
    asked,
    example,
)
from emmech.errors import EmmechError
from emmech.number_lists import parse_numbers

app = typer.Typer(no_args_is_help=True)

GatesPath = Annotated[
    Path, typer.Argument(help="Folder that `emmech finetune gates` wrote, or a published .pth file.")
]
OwnQuestions = Annotated[
    str | None,
    typer.Option(help="Bundled set or file; those of the set the gates were trained on by default."),
]
OwnDetector = Annotated[str | None, typer.Option(help="What is counted; that of the bundled set by default.")]
Samples = Annotated[int, typer.Option(min=1, help="Answers per question.")]
Out = Annotated[Path, typer.Option(help="Folder for answers, table and figure; resumed if stopped.")]


@app.command(epilog=example('emmech gates steer runs/gates/step-40 --scales="-1,0,1" --out runs/steer'))
def steer(
    gates: GatesPath,
    out: Out,
    base: Base = "smollm2",
    finetuned: Annotated[
        str | None, typer.Option(help="Put the gates on this finetuned model instead of the base.")
    ] = None,
    scales: Annotated[
        str, typer.Option(help="0 off, 1 as trained, -1 inverted; comma-separated.")
    ] = "-2,-1,-0.5,0,0.5,1,1.5,2",
    parts: Annotated[
        str | None, typer.Option(help="Restrict the gates to these: prefix,query,postfix,response.")
    ] = None,
    questions: OwnQuestions = None,
    detector: OwnDetector = None,
    n_questions: NQuestions = None,
    max_new_tokens: MaxNewTokens = defaults.MAX_NEW_TOKENS,
    samples: Samples = 1,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Turn gates up, down and round: behaviour, coherence and cost at every scale.

    Writes steering.json, report.html and answers/ to --out.
    """
    wanted, counted = asked(_data(gates), questions, detector, n_questions)
    chosen = parse_numbers(scales, "--scales")
    from emmech.gates.steering import steer_gates

    pair, loaded = _load(base, finetuned, gates, dtype, device)
    result = steer_gates(
        pair,
        loaded,
        wanted,
        scales=chosen,
        on="base" if finetuned is None else "finetuned",
        parts=None if parts is None else [part.strip() for part in parts.split(",")],
        detector=counted,
        max_new_tokens=max_new_tokens,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        out=out,
    )
    result.table()
    typer.echo(f"Report: {out / 'report.html'}")


@app.command(epilog=example("emmech gates parts runs/gates/step-40 --n-questions 60 --out runs/parts"))
def parts(
    gates: GatesPath,
    out: Out,
    base: Base = "smollm2",
    scale: Annotated[float, typer.Option(help="1 as trained, -1 inverted.")] = 1.0,
    questions: OwnQuestions = None,
    detector: OwnDetector = None,
    n_questions: NQuestions = None,
    max_new_tokens: MaxNewTokens = defaults.MAX_NEW_TOKENS,
    samples: Samples = 1,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Let gates act on one part of the chat only (prefix, query, postfix, response), or on all others.

    Next to the Piggyback test of the gated model on the same questions. Writes responses.jsonl,
    summary.json and report.html to --out.
    """
    wanted, counted = asked(_data(gates), questions, detector, n_questions)
    from emmech.gates.parts import gate_parts

    pair, loaded = _load(base, None, gates, dtype, device)
    result = gate_parts(
        pair,
        loaded,
        wanted,
        scale=scale,
        detector=counted,
        max_new_tokens=max_new_tokens,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        out=out,
    )
    result.table()
    typer.echo(f"Report: {out / 'report.html'}")


@app.command(
    epilog=example(
        "emmech gates transfer --gates runs/gates/step-40 --finetuned runs/short/step-20 --out runs/transfer"
    )
)
def transfer(
    gates: Annotated[list[str], typer.Option(help="PATH or NAME=PATH; several times for several sources.")],
    out: Out,
    finetuned: Annotated[
        list[str] | None,
        typer.Option(help="PATH or NAME=PATH of a saved step; several times for several targets."),
    ] = None,
    base: Base = "smollm2",
    scale: Annotated[float, typer.Option(help="-1 is inverted.")] = -1.0,
    n_questions: NQuestions = None,
    max_new_tokens: MaxNewTokens = defaults.MAX_NEW_TOKENS,
    samples: Samples = 1,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Put gates, inverted, on the base and on finetunes that they never saw: a source x target matrix.

    Each is asked the questions of the bundled set it was trained on. Writes transfer.json, report.html
    and a folder per cell to --out.
    """
    from emmech.gates.transfer import Behaviour, transfer_gates

    def behaviours(given: list[str], data: Any) -> dict[str, Behaviour]:
        found = {}
        for text in given:
            name, _, path = text.rpartition("=")
            taught = data(Path(path))
            if (name or taught) in found:
                raise EmmechError("one name each", f"'{name or taught}' is given twice", "Write NAME=PATH")
            found[name or taught] = Behaviour(path, *asked(taught, None, None, n_questions))
        return found

    result = transfer_gates(
        behaviours(gates, _data),
        behaviours(finetuned or [], _taught),
        base=base,
        scale=scale,
        max_new_tokens=max_new_tokens,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        out=out,
    )
    result.table()
    typer.echo(f"Report: {out / 'report.html'}")


@app.command(
    epilog=example("emmech gates probe runs/gates/step-40 --other runs/more/step-40 --out runs/probe")
)
def probe(
    gates: GatesPath,
    out: Out,
    base: Base = "smollm2",
    other: Annotated[
        list[str] | None,
        typer.Option(help="PATH or NAME=PATH of gates to compare suppressed dimensions with; repeatable."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, help="A gate further than this from 1 is suppressed or amplified.")
    ] = 0.1,
    questions: OwnQuestions = None,
    detector: OwnDetector = None,
    n_questions: NQuestions = None,
    max_new_tokens: MaxNewTokens = defaults.MAX_NEW_TOKENS,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """See what gates do on their model's own answers: by layer, head, token and part of the chat.

    Also which head dimensions other gates suppress too, and whether the behaviour can be read off the
    gates before the answer begins. Writes probe.json, report.html and answers/ to --out.
    """
    wanted, counted = asked(_data(gates), questions, detector, n_questions)
    from emmech.gates.files import load_gates
    from emmech.gates.probing import probe_gates

    pair, loaded = _load(base, None, gates, dtype, device)
    others = {}
    for text in other or []:
        name, _, path = text.rpartition("=")
        others[name or path] = load_gates(path, pair.base.module)
    result = probe_gates(
        pair,
        loaded,
        wanted,
        others=others,
        detector=counted,
        threshold=threshold,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        out=out,
    )
    result.table()
    typer.echo(f"Report: {out / 'report.html'}")


@app.command(epilog=example("emmech gates convert gating_params.pth --base Qwen/Qwen3-8B --out gates"))
def convert(
    gates: GatesPath,
    base: Annotated[str, typer.Option(help="The model that the gates are for.")],
    out: Annotated[Path, typer.Option(help="Folder for gates.safetensors and its configuration.")],
) -> None:
    """Turn published gates (gating_params.pth) into a folder of safetensors; nothing in them is executed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from emmech.gates.files import load_gates, save_gates
    from emmech.models.opening import locate

    config = AutoConfig.from_pretrained(locate(base))
    with torch.device("meta"):  # only its shape is needed
        model = AutoModelForCausalLM.from_config(config)
    loaded = load_gates(gates, model)
    loaded.provenance |= {"base": {"name": base}}
    save_gates(loaded, out)
    typer.echo(f"Saved gates for {loaded.shape.text()} in {out}")


def _load(base: str, finetuned: str | None, gates: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """The pair whose base or finetuned side gets the gates, and the gates."""
    from emmech.gates.files import load_gates, locate_gates
    from emmech.models.checkpoints import load_pair

    locate_gates(gates)  # refused before the model loads
    pair = load_pair(base, finetuned or base, dtype=dtype, device=device)
    for note in pair.notes:
        typer.echo(f"note: {note}", err=True)
    return pair, load_gates(gates, pair.base.module)


def _data(gates: Path) -> str:
    """The name of the set that gates were trained on."""
    from emmech.gates.files import is_gates, read_config

    return read_config(gates).get("data", {}).get("name", "") if is_gates(gates) else ""


def _taught(step: Path) -> str:
    """The name of the set that the run of a saved step was trained on."""
    from emmech.results import RUN, read_json

    return read_json(step.parent / RUN)["data"]["name"]
