"""A cluster on one screen: nodes, counts, and as many conversations as there is room for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from convener.cli.output import cell, printable

Row = Mapping[str, Any]

STATUSES: Final = (
    "recovering",
    "draining",
    "failed",
    "running",
    "starting",
    "waiting",
    "idle",
    "hibernated",
    "stopped",
)
"""What somebody may have to look at comes first."""

COLOURS: Final[Mapping[str, str]] = {
    "live": "green",
    "running": "green",
    "draining": "yellow",
    "suspended": "red",
    "recovering": "red",
    "failed": "red",
    "starting": "yellow",
    "waiting": "cyan",
    "buried": "dim",
}

# Heading, and the width of the screen from which on the column is shown.
NODE_COLUMNS: Final = (
    ("name", "NODE", 0),
    ("state", "STATE", 0),
    ("conversations", "CONV", 26),
    ("connections", "CLIENTS", 36),
    ("renewed", "RENEWED", 56),
    ("up", "UP", 66),
    ("version", "VERSION", 80),
    ("address", "ADDRESS", 110),
    ("incarnation", "INCARNATION", 140),
)
CONVERSATION_COLUMNS: Final = (
    ("conversation_id", "CONVERSATION", 0),
    ("status", "STATUS", 0),
    ("node", "NODE", 30),
    ("connections", "CLIENTS", 48),
    ("user_id", "USER", 60),
    ("epoch", "EPOCH", 90),
)


@dataclass(frozen=True)
class Snapshot:
    """What a cluster looked like.

    Attributes:
        at: when, on this machine.
        url: of the node that was asked.
        more: more conversations than were asked for are there.
        problem: why there is nothing newer, "" if there is.
    """

    at: datetime
    url: str
    nodes: Sequence[Row] = ()
    conversations: Sequence[Row] = field(default=())
    more: bool = False
    problem: str = ""

    def counts(self) -> Counter[str]:
        """Conversations by status, of those that were asked for."""
        return Counter(str(row["status"]) for row in self.conversations)

    def document(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "at": self.at.isoformat(timespec="milliseconds"),
            "nodes": list(self.nodes),
            "counts": dict(self.counts()),
            "conversations": list(self.conversations),
            "more": self.more,
        }


class Overview:
    """A snapshot as something to print.

    Args:
        screen: as much as fits on the screen; else all of it.
    """

    def __init__(self, snapshot: Snapshot, *, screen: bool) -> None:
        self._snapshot = snapshot
        self._screen = screen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print it. The size is that of the moment: a window may change it."""
        snapshot, screen, width = self._snapshot, self._screen, options.max_width
        heads = _heads(snapshot)
        nodes, rows = list(snapshot.nodes), list(snapshot.conversations)
        # A table has an empty line and its headings above it, and, if it is cut, a line below.
        left = (options.height or console.height) - len(heads) if screen else 0
        few = _fitting(len(nodes), max(left // 2, 4)) if screen else len(nodes)
        left -= few + 2 + (few < len(nodes)) if nodes else 0
        many = _fitting(len(rows), left) if screen else len(rows)
        lines: list[Text | Table] = [_cut(line, width) if screen else line for line in heads]
        for shown, all_, columns in (
            ([_node(node, snapshot) for node in nodes[:few]], nodes, NODE_COLUMNS),
            (rows[:many], rows, CONVERSATION_COLUMNS),
        ):
            if shown:
                lines += [Text(), _table(shown, columns, width, screen=screen)]
            if len(shown) < len(all_) and (shown or left > 0):
                lines.append(Text(f"and {len(all_) - len(shown)} more", style="dim"))
        yield Group(*lines)


def _fitting(count: int, room: int) -> int:
    """How many rows of a table can be shown in so many lines."""
    return count if count + 2 <= room else max(room - 3, 0)


def _heads(snapshot: Snapshot) -> list[Text]:
    states = Counter(str(row["state"]) for row in snapshot.nodes)
    nodes = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    counts = snapshot.counts()
    statuses = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    total = f"{len(snapshot.conversations)}{'+' if snapshot.more else ''}"
    clients = sum(int(row["connections"]) for row in snapshot.nodes)
    lines = [
        Text(printable(f"{snapshot.at:%H:%M:%S}  {snapshot.url}"), style="bold"),
        Text(f"nodes: {nodes or 'none'}; clients: {clients}"),
        Text(f"conversations: {total}" + (f" ({statuses})" if statuses else "")),
    ]
    if snapshot.problem:
        lines.append(Text(printable(snapshot.problem), style="bold red"))
    return lines


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return line


def _table(rows: Sequence[Row], columns: Sequence[tuple[str, str, int]], width: int, *, screen: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    chosen = [(key, title) for key, title, least in columns if width >= least]
    for _, title in chosen:
        table.add_column(title, no_wrap=screen, overflow="ellipsis" if screen else "fold")
    for row in rows:
        table.add_row(*(_cell(key, row.get(key)) for key, _ in chosen))
    return table


def _cell(key: str, value: Any) -> Text:
    text = cell(value)
    return Text(text, style=COLOURS.get(text, "") if key in ("state", "status") else "")


def _node(row: Row, snapshot: Snapshot) -> Row:
    """A node with how long ago what happened, by the newest renewal that there is: that is the store's clock."""
    renewals = [datetime.fromisoformat(each["last_renewal"]) for each in snapshot.nodes if each.get("last_renewal")]
    last, started = row.get("last_renewal"), row.get("started_at")
    renewed = None
    if last:
        renewed = f"{(max(renewals) - datetime.fromisoformat(last)).total_seconds():.1f} s"
    up = None if not started else duration((snapshot.at - datetime.fromisoformat(started)).total_seconds())
    return {**row, "renewed": renewed, "up": up}


def duration(seconds: float) -> str:
    """Two units of it: 3 d 4 h, 12 min 5 s."""
    left = max(int(seconds), 0)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        number, left = divmod(left, size)
        if number or (unit == "s" and not parts):
            parts.append(f"{number} {unit}")
    return " ".join(parts[:2])


def order(rows: Sequence[Row], by: str) -> list[Row]:
    """Conversations in the order that somebody wants; by `status`, what may need a look comes first."""

    def place(row: Row) -> tuple[Any, str]:
        if by == "status":
            status = str(row["status"])
            first: Any = STATUSES.index(status) if status in STATUSES else len(STATUSES)
        elif by in ("connections", "epoch"):
            first = -int(row[by])
        else:
            first = str(row[by])
        return first, str(row["conversation_id"])

    return sorted(rows, key=place)
