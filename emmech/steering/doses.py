"""Steering, gates, adapter scaling and prefix patches side by side: behaviour against cost, dose by dose.

    doses = [*steering_doses(pair, direction, (1, 2, 4), layers=(14,)), *adapter_doses(pair, (0.5, 0, -0.5))]
    compare_doses(pair, doses, BUNDLED["refusal"].questions()).figure()

One lucky dose proves nothing: methods are compared along their doses, at equal cost.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from emmech import defaults
from emmech.data.bundled import BUNDLED
from emmech.data.chat_rows import Messages
from emmech.errors import PatchError
from emmech.gates.files import load_gates
from emmech.gates.gate import Gates, Gating
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding
from emmech.models.sides import Side
from emmech.piggyback.patching import Condition, KVPatch
from emmech.piggyback.treatments import N_ORDINARY, compare_treatments, ordinary_costs
from emmech.results import Record
from emmech.steering.directions import Direction
from emmech.steering.steer import Mode, Steer, scaled_adapter
from emmech.summarised import Summarised

DOSES = "doses.json"
FINETUNED = "finetuned"


@dataclass(frozen=True)
class Dose:
    """One way to treat a model, at one strength."""

    method: str
    dose: float | int
    condition: Condition
    side: Side | None = None
    """The variant that the condition names, if it is one."""


@dataclass(frozen=True)
class Doses(Summarised):
    """What each dose does and costs: one row per method, dose and group of questions."""

    FILE = DOSES

    def figure(self) -> Any:
        """Behaviour against cost, one line per method."""
        from emmech.figures import methods_at_cost

        return methods_at_cost(self.summary)

    def _table(self) -> Any:
        from emmech.report_steering import doses_table

        return doses_table(self.summary)

    def _write_page(self, folder: str | Path) -> Path:
        from emmech.report_steering import write_doses

        return write_doses(folder, self.summary)


def compare_doses(
    pair: ModelPair,
    doses: Sequence[Dose],
    questions: Iterable[Any],
    *,
    untreated: str = FINETUNED,
    kl_from: str | None = None,
    detector: str = defaults.DETECTOR,
    ordinary: Sequence[Messages] | None = None,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Doses:
    """The behaviour, how the answers read, and the cost at every dose of every method.

    Args:
        pair: From ``load_pair``.
        doses: From ``steering_doses``, ``gate_doses``, ``adapter_doses`` and ``patch_doses``.
        questions: As in ``patch_prefix``.
        untreated: The side that the doses treat.
        kl_from: The side from which KL is taken on ordinary answers; ``untreated`` by default. Repairs
            of a finetuned model are better judged from ``base``, where 0 is a whole repair.
        detector: The behaviour that is counted. Further arguments as in ``steer_gates``.

    Raises:
        PatchError: No doses, two of one name, or one that is impossible on this model.
        EmmechError: Questions or folder are refused, before any work.
    """
    by_name = {dose.condition.name: dose for dose in doses}
    if not doses or len(by_name) < len(doses):
        raise PatchError("doses, each once", f"got {[dose.condition.name for dose in doses]}", "Correct them")
    variants = {dose.side.name: dose.side for dose in doses if dose.side is not None}
    summary, _ = compare_treatments(
        replace(pair, variants=dict(pair.variants) | variants),
        questions,
        [dose.condition for dose in doses],
        untreated,
        kind="doses",
        settings={"doses": list(by_name), "untreated": untreated, "kl_from": kl_from or untreated},
        detector=detector,
        decoding=Decoding(max_new_tokens, defaults.temperature(None, samples), samples=samples, seed=seed),
        kl_from=kl_from or untreated,
        ordinary=ordinary,
        batch_size=batch_size,
        out=out,
        progress=progress,
    )
    for part in ("rows", "ordinary", "capability"):
        summary[part] = [_named(row, by_name.get(row["condition"])) for row in summary[part]]
    summary |= {"untreated": untreated, "kl_from": kl_from or untreated}
    result = Doses(summary)
    if out is not None:
        result.save(out)
    return result


def steering_doses(
    pair: ModelPair,
    direction: Direction,
    coeffs: Sequence[float | int],
    *,
    layers: Sequence[int],
    mode: Mode = "add",
    parts: Sequence[str] | None = None,
    on: str = FINETUNED,
    method: str | None = None,
) -> list[Dose]:
    """Steering by ``direction`` at several coefficients, in ``layers`` together; as ``steered``."""
    where = ",".join(map(str, layers)) if len(layers) < 4 else f"{min(layers)}..{max(layers)}"
    name = method or f"{mode} in {where}"
    acts = None if parts is None else tuple(parts)
    return [
        _variant(pair, on, name, coeff, Steer(direction, coeff, tuple(layers), mode, acts).on)
        for coeff in coeffs
    ]


def gate_doses(
    pair: ModelPair,
    gates: Gates,
    scales: Sequence[float | int],
    *,
    on: str = FINETUNED,
    method: str = "gates",
) -> list[Dose]:
    """Gates at several scales; -1 is inverted."""
    return [_variant(pair, on, method, scale, Gating(gates, scale).on) for scale in scales]


def adapter_doses(
    pair: ModelPair, scales: Sequence[float | int], *, method: str = "adapter scale"
) -> list[Dose]:
    """The finetuned model's LoRA update at several scales: 1 as trained, 0 the base, below 0 negated."""
    return [
        _variant(pair, FINETUNED, method, scale, partial(scaled_adapter, scale=scale)) for scale in scales
    ]


