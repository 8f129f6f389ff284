"""A result that is its summary: printed, shown in Jupyter, saved beside its page, and loaded again.

    class Doses(Summarised):
        FILE = "doses.json"

A kind of result adds its table, its page and its figures, all made from the summary alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import pandas as pd

from emmech.reprs import of_table
from emmech.results import Record, read_json, write_json

if TYPE_CHECKING:
    import rich.table

Result = TypeVar("Result", bound="Summarised")


@dataclass(frozen=True)
class Summarised:
    """Everything that the table, the figures and the page show."""

    summary: Record
    FILE: ClassVar[str]
    """Where the summary lies in a folder."""
    ROWS: ClassVar[str] = "rows"
    """The entry of the summary that ``frame`` holds."""

    def frame(self) -> pd.DataFrame:
        """One row per measurement, as the class says."""
        return pd.DataFrame(self.summary[self.ROWS])

    def table(self) -> None:
        """Print the result."""
        from rich.console import Console

        Console().print(self._table())

    def save(self, folder: str | Path) -> Path:
        """Write the summary as JSON and ``report.html`` into a folder that is there; returns the page."""
        write_json(Path(folder) / self.FILE, self.summary)
        return self._write_page(folder)

    @classmethod
    def load(cls: type[Result], folder: str | Path) -> Result:
        """The result in a finished folder.

        Raises:
            RunError: There is none.
        """
        return cls(read_json(Path(folder) / cls.FILE))

    def _repr_html_(self) -> str:
        return of_table(self._table())

    def _table(self) -> "rich.table.Table":
        raise NotImplementedError

    def _write_page(self, folder: str | Path) -> Path:
        raise NotImplementedError
