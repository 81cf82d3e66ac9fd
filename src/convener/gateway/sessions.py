"""Open connections: counted, closed when their right to be open ends, ended at shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from convener.errors import NotAuthenticated, NotAuthorized, NotFound
from convener.gateway.access import Access
from convener.gateway.auth import Identity
from convener.manager.base import ClientSink
from convener.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

INTERVAL: Final = 10.0
"""Seconds between two checks of every open connection."""
AT_ONCE: Final = 16
"""Checks under way at a time: the application's functions may call a server of its own."""


@dataclass(slots=True)
class Session:
    """One open connection.

    Attributes:
        connection_id: unique on this node.
        conversation_id: "" for the list of the user's conversations.
        transport: `websocket`, `polling` or `sse`.
        token, headers: what it was opened with, to ask again.
        close: ends it so that the client stays away; must not raise.
        go_away: ends it so that the client comes back; must not raise.
        sink: where its events go, if that is not the node's Socket.IO server.
    """

    connection_id: str
    conversation_id: str
    transport: str
    identity: Identity
    token: str | None
    headers: Mapping[str, str]
    close: Callable[[], Awaitable[None]]
    go_away: Callable[[], Awaitable[None]]
    sink: ClientSink | None = None


class Sessions:
    """All open connections of a node."""

    def __init__(self, access: Access, metrics: Metrics) -> None:
        self._access = access
        self._connections = metrics.connections
        self._open: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, session: Session) -> None:
        """Enter a connection."""
        self._open[session.connection_id] = session
        self._connections.labels(transport=session.transport).inc()

    def remove(self, connection_id: str) -> Session | None:
        """Forget a connection; None if it is not known (any more)."""
        session = self._open.pop(connection_id, None)
        if session is not None:
            self._connections.labels(transport=session.transport).dec()
        return session

    def find(self, connection_id: str) -> Session | None:
        """A connection by its id."""
        return self._open.get(connection_id)

    def all(self) -> list[Session]:
        """All that are open now."""
        return list(self._open.values())

    async def close_all(self, transport: str) -> None:
        """End all connections of one kind."""
        for session in [s for s in self.all() if s.transport == transport]:
            await session.close()

    async def recheck(self, user_id: str | None = None, conversation_id: str | None = None) -> tuple[int, int]:
        """Close every connection whose caller would be refused today, or every one of a user, of a conversation.

        Returns:
            how many were looked at, and how many of them were closed.

        Only a clear refusal closes: an issuer or an application that does not answer must not end every
        conversation of the node.
        """
        chosen = [
            session
            for session in self.all()
            if user_id in (None, session.identity.user_id) and conversation_id in (None, session.conversation_id)
        ]
        todo = iter(chosen)
        unknown: list[Exception] = []

        async def worker() -> None:
            for session in todo:
                if self._open.get(session.connection_id) is session:
                    try:
                        await self._check(session)
                    except Exception as error:
                        unknown.append(error)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_ONCE, len(chosen))):
                group.create_task(worker())
        if unknown:
            log.warning("cannot confirm open connections", count=len(unknown), error=str(unknown[0]))
        return len(chosen), sum(self._open.get(s.connection_id) is not s for s in chosen)

    async def _check(self, session: Session) -> None:
        try:
            now = await self._access.authenticator.confirm(session.identity, session.token, session.headers)
            if not _covers(now, session.identity):
                raise NotAuthorized("the caller has other rights now")
            session.identity = now
            await self._access.still(now, session.conversation_id)
        except (NotAuthenticated, NotAuthorized, NotFound) as error:
            log.info("closing a connection that lost its right", reason=error.detail)
            await session.close()


def _covers(now: Identity, before: Identity) -> bool:
    return now.user_id == before.user_id and (now.admin or not before.admin) and (now.service or not before.service)
