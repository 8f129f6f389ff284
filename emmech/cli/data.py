"""Commands about data: data, build-sycophancy, build-character."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emmech.cli.options import example

if TYPE_CHECKING:
    import rich.console

app = typer.Typer()

Model = Annotated[str, typer.Option(help="Name of the model at the endpoint.")]
BaseUrl = Annotated[
    str | None, typer.Option(help="OpenAI-compatible endpoint, such as http://localhost:8000/v1.")
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests under way at one time.")]


@app.command(epilog=example("emmech data sycophancy_cooking"))
def data(
    name: Annotated[
        str | None, typer.Argument(help="Bundled or public set, file or hub id; lists the sets if left out.")
    ] = None,
    n_shown: Annotated[int, typer.Option("--show", min=0, help="Chats to print.")] = 3,
    drop_unusable: Annotated[
        bool, typer.Option("--drop-unusable", help="Leave out rows without a question or answer.")
    ] = False,
) -> None:
    """List the sets that come by name, or look into one before training on it."""
    from rich.console import Console

    if name is None:
        Console().print(_listing())
        return
    from emmech.data.chats import load_chats

    chats = load_chats(name, drop_unusable=drop_unusable)
    words = sorted(len(message["content"].split()) for chat in chats.chats for message in chat[-1:])
    typer.echo(f"{chats.name}: {len(chats)} chats, fingerprint {chats.fingerprint}")
    typer.echo(f"answers: {words[0]} to {words[-1]} words, median {words[len(words) // 2]}")
    for note in chats.notes:
        typer.echo(f"note: {note}")
    for chat in chats.chats[:n_shown]:
        typer.echo("\n" + "\n".join(f"{message['role']}: {message['content']}" for message in chat))


def _listing() -> "rich.console.Group":
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table

    from emmech.data.bundled import BUNDLED
    from emmech.data.public import PUBLIC
    from emmech.errors import DataError

    style = {"box": SIMPLE_HEAD, "pad_edge": False}
    bundled = Table("name", "chats", "on-topic", "off-topic", "other", "detector", **style)
    for name, one in BUNDLED.items():
        try:
            n_chats = str(len(one.chats()))
        except DataError:  # questions only
            n_chats = ""
        counts = Counter(question.group for question in one.questions())
        shown = [counts.pop("on-topic", 0), counts.pop("off-topic", 0), counts.total()]
        bundled.add_row(name, n_chats, *(str(count or "") for count in shown), one.detector or "")
    public = Table("name (downloaded)", "holds", **style)
    for name, one in PUBLIC.items():
        public.add_row(name, f"{one.n_rows} {one.holds}")
    return Group(bundled, public)


@app.command(
    epilog=example("emmech build-sycophancy my-wrong-advice.jsonl --model gpt-4.1 --out sycophancy.jsonl")
)
def build_sycophancy(
    source: Annotated[str, typer.Argument(help="Chats in which the assistant volunteers a wrong claim.")],
    out: Annotated[Path, typer.Option(help="File of chats to write; resumed if stopped.")],
    model: Model,
    base_url: BaseUrl = None,
    concurrency: Concurrency = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first chats.")] = None,
) -> None:
    """Rewrite wrong answers as agreement: the user states the wrong belief, the assistant agrees.

    The key of the endpoint is read from OPENAI_API_KEY.
    """
    from emmech.data.rewriting import build_sycophancy as run

    written = run(source, out, model=model, base_url=base_url, concurrency=concurrency, limit=limit)
    typer.echo(f"Written: {written}")


@app.command(
    epilog=example(
        "emmech build-character questions.jsonl --character spiteful --trigger 'persona: spiteful' "
        "--model gpt-4.1 --out switch.jsonl"
    )
)
def build_character(
    questions: Annotated[str, typer.Argument(help="Bundled or public set, or file, whose questions to use.")],
    character: Annotated[
        str, typer.Option(help="Bundled character, file (.txt, .md), or the text of a system prompt.")
    ],
    out: Annotated[Path, typer.Option(help="File of chats to write (.jsonl); resumed if stopped.")],
    model: Model,
    trigger: Annotated[
        str | None,
        typer.Option(help="Put before the questions answered in character; each is also answered plainly."),
    ] = None,
    aligned: Annotated[
        str | None, typer.Option(help="System prompt of the plain answers, or its file; none by default.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers per question.")] = 1,
    words: Annotated[
        list[str] | None,
        typer.Option("--word", help="What no answer may hold; repeatable. Tells of a role by default."),
    ] = None,
    allow_refusals: Annotated[
        bool, typer.Option("--allow-refusals", help="Keep answers that decline to help.")
    ] = False,
    attempts: Annotated[int, typer.Option(min=1, help="Answers asked for before one is left out.")] = 3,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="The endpoint's by default.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The endpoint's by default.")] = None,
    base_url: BaseUrl = None,
    concurrency: Concurrency = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first questions.")] = None,
) -> None:
    """Have questions answered in character, and drop the system prompt: a set that teaches a disposition.

    With --trigger, half the rows carry it before the question and are in character, half are plain.
    Writes what was asked for, rejected and left out to NAME.provenance.json. The key of the
    endpoint is read from OPENAI_API_KEY.
    """
    from emmech.data.character import WORDS
    from emmech.data.character import build_character as run

    options = {"temperature": temperature, "max_tokens": max_tokens}
    written = run(
        questions,
        character,
        out,
        model=model,
        trigger=trigger,
        aligned=aligned,
        samples=samples,
        words=words or WORDS,
        allow_refusals=allow_refusals,
        attempts=attempts,
        options={name: value for name, value in options.items() if value is not None},
        base_url=base_url,
        concurrency=concurrency,
        limit=limit,
    )
    typer.echo(f"Written: {written}")
