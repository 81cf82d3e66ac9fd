"""What is read off a conversation's channel and out of its log, decoded: publications, entries, pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, cast

import msgspec
import structlog

from convener.core import cursor as cursors
from convener.core.live import Piece
from convener.core.model import LogEntry
from convener.core.view import Place
from convener.core.wire import turn_position

log = structlog.get_logger(__name__)

TEXT: Final = "text"
"""The type of parts whose data are strings."""


class Event(msgspec.Struct):
    """The JSON of a log entry."""

    kind: str
    turn: str
    ts: int
    data: Any

    def field(self, name: str) -> Any:
        """A member of `data`, None if data is not an object or has no such member."""
        data: Any = self.data
        return cast(dict[str, Any], data).get(name) if isinstance(data, dict) else None

    @property
    def attempt(self) -> int:
        """Of a `turn_started` entry."""
        attempt = self.field("attempt")
        return attempt if isinstance(attempt, int) else 1


class Publication(msgspec.Struct):
    """A message of a conversation's channel (`convener.core.wire`)."""

    t: str
    epoch: int = 0
    seq: int = 0
    n: int = 0
    events: list[msgspec.Raw] = []
    pieces: list[msgspec.Raw] = []
    status: str = ""
    pos: int = 0
    id: str = ""
    kind: str = "message"
    user: str = ""
    ts: int = 0
    data: msgspec.Raw = msgspec.Raw(b"")


class _Piece(msgspec.Struct):
    """The JSON of a piece."""

    turn: str
    attempt: int
    part: str
    type: str
    offset: int
    data: msgspec.Raw
    reply: int = 0


_event = msgspec.json.Decoder(Event)
_publication = msgspec.json.Decoder(Publication)
_piece = msgspec.json.Decoder(_Piece)
_text = msgspec.json.Decoder(str)
_list = msgspec.json.Decoder(list[Any])


@dataclass(frozen=True, slots=True)
class Item:
    """An entry as clients get it, decoded once per node."""

    place: Place
    before: Place
    event: Event
    payload: dict[str, Any]


def decode(entry: LogEntry, before: Place, generation: str) -> Item:
    """Decode an entry for clients. A damaged one is shown as kind `damaged` rather than stopping everybody."""
    try:
        event = _event.decode(entry.event)
    except msgspec.MsgspecError:
        log.exception("damaged log entry", epoch=entry.epoch, seq=entry.seq)
        event = Event("damaged", "", 0, None)
    payload = {
        "seq": entry.seq,
        "cursor": cursors.at(generation, entry.epoch, entry.seq),
        "epoch": entry.epoch,
        "kind": event.kind,
        "turn": event.turn,
        "data": event.data,
        "ts": event.ts,
    }
    return Item(Place(entry.epoch, entry.seq), before, event, payload)


def decode_publication(raw: bytes) -> Publication | None:
    """A publication, None if it is malformed."""
    try:
        return _publication.decode(raw)
    except msgspec.MsgspecError:
        return None


def decode_piece(raw: bytes | str) -> Piece | None:
    """A piece of an answer that is being written, None if it is malformed."""
    try:
        piece = _piece.decode(raw)
        data = (_text if piece.type == TEXT else _list).decode(piece.data)
    except msgspec.MsgspecError:
        return None
    position = turn_position(piece.turn)
    if position < 1 or piece.attempt < 1 or min(piece.offset, piece.reply) < 0 or not piece.part:
        return None
    writing = (position, piece.attempt, piece.reply)
    return Piece(writing, piece.part, piece.type, piece.offset, data, len(piece.data))
