"""How objects show themselves in Jupyter: small HTML without scripts or widgets, all text escaped.

    def _repr_html_(self) -> str:
        return of_table(results_table(self.summary))

Colours are those of the notebook, so that it reads in the dark too.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

MOST_ROWS = 20
_SOFT = 'style="opacity:.7;max-width:50em"'
_CELL = 'style="text-align:left;vertical-align:top"'
_TINTS = {"prefix": "0,114,178", "query": "222,143,5", "postfix": "0,158,115"}


def of_table(*tables: Table) -> str:
    """What the terminal shows, as HTML tables of ``MOST_ROWS`` at most."""
    return "".join(map(_one, tables))


def card(title: str, facts: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """A title, facts in two columns, and sentences."""
    rows = _rows((name, value) for name, value in facts.items() if value is not None)
    told = "".join(f"<div {_SOFT}>{_text(note)}</div>" for note in notes)
    return f"<div><b>{_text(title)}</b><table>{rows}</table>{told}</div>"


def of_tokens(segments: Mapping[str, Sequence[str]]) -> str:
    """Tokens with a bar between them, on one colour per segment of the prompt."""
    lines = []
    for name, texts in segments.items():
        shown = "|".join(map(_text, texts))
        look = f"background:rgba({_TINTS[name]},.2);font-family:monospace;padding:.1em .3em"
        count = _counted(len(texts), "token")
        lines.append(f'<div>{name} ({count})<br><span style="{look}">{shown}</span></div>')
    return "".join(lines)


def _one(table: Table) -> str:
    columns = [list(map(plain_cell, column.cells)) for column in table.columns]
    rows = list(zip(*columns, strict=True))
    head = "".join(f"<th {_CELL}>{_text(plain_cell(column.header))}</th>" for column in table.columns)
    title = f"<b>{_text(plain_cell(table.title))}</b>" if table.title else ""
    notes = [f"and {_counted(len(rows) - MOST_ROWS, 'more row')}"] if len(rows) > MOST_ROWS else []
    notes += [plain_cell(table.caption)] if table.caption else []
    told = "".join(f"<div {_SOFT}>{_text(note)}</div>" for note in notes)
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{_rows(rows[:MOST_ROWS])}</tbody></table>"
    return f"<div>{title}{body}{told}</div>"


def plain_cell(cell: Any) -> str:
    """The text of a cell of a terminal's table, without its markup."""
    return Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)


def _rows(rows: Iterable[Sequence[Any]]) -> str:
    return "".join(f"<tr>{''.join(f'<td {_CELL}>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _text(value: Any) -> str:
    return html.escape(str(value))
