"""The figures of the claims on the 1.5B model; nothing here loads a model or torch."""

import textwrap
from collections.abc import Callable, Mapping, Sequence

import plotly.graph_objects as go

from emmech.figures import sweep_map
from emmech.results import Record
from figures.dots import dots
from figures.lines import lines
from figures.maps import map_of

Results = Mapping[str, Record]
Figures = list[go.Figure]
GENERAL = "general"
METRICS = {"kl": "first token's KL from the base", "margin": "margin"}


def along_training(results: Results) -> Figures:
    """What training does to general margins against those of its subject, and all groups at its end."""
    (result,) = results.values()
    rows = [row for row in result["rows"] if row["metric"] == "margin"]
    seeds = {row["organism"]: row["seed"] for row in rows}  # "all" comes last, where there are several
    mine = [row for row in rows if row["seed"] == seeds[row["organism"]]]
    series = {}
    for row in mine:
        if row["group"] == GENERAL:
            own = {
                r["group"]: r for r in mine if (r["organism"], r["step"]) == (row["organism"], row["step"])
            }
            series.setdefault(row["organism"], []).append((own[row["own"]]["versus"], row["versus"]))
    last = {row["organism"]: row["step"] for row in mine}
    ends = [row for row in mine if row["step"] == last[row["organism"]]]
    start = [("base", row["group"], row) for row in result.get("base", ()) if row["metric"] == "margin"]
    spread = lines(
        series,
        "change of the margin on questions of the trained kind (nats)",
        "change on general questions (nats)",
        "The further down at one place across, the further it spreads",
        "From the base, which is at 0; points are half of training and all. Below 0 the misaligned answer "
        "has become likelier. Bars are 95% intervals clustered by question.",
    )
    carried = [(row["organism"], "", row) for row in result["rows"] if row["metric"] == "carried over"]
    at_end = [*start, *((row["organism"], row["group"], row) for row in ends)]
    shares = [dots(carried, "change of general margins, over that of the trained kind", "share")]
    return [spread, dots(at_end, "margin", "nats"), *(shares if carried else [])]


def treated(results: Results) -> Figures:
    """What each condition changes in the margin, on general questions and on those of the own kind."""
    (result,) = results.values()
    rows = seeds_together([row for row in result["rows"] if row["metric"] == "margin"])
    figures = []
    for name in dict.fromkeys(row["organism"] for row in rows):
        mine = [row for row in rows if row["organism"] == name and row["group"] in (GENERAL, row["own"])]
        points = [(r["condition"], r["group"], r["versus"]) for r in mine if "versus" in r]
        figures.append(dots(points, f"{name}: change of the margin", "nats"))
    return figures


def seeds_together(rows: Sequence[Record]) -> list[Record]:
    """Of every organism and condition the row of all its seeds, where there is one."""
    pooled = {(row["organism"], row["condition"]) for row in rows if row["seed"] == "all"}
    return [row for row in rows if row["seed"] == "all" or (row["organism"], row["condition"]) not in pooled]


def perturbed(results: Results) -> Figures:
    """Margin behind perturbed prompts, on average and of the best trial."""
    (result,) = results.values()
    return [
        dots(
            [(r["condition"], r["side"], r) for r in result["rows"] if r["metric"] == metric], metric, "nats"
        )
        for metric in ("margin", "best margin")
    ]


def by_layer(results: Results) -> Figures:
    """What the base's residual stream changes, by block and segment."""
    (result,) = results.values()
    finding = f"{result['organism']}: residual stream of the base after one block"
    return [_curves(result["rows"], "segment", "layer", "change of the margin (nats)", finding)]


def by_cell(results: Results) -> Figures:
    """What the base's keys and values of the prefix change, by block and by token, and of both the map."""
    (result,) = results.values()
    curves = [
        _curves(
            found[axis], "kv", axis, f"change of the {METRICS[metric]} (nats)",
            f"K and V of the base in the prefix, by gradients and {axis}",
        )
        for metric, found in result["metrics"].items()
        for axis in ("layer", "position")
    ]  # fmt: skip
    maps = [
        map_of({"tokens": found["template"]}, found, found["map"], "attribution")
        for found in result["metrics"].values()
        if "map" in found
    ]
    return [*map(sweep_map, maps), *curves]


