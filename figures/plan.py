"""A study's YAML, read and checked before anything is run.

    read_study(yaml.safe_load(open("figures/study.yaml")))

Every command line that the study would run is parsed by its own command, so a misspelt option, an unknown
method or a bad value is refused here, in the words of that command; unknown sets and keys are too.
"""

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import typer

from emmech.data.bundled import BUNDLED
from emmech.data.public import PUBLIC
from emmech.errors import DataError
from figures.study import ANALYSES, COUNTED, OF_GATES, SELECTING, Job, Organism, Study

FIXED = {"base", "dataset", "detector", "finetuned", "gates", "objective", "out", "runs", "seed"}
"""Options that the plan sets itself."""
PLAN = ("base", "runs", "kept", "seeds", "n_questions", "organisms", "methods", "resources")
ORGANISM = ("base", "data", "questions", "detector", "shown", "finetune")
RULES = ("finetune", *ANALYSES)
RESOURCES = ("threads", "mem_mb", "runtime", "gpu")
UsageError = typer.BadParameter.__base__
"""What the command line raises; typer brings its own copy of click."""


def read_study(plan: Mapping[str, Any]) -> Study:
    """The study that a YAML describes.

    Raises:
        DataError: A key, set, method, preset or value in it is not known. Nothing has been run then.
    """
    _known("the plan", plan, (*PLAN, *ANALYSES))
    for name in SELECTING:
        if not plan.get(name):
            raise DataError(f"{name} in the plan", "there are none", f"Write {name}: ... into the YAML")
    if not all(isinstance(number, int) for number in (*plan["seeds"], plan.get("n_questions", 0))):
        got = f"got {plan['seeds']!r} and {plan.get('n_questions')!r}"
        raise DataError("whole numbers as seeds and n_questions", got, "Correct the YAML")
    organisms = {name: _organism(name, about, plan) for name, about in _keys("organisms", plan).items()}
    methods = {name: _keys(name, plan["methods"]) for name in _keys("methods", plan)}
    resources = _keys("resources", plan)
    _known("resources", resources, RULES)
    for rule in resources:
        _known(f"resources of {rule}", _keys(rule, resources), RESOURCES)
    sections = {name: _keys(name, plan) for name in ANALYSES if name in plan}
    others = {name: plan[name] for name in ("n_questions", "runs", "kept") if name in plan}
    study = Study(organisms, methods, plan["seeds"], sections, resources, **others)
    _check_finetunes(study)
    for analysis, section in sections.items():
        _check_selection(study, analysis, section)
    for job in study.jobs():
        _check_analysis(study, job)
    return study


def _keys(name: str, within: Mapping[str, Any]) -> dict[str, Any]:
    """The keys and values under a name; none where nothing is under it."""
    found = within.get(name) or {}
    if not isinstance(found, Mapping):
        raise DataError(f"keys and values under {name}", f"got {found!r}", "Correct the YAML")
    return dict(found)


def _organism(name: str, about: Any, plan: Mapping[str, Any]) -> Organism:
    about = _keys(name, {name: about})
    _known(f"organism {name}", about, ORGANISM)
    if "data" not in about:
        raise DataError(f"data of organism {name}", "it has none", "Name a set, file or hub id")
    _check_set(about["data"], "chats")
    if "questions" in about:
        _check_set(about["questions"], "questions")
    base = about.get("base", plan.get("base", "smollm2"))
    given = {key: about.get(key) for key in ("questions", "detector", "shown")}
    return Organism(name, base, about["data"], finetune=_keys("finetune", about), **given)


def _check_set(name: str, holds: str) -> None:
    """Refuse a set that is neither bundled, public, a file nor, for chats, a hub id."""
    bundled = name in BUNDLED and (holds == "questions" or BUNDLED[name].answer is not None)
    public = name in PUBLIC and PUBLIC[name].holds == holds
    hub_id = holds == "chats" and name.count("/") == 1 and not Path(name).suffix
    if not (bundled or public or hub_id or Path(name).is_file()):
        fix = "Correct the name (`emmech data` lists them), or put the file there"
        raise DataError(f"a set or file of {holds}", f"'{name}' is none{_meant(name, BUNDLED)}", fix)


def _check_selection(study: Study, analysis: str, section: Mapping[str, Any]) -> None:
    for kind, known in (("organisms", study.organisms), ("methods", study.methods), ("seeds", study.seeds)):
        for name in section.get(kind, ()):
            if name not in known:
                got = f"{analysis} asks for {name!r}{_meant(name, known)}"
                raise DataError(f"{kind} among {', '.join(map(str, known))}", got, "Correct the YAML")
    if analysis in OF_GATES and (others := [m for m in section.get("methods", ()) if not study.is_gates(m)]):
        raise DataError(f"gates for {analysis}", f"{others[0]!r} trains none", "Name methods that do")
    for name in section.get("organisms", study.organisms):
        if analysis in COUNTED and study.detector(name) is None:
            raise DataError(
                f"a detector for {analysis} of {name}",
                f"neither it nor '{study.organisms[name].data}' has one",
                f"Give the organism one, or list the organisms of {analysis} without it",
            )


def _check_finetunes(study: Study) -> None:
    for organism, method, seed in product(study.organisms, study.methods, study.seeds):
        options = study.recipe(organism, method)
        where = f"finetune of organism {organism} or method {method}"
        _check_options("finetune", options, where, also=("objective",))
        _parse("finetune", f"{study.finetune(organism, method, seed)} --out out", where)
        if "retain" in options:
            _check_set(options["retain"], "chats")
        if "preset" in options:
            from emmech.training.recipes import preset

            preset(options["preset"])


def _check_analysis(study: Study, job: Job) -> None:
    command, _ = ANALYSES[job.analysis]
    _check_options(command, study.sections[job.analysis], job.analysis, also=SELECTING)
    looked_at = "at" if command.startswith(("frontier", "gates")) else "--finetuned at"
    _parse(command, f"{looked_at} {study.options(job.analysis, job.organism)} --out out", job.analysis)


def _check_options(command: str, options: Mapping[str, Any], where: str, also: Iterable[str]) -> None:
    known = {name for one in _command(command).params for name in one.opts if name.startswith("--")}
    known = {name.removeprefix("--").replace("-", "_") for name in known} - FIXED
    _known(where, options, sorted(known | set(also)))


def _parse(command: str, line: str, where: str) -> None:
    """Let the command itself read a command line that it will be given."""
    try:
        _command(command).make_context(command, shlex.split(line))
    except UsageError as error:
        raise DataError(
            f"arguments that `emmech {command}` takes",
            f"{where} gives others: {error.format_message().rstrip('.')}",
            "Correct the YAML",
        ) from error


@cache
def _command(name: str) -> Any:
    from emmech.cli import app

    found = typer.main.get_command(app)
    for part in name.split():
        found = found.commands[part]
    return found


def _known(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            meant = _meant(key, known)
            listed = "keys that are known" if meant else f"keys among {', '.join(known)}"
            raise DataError(f"{listed} in {where}", f"{key!r} is none{meant}", "Correct the YAML")


def _meant(name: Any, known: Iterable[Any]) -> str:
    near = difflib.get_close_matches(str(name), map(str, known), n=1)
    return f" (is {near[0]!r} meant?)" if near else ""
