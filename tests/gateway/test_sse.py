"""Server-Sent Events: the log as a stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from convener.gateway import sse
from convener.gateway.auth import Identity
from convener.gateway.sse import CAPACITY, HIGH_BYTES, HIGH_WATER, SseSink
from tests.gateway.support import Node, serving
from tests.gateway.test_http import answered, create, say
from tests.gateway.writing import under_way
from tests.support.waiting import wait_until


@dataclass
class Event:
    name: str
    id: str | None
    data: Any


@dataclass
class Stream:
    response: httpx.Response
    lines: AsyncIterator[str]

    async def next(self) -> Event | str:
        """The next event, or comment line."""
        fields: dict[str, str] = {}
        async for line in self.lines:
            if line.startswith(":"):
                return line
            if not line:
                if fields:
                    return Event(fields["event"], fields.get("id"), json.loads(fields["data"]))
                continue
            name, _, value = line.partition(": ")
            assert name not in fields, "one line per field"
            fields[name] = value
        raise EOFError

    async def events(self, count: int) -> list[Event]:
        found: list[Event] = []
        async with asyncio.timeout(20):
            while len(found) < count:
                event = await self.next()
                if isinstance(event, Event):
                    found.append(event)
        return found

    async def ends(self) -> bool:
        """Whether it ends well."""
        try:
            async with asyncio.timeout(20):
                while True:
                    await self.next()
        except EOFError:
            return True


@asynccontextmanager
async def stream(node: Node, cid: str = "c1", token: str | None = None, **options: Any) -> AsyncGenerator[Stream]:
    headers: dict[str, str] = {"Last-Event-ID": options.pop("last")} if "last" in options else {}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    async with (
        httpx.AsyncClient(base_url=node.url, headers=headers) as client,
        client.stream("GET", f"/api/conversations/{cid}/stream", params=options) as response,
    ):
        assert response.status_code == 200, await response.aread()
        yield Stream(response, response.aiter_lines())


async def with_log(node: Node) -> list[dict[str, Any]]:
    await create(node)
    await say(node, "one")
    await answered(node)
    return (await node.http.get("/api/conversations/c1/events")).json()["events"]


async def until(opened: Stream, name: str) -> list[Event]:
    """The next event of a name; others are passed over."""
    while (found := await opened.events(1))[0].name != name:
        pass
    return found


async def gone(node: Node) -> None:
    """Nothing is left of any stream."""
    sessions = node.gateway.context.sessions
    await wait_until(lambda: len(sessions) == 0, "all streams are forgotten")

    async def disconnected() -> bool:
        return not await node.manager.get_connections()

    await wait_until(disconnected, "the manager has no connections")
    assert node.metric("convener_connections", transport="sse") == 0


async def test_replay_then_joined_then_live(served: Node) -> None:
    log = await with_log(served)
    async with stream(served) as opened:
        assert opened.response.headers["content-type"].startswith("text/event-stream")
        replay = await opened.events(len(log))
        assert [(event.name, event.id, event.data) for event in replay] == [
            ("event", entry["cursor"], entry) for entry in log
        ]
        (joined,) = await opened.events(1)
        assert (joined.name, joined.id) == ("joined", None)
        assert (joined.data["last_seq"], joined.data["cursor"]) == (len(log), log[-1]["cursor"])
        assert served.metric("convener_connections", transport="sse") == 1
        await say(served, "two")
        live: list[Event] = []
        while [event.data["kind"] for event in live if event.name == "event"][-1:] != ["turn_done"]:
            live += await opened.events(1)
        entries = [event for event in live if event.name == "event"]
        assert [event.data["seq"] for event in entries] == list(range(6, 10))
        assert all(event.id == event.data["cursor"] for event in entries)
        # Nothing but a log entry may move the client's place.
        assert {event.id for event in live if event.name != "event"} <= {None}
    await gone(served)


async def test_an_answer_while_it_is_written(served: Node) -> None:
    await create(served)
    async with stream(served) as opened:
        await say(served, {"text": "/wait"})
        pen = await under_way(served)
        await pen.write("It was ")
        found = await opened.events(5)
        (first,) = await until(opened, "delta")
        assert (first.name, first.id) == ("delta", None)
        assert first.data == {
            "turn": "t1",
            "attempt": 1,
            "part": "text",
            "type": "text",
            "offset": 0,
            "data": "It was ",
        }
        cursor = max(event.id for event in found if event.id is not None)
        await pen.write("a\nnight")
        (second,) = await until(opened, "delta")
        assert (second.data["offset"], second.data["data"]) == (7, "a\nnight")
        async with stream(served, last=cursor) as again:
            (whole,) = await until(again, "delta")
            assert (whole.data["offset"], whole.data["data"]) == (0, "It was a\nnight")
        served.agent.go.set()
        assert (await until(opened, "event"))[0].data["kind"] == "reply"
    await gone(served)


async def test_resuming_at_every_place(served: Node) -> None:
    log = await with_log(served)
    for number, entry in enumerate(log, start=1):
        rest = [each["seq"] for each in log[number:]]
        for options in ({"last": entry["cursor"]}, {"after": entry["cursor"]}, {"after": entry["seq"]}):
            async with stream(served, **options) as opened:
                found = await opened.events(len(rest) + 1)
                assert [event.data["seq"] for event in found[:-1]] == rest
                assert found[-1].name == "joined"
    # What the browser remembers goes before what the page was opened with.
    async with stream(served, last=log[-1]["cursor"], after=0, tail=3) as opened:
        assert (await opened.events(1))[0].name == "joined"
    async with stream(served, tail=2) as opened:
        assert [event.data["seq"] for event in (await opened.events(3))[:2]] == [4, 5]
    async with stream(served, tail=0) as opened:
        assert (await opened.events(1))[0].name == "joined"
    await gone(served)


async def test_a_lost_place_is_told(served: Node) -> None:
    log = await with_log(served)
    async with stream(served, after="othergeneration.1.2") as opened:
        found = await opened.events(len(log) + 2)
        assert [event.name for event in found] == ["resync", *["event"] * len(log), "joined"]


async def test_a_stream_wakes_nothing_and_ends_with_a_stop(served: Node) -> None:
    await create(served)
    async with stream(served) as opened:
        await opened.events(2)
        await served.http.post("/api/conversations/c1/stop")
        found: list[Event] = []
        while not found or found[-1].name != "stopped":
            found += await opened.events(1)
        assert found[-1].data == {"conversation_id": "c1", "reason": "stopped by the user"}
        assert await opened.ends()
    # A stopped one can still be read.
    async with stream(served) as opened:
        found = await opened.events(3)
        assert [event.name for event in found] == ["event", "event", "joined"]
        assert found[-1].data["status"] == "stopped"
    assert (await served.http.get("/api/conversations/c1")).json()["status"] == "stopped"
    await gone(served)


async def test_a_comment_comes_when_nothing_else_does(served: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sse.PING == 15
    monkeypatch.setattr(sse, "PING", 0.01)
    await create(served)
    async with stream(served) as opened, asyncio.timeout(20):
        while not isinstance(line := await opened.next(), str):
            pass
        assert line.startswith(":")


async def test_a_shutdown_ends_streams_and_sends_new_ones_away(served: Node) -> None:
    await create(served)
    async with stream(served) as opened:
        await opened.events(2)
        await served.gateway.begin_shutdown()
        assert await opened.ends()
    ready = await served.http.get("/readyz?verbose")
    assert (ready.status_code, ready.json()["status"]) == (503, "unready")
    assert ready.json()["checks"]["gateway"] == "shutting down"
    # Not an error, at which a browser would give up: a stream that ends, so that it comes back.
    async with stream(served) as late:
        (told,) = await late.events(1)
        assert (told.name, told.data) == ("goaway", {"delay_ms": 0})
        assert await late.ends()
    await gone(served)


async def test_many_readers_see_the_same(served: Node) -> None:
    await create(served)

    async def read() -> list[Any]:
        found: list[Any] = []
        async with stream(served) as opened:
            while True:
                (event,) = await opened.events(1)
                if event.name == "event":
                    found.append(event.data)
                    if event.data["kind"] == "reply" and event.data["data"] == "end":
                        return found

    readers = [asyncio.create_task(read()) for _ in range(10)]
    for number in range(20):
        await say(served, number)
    await say(served, "end")
    histories = await asyncio.gather(*readers)
    assert all(history == histories[0] for history in histories)
    assert [entry["seq"] for entry in histories[0]] == list(range(1, len(histories[0]) + 1))
    await gone(served)


async def test_a_token_that_expires_ends_the_stream() -> None:
    expires = time.time() + 3600

    async def who(token: str | None, headers: Any) -> Identity | None:
        return Identity(token, expires_at=expires) if token and expires > time.time() else None

    async with serving(settings={"auth": "hook"}, authenticate=who) as node:
        await node.http.post(
            "/api/conversations", json={"conversation_id": "c1"}, headers={"Authorization": "Bearer alice"}
        )
        async with stream(node, token="alice") as opened:
            await opened.events(2)
            await node.gateway.context.sessions.recheck()
            assert len(node.gateway.context.sessions) == 1
            expires = 0.0
            await node.gateway.context.sessions.recheck()
            assert await opened.ends()
        await gone(node)


# --- the sink ---------------------------------------------------------------------------------------------------


async def test_the_sink_makes_its_feed_wait() -> None:
    sink = SseSink()
    for number in range(HIGH_WATER):
        await asyncio.wait_for(sink.ready("x"), 5)
        await sink.send("x", "event", {"seq": number, "cursor": f"g.1.{number}"})
    waiting = asyncio.create_task(sink.ready("x"))
    events = sink.events()
    await asyncio.wait({waiting}, timeout=0)
    assert not waiting.done()
    first = await anext(events)
    assert first.encode() == b'id: g.1.0\r\nevent: event\r\ndata: {"seq":0,"cursor":"g.1.0"}\r\n\r\n'
    await asyncio.wait_for(waiting, 5)


async def test_the_sink_makes_its_feed_wait_for_large_events_too() -> None:
    sink = SseSink()
    await sink.send("x", "delta", {"data": "." * HIGH_BYTES})
    await sink.send("x", "delta", {"data": "small"})
    waiting = asyncio.create_task(sink.ready("x"))
    events = sink.events()
    await asyncio.wait({waiting}, timeout=0)
    assert not waiting.done()
    await anext(events)
    await asyncio.wait_for(waiting, 5)
    assert (await anext(events)).encode() == b'event: delta\r\ndata: {"data":"small"}\r\n\r\n'


async def test_the_sink_ends_after_what_is_queued() -> None:
    sink = SseSink()
    await sink.send("x", "status", {"busy": True})
    await sink.disconnect("x")
    await sink.send("x", "status", {"busy": False})
    assert [event.data async for event in sink.events()] == ['{"busy":true}']
    await asyncio.wait_for(sink.ready("x"), 5)


async def test_a_feed_that_never_waits_loses_its_client_not_the_nodes_memory() -> None:
    sink = SseSink()
    for number in range(CAPACITY * 2):
        await sink.send("x", "event", {"seq": number, "cursor": ""})
    assert len([event async for event in sink.events()]) == CAPACITY + 1
