"""python-socketio behind one typed door: emit to one socket, know its backlog, send it away.

Emits go to this node's own sockets only; python-socketio's cross-node client managers are not used, since the log
and its channel already bring every entry to every node, in order and without loss.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final, cast

HIGH_WATER: Final = 64
"""Packets that may wait in one socket's queue before its feed pauses."""


class SocketIOSink:
    """A `ClientSink` over a `socketio.AsyncServer` (or anything that emits and disconnects like one)."""

    def __init__(self, sio: Any, namespace: str = "/") -> None:
        self._sio = sio
        self._namespace = namespace

    async def send(self, connection_id: str, event: str, payload: Mapping[str, Any]) -> None:
        """Queue one event for the client."""
        await self._sio.emit(event, payload, to=connection_id, namespace=self._namespace)

    async def ready(self, connection_id: str) -> None:
        """Wait until the socket's writer has taken what is queued, if that is much.

        Engine.IO's queue has no bound of its own; its `join` returns when the writer has taken everything, so at
        most one batch of the writer and `HIGH_WATER` packets of ours are in memory for a client that does not read.
        """
        queue = self._queue(connection_id)
        if queue is not None and queue.qsize() > HIGH_WATER:
            await queue.join()

    async def flushed(self, connection_id: str) -> None:
        """Wait until the socket's writer has taken everything that is queued."""
        queue = self._queue(connection_id)
        if queue is not None:
            await queue.join()

    async def disconnect(self, connection_id: str) -> None:
        """A Socket.IO disconnect: stock clients stay away after it."""
        await self._sio.disconnect(connection_id, namespace=self._namespace)

    def _queue(self, connection_id: str) -> asyncio.Queue[Any] | None:
        try:
            eio_sid = self._sio.manager.eio_sid_from_sid(connection_id, self._namespace)
            socket = self._sio.eio.sockets.get(eio_sid)
        except (AttributeError, KeyError):
            return None
        queue: Any = getattr(socket, "queue", None)
        return cast("asyncio.Queue[Any]", queue) if isinstance(queue, asyncio.Queue) else None