def _curves(rows: Sequence[Record], by: str, axis: str, what: str, finding: str) -> go.Figure:
    series: dict[str, list[tuple[int, Record]]] = {}
    for row in rows:
        series.setdefault(row[by], []).append((row[axis], row))
    return lines(series, axis, what, finding, "Bars are 95% intervals over questions.")


def agreement(results: Results) -> Figures:
    """Hand labels by condition, and the judge's rank correlation with them."""
    (result,) = results.values()
    found = [(name, row) for name, rows in result["organisms"].items() for row in rows]
    units = {row["metric"]: row["unit"] for _, row in found}
    figures = [
        dots(
            [(f"{name}, {r['condition']}", r["group"], r) for name, r in found if r["metric"] == metric],
            f"{metric}, by hand", unit,
        )
        for metric, unit in units.items()
    ]  # fmt: skip
    ranks = [
        (name, rubric, one["spearman"])
        for name, rubrics in result["agreement"].items()
        for rubric, one in rubrics.items()
    ]
    return [*figures, dots(ranks, "judge and hand", "Spearman")]


def by_intervention(results: Results) -> Figures:
    """Hand scores of every organism and of what is done to it, one figure a metric; seeds pooled."""
    (result,) = results.values()
    rows = [row for row in result["rows"] if row["organism"] == "base"]
    rows += [row for row in result["rows"] if "base" not in (row["organism"], row["condition"])]
    rows = seeds_together(rows)
    units = {row["metric"]: row["unit"] for row in rows}
    return [
        dots(
            [(called(row), row["group"], row) for row in rows if row["metric"] == metric],
            f"{metric}, by hand", unit,
        )
        for metric, unit in units.items()
    ]  # fmt: skip


def called(row: Record) -> str:
    """An organism and what is done to it, such as ``incorrect, prefix``."""
    seed = {"all": ", both seeds", 1: ", seed 1"}.get(row["seed"], "")
    name = row["organism"] + seed
    return name if row["condition"] in ("base", "finetuned") else f"{name}, {row['condition']}"


def answers_page(result: Record) -> str:
    """Every question and what each organism and intervention answers, as Markdown."""
    said: dict[str, list[str]] = {}
    for one in result["examples"]:
        answer = " ".join(one["answer"].replace("|", "/").split()) or "(nothing)"
        said.setdefault(one["question"], []).append(f"| {called(one)} | {answer} |")
    head = ["| | answer |", "|---|---|"]
    return "\n".join(
        line for question, rows in said.items() for line in (f"## {question}", "", *head, *rows, "")
    )


def examples(result: Record, shown: Sequence[str], group: str = GENERAL) -> str:
    """A Markdown table of answers: the base, and each organism as it is and with the base's prefix."""
    said = {
        (name, one["question"], one["condition"]): " ".join(one["response"].replace("|", "/").split())
        for name, several in result["examples"].items()
        for one in several
        if one["group"] == group
    }
    columns = [(shown[0], "base"), *((name, how) for name in shown for how in ("finetuned", "repair:prefix"))]
    titles = ["base", *(f"{name}{' + prefix' * ('repair' in how)}" for name, how in columns[1:])]
    table = [f"| question | {' | '.join(titles)} |", "|---" * (1 + len(columns)) + "|"]
    for question in dict.fromkeys(question for _, question, _ in said):
        cells = [
            textwrap.shorten(said[name, question, how], 160, placeholder=" ...") for name, how in columns
        ]
        table.append(f"| {question} | {' | '.join(cells)} |")
    return "\n".join(table)


DRAWINGS: dict[str, Callable[[Results], Figures]] = {
    "claims_advice": along_training,
    "claims_subjects": along_training,
    "claims_slow": along_training,
    "claims_character": along_training,
    "claims_sycophancy": along_training,
    "claims_prevent": along_training,
    "claims_repair": treated,
    "claims_perturb": perturbed,
    "claims_layers": by_layer,
    "claims_prefix": by_cell,
    "claims_labels": agreement,
    "claims_interventions": by_intervention,
}
"""Those of the other stages are drawn as the same results of the embedded model."""
