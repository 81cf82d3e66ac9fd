"""What a node may show its clients next (I9): the emit rule.

A node holds, per conversation, the generation of the log and the exact (epoch, seq) of the last entry that it
has shown. A bare `last + 1` is not enough: after a lossy fail-over another history may use the same numbers
(docs/explanation/protocol.md, "Out to clients").
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from convener.core.model import LogEntry

Verdict = Literal["emit", "drop", "read"]


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A place in a log: the exact (epoch, seq) of an entry; (0, 0) is before the first."""

    epoch: int = 0
    seq: int = 0


START = Place()


def opens_after(event: str) -> Place | None:
    """The place before an `open` entry, None for other events."""
    if not event.startswith('{"kind":"open"'):
        return None
    try:
        epoch, seq = json.loads(event)["data"]["prev"]
        return Place(cast(int, epoch), cast(int, seq))
    except (ValueError, KeyError, TypeError):
        return None


def judge(place: Place, entry: LogEntry) -> Verdict:
    """Whether `entry`, heard from the channel, follows `place`."""
    if entry.epoch == place.epoch and entry.seq == place.seq + 1:
        return "emit"
    if entry.epoch <= place.epoch and entry.seq <= place.seq:
        return "drop"
    if opens_after(entry.event) == place:
        return "emit"
    return "read"


def accept(place: Place, entries: Sequence[LogEntry]) -> tuple[tuple[LogEntry, ...], Place, bool]:
    """Apply `judge` along a batch.

    Returns:
        the entries to emit, the place after them, and whether the log must be read because something is
        missing.
    """
    out: list[LogEntry] = []
    for entry in entries:
        verdict = judge(place, entry)
        if verdict == "read":
            return tuple(out), place, True
        if verdict == "emit":
            out.append(entry)
            place = Place(entry.epoch, entry.seq)
    return tuple(out), place, False
