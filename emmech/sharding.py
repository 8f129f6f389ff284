"""Work split over the processes that ``accelerate launch`` starts, and brought together again.

    ours = processes()
    mine = {unit: answer(unit) for unit in ours.share(units)}
    every = ours.together(mine)

All processes run the same code and end with the same results. Files are written and servers asked by the
main one, which tells the others what came of it. One process on its own does all of the work.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from emmech.errors import EmmechError
from emmech.results import read_json, write_json

PATIENCE = timedelta(days=7)
"""How long a process waits for another one's share; torch's own limit is some minutes."""
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work."""

    rank: int = 0
    count: int = 1
    device: str | None = None
    """Where the model of this process goes; None where it is alone and may choose."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def share(self, units: Sequence[T]) -> list[T]:
        """The units of this process: one of each ``count`` that follow one another.

        Its place among them moves on from round to round, so that no process gets all the units of one
        kind where kinds alternate.
        """
        return [unit for n, unit in enumerate(units) if (n + n // self.count) % self.count == self.rank]

    def together(self, mine: Mapping[Any, Any]) -> dict[Any, Any]:
        """What all processes have made, in each of them."""
        if self.count == 1:
            return dict(mine)
        from torch import distributed

        parts: list[Any] = [None] * self.count
        distributed.all_gather_object(parts, dict(mine))
        return {key: value for part in parts for key, value in part.items()}

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the main process, the only one that calls it.

        An error that the user can fix is raised in all processes, so that none waits for the others.
        """
        if self.count == 1:
            return make()
        from torch import distributed

        said: list[Any] = [None]
        if self.is_main:
            try:
                said = [make()]
            except EmmechError as error:
                said = [error]
        distributed.broadcast_object_list(said)
        if isinstance(said[0], EmmechError):
            raise said[0]
        return said[0]


def n_started() -> int:
    """How many processes a launcher has started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def processes() -> Processes:
    """The processes of this run; this one alone unless a launcher has started several."""
    count = n_started()
    if count == 1:
        return Processes()
    import torch
    from accelerate import PartialState

    # Without a GPU, accelerate sees several processes only where it is told that they run on CPUs.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    assert state.num_processes == count, f"accelerate sees {state.num_processes} of {count} processes"
    device = "cpu" if state.device.type == "cpu" else str(state.device)
    return Processes(state.process_index, count, device)


def kept(folder: Path | None, name: str, make: Callable[[], Any]) -> Any:
    """What is in the folder under ``name``, or what ``make`` returns, written there.

    All processes call ``make``, and share what it does.
    """
    if folder is None:
        return make()
    path, ours = folder / name, processes()
    if ours.from_main(lambda: not path.exists()):
        made = make()
        ours.from_main(lambda: write_json(path, made))
    return ours.from_main(lambda: read_json(path))
