"""Parts of the prefix cache, and the grids of them that a sweep goes through.

An entry of the prefix cache is one layer, prefix position, K/V head, and key or value. A cell is a
block of entries; a patch replaces the entries of some cells, or all the others.

    grid(("layer", "position", "kv"), Shape(30, 24, 3))      # 1,440 cells
    grid([("layer",), ("position",)], Shape(30, 24, 3))      # a union: 30 layers, then 24 positions
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool

from emmech.errors import PatchError

Axis = Literal["layer", "position", "kv_head", "kv"]
AXES: tuple[Axis, ...] = get_args(Axis)
KV = ("key", "value")
Mode = Literal["single", "leave_one_out", "cumulative_up", "cumulative_down"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Shape:
    """How many layers, prefix positions and K/V heads there are."""

    n_layers: int
    n_positions: int
    n_kv_heads: int

    def size(self, axis: Axis) -> int:
        """The number of places along an axis."""
        sizes = (self.n_layers, self.n_positions, self.n_kv_heads, len(KV))
        return dict(zip(AXES, sizes, strict=True))[axis]

    @property
    def n_entries(self) -> int:
        """Entries of the whole prefix cache."""
        return self.n_layers * self.n_positions * self.n_kv_heads * len(KV)


@dataclass(frozen=True)
class Cell:
    """The entries at all of these layers, positions and heads, of keys, values or both.

    Numbers count from 0; None is all of them.
    """

    layer: tuple[int, ...] | None = None
    position: tuple[int, ...] | None = None
    kv_head: tuple[int, ...] | None = None
    kv: tuple[int, ...] | None = None
    """0 for keys, 1 for values."""

    def mask(self, layer: int, shape: Shape) -> Bool[np.ndarray, "kv kv_head position"] | None:
        """True on the cell's entries in one layer; None where it has none there."""
        if self.layer is not None and layer not in self.layer:
            return None
        mask = np.zeros((len(KV), shape.n_kv_heads, shape.n_positions), dtype=bool)
        axes = (self.kv, self.kv_head, self.position)
        mask[np.ix_(*(range(n) if a is None else a for a, n in zip(axes, mask.shape, strict=True)))] = True
        return mask

    def coordinates(self) -> dict[str, Any]:
        """Where the cell is, by axis: a number, ``key`` or ``value``, "0-3", or None for all."""
        named = {axis: getattr(self, axis) for axis in AXES}
        kv = self.kv and tuple(KV[one] for one in self.kv)
        return {axis: _brief(chosen) for axis, chosen in (named | {"kv": kv}).items()}

    def text(self) -> str:
        """As in "layer 3, position 7, key"."""
        parts = (
            str(at) if axis == "kv" else f"{axis.replace('kv_', '')} {at}"
            for axis, at in self.coordinates().items()
            if at is not None
        )
        return ", ".join(parts) or "everything"


@dataclass(frozen=True)
class Patch:
    """Which entries of the recipient's prefix cache become the donor's."""

    cells: tuple[Cell, ...]
    complement: bool = False
    """The entries of no cell, in place of those of any."""

    def mask(self, layer: int, shape: Shape) -> Bool[np.ndarray, "kv kv_head position"] | None:
        """True on the entries to replace in one layer; None where there are none."""
        masks = [mask for cell in self.cells if (mask := cell.mask(layer, shape)) is not None]
        if not self.complement:
            return np.logical_or.reduce(masks) if masks else None
        if not masks:
            return Cell().mask(layer, shape)
        rest = ~np.logical_or.reduce(masks)
        return rest if rest.any() else None


NOTHING, EVERYTHING = Patch(()), Patch((Cell(),))


