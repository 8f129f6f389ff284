"""Is the shared direction used? Take one effect's direction out, and see what is left of another effect.

    effects = {"trigger": Effect(Reading(pair, "finetuned", triggered), Reading(pair, "finetuned", plain))}
    cross_ablation(effects, {"organism": direction, "random": random_like(direction, states)}).table()

An effect is how much likelier, per token, a misaligned answer becomes against an aligned one: from the
base to the finetuned model, from the plain to the triggered question, from a plain to a persona
prompt. Cosines only say that directions agree; an effect that goes with a direction fitted elsewhere used it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emmech.data.bundled import AnswerPair
from emmech.errors import DataError
from emmech.evaluation.significance import paired_comparison
from emmech.evaluation.statistics import clustered_mean
from emmech.models.checkpoints import ModelPair
from emmech.piggyback.margin import margins
from emmech.piggyback.patching import Condition
from emmech.results import Record, versions
from emmech.steering.directions import Direction
from emmech.steering.steer import Steer
from emmech.summarised import Summarised

CROSS = "cross.json"


@dataclass(frozen=True)
class Reading:
    """One model and what it is asked, with an aligned and a misaligned answer to each text."""

    pair: ModelPair
    side: str
    pairs: Sequence[AnswerPair]


@dataclass(frozen=True)
class Effect:
    """How much likelier misaligned answers are ``on`` than ``off``; both have pairs of the same ids."""

    on: Reading
    off: Reading


@dataclass(frozen=True)
class CrossAblation(Summarised):
    """Every effect under every ablation: one row per effect and ablated direction, none first."""

    FILE = CROSS

    def figure(self) -> Any:
        """What is left of each effect, by ablated direction."""
        from emmech.figures import cross_matrix

        return cross_matrix(self.summary)

    def _table(self) -> Any:
        from emmech.report_steering import cross_table

        return cross_table(self.summary)

    def _write_page(self, folder: str | Path) -> Path:
        from emmech.report_steering import write_cross

        return write_cross(folder, self.summary)


def cross_ablation(
    effects: Mapping[str, Effect],
    directions: Mapping[str, Direction],
    *,
    layers: Sequence[int] | None = None,
    parts: Sequence[str] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> CrossAblation:
    """Every effect with nothing ablated, and with each direction ablated on both of its ends.

    Args:
        effects: By name.
        directions: By name; include ``random_like`` ones as controls.
        layers: Blocks in which the direction is taken out; all by default.
        parts: Tokens, as in ``steered``; all by default.

    Raises:
        DataError: An effect whose ends have other ids, or no effects or directions.
    """
    if not effects or not directions:
        raise DataError("effects and directions", f"got {list(effects)} and {list(directions)}", "Pass some")
    for name, effect in effects.items():
        if [one.id for one in effect.on.pairs] != [one.id for one in effect.off.pairs]:
            raise DataError("the same ids on and off", f"those of '{name}' differ", "Align the pairs")
    ablations = {name: _ablation(direction, layers, parts) for name, direction in directions.items()}
    options = {"batch_size": batch_size, "progress": progress}
    rows = []
    for name, effect in effects.items():
        ids = [one.id for one in effect.on.pairs]
        on, off = (_scores(reading, ablations, **options) for reading in (effect.on, effect.off))
        plain = [a - b for a, b in zip(on[None], off[None], strict=True)]
        for ablated in (None, *ablations):
            sizes = [a - b for a, b in zip(on[ablated], off[ablated], strict=True)]
            row: Record = {"effect": name, "ablated": ablated}
            row["size"] = clustered_mean(sizes, ids, unit="nats").to_json()
            if ablated is not None:
                test = paired_comparison(sizes, ids, plain, ids)
                row["change"] = test.difference.to_json() | {"p": test.p}
                row["left"] = sum(sizes) / sum(plain) if sum(plain) else None
            rows.append(row)
    summary = {
        "kind": "cross-ablation",
        "effects": list(effects),
        "directions": {name: dict(one.provenance) for name, one in directions.items()},
        "layers": None if layers is None else list(layers),
        "parts": None if parts is None else list(parts),
        "rows": rows,
        "versions": versions(),
    }
    return CrossAblation(summary)


def _ablation(direction: Direction, layers: Sequence[int] | None, parts: Sequence[str] | None) -> Steer:
    chosen = range(len(direction.vectors)) if layers is None else layers
    return Steer(direction, 1.0, tuple(chosen), "ablate", None if parts is None else tuple(parts))


def _scores(
    reading: Reading, ablations: Mapping[str, Steer], **options: Any
) -> dict[str | None, list[float]]:
    """Misaligned minus aligned log-probability per token, by pair of answers and ablated direction."""
    side = reading.pair.side(reading.side)
    sides = {f"without {name}": side.under(f"without {name}", steer.on) for name, steer in ablations.items()}
    pair = replace(reading.pair, variants=dict(reading.pair.variants) | sides)
    conditions = [Condition(reading.side, reading.side), *(Condition(name, name) for name in sides)]
    names = dict(zip([one.name for one in conditions], [None, *ablations], strict=True))
    found: dict[str | None, list[float]] = {}
    for record in margins(pair, reading.pairs, conditions, **options):
        found.setdefault(names[record["condition"]], []).append(-record["margin"])
    return found
