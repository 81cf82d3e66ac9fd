"""Stock clients: python-socketio over WebSocket, which record everything that they are shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

import aiohttp
import socketio
from socketio.exceptions import ConnectionError as SocketConnectionError

from tests.support.waiting import TIME_SCALE, wait_until

CALL_LIMIT: Final = 30.0


class RejectedError(AssertionError):
    """The node answered `rejected`; `answer` is the acknowledgement."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(f"rejected: {answer}")
        self.answer = answer


@dataclass(eq=False)
class Client:
    """One python-socketio client in one conversation.

    Attributes:
        shown: every event of the server, as (name, payload), in order, over all connections.
        events: the log entries among them.
        cursor: of the last log entry; a stock client hands it over when it comes back by itself.
        closes: WebSocket close code of every connection that ended.
        refusals: data of every CONNECT_ERROR.
        failures: how often a connection could not be made, for whatever reason.
        times: when each of `shown` came, in seconds of the monotonic clock.
        marks: when a connection was `closed`, one was `refused` or not made, one was `connected`.
    """

    sio: Any
    cid: str
    name: str = ""
    shown: list[tuple[str, dict[str, Any]]] = field(default_factory=list[tuple[str, dict[str, Any]]])
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    cursor: str | None = None
    closes: list[int | None] = field(default_factory=list[int | None])
    refusals: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    failures: int = 0
    times: list[float] = field(default_factory=list[float])
    marks: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])

    def take(self, event: str, *arguments: Any) -> None:
        """Record what the server said."""
        payload: dict[str, Any] = arguments[0] if arguments else {}
        self.shown.append((event, payload))
        self.times.append(time.monotonic())
        if event == "event":
            self.events.append(payload)
            self.cursor = payload["cursor"]

    def note_refusal(self, error: Any) -> None:
        """Record why a node refused a connection; that nobody listens is told as a text."""
        self.failures += 1
        self.marks.append((time.monotonic(), "refused"))
        if isinstance(error, dict):
            self.refusals.append(cast("dict[str, Any]", error)["data"])

    def note_close(self, *_: object) -> None:
        """Record how the connection ended."""
        self.closes.append(cast("int | None", self.sio.eio.ws.close_code))
        self.marks.append((time.monotonic(), "closed"))

    def note_connection(self) -> None:
        """Record that there is a connection."""
        self.marks.append((time.monotonic(), "connected"))

    def named(self, name: str) -> list[dict[str, Any]]:
        """Payloads of all events of one name."""
        return [payload for event, payload in self.shown if event == name]

    @property
    def last_seq(self) -> int:
        """Number of the last entry that it was shown."""
        return self.events[-1]["seq"] if self.events else 0

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Log entries of one kind."""
        return [event for event in self.events if event["kind"] == kind]

    async def call(self, event: str, payload: Any = None) -> dict[str, Any]:
        """Emit and return the acknowledgement."""
        return cast("dict[str, Any]", await self.sio.call(event, payload, timeout=CALL_LIMIT * TIME_SCALE))

    async def say(self, text: str, message_id: str | None = None, **more: Any) -> dict[str, Any]:
        """Send a message; the acknowledgement if it was accepted, else `RejectedError`."""
        payload: dict[str, Any] = {"data": {"text": text}} | more
        if message_id is not None:
            payload["message_id"] = message_id
        answer = await self.call("message", payload)
        if answer.get("status") != "accepted":
            raise RejectedError(answer)
        return answer

    async def wait_for(self, count: int, kind: str = "reply", limit: float = 30) -> None:
        """Return when `count` entries of a kind were shown."""
        await wait_until(
            lambda: len(self.of_kind(kind)) >= count, f"{self.name} has seen {count} entries of kind {kind}", limit
        )

    async def wait_seq(self, seq: int, limit: float = 30) -> None:
        """Return when the entry `seq` was shown."""
        await wait_until(lambda: self.last_seq >= seq, f"{self.name} has seen entry {seq}", limit)

    async def wait_named(self, name: str, count: int = 1, limit: float = 30) -> list[dict[str, Any]]:
        """Return the payloads of an event when `count` of them were received."""
        await wait_until(lambda: len(self.named(name)) >= count, f"{self.name} has received {count} of {name}", limit)
        return self.named(name)

    async def close(self) -> None:
        """Leave."""
        await self.sio.shutdown()


class Clients:
    """Makes clients, and ends them all. One HTTP session for all of them, so that none is left open."""

    def __init__(self) -> None:
        # Every WebSocket holds its connection, so the usual limit of 100 would make the next one wait for ever.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._made: list[Client] = []

    async def join(
        self,
        url: str | Callable[[], str],
        cid: str,
        *,
        comes_back: bool = False,
        joined: bool = True,
        name: str = "",
        path: str = "",
        **hello: Any,
    ) -> Client:
        """Connect a client, by default wait until it has been told `joined`.

        Args:
            url: of a node; a function is asked at each connection, as a load balancer would be.
            comes_back: reconnect as stock clients do, from the last cursor.
            path: below which the nodes are served.
            hello: further members of the auth object: `user_id`, `after`, `tail`.
        """
        sio: Any = socketio.AsyncClient(
            http_session=self._session,
            reconnection=comes_back,
            reconnection_delay=cast("int", 0.1),  # the library's annotation is narrower than its arithmetic
            reconnection_delay_max=1,
            randomization_factor=0.05,
            handle_sigint=False,
        )
        client = Client(sio, cid, name or f"client {len(self._made)} of {cid}")
        sio.on("*", client.take)
        sio.on("disconnect", client.note_close)
        sio.on("connect", client.note_connection)
        sio.on("connect_error", client.note_refusal)

        def auth() -> dict[str, Any]:
            since = {"after": client.cursor} if client.cursor is not None else {}
            return {"conversation_id": cid} | hello | since

        self._made.append(client)
        await sio.connect(
            url,
            auth=auth,
            transports=["websocket"],
            wait_timeout=CALL_LIMIT * TIME_SCALE,
            socketio_path=f"{path}/socket.io",
        )
        if joined:
            await client.wait_named("joined")
        return client

    async def refused(self, url: str, cid: str, **hello: Any) -> dict[str, Any]:
        """The data of the refusal that a client gets instead of a connection."""
        try:
            await self.join(url, cid, joined=False, **hello)
        except SocketConnectionError:
            refusals = self._made[-1].refusals
            assert len(refusals) == 1, refusals
            return refusals[0]
        raise AssertionError(f"{cid} was joined, though it should have been refused")

    async def aclose(self) -> None:
        """End all clients."""
        for client in self._made:
            await client.close()
        await self._session.close()
