"""Sending clients away from a node that leaves, so that they come back by themselves, on another one.

A Socket.IO client that is *disconnected* stays away for good, as does one whose connection is *refused*; one whose
Engine.IO session is closed may not notice for 45 s. A WebSocket that is closed with code 1012 (service restart, RFC
6455's registry) looks to every stock client like a lost connection, and it reconnects. Event streams are ended; an
`EventSource` reconnects by itself, unless it is answered with an error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

import structlog

from convener.gateway.sessions import Session, Sessions
from convener.manager.base import ClientSink

log = structlog.get_logger(__name__)

RATE: Final = 200.0
"""Clients that are sent away in a second: they all go to the nodes that are left."""
LONGEST_S: Final = 5.0
"""Within which all are told to go whose conversations are not here any more, however many they are."""
LOOK_S: Final = 0.05
SERVICE_RESTART: Final = 1012
CLOSED: Final[MutableMapping[str, Any]] = {
    "type": "websocket.close",
    "code": SERVICE_RESTART,
    "reason": "the node is leaving",
}


async def say_farewell(sessions: Sessions, sink: ClientSink, stays: Callable[[str], bool]) -> None:
    """Tell every client when it goes (`goaway`), as soon as its conversation is not on this node any more, and close
    its connection at that time. Returns when nobody is left.
    """
    sent: dict[str, asyncio.Task[None]] = {}
    due = time.monotonic()
    try:
        while here := sessions.all():
            going = [s for s in here if s.connection_id not in sent and not stays(s.conversation_id)]
            if going:
                log.info("sending clients away", clients=len(going))
            due = max(due, time.monotonic())
            for session in going:
                delay = min(due - time.monotonic(), LONGEST_S)
                sent[session.connection_id] = asyncio.create_task(_send_away(sink, session, max(delay, 0.0)))
                due += 1 / max(RATE, len(here) / LONGEST_S)
            await asyncio.sleep(LOOK_S)
    finally:
        for task in sent.values():
            task.cancel()


async def _send_away(sink: ClientSink, session: Session, delay: float) -> None:
    try:
        await (session.sink or sink).send(session.connection_id, "goaway", {"delay_ms": round(delay * 1000)})
        await asyncio.sleep(delay)
        await session.go_away()
    except Exception:
        log.exception("cannot send a client away", connection_id=session.connection_id)


async def close_transport(environ: Mapping[str, Any]) -> bool:
    """Close the WebSocket of a Socket.IO connection with code 1012. False if it has none."""
    if environ.get("asgi.scope", {}).get("type") != "websocket":
        return False
    try:
        await environ["asgi.send"](dict(CLOSED))
    except Exception as error:
        # It went by itself meanwhile.
        log.debug("a connection was closed already", error=str(error))
    return True
