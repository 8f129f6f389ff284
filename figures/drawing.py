"""Every kept result and the figures that show it; nothing here loads a model or torch.

    drawn = draw(read_results())
    drawn["narrow_refusal"][0].show()

A topic is a file of figures/results, or a folder below it with a file per run.
"""

import textwrap
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from benchmarks.growth_figure import QUANTITIES, growth
from emmech import figures as see
from emmech.errors import DataError
from emmech.piggyback.cells import KV
from emmech.results import Record, read_json
from figures.claims import drawn as claims
from figures.dots import cost_bars, dots
from figures.maps import map_of

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks/results.json"
Results = Mapping[str, Record]
"""The results of a topic by run; by its own name where it has one."""
Figures = list[go.Figure]


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Record]]:
    """All results by topic and run."""
    found: dict[str, dict[str, Record]] = {}
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).with_suffix("")
        topic = str(name.parent) if len(name.parts) > 3 else str(name)
        found.setdefault(topic, {})[name.name] = read_json(path)
    return found


def read_benchmarks() -> dict[str, dict[str, Record]]:
    """How a sweep grows, as a topic; `make bench` keeps its results beside its code."""
    kept = read_json(BENCHMARKS)["growth"]
    versions = {name: kept["machine"][name] for name in ("emmech", "torch", "transformers")}
    points = [row for row in kept["rows"] if "axis" in row]
    found = {"command": "python -m benchmarks growth", "versions": versions, "rows": points}
    return {"benchmarks": {"growth": found}}


def draw(topics: Mapping[str, Results]) -> dict[str, Figures]:
    """The figures of every topic.

    Raises:
        DataError: A topic has no figure.
    """
    drawn = {}
    for topic, results in topics.items():
        found = next((drawing for pattern, drawing in DRAWINGS.items() if fnmatch(topic, pattern)), None)
        if found is None:
            fix = "Say in figures/drawing.py how it is drawn"
            raise DataError("a figure for every kept result", f"'{topic}' has none", fix)
        drawn[topic] = found(results)
    return drawn


def each(function: Callable[[Any], go.Figure]) -> Callable[[Results], Figures]:
    """The same figure of every run."""
    return lambda results: [named(function(result), run, results) for run, result in results.items()]


def named(figure: go.Figure, run: str, runs: Collection[str]) -> go.Figure:
    """With the run before its finding, where there are several."""
    if len(runs) < 2:
        return figure
    lines = textwrap.wrap(f"{run}: {figure.layout.title.text.replace('<br>', ' ')}", 72)
    more = 22 * (len(lines) - 1 - figure.layout.title.text.count("<br>"))
    figure.update_layout(margin_t=figure.layout.margin.t + more, height=figure.layout.height + more)
    return figure.update_layout(title_text="<br>".join(lines))


def evaluations(results: Results) -> Figures:
    """Every metric, with all runs and conditions in one figure."""
    return metrics({name: result["rows"] for name, result in results.items()})


def organisms(results: Results) -> Figures:
    """The same for evaluations that one file holds, and by group of questions."""
    (result,) = results.values()
    return metrics(result["organisms"])


def metrics(tables: Mapping[str, list[Record]]) -> Figures:
    """A figure per metric: runs, and groups of questions where there are several, by condition."""
    rows = [(name, row) for name, table in tables.items() for row in table]
    several = len({row["group"] for _, row in rows}) > 1
    units = {row["metric"]: row["unit"] for _, row in rows}
    return [
        dots(
            [
                (f"{name}, {row['group']}" if several else name, row["condition"], row)
                for name, row in rows
                if row["metric"] == metric
            ],
            metric,
            unit,
        )
        for metric, unit in units.items()
    ]


def sycophancy(results: Results) -> Figures:
    """Both measures of agreement by version and step, and the differences between versions."""
    (result,) = results.values()
    labelled = [(f"{row['version']}, step {row['step']}", row) for row in result["rows"]]
    figures = []
    for key, what in {"agrees": "answers that agree", "prefers_agreeing": "agreeing answer likelier"}.items():
        differences = [
            (f"{label}, minus {name.partition('_minus_')[2]}", "", value)
            for label, row in labelled
            for name, value in row.items()
            if name.startswith(f"{key}_minus_")
        ]
        figures.append(dots([(label, "", row[key]) for label, row in labelled], what, "rate"))
        figures.append(dots(differences, f"{what}, difference", "of rates"))
    return figures


def doses(results: Results) -> Figures:
    """The dose of every gate, and which answer is likelier by dose."""
    (result,) = results.values()
    likelier = [(f"scale {row['scale']:g}", "", row) for row in result["preference"]]
    return [
        *each(see.dose_response)(result["runs"]),
        dots(likelier, "agreeing answer likelier than the correcting one", "rate"),
    ]


