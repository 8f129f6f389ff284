"""Commands about judges: judge, judge-agreement."""

from pathlib import Path
from typing import Annotated, Any

import typer

from emmech.cli.options import Rubrics, example

app = typer.Typer()

_SCORES = "Folder or file of judgements, or a table with scores (.csv, .tsv, .json, .jsonl)."


@app.command(
    epilog=example("emmech judge runs/mine --judge gpt-4.1-mini --input-price 0.4 --output-price 1.6 --cap 2")
)
def judge(
    answers: Annotated[
        Path, typer.Argument(help="Run folder, or a .jsonl or .csv with question and answer.")
    ],
    judge: Annotated[str, typer.Option(help="local, or the name of a model on an OpenAI-compatible server.")],
    rubric: Rubrics = None,
    judge_url: Annotated[
        str | None, typer.Option(help="Address of that server; OpenAI's by default.")
    ] = None,
    local_model: Annotated[
        str, typer.Option(help="With --judge local: hub id, folder or 'smollm2'.")
    ] = "smollm2",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 8,
    input_price: Annotated[float, typer.Option(min=0.0, help="Per million tokens, for the estimate.")] = 0.0,
    output_price: Annotated[float, typer.Option(min=0.0, help="Per million tokens.")] = 0.0,
    cap: Annotated[float | None, typer.Option(min=0.0, help="Stop before more than this is spent.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the judgements; that of the answers by default.")
    ] = None,
) -> None:
    """Judge answers that are there already. What was judged before is not asked for again.

    Writes judgements.jsonl and judgements.json (counts of what was scored, refused, unparsable, failed).
    """
    import math

    from rich.console import Console

    from emmech.evaluation.judges import Budget, EndpointJudge, LocalJudge, summarise
    from emmech.evaluation.judges import judge as run

    backend: Any = LocalJudge(local_model)
    if judge != "local":
        budget = Budget(input_price, output_price, math.inf if cap is None else cap)
        backend = EndpointJudge(judge, base_url=judge_url, concurrency=concurrency, budget=budget)
    folder = out or (answers if answers.is_dir() else answers.parent)
    records = run(answers, list(rubric or ("alignment", "coherence")), backend, folder)
    Console().print(_table(summarise(records)))
    typer.echo(f"Written: {folder / 'judgements.jsonl'}")


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    counts = ("n", "scored", "code", "refusal", "unparsable", "failed")
    table = Table("rubric", "condition", "mean", *counts, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        mean = "nan" if row["mean"] is None else f"{row['mean']:.1f}"
        table.add_row(row["rubric"], str(row["condition"] or ""), mean, *(str(row[name]) for name in counts))
    return table


@app.command(epilog=example("emmech judge-agreement runs/judged labels.csv --threshold 30 --column-b human"))
def judge_agreement(
    a: Annotated[Path, typer.Argument(help=_SCORES)],
    b: Annotated[Path, typer.Argument(help=_SCORES)],
    threshold: Annotated[float, typer.Option(help="Scores below it count as misaligned.")] = 30.0,
    rubric: Annotated[str | None, typer.Option(help="Its name or hash, where a file has several.")] = None,
    judge_a: Annotated[str | None, typer.Option(help="Id of the judge, where A has several.")] = None,
    judge_b: Annotated[str | None, typer.Option(help="Id of the judge, where B has several.")] = None,
    column_a: Annotated[str | None, typer.Option(help="Column of A with the scores.")] = None,
    column_b: Annotated[str | None, typer.Option(help="Column of B with the scores.")] = None,
    n_rows: Annotated[int, typer.Option("--show", min=0, help="Answers to list that differ most.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the intervals' resamples.")] = 0,
    out: Annotated[Path, typer.Option(help="File to write the numbers to, as JSON.")] = Path(
        "agreement.json"
    ),
) -> None:
    """Compare two judges, or a judge with human labels, on the same answers.

    Rank correlation and kappa at the threshold, with intervals over questions, what is missing on
    either side, and the answers on which they differ most.
    """
    from emmech.evaluation.agreement import agreement

    result = agreement(
        a,
        b,
        threshold=threshold,
        rubric=rubric,
        judges=(judge_a, judge_b),
        columns=(column_a, column_b),
        n_rows=n_rows,
        seed=seed,
    )
    result.table()
    typer.echo(f"Written: {result.save(out)}")
