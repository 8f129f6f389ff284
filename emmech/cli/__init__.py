"""The command line: parse, call one function, save. Nothing heavy is imported before it is needed."""

import os
import sys
import warnings

import typer

from emmech.cli import (
    data,
    doctor,
    evaluate,
    evaluation,
    gates,
    harness,
    models,
    patching,
    report,
    search,
    steering,
    sweep,
    training,
)
from emmech.errors import EmmechError
from emmech.sharding import n_started

app = typer.Typer(
    name="emmech",
    help="Find where a narrow finetune of a chat model carries its behaviour, and take it out again.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PARTS = (patching, sweep, search, training, steering, evaluate, evaluation, harness, report, data, doctor)
for part in PARTS:
    app.add_typer(part.app)
app.add_typer(models.app, name="models", help="Models that go by a short name: list them, get them.")
app.add_typer(gates.app, name="gates", help="Alignment gates: steer, transfer, see what they do.")

SHARED = ("finetune", "evaluate", "patch-prefix", "patch-resid", "perturb-prefix", "sweep", "attribute")
"""Commands whose work several processes share."""


def main() -> None:
    """Run a command; what the user can fix is one paragraph and exit code 2."""
    # Threads that spin for long while they wait slow a busy machine down many times over. Read
    # when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    warnings.filterwarnings("ignore", category=FutureWarning)  # between third parties, not for users
    try:
        _refuse_several(sys.argv[1:2])
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


def _refuse_several(command: list[str]) -> None:
    """Refuse to do the same thing in several processes that would write the same files."""
    if n_started() > 1 and command and command[0] not in SHARED:
        raise EmmechError(
            f"one process for '{command[0]}'", f"a launcher has started {n_started()}", "Start it by itself"
        )


def _usage_error() -> type[Exception]:
    """Typer's base of usage errors: click's, or that of the copy of click inside newer typers."""
    return next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