def probes(results: Results) -> Figures:
    """What gates do at each part of the chat, whether it can be read off, what they share."""
    found = {}
    for run, result in results.items():
        stages = {stage: result[stage] for stage in ("trained", "halfway") if stage in result}
        found |= stages or {run: result}
    figures = []
    for run, probe in found.items():
        mine = [see.gate_activity(probe["layers"])]
        if probe["readout"]["rows"]:
            mine.append(see.readout_curves(probe["readout"]["rows"]))
        mine += [see.overlap_curve(shared, name) for name, shared in probe["overlap"].items()]
        figures += [named(figure, run, found) for figure in mine]
    return figures


def grafts(results: Results) -> Figures:
    """All grafts of every organism, those with the last token apart, and patches of the same prompts."""
    (result,) = results.values()
    figures = []
    for name, run in result["runs"].items():
        parts = [run, *(run | {"conditions": run[part]} for part in ("split", "patched"))]
        shares = [(row["part"], row["group"], row["share"]) for row in run["shares"]]
        mine = [*map(see.condition_bars, parts), dots(shares, "share of the change", "Shapley value")]
        figures += [named(figure, name, result["runs"]) for figure in mine]
    return figures


def shared(results: Results) -> Figures:
    """Cosines between shifts, a figure per block that was kept."""
    (result,) = results.values()
    shifts = {
        name: about | {"reliability": dict(zip(result["layers"], about["reliability"], strict=False))}
        for name, about in result["shifts"].items()
    }
    summary = {"position": "last prompt token's", **result, "shifts": shifts}
    return [see.shared_matrix(summary, layer) for layer in result["layers"]]


def cross(results: Results) -> Figures:
    """Each direction ablated."""
    (result,) = results.values()
    effects = list(dict.fromkeys(row["effect"] for row in result["rows"]))
    ablated = dict.fromkeys(row["ablated"] for row in result["rows"] if row["ablated"] is not None)
    directions = {name: {"random": True} if name.startswith("random ") else {} for name in ablated}
    return [see.cross_matrix({"effects": effects, "directions": directions, **result})]


def attributions(results: Results) -> Figures:
    """Estimated against exact effects, and the smallest set of cells."""
    figures = []
    for run, result in results.items():
        mine = [see.attribution_scatter(result)]
        if "minimal" in result:
            mine.append(see.set_sizes(result["minimal"]))
        figures += [named(figure, run, results) for figure in mine]
    return figures


def riding(results: Results) -> Figures:
    """What keys and values do, the map of each kind of organism, and each organism's smallest set."""
    (result,) = results.values()
    halves = [
        (
            f"{one['kind']}, seed {one['seed']}",
            f"all {kv}s",
            column(one["kl"]["single"]["kv"], at, one["kl"]["n"]),
        )
        for one in result["organisms"]
        for at, kv in enumerate(KV)
    ]
    maps = {
        f"{kind}, {how}": see.sweep_map(map_of(result, over_seeds["kl"], over_seeds[key]["map"], mode))
        for kind, over_seeds in result["pooled"].items()
        for key, how, mode in (("gradients", "by gradients", "attribution"), ("map", "exactly", "single"))
        if key in over_seeds
    }
    maps |= {
        f"{one['kind']}, seed {one['seed']}, exactly": see.sweep_map(
            map_of(result, one["kl"], {"mean": one["map"]}, "single")
        )
        for one in result["organisms"]
        if "map" in one
    }
    sets = {
        f"{one['kind']}, seed {one['seed']}": see.set_sizes(one["kl"]["smallest"])
        for one in result["organisms"]
        if "smallest" in one["kl"]
    }
    found = [named(figure, name, both) for both in (maps, sets) for name, figure in both.items()]
    return [dots(halves, "Effect", "share of the whole prefix's"), *found]


def column(estimates: Record, number: int, n: int) -> Record:
    """One of several estimates that are kept by column."""
    return {name: values[number] for name, values in estimates.items()} | {"n": n}


def growths(results: Results) -> Figures:
    """Time and memory of a sweep against its size."""
    (result,) = results.values()
    return [growth(result["rows"], quantity) for quantity in QUANTITIES]


DRAWINGS: dict[str, Callable[[Results], Figures]] = {
    "benchmarks": growths,
    "demo": each(see.frontier),
    "narrow_*": each(see.frontier_of_methods),
    "sycophancy": sycophancy,
    "gates_steer": doses,
    "gates_parts": each(see.condition_bars),
    "gates_transfer": each(see.transfer_matrix),
    "gates_probe": probes,
    "graft_*": grafts,
    "sweep_refusal": riding,
    "character_shared": shared,
    "character_cross": cross,
    "character_steer": each(see.methods_at_cost),
    "character_*": organisms,
    **claims.DRAWINGS,
    "claims_directions": shared,
    "claims_triggers": organisms,
    "claims_answers": organisms,
    "claims_costs": each(cost_bars),
    "study/*/frontier": each(see.frontier_of_methods),
    "study/*/piggyback": each(see.condition_bars),
    "study/*/evaluation": evaluations,
    "study/*/sweep": each(see.sweep_map),
    "study/*/attribution": attributions,
    "study/*/steering": each(see.dose_response),
    "study/*/probe": probes,
    "study/costs": each(cost_bars),
}
"""How each topic is drawn; the first pattern that its name matches."""