def patch_doses(
    pair: ModelPair,
    shares: Sequence[float | int] = (0.25, 0.5, 0.75, 1.0),
    *,
    method: str = "base prefix K/V",
) -> list[Dose]:
    """The base's prefix K and V in the lowest blocks of the finetuned model, for several shares of them."""
    n_layers = pair.base.config.num_hidden_layers
    made = []
    for share in shares:
        lowest = max(1, round(share * n_layers))
        patch = KVPatch(("prefix",), "base", layers=None if lowest == n_layers else tuple(range(lowest)))
        made.append(Dose(method, share, Condition(f"{method} at {share:g}", FINETUNED, (patch,))))
    return made


def other_doses(pair: ModelPair, gates: str | Path | None = None, *, patch: bool = True) -> list[Dose]:
    """What steering of the finetuned model is compared with: what the pair allows, at its usual doses.

    The base's prefix K and V, the scale of a LoRA adapter from amplified to negated, and inverted gates.

    Raises:
        GateError: The gates cannot be read or do not fit.
    """
    made: list[Dose] = []
    if patch:
        made += patch_doses(pair)
        if any(".lora_" in name for name, _ in pair.finetuned.module.named_parameters()):
            made += adapter_doses(pair, (1.5, 0.75, 0.5, 0.25, 0.0, -0.5))
    if gates is not None:
        made += gate_doses(pair, load_gates(gates, pair.base.module), (-0.5, -1.0))
    return made


@dataclass(frozen=True)
class Calibrated:
    """The dose whose cost is the one that was asked for."""

    dose: float | int
    kl: float
    """In nats per token of ordinary answers."""
    tried: tuple[tuple[float, float], ...]
    """Every (dose, kl) on the way."""


def calibrate(
    pair: ModelPair,
    make: Callable[[float | int], Dose],
    kl: float | int,
    *,
    untreated: str = FINETUNED,
    ordinary: Sequence[Messages] | None = None,
    tolerance: float | int = 0.05,
    most: float | int = 1024.0,
) -> Calibrated:
    """The positive dose at which a method costs ``kl`` on ordinary answers, so that methods can be compared.

    Args:
        make: From a dose to the treatment, as ``lambda c: steering_doses(pair, direction, [c], ...)[0]``.
        kl: KL(untreated ‖ treated), in nats per token.
        tolerance: Relative; the search doubles or halves from 1 and then bisects.
        most: The largest dose that is tried.

    Raises:
        PatchError: No dose up to ``most``, or down to 1 / ``most``, has this cost.
    """
    chats = BUNDLED["retain"].chats("test")[:N_ORDINARY] if ordinary is None else ordinary
    tried: list[tuple[float, float]] = []

    def cost(dose: float | int) -> float:
        one = make(dose)
        variants = dict(pair.variants) | ({} if one.side is None else {one.side.name: one.side})
        found = ordinary_costs(replace(pair, variants=variants), chats, [one.condition], untreated, False)
        tried.append((dose, sum(record["kl"] for record in found) / len(found)))
        return tried[-1][1]

    low, high = 0.0, 1.0
    while cost(high) < kl:
        low, high = high, 2 * high
        if high > most:
            raise PatchError(f"a dose that costs {kl:g} nats", f"{tried[-1]} is the largest", "Lower kl")
    if not low:
        while cost(low := (low or high) / 2) > kl:
            high = low
            if low < 1 / most:
                raise PatchError(f"a dose that costs {kl:g} nats", f"{tried[-1]} is the smallest", "Raise kl")
    while abs(tried[-1][1] - kl) > tolerance * kl and high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < kl else (low, middle)
    dose, found = min(tried, key=lambda one: abs(one[1] - kl))
    return Calibrated(dose, found, tuple(tried))


def _variant(pair: ModelPair, on: str, method: str, dose: float | int, intervention: Any) -> Dose:
    name = f"{method} at {dose:g}"
    return Dose(method, dose, Condition(name, name), pair.side(on).under(name, intervention))


def _named(row: Record, dose: Dose | None) -> Record:
    """A row with its method and dose in place of the condition; None of the untreated side."""
    rest = {key: value for key, value in row.items() if key != "condition"}
    return {"method": dose and dose.method, "dose": dose and dose.dose, **rest}