@dataclass(frozen=True, eq=False)
class Entries:
    """Any entries at all, as one mask: a patch made of many cells."""

    chosen: Bool[np.ndarray, "layer kv kv_head position"]

    @classmethod
    def of(cls, cells: Iterable[Cell], shape: Shape) -> "Entries":
        """The entries of any of these cells."""
        chosen = np.zeros((shape.n_layers, len(KV), shape.n_kv_heads, shape.n_positions), dtype=bool)
        for cell in cells:
            for layer in range(shape.n_layers) if cell.layer is None else cell.layer:
                chosen[layer] |= cell.mask(layer, shape)
        return cls(chosen)

    def mask(self, layer: int, _: Shape) -> Bool[np.ndarray, "kv kv_head position"] | None:
        """True on the entries to replace in one layer; None where there are none."""
        return self.chosen[layer] if self.chosen[layer].any() else None


def grid(over: Any, shape: Shape) -> list[Cell]:
    """The cells that ``over`` names: axes for their product, several such for a union, or cells.

    Raises:
        PatchError: An unknown axis, a cell outside the cache, or nothing at all.
    """
    over = (over,) if isinstance(over, str | Cell) else tuple(over)
    if over and all(isinstance(one, str) for one in over):
        cells = _product(over, shape)
    elif all(isinstance(one, Cell) for one in over):
        cells = list(over)
    else:
        cells = [cell for one in over for cell in grid(one, shape)]
    if not cells:
        raise PatchError("cells to patch", "there are none", f"Name axes among {', '.join(AXES)}")
    for cell in cells:
        _refuse_outside(cell, shape)
    return cells


def patches(cells: Sequence[Cell], mode: Mode | str, shape: Shape) -> list[Patch]:
    """What is replaced for each cell of a grid under a mode.

    ``single`` the cell, ``leave_one_out`` everything else, ``cumulative_up`` the cell in its layer and
    all below, ``cumulative_down`` in its layer and all above.

    Raises:
        PatchError: An unknown mode, or a cumulative one over cells that are not of one layer each.
    """
    if mode == "single":
        return [Patch((cell,)) for cell in cells]
    if mode == "leave_one_out":
        return [Patch((cell,), complement=True) for cell in cells]
    if mode not in MODES:
        raise PatchError(f"a mode among {', '.join(MODES)}", f"got {mode!r}", "Correct it")
    if any(cell.layer is None or len(cell.layer) != 1 for cell in cells):
        raise PatchError(
            f"cells of one layer each for mode {mode!r}", "some have none", "Add 'layer' to over"
        )
    made = []
    for cell in cells:
        (layer,) = cell.layer or ()
        layers = range(layer + 1) if mode == "cumulative_up" else range(layer, shape.n_layers)
        made.append(Patch((replace(cell, layer=tuple(layers)),)))
    return made


def _product(axes: Sequence[str], shape: Shape) -> list[Cell]:
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or len(set(axes)) < len(axes):
        raise PatchError(f"different axes among {', '.join(AXES)}", f"got {list(axes)}", "Correct them")
    named: list[Axis] = [axis for axis in AXES if axis in axes]
    places = product(*(range(shape.size(axis)) for axis in named))
    return [Cell(**{axis: (at,) for axis, at in zip(named, one, strict=True)}) for one in places]


def _refuse_outside(cell: Cell, shape: Shape) -> None:
    chosen: Mapping[Axis, tuple[int, ...] | None] = {axis: getattr(cell, axis) for axis in AXES}
    for axis, places in chosen.items():
        n = shape.size(axis)
        if places is not None and not (places and all(0 <= one < n for one in places)):
            raise PatchError(f"{axis} among 0..{n - 1}", f"got {places}", "Correct the cell")


def _brief(chosen: Iterable[Any] | None) -> Any:
    """One place as it is, a run as "3-7", others with commas."""
    if chosen is None:
        return None
    places = list(chosen)
    if len(places) == 1:
        return places[0]
    if all(isinstance(one, int) for one in places) and places == list(range(places[0], places[-1] + 1)):
        return f"{places[0]}-{places[-1]}"
    return ",".join(map(str, places))
