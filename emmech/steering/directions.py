"""A direction per block that separates two kinds of states, and whether it is more than noise.

    direction = fit_direction(spiteful_states, kind_states)
    direction.save("spiteful.safetensors")

The two kinds may be answers under trait-eliciting and trait-suppressing system prompts, two sets of
answers, or one text read by the finetuned and by the base model. States of the same questions are
paired. ``mean`` is the mean difference (Chen et al. 2025, arXiv 2507.21509, for personas), ``logistic`` the
weights of a logistic probe, ``pca`` the first component of the differences. Whatever the method, a
vector is as long as the mean difference along it, so that steering by coefficient 1 makes the shift
that was found, once.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from emmech.errors import DataError
from emmech.reprs import of_table
from emmech.steering.states import Position, Site, States

Method = Literal["mean", "logistic", "pca"]
_FORMAT = 1
N_SPLITS = {"mean": 200, "pca": 50, "logistic": 10}
"""Random halves for the reliability; a logistic probe takes longer to fit."""


@dataclass(frozen=True, eq=False)
class Direction:
    """One vector per block, with what is known of it."""

    vectors: Float[Tensor, "layer d_model"]
    """As long as the mean difference along them."""
    level: Float[Tensor, " layer"]
    """Mean projection of the negative states on the unit vectors: what ``clamp`` sets."""
    site: Site
    position: Position
    method: Method
    n_questions: int
    reliability: tuple[float, ...]
    """Mean cosine of the directions of random halves of the questions, by block."""
    p: tuple[float, ...]
    """By block, of the length of the mean difference, when kinds are exchanged at random."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def unit(self, layer: int) -> Float[Tensor, " d_model"]:
        """The vector of a block, of length 1; zero where the two kinds do not differ."""
        return _normalised(self.vectors[layer])

    def fingerprint(self) -> str:
        """A hash of every value, which records of runs carry."""
        return hashlib.sha256(self.vectors.numpy().tobytes() + self.level.numpy().tobytes()).hexdigest()[:16]

    def frame(self) -> pd.DataFrame:
        """One row per block: length, reliability and p."""
        lengths = self.vectors.norm(dim=-1).tolist()
        columns = {"length": lengths, "reliability": self.reliability, "p": self.p}
        return pd.DataFrame({"layer": range(len(lengths)), **columns})

    def table(self) -> None:
        """Print the blocks."""
        from rich.console import Console

        from emmech.report_steering import direction_table

        Console().print(direction_table(self.frame(), self.n_questions))

    def _repr_html_(self) -> str:
        from emmech.report_steering import direction_table

        return of_table(direction_table(self.frame(), self.n_questions))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, what is known of the direction in its metadata; returns it."""
        from safetensors.torch import save_file

        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "format": _FORMAT,
            **{name: getattr(self, name) for name in _FIELDS},
            "provenance": dict(self.provenance),
        }
        tensors = {"vectors": self.vectors.contiguous(), "level": self.level.contiguous()}
        save_file(tensors, file, metadata={"emmech.direction": json.dumps(about)})
        return file

    @classmethod
    def load(cls, path: str | Path) -> "Direction":
        """A direction from ``save``.

        Raises:
            DataError: There is none, or it is damaged or of a later version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("emmech.direction", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(
                f"a direction in '{path}'", str(error).splitlines()[0], "Pass a file of Direction.save"
            ) from error
        if about is None or about["format"] != _FORMAT or set(tensors) != {"vectors", "level"}:
            raise DataError(
                f"a direction of format {_FORMAT} in '{path}'",
                f"it holds {sorted(tensors)}",
                "Pass a file of Direction.save",
            )
        known = {name: about[name] for name in _FIELDS} | {"provenance": about["provenance"]}
        known |= {name: tuple(known[name]) for name in ("reliability", "p")}
        return cls(**tensors, **known)


_FIELDS = ("site", "position", "method", "n_questions", "reliability", "p")


def fit_direction(
    positive: States,
    negative: States,
    *,
    method: Method = "mean",
    n_permutations: int = 2000,
    seed: int = 0,
) -> Direction:
    """The direction from ``negative`` to ``positive`` states, by block.

    Texts of one question are averaged first: questions are the sample. Where both kinds are of the
    same questions, their differences are taken question by question, and chance is the exchange of
    the two states of a question; else it is the exchange of whole questions between the kinds.

    Args:
        positive: States with the trait, or of the finetuned model.
        negative: Those without, or of the base.
        method: See the module.
        n_permutations: Exchanges for the p value, which is at least 1 / (1 + n_permutations).
        seed: Of halves and exchanges.

    Raises:
        DataError: Fewer than four questions, states of different sites or positions, or an unknown
            method.
    """
    kinds = _Kinds.of(positive, negative)
    if method not in get_args(Method):
        raise DataError(f"a method among {', '.join(get_args(Method))}", f"got '{method}'", "Correct it")
    if kinds.paired and not kinds.rows.any():
        raise DataError("two kinds of states that differ", "they are equal", "Read two conditions")
    rng = np.random.default_rng(seed)
    weights = kinds.weights(np.ones((1, kinds.n), dtype=bool))
    splits = kinds.halves(rng, N_SPLITS[method])
    exchanges = kinds.exchanges(rng, n_permutations)
    vectors, level, reliability, p = [], [], [], []
    for layer in range(positive.values.shape[1]):
        rows = kinds.rows[:, layer]
        gap = (weights @ rows)[0]
        unit = _unit(kinds, layer, method, np.ones(kinds.n, dtype=bool))
        vectors.append((gap @ unit) * unit)
        level.append(kinds.negative[:, layer].mean(0) @ unit)
        if method == "mean":
            reliability.append(mean_cosine(rows, *(kinds.weights(half) for half in splits)))
        else:
            halves = [[_unit(kinds, layer, method, one) for one in half] for half in splits]
            reliability.append(float(np.mean([a @ b for a, b in zip(*halves, strict=True)])))
        lengths = lengths_of(rows, exchanges)
        p.append(float((1 + (lengths >= lengths_of(rows, weights) * (1 - 1e-9)).sum()) / (1 + len(lengths))))
    return Direction(
        vectors=torch.tensor(np.stack(vectors), dtype=torch.float32),
        level=torch.tensor(np.array(level), dtype=torch.float32),
        site=positive.site,
        position=positive.position,
        method=method,
        n_questions=kinds.n,
        reliability=tuple(reliability),
        p=tuple(p),
        provenance={
            "positive": dict(positive.provenance),
            "negative": dict(negative.provenance),
            "paired": kinds.paired,
        },
    )


@dataclass(frozen=True, eq=False)
class _Kinds:
    """Both kinds of states by question: as differences where paired, else one below the other."""

    positive: Float[np.ndarray, "positive layer d_model"]
    negative: Float[np.ndarray, "negative layer d_model"]
    paired: bool

    @classmethod
    def of(cls, positive: States, negative: States) -> "_Kinds":
        for what in ("site", "position"):
            a, b = getattr(positive, what), getattr(negative, what)
            if a != b:
                raise DataError(f"states of one {what}", f"got '{a}' and '{b}'", "Read both alike")
        a, b = (states.by_question().double().numpy() for states in (positive, negative))
        ids_a, ids_b = (list(dict.fromkeys(states.ids)) for states in (positive, negative))
        paired = set(ids_a) == set(ids_b)
        if min(len(a), len(b)) < 4:
            raise DataError("at least four questions of each kind", f"got {len(a)} and {len(b)}", "Read more")
        if paired:
            b = b[[ids_b.index(one) for one in ids_a]]
        return cls(a, b, paired)

    @property
    def rows(self) -> Float[np.ndarray, "row layer d_model"]:
        """What weights over questions are applied to."""
        return self.positive - self.negative if self.paired else np.vstack([self.positive, self.negative])

    @property
    def n(self) -> int:
        return len(self.positive) if self.paired else len(self.positive) + len(self.negative)

    def weights(self, chosen: np.ndarray) -> Float[np.ndarray, "draw row"]:
        """Weights whose product with ``rows`` is the mean difference over the chosen questions."""
        if self.paired:
            return chosen / chosen.sum(-1, keepdims=True)
        m = len(self.positive)
        up, down = chosen[:, :m].astype(float), chosen[:, m:].astype(float)
        return np.hstack([up / up.sum(-1, keepdims=True), -down / down.sum(-1, keepdims=True)])

    def halves(self, rng: np.random.Generator, n_draws: int) -> tuple[np.ndarray, np.ndarray]:
        """Random halves of the questions, of each kind where they are not paired."""
        sizes = [self.n] if self.paired else [len(self.positive), len(self.negative)]
        first = np.hstack([random_halves(rng, n_draws, size) for size in sizes])
        return first, ~first

    def exchanges(self, rng: np.random.Generator, n_draws: int) -> Float[np.ndarray, "draw row"]:
        """Weights as if kinds had been assigned at random."""
        if self.paired:
            return rng.choice([-1.0, 1.0], size=(n_draws, self.n)) / self.n
        plain = self.weights(np.ones((1, self.n), dtype=bool))
        return rng.permuted(np.repeat(plain, n_draws, 0), axis=1)


def random_halves(rng: np.random.Generator, n_draws: int, size: int) -> np.ndarray:
    """Random halves of ``size`` questions, as masks of the first half."""
    chosen = np.zeros((n_draws, size), dtype=bool)
    chosen[:, : size // 2] = True
    return rng.permuted(chosen, axis=1)


def _unit(kinds: _Kinds, layer: int, method: Method, chosen: np.ndarray) -> Float[np.ndarray, " d_model"]:
    """The direction over the chosen questions, of length 1 and turned along the mean difference."""
    rows = kinds.rows[:, layer]
    gap = (kinds.weights(chosen[None]) @ rows)[0]
    if method == "mean":
        vector = gap
    elif method == "pca":
        mine = rows[chosen] if kinds.paired else rows[chosen] - rows[chosen].mean(0)
        vector = np.linalg.svd(mine, full_matrices=False)[2][0]
    else:
        vector = _probe(kinds, layer, chosen)
    length = np.linalg.norm(vector)
    return vector / (length or 1.0) * (1.0 if gap @ vector >= 0 else -1.0)


def _probe(kinds: _Kinds, layer: int, chosen: np.ndarray) -> Float[np.ndarray, " d_model"]:
    """Weights of scikit-learn's logistic regression, on states scaled to a common spread."""
    from sklearn.linear_model import LogisticRegression

    both = [kinds.positive, kinds.negative]
    parts = [chosen, chosen] if kinds.paired else np.split(chosen, [len(kinds.positive)])
    x = np.vstack([states[part, layer] for states, part in zip(both, parts, strict=True)])
    y = np.repeat([1, 0], [part.sum() for part in parts])
    spread = x.std()  # one scale for all dimensions, so that the direction is of the stream itself
    return LogisticRegression(max_iter=2000).fit(x / max(spread, 1e-12), y).coef_[0]


def lengths_of(rows: np.ndarray, weights: np.ndarray) -> Float[np.ndarray, " draw"]:
    """Lengths of weighted sums of rows, by way of the rows' products."""
    return np.sqrt(np.einsum("dr,rs,ds->d", weights, rows @ rows.T, weights, optimize=True).clip(0))


def mean_cosine(rows: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Mean cosine between two weighted sums of rows."""
    across = np.einsum("dr,rs,ds->d", first, rows @ rows.T, second, optimize=True)
    sizes = lengths_of(rows, first) * lengths_of(rows, second)
    return float(np.divide(across, sizes, out=np.zeros_like(across), where=sizes > 0).mean())


def _normalised(vectors: Float[Tensor, "*layer d_model"]) -> Float[Tensor, "*layer d_model"]:
    lengths = vectors.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths, 0.0)


def random_like(direction: Direction, states: States, seed: int = 0) -> Direction:
    """A control: a random direction drawn from the covariance of ``states``, as long as ``direction``.

    A direction of the model's own spread is a fairer control than one from all of space, most of which
    the model never uses.
    """
    rng = torch.Generator().manual_seed(seed)
    values = states.by_question()
    centred = values - values.mean(0)
    drawn = torch.einsum("q,qld->ld", torch.randn(len(centred), generator=rng), centred)
    unit = _normalised(drawn)
    n_layers = len(unit)
    return Direction(
        vectors=unit * direction.vectors.norm(dim=-1, keepdim=True),
        level=(values.mean(0) * unit).sum(-1),
        site=direction.site,
        position=direction.position,
        method=direction.method,
        n_questions=len(centred),
        reliability=(float("nan"),) * n_layers,
        p=(float("nan"),) * n_layers,
        provenance={"random": seed},
    )


def project(states: States, direction: Direction) -> pd.DataFrame:
    """Projections on the unit vectors, one row per text and block: ``question_id, layer, projection``.

    Raises:
        DataError: States and direction are of different sites.
    """
    if states.site != direction.site:
        raise DataError(
            f"states of site {direction.site}", f"got {states.site}", "Read them at the direction's site"
        )
    values = (states.values * _normalised(direction.vectors)).sum(-1)
    n_texts, n_layers = values.shape
    return pd.DataFrame(
        {
            "question_id": np.repeat(list(states.ids), n_layers),
            "layer": np.tile(np.arange(n_layers), n_texts),
            "projection": values.flatten().tolist(),
        }
    )


def cosines(directions: Mapping[str, Direction], layer: int) -> pd.DataFrame:
    """Cosines between directions in one block; for intervals and a null see ``shared_structure``."""
    units = torch.stack([one.unit(layer) for one in directions.values()])
    return pd.DataFrame((units @ units.T).numpy(), index=list(directions), columns=list(directions))


def as_layers(layers: Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    """The chosen blocks, all of them by default.

    Raises:
        DataError: One is not a block of the model, or none is chosen.
    """
    chosen = tuple(range(n_layers)) if layers is None else tuple(layers)
    if not chosen or not all(0 <= layer < n_layers for layer in chosen):
        raise DataError(f"layers among 0..{n_layers - 1}", f"got {list(chosen)}", "Correct them")
    return chosen
