"""The plan of a study: a YAML that is read, checked, and turned into arguments of `emmech` commands.

    snakemake -s figures/Snakefile -c2                                   figures/study.yaml
    snakemake -s figures/Snakefile -n --configfile figures/paper_scale.yaml

Organisms are trained by every method with every seed; a section named for an analysis (ANALYSES) says
what is then done with which of them. Options have the names of the command's own, and every command line
is parsed by that command before the first one starts.
"""

import difflib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import typer

from emmech.data.bundled import BUNDLED
from emmech.data.public import PUBLIC
from emmech.errors import DataError

ANALYSES = {
    "frontier": ("frontier", "frontier.json"),
    "piggyback": ("patch-prefix", "summary.json"),
    "evaluation": ("evaluate", "evaluation.json"),
    "sweep": ("sweep", "sweep.json"),
    "attribution": ("attribute", "attribution.json"),
    "steering": ("gates steer", "steering.json"),
    "probe": ("gates probe", "probe.json"),
}
"""Each analysis with its command, and the file with its result."""
COUNTED = ("frontier", "piggyback", "steering", "probe")
"""Analyses that ask the organism's own questions and count its detector."""
OF_GATES = ("steering", "probe")
FIXED = {"base", "dataset", "detector", "finetuned", "gates", "objective", "out", "runs", "seed"}
"""Options that the plan sets itself."""
SELECTING = ("organisms", "methods", "seeds")
PLAN = ("base", "runs", "kept", "seeds", "n_questions", "organisms", "methods", "resources")
ORGANISM = ("base", "data", "questions", "detector", "shown", "finetune")
RULES = ("finetune", *ANALYSES)
RESOURCES = ("threads", "mem_mb", "runtime", "gpu")
UsageError = typer.BadParameter.__base__
"""What the command line raises; typer brings its own copy of click."""


@dataclass(frozen=True)
class Organism:
    """A set that a model learns."""

    name: str
    base: str
    data: str
    questions: str | None
    detector: str | None
    shown: int | None
    """Step of training that analyses look at; None is the last."""
    finetune: Mapping[str, Any]
    """Options of its training; under the name of a method, those of that method alone."""


@dataclass(frozen=True)
class Job:
    """One run of an analysis; of all methods and seeds together where it has neither."""

    analysis: str
    organism: str
    method: str = ""
    seed: int = 0

    @property
    def place(self) -> str:
        """Its folder below the runs, and its kept file without the ending."""
        name = f"/{self.method}-{self.seed}" if self.method else ""
        return f"{self.organism}/{self.analysis}{name}"


