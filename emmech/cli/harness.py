"""The command that runs lm-evaluation-harness on intervened models: harness."""

from pathlib import Path
from typing import Annotated

import typer

from emmech.cli.options import (
    Base,
    BatchSize,
    Device,
    Dtype,
    Mismatch,
    Quantized,
    Revision,
    Seed,
    System,
    Trust,
    Verbose,
    example,
    load,
)

app = typer.Typer()


@app.command(
    epilog=example(
        "emmech harness --finetuned runs/sft-0/step-24 --with repair:prefix --tasks mmlu --limit 50"
        " --out runs/mmlu"
    )
)
def harness(
    out: Annotated[Path, typer.Option(help="Folder for results; what is finished there is not run again.")],
    tasks: Annotated[str, typer.Option(help="Tasks, groups or tags of the harness, comma-separated.")],
    base: Base = "smollm2",
    finetuned: Annotated[
        str | None, typer.Option(help="PEFT adapter, full checkpoint or gates; the base alone without.")
    ] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option("--with", help="repair:prefix and the like, or gates=FOLDER@SCALE; repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task; all by default.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples per prompt; what each task says by default.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own.")] = None,
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
    """Tasks of lm-evaluation-harness (MMLU and others) under every condition: is capability kept?

    Needs the extra: pip install 'emmech[harness]'. Writes cells.jsonl and harness.json to --out.
    """
    from emmech.integrations.harness import HARNESS, run_harness
    from emmech.integrations.harness_tasks import load_tasks
    from emmech.scorecard import with_conditions

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    loaded = load_tasks(names, include_path, num_fewshot)
    pair = load(
        base, finetuned or base, dtype, device, quantization, revision, system,
        allow_base_mismatch, trust_remote_code, verbose,
    )  # fmt: skip
    pair, conditions = with_conditions(pair, with_ or [], finetuned=finetuned is not None)
    result = run_harness(pair, conditions, loaded, limit=limit, seed=seed, batch_size=batch_size, out=out)
    result.table()
    typer.echo(f"Results: {out / HARNESS}")
