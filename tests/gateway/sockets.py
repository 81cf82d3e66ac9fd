"""Socket.IO clients for tests: the stock one, and one that sends frames as it likes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import socketio
from socketio.exceptions import ConnectionError as Refused
from websockets.asyncio.client import ClientConnection, connect

from tests.gateway.support import Node
from tests.support.waiting import wait_until

ALICE: dict[str, Any] = {"conversation_id": "c1", "user_id": "alice"}


class Client:
    """python-socketio's client; keeps everything it hears, in order."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []
        self.refusal: Any = None
        self.io: Any = socketio.AsyncClient(reconnection=False)
        self.io.on("*", self._on_event)
        self.io.on("connect_error", self._on_refusal)

    async def _on_event(self, event: str, payload: Any = None) -> None:
        self.heard.append((event, payload))

    async def _on_refusal(self, data: Any) -> None:
        self.refusal = data

    async def open(self, url: str, auth: Any = None, query: str = "", **options: Any) -> None:
        await self.io.connect(
            url + (f"?{query}" if query else ""),
            auth=auth,
            transports=options.pop("transports", ["websocket"]),
            **options,
        )

    async def call(self, event: str, *arguments: Any) -> Any:
        """Send an event and return its acknowledgement; several arguments are sent as such."""
        payload = arguments if len(arguments) > 1 else arguments[0] if arguments else None
        return await self.io.call(event, payload, timeout=20)

    def of(self, event: str) -> list[Any]:
        """Payloads of one event."""
        return [payload for name, payload in self.heard if name == event]

    async def until(self, event: str, count: int = 1) -> list[Any]:
        """Wait for so many of an event."""
        await wait_until(lambda: len(self.of(event)) >= count, f"{count} of {event} were heard")
        return self.of(event)

    async def answered(self, count: int = 1) -> list[Any]:
        """Wait until so many turns are done; returns all log entries so far."""
        await wait_until(
            lambda: sum(entry["kind"] == "turn_done" for entry in self.of("event")) >= count, f"{count} turns are done"
        )
        return self.of("event")

    async def is_cut_off(self) -> bool:
        await wait_until(lambda: not self.io.connected, "the client is disconnected")
        return True


@asynccontextmanager
async def connected(url: str, auth: Any = None, query: str = "", **options: Any) -> AsyncGenerator[Client]:
    client = Client()
    await client.open(url, auth, query, **options)
    try:
        yield client
    finally:
        await client.io.disconnect()


async def refusal(url: str, auth: Any = None, query: str = "", **options: Any) -> dict[str, Any]:
    """Connect in vain; returns what the client was told."""
    client = Client()
    try:
        await client.open(url, auth, query, **options)
    except Refused:
        return client.refusal
    await client.io.disconnect()
    raise AssertionError("the connection was accepted")


class Raw:
    """A bare WebSocket that speaks Engine.IO by hand."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def send(self, frame: str | bytes) -> None:
        await self.socket.send(frame)

    async def receive(self) -> str:
        """The next frame that is no ping."""
        async with asyncio.timeout(20):
            while (frame := await self.socket.recv()) == "2":
                await self.socket.send("3")
        assert isinstance(frame, str)
        return frame

    async def join(self, auth: Any) -> str:
        """CONNECT; returns the answer."""
        assert (await self.receive())[0] == "0"
        await self.send("40" + (json.dumps(auth) if auth is not None else ""))
        return await self.receive()

    async def ack(self, number: int) -> Any:
        """Wait for an acknowledgement; other frames are passed over."""
        prefix = f"43{number}["
        while not (frame := await self.receive()).startswith(prefix):
            pass
        (answer,) = json.loads(frame[len(prefix) - 1 :])
        return answer


@asynccontextmanager
async def raw(url: str, origin: Any = None) -> AsyncGenerator[Raw]:
    address = url.replace("http://", "ws://") + "/socket.io/?EIO=4&transport=websocket"
    async with connect(address, origin=origin, proxy=None, max_size=None) as socket:
        try:
            yield Raw(socket)
        finally:
            with suppress(Exception):
                await socket.close()


async def forgotten(node: Node) -> None:
    """Nothing is left of any client, anywhere."""
    sessions = node.gateway.context.sessions
    await wait_until(lambda: len(sessions) == 0, "all sessions are closed")
    await wait_until(lambda: not node.sio.environ, "no transport is open")

    async def unknown() -> bool:
        return not await node.manager.get_connections()

    await wait_until(unknown, "the manager knows no connection")
    assert node.metric("convener_connections", transport="websocket") == 0
