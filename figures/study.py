"""What a study runs: organisms x methods x seeds, and the arguments of the `emmech` command of each job.

    study = read_study(yaml.safe_load(open("figures/study.yaml")))     # of figures.plan, which checks it
    study.finetune("agreeing", "treft", 0)                             # "treft --base=smollm2 --dataset=..."

Organisms are trained by every method with every seed; a section named for an analysis says what is then
done with which of them. Options have the names of the command's own.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from emmech.data.bundled import BUNDLED

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
SELECTING = ("organisms", "methods", "seeds")
"""Keys of a section that are no options: what of the study it is about, all by default."""


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
