"""A conversation as a stream of Server-Sent Events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import structlog
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from convener.core.cursor import Cursor
from convener.gateway.auth import Identity
from convener.gateway.context import GatewayContext
from convener.gateway.jsontext import dumps
from convener.gateway.sessions import Session
from convener.ids import new_id

log = structlog.get_logger(__name__)

PING: Final = 15
"""Seconds between two comment lines, so that proxies and clients know that the connection lives."""
SEND_TIMEOUT: Final = 30.0
"""Seconds that a client may take to receive one event before it is given up."""
HIGH_WATER: Final = 64
"""Events that wait for the client before its feed pauses."""
HIGH_BYTES: Final = 1 << 20
"""Characters of JSON that wait for the client before its feed pauses."""
CAPACITY: Final = 1024
"""Events that may wait at all; a feed that does not pause is a fault, and ends the stream."""


class SseSink:
    """A `ClientSink` for one stream."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, str, str | None]] = deque()
        self._size = 0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False

    async def send(self, connection_id: str, event: str, payload: Mapping[str, Any]) -> None:
        """Queue one event."""
        if self._closed:
            return
        # Only log entries move a client's place; pieces of an answer that is being written (`delta`) have none.
        cursor = payload.get("cursor") if event == "event" else None
        text = dumps(payload).decode()
        self._waiting.append((event, text, cursor))
        self._size += len(text)
        self._changed.set()
        if len(self._waiting) >= HIGH_WATER or self._size >= HIGH_BYTES:
            self._room.clear()
        if len(self._waiting) > CAPACITY:
            log.error("a feed did not wait for its client; the stream ends", connection_id=connection_id)
            await self.close()

    async def ready(self, connection_id: str) -> None:
        """Return when fewer than `HIGH_WATER` events and `HIGH_BYTES` wait, or nobody reads any more."""
        await self._room.wait()

    async def disconnect(self, connection_id: str) -> None:
        """End the stream after what is queued."""
        await self.close()

    async def close(self) -> None:
        """End the stream after what is queued."""
        self._closed = True
        self._changed.set()
        self._room.set()

    async def events(self) -> AsyncIterator[ServerSentEvent]:
        """What to send, until closed."""
        while True:
            while self._waiting:
                event, text, cursor = self._waiting.popleft()
                self._size -= len(text)
                if len(self._waiting) < HIGH_WATER and self._size < HIGH_BYTES:
                    self._room.set()
                yield ServerSentEvent(text, event=event, id=cursor)
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()


class _Stream(EventSourceResponse):
    """The response; whatever ends it, the connection is forgotten."""

    def __init__(self, context: GatewayContext, session: Session, sink: SseSink) -> None:
        super().__init__(  # pyright: ignore[reportUnknownMemberType]  (a bare `dict` in the library's type)
            sink.events(), ping=PING, send_timeout=SEND_TIMEOUT
        )
        self._context = context
        self._session = session

    @staticmethod
    async def _listen_for_exit_signal() -> None:
        # The library would end streams as soon as uvicorn is told to stop, through a flag that the whole
        # process shares. Ours end when the gateway closes them, after their conversations have moved.
        await asyncio.Event().wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = self._session.connection_id
        try:
            self._context.manager.begin_replay(connection)
            await super().__call__(scope, receive, send)
        except TimeoutError:
            log.info("a client does not read its stream; given up", connection_id=connection)
        finally:
            self._context.sessions.remove(connection)
            await asyncio.shield(self._context.manager.disconnect_from_session(connection))


async def open_stream(
    context: GatewayContext,
    caller: Identity,
    token: str | None,
    headers: Mapping[str, str],
    conversation_id: str,
    *,
    user_id: str | None,
    after: Cursor | None,
    tail: int | None,
) -> EventSourceResponse:
    """Join the conversation as a reader: nothing is created, started or woken for it.

    A node that is leaving answers with a stream that only says so: at an error a browser's `EventSource` would give up,
    at the end of a stream it comes back, to another node.

    Raises:
        ConvenerError: as `ConversationManager.join_conversation`.
    """
    sink = SseSink()
    connection = f"sse-{new_id()}"
    if context.closing:
        await sink.send(connection, "goaway", {"delay_ms": 0})
        await sink.close()
        return EventSourceResponse(sink.events())
    await context.manager.join_conversation(
        conversation_id, connection, None, user_id, after, tail=tail, sink=sink, start=False
    )
    session = Session(connection, conversation_id, "sse", caller, token, headers, sink.close, sink.close, sink)
    context.sessions.add(session)
    return _Stream(context, session, sink)