@dataclass(frozen=True)
class Study:
    """Everything that is to be run; made by ``read_study``, which checks it."""

    organisms: Mapping[str, Organism]
    methods: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    sections: Mapping[str, Mapping[str, Any]]
    resources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    n_questions: int = 40
    runs: str = "runs/study"
    kept: str = "figures/results/study"

    def jobs(self) -> Iterator[Job]:
        """Every run of every analysis."""
        for analysis, section in self.sections.items():
            organisms = section.get("organisms", self.organisms)
            if analysis == "frontier":
                yield from (Job(analysis, organism) for organism in organisms)
            else:
                methods = section.get("methods", self._usual(analysis))
                seeds = section.get("seeds", self.seeds)
                yield from (Job(analysis, *one) for one in product(organisms, methods, seeds))

    def kept_files(self) -> list[str]:
        """What the repository keeps of the jobs."""
        return [f"{self.kept}/{job.place}.json" for job in self.jobs()]

    def finetune(self, organism: str, method: str, seed: Any) -> str:
        """Arguments of ``emmech finetune``, but for --out."""
        what, options = self.organisms[organism], self.recipe(organism, method)
        objective = options.pop("objective", method)
        fixed = {"base": what.base, "dataset": what.data, "seed": int(seed)}
        return shlex.join([objective, *_arguments(fixed | options)])

    def recipe(self, organism: str, method: str) -> dict[str, Any]:
        """Options of a finetune: the organism's, the method's, then the organism's for this method."""
        given = self.organisms[organism].finetune
        shared = {name: value for name, value in given.items() if name not in self.methods}
        return shared | dict(self.methods[method]) | dict(given.get(method) or {})

    def trained(self, organism: str, analysis: str) -> list[str]:
        """Folders of the finetunes that an analysis of all of them reads."""
        section = self.sections[analysis]
        names = product(section.get("methods", self.methods), section.get("seeds", self.seeds))
        return [f"{self.runs}/{organism}/train/{method}-{seed}" for method, seed in names]

    def options(self, analysis: str, organism: str) -> str:
        """Arguments of an analysis, but for what it looks at and --out."""
        what = self.organisms[organism]
        given = {k: v for k, v in self.sections[analysis].items() if k not in SELECTING}
        fixed: dict[str, Any] = {} if analysis == "frontier" else {"base": what.base}
        asks = f"{self.runs}/{organism}/questions.jsonl"
        if analysis in COUNTED:
            fixed |= {"questions": asks, "detector": self.detector(organism)}
        elif analysis != "evaluation":
            given = {"questions": asks} | given
        return shlex.join(_arguments(fixed | given))

    def asked(self, organism: str) -> str:
        """The set or file that an organism's questions come from."""
        return self.organisms[organism].questions or self.organisms[organism].data

    def detector(self, organism: str) -> str | None:
        """What is counted in an organism's answers."""
        known = BUNDLED.get(self.asked(organism))
        return self.organisms[organism].detector or (known.detector if known else None)

    def shown(self, organism: str) -> str:
        """Pattern of the step folder that analyses look at; the last that matches is meant."""
        step = self.organisms[organism].shown
        return "step-*" if step is None else f"step-{step}"

    def resource(self, rule: str, name: str, default: int) -> int:
        """What a rule needs of a resource."""
        return self.resources.get(rule, {}).get(name, default)

    def is_gates(self, method: str) -> bool:
        """Whether a method trains alignment gates."""
        return self.methods[method].get("objective", method) == "gates"

    def _usual(self, analysis: str) -> list[str]:
        """Methods that an analysis looks at when nothing is said."""
        return [name for name in self.methods if analysis not in OF_GATES or self.is_gates(name)]


def read_study(plan: Mapping[str, Any]) -> Study:
    """The study that a YAML describes.

    Raises:
        DataError: A key, set, method, preset or value in it is not known. Nothing has been run then.
    """
    _known("the plan", plan, (*PLAN, *ANALYSES))
    for name in ("organisms", "methods", "seeds"):
        if not plan.get(name):
            raise DataError(f"{name} in the plan", "there are none", f"Write {name}: ... into the YAML")
    organisms = {name: _organism(name, about or {}, plan) for name, about in plan["organisms"].items()}
    methods = {name: dict(options or {}) for name, options in plan["methods"].items()}
    resources = plan.get("resources") or {}
    _known("resources", resources, RULES)
    for rule, needs in resources.items():
        _known(f"resources of {rule}", needs, RESOURCES)
    sections = {name: dict(plan[name] or {}) for name in ANALYSES if name in plan}
    others = {name: plan[name] for name in ("n_questions", "runs", "kept") if name in plan}
    study = Study(organisms, methods, plan["seeds"], sections, resources, **others)
    _check_finetunes(study)
    for analysis, section in sections.items():
        _check_selection(study, analysis, section)
    for job in study.jobs():
        _check_analysis(study, job)
    return study


def _organism(name: str, about: Mapping[str, Any], plan: Mapping[str, Any]) -> Organism:
    _known(f"organism {name}", about, ORGANISM)
    if "data" not in about:
        raise DataError(f"data of organism {name}", "it has none", "Name a set, file or hub id")
    _check_set(about["data"], "chats")
    if "questions" in about:
        _check_set(about["questions"], "questions")
    base = about.get("base", plan.get("base", "smollm2"))
    given = {key: about.get(key) for key in ("questions", "detector", "shown")}
    return Organism(name, base, about["data"], finetune=about.get("finetune") or {}, **given)


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


def _arguments(options: Mapping[str, Any]) -> Iterator[str]:
    """Options as they are written in a shell."""
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            yield flag
        elif value is False:
            yield flag.replace("--", "--no-", 1)
        elif value is not None:
            for one in value if isinstance(value, list) else [value]:
                yield f"{flag}={one}"  # in one word: values may begin with a minus
