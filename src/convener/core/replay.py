"""What a new owner must know, out of the log: which messages are unanswered, and how often each was begun.

Fed with the entries after `base` in order; everything before is settled. `done` of the head may be lost with the
head, so it is found here too: turns are settled in order of their positions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

from convener.core.ledger import Record
from convener.core.model import LogEntry
from convener.core.wire import turn_position

SETTLING: Final = frozenset({"turn_done", "turn_failed", "turn_interrupted"})
"""Kinds of entries that end a turn, and with it settle the messages that it answered."""


@dataclass(frozen=True, slots=True)
class Begun:
    """An unanswered message: its `input` entry's seq, what it says, how many turns were begun for it, and what those
    have recorded.
    """

    position: int
    seq: int
    message_id: str
    user_id: str
    data: Any
    ts: int
    attempts: int = 0
    record: Record = field(default_factory=Record)
    alarm: bool = False


class Replay:
    """Folds log entries. A damaged entry is passed over: it can neither be answered nor settle anything."""

    def __init__(self, done: int) -> None:
        self.done = done
        self._found: dict[int, Begun] = {}

    def take(self, entry: LogEntry) -> None:
        """The next entry."""
        try:
            event: Any = json.loads(entry.event)
            kind, position, data = event["kind"], turn_position(event["turn"]), event["data"]
        except (ValueError, KeyError, TypeError):
            return
        if kind == "input" and isinstance(data, dict):
            fields = cast("dict[str, Any]", data)
            self._found[position] = Begun(
                position,
                entry.seq,
                str(fields.get("message_id", "")),
                str(fields.get("user_id", "")),
                fields.get("data"),
                event.get("ts", 0),
                alarm=fields.get("alarm") is True,
            )
        elif kind == "turn_started" and position in self._found:
            held = self._found[position]
            self._found[position] = replace(held, attempts=held.attempts + 1)
        elif kind in SETTLING:
            self.done = max(self.done, position)
        elif kind == "stopped":
            # A stop gives up everything that was accepted before it.
            self.done = max(self.done, *self._found, 0)
        elif position in self._found:
            self._found[position].record.note(kind, data)

    def unanswered(self) -> list[Begun]:
        """What is to be answered, in the order in which it was accepted."""
        return [begun for position, begun in sorted(self._found.items()) if position > self.done]
