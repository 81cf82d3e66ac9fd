"""What commands print: one JSON document or aligned text, always to standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Wide enough that no id is ever cut or folded where a program reads the table.
_PIPE_WIDTH = 1000


def console() -> Console:
    """Standard output, at the terminal's width or unlimited in a pipe; text prints as it is, no markup."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def print_json(value: object, *, compact: bool = False) -> None:
    """Print `value` as JSON: indented, or on one line with `compact` (one document per line)."""
    text = json.dumps(value, ensure_ascii=False, indent=None if compact else 2)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], empty: str) -> None:
    """Print `rows` under the headings of `columns`, or the sentence `empty` if there are none.

    Args:
        rows: the JSON objects.
        columns: key to heading, in order; a column that no row fills is left out.
        empty: said (on standard error) instead of an empty table.
    """
    if not rows:
        print(empty, file=sys.stderr)
        return
    shown = {key: title for key, title in columns.items() if any(row.get(key) is not None for row in rows)}
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in shown.values():
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row.get(key))) for key in shown))
    console().print(table)


def print_fields(values: Mapping[str, Any]) -> None:
    """Print the members of an object, one per line."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in values.items():
        table.add_row(Text(key), Text(cell(value)))
    console().print(table)


def cell(value: object) -> str:
    """One value in a table."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (dict, list)):
        return printable(json.dumps(value, ensure_ascii=False))
    return printable(str(value))


def printable(text: str) -> str:
    """`text` on one line and without control characters: what users wrote must not steer the terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
