"""An answer while it is being written: pieces gathered for a moment, then written to the conversation's tail.

Nothing here can fail a turn or hold it up: the finished text becomes a `reply` in the log whatever becomes of the
pieces. They are written in the owner's name (fenced like everything else), from the place where the tail ends, so a
write with an unknown outcome is simply repeated.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from convener.core import wire
from convener.errors import ConvenerError, InvalidRequest, OwnershipLost, StoreFull, StoreUnavailable
from convener.manager.appender import Ticket

if TYPE_CHECKING:
    from convener.manager.context import NodeContext

log = structlog.get_logger(__name__)

GATHER_S: Final = 0.03
RETRY_S: Final = 0.2
TEXT: Final = "text"


@dataclass(slots=True)
class Part:
    """What was streamed of one part: `sent` characters (or pieces) of it are in the tail."""

    type: str
    pieces: list[Any] = field(default_factory=list[Any])
    unsent: list[Any] = field(default_factory=list[Any])
    sent: int = 0

    def joined(self) -> Any:
        """The part as one value: text is joined, other pieces make a list."""
        return "".join(self.pieces) if self.type == TEXT else self.pieces

    def take(self) -> tuple[int, Any]:
        """What is to be sent now: its offset, and the pieces as one value."""
        offset, unsent = self.sent, self.unsent
        self.unsent = []
        if self.type == TEXT:
            text = "".join(unsent)
            self.sent += len(text)
            return offset, text
        self.sent += len(unsent)
        return offset, unsent


class Streamer:
    """The pieces of one attempt of a turn.

    Args:
        started: the ticket of the turn's start. What begins a turn clears the tail, so nothing is written before that
            is committed.
    """

    def __init__(self, node: NodeContext, cid: str, epoch: int, turn: str, attempt: int, started: Ticket) -> None:
        self._node = node
        self._cid = cid
        self._owner = node.incarnation
        self._epoch = epoch
        self._turn = turn
        self._attempt = attempt
        self._started = started
        self._parts: dict[str, Part] = {}
        self._replies = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, piece: Any, part: str, kind: str) -> None:
        """Take a piece. Raises `InvalidRequest` if the part has another type."""
        held = self._parts.setdefault(part, Part(kind))
        if held.type != kind:
            raise InvalidRequest(f"part {part} is of type {held.type}, not {kind}")
        held.pieces.append(piece)
        held.unsent.append(piece)
        if self._task is None and not self._closed:
            self._task = self._node.supervisor.spawn(f"stream {self._cid}", self._write())

    def joined(self) -> dict[str, Any]:
        """Everything that was streamed, by part."""
        return {name: part.joined() for name, part in self._parts.items()}

    def replace(self) -> None:
        """A reply takes the place of what was streamed before it."""
        self._parts = {}
        self._replies += 1

    def close(self) -> None:
        """Write nothing more."""
        self._closed = True

    async def _write(self) -> None:
        try:
            await asyncio.shield(self._started.written)
            while not self._closed:
                # What comes at one moment goes as one piece; who streams faster is not held up.
                await asyncio.sleep(GATHER_S)
                pieces = self._pieces()
                if not pieces:
                    return
                if not await self._send(pieces):
                    self._closed = True
        except OwnershipLost:
            self._closed = True
        except ConvenerError as error:
            log.warning("pieces are not shown; the reply will be", conversation_id=self._cid, error=str(error))
            self._closed = True
        finally:
            self._task = None

    def _pieces(self) -> list[str]:
        texts: list[str] = []
        for name, part in self._parts.items():
            if part.unsent:
                offset, data = part.take()
                piece = {
                    "turn": self._turn,
                    "attempt": self._attempt,
                    "reply": self._replies,
                    "part": name,
                    "type": part.type,
                    "offset": offset,
                    "data": data,
                }
                texts.append(msgspec.json.encode(piece).decode())
        return texts

    async def _send(self, pieces: list[str]) -> bool:
        """Until its outcome is known. False if they are not wanted any more."""
        position = wire.turn_position(self._turn)
        while not self._closed:
            await self._node.lease.wait_valid()
            try:
                reply = await self._node.store.add_pieces(self._cid, self._owner, self._epoch, position, pieces)
            except StoreFull:
                raise
            except StoreUnavailable:
                await asyncio.sleep(RETRY_S)
                continue
            return reply == "OK"
        return False
