"""Sending clients away from a node that leaves, so that they come back by themselves, on another one.

A Socket.IO client that is *disconnected* stays away for good, and one whose Engine.IO session is closed may not notice
for 45 s. A WebSocket that is closed with code 1012 (service restart, RFC 6455's registry) looks to every stock client
like a lost connection, and it reconnects. Event streams are ended; an `EventSource` reconnects by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

import structlog

from convener.gateway.sessions import Session, Sessions
from convener.manager.base import ClientSink

log = structlog.get_logger(__name__)

RATE: Final = 200.0
"""Clients that are sent away in a second: they all go to the nodes that are left."""
LONGEST_S: Final = 5.0
SERVICE_RESTART: Final = 1012
CLOSED: Final[MutableMapping[str, Any]] = {
    "type": "websocket.close",
    "code": SERVICE_RESTART,
    "reason": "the node is leaving",
}


async def say_farewell(sessions: Sessions, sink: ClientSink) -> None:
    """Tell every client when it goes (`goaway`), then close its connection at that time."""
    leaving = sessions.all()
    if not leaving:
        return
    span = min(len(leaving) / RATE, LONGEST_S)
    log.info("sending clients away", clients=len(leaving), seconds=round(span, 3))
    delays = [span * i / len(leaving) for i in range(len(leaving))]
    await asyncio.gather(*(_send_away(sink, s, d) for s, d in zip(leaving, delays, strict=True)))


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
