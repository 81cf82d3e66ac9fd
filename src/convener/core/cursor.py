"""Cursors: what a client keeps to resume.

Opaque to clients: ``generation.epoch.seq``. The generation names the log, (epoch, seq) the exact entry, so
that a history that was rolled back and grew anew is noticed. A bare sequence number is accepted too; it
cannot notice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from convener.core.view import START, Place

_CURSOR: Final = re.compile(r"([A-Za-z0-9_-]{1,32})\.([0-9]{1,15})\.([0-9]{1,15})\Z")
_NUMBER: Final = re.compile(r"[0-9]{1,15}\Z")


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where to read on. An empty `generation` makes it a bare sequence number."""

    generation: str = ""
    place: Place = START

    def encode(self) -> str:
        """The text given to clients."""
        return f"{self.generation}.{self.place.epoch}.{self.place.seq}"

    @property
    def is_exact(self) -> bool:
        """Whether a rollback would be noticed."""
        return bool(self.generation)


def at(generation: str, epoch: int, seq: int) -> str:
    """The cursor of an entry."""
    return f"{generation}.{epoch}.{seq}"


def parse(value: object) -> Cursor | None:
    """The cursor that a client sent: `Cursor.encode`'s text, a number, or digits. None if it is neither."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return Cursor(place=Place(0, value)) if 0 <= value < 10**15 else None
    if not isinstance(value, str):
        return None
    if _NUMBER.match(value):
        return Cursor(place=Place(0, int(value)))
    match = _CURSOR.match(value)
    if match is None:
        return None
    return Cursor(match[1], Place(int(match[2]), int(match[3])))
