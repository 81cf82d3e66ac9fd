"""A conversation as the core's effects leave it, for comparison with what a server has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from convener.core.model import (
    REMEMBERED,
    AddAlarm,
    AddInbox,
    AddLog,
    AddPieces,
    ClearPieces,
    CloseAsks,
    Conversation,
    DropAlarm,
    DropInbox,
    Erase,
    InboxEntry,
    LogEntry,
    Meta,
    OpenAsks,
    Publish,
    SetMeta,
    SetState,
    TrimInbox,
    TrimSeen,
)


@dataclass(slots=True)
class Model:
    """A conversation as the core's effects leave it."""

    meta: Meta | None = None
    log: list[LogEntry] = field(default_factory=list[LogEntry])
    inbox: list[InboxEntry] = field(default_factory=list[InboxEntry])
    seen: dict[str, int] = field(default_factory=dict[str, int])
    state: bytes | None = None
    asks: dict[str, str] = field(default_factory=dict[str, str])
    pieces: list[str] = field(default_factory=list[str])
    alarms: dict[str, str] = field(default_factory=dict[str, str])
    said: list[str] = field(default_factory=list[str])

    def view(self, message_id: str = "") -> Conversation:
        tip = (self.log[-1].epoch, self.log[-1].seq) if self.log else (0, 0)
        last = max([0, *self.seen.values(), *(e.position for e in self.inbox)])
        return Conversation(
            *(self.meta, tip, tuple(self.inbox), self.seen.get(message_id), last),
            *(frozenset(self.asks), len(self.alarms), self.alarms.get(message_id)),
        )

    def apply(self, result: tuple[Any, Sequence[Any]]) -> Any:
        reply, effects = result
        for effect in effects:
            if not self._goes_with(effect):
                self._is_in_the_conversation(effect)
        return reply

    def _goes_with(self, effect: object) -> bool:
        """Questions, pieces, alarms."""
        match effect:
            case OpenAsks(asks):
                self.asks |= dict(asks)
            case CloseAsks(""):
                self.asks = {}
            case CloseAsks(ask_id):
                del self.asks[ask_id]
            case AddPieces(pieces):
                self.pieces += pieces
            case ClearPieces():
                self.pieces = []
            case AddAlarm(alarm_id, data):
                self.alarms[alarm_id] = data
            case DropAlarm(alarm_id):
                self.alarms.pop(alarm_id, None)
            case _:
                return False
        return True

    def _is_in_the_conversation(self, effect: object) -> None:
        match effect:
            case SetMeta(meta):
                self.meta = meta
            case AddLog(entries):
                self.log += entries
            case AddInbox(entry):
                self.inbox.append(entry)
                if entry.kind in REMEMBERED:
                    self.seen[entry.message_id] = entry.position
            case DropInbox(position, message_id):
                self.inbox = [e for e in self.inbox if e.position != position]
                self.seen.pop(message_id)
            case TrimInbox(position):
                self.inbox = [e for e in self.inbox if e.position > position]
            case TrimSeen(position):
                self.seen = {k: p for k, p in self.seen.items() if not 0 < p <= position}
            case SetState(state):
                self.state = state
            case Erase():
                self.meta, self.state = None, None
                self.log, self.inbox, self.seen = [], [], {}
                self.asks, self.pieces, self.alarms = {}, [], {}
            case Publish(message):
                self.said.append(message)
            case _:
                raise AssertionError(effect)
